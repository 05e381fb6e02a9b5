"""How near a step is to what the disk allows: batch by batch, beside llama.cpp if it is installed.

The bound of a step is the bytes that must come from the disk over what a plain O_DIRECT loop reads
in the same minute. What must come are the experts that the step wants, times the share of all
experts that the slots do not hold: with routing as even as a random model's, no choice of what to
keep does better. Every run has a memory cgroup of the budget's size and a cold page cache. Prompts
are random tokens, so no tokenizer is needed; no speculation.

    python benchmarks/bound.py --target DIR --memory 4GiB
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from harness.engine_job import EngineJob, EngineRun, require_run
from harness.llama_cpp import LlamaCpp, ensure_gguf
from harness.measured_process import Limits, drop_page_cache
from harness.peer_installation import PeerInstallation
from harness.read_loop import ReadLoop
from harness.record import add_json_option, finish
from harness.table import number, table
from specmoeoff.demo import cache_directory
from specmoeoff.memory_size import parse_memory_size

if TYPE_CHECKING:
    from harness.peer_result import PeerResult

LOOPS = (ReadLoop(4, 4 << 20), ReadLoop(1, 4 << 20), ReadLoop(2, 4 << 20))
HEADER = (
    "batch",
    "steps",
    "step s",
    "experts a step",
    "read GB a step",
    "slots",
    "raw GB/s",
    "bound s",
    "bound/step %",
    "link busy %",
    "tok/s",
    "llama.cpp tok/s",
    "x",
)


@dataclass(frozen=True)
class Row:
    """One batch: our run, the disk around it, and llama.cpp's run if there is one."""

    batch: int
    run: EngineRun
    raw: float
    """Bytes per second of the best read loop, mean of before and after."""
    llama_cpp: PeerResult | None

    @property
    def step_s(self) -> float:
        """Seconds of a decode step."""
        return self.run.result["decode_s"] / self.run.result["decode_steps"]

    @property
    def wanted(self) -> float:
        """Experts that a decode step wants."""
        return self.run.result["decode_wanted_experts"] / self.run.result["decode_steps"]

    @property
    def slots(self) -> int:
        """Experts that memory holds when the run ends, its KV cache being fullest."""
        return int(self.run.result["stats"]["expert_slots"])

    def bound_s(self, total_experts: int) -> float:
        """Return the seconds that a step's bytes take at the raw rate."""
        expert_bytes = self.run.result["policy"]["expert_slot_bytes"]
        return self.wanted * (1 - self.slots / total_experts) * expert_bytes / self.raw

    def as_dict(self, total_experts: int) -> dict[str, Any]:
        """Return the figures as plain data."""
        result = self.run.result
        return {
            "batch": self.batch,
            "step_s": self.step_s,
            "bound_s": self.bound_s(total_experts),
            "share_of_bound": self.bound_s(total_experts) / self.step_s,
            "link_busy": result["decode_busy_s"] / result["decode_s"],
            "raw_bandwidth": self.raw,
            "llama_cpp": self.llama_cpp.as_dict() if self.llama_cpp else None,
            **self.run.as_dict(),
        }


def main() -> None:
    """Run every batch, the engines taking turns."""
    options = _options()
    config = json.loads((options.target / "config.json").read_text())
    llama_cpp = _llama_cpp(options) if options.peers_dir else None
    rows = [_run(options, config["vocab_size"], batch, llama_cpp) for batch in options.batch]
    total = config["num_hidden_layers"] * config["num_local_experts"]
    print(f"\n{options.target}, {total} experts, in a cgroup of {options.memory}")
    print(table(list(HEADER), [_cells(row, total) for row in rows]))
    fields = {
        "options": {key: str(value) for key, value in vars(options).items()},
        "results": [row.as_dict(total) for row in rows],
    }
    finish("bound", options.json, fields)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", type=Path, required=True)
    parser.add_argument("--memory", default="4GiB")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32, 64])
    parser.add_argument("--prompt-tokens", type=int, default=16)
    parser.add_argument("--max-tokens", type=int, default=16, help="tokens of each sequence")
    parser.add_argument("--llama-max-tokens", type=int, default=4, help="the same for llama.cpp")
    parser.add_argument("--loop-s", type=float, default=2.0, help="seconds of each read loop")
    parser.add_argument(
        "--peers-dir",
        type=Path,
        nargs="?",
        const=cache_directory() / "peers",
        help="run llama.cpp too, installed here the first time",
    )
    Limits.add_options(parser, timeout_s=900)
    add_json_option(parser)
    return parser.parse_args()


def _llama_cpp(options: argparse.Namespace) -> LlamaCpp:
    peers = PeerInstallation(options.peers_dir)
    gguf = ensure_gguf(peers.ensure_python(), options.target, options.peers_dir / "gguf")
    return LlamaCpp(peers.ensure_llama_cpp(), gguf, num_threads=2)


def _run(
    options: argparse.Namespace, vocabulary: int, batch: int, llama_cpp: LlamaCpp | None
) -> Row:
    rng = np.random.default_rng(batch)
    prompts = rng.integers(vocabulary, size=(batch, options.prompt_tokens)).tolist()
    job = EngineJob(
        options.target, parse_memory_size(options.memory), [prompts], options.max_tokens
    )
    limits = Limits.from_options(options)
    before = _raw(options)
    run = require_run(job, limits)
    raw = (before + _raw(options)) / 2
    lengths = options.prompt_tokens, options.llama_max_tokens
    theirs = llama_cpp.run_batch(batch, *lengths, limits) if llama_cpp else None
    print(f"batch {batch}: {number(run.decode_tok_s)} tok/s", flush=True)
    return Row(batch, run, raw, theirs)


def _raw(options: argparse.Namespace) -> float:
    """Return what the best of the read loops gets of the disk now."""
    drop_page_cache([options.target])
    files = sorted(options.target.glob("*.safetensors"))
    return max(loop.bandwidth(files, options.loop_s) for loop in LOOPS)


def _cells(row: Row, total: int) -> list[str]:
    result = row.run.result
    theirs = row.llama_cpp.decode_tok_s if row.llama_cpp else None
    return [
        str(row.batch),
        str(result["decode_steps"]),
        number(row.step_s, 3),
        number(row.wanted, 1),
        number(result["decode_bytes"] / result["decode_steps"] / 1e9),
        str(row.slots),
        number(row.raw / 1e9),
        number(row.bound_s(total), 3),
        number(100 * row.bound_s(total) / row.step_s, 0),
        number(100 * result["decode_busy_s"] / result["decode_s"], 0),
        number(row.run.decode_tok_s),
        number(theirs),
        number(row.run.decode_tok_s / theirs if theirs else None),
    ]


if __name__ == "__main__":
    main()
