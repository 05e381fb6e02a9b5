"""What speculation gains: decode throughput with and without, alternating, same tokens checked.

Every run is a process of its own in a memory cgroup as large as its budget; off and on take
turns, and medians are compared. Batch 1 is run with ``auto`` as well, which must not lose.

    python benchmarks/speculation.py --target DIR/target --draft DIR/draft --draft DIR2/draft
"""

from __future__ import annotations

import argparse
import json
import statistics
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.engine_job import EngineJob, EngineRun, require_run
from harness.machine import machine
from harness.measured_process import Limits
from harness.real_prompts import real_prompts
from harness.table import number, table
from specmoeoff.memory_size import parse_memory_size

if TYPE_CHECKING:
    from collections.abc import Sequence

OFF = "off"


def main() -> None:
    """Measure every batch, off against every draft."""
    options = _options()
    record: dict[str, Any] = {
        "benchmark": "speculation",
        "machine": machine(),
        "options": {k: str(v) for k, v in vars(options).items()},
        "results": [],
    }
    for batch in options.batch:
        jobs = _jobs(options, batch)
        runs = _alternate(jobs, options)
        _show(f"batch {batch}", runs, options.k)
        record["results"].append({"batch": batch, **_summary(runs)})
    print(json.dumps(record))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", type=Path, required=True)
    parser.add_argument(
        "--draft", action="append", required=True, help="directory or ngram; may be repeated"
    )
    parser.add_argument("--memory", default="1GiB")
    parser.add_argument("--batch", type=int, nargs="+", default=[16, 1])
    parser.add_argument("--k", type=int, default=4, help="tokens drafted a sequence and step")
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument(
        "--prompt-tokens", type=int, help="cut prompts to this many tokens; default: whole"
    )
    parser.add_argument("--groups", type=int, default=4, help="prompts run in turn at batch 1")
    parser.add_argument("--repeat", type=int, default=3, help="runs of each kind")
    parser.add_argument(
        "--stop-at-eos", action="store_true", help="answers end where the model ends them"
    )
    parser.add_argument("--dtype", default="float32", help="what activations are rounded to")
    Limits.add_options(parser, timeout_s=900)
    return parser.parse_args()


def _jobs(options: argparse.Namespace, batch: int) -> dict[str, EngineJob]:
    """Return what is compared at one batch: off first."""
    count = options.groups if batch == 1 else batch
    prompts = real_prompts(options.target, count, options.prompt_tokens)
    off = EngineJob(
        options.target,
        parse_memory_size(options.memory),
        [prompts[i : i + batch] for i in range(0, len(prompts), batch)],
        options.max_tokens,
        ignore_eos=not options.stop_at_eos,
        options={"dtype": options.dtype},
    )
    jobs = {OFF: off}
    for draft in options.draft:
        name = draft if draft == "ngram" else "/".join(Path(draft).resolve().parts[-2:])
        on = replace(off, draft=draft, k=options.k)
        if batch == 1:
            jobs[f"{name}, auto"] = replace(on, adaptive=True)
        jobs[f"{name}, k={options.k}"] = on
    return jobs


def _alternate(
    jobs: dict[str, EngineJob], options: argparse.Namespace
) -> dict[str, list[EngineRun]]:
    runs: dict[str, list[EngineRun]] = {name: [] for name in jobs}
    for _ in range(options.repeat):
        for name, job in jobs.items():
            run = require_run(job, Limits.from_options(options))
            runs[name].append(run)
            if run.result["tokens_sha256"] != runs[OFF][0].result["tokens_sha256"]:
                raise SystemExit(f"{name} returned other tokens than without speculation: a bug")
    return runs


def _show(title: str, runs: dict[str, list[EngineRun]], k: int) -> None:
    print(f"\n{title}")
    header = ["speculation", "decode tok/s", "min-max", "x off", "full batch tok/s", "x off"]
    header += [
        "accepted/drafted",
        "a",
        "tokens/verify",
        "link busy %",
        "peak RSS MiB",
        "other cores",
    ]
    rows = []
    for name, same in runs.items():
        decode = [run.decode_tok_s for run in same]
        stats = same[0].result["stats"]
        rows.append(
            [
                name,
                number(statistics.median(decode)),
                f"{min(decode):.2f}-{max(decode):.2f}",
                number(_median(same, "decode_tok_s") / _median(runs[OFF], "decode_tok_s")),
                number(_median(same, "full_tok_s")),
                number(_median(same, "full_tok_s") / _median(runs[OFF], "full_tok_s")),
                number(same[0].acceptance_rate),
                number(_token_acceptance(stats["mean_acceptance_length"], k)),
                number(stats["mean_acceptance_length"]),
                number(100 * stats["link_utilisation"], 0),
                number(max(run.process.peak_rss_bytes for run in same) / 2**20, 0),
                number(max(run.process.other_cores for run in same)),
            ]
        )
    print(table(header, rows))
    print("all runs returned the same tokens", flush=True)


def _token_acceptance(mean_length: float, k: int) -> float | None:
    """Return the a for which chains of k tokens give this mean: 1 + a + a^2 + ... + a^k.

    It is the chance that one token is accepted when all before it were. Chains that were shorter
    than k (at the end of a sequence, or with ``auto``) make it come out a little low.
    """
    if mean_length <= 1.0:
        return None
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        expected = sum(middle**i for i in range(k + 1))
        low, high = (middle, high) if expected < mean_length else (low, middle)
    return low


def _summary(runs: dict[str, list[EngineRun]]) -> dict[str, Any]:
    off = _median(runs[OFF], "decode_tok_s")
    return {
        "speedup": {name: _median(same, "decode_tok_s") / off for name, same in runs.items()},
        "runs": {name: [run.as_dict() for run in same] for name, same in runs.items()},
    }


def _median(runs: Sequence[EngineRun], figure: str) -> float:
    """Return the median of one figure; NaN where no run has it."""
    values = [value for run in runs if (value := getattr(run, figure)) is not None]
    return statistics.median(values) if values else float("nan")


if __name__ == "__main__":
    main()
