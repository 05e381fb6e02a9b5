"""Planned passes against ``Forward``, bit for bit: schedules, devices, micro-batches, executors.

And what is promised when an op fails: the op is named, nothing hangs, the next pass is right.
"""

from __future__ import annotations

import gc
import os
import threading
import time
import tracemalloc
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from budgets import (
    MIB,
    few_slots,
    forget_this_process,
    less_than_all_experts,
    smallest_budget,
    trade_nothing,
)
from faults import READS, Hang, told_when_closed
from specmoeoff.config import EngineConfig
from specmoeoff.devices.host import HostDevice
from specmoeoff.engine import planned_memory
from specmoeoff.engine.forward import Forward, Span
from specmoeoff.engine.micro_batch import cut
from specmoeoff.engine.model_files import ModelFiles
from specmoeoff.engine.pass_ops import PassOps
from specmoeoff.engine.planned_build import Planned, open_planned
from specmoeoff.engine.planned_forward import Machine, PlannedForward
from specmoeoff.engine.planned_memory import PlannedConfig
from specmoeoff.engine.record import longest, record
from specmoeoff.engine.weights import Loader, ModelWeights, load_whole
from specmoeoff.errors import DoesNotFitError, OpError, StreamError
from specmoeoff.offload import reader as reader_module
from specmoeoff.offload.kv_cache import KvCache, KvSequence
from specmoeoff.offload.planned_experts import PlannedExperts
from specmoeoff.offload.reader import Reader
from specmoeoff.pipeline.costs import Costs, Rate
from specmoeoff.pipeline.executor import Executor, SerialExecutor
from specmoeoff.pipeline.overlapped import OverlappedExecutor
from specmoeoff.pipeline.schedules import SCHEDULES
from specmoeoff.pipeline.schedules.shape import CPU, DEVICE, DEVICE_AND_DISK, Placement
from tiny import write_tiny

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from numpy.typing import NDArray

    from specmoeoff.engine.planned_memory import DeviceKind
    from specmoeoff.models.base import Model
    from specmoeoff.pipeline.plan import Op

    Hidden = NDArray[np.float32]

PROMPTS = (5, 40, 1, 3, 17, 2, 9, 33)
NUM_SLOTS = 7
PLACEMENTS = {"cpu": CPU, "sim": DEVICE, "sim with disk": DEVICE_AND_DISK}


class Plain(Forward):
    """The pass that all are compared with, all experts in memory."""

    def __init__(self, model: Model, weights: ModelWeights, kv: KvCache) -> None:
        super().__init__(model, weights, kv)
        self.kv = kv


@dataclass
class Bench:
    """A tiny model whose every part can be built anew."""

    files: ModelFiles
    weights: ModelWeights
    reader: Reader

    def kv(self, dtype: str = "bfloat16") -> KvCache:
        config = self.files.model.config
        return KvCache(config.num_layers, config.num_kv_heads, config.head_dim, 64, dtype)

    def plain(self, dtype: str = "bfloat16") -> Plain:
        return Plain(self.files.model, self.weights, self.kv(dtype))

    def planned(
        self, executor: Executor, schedule: str, placement: Placement, **options: Any
    ) -> PlannedForward:
        experts = PlannedExperts(
            self.files.expert_layouts(),
            options.pop("num_slots", NUM_SLOTS),
            self.reader,
            max_slots=options.pop("max_slots", 0),
        )
        if placement is DEVICE:
            experts.keep_all_on_host()
        elif placement is DEVICE_AND_DISK:
            experts.stage_on_host(2)
        kv = self.kv(options.pop("dtype", "bfloat16"))
        machine = Machine(schedule, placement, executor, **options)
        return PlannedForward(self.files.model, self.weights, experts, kv, machine)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    directory = write_tiny(tmp_path_factory.mktemp("planned") / "mixtral", num_hidden_layers=3)
    files = ModelFiles.open(str(directory))
    reader = Reader()
    yield Bench(files, load_whole(files.model, Loader(files.checkpoint)), reader)
    reader.close()


