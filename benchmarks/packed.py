"""What packing gains: decode throughput from a plain and a packed checkpoint of one model.

Every run is a process of its own in a memory cgroup as large as its budget; plain and packed take
turns, medians are compared, and the tokens must be the same.

    specmoeoff pack DIR/target -o DIR/packed
    python benchmarks/packed.py --target DIR/target --packed DIR/packed --draft DIR/draft
"""

from __future__ import annotations

import argparse
import json
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

from harness.engine_job import EngineJob, EngineRun, require_run
from harness.machine import machine
from harness.measured_process import Limits
from harness.real_prompts import real_prompts
from harness.table import number, table
from specmoeoff.memory_size import parse_memory_size

PLAIN, PACKED = "plain", "packed"
Runs = dict[tuple[str, str], list[EngineRun]]


def main() -> None:
    """Measure every batch, without and with the draft."""
    options = _options()
    record: dict[str, Any] = {
        "benchmark": "packed",
        "machine": machine(),
        "options": {k: str(v) for k, v in vars(options).items()},
        "results": [],
    }
    for batch in options.batch:
        runs = _alternate(_jobs(options, batch), options)
        print(f"\nbatch {batch}")
        print(table(_HEADER, [_row(kind, same, runs) for kind, same in runs.items()]), flush=True)
        record["results"] += [
            {"batch": batch, "draft": draft, "checkpoint": checkpoint, **_summary(same)}
            for (draft, checkpoint), same in runs.items()
        ]
    print("all runs of a batch returned the same tokens")
    print(json.dumps(record))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", type=Path, required=True)
    parser.add_argument("--packed", type=Path, required=True, help="the same, packed")
    parser.add_argument("--draft", help="also with this draft model")
    parser.add_argument("--memory", default="1GiB")
    parser.add_argument("--batch", type=int, nargs="+", default=[16, 1])
    parser.add_argument("--k", type=int, default=4, help="tokens drafted a sequence and step")
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--repeat", type=int, default=3, help="runs of each kind")
    parser.add_argument("--dtype", default="float32", help="what activations are rounded to")
    Limits.add_options(parser, timeout_s=900)
    return parser.parse_args()


def _jobs(options: argparse.Namespace, batch: int) -> dict[tuple[str, str], EngineJob]:
    """Return what is compared at one batch, by draft and checkpoint."""
    plain = EngineJob(
        options.target,
        parse_memory_size(options.memory),
        [real_prompts(options.target, batch, options.prompt_tokens)],
        options.max_tokens,
        ignore_eos=True,
        options={"dtype": options.dtype},
    )
    kinds = {"off": plain}
    if options.draft:
        kinds[f"k={options.k}"] = replace(plain, draft=options.draft, k=options.k)
    return {
        (draft, checkpoint): replace(job, model=directory)
        for draft, job in kinds.items()
        for checkpoint, directory in ((PLAIN, options.target), (PACKED, options.packed))
    }


def _alternate(jobs: dict[tuple[str, str], EngineJob], options: argparse.Namespace) -> Runs:
    runs: Runs = {kind: [] for kind in jobs}
    first: EngineRun | None = None
    for _ in range(options.repeat):
        for kind, job in jobs.items():
            run = require_run(job, Limits.from_options(options))
            first = first or run
            if run.result["tokens_sha256"] != first.result["tokens_sha256"]:
                raise SystemExit(f"{' '.join(kind)} returned other tokens than before: a bug")
            runs[kind].append(run)
    return runs


_HEADER = [
    "draft",
    "checkpoint",
    "decode tok/s",
    "min-max",
    "x plain",
    "expert slots",
    "MB a step",
    "link busy %",
    "peak RSS MiB",
    "other cores",
]


def _row(kind: tuple[str, str], same: list[EngineRun], runs: Runs) -> list[str]:
    draft, checkpoint = kind
    decode = [run.decode_tok_s for run in same]
    summary, plain = _summary(same), _summary(runs[draft, PLAIN])
    return [
        draft,
        checkpoint,
        number(summary["decode_tok_s"]),
        f"{min(decode):.2f}-{max(decode):.2f}",
        number(summary["decode_tok_s"] / plain["decode_tok_s"]),
        number(summary["expert_slots"], 0),
        number(summary["step_bytes"] / 1e6, 0),
        number(100 * summary["link_utilisation"], 0),
        number(summary["peak_rss_bytes"] / 2**20, 0),
        number(summary["other_cores"]),
    ]


def _summary(same: list[EngineRun]) -> dict[str, float]:
    result = same[0].result
    steps = [run.result["decode_bytes"] / run.result["decode_steps"] for run in same]
    return {
        "decode_tok_s": statistics.median(run.decode_tok_s for run in same),
        "expert_slots": result["stats"]["expert_slots"],
        "step_bytes": statistics.median(steps),
        "link_utilisation": result["stats"]["link_utilisation"],
        "peak_rss_bytes": max(run.process.peak_rss_bytes for run in same),
        "other_cores": max(run.process.other_cores for run in same),
    }


if __name__ == "__main__":
    main()
