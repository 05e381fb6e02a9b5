"""How much of the disk the engine gets: bytes per second beside a plain O_DIRECT read loop.

One engine decodes a batch under its budget and is paused every few seconds; in each pause the
read loops run over the same files, so that a disk that drifts drifts for both. Reported is the
engine's rate over the mean of the best loop just before and just after it.

    python benchmarks/streaming.py --target DIR/target --memory 1GiB --batch 16
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import subprocess
import time
from pathlib import Path
from typing import Any

from harness.engine_job import EngineJob
from harness.machine import machine
from harness.measured_process import drop_page_cache
from harness.memory_cgroup import memory_cgroup
from harness.read_loop import ReadLoop
from harness.real_prompts import real_prompts
from harness.table import number, table
from specmoeoff.memory_size import parse_memory_size

LOOPS = (ReadLoop(4, 4 << 20), ReadLoop(1, 1 << 20), ReadLoop(1, 4 << 20), ReadLoop(2, 4 << 20))


def main() -> None:
    """Alternate engine and loops, then compare."""
    options = _options()
    memory = parse_memory_size(options.memory)
    job = EngineJob(
        options.target,
        memory,
        [real_prompts(options.target, options.batch, options.prompt_tokens)],
        options.max_tokens,
        pause_every_s=options.segment_s,
        options={"expert_mode": options.expert_mode},
    )
    files = sorted(options.target.glob("*.safetensors"))
    with contextlib.ExitStack() as stack:
        command = job.command()
        if options.cgroup:
            command = stack.enter_context(memory_cgroup(memory)).wrap(command)
        drop_page_cache([options.target])
        loops, segments, result = _alternate(command, files, options)
    _report(options, loops, segments, result)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", type=Path, required=True)
    parser.add_argument("--memory", default="1GiB")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=8, help="engine segments to measure")
    parser.add_argument("--segment-s", type=float, default=3.0, help="seconds of each")
    parser.add_argument("--loop-s", type=float, default=1.0, help="seconds of each read loop")
    parser.add_argument(
        "--max-tokens", type=int, default=2000, help="more than the rounds can generate"
    )
    parser.add_argument("--settle-s", type=float, default=0.7, help="idle time before the loops")
    parser.add_argument("--expert-mode", default="auto", choices=("auto", "belt", "demand"))
    parser.add_argument("--no-cgroup", dest="cgroup", action="store_false")
    return parser.parse_args()


def _alternate(
    command: list[str], files: list[Path], options: argparse.Namespace
) -> tuple[list[dict[str, float]], list[dict[str, Any]], str]:
    """Return the loops' rates around each pure-decode segment, and the segments between them."""
    loops: list[dict[str, float]] = []
    segments: list[dict[str, Any]] = []
    note = "stopped after the rounds"
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        try:
            for line in child.stdout:
                segment = json.loads(line)
                if segment["event"] == "done":
                    note = "ran out of tokens: raise --max-tokens"
                    break
                # A segment with prompt chunks in it is warm-up: its steps are not the steady ones.
                if segment["prefill_tokens"]:
                    segments, loops = [], []
                elif loops:
                    segments.append(segment)
                # The engine fills its buffers once more before it is really idle.
                time.sleep(options.settle_s)
                loops.append({loop.name: loop.bandwidth(files, options.loop_s) for loop in LOOPS})
                if len(segments) == options.rounds:
                    break
                child.stdin.write("\n")
                child.stdin.flush()
        finally:
            child.kill()
    if not segments:
        raise SystemExit(f"nothing was measured: the engine's process {note}")
    return loops, segments, note


def _report(
    options: argparse.Namespace,
    loops: list[dict[str, float]],
    segments: list[dict[str, Any]],
    note: str,
) -> None:
    medians = {name: statistics.median(loop[name] for loop in loops) for name in loops[0]}
    best = max(medians, key=medians.__getitem__)
    rows, shares, rates = [], [], []
    for i, segment in enumerate(segments):
        link = (loops[i][best] + loops[i + 1][best]) / 2
        rate = segment["streamed_bytes"] / segment["wall_s"]
        rates.append(rate)
        shares.append(rate / link)
        rows.append(
            [
                str(i + 1),
                number(loops[i][best] / 1e9),
                number(rate / 1e9),
                number(loops[i + 1][best] / 1e9),
                number(100 * rate / link, 0),
                number(100 * segment["busy_s"] / segment["wall_s"], 0),
                number(100 * segment["stalled_s"] / segment["wall_s"], 0),
                number(segment["decode_tokens"] / segment["wall_s"], 1),
            ]
        )
    header = ["round", "loop GB/s before", "engine GB/s", "loop GB/s after", "engine/loop %"]
    print(table([*header, "link busy %", "compute waits %", "tok/s"], rows))
    print(
        "\nread loops, median GB/s: " + ", ".join(f"{n} {v / 1e9:.2f}" for n, v in medians.items())
    )
    share = statistics.median(shares)
    print(
        f"link utilisation: {100 * share:.0f} % of the best loop ({best}), median of "
        f"{len(shares)} rounds [{100 * min(shares):.0f}-{100 * max(shares):.0f}]; {note}"
    )
    record = {
        "benchmark": "streaming",
        "machine": machine(),
        "options": {k: str(v) for k, v in vars(options).items()},
        "share_of_best_loop": share,
        "shares": shares,
        "engine_bandwidth": statistics.median(rates),
        "best_loop": best,
        "loops": loops,
        "segments": segments,
    }
    print(json.dumps(record))


if __name__ == "__main__":
    main()