@pytest.fixture
def executor() -> Iterator[OverlappedExecutor]:
    overlapped = OverlappedExecutor()
    yield overlapped
    overlapped.close()


class Conversation:
    """Eight sequences: prompts of many lengths, then greedy tokens."""

    def __init__(self, forward: Plain | PlannedForward) -> None:
        self.forward = forward
        self.sequences = [KvSequence() for _ in PROMPTS]
        rng = np.random.default_rng(0)
        self.next = [list(map(int, rng.integers(0, 250, n))) for n in PROMPTS]

    def step(self) -> Hidden:
        spans = []
        for sequence, token_ids in zip(self.sequences, self.next, strict=True):
            assert self.forward.kv.reserve(sequence, sequence.length + len(token_ids))
            spans.append(Span(sequence, token_ids, 1))
        lengths = [sequence.length for sequence in self.sequences]
        try:
            hidden = self.forward.run(spans)
        except Exception:
            for sequence, length in zip(self.sequences, lengths, strict=True):
                self.forward.kv.truncate(sequence, length)
            raise
        self.next = [[int(t)] for t in self.forward.best(hidden)[1]]
        return hidden

    def steps(self, count: int) -> Hidden:
        return np.concatenate([self.step() for _ in range(count)])


def same(a: Hidden, b: Hidden) -> bool:
    return np.array_equal(a.view(np.uint32), b.view(np.uint32))


@pytest.fixture(scope="module")
def expected(bench: Bench) -> Hidden:
    return Conversation(bench.plain()).steps(3)


# The same tokens ----------------------------------------------------------------------------------


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("schedule", sorted(SCHEDULES))
def test_every_schedule_gives_the_same_bits(
    bench: Bench, executor: OverlappedExecutor, expected: Hidden, schedule: str, placement: str
) -> None:
    for num_micro_batches in range(1, 9):
        for runs in (SerialExecutor(), executor):
            forward = bench.planned(
                runs, schedule, PLACEMENTS[placement], num_micro_batches=num_micro_batches
            )
            assert same(Conversation(forward).steps(3), expected)


@pytest.mark.parametrize("waves", [2, 3])
@pytest.mark.parametrize("num_slots", [5, 11, 15])
def test_waves_and_slots_change_nothing(
    bench: Bench, executor: OverlappedExecutor, expected: Hidden, waves: int, num_slots: int
) -> None:
    forward = bench.planned(
        executor, "specmoeoff", DEVICE, num_micro_batches=4, waves=waves, num_slots=num_slots
    )
    assert same(Conversation(forward).steps(3), expected)


