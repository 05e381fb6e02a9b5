"""JSONL jobs: every line exactly once and in order, whatever is wrong with it or ends the run."""

from __future__ import annotations

import json
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fakes import FakeLLM
from specmoeoff.batch import BatchSummary, OutputError, partial_path, run_batch
from specmoeoff.batch.lines import LineReader, line_seed
from specmoeoff.batch.partial import PartialResults
from specmoeoff.batch.seen_ids import SeenIds
from specmoeoff.errors import InvalidInputError
from specmoeoff.sampling_params import SamplingParams

GREEDY = SamplingParams(temperature=0.0, max_tokens=50)


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return Job(tmp_path)


class Job:
    """An input and an output file, and a run over them."""

    def __init__(self, directory: Path) -> None:
        self.input = directory / "in.jsonl"
        self.output = directory / "out.jsonl"
        self.partial = partial_path(self.output)

    def write(self, *lines: Any) -> None:
        texts = [line if isinstance(line, (str, bytes)) else json.dumps(line) for line in lines]
        raw = [text.encode() if isinstance(text, str) else text for text in texts]
        self.input.write_bytes(b"\n".join(raw) + b"\n")

    def write_many(self, count: int) -> None:
        self.write(*({"id": f"id{i}", "prompt": f"prompt {i}"} for i in range(count)))

    def run(
        self, llm: Any = None, defaults: SamplingParams = GREEDY, **kwargs: Any
    ) -> BatchSummary:
        return run_batch(llm or FakeLLM(), self.input, self.output, defaults, **kwargs)

    def results(self) -> list[dict[str, Any]]:
        return read_lines(self.output)


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().split(b"\n") if line]


def test_results_are_in_input_order_and_complete(job: Job) -> None:
    job.write(
        {"id": "a", "prompt": "one"},
        {"prompt_token_ids": [72, 105]},
        {"id": 7, "messages": [{"role": "user", "content": "three"}]},
        {"id": "d", "prompt": "four", "max_tokens": 2},
    )
    summary = job.run()
    assert summary == BatchSummary(num_lines=4, num_finished=4, num_failed=0, num_resumed=0)
    assert job.results() == [
        result("a", 0, "eno", 3),
        result("line-1", 1, "iH", 2),
        result(7, 2, "eerht", 5),
        result("d", 3, "ru", 4),
    ]
    assert not job.partial.exists()
    assert sorted(path.name for path in job.output.parent.iterdir()) == ["in.jsonl", "out.jsonl"]


def result(line_id: str | int, index: int, text: str, num_prompt_tokens: int) -> dict[str, Any]:
    return {
        "id": line_id,
        "index": index,
        "text": text,
        "token_ids": [ord(char) for char in text],
        "finish_reason": "stop",
        "num_tokens": len(text),
        "num_prompt_tokens": num_prompt_tokens,
    }


BAD_LINES = [
    (b'{"prompt": "x"', "not valid JSON"),
    (b'{"prompt": "\xff"}', "not valid UTF-8 (byte 12 is 0xff)"),
    (b"[1, 2]", "JSON array"),
    (b"null", "JSON null"),
    (b"[" * 100_000, "not valid JSON"),
    (b'{"prompt": "x", "temperature": NaN}', "NaN"),
    (b"{}", "it has none"),
    (b'{"prompt": "x", "messages": []}', "it has prompt and messages"),
    (b'{"prompt": 5}', "prompt is a JSON number"),
    (b'{"prompt": "\\ud800"}', "unpaired surrogate"),
    (b'{"prompt_token_ids": [1, -2]}', "prompt_token_ids[1] is -2"),
    (b'{"prompt_token_ids": [1, true]}', "prompt_token_ids[1] is True"),
    (b'{"prompt_token_ids": "12"}', "JSON string"),
    (b'{"messages": []}', "one or more"),
    (b'{"messages": ["hi"]}', "messages[0] is a JSON string"),
    (b'{"messages": [{"role": "user"}]}', "messages[0] needs a string 'content'"),
    (b'{"id": true, "prompt": "x"}', "id is a JSON boolean"),
    (b'{"id": "first", "prompt": "x"}', "id 'first' was already used"),
    (b'{"prompt": "x", "max_token": 5}', "did you mean 'max_tokens'"),
    (b'{"prompt": "x", "temperature": "hot"}', "temperature is 'hot'"),
    (b'{"prompt": "x", "temperature": -1}', "temperature is -1"),
    (b'{"prompt": "x", "top_p": 1' + b"0" * 400 + b"}", "too large"),
    (b'{"prompt": "unrunnable"}', "max_model_len"),
]


