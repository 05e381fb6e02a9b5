"""Expert layouts: the reads cover every tensor, aligned, and views find the bytes again."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from specmoeoff.offload.checkpoint import TensorRef
from specmoeoff.offload.direct_read import ALIGNMENT
from specmoeoff.offload.expert_layout import MAX_GAP_BYTES, lay_out

FILES = (Path("a"), Path("b"))
DTYPES = {"BF16": 2, "F16": 2, "F32": 4}


@st.composite
def expert_refs(draw: st.DrawFn) -> dict[str, TensorRef]:
    """Three tensors, apart or together, in one file or two, at offsets their items divide."""
    at = {file: 4 * draw(st.integers(0, 5000)) for file in FILES}
    refs = {}
    for name in draw(st.permutations(["gate", "up", "down"])):
        dtype = draw(st.sampled_from(sorted(DTYPES)))
        shape = (draw(st.integers(1, 60)), draw(st.integers(1, 60)))
        size = shape[0] * shape[1] * DTYPES[dtype]
        file = draw(st.sampled_from(FILES))
        gap = draw(st.sampled_from([0, 4, 4096, MAX_GAP_BYTES, MAX_GAP_BYTES + 4, 300_000]))
        begin = at[file] + gap + (-at[file]) % 4
        refs[name] = TensorRef(file, begin, size, dtype, shape)
        at[file] = begin + size
    return refs


@given(refs=expert_refs())
def test_segments_bring_every_tensor(refs: dict[str, TensorRef]) -> None:
    rng = np.random.default_rng(0)
    disk = {file: rng.integers(0, 256, 1 << 20, np.uint8) for file in FILES}
    layout = lay_out("expert", refs)
    slot = np.zeros(layout.num_bytes, np.uint8)
    for start, segment in zip(layout.starts, layout.segments, strict=True):
        assert start % ALIGNMENT == segment.offset % ALIGNMENT == segment.num_bytes % ALIGNMENT == 0
        assert segment.num_bytes - ALIGNMENT < segment.needed_bytes <= segment.num_bytes
        part = disk[segment.file][segment.offset : segment.offset + segment.needed_bytes]
        assert not slot[start : start + segment.num_bytes].any(), "segments overlap in the slot"
        slot[start : start + len(part)] = part
    assert layout.tensors.keys() == refs.keys()
    for name, ref in refs.items():
        tensor = layout.tensors[name].of(slot)
        wanted = disk[ref.file][ref.offset : ref.offset + ref.nbytes]
        assert tensor.tobytes() == wanted.tobytes()
        assert (tensor.shape, tensor.dtype) == (ref.shape, ref.numpy_dtype)


@given(refs=expert_refs())
def test_neighbours_share_a_read_and_strangers_do_not(refs: dict[str, TensorRef]) -> None:
    order = sorted(refs.values(), key=lambda ref: (ref.file, ref.offset))
    breaks = sum(
        a.file != b.file or b.offset - a.offset - a.nbytes > MAX_GAP_BYTES
        for a, b in itertools.pairwise(order)
    )
    assert len(lay_out("expert", refs).segments) == breaks + 1
