"""Loads what stays in memory: dense weights, and a draft model's whole self.

Equal tensors are kept once. A draft that was made from its target (or the other way round, as in
sparse upcycling) shares its embedding and attention with it, and the bytes saved hold experts.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from specmoeoff import kernels
from specmoeoff.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from numpy.typing import NDArray

    from specmoeoff.kernels import Weight
    from specmoeoff.models.base import Model, TensorSpec
    from specmoeoff.offload.checkpoint import Checkpoint

    Matrix = NDArray[np.generic]

COMPARED_ROWS = 256


@dataclass
class ModelWeights:
    """Weights by canonical name: for the whole model, and for each layer."""

    globals: dict[str, Weight]
    layers: list[dict[str, Weight]]
    experts: list[list[dict[str, Weight]]] = field(default_factory=list)
    """[num_layers][num_experts], for a model that is wholly in memory."""
    shared_bytes: int = 0
    """Bytes not taken because another model holds an equal tensor."""


class Loader:
    """Reads tensors of one checkpoint, sharing equal ones with ``others``."""

    def __init__(
        self, checkpoint: Checkpoint, others: ModelWeights | None = None, to_int8: bool = False
    ) -> None:
        self._checkpoint = checkpoint
        self._to_int8 = to_int8
        self._known = _by_shape(others) if others else {}
        self.shared_bytes = 0

    def load(self, specs: Mapping[str, TensorSpec]) -> dict[str, Weight]:
        """Load tensors by canonical name."""
        return {canonical: self._load(spec) for canonical, spec in specs.items()}

    def _load(self, spec: TensorSpec) -> Weight:
        ref = self._checkpoint.require(spec.name, spec.shape)
        tensor = self._checkpoint.read(spec.name)
        if spec.widen:
            tensor = np.ascontiguousarray(kernels.widen(tensor))
            if not np.isfinite(tensor).all():
                raise CheckpointError(
                    f"{ref.file}: tensor {spec.name!r} has NaN or infinite values"
                )
            return tensor
        for known in self._known.get((tensor.shape, tensor.dtype.str), ()):
            if _are_equal(known, tensor):
                self.shared_bytes += self.stored_bytes(spec)
                return known
        if self._to_int8 and tensor.ndim == 2:
            return kernels.pack_int8_dot(tensor)
        return tensor

    def stored_bytes(self, spec: TensorSpec) -> int:
        """Return the bytes a tensor takes once loaded, if nothing is shared."""
        ref = self._checkpoint.require(spec.name, spec.shape)
        count = int(np.prod(spec.shape))
        if spec.widen:
            return 4 * count
        if self._to_int8 and len(spec.shape) == 2:
            return kernels.packed_int8_bytes(*spec.shape)
        return count * ref.numpy_dtype.itemsize


def load_dense(model: Model, loader: Loader) -> ModelWeights:
    """Load everything but the experts."""
    weights = ModelWeights(loader.load(model.global_tensors()), [])
    weights.layers = [
        loader.load(model.layer_tensors(layer)) for layer in range(model.config.num_layers)
    ]
    weights.shared_bytes = loader.shared_bytes
    return weights


def load_whole(model: Model, loader: Loader) -> ModelWeights:
    """Load a model that stays in memory, experts included."""
    weights = load_dense(model, loader)
    weights.experts = [
        [loader.load(model.expert_tensors(layer, e)) for e in range(model.num_ffn_experts)]
        for layer in range(model.config.num_layers)
    ]
    weights.shared_bytes = loader.shared_bytes
    return weights


def dense_specs(model: Model) -> Iterator[TensorSpec]:
    """Yield every tensor that load_dense reads."""
    yield from model.global_tensors().values()
    for layer in range(model.config.num_layers):
        yield from model.layer_tensors(layer).values()


def expert_specs(model: Model) -> Iterator[TensorSpec]:
    """Yield every tensor of every expert."""
    for layer in range(model.config.num_layers):
        for expert in range(model.num_ffn_experts):
            yield from model.expert_tensors(layer, expert).values()


def _are_equal(a: Matrix, b: Matrix) -> bool:
    """Whether two matrices of one shape are equal; the first block settles nearly every case."""
    # In blocks, because a whole comparison takes a byte for each element at once.
    blocks = range(0, len(a), COMPARED_ROWS)
    return all(np.array_equal(a[i : i + COMPARED_ROWS], b[i : i + COMPARED_ROWS]) for i in blocks)


def _by_shape(weights: ModelWeights) -> dict[tuple[tuple[int, ...], str], list[Matrix]]:
    """Index matrices by shape and dtype; comparing within a group finds equal ones."""
    known: dict[tuple[tuple[int, ...], str], list[Matrix]] = {}
    for tensors in (weights.globals, *weights.layers):
        for tensor in tensors.values():
            if isinstance(tensor, np.ndarray) and tensor.ndim == 2:
                known.setdefault((tensor.shape, tensor.dtype.str), []).append(tensor)
    return known
