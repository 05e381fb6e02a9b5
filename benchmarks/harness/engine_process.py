"""Runs SpecMoEOff on one job in this process and prints what it measured, as lines of JSON.

Started by engine_job.py, never imported: the process holds the engine and nothing else, so its
peak memory is the engine's. The job is the JSON in the first argument. With ``pause_every_s`` it
prints a ``pause`` line that often and goes on when a line arrives on standard input.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from dataclasses import dataclass, field
from typing import Any

from specmoeoff import LLM, SamplingParams, SpeculativeConfig


@dataclass
class Step:
    """One engine step that returned tokens."""

    at: float
    num_steps: int
    """Steps of the engine so far, this one included."""
    streamed_bytes: int
    busy_s: float
    """Seconds in which something was being read, so far."""
    wanted_experts: int
    num_tokens: int = 0
    first_tokens: int = 0
    """Sequences that got their first token here."""
    finished: int = 0


@dataclass
class Totals:
    """Sums over the groups of prompts; the windows are described in engine_job.EngineRun."""

    prompt_tokens: int = 0
    prefill_s: float = 0.0
    decode_tokens: int = 0
    decode_s: float = 0.0
    decode_steps: int = 0
    decode_bytes: int = 0
    decode_busy_s: float = 0.0
    decode_wanted_experts: int = 0
    full_tokens: int = 0
    full_s: float = 0.0
    token_ids: list[list[int]] = field(default_factory=list)

    def add(self, prompts: list[list[int]], start: float, steps: list[Step]) -> None:
        """Add one group: everything before all prompts are read is prefill, the rest decode."""
        seen, last_first = 0, 0
        for index, step in enumerate(steps):
            seen += step.first_tokens
            if step.first_tokens:
                last_first = index
        if seen != len(prompts):
            raise RuntimeError(f"{len(prompts) - seen} of {len(prompts)} prompts gave no token")
        begin, end = steps[last_first], steps[-1]
        decode = steps[last_first + 1 :]
        self.prompt_tokens += sum(map(len, prompts))
        self.prefill_s += begin.at - start
        self.decode_tokens += sum(step.num_tokens for step in decode)
        self.decode_s += end.at - begin.at
        self.decode_steps += end.num_steps - begin.num_steps
        self.decode_bytes += end.streamed_bytes - begin.streamed_bytes
        self.decode_busy_s += end.busy_s - begin.busy_s
        self.decode_wanted_experts += end.wanted_experts - begin.wanted_experts
        full = decode[: next((i + 1 for i, step in enumerate(decode) if step.finished), 0)]
        if full and not any(step.finished for step in steps[: last_first + 1]):
            self.full_tokens += sum(step.num_tokens for step in full)
            self.full_s += full[-1].at - begin.at


class Pauses:
    """Stops the job every so often, and counts what the engine did in between."""

    def __init__(self, llm: LLM, every_s: float | None) -> None:
        self._llm = llm
        self._every_s = every_s
        self._start()

    def check(self) -> float:
        """Pause if it is time to; return the seconds that were paused."""
        now = time.monotonic()
        if self._every_s is None or now - self._since < self._every_s:
            return 0.0
        stats = self._llm.stats()
        segment = {
            "event": "pause",
            "wall_s": now - self._since,
            "streamed_bytes": stats.streamed_bytes - self._bytes,
            "busy_s": stats.streamed_s - self._busy_s,
            "stalled_s": stats.stalled_s - self._stalled_s,
            "decode_tokens": stats.decode_tokens - self._tokens,
            "prefill_tokens": stats.prefill_tokens - self._prefill_tokens,
            "steps": stats.steps - self._steps,
        }
        print(json.dumps(segment), flush=True)
        sys.stdin.readline()
        self._start()
        return time.monotonic() - now

    def _start(self) -> None:
        stats = self._llm.stats()
        self._since = time.monotonic()
        self._bytes, self._busy_s = stats.streamed_bytes, stats.streamed_s
        self._stalled_s, self._steps = stats.stalled_s, stats.steps
        self._tokens, self._prefill_tokens = stats.decode_tokens, stats.prefill_tokens


def main() -> None:
    """Run the job."""
    job: dict[str, Any] = json.loads(sys.argv[1])
    begin = time.monotonic()
    with _open(job) as llm:
        opened_s = time.monotonic() - begin
        params = SamplingParams(
            temperature=0.0, max_tokens=job["max_tokens"], ignore_eos=job["ignore_eos"]
        )
        if job["warm_up"]:
            _run(llm, job["warm_up"], params, Pauses(llm, None))
        pauses = Pauses(llm, job.get("pause_every_s"))
        totals = Totals()
        for group in job["groups"]:
            start = time.monotonic()
            steps, token_ids = _run(llm, group, params, pauses)
            totals.add(group, start, steps)
            totals.token_ids += token_ids
        result = {
            "event": "done",
            "open_s": opened_s,
            **{k: v for k, v in vars(totals).items() if k != "token_ids"},
            "tokens_sha256": hashlib.sha256(json.dumps(totals.token_ids).encode()).hexdigest(),
            "stats": llm.stats().as_dict(),
            "policy": llm.policy.as_dict(),
        }
        print(json.dumps(result), flush=True)


def _open(job: dict[str, Any]) -> LLM:
    speculative = job["speculative"]
    return LLM(
        job["model"],
        memory=job["memory"],
        speculative_config=SpeculativeConfig(**speculative) if speculative else None,
        **job["options"],
    )


def _run(
    llm: LLM, prompts: list[list[int]], params: SamplingParams, pauses: Pauses
) -> tuple[list[Step], list[list[int]]]:
    """Generate for one group of prompts; times leave the pauses out."""
    steps: list[Step] = []
    token_ids: list[list[int]] = [[] for _ in prompts]
    paused_s = 0.0
    requests = [{"prompt_token_ids": prompt} for prompt in prompts]
    for increment in llm.generate_stream(requests, params):
        if increment.error is not None:
            raise RuntimeError(f"prompt {increment.request_id}: {increment.error}")
        stats = llm.stats()
        if not steps or steps[-1].num_steps != stats.steps:
            paused_s += pauses.check()
            now = time.monotonic() - paused_s
            steps.append(
                Step(
                    now,
                    stats.steps,
                    stats.streamed_bytes,
                    stats.streamed_s,
                    stats.wanted_experts,
                )
            )
        output, step = increment.outputs[0], steps[-1]
        so_far = token_ids[int(increment.request_id)]
        step.first_tokens += not so_far
        step.num_tokens += len(output.token_ids)
        step.finished += increment.finished
        so_far += output.token_ids
    return steps, token_ids


if __name__ == "__main__":
    main()
