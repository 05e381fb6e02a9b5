"""A model all in RAM, bf16 weights, no speculation, beside llama.cpp: decode and prefill by batch.

Every engine has the same prompt and output lengths and the same number of threads, runs in a
process of its own, in turn with the others, from warm memory: ours after a batch that is not
counted, llama.cpp from a full page cache. llama.cpp runs with its weights mapped and with its
weights copied, and the better median counts. Decode is of the whole batch, from the step after the
last prompt to the first sequence that ends, which for llama.cpp is all there is.

With --busy-neighbour ours is measured again while one other process keeps a core busy.

    python benchmarks/in_ram.py --target DIR/target
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from harness.busy_neighbour import busy_neighbour
from harness.engine_job import EngineJob, run_engine
from harness.llama_cpp import LlamaCpp, ensure_gguf
from harness.measured_process import Limits
from harness.peer_installation import LLAMA_CPP_PACKAGE, PeerInstallation
from harness.peer_result import PeerResult
from harness.real_prompts import equally_long, real_prompts
from harness.record import add_json_option, finish
from harness.table import number, table
from specmoeoff.config import DTYPES
from specmoeoff.demo import cache_directory
from specmoeoff.memory_size import parse_memory_size

if TYPE_CHECKING:
    from collections.abc import Iterator

LLAMA_LOAD_MODES = {"llama.cpp mmap": "mmap", "llama.cpp no mmap": "none"}
OUR_DTYPES = {f"ours {dtype}": dtype for dtype in DTYPES}
"""By what activations are rounded to; weights are bf16 in both."""
PACKED_DTYPES = {f"ours packed {dtype}": dtype for dtype in DTYPES}
"""The same from a packed copy of the checkpoint: bf16 weights still, bit for bit."""
ENGINES = (*OUR_DTYPES, *PACKED_DTYPES, *LLAMA_LOAD_MODES)
DECODE_GOALS = {1: 1.1, 8: 1.4, 32: 1.4, 64: 1.7}
"""Decode tokens/s over llama.cpp's, by batch."""
PREFILL_GOAL = 1.3
BUSY_GOAL = 0.5
"""Of the quiet figure, while a neighbour keeps a core busy."""


@dataclass(frozen=True)
class Rates:
    """Medians of an engine at a batch, in tokens per second; None where no run succeeded."""

    decode: float | None
    prefill: float | None


Key = tuple[int, str, bool]
"""Batch, engine, with a busy neighbour."""


def main() -> None:
    """Install llama.cpp if it is not there, run everything in turn, compare."""
    options = _options()
    installation = PeerInstallation(options.peers_dir, options.jobs)
    tools, python = installation.ensure_llama_cpp(), installation.ensure_python()
    gguf = ensure_gguf(python, options.target, options.peers_dir / "gguf")
    llama_cpp = LlamaCpp(tools, gguf, options.threads)
    runs: dict[Key, list[PeerResult]] = defaultdict(list)
    for busy, result in _results(options, llama_cpp):
        runs[result.batch, result.engine, busy].append(result)
        print(_progress(busy, result), flush=True)
    _report(options, runs)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", type=Path, required=True, help="a Mixtral checkpoint")
    parser.add_argument("--packed", type=Path, help="the same, by 'specmoeoff pack'; also run")
    parser.add_argument("--memory", default="6GiB", help="our budget; the model has to fit")
    parser.add_argument("--batch", type=int, nargs="+", default=list(DECODE_GOALS))
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=ENGINES)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--max-tokens", type=int, default=32)
    parser.add_argument("--repeat", type=int, default=3, help="runs of everything, taking turns")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--busy-neighbour", action="store_true")
    parser.add_argument(
        "--busy-engines",
        nargs="+",
        choices=ENGINES,
        default=list(OUR_DTYPES),
        help="measured with the neighbour; llama.cpp may take minutes a run with it",
    )
    parser.add_argument("--timeout", type=float, default=600, help="seconds for one run")
    parser.add_argument("--peers-dir", type=Path, default=cache_directory() / "peers")
    parser.add_argument("--jobs", type=int, default=2, help="compilers that build llama.cpp")
    add_json_option(parser)
    options = parser.parse_args()
    if options.packed is None:
        options.engines = [e for e in options.engines if e not in PACKED_DTYPES]
    return options


def _results(options: argparse.Namespace, llama_cpp: LlamaCpp) -> Iterator[tuple[bool, PeerResult]]:
    """Yield every run as it ends, and whether a neighbour was busy; the engines take turns."""
    for batch in options.batch:
        for busy in (False, True) if options.busy_neighbour else (False,):
            for _ in range(options.repeat):
                for engine in options.busy_engines if busy else options.engines:
                    with busy_neighbour() if busy else contextlib.nullcontext():
                        yield busy, _run(engine, batch, options, llama_cpp)


