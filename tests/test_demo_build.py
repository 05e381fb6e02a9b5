"""The demo's model builder: GGUF to Hugging Face, upcycling, and the same bytes everywhere."""

from __future__ import annotations

import itertools
import json
import shutil
import warnings
from typing import TYPE_CHECKING, Any

import gguf
import numpy as np
import pytest
from tokenizers import Tokenizer

from specmoeoff.demo import build, build_demo, convert, fetch
from specmoeoff.demo.calibrate import ffn_inputs
from specmoeoff.demo.gguf import GgufFile
from specmoeoff.demo.manifest import is_complete, verify
from specmoeoff.demo.safetensors_file import map_tensors
from specmoeoff.errors import CheckpointError, InvalidInputError, SpecMoEOffError
from specmoeoff.kernels import to_bfloat16, widen
from specmoeoff.offload.checkpoint import Checkpoint
from specmoeoff.offload.direct_read import ALIGNMENT
from tiny_gguf import FFN, HIDDEN, LAYERS, write_tiny_gguf

if TYPE_CHECKING:
    from pathlib import Path

TEXTS = ["The quick brown fox jumps over the lazy dog, and then the other one; 12345 times."] * 20
PARAMETERS: dict[str, Any] = {"experts": 5, "noise": 0.1, "drop_layers": [], "seed": 3}
# Of the target's one shard. It may change only together with manifest.RECIPE.
TINY_TARGET_SHA256 = "bb97713374ac934e3abc4acba7c2848da7f972bbc1cfc0eaf9ba1489ae7660c2"


def silent(_stage: str, _done: float) -> None:
    """Report nothing."""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> GgufFile:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_tiny_gguf(path)
    return GgufFile(path)