@pytest.mark.parametrize("schedule", ["specmoeoff", "flexgen"])
def test_kv_in_int8_is_staged_with_its_scales(
    bench: Bench, executor: OverlappedExecutor, schedule: str
) -> None:
    forward = bench.planned(executor, schedule, DEVICE, num_micro_batches=3, dtype="int8")
    assert same(Conversation(forward).steps(3), Conversation(bench.plain("int8")).steps(3))


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_the_past_is_copied_in_whole_pages_and_none_besides(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    """One long sequence beside short ones: what is copied is what the tier was charged with."""
    copied: list[int] = []
    upload_pages = HostDevice.upload_pages

    def counted(device: HostDevice, pages: Any, wanted: Any) -> Any:
        copy = upload_pages(device, pages, wanted)
        copied.append(copy.nbytes)
        return copy

    monkeypatch.setattr(HostDevice, "upload_pages", counted)
    forward = bench.planned(
        SerialExecutor(), "flexgen", DEVICE, num_micro_batches=1, dtype=dtype, num_slots=15
    )
    Conversation(forward).step()
    charged = [op.num_bytes for op in forward.steps[-1].timeline().plan.ops if op.kind == "kv_in"]
    assert len(charged) == forward.model.config.num_layers
    assert sum(copied) == sum(charged)
    # Prompts of 40 and 33 tokens have two pages each, the six others one.
    arrays = (*forward.kv.layer(0), *forward.kv.scales(0))
    assert charged[0] == sum(10 * array[0].nbytes for array in arrays if array is not None)


def test_one_slot_is_enough_for_ours(
    bench: Bench, executor: OverlappedExecutor, expected: Hidden
) -> None:
    forward = bench.planned(executor, "specmoeoff", CPU, num_slots=1)
    assert same(Conversation(forward).steps(3), expected)


@pytest.mark.parametrize("schedule", sorted(SCHEDULES))
def test_slots_that_come_and_go_change_nothing(
    bench: Bench, executor: OverlappedExecutor, schedule: str
) -> None:
    """What is kept in them is loaded by steps that load it anyway, and is gone with its slot."""
    forward = bench.planned(executor, schedule, CPU, num_micro_batches=3, max_slots=15)
    talk, plain = Conversation(forward), Conversation(bench.plain())
    for num_slots in (9, 15, 8, 7, 12, 12):
        forward._experts.resize(num_slots)
        assert same(talk.step(), plain.step())
        kept = [h for h in forward._held if h.buffer.startswith("kept")]
        assert len(kept) <= num_slots - NUM_SLOTS


def test_a_set_speed_changes_no_bit(
    bench: Bench, executor: OverlappedExecutor, expected: Hidden
) -> None:
    """Another order of events: the link is slow, the device is slower."""
    costs = Costs({"h2d": Rate(latency_s=3e-4), "device": Rate(latency_s=5e-4)})
    forward = bench.planned(executor, "specmoeoff", DEVICE, num_micro_batches=2, costs=costs)
    assert same(Conversation(forward).steps(3), expected)


def test_micro_batches_are_reported_as_they_end(bench: Bench, executor: OverlappedExecutor) -> None:
    forward = bench.planned(executor, "specmoeoff", CPU, num_micro_batches=3)
    told: dict[int, Hidden] = {}
    talk = Conversation(forward)
    spans = []
    for sequence, token_ids in zip(talk.sequences, talk.next, strict=True):
        assert forward.kv.reserve(sequence, len(token_ids))
        spans.append(Span(sequence, token_ids, 1))
    hidden = forward.run(spans, told.__setitem__)
    assert same(np.concatenate([told[m] for m in range(3)]), hidden)


@given(lengths=st.lists(st.integers(1, 30), min_size=1, max_size=12), wanted=st.integers(1, 9))
def test_the_cut_keeps_the_order_and_leaves_none_empty(lengths: list[int], wanted: int) -> None:
    spans = [Span(KvSequence(), [0] * n, 1) for n in lengths]
    parts = cut(spans, wanted)
    assert [span for part in parts for span in part] == spans
    assert len(parts) == min(wanted, len(spans))
    assert all(parts)


# Failures -----------------------------------------------------------------------------------------

FAULTS = {
    "disk": "read",
    "h2d": "load",
    "device": "experts",
    "cpu": "attend",
    "d2h": "qkv_out",
}
"""A kind of op on each lane."""


class Fault:
    """Makes the n-th op of a kind fail, once."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, kind: str, error: BaseException) -> None:
        self.left = 4
        perform = PassOps.perform

        def faulty(work: PassOps, op: Op, stop: threading.Event) -> None:
            if op.kind == kind:
                self.left -= 1
                if self.left == 0:
                    raise error
            perform(work, op, stop)

        monkeypatch.setattr(PassOps, "perform", faulty)


@pytest.mark.parametrize("kind", ["serial", "overlapped"])
@pytest.mark.parametrize("lane", FAULTS)
@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (StreamError("the disk has a bad block"), StreamError),
        (MemoryError("no room for 3 bytes"), OpError),
        (ZeroDivisionError("a bug"), OpError),
    ],
)
def test_a_failure_on_any_lane_is_named_and_the_next_pass_is_right(
    bench: Bench,
    executor: OverlappedExecutor,
    expected: Hidden,
    monkeypatch: pytest.MonkeyPatch,
    lane: str,
    error: BaseException,
    raised: type[Exception],
    kind: str,
) -> None:
    runs: Executor = executor if kind == "overlapped" else SerialExecutor()
    forward = bench.planned(runs, "specmoeoff", DEVICE_AND_DISK, num_micro_batches=2)
    talk = Conversation(forward)
    first = talk.step()
    with monkeypatch.context() as patch:
        Fault(patch, FAULTS[lane], error)
        with pytest.raises(raised, match=rf"op \d+ \({FAULTS[lane]} L.*failed: {error}"):
            talk.step()
    assert same(np.concatenate([first, talk.step(), talk.step()]), expected)


@pytest.mark.parametrize("kind", ["serial", "overlapped"])
@pytest.mark.parametrize("op", ["read", "attend", "experts"])
@pytest.mark.parametrize("error", [MemoryError("no room"), ZeroDivisionError("a bug")])
def test_a_failure_on_a_lane_of_this_machine(
    bench: Bench,
    executor: OverlappedExecutor,
    expected: Hidden,
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    op: str,
    kind: str,
) -> None:
    runs: Executor = executor if kind == "overlapped" else SerialExecutor()
    talk = Conversation(bench.planned(runs, "specmoeoff", CPU, num_micro_batches=2))
    first = talk.step()
    with monkeypatch.context() as patch:
        Fault(patch, op, error)
        with pytest.raises(OpError, match=rf"op \d+ \({op} L.*failed: {error}"):
            talk.step()
    assert same(np.concatenate([first, talk.step(), talk.step()]), expected)


class Disk:
    """What a disk does from its n-th read on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, does: str) -> None:
        self.left = 5
        real = os.preadv

        def preadv(descriptor: int, into: list[memoryview], offset: int) -> int:
            self.left -= 1
            if self.left == 0 and does == "fails":
                raise OSError(5, "Input/output error")
            if self.left == 0 and does == "takes long":
                time.sleep(0.5)
            if self.left <= 0 and does == "is short":
                into = [into[0][:4096]]
            return real(descriptor, into, offset)

        monkeypatch.setattr(reader_module.os, "preadv", preadv)


