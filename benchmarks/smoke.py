"""Ten seconds of everything: the demo model at a small batch, without and with speculation.

Says that the engine runs, stays inside its budget and returns the same tokens either way. The
figures are too short to quote; speculation.py, streaming.py and peers.py measure.

    python benchmarks/smoke.py --target DIR/target --draft DIR/draft
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from harness.engine_job import EngineJob, require_run
from harness.machine import machine
from harness.measured_process import Limits
from harness.real_prompts import real_prompts
from specmoeoff.demo import build_demo, cache_directory
from specmoeoff.memory_size import format_memory_size, parse_memory_size


def main() -> None:
    """Run both ways and compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", type=Path, help="default: the demo model, built if absent")
    parser.add_argument("--draft", type=Path)
    parser.add_argument("--memory", default="1GiB")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--max-tokens", type=int, default=8)
    options = parser.parse_args()
    target, draft = options.target, options.draft
    if target is None:
        demo = build_demo(cache_directory() / "demo-8x135m-noise0.1-seed0")
        target, draft = demo.target, demo.draft
    memory = parse_memory_size(options.memory)
    groups = [real_prompts(target, options.batch, 64)]
    record: dict[str, object] = {"benchmark": "smoke", "machine": machine()}
    hashes = set()
    for name, used in (("plain", None), ("speculative", draft)):
        if name == "speculative" and draft is None:
            continue
        job = EngineJob(target, memory, groups, options.max_tokens, draft=used and str(used))
        run = require_run(job, Limits(memory=None, timeout_s=300))
        peak = run.process.peak_rss_bytes
        print(
            f"{name}: {run.decode_tok_s:.1f} tok/s decode, {run.prefill_tok_s:.0f} tok/s prefill, "
            f"peak {format_memory_size(peak)} of {options.memory}"
        )
        if peak > memory:
            raise SystemExit(f"{name}: {peak} bytes at the peak, over the budget of {memory}")
        hashes.add(run.result["tokens_sha256"])
        record[name] = run.as_dict()
    if len(hashes) != 1:
        raise SystemExit("the tokens differ with speculation: that is a bug")
    print("tokens are the same")
    print(json.dumps(record))


if __name__ == "__main__":
    main()
