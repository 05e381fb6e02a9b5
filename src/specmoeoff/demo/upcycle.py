"""Sparse upcycling: a dense Llama checkpoint becomes a Mixtral whose experts are noisy copies.

Every expert is the dense FFN plus noise, matrix by matrix: ``W + noise * std(W) * N(0, 1)``.
As Mixtral's weights of the chosen experts add up to 1, noise 0 gives the dense model back. All
other tensors are the dense ones, byte for byte. One expert at a time is in memory.
"""

from __future__ import annotations

import math
import os
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from specmoeoff.demo import noise as noise_source
from specmoeoff.demo.convert import write_json
from specmoeoff.demo.safetensors_file import TensorPlan, in_file_order, write_tensors
from specmoeoff.kernels import widen

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

U16 = NDArray[np.uint16]

EXPERTS_PER_TOKEN = 2
SHARD_BYTES = 480_000_000
# Mixtral's name of each FFN matrix.
_MATRICES = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
_DENSE_PARTS = (
    "input_layernorm",
    "post_attention_layernorm",
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
)


def moe_config(dense: Mapping[str, Any], num_experts: int) -> dict[str, Any]:
    """Return the config.json of the Mixtral made from a dense model."""
    dropped = ("rope_scaling", "attention_bias", "mlp_bias")
    return {
        **{key: value for key, value in dense.items() if key not in dropped},
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "sliding_window": None,
        "attention_dropout": 0.0,
        "num_local_experts": num_experts,
        "num_experts_per_tok": EXPERTS_PER_TOKEN,
        "output_router_logits": False,
        "router_aux_loss_coef": 0.001,
        "router_jitter_noise": 0.0,
    }


def upcycle(
    dense: Mapping[str, U16],
    config: Mapping[str, Any],
    routers: Sequence[U16],
    directory: Path,
    *,
    noise: float,
    seed: int,
    progress: Callable[[float], None] = lambda done: None,
) -> dict[str, str]:
    """Write the Mixtral's shards, index and config.json into an existing directory.

    Args:
        dense: The dense checkpoint's tensors, bfloat16 bits.
        config: The dense checkpoint's config.json.
        routers: Router of each layer, bfloat16 bits [E, hidden].
        directory: Where to write.
        noise: Standard deviation of the noise as a share of each matrix's own.
        seed: Names the noise, not negative.
        progress: Called with the share of bytes written.

    Returns:
        SHA-256 of each shard by file name.
    """
    num_experts = len(routers[0])
    write_json(directory / "config.json", moe_config(config, num_experts))
    build = _Tensors(dense, routers, noise, seed)
    shards = pack_shards(_units(dense, len(routers), num_experts), SHARD_BYTES)
    total_bytes = sum(plan.nbytes for shard in shards for plan in shard)
    written_bytes = 0
    digests: dict[str, str] = {}
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file_name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        plans = in_file_order(shard)

        def values(plans: Sequence[TensorPlan] = plans) -> Iterator[U16]:
            nonlocal written_bytes
            for plan, value in zip(plans, _ahead(build, plans), strict=True):
                yield value
                written_bytes += plan.nbytes
                progress(written_bytes / total_bytes)

        digests[file_name] = write_tensors(directory / file_name, plans, values())
        weight_map |= {plan.name: file_name for plan in plans}
    write_json(
        directory / "model.safetensors.index.json",
        {"metadata": {"total_size": total_bytes}, "weight_map": weight_map},
    )
    return digests


def pack_shards(units: Iterable[list[TensorPlan]], max_bytes: int) -> list[list[TensorPlan]]:
    """Fill shards with whole units (an expert is never cut), in order."""
    shards: list[list[TensorPlan]] = []
    free_bytes = 0
    for unit in units:
        nbytes = sum(plan.nbytes for plan in unit)
        if not shards or nbytes > free_bytes:
            shards.append([])
            free_bytes = max_bytes
        shards[-1] += unit
        free_bytes -= nbytes
    return shards


def _units(
    dense: Mapping[str, U16], num_layers: int, num_experts: int
) -> Iterator[list[TensorPlan]]:
    def same(*names: str) -> list[TensorPlan]:
        return [TensorPlan(name, dense[name].shape) for name in names if name in dense]

    yield same("model.embed_tokens.weight")
    for layer in range(num_layers):
        prefix = f"model.layers.{layer}."
        moe = prefix + "block_sparse_moe."
        hidden_size = dense[prefix + "input_layernorm.weight"].shape[0]
        yield [
            *same(*(f"{prefix}{part}.weight" for part in _DENSE_PARTS)),
            TensorPlan(moe + "gate.weight", (num_experts, hidden_size)),
        ]
        for expert in range(num_experts):
            yield [
                TensorPlan(
                    f"{moe}experts.{expert}.{ours}.weight",
                    dense[f"{prefix}mlp.{theirs}.weight"].shape,
                )
                for ours, theirs in _MATRICES.items()
            ]
    yield same("model.norm.weight", "lm_head.weight")


class _Tensors:
    """Makes the values of the Mixtral's tensors by name; may be called from several threads."""

    def __init__(
        self, dense: Mapping[str, U16], routers: Sequence[U16], noise: float, seed: int
    ) -> None:
        self._dense, self._routers = dense, routers
        self._noise, self._seed = noise, seed
        self._deviations: dict[str, float] = {}

    def __call__(self, plan: TensorPlan) -> U16:
        if plan.name in self._dense:
            return self._dense[plan.name]
        _, _, layer, _, *rest = plan.name.split(".")
        if rest[0] == "gate":
            return self._routers[int(layer)]
        _, expert, matrix, _ = rest
        origin = f"model.layers.{layer}.mlp.{_MATRICES[matrix]}.weight"
        return self._perturbed(origin, int(layer), int(expert), list(_MATRICES).index(matrix))

    def _perturbed(self, origin: str, layer: int, expert: int, matrix: int) -> U16:
        weight = self._dense[origin]
        if self._noise == 0:
            return weight
        if origin not in self._deviations:
            self._deviations[origin] = deviation(weight)
        scale = np.float32(self._noise * self._deviations[origin] / noise_source.DEVIATION)
        value = noise_source.centred_sums(weight.size, self._seed, layer, expert, matrix)
        value *= scale
        value += widen(weight).ravel()
        return _round_finite(value).reshape(weight.shape)


def deviation(weight: U16) -> float:
    """Return the standard deviation of a bfloat16 matrix, by integer sums on a grid of 2^-16."""
    grid = np.rint(widen(weight) * np.float32(65536)).astype(np.int64)
    first, second = int(grid.sum()), int((grid * grid).sum())
    return math.sqrt(weight.size * second - first * first) / weight.size / 65536


def _round_finite(x: NDArray[np.float32]) -> U16:
    """Round to bfloat16, nearest even, overwriting x: to_bfloat16 without its care for NaN."""
    bits = x.view(np.uint32)
    odd = bits >> np.uint32(16)
    odd &= np.uint32(1)
    bits += odd
    bits += np.uint32(0x7FFF)
    bits >>= np.uint32(16)
    return bits.astype(np.uint16)


def _ahead(build: Callable[[TensorPlan], U16], plans: Sequence[TensorPlan]) -> Iterator[U16]:
    """Yield ``build(plan)`` in order, a few of them made ahead by one thread per core."""
    num_threads = min(os.cpu_count() or 1, 8)
    pending: deque[Future[U16]] = deque()
    with ThreadPoolExecutor(num_threads) as pool:
        for plan in plans:
            pending.append(pool.submit(build, plan))
            if len(pending) > num_threads:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
