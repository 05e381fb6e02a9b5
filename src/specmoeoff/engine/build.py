"""Builds an engine from a configuration: plan, weights, then whatever is left becomes slots."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from specmoeoff import kernels
from specmoeoff.engine.allocator import return_large_blocks
from specmoeoff.engine.draft_kv import SharedDraft, shared_layers
from specmoeoff.engine.engine import Engine, Parts
from specmoeoff.engine.forward import Forward, Span
from specmoeoff.engine.memory_plan import (
    DRAFT_ROWS,
    draft_kv_dtype,
    longest_sequence,
    open_models,
    plan_models,
)
from specmoeoff.engine.planned_build import load_planned, planned_dtype
from specmoeoff.engine.planned_memory import keeps_kv_on_host, split_memory
from specmoeoff.engine.planned_policy import fixed_plan, planned_config, split_models
from specmoeoff.engine.planned_target import PlannedTarget
from specmoeoff.engine.reactive_target import ReactiveTarget
from specmoeoff.engine.torch_build import with_device_memory
from specmoeoff.engine.weights import (
    Loader,
    ModelWeights,
    dense_specs,
    expert_specs,
    load_dense,
    load_whole,
)
from specmoeoff.errors import InvalidInputError
from specmoeoff.models.registry import build_model
from specmoeoff.offload.elastic import ElasticMemory
from specmoeoff.offload.expert_store import ExpertStore
from specmoeoff.offload.kv_cache import KvCache, KvLayers
from specmoeoff.offload.reader import Reader
from specmoeoff.offload.tiers import Tier
from specmoeoff.pipeline.schedules.shape import Draft
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
    from specmoeoff.engine.target import Target
    from specmoeoff.kernels import Activations
    from specmoeoff.offload.kv_cache import KvSequence
    from specmoeoff.speculative.drafter import Drafter


def build_engine(config: EngineConfig) -> Engine:
    """Open the models, plan the memory, load what stays, and get the stream ready.

    Raises:
        CheckpointError: A model cannot be used.
        DoesNotFitError: The budget is too small; nothing was read.
        InvalidInputError: This CPU does not have the kernel target, the schedule is unknown, or the
            device needs torch or a GPU, and there is none.
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
    if config.is_planned:
        return _planned_engine(config, target_files, draft_files)
    return _reactive_engine(config, target_files, draft_files)


def _reactive_engine(
    config: EngineConfig, files: ModelFiles, draft_files: ModelFiles | None
) -> Engine:
    plan, draft_files = plan_models(config, files, draft_files)
    weights = load_dense(files.model, Loader(files.checkpoint))
    draft = _load_draft(config, draft_files, files, weights)
    if draft is not None and draft.target_layers is not None:
        plan = plan.without_draft_kv(longest_sequence(config, files.model.config))
    kv = _kv_cache(files.model.config, config.kv_dtype, plan.kv_pages)
    drafting = _drafting(config, draft, plan, kv)
    caches = [kv, *drafting.caches]
    elastic_bytes = plan.elastic_bytes + drafting.shared_bytes
    reader = Reader()
    model = build_model(files.model.config, plan.policy.dtype)
    store = ExpertStore(
        files.expert_layouts(),
        max(model.config.num_experts_per_tok, 1),
        (elastic_bytes + plan.largest_step_bytes) // plan.policy.expert_slot_bytes,
        reader,
        config.expert_mode,
    )
    elastic = ElasticMemory(elastic_bytes, store, caches, plan.policy.min_expert_slots)
    memory = Tier("main", plan.policy.memory)
    for name, num_bytes in plan.policy.reservations:
        memory.reserve(name, num_bytes)
    target = ReactiveTarget(model, weights, store, kv, elastic, reader, memory)
    return _engine(config, plan, target, drafting)


def _planned_engine(
    config: EngineConfig, files: ModelFiles, draft_files: ModelFiles | None
) -> Engine:
    wanted = with_device_memory(planned_config(config))
    split, draft_files, left_out = split_models(config, wanted, files, draft_files)
    dtype = planned_dtype(config, wanted, files)
    weights = load_dense(files.model, Loader(files.checkpoint))
    draft = _load_draft(config, draft_files, files, weights, keeps_kv_on_host(wanted))
    if draft is not None:
        # Known only now that both are loaded; what it does not take is the target's.
        shared = SharedDraft(
            # On a GPU the target's weights are another copy.
            draft.weights.shared_bytes if wanted.device != "cuda" else 0,
            draft.target_layers is not None,
            split.tiers[0].as_dict()["runtime"],
        )
        # What is loaded counts neither as the process's own nor as no longer free.
        config = replace(config, memory=split.tiers[0].budget)
        split = split_memory(config, wanted, files, draft_files, shared=shared)
    plan = fixed_plan(config, split, files, draft_files, dtype, left_out)
    size = _draft_size(config, draft_files)
    planned = load_planned(config, wanted, files, split, weights, dtype, size)
    try:
        drafting = _drafting(config, draft, plan, planned.forward.kv)
    except BaseException:
        planned.close()
        raise
    return _engine(config, plan, PlannedTarget(planned), drafting)