@pytest.mark.parametrize(("raw", "error"), BAD_LINES, ids=[error for _, error in BAD_LINES])
def test_a_bad_line_is_an_error_record_and_the_rest_go_on(job: Job, raw: bytes, error: str) -> None:
    job.write({"id": "first", "prompt": "ab"}, raw, {"id": "last", "prompt": "cd"})
    summary = job.run()
    first, bad, last = job.results()
    assert (first["text"], last["text"]) == ("ba", "dc")
    assert set(bad) == {"id", "index", "error"}
    assert bad["index"] == 1
    assert error in bad["error"]
    assert (summary.num_finished, summary.num_failed) == (3, 1)


def test_only_bad_lines_need_no_model(job: Job) -> None:
    job.write("nonsense", "more of it")
    llm = FakeLLM()
    assert job.run(llm).num_failed == 2
    assert llm.taken == 0
    assert [record["id"] for record in job.results()] == ["line-0", "line-1"]


@pytest.mark.parametrize("content", [b"", b"\n\r\n  \n"])
def test_an_empty_input_gives_an_empty_output(job: Job, content: bytes) -> None:
    job.input.write_bytes(content)
    assert job.run() == BatchSummary(0, 0, 0, 0)
    assert job.output.read_bytes() == b""


def test_line_ends_blank_lines_and_a_byte_order_mark_do_not_matter(job: Job) -> None:
    job.input.write_bytes(
        b'\xef\xbb\xbf{"prompt": "ab"}\r\n\r\n{"prompt": "cd"}\n\n{"prompt": "e"}'
    )
    job.run()
    assert [(r["index"], r["text"]) for r in job.results()] == [(0, "ba"), (1, "dc"), (2, "e")]


def test_unicode_survives_and_is_not_escaped(job: Job) -> None:
    text = "é\u2028日本\u0085🙂"  # two of these are line ends to str.splitlines
    job.write({"id": "ü", "prompt": text}, {"id": "\ud800", "prompt": "x"})
    job.run()
    assert [r["text"] for r in job.results()] == [text[::-1], "x"]
    assert [r["id"] for r in job.results()] == ["ü", "\ud800"]
    assert "日本"[::-1].encode() in job.output.read_bytes()


def test_samples_and_logprobs(job: Job) -> None:
    job.write({"prompt": "ab", "n": 2, "temperature": 1.0, "logprobs": 1})
    job.run()
    (record,) = job.results()
    assert record["text"] == "ba"
    assert [(o["index"], o["text"]) for o in record["outputs"]] == [(0, "ba"), (1, "ba1")]
    first = {"98": {"logprob": -9999.0, "rank": 1, "decoded_token": "b"}}
    assert record["logprobs"][0] == record["outputs"][1]["logprobs"][0] == first


def test_inputs_are_drawn_as_there_is_room(job: Job) -> None:
    job.write_many(100)
    llm = FakeLLM(batch_size=4)
    ahead: list[int] = []
    job.run(llm, progress=lambda summary: ahead.append(llm.taken - summary.num_finished))
    assert len(ahead) == 101  # at the start, and after every result
    assert max(ahead) < 4


def test_seeds_follow_from_the_job_and_the_place(job: Job) -> None:
    job.write({"prompt": "a"}, {"prompt": "b", "seed": 5}, {"prompt": "c"})
    llm = FakeLLM()
    job.run(llm, seed=3)
    assert [params.seed for _, params in llm.seen] == [line_seed(3, 0), 5, line_seed(3, 2)]
    assert line_seed(3, 0) != line_seed(3, 2) != line_seed(4, 2)


# What can end a run early


class StoppingLLM(FakeLLM):
    """Raises after some results."""

    def __init__(self, after: int, error: BaseException) -> None:
        super().__init__()
        self.after = after
        self.error = error

    def iter_completed(self, *args: Any) -> Any:
        for count, output in enumerate(super().iter_completed(*args)):
            if count == self.after:
                raise self.error
            yield output


def test_an_interrupt_keeps_what_is_finished_and_says_so(job: Job) -> None:
    job.write_many(20)
    with pytest.raises(KeyboardInterrupt) as caught:
        job.run(StoppingLLM(6, KeyboardInterrupt()))
    (said,) = caught.value.__notes__
    assert said.startswith("6 of 20 lines are finished")
    assert "--resume" in said
    assert not job.output.exists()
    llm = FakeLLM()
    assert job.run(llm, resume=True) == BatchSummary(20, 20, 0, num_resumed=6)
    assert llm.taken == 14
    assert [r["id"] for r in job.results()] == [f"id{i}" for i in range(20)]


