"""Packed checkpoints: the same model in fewer bytes, whole or not there, and clear errors."""

from __future__ import annotations

import json
import os
import struct
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from specmoeoff import LLM, SamplingParams, SpeculativeConfig
from specmoeoff.cli import app, pack
from specmoeoff.engine.model_files import ModelFiles
from specmoeoff.engine.weights import expert_specs
from specmoeoff.errors import CheckpointError, InvalidInputError, SpecMoEOffError, StreamError
from specmoeoff.kernels import PackedBfloat16
from specmoeoff.offload import packing
from specmoeoff.offload.checkpoint import Checkpoint
from specmoeoff.offload.packing import Packed, pack_checkpoint
from specmoeoff.offload.safetensors_header import PACKED_KEY
from tiny import write_tiny

if TYPE_CHECKING:
    from pathlib import Path

GREEDY = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)
PROMPTS = [{"prompt_token_ids": list(range(1 + i, 9 + 3 * i))} for i in range(4)]
EVEN: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("packing") / "plain"
    return write_tiny(directory, seed=4, sharded=True, tokenizer=True, **EVEN)


@pytest.fixture(scope="module")
def packed(plain: Path) -> Path:
    directory = plain.parent / "packed"
    pack_model(plain, directory)
    return directory


def pack_model(source: Path, target: Path) -> Packed:
    files = ModelFiles.open(str(source))
    names = {spec.name for spec in expert_specs(files.model)}
    return pack_checkpoint(files.checkpoint, target, names)


def tokens(directory: Path, **options: Any) -> list[list[int]]:
    with LLM(str(directory), **options) as llm:
        return [list(out.outputs[0].token_ids) for out in llm.generate(PROMPTS, GREEDY)]


def test_every_tensor_is_what_it_was(plain: Path, packed: Path) -> None:
    before, after = Checkpoint.open(plain), Checkpoint.open(packed)
    assert set(after.tensors) == set(before.tensors)
    for name, ref in before.tensors.items():
        assert after.tensors[name].shape == ref.shape
        assert after.tensors[name].is_packed == ("experts" in name)
        np.testing.assert_array_equal(after.read(name), before.read(name))


def test_it_is_smaller_and_complete(plain: Path, packed: Path) -> None:
    size = {
        path: sum(f.stat().st_size for f in path.glob("*.safetensors")) for path in (plain, packed)
    }
    assert size[packed] < size[plain] + 3 * 4096
    others = {f.name for f in plain.iterdir() if f.suffix != ".safetensors"}
    assert {f.name for f in packed.iterdir() if f.suffix != ".safetensors"} == others
    index = json.loads((packed / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(Checkpoint.open(packed).tensors)


def test_others_can_read_what_is_not_packed(packed: Path) -> None:
    from safetensors import safe_open

    with safe_open(packed / "model-00001-of-00003.safetensors", "np") as file:
        blobs = [name for name in file.keys() if "experts" in name]  # noqa: SIM118
        assert blobs
        assert file.get_tensor(blobs[0]).dtype == np.uint8


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"dtype": "bfloat16"},
        {"max_num_seqs": 2},
        {"speculative_config": SpeculativeConfig(method="ngram")},
        {"schedule": "specmoeoff", "device": "cpu"},
        {"schedule": "flexgen", "device": "sim", "device_memory": "64MiB"},
    ],
)
def test_the_tokens_are_those_of_the_plain_checkpoint(
    plain: Path, packed: Path, options: dict[str, Any]
) -> None:
    assert tokens(packed, **options) == tokens(plain, **options)


def test_experts_in_memory_stay_packed(packed: Path) -> None:
    with LLM(str(packed)) as llm:
        llm.generate(PROMPTS, GREEDY)
        everything = llm._engine._target._store.resident()  # type: ignore[attr-defined]
        assert isinstance(everything[1][2]["down"], PackedBfloat16)


def test_a_dense_model_and_a_single_file(tmp_path: Path) -> None:
    source = write_tiny(tmp_path / "dense", "llama", seed=5, tokenizer=True, **EVEN)
    report = pack_model(source, tmp_path / "packed")
    assert report.num_packed == 2 * 3
    assert not (tmp_path / "packed" / "model.safetensors.index.json").exists()
    assert tokens(tmp_path / "packed") == tokens(source)


@pytest.mark.parametrize("change", [{"hidden_size": 60}, {"dtype": "float16"}])
def test_what_cannot_be_packed_is_copied(tmp_path: Path, change: dict[str, Any]) -> None:
    source = write_tiny(tmp_path / "plain", seed=6, tokenizer=True, **{**EVEN, **change})
    report = pack_model(source, tmp_path / "packed")
    # [intermediate, hidden] of an odd hidden size cannot; [hidden, intermediate] still can.
    assert report.num_packed == (0 if "dtype" in change else 2 * 5)
    assert tokens(tmp_path / "packed") == tokens(source)


def test_what_would_not_get_smaller_is_copied(tmp_path: Path, plain: Path) -> None:
    before = Checkpoint.open(plain)
    name = next(name for name in before.tensors if "experts" in name)
    ref = before.tensors[name]
    noisy = tmp_path / "noisy"
    noisy.mkdir()
    for file in plain.iterdir():
        (noisy / file.name).write_bytes(file.read_bytes())
    with (noisy / ref.file.name).open("r+b") as file:
        file.seek(ref.offset)
        file.write(np.random.default_rng(7).bytes(ref.nbytes))
    pack_model(noisy, tmp_path / "packed")
    after = Checkpoint.open(tmp_path / "packed")
    assert not after.tensors[name].is_packed
    np.testing.assert_array_equal(after.read(name), Checkpoint.open(noisy).read(name))


