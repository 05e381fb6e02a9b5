"""Hours of random work: does anything grow?

One engine serves requests that arrive at random; some are aborted, and with a small budget some are
preempted. After each round of steps everything is let finish, and what the engine then holds is
noted: resident memory, file descriptors, threads, the tiers' reservations, KV pages, expert slots.
After a warm-up the medians of the first and of the last third are compared. Ends with exit code 1
if anything grew. Any model will do; no tokenizer is needed.

    python benchmarks/soak.py --target DIR/target --draft DIR/draft --memory 1GiB --steps 20000
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import asdict
from pathlib import Path

from harness.record import add_json_option, finish
from harness.soak import Sample, Soak, grown, thirds
from harness.table import table
from specmoeoff.config import EngineConfig, SpeculativeConfig
from specmoeoff.engine.build import build_engine
from specmoeoff.memory_size import parse_memory_size
from specmoeoff.models.hf_config import parse_config

ROUNDS = 60
"""Rounds that the steps are divided into, at least; more where steps are many."""
MOST_BUSY_STEPS = 500


def main() -> None:
    """Soak, compare, report."""
    options = _options()
    vocab_size = parse_config(options.target).vocab_size
    engine = build_engine(_config(options))
    soak = Soak(engine, vocab_size, options.longest, options.seed)
    start = time.monotonic()
    samples = _rounds(soak, options.steps)
    stats = engine.stats()
    engine.close()
    medians = thirds(samples)
    worse = grown(medians, parse_memory_size(options.slack))
    rows = [
        [name, f"{first:.0f}", f"{last:.0f}", "grew" if name in worse else "ok"]
        for name, (first, last) in medians.items()
    ]
    print(table(["held when idle", "first third", "last third", ""], rows))
    print(
        f"\n{stats.steps} steps in {len(samples)} rounds and {time.monotonic() - start:.0f} s; "
        f"{stats.generated_tokens} tokens, {stats.preemptions} preemptions, "
        f"{soak.num_aborted} aborts, "
        f"{stats.accepted_tokens} of {stats.drafted_tokens} drafts accepted"
    )
    finish(
        "soak",
        options.json,
        {
            "options": {name: str(value) for name, value in vars(options).items()},
            "medians": medians,
            "grown": sorted(worse),
            "samples": [asdict(sample) for sample in samples],
            "stats": stats.as_dict(),
        },
    )
    if worse:
        raise SystemExit(1)


def _rounds(soak: Soak, num_steps: int) -> list[Sample]:
    """Run rounds until there were so many steps; a line on stderr after each says how it goes."""
    busy = max(1, min(num_steps // (2 * ROUNDS), MOST_BUSY_STEPS))
    samples: list[Sample] = []
    while soak.num_steps < num_steps or len(samples) < 4:
        sample = soak.round(busy)
        samples.append(sample)
        print(
            f"round {len(samples)}: step {soak.num_steps} of {num_steps}, held when idle "
            f"{sample.resident_bytes / 2**20:.1f} MiB, {sample.descriptors} descriptors, "
            f"{sample.threads} threads, {sample.kv_pages} KV pages",
            file=sys.stderr,
            flush=True,
        )
    return samples


def _config(options: argparse.Namespace) -> EngineConfig:
    is_sim = options.device_memory is not None
    return EngineConfig(
        model=str(options.target),
        memory=parse_memory_size(options.memory),
        device="sim" if is_sim else "auto",
        device_memory=parse_memory_size(options.device_memory) if is_sim else None,
        schedule=options.schedule,
        max_num_seqs=options.batch,
        seed=options.seed,
        speculative=_speculative(options.draft),
    )


def _speculative(draft: str) -> SpeculativeConfig | None:
    if draft == "off":
        return None
    if draft == "ngram":
        return SpeculativeConfig(method="ngram")
    return SpeculativeConfig(model=draft)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", type=Path, required=True)
    parser.add_argument("--draft", default="ngram", help="a directory, ngram or off")
    parser.add_argument("--memory", default="1GiB")
    parser.add_argument("--schedule", default="auto")
    parser.add_argument("--device-memory", help="runs on a simulated device of this size")
    parser.add_argument("--steps", type=int, default=20000)
    parser.add_argument("--batch", type=int, default=16, help="sequences that run at once")
    parser.add_argument("--longest", type=int, default=128, help="tokens of prompt, and of output")
    parser.add_argument("--slack", default="4MiB", help="growth of resident memory that is allowed")
    parser.add_argument("--seed", type=int, default=0)
    add_json_option(parser)
    return parser.parse_args()


if __name__ == "__main__":
    main()