@given(cut=st.integers(0, 2000))
def test_a_file_torn_anywhere_is_resumed_without_loss(
    cut: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    job = Job(tmp_path_factory.mktemp("torn"))
    job.write_many(12)
    with pytest.raises(KeyboardInterrupt):
        job.run(StoppingLLM(9, KeyboardInterrupt()))
    raw = job.partial.read_bytes()[:cut]
    job.partial.write_bytes(raw)
    kept = max(0, raw.count(b"\n") - 1)
    llm = FakeLLM()
    assert job.run(llm, resume=True).num_resumed == kept
    assert llm.taken == 12 - kept
    expected = [(f"id{i}", i, f"prompt {i}"[::-1]) for i in range(12)]
    assert [(r["id"], r["index"], r["text"]) for r in job.results()] == expected


def test_damaged_and_repeated_lines_of_a_partial_file_are_left_out(job: Job) -> None:
    job.write_many(3)
    with pytest.raises(KeyboardInterrupt):
        job.run(StoppingLLM(1, KeyboardInterrupt()))
    with job.partial.open("ab") as file:
        file.write(b'\0\0\0\n[]\n{"index": 99}\n{"index": "1"}\n')
        file.write(b'{"id": "id0", "index": 0, "text": "kept"}\n')
        file.write(b'{"id": "id0", "index": 0, "text": "repeated"}\n')
    assert job.run(resume=True).num_resumed == 2
    assert job.results()[0]["text"] == "kept"
    assert [r["index"] for r in job.results()] == [0, 1, 2]


def test_resuming_counts_errors_and_remembers_ids(job: Job) -> None:
    job.write(
        {"id": "a", "prompt": "x"}, "bad", *({"prompt": f"{i}"} for i in range(4)), {"id": "a"}
    )
    with pytest.raises(KeyboardInterrupt):
        job.run(StoppingLLM(1, KeyboardInterrupt()))
    assert job.run(resume=True) == BatchSummary(7, 7, 2, num_resumed=2)
    assert "already used" in job.results()[6]["error"]


def test_resume_without_a_partial_file_just_starts(job: Job) -> None:
    job.write_many(2)
    assert job.run(resume=True).num_resumed == 0


def test_a_partial_file_of_another_job_is_refused(job: Job) -> None:
    job.write_many(5)
    with pytest.raises(KeyboardInterrupt):
        job.run(StoppingLLM(2, KeyboardInterrupt()), model="m")
    before = job.partial.read_bytes()
    other = SamplingParams(temperature=0.0, max_tokens=51)
    with pytest.raises(InvalidInputError, match=r"another job \(another params\)"):
        job.run(defaults=other, model="m", resume=True)
    with pytest.raises(InvalidInputError, match=r"another job \(another model, seed\)"):
        job.run(model="n", seed=1, resume=True)
    job.write_many(6)
    with pytest.raises(InvalidInputError, match=r"another job \(another input_sha256\)"):
        job.run(model="m", resume=True)
    assert job.partial.read_bytes() == before
    job.partial.write_bytes(b"something of yours\n")
    with pytest.raises(InvalidInputError, match="not a file of partial results"):
        job.run(model="m", resume=True)
    job.partial.write_bytes(b"something of yours")
    with pytest.raises(InvalidInputError, match="not a file of partial results"):
        job.run(model="m", resume=True)
    assert job.partial.read_bytes() == b"something of yours"


def test_what_exists_is_neither_lost_nor_mixed_up(job: Job) -> None:
    job.write_many(4)
    job.run()
    with pytest.raises(InvalidInputError, match="--overwrite"):
        job.run()
    assert job.run(overwrite=True).num_finished == 4
    with pytest.raises(KeyboardInterrupt):
        job.run(StoppingLLM(2, KeyboardInterrupt()), overwrite=True)
    assert len(job.results()) == 4  # the old output stands until the new one is whole
    job.output.unlink()
    with pytest.raises(InvalidInputError, match=r"--resume .* --overwrite"):
        job.run()
    assert job.run(overwrite=True).num_resumed == 0


def test_bad_paths_are_named(job: Job, tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match=r"in\.jsonl does not exist"):
        job.run()
    job.input.mkdir()
    with pytest.raises(InvalidInputError, match="is not a file"):
        job.run()
    job.input.rmdir()
    job.write_many(1)
    with pytest.raises(InvalidInputError, match="the same file"):
        run_batch(FakeLLM(), job.input, job.input, GREEDY)
    for output in (tmp_path, tmp_path / "none" / "out.jsonl"):
        with pytest.raises(InvalidInputError, match="must be a file in a directory that exists"):
            run_batch(FakeLLM(), job.input, output, GREEDY)


def test_two_processes_cannot_write_one_job(job: Job) -> None:
    job.write_many(1)
    header = {"a": 1}
    holder = PartialResults(job.partial, header, 1)
    with pytest.raises(InvalidInputError, match="another process"):
        PartialResults(job.partial, header, 1)
    holder.close()
    PartialResults(job.partial, header, 1).close()


def test_an_input_that_changes_while_the_job_runs_is_noticed(job: Job) -> None:
    job.write_many(3)

    class Meddler(FakeLLM):
        def iter_completed(self, *args: Any) -> Any:
            with job.input.open("a") as file:
                file.write('{"prompt": "late"}\n')
            yield from super().iter_completed(*args)

    with pytest.raises(InvalidInputError, match="was changed while the job ran"):
        job.run(Meddler())


def test_a_full_disk_is_said_and_keeps_the_finished_lines(job: Job) -> None:
    job.write_many(50)
    limit = 1500
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        with pytest.raises(OutputError, match=r"cannot write .*out\.jsonl\.partial") as caught:
            job.run()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    raw = job.partial.read_bytes()
    assert raw.endswith(b"}\n")  # the torn line is cut off again
    finished = raw.count(b"\n") - 1
    assert finished > 0
    assert caught.value.__notes__[0].startswith(f"{finished} of 50 lines are finished")
    assert caught.value.exit_code == 1
    assert job.run(resume=True).num_resumed == finished
    assert [r["index"] for r in job.results()] == list(range(50))


def test_a_disk_that_fills_up_at_the_end_loses_nothing(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    job.write_many(5)

    def refuse(self: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", refuse)
        with pytest.raises(OutputError, match=r"out\.jsonl: No space left on device"):
            job.run()
    assert sorted(path.name for path in job.output.parent.iterdir()) == [
        "in.jsonl",
        "out.jsonl.partial",
    ]
    llm = FakeLLM()
    assert job.run(llm, resume=True).num_resumed == 5
    assert llm.taken == 0
    assert len(job.results()) == 5


SLOW_RUN = """
import sys
sys.path[:0] = sys.argv[3:]
from fakes import FakeLLM
from specmoeoff import SamplingParams
from specmoeoff.batch import run_batch
llm = FakeLLM(batch_size=8, delay_s=0.003)
params = SamplingParams(temperature=0.0, max_tokens=50)
run_batch(llm, sys.argv[1], sys.argv[2], params, resume=True)
"""


def start_slow_run(job: Job) -> subprocess.Popen[bytes]:
    paths = [str(Path(__file__).parent), *sys.path]
    command = [sys.executable, "-c", SLOW_RUN, str(job.input), str(job.output), *paths]
    return subprocess.Popen(command, stderr=subprocess.PIPE)


def wait_for_lines(job: Job, count: int) -> None:
    for _ in range(2000):
        if job.output.exists():
            return
        if job.partial.exists() and job.partial.read_bytes().count(b"\n") > count:
            return
        time.sleep(0.005)
    raise AssertionError(f"{job.partial} never got {count} lines")


def test_kill_9_again_and_again_loses_and_repeats_nothing(job: Job) -> None:
    job.write_many(200)
    kills = 0
    for stop_at in (40, 100, 150):
        process = start_slow_run(job)
        wait_for_lines(job, stop_at)
        process.send_signal(signal.SIGKILL)
        kills += process.wait() == -signal.SIGKILL
        assert process.stderr is not None
        process.stderr.close()
    assert kills == 3
    assert job.run(resume=True).num_resumed >= 150
    expected = [(f"id{i}", i, f"prompt {i}"[::-1]) for i in range(200)]
    assert [(r["id"], r["index"], r["text"]) for r in job.results()] == expected


# Ids


@given(st.lists(st.text(max_size=3), max_size=200))
def test_seen_ids_are_a_set(texts: list[str]) -> None:
    seen, expected = SeenIds(), set[str]()
    for text in texts:
        assert seen.add(text) == (text not in expected)
        expected.add(text)


def test_seen_ids_grow() -> None:
    seen = SeenIds()
    assert all(seen.add(f"id{i}") for i in range(5000))
    assert not any(seen.add(f"id{i}") for i in range(5000))


def test_integer_and_string_ids_are_different() -> None:
    reader = LineReader(GREEDY, 0, SeenIds())
    assert reader.read(0, b'{"id": 1, "prompt": "x"}').error is None
    assert reader.read(1, b'{"id": "1", "prompt": "x"}').error is None
    assert reader.read(2, b'{"id": 1, "prompt": "x"}').error is not None
