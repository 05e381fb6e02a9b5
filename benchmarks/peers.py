"""SpecMoEOff beside llama.cpp and Transformers, each in a memory cgroup of the same size.

Installs the peers from their packages the first time (see harness/peer_installation.py), writes
the target as BF16 GGUF, then runs every engine at every batch in turn, each from a cold page
cache. Ends with a table and one line of JSON.

    python benchmarks/peers.py --target DIR/target --draft DIR/draft --memory 4GiB --batch 1 16 64
"""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from harness.engine_job import EngineJob, run_engine
from harness.llama_cpp import CHECK_PROMPT, NAME, TEXT_NAME, LlamaCpp, ensure_gguf
from harness.machine import machine
from harness.measured_process import Limits
from harness.peer_installation import LLAMA_CPP_PACKAGE, PACKAGES, PeerInstallation
from harness.peer_result import PeerResult
from harness.real_prompts import as_text, equally_long, real_prompts
from harness.table import number, table
from harness.transformers_offload import run_transformers
from specmoeoff.demo import cache_directory
from specmoeoff.memory_size import parse_memory_size

if TYPE_CHECKING:
    from collections.abc import Iterator

ENGINES = (
    NAME,
    TEXT_NAME,
    "specmoeoff",
    "specmoeoff-speculative",
    "specmoeoff-auto",
    "transformers",
)
"""The second runs only at batch 1, on the first real prompt."""


@dataclass(frozen=True)
class Peers:
    """The peers that this run needs, installed."""

    python: Path
    llama_cpp: LlamaCpp


def main() -> None:
    """Install, run, compare."""
    options = _options()
    peers = _install(options)
    if options.check:
        _check_gguf(peers.llama_cpp, options)
    if options.install_only:
        return
    results: list[PeerResult] = []
    for result in _results(options, peers):
        results.append(result)
        shown = number(result.decode_tok_s) + " tok/s" if result.decode_tok_s else result.note
        print(f"batch {result.batch}, {result.engine}: {shown}", flush=True)
    _report(options, results)


def _install(options: argparse.Namespace) -> Peers:
    installation = PeerInstallation(options.peers_dir, options.jobs)
    python, tools, gguf = Path(), Path(), Path()
    if any(not engine.startswith("specmoeoff") for engine in options.engines):
        python = installation.ensure_python()
    if options.check or {NAME, TEXT_NAME} & set(options.engines):
        tools = installation.ensure_llama_cpp()
        gguf = ensure_gguf(python, options.target, options.peers_dir / "gguf")
    extra = options.llama_args.split()
    return Peers(python, LlamaCpp(tools, gguf, options.threads, extra))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", type=Path, required=True, help="a Mixtral checkpoint")
    parser.add_argument("--draft", help="directory of the draft, or ngram")
    parser.add_argument("--k", type=int, default=4, help="tokens drafted a sequence and step")
    parser.add_argument("--memory", default="4GiB", help="budget and cgroup of every engine")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=ENGINES)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--max-tokens", type=int, default=32)
    parser.add_argument("--repeat", type=int, default=1, help="runs of everything, taking turns")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument(
        "--transformers-timeout", type=float, default=300, help="the same for Transformers"
    )
    parser.add_argument("--llama-args", default="", help="more for llama-batched-bench, one string")
    Limits.add_options(parser, timeout_s=1800)
    parser.add_argument("--peers-dir", type=Path, default=cache_directory() / "peers")
    parser.add_argument("--jobs", type=int, default=2, help="compilers that build llama.cpp")
    parser.add_argument("--install-only", action="store_true")
    parser.add_argument(
        "--check", action="store_true", help="compare a short answer of the GGUF with our own"
    )
    options = parser.parse_args()
    if options.draft is None:
        options.engines = [
            e for e in options.engines if e in ("llama.cpp", "specmoeoff", "transformers")
        ]
    return options


def _results(options: argparse.Namespace, peers: Peers) -> Iterator[PeerResult]:
    """Run everything, the engines taking turns, and yield each result as it comes."""
    limits = Limits.from_options(options)
    lengths = options.prompt_tokens, options.max_tokens
    for batch in options.batch:
        prompts = real_prompts(options.target, batch, options.prompt_tokens)
        for _ in range(options.repeat):
            for engine in options.engines:
                if engine == NAME:
                    yield peers.llama_cpp.run_batch(batch, *lengths, limits)
                elif engine == TEXT_NAME:
                    if batch == 1:
                        prompt = as_text(options.target, prompts[0])
                        yield peers.llama_cpp.run_text(prompt, options.max_tokens, limits)
                elif engine == "transformers":
                    yield _run_transformers(peers.python, options, prompts)
                else:
                    yield _run_specmoeoff(engine, options, prompts, limits)