@dataclass(frozen=True)
class _Drafting:
    """A drafter and what it holds."""

    drafter: Drafter | None
    caches: tuple[KvCache, ...] = ()
    """Of its own."""
    shared_bytes: int = 0


def _engine(config: EngineConfig, plan: MemoryPlan, target: Target, drafting: _Drafting) -> Engine:
    return Engine(
        Parts(
            config=plan.passes[0],
            plan=plan,
            target=target,
            drafter=drafting.drafter,
            budget=_budget(config.speculative),
            shared_bytes=drafting.shared_bytes,
            seed=config.seed,
        )
    )


def _drafting(
    config: EngineConfig, draft: _Draft | None, plan: MemoryPlan, target_kv: KvCache
) -> _Drafting:
    if draft is not None:
        drafter, caches = _model_drafter(draft, draft_kv_dtype(config), plan, target_kv)
        return _Drafting(drafter, caches, draft.weights.shared_bytes)
    if config.speculative is not None and config.speculative.method == "ngram":
        return _Drafting(NgramDrafting(config.speculative))
    return _Drafting(None)


def _draft_size(config: EngineConfig, files: ModelFiles | None) -> Draft | None:
    """Return what a draft model weighs."""
    if files is None or config.speculative is None:
        return None
    loader = Loader(files.checkpoint, to_int8=config.speculative.draft_weight_dtype == "int8")
    num_bytes = files.dense_bytes(loader) + files.expert_bytes(loader)
    specs = [*dense_specs(files.model), *expert_specs(files.model)]
    return Draft(0, num_bytes, sum(math.prod(spec.shape) for spec in specs))


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
    config: EngineConfig,
    files: ModelFiles | None,
    target: ModelFiles,
    weights: ModelWeights,
    kv_is_on_host: bool = True,
) -> _Draft | None:
    speculative = config.speculative
    if files is None or speculative is None:
        return None
    loader = Loader(files.checkpoint, weights, speculative.draft_weight_dtype == "int8")
    own, model = load_whole(files.model, loader), files.model.config
    layers = None
    if speculative.share_kv and kv_is_on_host:
        layers = shared_layers(model, own, target.model.config, weights)
    return _Draft(model, own, layers)


def _model_drafter(
    draft: _Draft, kv_dtype: KvDtype, plan: MemoryPlan, target_kv: KvCache
) -> tuple[ModelDrafter, tuple[KvCache, ...]]:
    """Return the drafter and the caches it has of its own."""
    # Drafts never change the output, so they take the rounding where it makes them faster.
    activations: Activations = "bfloat16" if kernels.multiplies_bfloat16() else "float32"
    model = build_model(draft.config, activations)
    longest = draft.config.max_position_embeddings
    if draft.target_layers is not None:
        layers = KvLayers(target_kv, draft.target_layers)
        forward = DraftForward(Forward(model, draft.weights, layers))
        return ModelDrafter(forward, TargetContexts(), longest, plan.distribution_bytes), ()
    kv = _kv_cache(draft.config, kv_dtype, plan.kv_pages)
    forward = DraftForward(Forward(model, draft.weights, kv))
    contexts = OwnContexts(kv, forward.run_tokens, longest, DRAFT_ROWS)
    return ModelDrafter(forward, contexts, longest, plan.distribution_bytes), (kv,)


def _kv_cache(model: ModelConfig, dtype: KvDtype, max_pages: int) -> KvCache:
    return KvCache(model.num_layers, model.num_kv_heads, model.head_dim, max_pages, dtype)


def _budget(speculative: SpeculativeConfig | None) -> AdaptiveBudget | FixedBudget:
    if speculative is None:
        return FixedBudget(0)
    if speculative.adaptive:
        return AdaptiveBudget(speculative.num_speculative_tokens)
    return FixedBudget(speculative.num_speculative_tokens)
