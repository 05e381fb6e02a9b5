"""Builds an engine from a configuration: plan, weights, then whatever is left becomes slots."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from specmoeoff import kernels
from specmoeoff.engine.allocator import return_large_blocks
from specmoeoff.engine.engine import Engine, Parts
from specmoeoff.engine.forward import Forward, ResidentExperts, Span
from specmoeoff.engine.memory_plan import (
    DRAFT_ROWS,
    MemoryPlan,
    draft_kv_dtype,
    open_models,
    plan_models,
)
from specmoeoff.engine.weights import Loader, ModelWeights, load_dense, load_whole
from specmoeoff.errors import InvalidInputError
from specmoeoff.models.registry import build_model
from specmoeoff.offload.elastic import ElasticMemory
from specmoeoff.offload.expert_store import ExpertStore
from specmoeoff.offload.kv_cache import KvCache
from specmoeoff.offload.reader import Reader
from specmoeoff.speculative.budget import AdaptiveBudget, FixedBudget
from specmoeoff.speculative.model_drafter import ModelDrafter
from specmoeoff.speculative.ngram_drafter import NgramDrafting

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from numpy.typing import NDArray

    from specmoeoff.config import EngineConfig, KvDtype, ModelConfig, SpeculativeConfig
    from specmoeoff.engine.model_files import ModelFiles
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
    kv = _kv_cache(target_files.model.config, config.kv_dtype, plan.kv_pages)
    caches = [kv]
    drafter: Drafter | None = None
    shared_bytes = 0
    if config.speculative is not None and draft_files is not None:
        draft = _draft_forward(config.speculative, config, draft_files, weights, plan)
        caches.append(draft.kv)
        shared_bytes = draft.shared_bytes
        drafter = ModelDrafter(
            draft,
            draft_files.model.config.max_position_embeddings,
            DRAFT_ROWS,
            plan.distribution_bytes,
        )
    elif config.speculative is not None and config.speculative.method == "ngram":
        drafter = NgramDrafting(config.speculative)
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

    def __init__(self, forward: Forward, shared_bytes: int) -> None:
        self.kv = forward.kv
        self.shared_bytes = shared_bytes
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


def _draft_forward(
    speculative: SpeculativeConfig,
    config: EngineConfig,
    files: ModelFiles,
    target: ModelWeights,
    plan: MemoryPlan,
) -> DraftForward:
    loader = Loader(files.checkpoint, target, speculative.draft_weight_dtype == "int8")
    weights = load_whole(files.model, loader)
    kv = _kv_cache(files.model.config, draft_kv_dtype(config), plan.kv_pages)
    # Drafts never change the output, so they take the rounding where it makes them faster.
    activations: Activations = "bfloat16" if kernels.multiplies_bfloat16() else "float32"
    model = build_model(files.model.config, activations)
    forward = Forward(model, weights, ResidentExperts(weights.experts), kv)
    return DraftForward(forward, weights.shared_bytes)


def _kv_cache(model: ModelConfig, dtype: KvDtype, max_pages: int) -> KvCache:
    return KvCache(model.num_layers, model.num_kv_heads, model.head_dim, max_pages, dtype)


def _budget(speculative: SpeculativeConfig | None) -> AdaptiveBudget | FixedBudget:
    if speculative is None:
        return FixedBudget(0)
    if speculative.adaptive:
        return AdaptiveBudget(speculative.num_speculative_tokens)
    return FixedBudget(speculative.num_speculative_tokens)
