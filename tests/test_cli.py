"""The command line against FakeLLM: what it says, where it says it, and how it leaves."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from fakes import STATS, FakeLLM
from specmoeoff.cli import app, demo, demo_report, doctor, figures, fresh
from specmoeoff.cli.chat import Conversation
from specmoeoff.cli.exits import guarded
from specmoeoff.cli.figures import duration, rates
from specmoeoff.cli.options import ChatOptions, EngineOptions, GenerateOptions, from_dict
from specmoeoff.cli.progress import JobProgress
from specmoeoff.config import Policy, SpeculativeConfig
from specmoeoff.errors import DoesNotFitError, InvalidInputError
from specmoeoff.memory_size import format_memory_size
from specmoeoff.sampling_params import SamplingParams

opened: list[FakeLLM] = []


class RecordedLLM(FakeLLM):
    """Remembers every instance, for what it was opened with."""

    def __init__(self, model: str, **options: Any) -> None:
        super().__init__(model, **options)
        opened.append(self)


@pytest.fixture(autouse=True)
def _fake_llm(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("specmoeoff.llm")
    module.LLM = RecordedLLM  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "specmoeoff.llm", module)
    opened.clear()


def call(*arguments: str) -> int:
    """Run a command in this process and return its exit code."""

    def command() -> int:
        options = app.parse(arguments)
        if isinstance(options, (GenerateOptions, ChatOptions)):
            return fresh._run_here(options)
        if isinstance(options, int):
            return options
        return (doctor if hasattr(options, "engine") else demo).run(options)  # type: ignore[arg-type]

    return guarded(command)


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "in.jsonl"
    path.write_text("".join(f'{{"id": {i}, "prompt": "prompt {i}"}}\n' for i in range(200)))
    return path


def numbers(path: Path) -> list[int]:
    return [json.loads(line)["id"] for line in path.read_text().splitlines()]


# Parsing


def test_options_reach_the_engine_and_the_sampling() -> None:
    arguments = (
        "generate M --prompts i --output o -m 1GiB --draft D -k 3 --max-num-seqs 8 --threads 2"
    )
    arguments += " --max-num-batched-tokens 256 --max-model-len 99 --kv-dtype float32"
    arguments += " --seed 7 --dtype auto --expert-mode belt --cpu-target scalar"
    arguments += " --schedule flexgen --device sim --device-memory 1GiB --micro-batches 4"
    arguments += " -n 5 -t 0.5 --top-p 0.9 --top-k 0 --n 2"
    arguments += " --stop a --stop b --ignore-eos --logprobs 0 --min-tokens 1"
    options = app.parse(arguments.split())
    assert isinstance(options, GenerateOptions)
    assert options.engine == EngineOptions(
        model="M",
        memory="1GiB",
        draft="D",
        num_speculative_tokens=3,
        max_num_seqs=8,
        max_num_batched_tokens=256,
        max_model_len=99,
        dtype="auto",
        kv_dtype="float32",
        num_threads=2,
        expert_mode="belt",
        schedule="flexgen",
        device="sim",
        device_memory="1GiB",
        num_micro_batches=4,
        cpu_target="scalar",
        seed=7,
    )
    assert options.sampling == {
        "max_tokens": 5,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 0,
        "n": 2,
        "stop": ["a", "b"],
        "ignore_eos": True,
        "logprobs": 0,
        "min_tokens": 1,
    }


def test_options_survive_the_process_border() -> None:
    given = app.parse(["generate", "M", "-p", "\udcff", "-p", "b", "--stop", "x", "-q"])
    assert isinstance(given, GenerateOptions)
    fields = json.loads(json.dumps(_plain(given)))
    assert from_dict("GenerateOptions", fields) == given
    chat = app.parse(["chat", "M", "--system", "S"])
    assert isinstance(chat, ChatOptions)
    assert from_dict("ChatOptions", json.loads(json.dumps(_plain(chat)))) == chat


def _plain(options: Any) -> dict[str, Any]:
    import dataclasses

    return dataclasses.asdict(options)


def test_a_device_and_a_schedule_reach_the_engine() -> None:
    given = EngineOptions(model="M", schedule="moe_gen", device="sim", device_memory="2MiB")
    config = given.engine()
    assert (config.schedule, config.device, config.device_memory) == ("moe_gen", "sim", 2 << 20)
    given.open_llm()
    assert opened[0].options.items() >= {"schedule": "moe_gen", "device_memory": 2 << 20}.items()


@pytest.mark.parametrize("memory", [None, "24GB"])
def test_a_gpu_may_be_told_how_much_memory_to_take(memory: str | None) -> None:
    asked = [] if memory is None else ["--device-memory", memory]
    options = app.parse(["generate", "M", "-p", "a", "--device", "cuda", *asked])
    assert isinstance(options, GenerateOptions)
    config = options.engine.engine()
    assert config.is_planned
    assert (config.device, config.device_memory) == ("cuda", memory and 24 * 10**9)


@pytest.mark.parametrize(
    ("fields", "config"),
    [
        ({}, None),
        ({"draft": "off", "num_speculative_tokens": 3}, None),
        ({"draft": "ngram"}, SpeculativeConfig(method="ngram")),
        (
            {"draft": "D", "num_speculative_tokens": 8},
            SpeculativeConfig(model="D", num_speculative_tokens=8),
        ),
        ({"draft": "auto"}, SpeculativeConfig(method="ngram", adaptive=True)),
        (
            {"draft": "auto", "draft_model": "D"},
            SpeculativeConfig(method="draft_model", model="D", adaptive=True),
        ),
    ],
)
def test_drafts(fields: dict[str, Any], config: SpeculativeConfig | None) -> None:
    assert EngineOptions(model="M", **fields).speculative() == config


def test_a_draft_for_nothing_is_refused() -> None:
    with pytest.raises(InvalidInputError, match="--draft auto"):
        EngineOptions(model="M", draft="ngram", draft_model="D").speculative()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["generate"], "missing argument 'MODEL'; see specmoeoff generate --help"),
        (["generat"], "no such command 'generat'"),
        (["chat", "M", "--nope"], "no such option: --nope"),
        (["generate", "M", "--max-tokens", "many"], "'--max-tokens'"),
        (["generate", "M"], "give either --prompts FILE --output FILE or --prompt TEXT"),
        (["generate", "M", "-p", "x", "--prompts", "f"], "give either"),
        (["generate", "M", "--prompts", "f"], "--prompts needs --output"),
        (["generate", "M", "-p", "x", "-o", "f"], "--output goes with --prompts"),
        (["generate", "M", "-p", "x", "-n", "0"], "max_tokens is 0"),
        (["generate", "M", "-p", "x", "-m", "lots"], "memory size 'lots'"),
        (
            ["generate", "M", "-p", "x", "-k", "99", "--draft", "ngram"],
            "num_speculative_tokens is 99",
        ),
        (["generate", "M", "-p", "x", "--kv-dtype", "int3"], "kv_dtype is 'int3'"),
        (["chat", "M", "--dtype", "half"], "dtype is 'half'; use one of auto, float32, bfloat16"),
        (["generate", "M", "-p", "x", "--stats", "no/such/dir.json"], "no/such/dir.json"),
        (["generate", "M", "-p", "\udcff"], "not valid UTF-8"),
        (["generate", "M", "--prompts", "none.jsonl", "-o", "o"], "none.jsonl does not exist"),
        (["demo", "--drop-layers", "4;5"], "--drop-layers '4;5'"),
    ],
)
def test_bad_usage_is_one_line_and_exit_code_2(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(*arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith("error: ")
    assert said in err
    assert not opened  # no model is opened for nothing


def test_help_shows_examples(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("generate", "chat", "doctor", "trace", "demo"):
        assert call(command, "--help") == 0
        assert "Examples:" in capsys.readouterr().out
    assert call() == 0
    assert "generate" in capsys.readouterr().out


def test_debug_keeps_the_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPECMOEOFF_DEBUG", "1")
    with pytest.raises(InvalidInputError):
        call("generate", "M")


# generate


def test_a_job_is_run_and_reported(
    prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output, stats = tmp_path / "out.jsonl", tmp_path / "stats.json"
    arguments = ["generate", "M", "--prompts", str(prompts), "-o", str(output), "-m", "2GiB"]
    assert call(*arguments, "--stats", str(stats), "--draft", "ngram", "--kv-dtype", "float32") == 0
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines()[0].startswith(f"200 results in {output} after ")
    assert "10.0 tok/s · link 2.00 GB/s" in err
    assert "3.00 GB streamed · peak memory 1.00 GiB" in err
    assert numbers(output) == list(range(200))
    written = json.loads(stats.read_text())
    assert written.items() >= STATS.items()
    assert written["policy"]["memory"] == 2**30
    assert opened[0].model == "M"
    assert opened[0].options == {
        "memory": 2 * 2**30,
        "seed": 0,
        "speculative_config": SpeculativeConfig(method="ngram"),
        "kv_dtype": "float32",
    }
    assert {params.temperature for _, params in opened[0].seen} == {0.0}


def test_json_and_quiet(prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["generate", "M", "--prompts", str(prompts), "-o", str(tmp_path / "out.jsonl")]
    assert call(*arguments, "--json", "--quiet") == 0
    out, err = capsys.readouterr()
    assert err == ""
    report = json.loads(out)
    assert (report["num_lines"], report["num_failed"]) == (200, 0)
    assert report["stats"]["decode_tokens"] == 20
    assert call(*arguments, "--quiet", "--overwrite") == 0
    assert capsys.readouterr() == ("", "")
    assert call(*arguments, "--quiet") == 2
    assert "--overwrite" in capsys.readouterr().err
    assert len(opened) == 2  # the third was refused before a model was opened


def test_prompts_are_answered_on_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("generate", "M", "-p", "ab") == 0
    out, err = capsys.readouterr()
    assert out == "ba\n"
    assert "tok/s" in err
    assert call("generate", "M", "-p", "ab", "-p", "unrunnable", "-p", "cd", "-q") == 2
    out, err = capsys.readouterr()
    assert out == "--- ab\nba\n--- cd\ndc\n"
    assert "1 of 3 prompts failed" in err
    assert "max_model_len" in err
    assert call("generate", "M", "-p", "ab", "-p", "cd", "--json") == 0
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(r["index"], r["text"]) for r in records] == [(0, "ba"), (1, "dc")]


def test_progress_lines(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from specmoeoff.batch import BatchSummary
    from specmoeoff.cli.progress import _Lines

    monkeypatch.setattr(_Lines, "interval_s", 0.01)
    with JobProgress(lambda: STATS, quiet=False) as progress:
        progress.update(BatchSummary(num_lines=9, num_finished=3, num_failed=0, num_resumed=2))
        err = ""
        while "ETA" not in err:
            time.sleep(0.01)
            err = capsys.readouterr().err
    assert err.startswith("3/9 lines · 10.0 tok/s · link 2.00 GB/s · ETA ")


# chat


def converse(*lines: str, arguments: tuple[str, ...] = ()) -> int:
    """Run chat with piped input."""
    read_end, write_end = os.pipe()
    os.write(write_end, "".join(lines).encode())
    os.close(write_end)
    with os.fdopen(read_end, "r") as stdin, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdin", stdin)
        return call("chat", "M", *arguments)


def test_chat_answers_each_line_of_a_pipe(capsys: pytest.CaptureFixture[str]) -> None:
    lines = ("hello\n", "\n", "/nonsense now\n", "unrunnable\n", "/stats\n", "/help\n", "bye")
    assert converse(*lines) == 0
    out, err = capsys.readouterr()
    assert out.startswith("olleh\n\n10.0 tok/s")
    assert out.endswith("eyb\n")
    assert "/reset" in out
    assert "/nonsense is no command" in err
    assert "max_model_len" in err
    assert opened[0].options["max_num_seqs"] == 1
    assert converse("/exit\n", "never") == 0
    assert capsys.readouterr().out == ""


def test_a_conversation_remembers() -> None:
    llm = FakeLLM()
    chat = Conversation(llm, SamplingParams(), system="S")  # type: ignore[arg-type]
    assert "".join(chat.reply("ab")) == "ba"
    assert "".join(chat.reply("unrunnable")) == ""
    pieces = chat.reply("cdef")
    next(pieces), next(pieces)
    pieces.close()  # type: ignore[attr-defined]
    turns = [("system", "S"), ("user", "ab"), ("assistant", "ba")]
    turns += [("user", "cdef"), ("assistant", "fe")]
    assert [(m["role"], m["content"]) for m in chat.messages] == turns
    chat.reset()
    assert [m["role"] for m in chat.messages] == ["system"]


# doctor


def test_doctor_looks_at_the_machine(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("doctor") == 0
    assert f"cores │ {len(os.sched_getaffinity(0))} " in " ".join(capsys.readouterr().out.split())
    assert call("doctor", "--json") == 0
    machine = json.loads(capsys.readouterr().out)["machine"]
    assert machine["total_memory"] >= machine["available_memory"] > 0


def test_doctor_plans_a_model(
    tiny_mixtral: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = Policy(
        memory=2**30,
        reservations=(("runtime", 2**28), ("expert slots and KV cache", 3 * 2**28)),
        num_expert_slots=4,
        expert_slot_bytes=2**20,
        max_model_len=64,
        dtype="bfloat16",
    )
    monkeypatch.setattr("specmoeoff.engine.memory_plan.plan_memory", lambda config: policy)
    assert call("doctor", str(tiny_mixtral), "-m", "1GiB", "--json") == 0
    model = json.loads(capsys.readouterr().out)["model"]
    assert model["num_experts"] == 10
    assert model["streamed_bytes"] == 6 * 2**20
    assert model["disk_bandwidth"] > 0
    assert model["policy"]["memory"] == 2**30
    assert call("doctor", str(tiny_mixtral), "-m", "1GiB") == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "runtime │ 256 MiB" in out
    assert "activations in products │ bfloat16" in out
    assert "experts │ 10 of 1.00 MiB" in out
    assert "streamed per full pass │ at least 6.00 MiB" in out


def test_doctor_plans_each_tier(
    tiny_mixtral: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("specmoeoff.engine.memory_plan.resident_bytes", lambda: 0)
    options = ("-m", "1GiB", "--device", "sim", "--device-memory", "30MB", "--micro-batches", "3")
    assert call("doctor", str(tiny_mixtral), *options, "--json") == 0
    model = json.loads(capsys.readouterr().out)["model"]
    parts = dict(model["policy"]["reservations"])
    assert {"host: runtime", "host: experts", "device: expert slots"} <= parts.keys()
    assert sum(parts.values()) == (1 << 30) + 30_000_000 == model["policy"]["memory"]
    assert model["disk_bandwidth"] is None, "all experts are in the host's memory"
    assert call("doctor", str(tiny_mixtral), "-m", "1GiB", "--schedule", "flexgen") == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "KV cache │" in out
    assert "held where they are used │ 10 │" in out
    assert "disk, measured now" in out


def test_totals_name_the_tiers_where_there_are_several() -> None:
    assert figures.totals(STATS).endswith("peak memory 1.00 GiB")
    use = {"budget": 2**30, "planned": 2**29, "reserved": 2**29, "peak": 2**28}
    said = figures.totals({**STATS, "tiers": {"host": use, "device": use}})
    assert said.endswith("peak memory 1.00 GiB (host 256 MiB, device 256 MiB)")
    assert figures.held(use) == "256 MiB at most, 512 MiB planned of 1.00 GiB"


def test_doctor_says_what_does_not_fit(
    tiny_mixtral: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(config: object) -> Policy:
        raise DoesNotFitError("needs 2 GiB: 1 + 1; the smallest budget that works is 2048MiB")

    monkeypatch.setattr("specmoeoff.engine.memory_plan.plan_memory", refuse)
    assert call("doctor", str(tiny_mixtral), "-m", "1GiB") == 3
    assert capsys.readouterr().err.startswith("error: needs 2 GiB: 1 + 1; the smallest")


# demo


@pytest.fixture
def fake_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """A demo model that is built in no time; returns what the builds were asked for."""
    from specmoeoff.demo import DemoPaths

    builds: list[dict[str, Any]] = []

    def build(directory: Path, **options: Any) -> DemoPaths:
        options.pop("progress")("balancing", 0.5)
        builds.append({"directory": directory, **options})
        return DemoPaths(directory / "target", directory / "draft")

    messages = [[{"role": "user", "content": f"question {i}"}] for i in range(16)]
    monkeypatch.setattr("specmoeoff.demo.build_demo", build)
    monkeypatch.setattr("specmoeoff.demo.load_prompts", lambda n: messages[:n])
    monkeypatch.setattr("specmoeoff.demo.cache_directory", lambda: tmp_path)
    return builds


def stand_in_for_generate(monkeypatch: pytest.MonkeyPatch, drafted: str = "") -> list[list[str]]:
    """Run generate in this process; answers with a draft end in ``drafted``."""
    commands: list[list[str]] = []

    def run(command: list[str], check: bool) -> subprocess.CompletedProcess[bytes]:
        commands.append(command)
        arguments = command[command.index("specmoeoff") + 1 :]
        code = call(*arguments, "--quiet")
        if "--draft" in arguments and drafted:
            output = Path(arguments[arguments.index("--output") + 1])
            records = [json.loads(line) for line in output.read_text().splitlines()]
            records[3]["token_ids"].append(1)
            output.write_text("".join(json.dumps(record) + "\n" for record in records))
        return subprocess.CompletedProcess(command, code)

    monkeypatch.setattr(subprocess, "run", run)
    return commands


def test_demo_compares_two_runs(
    fake_demo: list[dict[str, Any]],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    commands = stand_in_for_generate(monkeypatch)
    assert call("demo", "-k", "3", "--drop-layers", "5,4", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["identical"], report["speedup"]) == (True, 1.0)
    assert report["plain"]["results"][15]["text"] == "question 15"[::-1]
    assert ["--draft" in command for command in commands] == [False, True]
    assert commands[1][-2:] == ["--num-speculative-tokens", "3"]
    assert fake_demo[0]["directory"].name == "demo-8x135m-noise0.1-seed0-without4-without5"
    assert call("demo") == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "question 0 │ 0 noitseuq │ 0 noitseuq │ yes" in out
    assert "All answers are identical" in out


def test_demo_fails_when_the_answers_differ(
    fake_demo: list[dict[str, Any]],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stand_in_for_generate(monkeypatch, drafted="x")
    assert call("demo") == 1
    out = " ".join(capsys.readouterr().out.split())
    assert "THE ANSWERS DIFFER" in out
    assert "question 3 │ 3 noitseuq │ 3 noitseuq │ NO" in out


def test_demo_passes_on_how_a_run_failed(
    fake_demo: list[dict[str, Any]],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    failed = subprocess.CompletedProcess([], 3)
    monkeypatch.setattr(subprocess, "run", lambda command, check: failed)
    assert call("demo") == 3
    assert "the plain run ended with exit code 3" in capsys.readouterr().err


def test_demo_build_only_builds(
    fake_demo: list[dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("demo", "--build", str(tmp_path / "d"), "--experts", "64", "--noise", "0.2") == 0
    assert json.loads(capsys.readouterr().out)["draft"] == str(tmp_path / "d" / "draft")
    assert fake_demo == [
        {
            "directory": tmp_path / "d",
            "experts": 64,
            "noise": 0.2,
            "drop_layers": (),
            "seed": 0,
        }
    ]


# Small things that are shown


def test_figures() -> None:
    assert rates({**STATS, "drafted_tokens": 8, "mean_acceptance_length": 3.456}) == (
        "10.0 tok/s · acceptance 3.46 · link 2.00 GB/s"
    )
    assert [duration(s) for s in (0.4, 59.6, 3599, 3600, 86399)] == [
        "0 s",
        "1 min 00 s",
        "59 min 59 s",
        "1 h 00 min",
        "23 h 59 min",
    ]
    rows = {row[0]: row[1:] for row in demo_report.figure_rows({**STATS, "wall_s": 1.0})}
    assert rows["peak memory"] == (format_memory_size(2**30),)
    assert demo_report.shorten("a  b\nc", 10) == "a b c"
    assert demo_report.shorten("abcdefghijk", 5) == "abcd…"


# As a process of its own

SITE = """
import sys, types, os
import fakes
class LLM(fakes.FakeLLM):
    def __init__(self, model, **options):
        super().__init__(model, delay_s=float(os.environ.get("FAKE_DELAY_S", "0")))
        assert not {"typer", "click", "pydantic"} & set(sys.modules)
