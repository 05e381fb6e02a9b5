"""append_kv: every CPU target writes the reference's bits, in every dtype of KV."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

from kernel_cases import same_bits
from paged_kv import empty_pages, empty_scales
from specmoeoff import kernels
from specmoeoff.kernels import reference

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.usefixtures("kernel_settings")

DTYPES = ["bfloat16", "float16", "float32", "int8"]


SPECIAL = [0.0, -0.0, np.inf, -np.inf, np.nan, 1e-40, -1e-45, 3.4e38, 65504.0, 65519.9, 65520.0]
SPECIAL += [-65536.0, 2**-14, 2**-15 * 1.0009765625, -(2.0**-24), 2**-25, 2**-25 * 1.5, 6.1e-5]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("page_size", [16, 48])
@pytest.mark.parametrize("num_tokens", [0, 1, 50, 3000])
@pytest.mark.parametrize("head_dim", [8, 40])
def test_append_kv_writes_the_reference_bits_on_every_target(
    dtype: str, page_size: int, num_tokens: int, head_dim: int
) -> None:
    rng = np.random.default_rng(3)
    shape = (num_tokens, 3, head_dim)
    keys = rng.standard_normal(shape).astype(np.float32)
    values = rng.standard_normal(shape).astype(np.float32)
    keys.reshape(-1)[: len(SPECIAL)] = SPECIAL[: keys.size]
    values[30:] *= np.float32(2) ** rng.integers(-30, 20, shape)[30:]
    keys[40:43] = 0
    keys[43:44] = 1e-45
    num_pages = 3000 // page_size + 1
    slots = rng.permutation(num_pages * page_size)[:num_tokens].astype(np.int32)
    slots[num_tokens // 2 :].sort()  # runs of slots within a page
    if num_tokens > 1:
        slots[-1] = slots[0]  # the later one stays

    def appended(append: Callable[..., None]) -> list[np.ndarray]:
        pages = empty_pages(num_pages, 3, head_dim, page_size, dtype)
        scales = empty_scales(num_pages, 3, page_size, dtype)
        with np.errstate(invalid="ignore"):
            append(keys, values, *pages, slots, **scales)
        return [*pages, *scales.values()]

    wanted = appended(reference.append_kv)
    for target in kernels.cpu_targets():
        kernels.use_cpu_target(target)
        for ours, theirs in zip(appended(kernels.append_kv), wanted, strict=True):
            assert same_bits(ours, theirs), target


@pytest.mark.slow
def test_append_kv_rounds_every_float16_and_what_lies_between() -> None:
    halves = np.arange(0x7C00, dtype=np.uint16).view(np.float16).astype(np.float64)
    between = (halves[1:] + halves[:-1]) / 2
    near = np.concatenate([halves, between]).astype(np.float32)
    numbers = np.concatenate([near, np.nextafter(near, np.float32(np.inf)), -near])
    numbers = np.resize(numbers, (len(numbers) // 16 + 1, 1, 16)).astype(np.float32)
    slots = np.arange(len(numbers), dtype=np.int32)
    for target in kernels.cpu_targets():
        kernels.use_cpu_target(target)
        k_pages, v_pages = empty_pages(len(numbers) // 16 + 1, 1, 16, 16, "float16")
        kernels.append_kv(numbers, numbers, k_pages, v_pages, slots)
        stored = np.ascontiguousarray(v_pages).reshape(-1, 16)[: len(numbers)]
        assert same_bits(stored, numbers[:, 0].astype(np.float16)), target


@pytest.mark.parametrize(
    ("name", "error", "slots"),
    [
        ("slots", ValueError, np.array([0, 64], np.int32)),
        ("slots", ValueError, np.array([-1, 0], np.int32)),
        ("slots", TypeError, np.array([0, 1], np.int64)),
        ("keys", ValueError, np.array([0], np.int32)),
    ],
)
def test_append_kv_names_the_wrong_argument(
    name: str, error: type[Exception], slots: np.ndarray
) -> None:
    pages = empty_pages(2, 3, 8, 32, "bfloat16")
    tokens = np.zeros((2, 3, 8), np.float32)
    with pytest.raises(error, match=name):
        kernels.append_kv(tokens, tokens, *pages, slots)


def test_append_kv_refuses_pages_it_may_not_write() -> None:
    k_pages, v_pages = empty_pages(2, 3, 8, 32, "float32")
    k_pages.flags.writeable = False
    tokens = np.zeros((1, 3, 8), np.float32)
    with pytest.raises(ValueError, match="k_pages"):
        kernels.append_kv(tokens, tokens, k_pages, v_pages, np.zeros(1, np.int32))


def test_append_kv_refuses_scales_it_may_not_write() -> None:
    pages, scales = empty_pages(2, 3, 8, 32, "int8"), empty_scales(2, 3, 32, "int8")
    scales["v_scales"].flags.writeable = False
    tokens = np.zeros((1, 3, 8), np.float32)
    with pytest.raises(ValueError, match="v_scales"):
        kernels.append_kv(tokens, tokens, *pages, np.zeros(1, np.int32), **scales)