def test_a_target_that_exists_is_left_alone(plain: Path, packed: Path) -> None:
    with pytest.raises(InvalidInputError, match="exists"):
        pack_model(plain, packed)


def test_what_an_earlier_run_left_is_not_deleted(plain: Path, tmp_path: Path) -> None:
    left = tmp_path / "packed.partial"
    left.mkdir()
    (left / "mine").write_text("keep")
    with pytest.raises(InvalidInputError, match="remove it"):
        pack_model(plain, tmp_path / "packed")
    assert (left / "mine").read_text() == "keep"


def test_what_is_packed_is_not_packed_again(packed: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="packed already"):
        pack_model(packed, tmp_path / "twice")
    assert not (tmp_path / "twice").exists()


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_what_fails_half_way_leaves_nothing(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    real, calls = packing.pack_bfloat16, []

    def failing(bits: Any) -> PackedBfloat16:
        calls.append(1)
        if len(calls) == 9:
            raise error
        return real(bits)

    monkeypatch.setattr(packing, "pack_bfloat16", failing)
    with pytest.raises(type(error)):
        pack_model(plain, tmp_path / "packed")
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_packing_is_never_written(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = packing.pack_bfloat16
    monkeypatch.setattr(packing, "pack_bfloat16", lambda bits: real(bits ^ np.uint16(1)))
    with pytest.raises(AssertionError, match="does not unpack"):
        pack_model(plain, tmp_path / "packed")
    assert list(tmp_path.iterdir()) == []


def test_damage_is_named_when_a_tensor_is_read(packed: Path, tmp_path: Path) -> None:
    name, ref = next(
        (name, ref) for name, ref in Checkpoint.open(packed).tensors.items() if ref.is_packed
    )
    content = bytearray(ref.file.read_bytes())
    content[ref.offset + 16] ^= 0xFF
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{name}.*is damaged"):
        Checkpoint.open(tmp_path).read(name)


@pytest.mark.parametrize(
    ("dtype", "metadata", "message"),
    [
        ("U8", "[]", "is no JSON object"),
        ("U8", "{", "is no JSON object"),
        ("U8", '{"w": [2, 33]}', "cannot have that shape"),
        ("U8", '{"w": [2]}', "cannot have that shape"),
        ("U8", '{"w": "x"}', "cannot have that shape"),
        ("U8", '{"w": [9000, 64]}', "takes .* or more"),
        ("F32", '{"w": [2, 32]}', "but it is F32"),
    ],
)
def test_a_header_that_cannot_be_true_is_refused(
    tmp_path: Path, dtype: str, metadata: str, message: str
) -> None:
    entries = {
        "__metadata__": {PACKED_KEY: metadata},
        "w": {"dtype": dtype, "shape": [256], "data_offsets": [0, 256]},
    }
    text = json.dumps(entries).encode()
    data = struct.pack("<Q", len(text)) + text + bytes(256)
    (tmp_path / "model.safetensors").write_bytes(data)
    with pytest.raises(CheckpointError, match=message):
        Checkpoint.open(tmp_path)


def test_a_gpu_says_that_it_wants_the_plain_one(packed: Path) -> None:
    from specmoeoff.engine.planned_memory import PlannedConfig
    from specmoeoff.engine.torch_build import open_torch
    from specmoeoff.engine.weights import ModelWeights

    files = ModelFiles.open(str(packed))
    wanted = PlannedConfig("specmoeoff", "cuda", device_memory=1 << 30, torch_device="cpu")
    with pytest.raises(InvalidInputError, match="computes with plain bfloat16"):
        open_torch(files.model, ModelWeights({}, []), files.expert_layouts(), 4, wanted)


def test_a_file_cut_short_while_it_streams_is_named(packed: Path, tmp_path: Path) -> None:
    for file in packed.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    with LLM(str(tmp_path), max_num_seqs=2) as llm:
        for file in tmp_path.glob("*.safetensors"):
            os.truncate(file, 9000)
        with pytest.raises(StreamError, match="safetensors"):
            llm.generate(PROMPTS, GREEDY)


def test_the_command(plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "by-command"
    options = app.parse(["pack", str(plain), "-o", str(target), "--json", "--quiet"])
    assert pack.run(options) == 0  # type: ignore[arg-type]
    report = json.loads(capsys.readouterr().out)
    assert report["num_packed"] == 2 * 5 * 3
    assert report["packed_bytes"] < report["source_bytes"]
    assert report["output"] == str(target)
    with pytest.raises(SpecMoEOffError, match="exists"):
        pack.run(options)  # type: ignore[arg-type]


def test_the_command_says_what_it_did(
    plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "spoken"
    options = app.parse(["pack", str(plain), "-o", str(target)])
    assert pack.run(options) == 0  # type: ignore[arg-type]
    captured = capsys.readouterr()
    assert captured.out.strip() == str(target)
    assert "30 of" in captured.err


def test_an_output_that_cannot_be_written_is_named(plain: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    options = app.parse(["pack", str(plain), "-o", str(tmp_path / "file" / "x"), "-q"])
    with pytest.raises(InvalidInputError, match="cannot be written"):
        pack.run(options)  # type: ignore[arg-type]
