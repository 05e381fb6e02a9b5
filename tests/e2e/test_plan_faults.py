"""Failures on every lane of an ``LLM`` that runs plans: named, contained, over in two seconds.

On ``cpu`` with experts from disk, and on ``sim`` with experts from disk through the host, so that
all five lanes have something to do. What fails is what does so in the field: a read, a copy, an
allocation, a kernel, a drafter.
"""

from __future__ import annotations

import os
import shutil
import signal
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from budgets import few_slots, trade_nothing
from faults import READS, Hang, fail_once, read_in_small_parts, told_when_closed
from specmoeoff import LLM, SamplingParams, SpeculativeConfig, kernels
from specmoeoff.devices.host import HostDevice
from specmoeoff.engine import planned_build, planned_memory
from specmoeoff.errors import InvalidInputError, OpError, StreamError
from specmoeoff.offload import planned_experts
from specmoeoff.offload.arena import Arena
from specmoeoff.pipeline import overlapped
from specmoeoff.pipeline.executor import SerialExecutor
from specmoeoff.pipeline.overlapped import OverlappedExecutor
from specmoeoff.speculative.ngram_drafter import NgramDrafting
from tiny import write_tiny

if TYPE_CHECKING:
    from specmoeoff.outputs import RequestOutput

GREEDY = SamplingParams(temperature=0, max_tokens=14, ignore_eos=True)
PROMPTS = [{"prompt_token_ids": [i, 2 * i, 7] * i} for i in range(1, 7)]
SHORT = [GREEDY.replace(max_tokens=4) if i % 2 else GREEDY for i in range(6)]
EXECUTORS = {"serial": SerialExecutor, "overlapped": OverlappedExecutor}
DEVICES: dict[str, dict[str, Any]] = {
    "cpu": {"device": "cpu"},
    "sim": {"device": "sim", "device_memory": 1 << 22},
}


@dataclass(frozen=True)
class Place:
    """Something that an op calls."""

    device: str
    op: str
    """The kind that calls it, as errors name it."""
    owner: Any
    name: str


PLACES = {
    "disk": Place("sim", "read", *READS),
    "h2d": Place("sim", "load", planned_experts._Slots, "fill"),
    "h2d, activations": Place("sim", "attention_in", HostDevice, "upload"),
    "device": Place("sim", "experts", HostDevice, "run_experts"),
    "device, drafts": Place("sim", "draft", NgramDrafting, "propose"),
    "cpu": Place("sim", "attend", kernels, "chunked_attention"),
    "d2h": Place("sim", "qkv_out", HostDevice, "download"),
    "disk of cpu": Place("cpu", "read", *READS),
    "cpu of cpu": Place("cpu", "experts", HostDevice, "run_experts"),
    "cpu of cpu, drafts": Place("cpu", "draft", NgramDrafting, "propose"),
}
"""A place on each lane."""


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(
        tmp_path_factory.mktemp("faults") / "target",
        seed=5,
        sharded=True,
        expert_spread=0.1,
        num_hidden_layers=3,
    )


@pytest.fixture(scope="module")
def expected(original: Path) -> list[list[int]]:
    with LLM(str(original), memory="4GiB") as llm:
        return tokens(llm.generate(PROMPTS, GREEDY))


@pytest.fixture
def streaming(monkeypatch: pytest.MonkeyPatch) -> None:
    """Six slots for fifteen experts, and no host memory for all of them."""
    monkeypatch.setattr(planned_memory, "_reserve_slots", few_slots(6))
    monkeypatch.setattr(planned_memory, "_experts_bytes", lambda files: 1 << 50)
    trade_nothing(monkeypatch)


def opened(model: Path, device: str) -> LLM:
    ngram = SpeculativeConfig(method="ngram", num_speculative_tokens=2, prompt_lookup_min=1)
    return LLM(
        str(model),
        memory="4GiB",
        schedule="specmoeoff",
        max_num_seqs=4,
        speculative_config=ngram,
        **DEVICES[device],
    )


def tokens(outputs: list[RequestOutput]) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in outputs]


def check_finished(finished: list[RequestOutput], expected: list[list[int]]) -> None:
    """Those that ended before a failure are whole."""
    for output in finished:
        number = int(output.request_id)
        assert output.outputs[0].token_ids == expected[number][: SHORT[number].max_tokens]
        assert output.outputs[0].finish_reason == "length"


# It fails -----------------------------------------------------------------------------------------


