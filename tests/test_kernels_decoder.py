"""A decoder's layer in two native calls: the bits of the kernels called one by one.

Every kernel has its own oracle; what is proven here is that nothing else happens between them.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paged_kv import empty_pages, empty_scales
from specmoeoff import kernels
from specmoeoff.kernels import Decoder, DecoderShape

pytestmark = pytest.mark.usefixtures("kernel_settings")

PAGE_SIZE = 16


@dataclass
class Case:
    """A random decoder and one pass over it."""

    shape: DecoderShape
    layers: list[dict[str, Any]]
    experts: list[list[tuple[Any, Any, Any]]]
    kv_dtype: str
    lens: list[int]
    """Tokens of each sequence before the pass."""
    counts: list[int]
    """New tokens of each."""
    seed: int

    def pages(self) -> list[tuple[Any, Any, Any, Any]]:
        """Return a layer's pages, filled with what went before."""
        rng = np.random.default_rng(self.seed)
        shape = self.shape
        made = []
        for _ in self.layers:
            num = self._tables().max(initial=0) + 1
            k_pages, v_pages = empty_pages(
                int(num), shape.num_kv_heads, shape.head_dim, PAGE_SIZE, self.kv_dtype
            )
            scales = empty_scales(len(k_pages), shape.num_kv_heads, PAGE_SIZE, self.kv_dtype)
            for table, length in zip(self._tables(), self.lens, strict=True):
                token = np.arange(length)
                slots = (table[token // PAGE_SIZE] * PAGE_SIZE + token % PAGE_SIZE).astype(np.int32)
                size = (length, shape.num_kv_heads, shape.head_dim)
                k, v = (rng.standard_normal(size, np.float32) for _ in "kv")
                kernels.append_kv(k, v, k_pages, v_pages, slots, *scales.values())
            made.append((k_pages, v_pages, scales.get("k_scales"), scales.get("v_scales")))
        return made

    def begin(self) -> tuple[np.ndarray, ...]:
        """Return x, cos, sin, slots, page_tables, q_offsets and kv_lens."""
        rng = np.random.default_rng(self.seed + 1)
        tokens = sum(self.counts)
        x = rng.standard_normal((tokens, self.shape.hidden), np.float32)
        angles = rng.standard_normal((tokens, self.shape.head_dim // 2), np.float32)
        tables = self._tables()
        slots = [
            table[at // PAGE_SIZE] * PAGE_SIZE + at % PAGE_SIZE
            for table, length, n in zip(tables, self.lens, self.counts, strict=True)
            for at in range(length, length + n)
        ]
        offsets = np.concatenate([[0], np.cumsum(self.counts)]).astype(np.int32)
        lens = np.add(self.lens, self.counts).astype(np.int32)
        return (
            x,
            np.cos(angles),
            np.sin(angles),
            np.array(slots, np.int32),
            tables,
            offsets,
            lens,
        )

    def _tables(self) -> np.ndarray:
        widths = [-(-(a + n) // PAGE_SIZE) for a, n in zip(self.lens, self.counts, strict=True)]
        tables = np.zeros((len(widths), max(widths)), np.int32)
        free = iter(np.random.default_rng(self.seed).permutation(sum(widths)).tolist())
        for row, width in zip(tables, widths, strict=True):
            row[:width] = [next(free) for _ in range(width)]
        return tables

    def decoder(self, pages: list[tuple[Any, Any, Any, Any]]) -> Decoder:
        return Decoder(self.shape, self.layers, pages)


def random_case(
    seed: int,
    *,
    form: str = "bfloat16",
    num_experts: int = 4,
    biases: bool = False,
    kv_dtype: str = "bfloat16",
    lens: tuple[int, ...] = (5, 0, 33),
    counts: tuple[int, ...] = (1, 7, 3),
    **changed: Any,
) -> Case:
    """Return a case; the weights are of one form, or ``mixed``."""
    rng = np.random.default_rng(seed)
    shape = DecoderShape(
        hidden=40,
        num_heads=4,
        num_kv_heads=2,
        head_dim=24,
        num_experts=num_experts,
        top_k=min(2, num_experts),
        eps=1e-5,
        scale=24**-0.5,
    )
    shape = replace(shape, **changed)

    def matrix(n: int, k: int, of: str = form) -> Any:
        wide = rng.standard_normal((n, k), np.float32) / np.float32(k**0.5)
        if of == "float32":
            return wide
        return kernels.pack_int8_dot(wide) if of == "int8" else kernels.to_bfloat16(wide)

    wide, narrow = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    layers = []
    for _ in range(2):
        of = ("int8", "bfloat16", "float32") if form == "mixed" else (form,) * 3
        layer: dict[str, Any] = {
            "attn_norm": rng.standard_normal(shape.hidden, np.float32),
            "ffn_norm": rng.standard_normal(shape.hidden, np.float32),
            "q": matrix(wide, shape.hidden, of[0]),
            "k": matrix(narrow, shape.hidden, of[1]),
            "v": matrix(narrow, shape.hidden, of[2]),
            "o": matrix(shape.hidden, wide, of[0]),
        }
        if num_experts > 1:
            layer["router"] = matrix(num_experts, shape.hidden, "float32")
        if biases:
            for name, size in (("q", wide), ("k", narrow), ("v", narrow), ("o", shape.hidden)):
                layer[f"{name}_bias"] = rng.standard_normal(size, np.float32)
        layers.append(layer)
    of_experts = "int8" if form == "mixed" else form
    sizes = ((48, shape.hidden), (48, shape.hidden), (shape.hidden, 48))
    experts = [
        [tuple(matrix(n, k, of_experts) for n, k in sizes) for _ in range(num_experts)]
        for _ in layers
    ]
    return Case(shape, layers, experts, kv_dtype, list(lens), list(counts), seed)  # type: ignore[arg-type]


def one_by_one(case: Case) -> tuple[np.ndarray, list[Any]]:
    """Return x after all layers and the pages, by the kernels called one by one."""
    pages = case.pages()
    x, cos, sin, slots, tables, offsets, lens = case.begin()
    shape, rows = case.shape, len(x)
    for weights, (k_pages, v_pages, *scales), experts in zip(
        case.layers, pages, case.experts, strict=True
    ):
        normed = kernels.rms_norm(x, weights["attn_norm"], shape.eps)
        q, k, v = (
            kernels.linear(
                normed, weights[name], weights.get(f"{name}_bias"), activations=shape.activations
            ).reshape(rows, -1, shape.head_dim)
            for name in "qkv"
        )
        kernels.rope(q, cos, sin)
        kernels.rope(k, cos, sin)
        kernels.append_kv(k, v, k_pages, v_pages, slots, *scales)
        attended = kernels.chunked_attention(
            q,
            k_pages,
            v_pages,
            tables,
            offsets,
            lens,
            shape.scale,
            sliding_window=shape.sliding_window,
            k_scales=scales[0],
            v_scales=scales[1],
        )
        x += kernels.linear(
            attended.reshape(rows, -1),
            weights["o"],
            weights.get("o_bias"),
            activations=shape.activations,
        )
        h = kernels.rms_norm(x, weights["ffn_norm"], shape.eps)
        if shape.num_experts == 1:
            kernels.expert_ffn(h, *experts[0], x, activations=shape.activations)
            continue
        logits = kernels.linear(h, weights["router"], activations=shape.activations)
        ids, row_weights = kernels.route(logits, shape.top_k)
        for e, expert in enumerate(experts):
            chosen, place = np.nonzero(ids == e)
            kernels.expert_ffn(
                h,
                *expert,
                x,
                chosen.astype(np.int32),
                np.ascontiguousarray(row_weights[chosen, place]),
                activations=shape.activations,
            )
    return x, pages


def by_decoder(case: Case) -> tuple[np.ndarray, list[Any]]:
    pages = case.pages()
    decoder = case.decoder(pages)
    decoder.set_experts(case.experts)
    x, cos, sin, *rest = case.begin()
    layers = decoder.begin(x, (cos, sin), *rest)
    for layer in range(decoder.num_layers):
        layers.attend(layer)
        layers.run_experts(layer)
    return x, pages


def assert_same(case: Case) -> None:
    (x, pages), (wanted, wanted_pages) = by_decoder(case), one_by_one(case)
    assert x.tobytes() == wanted.tobytes()
    for layer, wanted_layer in zip(pages, wanted_pages, strict=True):
        for array, other in zip(layer, wanted_layer, strict=True):
            assert (array is None) == (other is None)
            assert array is None or array.tobytes() == other.tobytes()


@pytest.mark.parametrize("target", kernels.cpu_targets())
@pytest.mark.parametrize("form", ["float32", "bfloat16", "int8", "mixed"])
def test_is_the_kernels_one_by_one(target: str, form: str) -> None:
    kernels.use_cpu_target(target)
    assert_same(random_case(1, form=form))


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_is_the_kernels_one_by_one_whatever_the_shape(data: st.DataObject) -> None:
    kv_heads = data.draw(st.integers(1, 3))
    num_experts = data.draw(st.integers(1, 9))
    sequences = data.draw(st.integers(1, 4))
    sizes = st.lists(st.integers(1, 20), min_size=sequences, max_size=sequences)
    lens = st.lists(st.integers(0, 40), min_size=sequences, max_size=sequences)
    case = random_case(
        data.draw(st.integers(0, 1 << 20)),
        form=data.draw(st.sampled_from(["float32", "bfloat16", "int8", "mixed"])),
        num_experts=num_experts,
        biases=data.draw(st.booleans()),
        kv_dtype=data.draw(st.sampled_from(["bfloat16", "float16", "float32", "int8"])),
        lens=tuple(data.draw(lens)),
        counts=tuple(data.draw(sizes)),
        hidden=data.draw(st.integers(1, 50)),
        num_kv_heads=kv_heads,
        num_heads=kv_heads * data.draw(st.integers(1, 4)),
        head_dim=2 * data.draw(st.integers(1, 20)),
        top_k=data.draw(st.integers(1, num_experts)),
        sliding_window=data.draw(st.sampled_from([0, 1, 7])),
        activations=data.draw(st.sampled_from(["float32", "bfloat16"])),
    )
    assert_same(case)


def test_leaves_the_routing_for_experts_that_arrive_later() -> None:
    case = random_case(3, num_experts=6)
    x, cos, sin, *rest = case.begin()
    layers = case.decoder(case.pages()).begin(x, (cos, sin), *rest)
    layers.attend(0)
    logits = kernels.linear(layers.h, case.layers[0]["router"])
    ids, weights = kernels.route(logits, 2)
    for e in range(6):
        part = slice(layers.offsets[e], layers.offsets[e + 1])
        chosen, place = np.nonzero(ids == e)
        np.testing.assert_array_equal(layers.rows[part], chosen)
        np.testing.assert_array_equal(layers.row_weights[part], weights[chosen, place])
    assert layers.offsets[6] == 2 * len(x)


def test_a_dense_decoder_sends_every_row_to_its_one_expert() -> None:
    case = random_case(4, num_experts=1)
    x, cos, sin, *rest = case.begin()
    layers = case.decoder(case.pages()).begin(x, (cos, sin), *rest)
    layers.attend(0)
    np.testing.assert_array_equal(layers.rows, np.arange(len(x)))
    np.testing.assert_array_equal(layers.row_weights, 1)
    np.testing.assert_array_equal(layers.offsets, [0, len(x)])


def test_is_independent_of_the_number_of_threads() -> None:
    case = random_case(5, counts=(40, 1, 9), hidden=200)
    results = []
    for threads in (1, 2, 5):
        kernels.set_num_threads(threads)
        results.append(by_decoder(case)[0].tobytes())
    assert results[0] == results[1] == results[2]


def test_two_threads_run_passes_at_once_and_both_are_right() -> None:
    cases = [random_case(6, form="int8"), random_case(7)]
    wanted = [one_by_one(case)[0].tobytes() for case in cases]
    wrong: list[int] = []

    def run(i: int) -> None:
        same = [by_decoder(cases[i])[0].tobytes() == wanted[i] for _ in range(20)]
        if not all(same):
            wrong.append(i)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def without(name: str) -> Any:
    def change(case: Case) -> None:
        del case.layers[1][name]

    return change


def with_shape(name: str, *shape: int) -> Any:
    def change(case: Case) -> None:
        case.layers[1][name] = np.zeros(shape, np.float32)

    return change


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (without("attn_norm"), TypeError, r"layers\[1\] attn_norm must be a numpy array"),
        (without("o"), TypeError, r"layers\[1\] o must be a numpy array"),
        (with_shape("q", 96, 41), ValueError, r"layers\[1\] q has shape \[96, 41\]; it must be"),
        (with_shape("ffn_norm", 39), ValueError, r"layers\[1\] ffn_norm has shape"),
        (with_shape("router", 3, 40), ValueError, r"layers\[1\] router has shape \[3, 40\]"),
        (with_shape("v_bias", 3), ValueError, r"layers\[1\] v_bias has shape"),
    ],
)
def test_a_wrong_weight_is_named(change: Any, error: type[Exception], message: str) -> None:
    case = random_case(8)
    change(case)
    with pytest.raises(error, match=message):
        case.decoder(case.pages())


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"num_heads": 3}, "num_heads must be a multiple of num_kv_heads"),
        ({"top_k": 5}, "top_k must be 1 to num_experts"),
        ({"scale": float("nan")}, "scale must be finite"),
        ({"sliding_window": -1}, "sliding_window must be 0"),
        ({"head_dim": 26}, r"layers\[0\] q has shape"),
    ],
)
def test_a_wrong_shape_is_named(changed: dict[str, Any], message: str) -> None:
    case = random_case(8)
    pages = case.pages()
    with pytest.raises(ValueError, match=message):
        Decoder(replace(case.shape, **changed), case.layers, pages)


def test_wrong_pages_are_named() -> None:
    case = random_case(8)
    pages = case.pages()
    with pytest.raises(ValueError, match="layers and pages must be equally many"):
        case.decoder(pages[:1])
    other = random_case(8, num_kv_heads=4).pages()
    with pytest.raises(ValueError, match=r"layers\[1\] k_pages has not the KV heads"):
        case.decoder([pages[0], other[1]])
    with pytest.raises(TypeError, match=r"layers\[0\] pages must be a tuple"):
        case.decoder([pages[0][:2], pages[1]])  # type: ignore[list-item]


@pytest.mark.parametrize(
    ("index", "value", "message"),
    [
        (0, np.zeros((11, 41), np.float32), "x has shape"),
        (2, np.zeros((11, 13), np.float32), "sin has shape"),
        (3, np.full(11, 1 << 20, np.int32), "slots has 1048576"),
        (3, np.zeros(10, np.int32), "slots has shape"),
        (4, np.full((3, 3), 99, np.int32), "page_tables of sequence 0 has page 99"),
        (5, np.array([0, 1, 8, 12], np.int32), "q_offsets must end with T"),
        (6, np.array([6, 7, 2], np.int32), "kv_lens of sequence 2 is 2"),
    ],
)
def test_a_wrong_argument_of_a_pass_is_named(index: int, value: np.ndarray, message: str) -> None:
    case = random_case(9)
    arguments = list(case.begin())
    arguments[index] = value
    x, cos, sin, *rest = arguments
    with pytest.raises(ValueError, match=message):
        case.decoder(case.pages()).begin(x, (cos, sin), *rest)


def test_experts_that_are_missing_or_wrong_are_named() -> None:
    case = random_case(10)
    decoder = case.decoder(case.pages())
    x, cos, sin, *rest = case.begin()
    layers = decoder.begin(x, (cos, sin), *rest)
    layers.attend(0)
    with pytest.raises(ValueError, match="has not been given its experts"):
        layers.run_experts(0)
    with pytest.raises(ValueError, match=r"layer is 2; it must be 0 to 1"):
        layers.attend(2)
    with pytest.raises(ValueError, match=r"experts\[1\] must have 4 experts"):
        decoder.set_experts([case.experts[0], case.experts[1][:3]])
    with pytest.raises(ValueError, match="has not been given its experts"):
        layers.run_experts(0)
    wrong = (*case.experts[0][0][:2], np.zeros((40, 47), np.float32))
    with pytest.raises(ValueError, match=r"experts\[0\] down has shape \[40, 47\]"):
        decoder.set_experts([[wrong] * 4, case.experts[1]])
    other = random_case(10, form="int8").experts
    with pytest.raises(TypeError, match="must be of one kind"):
        decoder.set_experts([[*case.experts[0][:3], other[0][3]], case.experts[1]])
