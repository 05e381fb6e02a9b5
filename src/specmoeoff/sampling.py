"""From one row of logits to a distribution, a token and its log-probability.

Target and draft go through the same functions, so every filter applies to both alike and
rejection sampling compares like with like. The steps and their order are vLLM's: minimum length,
penalties, temperature, min_p, top_k, top_p. Greedy requests need the first two only.

Knows one sequence at a time and nothing of models, text or batches: a sequence draws from a
generator of its own, so company never changes its tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from specmoeoff.errors import CheckpointError
from specmoeoff.outputs import Logprob
from specmoeoff.penalties import TokenContext, adjust

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from specmoeoff.sampling_params import SamplingParams

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
I32 = NDArray[np.int32]

_DRAW_BLOCK = 512
_BIN_SHIFT = 18
"""Float32 bits dropped by top_p's histogram: 32 bins per power of two."""


@dataclass(frozen=True, eq=False)
class Distribution:
    """Probabilities over the vocabulary, stored only for the tokens that the filters left."""

    token_ids: I32 | None
    """The tokens left, [M], ascending; None means all of them (M = V)."""
    weights: F32
    """Relative probabilities, [M]; the likeliest token has 1."""
    total: float
    """Sum of the weights, in float64."""

    @property
    def nbytes(self) -> int:
        """Bytes held: 4 V without filters, 8 M with them."""
        return self.weights.nbytes + (0 if self.token_ids is None else self.token_ids.nbytes)

    def probabilities(self) -> F64:
        """Return the probabilities of the tokens left, [M]."""
        return self.weights.astype(np.float64) / self.total

    def probability(self, token_id: int) -> float:
        """Return the probability of one token of the vocabulary, zero if it was filtered out."""
        index = token_id
        if self.token_ids is not None:
            index = int(np.searchsorted(self.token_ids, token_id))
            if index == len(self.token_ids) or self.token_ids[index] != token_id:
                return 0.0
        return float(self.weights[index]) / self.total

    def dense(self, vocab_size: int) -> F64:
        """Return the probabilities of the whole vocabulary, [V]."""
        if self.token_ids is None:
            return self.probabilities()
        dense = np.zeros(vocab_size)
        dense[self.token_ids] = self.probabilities()
        return dense

    def draw(self, rng: np.random.Generator) -> int:
        """Draw one token with one uniform number."""
        index = draw_index(self.weights, rng)
        return index if self.token_ids is None else int(self.token_ids[index])


def draw_index(weights: F32 | F64, rng: np.random.Generator) -> int:
    """Draw an index with probability proportional to its weight; never one whose weight is zero."""
    # A running sum over a vocabulary is slow, so first a block is found, then the place in it.
    starts = np.arange(0, len(weights), _DRAW_BLOCK)
    ends = np.cumsum(np.add.reduceat(weights, starts, dtype=np.float64))
    # random() < 1, so the product rounds to less than the total and the search ends inside.
    point = rng.random() * ends[-1]
    block = int(np.searchsorted(ends, point, side="right"))
    point -= ends[block - 1] if block else 0.0
    start = int(starts[block])
    inside = np.cumsum(weights[start : start + _DRAW_BLOCK], dtype=np.float64)
    # The block's sum may differ from its running sum in the last bit: stay before its end.
    point = min(point, np.nextafter(inside[-1], 0.0))
    return start + int(np.searchsorted(inside, point, side="right"))


def greedy_token(logits: F32, params: SamplingParams, context: TokenContext) -> int:
    """Return the likeliest token of a row of logits, [V]: the lowest id among equals."""
    row = adjust(logits, params, context)
    token_id = int(np.argmax(row))
    _require_finite(float(row[token_id]), context)
    return token_id