@pytest.mark.usefixtures("streaming")
@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("lane", PLACES)
@pytest.mark.parametrize(
    "error", [MemoryError("no room for 3 bytes"), ZeroDivisionError("a bug"), OSError(5, "I/O")]
)
def test_a_failure_on_any_lane(
    original: Path,
    expected: list[list[int]],
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
    lane: str,
    executor: str,
) -> None:
    """The op is named, what has finished is whole, the next run is right, and closing works."""
    monkeypatch.setattr(planned_build, "OverlappedExecutor", EXECUTORS[executor])
    place = PLACES[lane]
    with opened(original, place.device) as llm:
        run = llm.iter_completed(PROMPTS, SHORT)
        finished = [next(run)]
        with monkeypatch.context() as patch:
            fail_once(patch, place.owner, place.name, 2, error)
            named = rf"op \d+ \({place.op}.*\) of the specmoeoff step failed: "
            raised = StreamError if place.op == "read" else OpError
            with pytest.raises(raised, match=named) as caught:
                finished += run
        assert "\n" not in str(caught.value)
        reason = "Input/output error" if isinstance(error, OSError) else str(error)
        assert reason in str(caught.value) or str(error) in str(caught.value)
        check_finished(finished, expected)
        assert not llm._engine.has_work
        assert llm._engine._target.kv.num_used == 0
        assert tokens(llm.generate(PROMPTS, GREEDY)) == expected
    assert not [t.name for t in threading.enumerate() if t.name.startswith("lane")]


@pytest.mark.usefixtures("streaming")
@pytest.mark.parametrize("lane", PLACES)
def test_closing_after_a_failure(
    original: Path, monkeypatch: pytest.MonkeyPatch, lane: str
) -> None:
    place = PLACES[lane]
    llm = opened(original, place.device)
    begun(llm)
    with monkeypatch.context() as patch:
        fail_once(patch, place.owner, place.name, 2, ZeroDivisionError("bug"))
        with pytest.raises((StreamError, OpError)):
            llm.generate(PROMPTS, GREEDY)
    llm.close()
    assert not [t.name for t in threading.enumerate() if t.name.startswith("lane")]
    with pytest.raises(InvalidInputError, match="was closed"):
        llm.generate(PROMPTS, GREEDY)


@pytest.mark.usefixtures("streaming")
@pytest.mark.parametrize("lane", ["disk", "h2d", "device", "cpu", "d2h"])
def test_a_run_beside_the_one_that_failed_goes_on(
    original: Path, expected: list[list[int]], monkeypatch: pytest.MonkeyPatch, lane: str
) -> None:
    """Two runs share the steps; the one that was stepping when an op failed ends, not the other."""
    place = PLACES[lane]
    with opened(original, place.device) as llm:
        other = llm.iter_completed(PROMPTS[:2], GREEDY)
        stream = llm.generate_stream(PROMPTS[2:], GREEDY)
        next(stream)
        with monkeypatch.context() as patch:
            fail_once(patch, place.owner, place.name, 2, MemoryError("no"))
            with pytest.raises((StreamError, OpError)):
                list(stream)
        found = sorted(other, key=lambda output: int(output.request_id))
        assert tokens(found) == expected[:2]


@pytest.mark.usefixtures("streaming")
@pytest.mark.parametrize("device", DEVICES)
def test_a_file_that_was_cut_short(
    original: Path, tmp_path: Path, expected: list[list[int]], device: str
) -> None:
    checkpoint = Path(shutil.copytree(original, tmp_path / "target"))
    shard = sorted(checkpoint.glob("*.safetensors"))[1]
    content = shard.read_bytes()
    with opened(checkpoint, device) as llm:
        run = llm.iter_completed(PROMPTS, SHORT)
        finished = [next(run)]
        os.truncate(shard, 5000)
        with pytest.raises(StreamError, match=rf"op \d+ \(read L\d E\d\) .*{shard.name} ended at"):
            finished += run
        check_finished(finished, expected)
        shard.write_bytes(content)
        assert tokens(llm.generate(PROMPTS, GREEDY)) == expected


