"""Random work for an engine in rounds, and what must not grow from round to round.

In a round requests arrive at random, more than run at once; some are aborted, and where the KV
cache is small some are preempted. Then all that is left is let finish, and one last request, always
the same, leaves the engine as the round before left it. What it holds then is the round's sample.
"""

from __future__ import annotations

import gc
import statistics
import threading
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from specmoeoff.engine.memory_plan import resident_bytes
from specmoeoff.sampling_params import SamplingParams

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from specmoeoff.engine.engine import Engine
    from specmoeoff.engine.sequence import Request

ABORTED = 0.05
"""Chance of an abort in a step."""
QUEUE = 2
"""Requests that are open at most, times the sequences that run at once."""
WARM_UP = 0.25
"""Share of the samples that come before anything is compared."""


@dataclass(frozen=True)
class Sample:
    """What an engine holds when it has nothing to do."""

    resident_bytes: int
    descriptors: int
    threads: int
    reserved_bytes: int
    """Of all tiers."""
    kv_pages: int
    missing_slots: int
    """Expert slots fewer than there were at first: they shrink when KV pages are lost."""


class Soak:
    """An engine, and who asks it for random things.

    Args:
        engine: Nobody else may use it.
        vocab_size: Token ids are drawn below it.
        longest: Tokens of the longest prompt, and most tokens of an output.
        seed: Of all that is random.
    """

    def __init__(self, engine: Engine, vocab_size: int, longest: int, seed: int = 0) -> None:
        self.engine = engine
        self.num_aborted = 0
        self._vocab_size = vocab_size
        self._longest = longest
        self._rng = np.random.default_rng(seed)
        self._num_requests = 0
        self._open: list[Request] = []
        self._slots: int | None = None

    @property
    def num_steps(self) -> int:
        """Steps that were run."""
        return self.engine.stats().steps

    def round(self, num_steps: int) -> Sample:
        """Run so many busy steps, let everything end, and return what is held then."""
        for _ in range(num_steps):
            self._arrive()
            self._abort()
            self._step()
        self._finish()
        self._add([1, 2, 3], SamplingParams(temperature=0.0, max_tokens=1))
        self._finish()
        return self._sample()

    def _arrive(self) -> None:
        room = QUEUE * self.engine.policy.max_num_seqs - len(self._open)
        for _ in range(min(room, int(self._rng.poisson(1.0)))):
            self._add(self._prompt(), self._params())

    def _abort(self) -> None:
        if self._open and self._rng.random() < ABORTED:
            self.engine.abort(self._open.pop(int(self._rng.integers(len(self._open)))))
            self.num_aborted += 1

    def _finish(self) -> None:
        while self._open:
            self._step()

    def _step(self) -> None:
        if self.engine.has_work:
            self.engine.step()
        self._open = [request for request in self._open if not request.is_finished]

    def _add(self, token_ids: list[int], params: SamplingParams) -> None:
        self._num_requests += 1
        self._open.append(self.engine.add_request(str(self._num_requests), token_ids, params))

    def _prompt(self) -> list[int]:
        """Return a few tokens over and over, so that n-grams are found."""
        period, length = self._rng.integers(1, self._longest + 1, 2)
        tokens = self._rng.integers(0, self._vocab_size, int(period))
        return [int(token) for token in np.resize(tokens, int(length))]

    def _params(self) -> SamplingParams:
        rng = self._rng
        temperature = float(rng.choice([0.0, 0.0, 0.8]))
        return SamplingParams(
            temperature=temperature,
            top_p=float(rng.choice([0.9, 1.0])),
            repetition_penalty=float(rng.choice([1.0, 1.1])),
            logprobs=2 if rng.random() < 0.2 else None,
            n=2 if temperature and rng.random() < 0.3 else 1,
            seed=int(rng.integers(1 << 30)),
            max_tokens=int(rng.integers(1, self._longest + 1)),
            ignore_eos=True,
        )

    def _sample(self) -> Sample:
        gc.collect()
        stats = self.engine.stats()
        if self._slots is None:
            self._slots = stats.expert_slots
        return Sample(
            resident_bytes=resident_bytes(),
            descriptors=len(list(Path("/proc/self/fd").iterdir())),
            threads=threading.active_count(),
            reserved_bytes=sum(use.reserved for use in stats.tiers.values()),
            kv_pages=stats.kv_pages,
            missing_slots=self._slots - stats.expert_slots,
        )


def thirds(samples: Sequence[Sample]) -> dict[str, tuple[float, float]]:
    """Return each figure's median over the first and the last third, after the warm-up.

    Raises:
        ValueError: There are fewer than three samples after it.
    """
    warm = [asdict(sample) for sample in samples[int(WARM_UP * len(samples)) :]]
    third = len(warm) // 3
    if not third:
        raise ValueError(f"{len(samples)} samples are too few to compare")
    return {
        name: (
            statistics.median(sample[name] for sample in warm[:third]),
            statistics.median(sample[name] for sample in warm[-third:]),
        )
        for name in warm[0]
    }


def grown(
    medians: Mapping[str, tuple[float, float]], slack_bytes: int
) -> dict[str, tuple[float, float]]:
    """Return what rose; resident memory may by ``slack_bytes``, which allocators need."""
    slack = {"resident_bytes": slack_bytes}
    return {
        name: (first, last)
        for name, (first, last) in medians.items()
        if last > first + slack.get(name, 0)
    }