def _run_transformers(
    python: Path, options: argparse.Namespace, prompts: list[list[int]]
) -> PeerResult:
    return run_transformers(
        python,
        options.target,
        prompts=equally_long(prompts, options.prompt_tokens),
        max_tokens=options.max_tokens,
        num_threads=options.threads,
        memory=parse_memory_size(options.memory),
        limits=replace(Limits.from_options(options), timeout_s=options.transformers_timeout),
        scratch=options.peers_dir,
    )


def _run_specmoeoff(
    engine: str, options: argparse.Namespace, prompts: list[list[int]], limits: Limits
) -> PeerResult:
    job = EngineJob(
        options.target,
        parse_memory_size(options.memory),
        [prompts],
        options.max_tokens,
        draft=None if engine == "specmoeoff" else options.draft,
        k=options.k,
        adaptive=engine == "specmoeoff-auto",
        options={"num_threads": options.threads},
    )
    run, process = run_engine(job, limits)
    if run is None:
        return PeerResult(engine, len(prompts), process, note=process.failure or "no result")
    full = f"full batch {number(run.full_tok_s)} tok/s"
    accepted = f", acceptance {number(run.acceptance_rate)}" if run.acceptance_rate else ""
    return PeerResult(
        engine,
        len(prompts),
        process,
        decode_tok_s=run.decode_tok_s,
        prefill_tok_s=run.prefill_tok_s,
        note=full + accepted,
        details=run.as_dict(),
    )


def _report(options: argparse.Namespace, results: list[PeerResult]) -> None:
    rows = []
    speedups: dict[str, float] = {}
    for batch in options.batch:
        # At batch 1 there are two llama.cpp figures; the better one is the one to beat.
        figures = [_mean_rate(results, name, batch) for name in (NAME, TEXT_NAME)]
        base = max((rate for rate in figures if rate), default=None)
        for result in (result for result in results if result.batch == batch):
            ratio = result.decode_tok_s / base if base and result.decode_tok_s else None
            rows.append(_row(result, ratio))
        for engine in options.engines:
            rate = _mean_rate(results, engine, batch)
            if base and rate and engine not in (NAME, TEXT_NAME):
                speedups[f"{engine}, batch {batch}"] = rate / base
    print(
        f"\n{options.target} in a cgroup of {options.memory}" if options.cgroup else "\nno cgroup"
    )
    header = ["engine", "batch", "decode tok/s", "x llama.cpp", "prefill tok/s", "read GB"]
    print(table([*header, "peak RSS GiB", "wall s", "other cores", "note"], rows))
    record = {
        "benchmark": "peers",
        "machine": machine(),
        "versions": [LLAMA_CPP_PACKAGE, *PACKAGES],
        "options": {key: str(value) for key, value in vars(options).items()},
        "times_llama_cpp": speedups,
        "results": [result.as_dict() for result in results],
    }
    print(json.dumps(record))


def _row(result: PeerResult, ratio: float | None) -> list[str]:
    return [
        result.engine,
        str(result.batch),
        number(result.decode_tok_s),
        number(ratio),
        number(result.prefill_tok_s, 1),
        number(result.process.read_bytes / 1e9),
        number(result.process.peak_rss_bytes / 2**30),
        number(result.process.wall_s, 0),
        number(result.process.other_cores),
        result.note,
    ]


def _mean_rate(results: list[PeerResult], engine: str, batch: int) -> float | None:
    """Return an engine's mean rate at a batch; Transformers goes by a longer name in its rows."""
    rates = [
        result.decode_tok_s
        for result in results
        if result.engine.split(" ")[0] == engine and result.batch == batch and result.decode_tok_s
    ]
    return sum(rates) / len(rates) if rates else None


def _check_gguf(llama_cpp: LlamaCpp, options: argparse.Namespace) -> None:
    """Print both greedy answers; rounding may make them part after a while, not at once."""
    from specmoeoff import LLM, SamplingParams

    theirs = llama_cpp.continuation(CHECK_PROMPT, 16)
    with LLM(str(options.target), memory=options.memory, max_num_seqs=1) as llm:
        output = llm.generate(CHECK_PROMPT, SamplingParams(temperature=0.0, max_tokens=16))
    ours = CHECK_PROMPT + output[0].outputs[0].text
    print(f"llama.cpp:  {theirs.strip()!r}\nspecmoeoff: {ours.strip()!r}")


if __name__ == "__main__":
    main()
