"""The torch device against the host's kernels: the code of ``device="cuda"`` on torch's own CPU.

What is the GPU's alone (streams, events, pinned memory) runs where there is one, marked ``gpu``.
Sums are in another order there, so values are close, and only tokens are compared for equality.
"""

from __future__ import annotations

import subprocess
import sys
import warnings
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from specmoeoff import LLM, SamplingParams, SpeculativeConfig, kernels
from specmoeoff.config import EngineConfig
from specmoeoff.devices import torch_maths as maths
from specmoeoff.devices.base import Pages, Places
from specmoeoff.devices.torch_device import WORKSPACE_BYTES, TorchDevice
from specmoeoff.devices.torch_memory import TorchSlots, pin
from specmoeoff.engine.dtype import choose_dtype
from specmoeoff.engine.forward import Forward, Span
from specmoeoff.engine.model_files import ModelFiles
from specmoeoff.engine.planned_build import Planned, PlannedConfig, open_planned
from specmoeoff.engine.planned_memory import split_memory
from specmoeoff.engine.planned_policy import planned_config
from specmoeoff.engine.weights import Loader, load_whole
from specmoeoff.errors import CheckpointError, DoesNotFitError, InvalidInputError
from specmoeoff.kernels import reference
from specmoeoff.models.registry import build_model
from specmoeoff.offload.kv_cache import KvCache, KvSequence
from specmoeoff.offload.reader import Reader
from specmoeoff.pipeline.schedules import SCHEDULES
from specmoeoff.speculative.draft_context import TargetContexts
from tiny import write_draft, write_tiny

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from numpy.typing import NDArray

    from specmoeoff.engine.planned_forward import PlannedForward

    F32 = NDArray[np.float32]

PROMPTS = (5, 40, 1, 17)
STEPS = 4
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device")


GPU = [pytest.param("cuda", marks=pytest.mark.gpu)] if torch.cuda.is_available() else []


@pytest.fixture(params=["cpu", *GPU])
def where(request: pytest.FixtureRequest) -> str:
    """Torch's device: its CPU everywhere, and a GPU where there is one."""
    name: str = request.param
    return name


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("torch") / "mixtral", num_hidden_layers=3)


def talk(forward: Forward | PlannedForward) -> tuple[list[list[int]], F32]:
    """Let four sequences say a few greedy tokens; return them and all logits they came from."""
    rng = np.random.default_rng(1)
    sequences = [KvSequence() for _ in PROMPTS]
    token_ids = [list(map(int, rng.integers(0, 250, n))) for n in PROMPTS]
    said, logits = [], []
    for _ in range(STEPS):
        spans = []
        for sequence, ids in zip(sequences, token_ids, strict=True):
            assert forward.kv.reserve(sequence, sequence.length + len(ids))
            spans.append(Span(sequence, ids, 1))
        hidden = forward.run(spans)
        best = [int(token) for token in forward.best(hidden)[1]]
        logits.append(forward.logits(hidden))
        assert best == [int(i) for i in logits[-1].argmax(1)]
        said.append(best)
        token_ids = [[token] for token in best]
    return said, np.concatenate(logits)


def plain(directory: Path, kv_dtype: str = "bfloat16", activations: str = "float32") -> Forward:
    files = ModelFiles.open(str(directory))
    weights = load_whole(files.model, Loader(files.checkpoint))
    config = files.model.config
    kv = KvCache(config.num_layers, config.num_kv_heads, config.head_dim, 32, kv_dtype)
    model = build_model(config, "bfloat16" if activations == "bfloat16" else "float32")
    return Forward(model, weights, kv)


def wanted(where: str, **fields: object) -> PlannedConfig:
    memory = 1_050_000 + (WORKSPACE_BYTES if where == "cuda" else 0)
    values = {"num_micro_batches": 2, "num_seqs": len(PROMPTS), "max_len": 64, "max_tokens": 64}
    options = {"device": "cuda", "torch_device": where, "device_memory": memory, **values, **fields}
    return PlannedConfig(**options)  # type: ignore[arg-type]


@pytest.fixture
def opened() -> Iterator[list[Planned]]:
    planned: list[Planned] = []
    yield planned
    for one in planned:
        one.close()


def close_to(found: tuple[list[list[int]], F32], expected: tuple[list[list[int]], F32]) -> bool:
    return found[0] == expected[0] and bool(np.allclose(found[1], expected[1], atol=2e-3))


# Whole passes ------------------------------------------------------------------------------------