module = types.ModuleType("specmoeoff.llm")
module.LLM = LLM
sys.modules["specmoeoff.llm"] = module
"""


def start(tmp_path: Path, *arguments: str, delay_s: float = 0, **kwargs: Any) -> subprocess.Popen:  # type: ignore[type-arg]
    """Start the real command line, with FakeLLM in place of the model."""
    site = tmp_path / "site"
    site.mkdir(exist_ok=True)
    (site / "sitecustomize.py").write_text(SITE)
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(site), str(Path(__file__).parent), *sys.path]),
        "FAKE_DELAY_S": str(delay_s),
    }
    streams = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    command = [sys.executable, "-m", "specmoeoff", *arguments]
    return subprocess.Popen(command, env=environment, text=True, **{**streams, **kwargs})


def test_the_process_runs_prompts_without_the_parser(tmp_path: Path) -> None:
    process = start(tmp_path, "generate", "M", "-p", "añb", "--quiet")
    assert process.communicate(timeout=60) == ("bña\n", "")
    assert process.returncode == 0


def test_the_process_leaves_with_one_line_and_the_code(tmp_path: Path) -> None:
    process = start(tmp_path, "generate", "M", "-p", "x", "--memory", "lots")
    out, err = process.communicate(timeout=60)
    assert (out, err.count("\n"), process.returncode) == ("", 1, 2)


def test_chat_through_a_pipe(tmp_path: Path) -> None:
    process = start(tmp_path, "chat", "M", "--quiet")
    assert process.communicate("hello\nbye\n", timeout=60) == ("olleh\neyb\n", "")
    assert process.returncode == 0


def test_a_closed_pipe_is_no_crash(tmp_path: Path) -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    process = start(tmp_path, "generate", "M", "-p", "x", "-q", stdout=write_end)
    os.close(write_end)
    assert process.communicate(timeout=60)[1] == ""
    assert process.returncode == 1


def test_ctrl_c_keeps_what_is_finished_and_resume_goes_on(prompts: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    partial = tmp_path / "out.jsonl.partial"
    arguments = ("generate", "M", "--prompts", str(prompts), "-o", str(output), "--quiet")
    process = start(tmp_path, *arguments, delay_s=0.04)
    while not (partial.exists() and partial.read_bytes().count(b"\n") > 20):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    finished = partial.read_bytes().count(b"\n") - 1
    assert 20 <= finished < 200
    assert err == (
        f"interrupted: {finished} of 200 lines are finished and kept in {partial}; "
        "continue with --resume\n"
    )
    process = start(tmp_path, *arguments, "--resume")
    assert process.communicate(timeout=60) == ("", "")
    assert process.returncode == 0
    assert numbers(output) == list(range(200))


def test_a_terminal_gets_a_bar(prompts: Path, tmp_path: Path) -> None:
    master, slave = pty.openpty()
    arguments = ("generate", "M", "--prompts", str(prompts), "-o", str(tmp_path / "out.jsonl"))
    process = start(tmp_path, *arguments, delay_s=0.006, stderr=slave)
    os.close(slave)
    shown = b""
    while True:
        try:
            shown += os.read(master, 4096)
        except OSError:  # the other end is closed
            break
    os.close(master)
    process.communicate(timeout=60)
    assert process.returncode == 0
    text = shown.decode()
    assert "/200" in text
    assert "tok/s · link 2.00 GB/s · ETA" in text
    assert "200 results in" in text
