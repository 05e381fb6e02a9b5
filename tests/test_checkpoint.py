"""Checkpoints are read in place, past the page cache, and refused in one sentence when broken."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import mmap
import os
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from specmoeoff.errors import CheckpointError, StreamError
from specmoeoff.offload import checkpoint as checkpoint_module
from specmoeoff.offload import direct_read
from specmoeoff.offload.checkpoint import Checkpoint
from specmoeoff.offload.direct_read import ALIGNMENT, read_range
from tiny import STORED, write_safetensors, write_tiny

if TYPE_CHECKING:
    from numpy.typing import NDArray

DTYPES = {"BF16": np.uint16, "F16": np.float16, "F32": np.float32}


def random_array(dtype: str, shape: tuple[int, ...], seed: int = 0) -> NDArray[Any]:
    rng = np.random.default_rng(seed)
    if dtype == "BF16":
        return rng.integers(0, 1 << 16, shape, dtype=np.uint16)
    return rng.standard_normal(shape, np.float32).astype(DTYPES[dtype])


def write_header(path: Path, header: Any, data: bytes = b"\0" * 64) -> None:
    """Write a file with any header, valid or not."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def one_tensor(**changes: Any) -> dict[str, Any]:
    return {"x": {"dtype": "F32", "shape": [4, 4], "data_offsets": [0, 64]} | changes}


