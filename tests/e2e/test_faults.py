"""Disks fail, users interrupt, callers leave: one sentence, and an engine that goes on."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from budgets import forget_this_process, smallest_budget
from faults import READS, Hang, fail_every, read_in_small_parts, told_when_closed
from specmoeoff import LLM, SamplingParams, SpeculativeConfig, kernels
from specmoeoff.errors import CheckpointError, InvalidInputError, StreamError
from specmoeoff.offload.arena import Arena
from specmoeoff.offload.checkpoint import Checkpoint
from specmoeoff.offload.kv_cache import KvCache, KvSequence
from specmoeoff.offload.reader import Read
from tiny import write_draft, write_tiny

if TYPE_CHECKING:
    from collections.abc import Iterator

    from specmoeoff.engine.engine import Engine
    from specmoeoff.engine.sequence import Request
    from specmoeoff.outputs import RequestOutput

GREEDY = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True)
PROMPTS = [{"prompt_token_ids": [i, 2 * i, 7]} for i in range(1, 7)]


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(
        tmp_path_factory.mktemp("faults") / "target",
        seed=5,
        sharded=True,
        expert_spread=0.1,
        hidden_size=88,
        intermediate_size=384,
        num_hidden_layers=3,
    )


@pytest.fixture(scope="module")
def draft(original: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_draft(original, tmp_path_factory.mktemp("faults") / "draft")


@pytest.fixture
def checkpoint(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "target"))


@pytest.fixture(params=["off", "draft"])
def llm(
    request: pytest.FixtureRequest, checkpoint: Path, draft: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[LLM]:
    """At the smallest budget, so that every pass streams."""
    forget_this_process(monkeypatch)
    speculative = SpeculativeConfig(model=str(draft)) if request.param == "draft" else None
    memory = smallest_budget(checkpoint, speculative)
    with LLM(str(checkpoint), memory=memory, speculative_config=speculative) as made:
        yield made


@pytest.fixture(scope="module")
def expected(original: Path) -> list[list[int]]:
    with LLM(str(original), memory="4GiB") as llm:
        return [output.outputs[0].token_ids for output in llm.generate(PROMPTS, GREEDY)]


def tokens(outputs: list[RequestOutput]) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in outputs]


def add_requests(engine: Engine) -> list[Request]:
    return [
        engine.add_request(str(i), prompt["prompt_token_ids"], GREEDY)
        for i, prompt in enumerate(PROMPTS)
    ]


def shards(checkpoint: Path) -> list[Path]:
    return sorted(checkpoint.glob("*.safetensors"))


def one_sentence(error: BaseException) -> str:
    text = str(error)
    assert "\n" not in text
    return text


@pytest.mark.parametrize("moment", ["before", "while running"])
def test_a_truncated_shard(
    llm: LLM, checkpoint: Path, expected: list[list[int]], moment: str
) -> None:
    shard = shards(checkpoint)[1]
    content = shard.read_bytes()
    if moment == "before":
        os.truncate(shard, 5000)
        with pytest.raises(StreamError) as error:
            llm.generate(PROMPTS, GREEDY)
    else:
        stream = llm.generate_stream(PROMPTS, GREEDY)
        next(stream)
        os.truncate(shard, 5000)
        with pytest.raises(StreamError) as error:
            list(stream)
    message = one_sentence(error.value)
    assert shard.name in message
    assert "truncated" in message
    with pytest.raises(StreamError):
        llm.generate(PROMPTS, GREEDY)
    shard.write_bytes(content)
    assert tokens(llm.generate(PROMPTS, GREEDY)) == expected


def test_a_shard_removed_while_running_stays_readable(
    llm: LLM, checkpoint: Path, expected: list[list[int]]
) -> None:
    run = llm.iter_completed(PROMPTS, [GREEDY] * 5 + [GREEDY.replace(max_tokens=4)])
    next(run)
    for shard in shards(checkpoint):
        shard.unlink()
    rest = sorted(run, key=lambda output: int(output.request_id))
    assert tokens(rest) == expected[:5]


def test_a_shard_removed_before_it_was_opened(
    llm: LLM, checkpoint: Path, expected: list[list[int]]
) -> None:
    for shard in shards(checkpoint):
        shard.rename(shard.with_suffix(".away"))
    with pytest.raises(StreamError, match=r"model-0000\d-of-00003\.safetensors: .*No such file"):
        llm.generate(PROMPTS, GREEDY)
    for shard in checkpoint.glob("*.away"):
        shard.rename(shard.with_suffix(".safetensors"))
    assert tokens(llm.generate(PROMPTS, GREEDY)) == expected


def test_read_errors(llm: LLM, expected: list[list[int]], monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        fail_every(patch, *READS, 1, OSError(5, "Input/output error"))
        with pytest.raises(StreamError, match=r"safetensors: reading expert .* Input/output"):
            all(llm.generate(PROMPTS, GREEDY) for _ in range(50))
    assert tokens(llm.generate(PROMPTS, GREEDY)) == expected


@pytest.mark.parametrize("every", [7, 40])
def test_occasional_read_errors_heal_or_are_told(
    llm: LLM, expected: list[list[int]], monkeypatch: pytest.MonkeyPatch, every: int
) -> None:
    """A read ahead that failed is asked for again, so one error in many may heal unseen."""
    with monkeypatch.context() as patch:
        fail_every(patch, *READS, every, OSError(5, "Input/output error"))
        for _ in range(10):
            with contextlib.suppress(StreamError):
                assert tokens(llm.generate(PROMPTS, GREEDY)) == expected
    assert tokens(llm.generate(PROMPTS, GREEDY)) == expected


def test_reads_that_come_in_small_parts(
    llm: LLM, expected: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel may return fewer bytes than were asked for; the rest is asked for again."""
    read_in_small_parts(monkeypatch)
    assert tokens(llm.generate(PROMPTS, GREEDY)) == expected