def _run(engine: str, batch: int, options: argparse.Namespace, llama_cpp: LlamaCpp) -> PeerResult:
    limits = Limits(memory=None, timeout_s=options.timeout, cold_cache=False)
    if engine in LLAMA_LOAD_MODES:
        tool = replace(llama_cpp, extra=("-lm", LLAMA_LOAD_MODES[engine]))
        result = tool.run_batch(batch, options.prompt_tokens, options.max_tokens, limits)
        return replace(result, engine=engine)
    prompts = real_prompts(options.target, batch, options.prompt_tokens)
    prompts = equally_long(prompts, options.prompt_tokens)
    job = EngineJob(
        options.packed if engine in PACKED_DTYPES else options.target,
        parse_memory_size(options.memory),
        [prompts],
        options.max_tokens,
        # Many tokens of many prompts reach every expert.
        warm_up=equally_long(real_prompts(options.target, 8, 256), 256),
        options={
            "num_threads": options.threads,
            "max_num_seqs": max(batch, 8),
            "dtype": (OUR_DTYPES | PACKED_DTYPES)[engine],
        },
    )
    run, process = run_engine(job, limits)
    if run is None:
        return PeerResult(engine, batch, process, note=process.failure or "no result")
    return PeerResult(
        engine,
        batch,
        process,
        decode_tok_s=run.full_tok_s,
        prefill_tok_s=run.prefill_tok_s,
        details=run.as_dict(),
    )


def _progress(busy: bool, result: PeerResult) -> str:
    shown = f"{number(result.decode_tok_s)} tok/s, prefill {number(result.prefill_tok_s)}"
    streamed = result.details.get("decode_bytes")
    return (
        f"batch {result.batch}, {result.engine}{', busy neighbour' if busy else ''}: "
        f"{result.note or shown}, other cores {number(result.process.other_cores)}"
        + (f", READ {streamed} bytes in decode: not all in RAM" if streamed else "")
    )


def _medians(results: list[PeerResult]) -> Rates:
    decode = [r.decode_tok_s for r in results if r.decode_tok_s]
    prefill = [r.prefill_tok_s for r in results if r.prefill_tok_s]
    return Rates(
        statistics.median(decode) if decode else None,
        statistics.median(prefill) if prefill else None,
    )


def _ratio(ours: float | None, theirs: float | None) -> float | None:
    return ours / theirs if ours and theirs else None


def _best(rates: dict[Key, Rates], batch: int, busy: bool) -> Rates:
    """Return llama.cpp's better median of each kind."""
    both = [rates[batch, e, busy] for e in LLAMA_LOAD_MODES if (batch, e, busy) in rates]
    return Rates(
        max((r.decode for r in both if r.decode), default=None),
        max((r.prefill for r in both if r.prefill), default=None),
    )


def _report(options: argparse.Namespace, runs: dict[Key, list[PeerResult]]) -> None:
    rates = {key: _medians(results) for key, results in runs.items()}
    rows, summary = [], []
    for (batch, engine, busy), rate in rates.items():
        best = _best(rates, batch, busy)
        quiet = rates.get((batch, engine, False), Rates(None, None))
        entry = {
            "batch": batch,
            "engine": engine,
            "busy_neighbour": busy,
            "decode_tok_s": rate.decode,
            "prefill_tok_s": rate.prefill,
            "decode_over_llama_cpp": _ratio(rate.decode, best.decode),
            "prefill_over_llama_cpp": _ratio(rate.prefill, best.prefill),
            "decode_over_quiet": _ratio(rate.decode, quiet.decode) if busy else None,
            "prefill_over_quiet": _ratio(rate.prefill, quiet.prefill) if busy else None,
        }
        summary.append(entry)
        figures = [number(value) for key, value in entry.items() if key.startswith(("dec", "pre"))]
        others = max(result.process.other_cores for result in runs[batch, engine, busy])
        goal = (
            number(DECODE_GOALS.get(batch)) if engine not in LLAMA_LOAD_MODES and not busy else ""
        )
        rows.append([engine, str(batch), "busy" if busy else "", *figures, goal, number(others)])
    header = ["engine", "batch", "neighbour", "decode tok/s", "prefill tok/s"]
    header += ["decode x llama.cpp", "prefill x", "decode of quiet", "prefill of quiet"]
    print("\n" + table([*header, "goal", "other cores"], rows))
    print(
        f"goals: decode as listed, prefill {PREFILL_GOAL} x llama.cpp, "
        f"{BUSY_GOAL} of quiet with a busy neighbour"
    )
    fields = {
        "versions": [LLAMA_CPP_PACKAGE],
        "options": {key: str(value) for key, value in vars(options).items()},
        "medians": summary,
        "results": [
            {"busy_neighbour": key[2], **result.as_dict()}
            for key, results in runs.items()
            for result in results
        ],
    }
    finish("in_ram", options.json, fields)


if __name__ == "__main__":
    main()