def probabilities(logits: F32, params: SamplingParams, context: TokenContext) -> Distribution:
    """Return what a row of logits, [V], says of the next token, all filters applied.

    Tokens that tie with the last one that top_k keeps are kept too; among equals top_p takes the
    lower ids first.

    Raises:
        CheckpointError: The logits are NaN, infinite, or all masked.
    """
    row = adjust(logits, params, context)
    top = row.max()
    _require_finite(float(top), context)
    token_ids: I32 | None = None
    if 0 < params.top_k < len(row):
        token_ids = np.flatnonzero(row >= _kth_largest(row, params.top_k)).astype(np.int32)
        row = row[token_ids]
    weights = row - top
    weights *= np.float32(1.0 / max(params.temperature, 1e-5))
    np.exp(weights, out=weights)
    if params.min_p > 0.0:
        # The likeliest token's weight is 1, so the weight is the share that min_p speaks of.
        kept = np.flatnonzero(weights >= np.float32(params.min_p))
        token_ids, weights = _select(token_ids, weights, kept)
    if params.top_p < 1.0:
        token_ids, weights = _select(token_ids, weights, _nucleus(weights, params.top_p))
    return Distribution(token_ids, weights, float(weights.sum(dtype=np.float64)))


def _select(token_ids: I32 | None, weights: F32, kept: NDArray[np.intp]) -> tuple[I32, F32]:
    ids = kept.astype(np.int32) if token_ids is None else token_ids[kept]
    return ids, weights[kept]


def _kth_largest(values: F32, k: int) -> np.float32:
    return np.float32(np.partition(values, len(values) - k)[len(values) - k])


def _nucleus(weights: F32, top_p: float) -> NDArray[np.intp]:
    """Return the indices, ascending, of the fewest largest weights whose share reaches top_p."""
    # Sorting a vocabulary costs more than all the rest. The leading bits of positive floats are
    # in the order of the floats, so a histogram over them finds the few weights to sort.
    bins = weights.view(np.uint32) >> _BIN_SHIFT
    masses = np.cumsum(np.bincount(bins, weights=weights)[::-1])
    wanted = top_p * masses[-1]
    num_above = int(np.searchsorted(masses, wanted, side="left"))
    wanted -= masses[num_above - 1] if num_above else 0.0
    last_bin = len(masses) - 1 - num_above
    band = np.flatnonzero(bins == last_bin)
    order = band[np.argsort(-weights[band], kind="stable")]
    # A token stays while what comes before it falls short.
    before = np.cumsum(weights[order], dtype=np.float64)[:-1]
    num_kept = 1 + int(np.searchsorted(before, wanted, side="left"))
    return np.sort(np.concatenate([np.flatnonzero(bins > last_bin), order[:num_kept]]))


def _require_finite(top: float, context: TokenContext) -> None:
    if not np.isfinite(top):
        raise CheckpointError(
            f"the logits of output token {context.num_output_tokens} have no usable maximum "
            f"({top}): a weight of the checkpoint is NaN or infinite, or every token is masked"
        )


def logprobs(
    logits: F32, token_id: int, num_top: int, decode: Callable[[int], str] | None = None
) -> dict[int, Logprob]:
    """Return the log-probabilities of a token and of the likeliest ones.

    Args:
        logits: The model's own row, [V], before any penalty or filter.
        token_id: The token that was chosen; it comes first.
        num_top: How many of the likeliest to add; -1 means all.
        decode: Gives each token's text, if wanted.
    """
    top = logits.max()
    log_total = float(np.log(np.exp(logits - top).sum(dtype=np.float64)))
    num_top = len(logits) if num_top < 0 else min(num_top, len(logits))
    ranks = {token_id: _rank(logits, token_id)}
    ranks |= {other: rank for rank, other in enumerate(_likeliest(logits, num_top), 1)}
    return {
        each: Logprob(
            logprob=float(logits[each]) - float(top) - log_total,
            rank=rank,
            decoded_token=decode(each) if decode else None,
        )
        for each, rank in ranks.items()
    }