@pytest.mark.parametrize("kind", ["serial", "overlapped"])
@pytest.mark.parametrize("placement", ["cpu", "sim with disk"])
@pytest.mark.parametrize("does", ["fails", "is short", "takes long"])
def test_a_disk_that_is_not_well(
    bench: Bench,
    executor: OverlappedExecutor,
    expected: Hidden,
    monkeypatch: pytest.MonkeyPatch,
    does: str,
    placement: str,
    kind: str,
) -> None:
    runs: Executor = executor if kind == "overlapped" else SerialExecutor()
    talk = Conversation(bench.planned(runs, "specmoeoff", PLACEMENTS[placement]))
    steps = [talk.step()]
    runs.settle()
    with monkeypatch.context() as patch:
        disk = Disk(patch, does)
        if does == "fails":
            with pytest.raises(StreamError, match=r"op \d+ \(read L.* Input/output error"):
                talk.steps(3)
        else:
            steps.append(talk.step())
        runs.settle()
        assert disk.left <= 0
    assert same(np.concatenate([*steps, talk.steps(3 - len(steps))]), expected)


@pytest.mark.parametrize("kind", ["serial", "overlapped"])
@pytest.mark.parametrize("device", ["cpu", "sim"])
@pytest.mark.parametrize("where", ["in an op", "before the step"])
def test_closing_while_a_read_hangs(
    tiny_mixtral: Path,
    monkeypatch: pytest.MonkeyPatch,
    wanted: PlannedConfig,
    where: str,
    device: DeviceKind,
    kind: str,
) -> None:
    """The step ends with the reason, and no lane is left.

    Of ten experts six slots hold those that pass, or ten slots those that all stay.
    """
    # Before anything is planned: what this process holds must not become room for experts.
    forget_this_process(monkeypatch)
    num_slots = 6 if where == "in an op" else 10
    monkeypatch.setattr(planned_memory, "_reserve_slots", few_slots(num_slots))
    trade_nothing(monkeypatch)
    wanted = replace(wanted, overlapped=kind == "overlapped", device=device)
    memory = smallest_budget(tiny_mixtral) + MIB
    config = EngineConfig(model=str(tiny_mixtral), memory=memory)
    if device == "sim":
        wanted = replace(wanted, device_memory=2 << 20)
        config = replace(config, memory=less_than_all_experts(config, wanted))
    planned = open_planned(config, wanted)
    assert "disk" in planned.forward.machine.placement.weights
    hang = Hang(monkeypatch, *READS, 5)
    told = told_when_closed(
        lambda: Conversation(planned.forward).steps(50), hang, planned.close, (StreamError, OpError)
    )
    assert "closed" in told
    assert ("step" in told) == (where == "in an op")
    assert not [t.name for t in threading.enumerate() if t.name.startswith("lane")]
    hang.gate.set()


