"""``specmoeoff trace`` on a tiny model: run here, run on a simulated device, and only priced."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from specmoeoff.cli import app, trace
from specmoeoff.cli.exits import guarded
from specmoeoff.cli.options import TraceOptions
from specmoeoff.pipeline.hosts import HOSTS, costs_of
from specmoeoff.pipeline.schedules import SCHEDULES

if TYPE_CHECKING:
    from pathlib import Path

SIM = ("--device", "sim", "--device-memory", "1650KB")


def call(*arguments: str) -> int:
    def command() -> int:
        options = app.parse(["trace", *arguments])
        assert isinstance(options, TraceOptions)
        return trace.run(options)

    return guarded(command)


def traced(tmp_path: Path, *arguments: str) -> dict[str, Any]:
    """Run the command and return the trace that it wrote."""
    output = tmp_path / "step.json"
    assert call(*arguments, "-o", str(output), "--context", "5", "--batch", "4") == 0
    content: dict[str, Any] = json.loads(output.read_text(encoding="utf-8"))
    return content


def tracks(content: dict[str, Any]) -> set[str]:
    return {e["args"]["name"] for e in content["traceEvents"] if e["name"] == "thread_name"}


def spans(content: dict[str, Any]) -> list[dict[str, Any]]:
    return [event for event in content["traceEvents"] if event["ph"] == "X"]


def test_a_trace_of_this_machine(
    tiny_mixtral: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    png = tmp_path / "step.png"
    content = traced(tmp_path, str(tiny_mixtral), "-m", "1GiB", "--png", str(png))
    assert tracks(content) == {"cpu"}, "everything fits"
    assert content["otherData"]["times"] == "measured on this machine"
    assert content["otherData"]["schedule"] == "specmoeoff"
    assert sum(event["cat"] == "head" for event in spans(content)) == 4, "2 micro-batches, 2 steps"
    assert png.read_bytes().startswith(b"\x89PNG")
    said = capsys.readouterr().out
    assert "per step, measured on this machine" in said
    assert "simulated at the speeds measured here" in said
    held = content["otherData"]["main memory"]
    assert held.endswith(" planned of 1.00 GiB")
    assert f"main memory: {held}" in said
    assert f"wrote {tmp_path}/step.json (open it at ui.perfetto.dev)" in said


@pytest.mark.parametrize("schedule", sorted(SCHEDULES))
def test_a_trace_of_a_simulated_device(
    tiny_mixtral: Path, tmp_path: Path, schedule: str, capsys: pytest.CaptureFixture[str]
) -> None:
    content = traced(tmp_path, str(tiny_mixtral), *SIM, "--schedule", schedule, "--json")
    assert tracks(content) >= {"h2d", "device"}
    figures = json.loads(capsys.readouterr().out)
    assert figures["schedule"] == schedule
    assert len(figures["step_s"]) == 2
    assert all(0 < share <= 1 for share in figures["lane_shares"].values())
    assert figures["predicted_step_s"] > 0
    assert sum(figures["critical_path_s"].values()) > 0
    assert figures["tiers"].keys() == {"host", "device"}
    device = figures["tiers"]["device"]
    assert 0 < device["peak"] <= device["planned"] <= device["budget"] == 1_650_000
    assert figures["tiers"]["host"]["peak"] > 0


def test_a_trace_that_is_only_priced(
    tiny_mixtral: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = traced(
        tmp_path, str(tiny_mixtral), *SIM, "--simulate", "--host", "4090d", "--steps", "3", "--json"
    )
    expected = "simulated at 1 times the peak speeds of a host with 4090d"
    assert content["otherData"]["times"] == expected
    figures = json.loads(capsys.readouterr().out)
    assert len(figures["step_s"]) == 3
    assert figures["predicted_step_s"] == figures["step_s"][-1]
    assert figures["tiers"] == {}, "nothing was run"
    slower = ("--simulate", "--host", "4090d", "--json", "--scale", "0.001")
    traced(tmp_path, str(tiny_mixtral), *SIM, *slower)
    assert json.loads(capsys.readouterr().out)["step_s"][0] > figures["step_s"][0]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--schedule", "best"), 2, "--schedule 'best' is unknown; use one of specmoeoff"),
        (("--device", "moon"), 2, "--device 'moon' is unknown; use cpu, sim or cuda"),
        (("--device", "sim"), 2, "give --device-memory"),
        (("--simulate",), 2, "add --device sim"),
        (("--batch", "0"), 2, "--batch is 0; it must be at least 1"),
        (("--micro-batches", "0"), 2, "--micro-batches is 0"),
        (("--context", "0"), 2, "--context is 0"),
        (("--steps", "-1"), 2, "--steps is -1"),
        (("--scale", "0"), 2, "--scale is 0.0; it must be above 0"),
        ((*SIM, "--host", "h100"), 2, "host 'h100' is unknown; use one of a30, 4090d"),
        ((*SIM[:3], "10KB"), 3, "device memory of 9.77 KiB is too small"),
        (("--memory", "1MiB"), 3, "more than the budget of 1.00 MiB"),
    ],
)
def test_what_makes_no_sense_is_refused(
    tiny_mixtral: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    code: int,
    message: str,
) -> None:
    assert call(str(tiny_mixtral), "-o", str(tmp_path / "step.json"), *arguments) == code
    assert message in capsys.readouterr().err
    assert not (tmp_path / "step.json").exists()


def test_a_trace_that_cannot_be_written_is_said(
    tiny_mixtral: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    nowhere = tmp_path / "missing" / "step.json"
    assert call(str(tiny_mixtral), "-o", str(nowhere), *SIM, "--simulate") == 2
    assert "missing/step.json cannot be written: No such file" in capsys.readouterr().err


@pytest.mark.parametrize("host", HOSTS)
def test_scaling_keeps_the_ratios_of_a_host(host: str) -> None:
    whole, part = costs_of(host).lanes, costs_of(host, 0.5).lanes
    for lane, rate in whole.items():
        assert part[lane].bytes_per_s == rate.bytes_per_s / 2
        assert part[lane].flops_per_s == rate.flops_per_s / 2
        assert part[lane].latency_s == rate.latency_s
