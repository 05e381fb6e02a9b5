"""Benchmarks run on a tiny model: they end well, and their record has what they are there to say.

No figure is judged. Those that need a large model, a peer or minutes are not among them.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from harness.layer_shapes import copies
from harness.read_loop import ReadLoop
from specmoeoff import kernels
from specmoeoff.pipeline.schedules import SCHEDULES
from tiny import write_tiny

if TYPE_CHECKING:
    from collections.abc import Sequence

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
MACHINE = {"date", "commit", "cpu", "cores", "ram_bytes", "kernel", "load_1min"}


def run(name: str, target: str, *options: object) -> dict[str, Any]:
    """Return the JSON of the last line that a benchmark prints."""
    command = [sys.executable, str(BENCHMARKS / f"{name}.py"), target, *map(str, options)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    record: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert record["machine"].keys() == MACHINE
    assert record["options"]
    return record


def numbers(values: Sequence[Any]) -> bool:
    return all(isinstance(value, (int, float)) for value in values)


@pytest.mark.parametrize("schedule", ["auto", "specmoeoff"])
def test_soak(tiny_mixtral: Path, schedule: str) -> None:
    record = run(
        "soak",
        f"--target={tiny_mixtral}",
        *("--schedule", schedule, "--steps", 150, "--batch", 4, "--longest", 20),
        *("--slack", "1GiB"),
    )
    assert record["benchmark"] == "soak"
    assert record["grown"] == []
    held = {"resident_bytes", "descriptors", "threads", "reserved_bytes", "kv_pages"}
    held.add("missing_slots")
    assert record["medians"].keys() == held
    assert all(numbers(pair) and len(pair) == 2 for pair in record["medians"].values())
    assert len(record["samples"]) >= 4
    assert all(sample.keys() == held for sample in record["samples"])
    assert record["stats"]["steps"] >= 150


def test_sim_overlap(tiny_mixtral: Path, tmp_path: Path) -> None:
    trace, png = tmp_path / "steps.json", tmp_path / "steps.png"
    record = run(
        "sim_overlap",
        f"--target={tiny_mixtral}",
        *("--batch", 6, "--verified", 2, "--context", 8, "--steps", 3, "--device-memory", "1MB"),
        *("--scale", 0.01, "--trace", trace, "--png", png),
    )
    results = record["results"]
    times = ("simulated_s", "step_s", "round_s", "round_over_simulated")
    assert all(results[name] > 0 for name in times)
    assert len(results["rounds_s"]) == 2
    assert {"cpu", "device", "d2h"} <= results["lane_shares"].keys() <= results["late"].keys()
    assert len(results["overlap_share"]) == 4
    assert results["waves"] >= 1
    assert numbers([results["ring_slots"] or 0, results["num_slots"]])
    assert json.loads(trace.read_text())["traceEvents"]
    assert png.read_bytes().startswith(b"\x89PNG")


def test_schedules_take_turns_round_after_round(tiny_mixtral: Path, tmp_path: Path) -> None:
    png = tmp_path / "steps.png"
    record = run(
        "schedules",
        f"--target={tiny_mixtral}",
        *("--device-memory", "3MB", "--scale", 0.01, "--batch", 1, 3, "--context", 8),
        *("--steps", 2, "--rounds", 2, "--png", png),
    )
    cells = [(result["batch"], result["schedule"]) for result in record["results"]]
    assert cells == [(batch, name) for batch in (1, 3) for name in SCHEDULES]
    for result in record["results"]:
        assert len(result["rounds"]) == 2
        for figure in ("step_s", "simulated_s"):
            assert result[figure] == median(r[figure] for r in result["rounds"])
        assert all(r["step_s"] > 0 and r["lane_shares"] for r in result["rounds"])
    assert png.read_bytes().startswith(b"\x89PNG")


def test_a_disk_is_held_to_a_rate_or_an_error_says_why_not(tmp_path: Path) -> None:
    """Which one, the rights decide; the group is gone afterwards."""
    file = tmp_path / "file"
    file.write_bytes(bytes(1 << 20))
    program = (
        "import sys; from pathlib import Path; from harness.disk_rate import held_disk_rate\n"
        "def groups(): return sorted(l for l in Path('/proc/self/cgroup').read_text().split())\n"
        "before = groups()\n"
        "with held_disk_rate(100_000_000, Path(sys.argv[1])): assert groups() != before\n"
        "assert groups() == before"
    )
    command = [sys.executable, "-c", program, str(file)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=BENCHMARKS)
    assert done.returncode == 0 or done.stderr.startswith("cannot hold the disk to a rate (")
    assert "Traceback" not in done.stderr


def test_copies_are_equal_and_apart() -> None:
    values = np.arange(6, dtype=np.uint16).reshape(2, 3)
    quantised = kernels.Int8Weight(np.ones((2, 3), np.int8), np.ones((2, 1), np.float32))
    first, second = copies((values, quantised), 2)
    assert np.array_equal(first[0], values)
    assert np.array_equal(second[1].scales, quantised.scales)
    first[0][...] = 0
    first[1].values[...] = 0
    assert np.array_equal(second[0], values)
    assert np.array_equal(second[1].values, quantised.values)


def test_gpu_in_a_dry_run(tiny_mixtral: Path) -> None:
    record = run(
        "gpu",
        "--dry",
        *("--directory", tiny_mixtral, "--device-memory", "1MB", "--scale", 0.01),
        *("--batch", 1, 4, "--speculation-batch", 4, "--context", 8, "--steps", 2, "--k", 1, 2),
    )
    assert record["benchmark"] == "gpu"
    assert "DRY RUN without a GPU" in record["note"]
    assert record["plain_copy_bytes_per_s"] > 0
    assert record["experts"] == 10
    assert record["layers"] == 2
    assert record["schedules"].keys() == set(SCHEDULES)
    for batches in record["schedules"].values():
        assert batches.keys() == {"1", "4"}
        for timing in batches.values():
            assert timing.keys() == {"step_s", "simulated_s", "lane_shares"}
    for beside in record["steps"].values():
        lanes = ("link_s", "attention_s", "device_s")
        assert beside["bound_s"] == max(beside[name] for name in lanes)
        assert beside["step_s"] > 0
    assert record["speculation"].keys() == {"0", "1", "2"}
    assert {"target dense weights", "activations", "expert slots"} <= record["device_bytes"].keys()


def test_bound(tmp_path: Path) -> None:
    """Of a model with more than one block of 4 MiB, in no control group, without a peer."""
    target = write_tiny(tmp_path / "target", intermediate_size=2048)
    record = run(
        "bound",
        f"--target={target}",
        *("--memory", "1GiB", "--batch", 1, 2, "--prompt-tokens", 4, "--max-tokens", 3),
        *("--loop-s", 0.05, "--no-cgroup"),
    )
    assert record["benchmark"] == "bound"
    assert [row["batch"] for row in record["results"]] == [1, 2]
    for row in record["results"]:
        for name in ("step_s", "raw_bandwidth"):
            assert row[name] > 0
        assert numbers([row[name] for name in ("bound_s", "share_of_bound", "link_busy")])
        assert row["llama_cpp"] is None


def test_a_read_loop_says_that_there_is_nothing_to_read(tmp_path: Path) -> None:
    file = tmp_path / "small"
    file.write_bytes(bytes(4096))
    with pytest.raises(ValueError, match="no file of 1 has a block of 8192 bytes"):
        ReadLoop(2, 8192).bandwidth([file], 0.01)