# ---------------------------------------------------------------------------------- reading


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("dtype", STORED)
def test_reads_what_safetensors_reads(dtype: str, sharded: bool, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from safetensors.torch import load_file

    write_tiny(tmp_path, dtype=dtype, sharded=sharded)
    expected: dict[str, Any] = {}
    for file in tmp_path.glob("*.safetensors"):
        expected |= load_file(file)
    checkpoint = Checkpoint.open(tmp_path)
    assert set(checkpoint.tensors) == set(expected)
    for name, tensor in expected.items():
        bits = tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor
        array = checkpoint.read(name)
        assert array.dtype == DTYPES[STORED[dtype]]
        np.testing.assert_array_equal(array, bits.numpy())


@given(
    shapes=st.lists(st.lists(st.integers(0, 40), max_size=3), min_size=1, max_size=8),
    dtypes=st.lists(st.sampled_from(list(DTYPES)), min_size=8, max_size=8),
    pad=st.sampled_from([1, 3, 8, 4096]),
)
def test_any_shape_at_any_offset(
    shapes: list[list[int]], dtypes: list[str], pad: int, tmp_path: Path
) -> None:
    tensors = {
        f"t{i}": (dtype, random_array(dtype, tuple(shape), i))
        for i, (shape, dtype) in enumerate(zip(shapes, dtypes, strict=False))
    }
    write_safetensors(tmp_path / "model.safetensors", tensors, pad)
    checkpoint = Checkpoint.open(tmp_path)
    for name, (dtype, array) in tensors.items():
        read = checkpoint.read(name)
        assert read.flags.c_contiguous
        assert read.flags.aligned
        assert checkpoint.tensors[name].dtype == dtype
        np.testing.assert_array_equal(read, array)


@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize(
    ("offset", "nbytes"), [(0, 1), (1, ALIGNMENT), (ALIGNMENT - 1, 2), (5, 70_000), (8192, 12_345)]
)
def test_ranges(
    offset: int, nbytes: int, direct: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = np.random.default_rng(0).bytes(offset + nbytes)
    (tmp_path / "f").write_bytes(content)
    monkeypatch.setattr(direct_read, "BUFFERED_CHUNK", 8192)
    if not direct:
        refuse_direct(monkeypatch)
    assert read_range(tmp_path / "f", offset, nbytes).tobytes() == content[offset:]
    with pytest.raises(EOFError):
        read_range(tmp_path / "f", offset, nbytes + 1)


def refuse_direct(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make O_DIRECT fail as file systems without it do."""
    plain_open = os.open

    def refuse(path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "no O_DIRECT here")
        return plain_open(path, flags, *args, **kwargs)

    monkeypatch.setattr(os, "open", refuse)


def cached_pages(file: Path) -> int:
    """Return how many of a file's pages lie in the page cache."""
    size = file.stat().st_size
    with file.open("rb") as stream, mmap.mmap(stream.fileno(), size, mmap.MAP_PRIVATE) as view:
        pages = -(-size // mmap.PAGESIZE)
        flags = (ctypes.c_ubyte * pages)()
        address = ctypes.addressof(ctypes.c_byte.from_buffer(view))
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.mincore(ctypes.c_void_p(address), ctypes.c_size_t(size), flags) != 0:
            pytest.skip("mincore is not to be had")
        return sum(flag & 1 for flag in flags)


def drop_cache(file: Path) -> None:
    fd = os.open(file, os.O_RDONLY)
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)
    if cached_pages(file):
        pytest.skip("this file system keeps its pages in memory")


@pytest.mark.parametrize("direct", [True, False])
def test_the_page_cache_is_not_filled(
    direct: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "model.safetensors"
    write_safetensors(file, {"x": ("F32", random_array("F32", (1 << 20, 3)))})
    checkpoint = Checkpoint.open(tmp_path)
    drop_cache(file)
    if not direct:
        refuse_direct(monkeypatch)
    checkpoint.read("x")
    # 12 MiB are 3072 pages; a little is left by read-ahead at most.
    assert cached_pages(file) < 100


def status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    pytest.skip(f"no {field} on this system")


@pytest.mark.parametrize("direct", [True, False])
def test_memory_rises_by_the_tensor_and_falls_again(
    direct: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_safetensors(
        tmp_path / "model.safetensors", {"x": ("BF16", np.ones((4 << 20, 4), np.uint16))}, pad=1
    )
    checkpoint = Checkpoint.open(tmp_path)
    if not direct:
        refuse_direct(monkeypatch)
    checkpoint.read("x")
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    except OSError:
        pytest.skip("the peak cannot be reset")
    before = status_bytes("VmRSS")
    tensor = checkpoint.read("x")
    assert tensor.nbytes == 32 << 20
    assert status_bytes("VmHWM") - before < tensor.nbytes + (1 << 20)
    assert status_bytes("VmRSS") - before > tensor.nbytes - (1 << 20)
    del tensor
    assert status_bytes("VmRSS") - before < 1 << 20


def test_opening_reads_headers_only(tmp_path: Path) -> None:
    # 64 GB with holes: anything that touched the data would take minutes.
    tensors = 1000
    each = 64 << 20
    header = {
        f"t{i}": {"dtype": "F32", "shape": [each // 4], "data_offsets": [i * each, (i + 1) * each]}
        for i in range(tensors)
    }
    file = tmp_path / "model.safetensors"
    write_header(file, header, b"")
    length = file.stat().st_size
    os.truncate(file, length + tensors * each)

    def read_so_far() -> int:
        return int(Path("/proc/self/io").read_text().splitlines()[0].split()[1])

    before = read_so_far()
    checkpoint = Checkpoint.open(tmp_path)
    assert read_so_far() - before < length + (1 << 17)
    assert checkpoint.tensors["t999"].offset == length + 999 * each


def test_a_dtype_that_is_not_read_harms_nobody_until_it_is_asked_for(tmp_path: Path) -> None:
    header = one_tensor() | {"ids": {"dtype": "I64", "shape": [1], "data_offsets": [64, 72]}}
    write_header(tmp_path / "model.safetensors", header, bytes(72))
    checkpoint = Checkpoint.open(tmp_path)
    assert list(checkpoint.tensors) == ["x"]
    for ask in (lambda: checkpoint.read("ids"), lambda: checkpoint.require("ids", (1,))):
        with pytest.raises(CheckpointError, match="'ids' is stored as I64; only BF16, F16, F32"):
            ask()


def test_require(tmp_path: Path) -> None:
    write_header(tmp_path / "model.safetensors", one_tensor())
    checkpoint = Checkpoint.open(tmp_path)
    assert checkpoint.require("x", (4, 4)).nbytes == 64
    with pytest.raises(CheckpointError, match=r"'x' has shape \[4, 4\].* implies \[4, 5\]"):
        checkpoint.require("x", (4, 5))
    with pytest.raises(CheckpointError, match="no tensor 'y'"):
        checkpoint.require("y", (4, 4))


# --------------------------------------------------------------------------------- refusing

BROKEN_HEADERS: dict[str, tuple[Any, str]] = {
    "not JSON": (b"{x", "not JSON"),
    "not UTF-8": (b"\xff\xfe{}", "not JSON"),
    "deep": (b"[" * 100_000, "not JSON"),
    "list": ([], "not a JSON object"),
    "entry": ({"x": 3}, "'x' is not an object"),
    "no dtype": ({"x": {"shape": [1], "data_offsets": [0, 4]}}, "'x' has no dtype"),
    "no shape": (one_tensor(shape=None), "'x' has the impossible shape None"),
    "negative shape": (one_tensor(shape=[-4, -4]), "impossible shape"),
    "boolean shape": (one_tensor(shape=[True, 16]), "impossible shape"),
    "float shape": (one_tensor(shape=[16.0]), "impossible shape"),
    "negative offset": (one_tensor(data_offsets=[-64, 0]), "impossible data_offsets"),
    "backward offsets": (one_tensor(data_offsets=[64, 0]), "impossible data_offsets"),
    "one offset": (one_tensor(data_offsets=[64]), "impossible data_offsets"),
    "size": (one_tensor(shape=[4, 5]), r"'x' has 64 bytes, but F32 of shape \[4, 5\] takes 80"),
    "huge": (one_tensor(shape=[1 << 62, 1 << 62]), "'x' has 64 bytes"),
    "beyond the end": (one_tensor(data_offsets=[64, 128]), "truncated: tensor 'x'"),
    "overlap": (
        one_tensor() | {"y": {"dtype": "F32", "shape": [2], "data_offsets": [56, 64]}},
        "'x' and 'y' overlap",
    ),
    "covered": (
        one_tensor() | {"a": {"dtype": "F32", "shape": [1], "data_offsets": [8, 12]}},
        "'x' and 'a' overlap",
    ),
}


@pytest.mark.parametrize("case", BROKEN_HEADERS)
def test_broken_headers_are_refused(case: str, tmp_path: Path) -> None:
    header, message = BROKEN_HEADERS[case]
    write_header(tmp_path / "model.safetensors", header)
    with pytest.raises(CheckpointError, match=message) as caught:
        Checkpoint.open(tmp_path)
    assert "model.safetensors" in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "truncated: 0 bytes"),
        (b"\x08\0\0", "truncated: 3 bytes"),
        (struct.pack("<Q", 40) + b"{}", "truncated: its header ends at byte 48"),
        (b"version https://git-lfs.github.com/spec/v1\n", "not a safetensors file"),
    ],
)
def test_files_that_are_something_else(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        Checkpoint.open(tmp_path)


def test_a_checkpoint_cut_anywhere_is_refused(tmp_path: Path) -> None:
    tensors = {f"t{i}": ("F32", random_array("F32", (5, i + 1))) for i in range(3)}
    file = tmp_path / "model.safetensors"
    write_safetensors(file, tensors)
    whole = file.read_bytes()
    for length in range(0, len(whole), 7):
        file.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match="truncated"):
            Checkpoint.open(tmp_path)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 1 << 70) | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3),
    max_leaves=5,
)


@given(
    entry=st.dictionaries(
        st.sampled_from(["dtype", "shape", "data_offsets"]),
        st.sampled_from(["F32", "F8", [4, 4], [0, 64], [0]]) | json_values,
    ),
    junk=json_values,
)
def test_any_header_opens_or_is_refused(entry: dict[str, Any], junk: Any, tmp_path: Path) -> None:
    header = {"x": {**one_tensor()["x"], **entry}, "__metadata__": junk}
    write_header(tmp_path / "model.safetensors", header)
    # Whatever else it raises fails the test.
    with contextlib.suppress(CheckpointError):
        checkpoint = Checkpoint.open(tmp_path)
        for name in checkpoint.tensors:
            assert checkpoint.read(name).nbytes == checkpoint.tensors[name].nbytes


def sharded(directory: Path) -> tuple[Path, dict[str, Any]]:
    write_tiny(directory, "llama", sharded=True)
    index = directory / "model.safetensors.index.json"
    return index, json.loads(index.read_text())


def test_missing_shard(tmp_path: Path) -> None:
    sharded(tmp_path)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(
        CheckpointError, match=r"00002-of-00003.safetensors is missing, but .*index"
    ):
        Checkpoint.open(tmp_path)


def test_a_tensor_that_its_shard_does_not_have(tmp_path: Path) -> None:
    index, content = sharded(tmp_path)
    content["weight_map"]["model.norm.weight"] = "model-00001-of-00003.safetensors"
    index.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"00001-of.* has no tensor 'model.norm.weight'"):
        Checkpoint.open(tmp_path)