def _likeliest(logits: F32, count: int) -> list[int]:
    if count == 0:
        return []
    ids = np.flatnonzero(logits >= _kth_largest(logits, count))
    order: list[int] = ids[np.argsort(-logits[ids], kind="stable")][:count].tolist()
    return order


def _rank(logits: F32, token_id: int) -> int:
    """Return the place of a token, from 1; equals are ranked by id, as greedy chooses them."""
    value = logits[token_id]
    higher = np.count_nonzero(logits > value)
    return 1 + int(higher) + int(np.count_nonzero(logits[:token_id] == value))


def generator(seed: int, *stream: int) -> np.random.Generator:
    """Return the generator of one stream (a sample of a request, say) of a seed."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(seed, spawn_key=stream)))


@dataclass
class SequenceSampler:
    """Chooses the tokens of one sequence: its parameters, generator and tokens so far.

    The engine asks for a choice per row of logits and reports every token that joins the output.
    """

    params: SamplingParams
    rng: np.random.Generator
    context: TokenContext

    @classmethod
    def create(
        cls,
        params: SamplingParams,
        prompt_token_ids: Sequence[int],
        *,
        eos_token_ids: Iterable[int] = (),
        default_seed: tuple[int, ...] = (0,),
        sample_index: int = 0,
    ) -> SequenceSampler:
        """Make the sampler of one sample of a request.

        Args:
            params: What the request asks for.
            prompt_token_ids: The prompt, read once.
            eos_token_ids: The model's end-of-sequence tokens.
            default_seed: Numbers that tell this request from others, used if it sets no seed.
            sample_index: Which of the request's ``n`` samples this is.
        """
        seed = default_seed if params.seed is None else (int(params.seed),)
        prompt_ids = prompt_token_ids if params.repetition_penalty != 1.0 else ()
        end_ids = {*eos_token_ids, *(params.stop_token_ids or ())} if params.min_tokens else ()
        return cls(
            params,
            generator(*seed, sample_index),
            TokenContext(
                np.unique(np.asarray(prompt_ids, np.int32)),
                np.array(sorted(end_ids), np.int32),
            ),
        )

    @property
    def greedy(self) -> bool:
        """Whether choices are certain, so that no distribution is ever needed."""
        return self.params.greedy

    @property
    def takes_best(self) -> bool:
        """Whether the largest logit decides and no other is looked at; once true it stays so."""
        params = self.params
        plain = params.greedy and not params.has_penalties and params.logprobs is None
        return plain and self.context.num_output_tokens >= params.min_tokens

    def take_best(self, logit: float, token_id: int) -> int:
        """Choose the token of the largest logit of a row; for who ``takes_best``."""
        _require_finite(logit, self.context)
        return token_id

    def choose(self, logits: F32) -> int:
        """Choose the next token from a row of logits, [V]: the likeliest, or one draw."""
        if self.greedy:
            return greedy_token(logits, self.params, self.context)
        return self.distribution(logits).draw(self.rng)

    def distribution(self, logits: F32) -> Distribution:
        """Return what a row of logits, [V], says of the next token."""
        return probabilities(logits, self.params, self.context)

    def observe(self, token_id: int) -> None:
        """Report a token that joined the output."""
        self.context.observe(token_id)

    def fork(self) -> SequenceSampler:
        """Return a sampler for drafting ahead: its own tokens, the same generator."""
        # Counts matter to penalties only; without them a fork copies nothing that grows.
        counts = dict(self.context.output_counts) if self.params.has_penalties else {}
        return replace(self, context=replace(self.context, output_counts=counts))

    def draw(self, logits: F32) -> tuple[int, Distribution | None]:
        """Choose a draft token from the draft's row, [V], and say what it was drawn from.

        The distribution is None if greedy. Drafters call this on a fork, and observe there.
        """
        if self.greedy:
            return self.choose(logits), None
        distribution = self.distribution(logits)
        return distribution.draw(self.rng), distribution
