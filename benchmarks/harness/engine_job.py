"""One measured run of SpecMoEOff: what to run, in a process of its own, and what came out."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from harness.measured_process import Finished, Limits, prepare_page_cache, run_measured

_PROCESS = Path(__file__).with_name("engine_process.py")


@dataclass(frozen=True)
class EngineJob:
    """A model, a budget, prompts, and how to draft."""

    model: Path
    memory: int
    groups: list[list[list[int]]]
    """Batches of prompts (token ids), run one after another by one engine."""
    max_tokens: int
    draft: str | None = None
    """Directory of a draft model, ``ngram``, or None: no speculation."""
    k: int = 4
    adaptive: bool = False
    ignore_eos: bool = True
    pause_every_s: float | None = None
    warm_up: list[list[int]] = field(default_factory=list)
    """Prompts run before the groups and not counted, so that the experts are in memory."""
    options: dict[str, Any] = field(default_factory=dict)
    """Further arguments of ``LLM``."""

    def command(self) -> list[str]:
        """Return the command line of the process that runs this job."""
        speculative: dict[str, Any] | None = None
        if self.draft is not None:
            model = {} if self.draft == "ngram" else {"model": self.draft}
            method = "ngram" if self.draft == "ngram" else "draft_model"
            speculative = {"method": method, "adaptive": self.adaptive, **model}
            speculative["num_speculative_tokens"] = self.k
        job = {
            "model": str(self.model),
            "memory": self.memory,
            "groups": self.groups,
            "max_tokens": self.max_tokens,
            "ignore_eos": self.ignore_eos,
            "pause_every_s": self.pause_every_s,
            "warm_up": self.warm_up,
            "speculative": speculative,
            "options": {"max_num_seqs": max(map(len, self.groups)), **self.options},
        }
        return [sys.executable, str(_PROCESS), json.dumps(job)]


@dataclass(frozen=True)
class EngineRun:
    """What a finished job measured.

    Prefill ends, and decode begins, with the step that gives the last prompt its first token.
    ``decode`` goes on to the very end, when the batch has shrunk to the slowest sequence; ``full``
    ends with the first sequence that finishes, so all of its steps have the whole batch.
    """

    process: Finished
    result: dict[str, Any]

    @property
    def decode_tok_s(self) -> float:
        """Tokens per second of decode, the shrinking batch at its end included."""
        return _rate(self.result["decode_tokens"], self.result["decode_s"])

    @property
    def full_tok_s(self) -> float | None:
        """Tokens per second while the whole batch decodes; None if it never did."""
        return _rate(self.result["full_tokens"], self.result["full_s"]) or None

    @property
    def prefill_tok_s(self) -> float:
        """Prompt tokens per second until all prompts are read; decodes ride on the same steps."""
        return _rate(self.result["prompt_tokens"], self.result["prefill_s"])

    @property
    def acceptance_rate(self) -> float | None:
        """Accepted per drafted token; None without speculation."""
        stats = self.result["stats"]
        return _rate(stats["accepted_tokens"], stats["drafted_tokens"]) or None

    def as_dict(self) -> dict[str, Any]:
        """Return the figures as plain data."""
        return {
            "decode_tok_s": self.decode_tok_s,
            "full_batch_tok_s": self.full_tok_s,
            "prefill_tok_s": self.prefill_tok_s,
            "acceptance_rate": self.acceptance_rate,
            "wall_s": self.process.wall_s,
            "read_bytes": self.process.read_bytes,
            "peak_rss_bytes": self.process.peak_rss_bytes,
            "cgroup_peak_bytes": self.process.cgroup_peak_bytes,
            "other_cores": self.process.other_cores,
            **{k: v for k, v in self.result.items() if k not in ("event", "policy")},
        }


def run_engine(job: EngineJob, limits: Limits) -> tuple[EngineRun | None, Finished]:
    """Run a job from a page cache as the limits say.

    Returns:
        The run, or None where ``Finished.failure`` says why there is none; and the process.
    """
    prepare_page_cache(limits, [job.model])
    process = run_measured(job.command(), limits)
    if process.failure is not None:
        return None, process
    return EngineRun(process, json.loads(process.stdout.splitlines()[-1])), process


def require_run(job: EngineJob, limits: Limits) -> EngineRun:
    """Run a job; leave the benchmark with the process's own words if it fails."""
    run, process = run_engine(job, limits)
    if run is None:
        raise SystemExit(f"SpecMoEOff failed, {process.failure}\n{process.stderr[-2000:]}")
    return run


def _rate(count: float, seconds: float) -> float:
    return count / seconds if seconds else 0.0