def test_a_tensor_that_the_index_does_not_name_is_not_there(tmp_path: Path) -> None:
    index, content = sharded(tmp_path)
    del content["weight_map"]["model.norm.weight"]
    index.write_text(json.dumps(content))
    assert "model.norm.weight" not in Checkpoint.open(tmp_path).tensors


@pytest.mark.parametrize("shard", ["../x.safetensors", "/etc/passwd", "", "..", 7, None, "a\0b"])
def test_an_index_cannot_lead_elsewhere(shard: Any, tmp_path: Path) -> None:
    index, content = sharded(tmp_path)
    content["weight_map"]["model.norm.weight"] = shard
    index.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"'model.norm.weight' is said to lie in"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"weight_map": []}', '{"weight_map": {}}'])
def test_broken_index(content: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(
        CheckpointError, match=r"index\.json (is not JSON|has no field 'weight_map')"
    ):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model-00001-of-2.bin", "a.pth"])
def test_pickled_weights_are_refused_with_the_way_out(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(CheckpointError, match=rf"{name}.*save_pretrained"):
        Checkpoint.open(tmp_path)


def test_no_weights_at_all(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="has no weights"):
        Checkpoint.open(tmp_path)
    with pytest.raises(CheckpointError, match="not a directory"):
        Checkpoint.open(tmp_path / "absent")


@pytest.mark.parametrize("direct", [True, False])
def test_a_file_that_changes_after_it_was_opened(
    direct: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "model.safetensors"
    write_safetensors(file, {"x": ("F32", random_array("F32", (100, 100)))})
    checkpoint = Checkpoint.open(tmp_path)
    if not direct:
        refuse_direct(monkeypatch)
    os.truncate(file, file.stat().st_size - 1)
    with pytest.raises(StreamError, match=r"model.safetensors has become shorter: tensor 'x'"):
        checkpoint.read("x")
    file.unlink()
    with pytest.raises(StreamError, match=r"reading tensor 'x' failed: No such file"):
        checkpoint.read("x")


def test_an_error_of_the_disk_is_not_taken_for_a_refusal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_safetensors(tmp_path / "model.safetensors", {"x": ("F32", random_array("F32", (9,)))})
    checkpoint = Checkpoint.open(tmp_path)

    def broken(*_: Any) -> int:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "preadv", broken)
    with pytest.raises(StreamError, match="'x' failed: Input/output error"):
        checkpoint.read("x")


def test_a_single_file_goes_before_an_index(tmp_path: Path) -> None:
    # As in Transformers.
    sharded(tmp_path)
    write_header(tmp_path / checkpoint_module.SINGLE_FILE, one_tensor())
    assert list(Checkpoint.open(tmp_path).tensors) == ["x"]