def test_a_file_that_was_cut_short_is_named(
    tmp_path: Path, executor: OverlappedExecutor, expected: Hidden
) -> None:
    """A short read, and the same pass again once the file is whole."""
    directory = write_tiny(tmp_path / "short", num_hidden_layers=3)
    files, reader = ModelFiles.open(str(directory)), Reader()
    weights = load_whole(files.model, Loader(files.checkpoint))
    bench = Bench(files, weights, reader)
    talk = Conversation(bench.planned(executor, "specmoeoff", CPU))
    first = talk.step()
    executor.settle()
    file = next(directory.glob("*.safetensors"))
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 3])
    with pytest.raises(StreamError, match=r"op \d+ \(read L\d E\d\) .* ended at byte"):
        talk.steps(2)
    file.write_bytes(content)
    assert same(np.concatenate([first, talk.step(), talk.step()]), expected)
    reader.close()


def test_closing_does_not_wait_for_a_read_that_takes_long(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("specmoeoff.pipeline.overlapped.GRACE_S", 0.05)
    started, release = threading.Event(), threading.Event()
    fetch = PlannedExperts.read

    def slow(experts: PlannedExperts, *where: Any) -> None:
        started.set()
        assert release.wait(30)
        fetch(experts, *where)

    monkeypatch.setattr(PlannedExperts, "read", slow)
    forward = bench.planned(OverlappedExecutor(), "specmoeoff", CPU)
    told: list[BaseException] = []

    def run() -> None:
        try:
            Conversation(forward).step()
        except OpError as error:
            told.append(error)

    runner = threading.Thread(target=run)
    runner.start()
    assert started.wait(30)
    forward.close()
    runner.join(30)
    release.set()
    assert [str(error) for error in told] == ["the executor was closed while a step ran"]


def test_many_passes_leave_nothing_behind(bench: Bench, executor: OverlappedExecutor) -> None:
    """Memory and threads are those of the first passes; sequences come and go."""
    forward = bench.planned(executor, "specmoeoff", DEVICE, num_micro_batches=2)

    def talk() -> None:
        conversation = Conversation(forward)
        conversation.steps(3)
        for sequence in conversation.sequences:
            forward.kv.free(sequence)

    for _ in range(5):
        talk()
    executor.settle()
    tracemalloc.start()
    talk()
    executor.settle()
    gc.collect()
    before, threads = tracemalloc.get_traced_memory()[0], threading.active_count()
    for _ in range(40):
        talk()
    executor.settle()
    gc.collect()
    after = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert after - before < 256 << 10
    assert threading.active_count() == threads
    assert forward.kv.num_used == 0


# Opening ------------------------------------------------------------------------------------------


@pytest.fixture
def wanted() -> PlannedConfig:
    return PlannedConfig(num_micro_batches=2, num_seqs=len(PROMPTS), max_len=64, max_tokens=128)


def test_a_model_is_opened_for_this_machine(tiny_mixtral: Path, wanted: PlannedConfig) -> None:
    planned = open_planned(EngineConfig(model=str(tiny_mixtral), memory=1 << 30), wanted)
    assert len(Conversation(planned.forward).steps(2)) == 2 * len(PROMPTS)
    (memory,) = planned.tiers
    assert memory.planned <= memory.budget == 1 << 30
    assert planned.uses(123) == {"main": memory.use(123)}
    planned.close()


def lanes_used(planned: Planned) -> set[str]:
    talk = Conversation(planned.forward)
    lanes = set()
    for _ in range(2):
        talk.step()
        lanes |= {op.lane for op in planned.forward.steps[0].timeline().plan.ops}
    return lanes


def test_a_model_is_opened_for_a_device(
    tiny_mixtral: Path, wanted: PlannedConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights come from host memory if they fit there, else through it from disk."""
    # What this process holds changes from one opening to the next.
    monkeypatch.setattr("specmoeoff.engine.memory_plan.resident_bytes", lambda: 0)
    wanted = replace(wanted, device="sim", device_memory=1 << 20)
    planned = open_planned(EngineConfig(model=str(tiny_mixtral)), wanted)
    host, device = planned.tiers
    half = device.reserved - device.as_dict()["expert slots"] // 2
    assert lanes_used(planned) == {"h2d", "device", "cpu", "d2h"}
    assert host.as_dict().keys() == {"runtime", "activations", "KV cache", "experts"}
    assert device.as_dict().keys() == {"target dense weights", "activations", "expert slots"}
    # A step takes less than what is put aside for the largest one.
    assert 0 < device.reserved <= device.peak < device.planned <= device.budget
    uses = planned.uses(10 << 20)
    assert uses == {"host": host.use((10 << 20) - device.peak), "device": device.use(device.peak)}
    planned.close()
    smaller = EngineConfig(model=str(tiny_mixtral), memory=host.reserved - 1)
    planned = open_planned(smaller, replace(wanted, device_memory=half))
    assert lanes_used(planned) == {"disk", "h2d", "device", "cpu", "d2h"}
    names = planned.tiers[0].as_dict().keys()
    assert names == {"runtime", "activations", "KV cache", "experts on their way"}
    planned.close()


def test_a_device_that_is_too_small_is_refused(tiny_mixtral: Path, wanted: PlannedConfig) -> None:
    config = EngineConfig(model=str(tiny_mixtral))
    for device_memory in (1 << 10, 1 << 17):
        with pytest.raises(DoesNotFitError, match=r"device memory of .* is too small for target"):
            open_planned(config, replace(wanted, device="sim", device_memory=device_memory))
    with pytest.raises(DoesNotFitError, match=r"host memory of 1.00 KiB is too small for runtime"):
        open_planned(
            replace(config, memory=1024), replace(wanted, device="sim", device_memory=1 << 20)
        )


def test_a_pass_that_the_device_has_no_room_for_is_refused(
    tiny_mixtral: Path, wanted: PlannedConfig
) -> None:
    wanted = replace(wanted, device="sim", device_memory=1 << 20)
    planned = open_planned(EngineConfig(model=str(tiny_mixtral)), wanted)
    sequence = KvSequence()
    assert planned.forward.kv.reserve(sequence, 400)
    with pytest.raises(DoesNotFitError, match=r"too small for target dense .* activations"):
        planned.forward.run([Span(sequence, [1] * 400, 1)])
    assert len(Conversation(planned.forward).forward.run([Span(sequence, [1], 1)])) == 1
    planned.close()


def test_recorded_steps_verify_several_tokens_and_grow_by_one(
    tiny_mixtral: Path, wanted: PlannedConfig
) -> None:
    """Drafts that are rejected leave nothing: the KV cache has room for no more than it says."""
    wanted = replace(wanted, max_len=longest(20, 12, 4))
    planned = open_planned(EngineConfig(model=str(tiny_mixtral), memory=1 << 30), wanted)
    # The first batch gives its pages back, or the second would have no room.
    for tunes in (True, False):
        made = record(planned.forward, len(PROMPTS), 20, 12, 64, verified=4, tunes=tunes)
    planned.close()
    assert len(made.timelines) == 12
    batches = made.shape.micro_batches
    assert sum(batch.num_tokens for batch in batches) == 4 * len(PROMPTS)
    assert sum(batch.num_outputs for batch in batches) == 4 * len(PROMPTS)
    # After 20 tokens of context, the steps that warm up and those that are kept.
    assert sum(batch.kv_tokens for batch in batches) == len(PROMPTS) * longest(20, 12, 5)