def test_a_read_that_takes_long_is_waited_for(
    llm: LLM, expected: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    hang = Hang(monkeypatch, *READS)
    threading.Timer(0.5, hang.gate.set).start()
    assert tokens(llm.generate(PROMPTS, GREEDY)) == expected
    assert hang.started.is_set()


def test_closing_while_a_read_hangs(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """It returns while the disk is still silent, and so does the run, with the reason."""
    hang = Hang(monkeypatch, *READS)
    told = told_when_closed(lambda: llm.generate(PROMPTS, GREEDY), hang, llm.close, StreamError)
    assert "the reader was closed" in told
    assert "\n" not in told
    with pytest.raises(InvalidInputError, match="was closed"):
        llm.generate(PROMPTS, GREEDY)
    hang.gate.set()


def test_an_interrupt_while_a_read_hangs(
    llm: LLM, expected: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The call returns at once, and the next one goes on when the disk answers again."""
    with monkeypatch.context() as patch:
        hang = Hang(patch, *READS)

        def interrupted(read: Read) -> None:
            assert hang.started.wait(30)
            raise KeyboardInterrupt

        patch.setattr(Read, "wait", interrupted)
        with pytest.raises(KeyboardInterrupt):
            llm.generate(PROMPTS, GREEDY)
    hang.gate.set()
    assert tokens(llm.generate(PROMPTS, GREEDY)) == expected


HANGING_DISK = """
import os, threading, time
read = os.preadv
def preadv(*where):
    if threading.current_thread().name.startswith("reader"):
        open(os.environ["HANGS"], "w").close()
        time.sleep(3600)
    return read(*where)
os.preadv = preadv
"""


@pytest.mark.parametrize(
    "options",
    [[], ["--schedule", "specmoeoff"], ["--device", "sim", "--device-memory", "64MiB"]],
    ids=["reactive", "cpu", "sim"],
)
def test_ctrl_c_ends_a_command_whose_read_hangs(
    checkpoint: Path, tmp_path: Path, options: list[str]
) -> None:
    """Exit code 130, and no process that waits for its threads."""
    (tmp_path / "sitecustomize.py").write_text(HANGING_DISK)
    hangs = tmp_path / "hangs"
    jobs, output = tmp_path / "jobs.jsonl", tmp_path / "results.jsonl"
    jobs.write_text('{"id": "a", "prompt_token_ids": [1, 2, 3]}\n')
    command = [sys.executable, "-m", "specmoeoff", "generate", str(checkpoint), "--memory", "1GiB"]
    process = subprocess.Popen(
        [*command, *options, "--prompts", str(jobs), "--output", str(output)],
        env={**os.environ, "PYTHONPATH": str(tmp_path), "HANGS": str(hangs)},
        stderr=subprocess.PIPE,
        text=True,
    )
    while not hangs.exists():
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    errors = process.communicate(timeout=60)[1]
    assert process.returncode == 130, errors
    assert "interrupted" in errors
    assert "Traceback" not in errors


@pytest.mark.parametrize("call", [1, 2, 9, 40])
@pytest.mark.parametrize("error", [MemoryError(), OSError(12, "Cannot allocate memory")])
def test_memory_that_cannot_be_had(
    llm: LLM,
    expected: list[list[int]],
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    call: int,
) -> None:
    """The caches and the slots change their sizes by this; a run may need it fewer times."""
    real, calls = Arena.hold, []

    def hold(arena: Arena, num_bytes: int) -> None:
        calls.append(1)
        if len(calls) == call:
            raise error
        real(arena, num_bytes)

    with monkeypatch.context() as patch:
        patch.setattr(Arena, "hold", hold)
        with contextlib.suppress(type(error)):
            for _ in range(3):
                llm.generate(PROMPTS, GREEDY)
    assert calls
    assert llm._engine._target.kv.num_used == 0
    assert tokens(llm.generate(PROMPTS, GREEDY)) == expected


@pytest.mark.parametrize("call", [1, 4, 30])
def test_a_bug_while_tokens_are_committed(
    llm: LLM, expected: list[list[int]], monkeypatch: pytest.MonkeyPatch, call: int
) -> None:
    engine = llm._engine
    requests = add_requests(engine)
    with monkeypatch.context() as patch:
        fail_every(patch, KvCache, "truncate", call, RuntimeError("a bug"))
        with pytest.raises(RuntimeError, match="a bug"):
            all(engine.step() for _ in range(1000))
    while engine.has_work:
        engine.step()
    assert [request.sequences[0].output_token_ids for request in requests] == expected


def test_a_bug_just_when_a_sequence_has_ended(
    llm: LLM, expected: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has all of its tokens, so it must leave rather than go on past its end."""
    engine = llm._engine
    requests = add_requests(engine)
    ends = {
        len(prompt["prompt_token_ids"]) + len(ids) - 1
        for prompt, ids in zip(PROMPTS, expected, strict=True)
    }
    real, failed = KvCache.truncate, []

    def truncate(cache: KvCache, sequence: KvSequence, length: int) -> None:
        if length in ends and not failed:
            failed.append(length)
            raise RuntimeError("a bug")
        real(cache, sequence, length)

    monkeypatch.setattr(KvCache, "truncate", truncate)
    with pytest.raises(RuntimeError, match="a bug"):
        all(engine.step() for _ in range(1000))
    while engine.has_work:
        engine.step()
    assert [request.sequences[0].output_token_ids for request in requests] == expected
    assert all(request.is_finished for request in requests)


@pytest.mark.parametrize(
    ("owner", "name"), [(kernels, "expert_ffn_many"), (kernels.DecoderPass, "attend")]
)
@pytest.mark.parametrize("error", [KeyboardInterrupt(), MemoryError(), RuntimeError("surprise")])
@pytest.mark.parametrize("call", [1, 5, 37])
def test_an_exception_in_the_middle_of_a_step(
    llm: LLM,
    expected: list[list[int]],
    monkeypatch: pytest.MonkeyPatch,
    owner: object,
    name: str,
    error: BaseException,
    call: int,
) -> None:
    with monkeypatch.context() as patch:
        fail_every(patch, owner, name, call, error)
        with pytest.raises(type(error)):
            llm.generate(PROMPTS, GREEDY)
    assert not llm._engine.has_work
    assert llm._engine._target.kv.num_used == 0
    assert tokens(llm.generate(PROMPTS, GREEDY)) == expected


def test_an_interrupt_while_waiting_for_the_disk(
    llm: LLM, expected: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    for call in (1, 2, 5, 13):
        with monkeypatch.context() as patch:
            fail_every(patch, Read, "wait", call, KeyboardInterrupt())
            with pytest.raises(KeyboardInterrupt):
                llm.generate(PROMPTS, GREEDY)
    assert tokens(llm.generate(PROMPTS, GREEDY)) == expected


def test_finished_requests_are_whole_when_a_later_step_fails(
    llm: LLM, checkpoint: Path, expected: list[list[int]]
) -> None:
    params = [GREEDY.replace(max_tokens=4) if i % 2 else GREEDY for i in range(6)]
    finished: list[RequestOutput] = []
    shard = shards(checkpoint)[2]
    run = llm.iter_completed(PROMPTS, params)
    finished += [next(run) for _ in range(3)]
    os.truncate(shard, 9000)
    with pytest.raises(StreamError, match=shard.name):
        finished.append(next(run))
    assert sorted(int(output.request_id) for output in finished) == [1, 3, 5]
    for output in finished:
        number = int(output.request_id)
        assert output.outputs[0].token_ids == expected[number][:4]
        assert output.outputs[0].finish_reason == "length"


def test_the_engine_goes_on_after_a_failed_step(
    llm: LLM, expected: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Below LLM a failed step loses no request: the next step reads its tokens again."""
    engine = llm._engine
    requests = add_requests(engine)
    for number in range(1000):
        if not engine.has_work:
            break
        if number in (1, 2, 6):
            with monkeypatch.context() as patch:
                fail_every(patch, *READS, 1, OSError(5, "Input/output error"))
                with pytest.raises(StreamError):
                    engine.step()
        engine.step()
    assert not any(request.num_preemptions for request in requests)
    assert [request.sequences[0].output_token_ids for request in requests] == expected


def test_closing_in_the_middle_of_a_run_ends_it(llm: LLM) -> None:
    stream = llm.generate_stream(PROMPTS, GREEDY)
    next(stream)
    llm.close()
    with pytest.raises(StreamError, match="closed"):
        list(stream)


def damage(checkpoint: Path, name: str, value: float) -> Path:
    """Overwrite a tensor's first element, of bfloat16."""
    ref = Checkpoint.open(checkpoint).tensors[name]
    bits = np.array([value], np.float32).view(np.uint32) >> 16
    with ref.file.open("r+b") as file:
        file.seek(ref.offset)
        file.write(bits.astype(np.uint16).tobytes())
    return ref.file


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize(
    "tensor",
    ["layers.1.block_sparse_moe.gate", "layers.0.input_layernorm", "norm"],
)
def test_a_tensor_that_is_not_finite(checkpoint: Path, tensor: str, value: float) -> None:
    file = damage(checkpoint, f"model.{tensor}.weight", value)
    with pytest.raises(CheckpointError) as error:
        LLM(str(checkpoint), memory="4GiB")
    assert file.name in one_sentence(error.value)
    assert tensor in one_sentence(error.value)


def test_nan_in_a_matrix_is_found_in_the_logits(
    checkpoint: Path, expected: list[list[int]]
) -> None:
    damage(checkpoint, "model.layers.0.self_attn.o_proj.weight", np.nan)
    with (
        LLM(str(checkpoint), memory="4GiB") as llm,
        pytest.raises(CheckpointError, match="NaN or infinite"),
    ):
        llm.generate(PROMPTS, GREEDY)


def test_a_wrong_shape(tmp_path: Path) -> None:
    directory = write_tiny(tmp_path / "target")
    config = directory / "config.json"
    config.write_text(
        config.read_text().replace('"intermediate_size": 84', '"intermediate_size": 80')
    )
    with pytest.raises(CheckpointError) as error:
        LLM(str(directory), memory="4GiB")
    message = one_sentence(error.value)
    assert "model.safetensors" in message
    assert "[84, 60]" in message
    assert "[80, 60]" in message


def test_a_missing_tensor(checkpoint: Path) -> None:
    index = checkpoint / "model.safetensors.index.json"
    name = "model.layers.2.block_sparse_moe.experts.1.w2.weight"
    index.write_text(index.read_text().replace(name, "model.other"))
    with pytest.raises(CheckpointError):
        LLM(str(checkpoint), memory="4GiB")
