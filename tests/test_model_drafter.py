"""The model drafter: whatever the target commits, it drafts as if it had read the tokens afresh."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from specmoeoff.offload.kv_cache import KvCache, KvSequence
from specmoeoff.sampling import SequenceSampler
from specmoeoff.sampling_params import SamplingParams
from specmoeoff.speculative.draft_context import OwnContexts, TargetContexts
from specmoeoff.speculative.drafter import DraftRequest, Proposal
from specmoeoff.speculative.model_drafter import ModelDrafter

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

VOCABULARY = 11
GREEDY = SamplingParams(temperature=0, max_tokens=100)


class CountingModel:
    """A model whose next token follows from all tokens before it; it reads them from its KV."""

    def __init__(self, max_pages: int = 64) -> None:
        self.kv = KvCache(1, 1, 1, max_pages, "float32", 4)
        self.passes: list[list[int]] = []
        self.num_rows = 0

    def run_tokens(
        self, rows: Sequence[tuple[KvSequence, Sequence[int], int]]
    ) -> NDArray[np.float32]:
        assert rows, "a pass without rows"
        keys, _ = self.kv.layer(0)
        hidden = []
        self.passes.append([len(token_ids) for _, token_ids, _ in rows])
        for kv, token_ids, num_outputs in rows:
            assert len(token_ids) > 0
            assert self.kv.pages_for(kv.length + len(token_ids)) <= len(kv.pages)
            for slot, token in zip(self.kv.append(kv, len(token_ids)), token_ids, strict=True):
                keys[slot // 4, 0, 0, slot % 4] = token
            self.num_rows += len(token_ids)
            read = [int(keys[kv.pages[i // 4], 0, 0, i % 4]) for i in range(kv.length)]
            assert num_outputs in (0, 1)
            hidden += [[float(next_token(read))]] * num_outputs
        return np.array(hidden, np.float32).reshape(-1, 1)

    def logits(self, hidden: NDArray[np.float32]) -> NDArray[np.float32]:
        assert 0 < len(hidden) <= 64
        return -np.abs(np.arange(VOCABULARY, dtype=np.float32)[None, :] - hidden)

    def best(self, hidden: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
        token_ids = hidden[:, 0].astype(np.int32)
        return np.zeros(len(hidden), np.float32), token_ids


def next_token(token_ids: Sequence[int]) -> int:
    value = 0
    for token in token_ids:
        value = (value * 7 + token + 1) % 10007
    return value % VOCABULARY


def continuation(token_ids: Sequence[int], count: int) -> list[int]:
    ids = list(token_ids)
    for _ in range(count):
        ids.append(next_token(ids))
    return ids[len(token_ids) :]


def own_contexts(
    model: CountingModel, max_model_len: int = 1000, max_rows: int = 512, **options: Any
) -> ModelDrafter:
    """Return a drafter whose model keeps what it has read in its own cache."""
    contexts = OwnContexts(model.kv, model.run_tokens, max_model_len, max_rows)
    return ModelDrafter(model, contexts, max_model_len, **options)


def request_of(
    key: int, token_ids: Sequence[int], k: int, params: SamplingParams = GREEDY
) -> DraftRequest:
    return DraftRequest(key, list(token_ids), k, SequenceSampler.create(params, list(token_ids)))


def drafted(drafter: ModelDrafter, *requests: DraftRequest) -> list[list[int]]:
    proposals = drafter.propose(requests)
    for proposal in proposals:
        assert len(proposal.token_ids) == len(proposal.distributions)
    return [proposal.token_ids for proposal in proposals]


TOKENS = st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=40)


@given(data=st.data(), max_rows=st.sampled_from([1, 3, 8, 512]))
@settings(max_examples=100)
def test_it_drafts_what_the_model_says_next(data: st.DataObject, max_rows: int) -> None:
    """Sequences come, are drafted for, get what a target makes of it, and go."""
    model = CountingModel(max_pages=200)
    drafter = own_contexts(model, max_rows=max_rows)
    sequences = {key: data.draw(TOKENS) for key in range(data.draw(st.integers(1, 4)))}
    for _ in range(data.draw(st.integers(1, 6))):
        action = data.draw(st.sampled_from(["propose", "propose", "prefill", "release"]))
        keys = data.draw(st.lists(st.sampled_from(sorted(sequences)), min_size=1, unique=True))
        if action == "release":
            drafter.release(keys[0])
        elif action == "prefill":
            upto = [data.draw(st.integers(1, len(sequences[key]))) for key in keys]
            drafter.prefill([request_of(key, sequences[key], 0) for key in keys], upto)
        else:
            ks = [data.draw(st.integers(0, 5)) for _ in keys]
            requests = [request_of(key, sequences[key], k) for key, k in zip(keys, ks, strict=True)]
            for key, k, tokens in zip(keys, ks, drafted(drafter, *requests), strict=True):
                assert tokens == continuation(sequences[key], k)
                accepted = data.draw(st.integers(0, k))
                own = data.draw(st.integers(0, VOCABULARY - 1))
                sequences[key] = sequences[key] + tokens[:accepted] + [own]
    for key in sequences:
        drafter.release(key)
    assert model.kv.num_used == 0


@given(data=st.data())
def test_in_the_targets_cache_it_reads_only_what_the_target_has_not(data: st.DataObject) -> None:
    """The target reads, has drafts made in its own pages, and goes on over them."""
    model = CountingModel(max_pages=400)
    drafter = ModelDrafter(model, TargetContexts(), 1000)
    sequences = {key: data.draw(TOKENS) for key in range(data.draw(st.integers(1, 4)))}
    caches = {key: KvSequence() for key in sequences}
    for _ in range(data.draw(st.integers(1, 5))):
        requests = []
        for key, ids in sequences.items():
            k = data.draw(st.integers(0, 5))
            kv = caches[key]
            assert model.kv.reserve(kv, len(ids) + k)
            model.kv.truncate(kv, min(kv.length, len(ids) - 1))
            if kv.length < len(ids) - 1:
                model.run_tokens([(kv, ids[kv.length : -1], 0)])
            requests.append(DraftRequest(key, ids, k, request_of(key, ids, k).sampler, kv))
        model.passes.clear()
        drafter.prefill(requests, [len(ids) for ids in sequences.values()])
        got = drafted(drafter, *requests)
        assert all(rows == 1 for each in model.passes for rows in each)
        assert len(model.passes) == max(request.num_tokens for request in requests)
        for request, tokens in zip(requests, got, strict=True):
            assert tokens == continuation(request.token_ids, request.num_tokens)
            assert request.kv.length == len(request.token_ids) - 1, "the target's own length"
            accepted = data.draw(st.integers(0, len(tokens)))
            own = data.draw(st.integers(0, VOCABULARY - 1))
            sequences[request.key] = [*request.token_ids, *tokens[:accepted], own]
            # The target's pass overwrites what was drafted.
            model.run_tokens([(request.kv, sequences[request.key][request.kv.length : -1], 0)])


def test_prompts_read_ahead_are_not_read_again() -> None:
    model = CountingModel()
    drafter = own_contexts(model)
    prompt = list(range(10)) * 3
    drafter.prefill([request_of(1, prompt, 0)], [20])
    drafter.prefill([request_of(1, prompt, 0)], [30])
    assert model.num_rows == 30
    prompt.append(5)  # the target's first token
    assert drafted(drafter, request_of(1, prompt, 3)) == [continuation(prompt, 3)]
    # The new token, and one more for each draft but the last.
    assert model.num_rows == 30 + 3


def test_an_accepted_draft_costs_two_rows_at_most() -> None:
    model = CountingModel()
    drafter = own_contexts(model)
    tokens = [1, 2, 3]
    for _ in range(5):
        (draft,) = drafted(drafter, request_of(1, tokens, 4))
        tokens += draft
        tokens.append(next_token(tokens))
        model.passes.clear()
    drafted(drafter, request_of(1, tokens, 4))
    assert model.passes == [[2], [1], [1], [1]]


def test_passes_are_bounded() -> None:
    model = CountingModel(max_pages=400)
    drafter = own_contexts(model, max_rows=16)
    requests = [request_of(key, [key % VOCABULARY] * 50, 0) for key in range(5)]
    drafter.prefill(requests, [50] * 5)
    assert max(sum(rows) for rows in model.passes) <= 16
    assert model.num_rows == 250


@pytest.mark.parametrize("params", [GREEDY, SamplingParams(temperature=0.0, logprobs=1)])
def test_many_sequences_never_have_all_logits_at_once(params: SamplingParams) -> None:
    model = CountingModel(max_pages=1000)
    drafter = own_contexts(model)
    sequences = [[key % VOCABULARY, key // VOCABULARY] for key in range(150)]
    got = drafted(drafter, *(request_of(i, ids, 2, params) for i, ids in enumerate(sequences)))
    assert got == [continuation(ids, 2) for ids in sequences]


def test_without_room_a_sequence_goes_undrafted() -> None:
    model = CountingModel(max_pages=6)
    drafter = own_contexts(model)
    long, short = [1] * 60, [2] * 8
    assert drafted(drafter, request_of(1, long, 3), request_of(2, short, 3)) == [
        [],
        continuation(short, 3),
    ]
    drafter.prefill([request_of(1, long, 0)], [60])
    drafter.release(2)
    assert model.kv.num_used == 0, "the long one was given nothing to keep"


@pytest.mark.parametrize(("length", "k", "count"), [(16, 4, 4), (17, 4, 0), (40, 1, 0), (19, 1, 1)])
def test_beyond_the_drafts_own_limit_nothing_is_drafted(length: int, k: int, count: int) -> None:
    drafter = own_contexts(CountingModel(), max_model_len=20)
    tokens = [1] * length
    drafter.prefill([request_of(1, tokens, 0)], [length])
    assert drafted(drafter, request_of(1, tokens, k)) == [continuation(tokens, count)]


def test_sampled_drafts_say_what_they_were_drawn_from() -> None:
    drafter = own_contexts(CountingModel())
    params = SamplingParams(temperature=1.5, seed=3, max_tokens=50)
    proposal: Proposal
    (proposal,) = drafter.propose([request_of(1, [1, 2], 5, params)])
    ids = [1, 2]
    for token, distribution in zip(proposal.token_ids, proposal.distributions, strict=True):
        assert distribution is not None
        wanted = np.exp(-np.abs(np.arange(VOCABULARY) - next_token(ids)) / 1.5)
        np.testing.assert_allclose(distribution.dense(VOCABULARY), wanted / wanted.sum(), rtol=1e-5)
        ids.append(token)


def test_a_fork_leaves_the_sequences_own_tokens_alone() -> None:
    drafter = own_contexts(CountingModel())
    params = SamplingParams(temperature=0, frequency_penalty=2.0, max_tokens=50)
    request = request_of(1, [1, 2], 6, params)
    drafted(drafter, request)
    assert request.sampler.context.num_output_tokens == 0
    assert request.sampler.context.output_counts == {}


@pytest.mark.parametrize("rows", [0, 1, 5, 12])
def test_distributions_are_bounded(rows: int) -> None:
    limit = rows * 4 * VOCABULARY
    drafter = own_contexts(CountingModel(), max_distribution_bytes=limit)
    params = SamplingParams(temperature=1.0, seed=3, max_tokens=50)
    requests = [request_of(key, [key, 2], 4, params) for key in range(3)]
    requests.append(request_of(9, [4, 4], 4))
    proposals = drafter.propose(requests)
    held = sum(d.nbytes for p in proposals for d in p.distributions if d is not None)
    assert held == limit
    assert proposals[3].token_ids == continuation([4, 4], 4), "greedy drafts hold none"
    # And what was cut short goes on correctly afterwards.
    again: Any = request_of(0, [0, 2, *proposals[0].token_ids], 3)
    assert drafted(drafter, again) == [continuation(again.token_ids, 3)]
