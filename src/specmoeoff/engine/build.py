"""Builds an engine from a configuration: plan, weights, then whatever is left becomes slots."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from specmoeoff import kernels
from specmoeoff.engine.allocator import return_large_blocks
from specmoeoff.engine.draft_kv import shared_layers
from specmoeoff.engine.engine import Engine, Parts
from specmoeoff.engine.forward import Forward, ResidentExperts, Span
from specmoeoff.engine.memory_plan import (
    DRAFT_ROWS,
    draft_kv_dtype,
    open_models,
    plan_models,
)
from specmoeoff.engine.weights import Loader, load_dense, load_whole
from specmoeoff.errors import InvalidInputError
from specmoeoff.models.registry import build_model
from specmoeoff.offload.elastic import ElasticMemory
from specmoeoff.offload.expert_store import ExpertStore
from specmoeoff.offload.kv_cache import KvCache, KvLayers
from specmoeoff.offload.reader import Reader
from specmoeoff.speculative.budget import AdaptiveBudget, FixedBudget
from specmoeoff.speculative.draft_context import OwnContexts, TargetContexts
from specmoeoff.speculative.model_drafter import ModelDrafter
from specmoeoff.speculative.ngram_drafter import NgramDrafting

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from numpy.typing import NDArray

    from specmoeoff.config import EngineConfig, KvDtype, ModelConfig, SpeculativeConfig
    from specmoeoff.engine.memory_plan import MemoryPlan
    from specmoeoff.engine.model_files import ModelFiles
    from specmoeoff.engine.weights import ModelWeights
    from specmoeoff.kernels import Activations
    from specmoeoff.offload.kv_cache import KvSequence
    from specmoeoff.speculative.drafter import Drafter


def build_engine(config: EngineConfig) -> Engine:
    """Open the models, plan the memory, load what stays, and get the stream ready.

    Raises:
        CheckpointError: A model cannot be used.
        DoesNotFitError: The budget is too small; nothing was read.
        InvalidInputError: This CPU does not have the target.
    """
    if config.cpu_target is not None:
        try:
            kernels.use_cpu_target(config.cpu_target)
        except ValueError as error:
            raise InvalidInputError(str(error)) from None
    # Always: an earlier engine of this process may have set another number.
    kernels.set_num_threads(config.num_threads or len(os.sched_getaffinity(0)))
    return_large_blocks()
    target_files, draft_files = open_models(config)
    plan, draft_files = plan_models(config, target_files, draft_files)
    weights = load_dense(target_files.model, Loader(target_files.checkpoint))
    drafter: Drafter | None = None
    draft: _Draft | None = None
    if config.speculative is not None and draft_files is not None:
        draft = _load_draft(config.speculative, draft_files, target_files, weights)
        if draft.target_layers is not None:
            plan = plan.without_draft_kv()
    elif config.speculative is not None and config.speculative.method == "ngram":
        drafter = NgramDrafting(config.speculative)
    kv = _kv_cache(target_files.model.config, config.kv_dtype, plan.kv_pages)
    caches = [kv]
    if draft is not None:
        drafter, own = _model_drafter(draft, draft_kv_dtype(config), plan, kv)
        caches += own
    shared_bytes = draft.weights.shared_bytes if draft is not None else 0
    elastic_bytes = plan.elastic_bytes + shared_bytes
    reader = Reader()
    model = build_model(target_files.model.config, plan.policy.dtype)
    store = ExpertStore(
        target_files.expert_layouts(),
        max(model.config.num_experts_per_tok, 1),
        (elastic_bytes + plan.largest_step_bytes) // plan.policy.expert_slot_bytes,
        reader,
        config.expert_mode,
    )
    return Engine(
        Parts(
            config=model.config,
            plan=plan,
            target=Forward(model, weights, store, kv),
            kv=kv,
            store=store,
            reader=reader,
            elastic=ElasticMemory(elastic_bytes, store, caches, plan.policy.min_expert_slots),
            drafter=drafter,
            budget=_budget(config.speculative),
            shared_bytes=shared_bytes,
            seed=config.seed,
        )
    )


class DraftForward:
    """A draft model's forward pass, as speculative.model_drafter wants it."""

    def __init__(self, forward: Forward) -> None:
        self._forward = forward

    def run_tokens(
        self, rows: Sequence[tuple[KvSequence, Sequence[int], int]]
    ) -> NDArray[np.float32]:
        """Run (kv, token_ids, num_outputs) of each sequence; return hidden states [R, hidden]."""
        return self._forward.run([Span(*row) for row in rows])

    def logits(self, hidden: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return the logits of hidden states, [R, V]."""
        return self._forward.logits(hidden)

    def best(self, hidden: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
        """Return the largest logit and its token of each hidden state, [R] each."""
        return self._forward.best(hidden)


@dataclass(frozen=True)
class _Draft:
    """A loaded draft model."""

    config: ModelConfig
    weights: ModelWeights
    target_layers: list[int] | None
    """The target's layers whose KV it reads; None if it has a cache of its own."""


def _load_draft(
    speculative: SpeculativeConfig, files: ModelFiles, target: ModelFiles, weights: ModelWeights
) -> _Draft:
    loader = Loader(files.checkpoint, weights, speculative.draft_weight_dtype == "int8")
    own, config = load_whole(files.model, loader), files.model.config
    layers = None
    if speculative.share_kv:
        layers = shared_layers(config, own, target.model.config, weights)
    return _Draft(config, own, layers)


def _model_drafter(
    draft: _Draft, kv_dtype: KvDtype, plan: MemoryPlan, target_kv: KvCache
) -> tuple[ModelDrafter, list[KvCache]]:
    """Return the drafter and the caches it has of its own."""
    # Drafts never change the output, so they take the rounding where it makes them faster.
    activations: Activations = "bfloat16" if kernels.multiplies_bfloat16() else "float32"
    model = build_model(draft.config, activations)
    experts = ResidentExperts(draft.weights.experts)
    longest = draft.config.max_position_embeddings
    if draft.target_layers is not None:
        layers = KvLayers(target_kv, draft.target_layers)
        forward = DraftForward(Forward(model, draft.weights, experts, layers))
        return ModelDrafter(forward, TargetContexts(), longest, plan.distribution_bytes), []
    kv = _kv_cache(draft.config, kv_dtype, plan.kv_pages)
    forward = DraftForward(Forward(model, draft.weights, experts, kv))
    contexts = OwnContexts(kv, forward.run_tokens, longest, DRAFT_ROWS)
    return ModelDrafter(forward, contexts, longest, plan.distribution_bytes), [kv]


def _kv_cache(model: ModelConfig, dtype: KvDtype, max_pages: int) -> KvCache:
    return KvCache(model.num_layers, model.num_kv_heads, model.head_dim, max_pages, dtype)


def _budget(speculative: SpeculativeConfig | None) -> AdaptiveBudget | FixedBudget:
    if speculative is None:
        return FixedBudget(0)
    if speculative.adaptive:
        return AdaptiveBudget(speculative.num_speculative_tokens)
    return FixedBudget(speculative.num_speculative_tokens)