@pytest.fixture(scope="module")
def built(source: GgufFile, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("demo")
    build.build_from(source, TEXTS, directory, PARAMETERS, silent)
    return directory


# GGUF ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_rows", [7, 4096])
def test_gguf_values_are_those_of_the_gguf_package(source: GgufFile, max_rows: int) -> None:
    reader = gguf.GGUFReader(source.path)
    assert {tensor.name for tensor in reader.tensors} == set(source.tensors)
    for tensor in reader.tensors:
        ours = np.concatenate(list(source.rows(tensor.name, max_rows)))
        theirs = gguf.dequantize(tensor.data, tensor.tensor_type)
        assert ours.dtype == np.float32
        np.testing.assert_array_equal(ours, theirs)


def test_gguf_metadata_is_that_of_the_gguf_package(source: GgufFile) -> None:
    fields = gguf.GGUFReader(source.path).fields
    theirs = {key: field.contents() for key, field in fields.items() if "GGUF." not in key}
    assert source.metadata == theirs


@pytest.mark.parametrize("kept_bytes", [0, 3, 20, 500])
def test_gguf_header_cut_off_is_refused(source: GgufFile, tmp_path: Path, kept_bytes: int) -> None:
    path = tmp_path / "cut.gguf"
    path.write_bytes(source.path.read_bytes()[:kept_bytes])
    with pytest.raises(CheckpointError, match=r"cut\.gguf cannot be read as a GGUF file"):
        GgufFile(path)


def test_gguf_tensor_cut_off_is_refused(source: GgufFile, tmp_path: Path) -> None:
    path = tmp_path / "cut.gguf"
    path.write_bytes(source.path.read_bytes()[:-4096])
    cut = GgufFile(path)
    last = max(cut.tensors.values(), key=lambda tensor: tensor.offset).name
    with pytest.raises(CheckpointError, match=f"cut off inside tensor '{last}'"):
        list(cut.rows(last))


# Conversion ---------------------------------------------------------------------------------------


def test_converted_weights_are_transformers_own(source: GgufFile, built: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = AutoModelForCausalLM.from_pretrained(
            source.path.parent, gguf_file=source.path.name, dtype=torch.float32
        )
    ours = map_tensors(built / "draft" / "model.safetensors")
    expected = {k: v for k, v in theirs.state_dict().items() if k != "lm_head.weight"}
    assert set(ours) == set(expected)
    for name, value in expected.items():
        np.testing.assert_array_equal(ours[name], to_bfloat16(value.numpy()), err_msg=name)


@pytest.mark.parametrize(
    "text", ["the cat in 1984", "  naïve\tcafé\n\n日本", "<|im_start|>user\nthe<|im_end|>"]
)
def test_tokenizer_round_trip(built: Path, text: str) -> None:
    tokenizer = Tokenizer.from_file(str(built / "draft" / "tokenizer.json"))
    encoding = tokenizer.encode(text)
    assert tokenizer.decode(encoding.ids, skip_special_tokens=False) == text
    digits = [token for token in encoding.tokens if any(c.isdigit() for c in token)]
    assert all(len(token) == 1 for token in digits)


def test_tokenizer_merges_and_special_tokens(built: Path) -> None:
    tokenizer = Tokenizer.from_file(str(built / "target" / "tokenizer.json"))
    assert tokenizer.encode("in the<|im_end|>").tokens == ["in", "Ġthe", "<|im_end|>"]
    assert tokenizer.token_to_id("<|im_start|>") == 1


def test_dropped_layers_leave_the_others_in_order(source: GgufFile, tmp_path: Path) -> None:
    (tmp_path / "whole").mkdir()
    (tmp_path / "part").mkdir()
    convert.convert(source, tmp_path / "whole")
    convert.convert(source, tmp_path / "part", dropped_layers=[1])
    whole = map_tensors(tmp_path / "whole" / "model.safetensors")
    part = map_tensors(tmp_path / "part" / "model.safetensors")
    config = json.loads((tmp_path / "part" / "config.json").read_text())
    assert config["num_hidden_layers"] == LAYERS - 1
    assert not [name for name in part if ".layers.2." in name]
    for new, old in ((0, 0), (1, 2)):
        name = "model.layers.{}.mlp.up_proj.weight"
        np.testing.assert_array_equal(part[name.format(new)], whole[name.format(old)])


@pytest.mark.parametrize(
    ("dropped", "message"), [([3], "names layer 3"), ([-1], "names layer -1"), ([0, 1, 2], "every")]
)
def test_impossible_dropped_layers_are_refused(dropped: list[int], message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        convert.kept_layers(LAYERS, dropped)


# Calibration --------------------------------------------------------------------------


def test_ffn_inputs_are_those_of_transformers(built: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(built / "draft", dtype=torch.float32)
    seen: list[Any] = []
    for layer in model.model.layers:
        layer.mlp.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    chunks = np.random.default_rng(0).integers(0, 200, (2, 40)).astype(np.int32)
    with torch.no_grad():
        model(torch.tensor(chunks, dtype=torch.long))
    config = json.loads((built / "draft" / "config.json").read_text())
    ours = list(ffn_inputs(map_tensors(built / "draft" / "model.safetensors"), config, chunks))
    assert len(ours) == len(seen) == LAYERS
    for mine, theirs in zip(ours, seen, strict=True):
        np.testing.assert_allclose(mine, theirs.numpy().reshape(80, HIDDEN), atol=2e-3)


# Upcycling ----------------------------------------------------------------------------------------


def test_same_bytes_everywhere(built: Path) -> None:
    shard = built / "target" / "model-00001-of-00001.safetensors"
    assert fetch.sha256_of(shard) == TINY_TARGET_SHA256


def test_target_is_the_dense_model_but_for_experts_and_router(built: Path) -> None:
    dense = map_tensors(built / "draft" / "model.safetensors")
    target = map_tensors(built / "target" / "model-00001-of-00001.safetensors")
    shared = [name for name in dense if ".mlp." not in name]
    for name in shared:
        np.testing.assert_array_equal(dense[name], target[name])
    num_experts = PARAMETERS["experts"]
    assert len(target) == len(shared) + LAYERS * (1 + 3 * num_experts)
    for ours, theirs in (("w1", "gate_proj"), ("w3", "up_proj"), ("w2", "down_proj")):
        origin = widen(dense[f"model.layers.1.mlp.{theirs}.weight"])
        experts = [
            widen(target[f"model.layers.1.block_sparse_moe.experts.{e}.{ours}.weight"])
            for e in range(num_experts)
        ]
        shares = [np.std(expert - origin) / np.std(origin) for expert in experts]
        np.testing.assert_allclose(shares, PARAMETERS["noise"], rtol=0.05)
        first, second = ((expert - origin).ravel() for expert in experts[:2])
        assert abs(np.corrcoef(first, second)[0, 1]) < 0.1


def test_experts_lie_in_one_piece_at_aligned_offsets(built: Path) -> None:
    # As the real model's: one matrix is a whole number of pages.
    assert 2 * FFN * HIDDEN % ALIGNMENT == 0
    tensors = Checkpoint.open(built / "target").tensors
    for expert in range(PARAMETERS["experts"]):
        prefix = f"model.layers.2.block_sparse_moe.experts.{expert}."
        refs = [tensors[f"{prefix}{name}.weight"] for name in ("w1", "w3", "w2")]
        assert all(ref.offset % ALIGNMENT == 0 for ref in refs)
        for before, after in itertools.pairwise(refs):
            assert after.offset == before.offset + before.nbytes


def test_target_without_noise_is_the_dense_model(source: GgufFile, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    build.build_from(source, TEXTS, tmp_path, {**PARAMETERS, "noise": 0.0}, silent)
    ids = torch.arange(3, 60)[None]
    with torch.no_grad():
        target, draft = (
            AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float32)(ids).logits
            for name in ("target", "draft")
        )
    torch.testing.assert_close(target, draft, atol=1e-4, rtol=1e-4)


# Builds -------------------------------------------------------------------------------------------


def test_complete_build_is_recognised_and_damage_found(built: Path, tmp_path: Path) -> None:
    copy = tmp_path / "demo"
    shutil.copytree(built, copy)
    assert is_complete(copy, PARAMETERS)
    assert not is_complete(copy, {**PARAMETERS, "seed": 4})
    verify(copy)
    shard = copy / "target" / "model-00001-of-00001.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    with pytest.raises(CheckpointError, match="safetensors is missing or damaged"):
        verify(copy)
    shard.write_bytes(content[:-1])
    assert not is_complete(copy, PARAMETERS)


def test_a_build_replaces_an_older_one_and_leaves_nothing_behind(
    source: GgufFile, built: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "demo"
    shutil.copytree(built, copy)
    (copy / "notes.txt").write_text("mine")
    other = {**PARAMETERS, "drop_layers": [1], "experts": 2}
    build.build_from(source, TEXTS, copy, other, silent)
    assert is_complete(copy, other)
    verify(copy)
    names = {path.name for path in copy.iterdir()} - {".lock"}
    assert names == {"target", "draft", "manifest.json", "notes.txt"}
    layers = [
        json.loads((copy / part / "config.json").read_text())["num_hidden_layers"]
        for part in ("target", "draft")
    ]
    assert layers == [LAYERS, LAYERS - 1]


def test_a_foreign_directory_is_left_alone(source: GgufFile, tmp_path: Path) -> None:
    (tmp_path / "target").mkdir()
    (tmp_path / "target" / "thesis.txt").write_text("precious")
    with pytest.raises(InvalidInputError, match="was not built by this demo"):
        build.build_from(source, TEXTS, tmp_path, PARAMETERS, silent)
    assert (tmp_path / "target" / "thesis.txt").read_text() == "precious"


def test_a_failed_build_leaves_the_old_one(
    source: GgufFile, built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "demo"
    shutil.copytree(built, copy)

    def full_disk(*_args: Any, **_options: Any) -> dict[str, str]:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(build, "upcycle", full_disk)
    with pytest.raises(SpecMoEOffError, match="No space left on device"):
        build.build_from(source, TEXTS, copy, {**PARAMETERS, "seed": 9}, silent)
    verify(copy)
    assert not (copy / ".building").exists()


def test_too_little_space_is_said_before_anything_is_written(
    source: GgufFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage)
    with pytest.raises(SpecMoEOffError, match="fewer experts"):
        build.build_from(source, TEXTS, tmp_path, PARAMETERS, silent)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"experts": 1}, "experts is 1; it must be 2 to 512"),
        ({"noise": float("nan")}, "noise is nan; it must be 0 to 1"),
        ({"noise": -0.1}, "noise is -0.1"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_impossible_parameters_are_refused(
    options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(InvalidInputError, match=message):
        build_demo(tmp_path / "demo", **options)
    assert not (tmp_path / "demo").exists()