@pytest.mark.parametrize("overlapped", [True, False])
@pytest.mark.parametrize("schedule", sorted(SCHEDULES))
def test_every_schedule_says_what_the_host_says(
    directory: Path, opened: list[Planned], where: str, schedule: str, overlapped: bool
) -> None:
    asked = wanted(where, schedule=schedule, overlapped=overlapped)
    opened.append(open_planned(EngineConfig(model=str(directory)), asked))
    assert close_to(talk(opened[0].forward), talk(plain(directory)))
    assert {"h2d", "device"} <= {
        op.lane for op in opened[0].forward.steps[0].timeline().plan.ops
    }, "some experts are streamed"


@pytest.mark.parametrize("schedule", ["specmoeoff", "flexgen", "zero_inference"])
def test_kv_may_be_int8_on_either_side(
    directory: Path, opened: list[Planned], where: str, schedule: str
) -> None:
    config = EngineConfig(model=str(directory), kv_dtype="int8")
    opened.append(open_planned(config, wanted(where, schedule=schedule)))
    said, logits = talk(opened[0].forward)
    expected = talk(plain(directory, "int8"))
    # A last bit of difference may round to the next of 255 steps.
    assert said == expected[0]
    assert np.allclose(logits, expected[1], atol=5e-2)


def test_a_model_larger_than_host_memory_comes_from_disk(
    directory: Path, opened: list[Planned], where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("specmoeoff.engine.memory_plan.resident_bytes", lambda: 0)
    opened.append(open_planned(EngineConfig(model=str(directory)), wanted(where)))
    enough = opened[0].tiers[0].reserved
    config = EngineConfig(model=str(directory), memory=enough - 1)
    opened.append(open_planned(config, wanted(where)))
    assert "experts on their way" in opened[1].tiers[0].as_dict()
    assert close_to(talk(opened[1].forward), talk(plain(directory)))


def test_activations_may_be_bfloat16(directory: Path, opened: list[Planned], where: str) -> None:
    """As coarse as they are on the host: tokens may differ, so logits of the prompts count."""
    config = EngineConfig(model=str(directory), dtype="bfloat16")
    opened.append(open_planned(config, wanted(where)))
    found = talk(opened[0].forward)[1][: len(PROMPTS)]
    exact = talk(plain(directory))[1][: len(PROMPTS)]
    host = talk(plain(directory, activations="bfloat16"))[1][: len(PROMPTS)]
    assert 0 < np.abs(found - exact).max() < 4 * np.abs(host - exact).max()


def test_a_sliding_window_is_kept_on_the_device(
    tmp_path: Path, opened: list[Planned], where: str
) -> None:
    narrow = write_tiny(tmp_path / "window", sliding_window=7)
    opened.append(
        open_planned(EngineConfig(model=str(narrow)), wanted(where, schedule="zero_inference"))
    )
    assert close_to(talk(opened[0].forward), talk(plain(narrow)))


def test_what_does_not_fit_is_refused(directory: Path, where: str) -> None:
    with pytest.raises(DoesNotFitError, match="device memory of"):
        open_planned(EngineConfig(model=str(directory)), wanted(where, device_memory=1 << 12))
    if where == "cpu":
        with pytest.raises(InvalidInputError, match="say how much memory"):
            open_planned(EngineConfig(model=str(directory)), wanted(where, device_memory=0))


# Engines -----------------------------------------------------------------------------------------


def drafting(name: str, draft: Path) -> SpeculativeConfig | None:
    if name == "off":
        return None
    if name == "ngram":
        return SpeculativeConfig(method="ngram", num_speculative_tokens=3, prompt_lookup_min=1)
    return SpeculativeConfig(model=str(draft), num_speculative_tokens=3)


@pytest.mark.parametrize(
    ("drafts", "schedule"),
    [("off", "auto"), ("ngram", "auto"), ("draft", "auto"), ("draft", "zero_inference")],
)
def test_an_engine_says_what_the_default_one_says(
    tmp_path: Path, where: str, monkeypatch: pytest.MonkeyPatch, drafts: str, schedule: str
) -> None:
    """More prompts than run at once, greedy, so that steps come in many shapes."""
    on_torch(monkeypatch, where)
    # Experts that are much alike, so that their mean is a good draft.
    target = write_tiny(tmp_path / "target", num_hidden_layers=3, expert_spread=0.1)
    draft = write_draft(target, tmp_path / "draft", same_attention=True)
    prompts = [{"prompt_token_ids": [7, 8, 9, 7, n] * n} for n in (1, 6, 2, 4, 3)]
    greedy = SamplingParams(temperature=0.0, max_tokens=14, ignore_eos=True)
    limits = {"max_num_seqs": 3, "max_num_batched_tokens": 64, "max_model_len": 64}
    speculation = drafting(drafts, draft)
    with LLM(str(target), memory="4GiB", speculative_config=speculation) as llm:
        expected = [output.outputs[0].token_ids for output in llm.generate(prompts, greedy)]
    memory = wanted(where).device_memory
    with LLM(
        str(target),
        memory="4GiB",
        device="cuda",
        device_memory=memory,
        schedule=schedule,
        speculative_config=speculation,
        **limits,  # type: ignore[arg-type]
    ) as llm:
        if drafts == "draft":
            # The host's KV cache is read where it is complete.
            shares = isinstance(llm._engine._drafter._contexts, TargetContexts)
            assert shares == (schedule != "zero_inference")
        found = [output.outputs[0].token_ids for output in llm.generate(prompts, greedy)]
        stats = llm.stats()
    assert found == expected
    assert stats.fetched_experts > 0, "some experts are streamed"
    assert 0 < stats.tiers["device"].peak <= stats.tiers["device"].budget
    assert (stats.drafted_tokens > 0) == (drafts != "off")
    assert stats.accepted_tokens > 0 or drafts != "draft"


def on_torch(monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    """Have engines take torch's device of a name for a GPU."""
    monkeypatch.setattr(
        "specmoeoff.engine.build.planned_config",
        lambda config: replace(planned_config(config), torch_device=where),
    )


def test_a_draft_counts_where_it_runs_which_is_the_host(directory: Path, tmp_path: Path) -> None:
    files = ModelFiles.open(str(directory))
    draft = ModelFiles.open(str(write_draft(directory, tmp_path / "draft")))
    config = EngineConfig(
        model=str(directory), memory=1 << 32, speculative=drafting("draft", tmp_path / "draft")
    )
    parts = {"draft weights", "KV cache of the draft", "draft distributions"}
    for kind, tier in (("cuda", 0), ("sim", 1)):
        asked = wanted("cpu", device=kind, device_memory=1 << 24)
        split = split_memory(config, asked, files, draft)
        assert parts <= set(split.tiers[tier].as_dict())
        assert not parts & set(split.tiers[1 - tier].as_dict())


def test_auto_is_bfloat16_on_a_gpu(directory: Path, tmp_path: Path) -> None:
    assert choose_dtype("auto", ModelFiles.open(str(directory)), on_gpu=True) == "bfloat16"
    other = write_tiny(tmp_path / "float16", dtype="float16")
    assert choose_dtype("auto", ModelFiles.open(str(other)), on_gpu=True) == "float32"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_an_engine_without_a_gpu_names_the_remedy(directory: Path) -> None:
    for memory in (None, "24GB"):
        with pytest.raises(InvalidInputError, match=r"needs torch with a GPU: torch .* finds no"):
            LLM(str(directory), device="cuda", device_memory=memory)


def test_an_engine_without_torch_names_the_remedy(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InvalidInputError, match="needs torch with a GPU: torch is not installed"):
        LLM(str(directory), device="cuda")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_remedy_is_named(directory: Path) -> None:
    with pytest.raises(InvalidInputError, match="finds no CUDA device; use device 'cpu' or 'sim'"):
        open_planned(EngineConfig(model=str(directory)), wanted("cuda"))


def test_without_torch_the_remedy_is_named(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InvalidInputError, match=r"pip install 'specmoeoff\[cuda\]'"):
        open_planned(EngineConfig(model=str(directory)), wanted("cpu"))


def test_other_devices_do_not_import_torch(directory: Path) -> None:
    code = """
import sys
from specmoeoff import LLM, SamplingParams
for device in ({"device": "cpu"}, {"device": "sim", "device_memory": "4MiB"}):
    with LLM(sys.argv[1], memory="4GiB", max_num_seqs=2, max_model_len=64, **device) as llm:
        llm.generate({"prompt_token_ids": [1, 2, 3]}, SamplingParams(max_tokens=2))
print("torch" in sys.modules)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(directory)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "False"


# The maths ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.uint16])
def test_products_round_as_the_kernels_do(dtype: type[np.generic]) -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((5, 48), np.float32)
    w = rng.standard_normal((7, 48), np.float32)
    stored = kernels.to_bfloat16(w) if dtype is np.uint16 else w.astype(dtype)
    tensor = torch.from_numpy(reference.widen(stored).copy())
    tensor = tensor.to(torch.bfloat16 if dtype is np.uint16 else tensor.dtype)
    for activations, atol in (("float32", 1e-4), ("bfloat16", 2e-1)):
        y = maths.linear(torch.from_numpy(x), tensor, None, activations)  # type: ignore[arg-type]
        expected = reference.linear(x, stored, activations=activations)  # type: ignore[arg-type]
        assert y.dtype == torch.float32
        assert np.allclose(y.numpy(), expected, atol=atol)


def test_equals_go_to_the_lower_number() -> None:
    logits = torch.tensor([[1.0, 3.0, 3.0, 0.0], [2.0, 2.0, 2.0, 2.0]])
    values, tokens = maths.best(logits)
    assert (values.tolist(), tokens.tolist()) == ([3.0, 2.0], [1, 0])
    ids, weights = maths.route(logits, 2)
    assert ids.tolist() == [[1, 2], [0, 1]]
    assert torch.allclose(weights, torch.full((2, 2), 0.5))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "int8"])
def test_attention_on_the_device_is_that_of_the_kernels(
    directory: Path, where: str, dtype: str
) -> None:
    """Sequences of several new tokens, of one and of none, over pages in no order."""
    files = ModelFiles.open(str(directory))
    config = files.model.config
    device = TorchDevice(files.model, {}, [], torch.device(where))
    cache = KvCache(1, config.num_kv_heads, config.head_dim, 12, dtype)
    rng = np.random.default_rng(3)
    table = rng.permutation(12).astype(np.int32).reshape(4, 3)
    lens, news = np.array([70, 33, 64, 5], np.int32), np.array([6, 1, 0, 5])
    offsets = np.concatenate([[0], np.cumsum(news)]).astype(np.int32)
    host = Pages(*cache.layer(0), *cache.scales(0))
    pages = device.kv_pages(0, host)
    shape = (config.num_kv_heads, config.head_dim)
    for b, length in enumerate(lens):
        position = np.arange(length)
        slots = (table[b, position // 32] * 32 + position % 32).astype(np.int32)
        k, v = rng.standard_normal((2, length, *shape)).astype(np.float32)
        kernels.append_kv(k, v, host.k, host.v, slots, host.k_scales, host.v_scales)
        with device.on("device"):
            device.store_kv(device.upload(k), device.upload(v), pages, slots)
    q = rng.standard_normal((int(offsets[-1]), config.num_heads, config.head_dim), np.float32)
    expected = kernels.chunked_attention(
        q,
        host.k,
        host.v,
        table,
        offsets,
        lens,
        config.head_dim**-0.5,
        k_scales=host.k_scales,
        v_scales=host.v_scales,
    )
    with device.on("device"):
        found = device.attend(device.upload(q), pages, Places(table, offsets, lens, 0))
        assert np.allclose(device.download(found), expected, atol=1e-2 if dtype == "int8" else 1e-4)


def test_weights_of_another_form_are_refused(directory: Path) -> None:
    files = ModelFiles.open(str(directory))
    weight = kernels.pack_int8_dot(np.ones((16, 16), np.float32))
    with pytest.raises(CheckpointError, match="'embed' is a Int8DotWeight"):
        TorchDevice(files.model, {"embed": weight}, [], torch.device("cpu"))


# Memory ------------------------------------------------------------------------------------------


def test_slots_give_back_what_they_were_filled_with(directory: Path, where: str) -> None:
    files, reader = ModelFiles.open(str(directory)), Reader()
    layouts = files.expert_layouts()
    slots = TorchSlots(layouts, 2, torch.device(where))
    layout = layouts[1][3]
    source = np.random.default_rng(0).integers(0, 256, layout.num_bytes, np.uint8)
    slots.fill(1, layout, source)
    for name, tensor in slots.tensors(1, layout).items():
        assert tensor.data_ptr() % 16 == 0
        bits = tensor.cpu().view(torch.int16).numpy().view(np.uint16)
        assert np.array_equal(bits, layout.tensors[name].of(source))
    reader.close()


def test_memory_is_pinned_in_blocks_of_whole_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("specmoeoff.devices.torch_memory.BLOCK_BYTES", 2500)
    memory = np.zeros(5000, np.uint8)
    start, asked = memory.ctypes.data, []

    def all_but_the_third(address: int, num_bytes: int) -> bool:
        asked.append((address - start, num_bytes))
        return len(asked) < 3

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert pin(memory[:4000], 1000, lambda *_: True) == [start, start + 2000]
    with pytest.warns(RuntimeWarning, match="1000 B of .* could not be pinned"):
        assert pin(memory, 1000, all_but_the_third) == [start, start + 2000]
    assert asked == [(0, 2000), (2000, 2000), (4000, 1000)]


@pytest.mark.gpu
@needs_gpu
def test_host_experts_are_pinned(directory: Path, opened: list[Planned]) -> None:
    opened.append(open_planned(EngineConfig(model=str(directory)), wanted("cuda")))
    memory = opened[0].forward._experts.host_memory
    assert torch.from_numpy(memory).is_pinned()
    opened[0].close()
    assert not torch.from_numpy(memory).is_pinned()