@pytest.mark.usefixtures("streaming")
@pytest.mark.parametrize("device", DEVICES)
def test_reads_that_come_in_small_parts(
    original: Path, expected: list[list[int]], monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    read_in_small_parts(monkeypatch)
    with opened(original, device) as llm:
        assert tokens(llm.generate(PROMPTS, GREEDY)) == expected


@pytest.mark.usefixtures("streaming")
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("call", [1, 2, 3])
@pytest.mark.parametrize(
    ("owner", "name"),
    [(Arena, "hold"), (HostDevice, "empty"), (planned_experts.PlannedExperts, "keep")],
)
def test_memory_that_cannot_be_had_before_the_first_op(
    original: Path,
    expected: list[list[int]],
    monkeypatch: pytest.MonkeyPatch,
    owner: Any,
    name: str,
    call: int,
    device: str,
) -> None:
    """Of the KV cache, of a pass, of the experts that stay: no op has begun, so none is named."""
    with opened(original, device) as llm:
        with monkeypatch.context() as patch:
            error = MemoryError("no room for 3 bytes")
            fail_once(patch, owner, name, call, error)
            with pytest.raises(MemoryError, match="no room for 3 bytes"):
                llm.generate(PROMPTS, GREEDY)
        assert llm._engine._target.kv.num_used == 0
        assert tokens(llm.generate(PROMPTS, GREEDY)) == expected


# It takes long ------------------------------------------------------------------------------------


@pytest.mark.usefixtures("streaming")
@pytest.mark.parametrize("lane", PLACES)
def test_an_op_that_takes_long_is_waited_for(
    original: Path, expected: list[list[int]], monkeypatch: pytest.MonkeyPatch, lane: str
) -> None:
    place = PLACES[lane]
    with opened(original, place.device) as llm:
        hang = Hang(monkeypatch, place.owner, place.name, 3)
        threading.Timer(0.3, hang.gate.set).start()
        assert tokens(llm.generate(PROMPTS, GREEDY)) == expected
        assert hang.started.is_set()


@pytest.mark.usefixtures("streaming")
@pytest.mark.parametrize("lane", PLACES)
def test_closing_while_an_op_hangs(
    original: Path, monkeypatch: pytest.MonkeyPatch, lane: str
) -> None:
    """It returns while the op still hangs, and so does the run, with the reason."""
    place = PLACES[lane]
    llm = opened(original, place.device)
    begun(llm)
    hang = Hang(monkeypatch, place.owner, place.name)
    told = told_when_closed(
        lambda: llm.generate(PROMPTS, GREEDY), hang, llm.close, (StreamError, OpError)
    )
    assert "closed" in told
    with pytest.raises(InvalidInputError, match="was closed"):
        llm.generate(PROMPTS, GREEDY)
    hang.gate.set()


def begun(llm: LLM) -> None:
    """Have the experts that stay in place, and nothing on its way ahead of its time."""
    llm.generate(PROMPTS[:1], GREEDY.replace(max_tokens=2))
    llm._engine._target.planned.forward.machine.executor.settle()  # type: ignore[attr-defined]


def interrupted(llm: LLM, hang: Hang) -> None:
    """Generate, and press Ctrl-C once an op hangs."""
    main = threading.get_ident()

    def press() -> None:
        assert hang.started.wait(30)
        signal.pthread_kill(main, signal.SIGINT)

    presser = threading.Thread(target=press)
    presser.start()
    with pytest.raises(KeyboardInterrupt):
        llm.generate(PROMPTS, GREEDY)
    presser.join()
    assert not hang.gate.is_set()


@pytest.mark.usefixtures("streaming")
@pytest.mark.parametrize("lane", PLACES)
def test_ctrl_c_while_an_op_hangs(
    original: Path, expected: list[list[int]], monkeypatch: pytest.MonkeyPatch, lane: str
) -> None:
    """The call returns; until the op is over no step can start, and then all is as before."""
    monkeypatch.setattr(overlapped, "GRACE_S", 0.1)
    place = PLACES[lane]
    with opened(original, place.device) as llm:
        begun(llm)
        with monkeypatch.context() as patch:
            hang = Hang(patch, place.owner, place.name)
            interrupted(llm, hang)
            # A read may hang before its lane gets to it.
            still = rf"(\({place.op}.*\)|reading .*) of an earlier step .* still run"
            with pytest.raises((OpError, StreamError), match=still):
                llm.generate(PROMPTS, GREEDY)
        hang.gate.set()
        monkeypatch.setattr(overlapped, "GRACE_S", 30)
        assert tokens(llm.generate(PROMPTS, GREEDY)) == expected


@pytest.mark.usefixtures("streaming")
@pytest.mark.parametrize("lane", PLACES)
def test_closing_after_ctrl_c_gives_no_second_grace(
    original: Path, monkeypatch: pytest.MonkeyPatch, lane: str
) -> None:
    """As when a command is interrupted: both have to be over in two seconds."""
    monkeypatch.setattr(overlapped, "GRACE_S", 0.1)
    place = PLACES[lane]
    llm = opened(original, place.device)
    begun(llm)
    hang = Hang(monkeypatch, place.owner, place.name)
    interrupted(llm, hang)
    monkeypatch.setattr(overlapped, "GRACE_S", 3600)
    closer = threading.Thread(target=llm.close, daemon=True)
    closer.start()
    closer.join(10)
    assert not closer.is_alive()
    assert not hang.gate.is_set()
    hang.gate.set()
