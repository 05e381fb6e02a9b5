"""Greedy tokens and log-probabilities equal Transformers' in float32, on models of odd shapes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from specmoeoff import LLM, SamplingParams, SpeculativeConfig
from tiny import EOS_TOKEN_ID, write_draft, write_tiny

if TYPE_CHECKING:
    from pathlib import Path

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

NEW_TOKENS = 64
LENGTHS = (1, 5, 33, 70)
MODELS: dict[str, dict[str, Any]] = {
    "mixtral": {},
    "mixtral-tied": {"tie_word_embeddings": True, "seed": 7},
    "mixtral-window": {"sliding_window": 16, "seed": 8},
    "mixtral-one-layer": {"num_hidden_layers": 1, "vocab_size": 1003, "seed": 9},
    "mixtral-float32": {"dtype": "float32", "sharded": True, "seed": 10},
    "mixtral-float16": {"dtype": "float16", "num_key_value_heads": 6, "seed": 11},
    "llama": {"model_type": "llama", "seed": 12},
    "llama-tied": {"model_type": "llama", "tie_word_embeddings": True, "seed": 13},
    "mistral": {"model_type": "mistral", "sliding_window": 16, "seed": 14},
}


@pytest.fixture(scope="module", params=sorted(MODELS))
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("hf") / request.param, **MODELS[request.param])


@pytest.fixture(scope="module")
def oracle(checkpoint: Path) -> Any:
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    return model.eval()


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    rng = np.random.default_rng(3)
    return [rng.integers(0, 250, length).tolist() for length in LENGTHS]


def check_greedy(oracle: Any, prompt: list[int], output: list[int]) -> None:
    """Check that every token is the oracle's choice after those before it, and no near tie.

    One pass over the whole is what generating token by token gives, by induction.
    """
    with torch.no_grad():
        logits = oracle(torch.tensor([prompt + output])).logits[0, len(prompt) - 1 : -1]
    best = logits.topk(2).values
    assert (best[:, 0] - best[:, 1]).min() > 1e-4, "a near tie: choose another seed"
    assert logits.argmax(-1).tolist() == output
    assert len(output) == NEW_TOKENS or output[-1] == EOS_TOKEN_ID


@pytest.mark.parametrize("speculates", [False, True])
def test_greedy_tokens(
    checkpoint: Path, oracle: Any, prompts: list[list[int]], speculates: bool, tmp_path: Path
) -> None:
    speculative = None
    if speculates:
        draft = write_draft(checkpoint, tmp_path / "draft", noise=0.1)
        speculative = SpeculativeConfig(model=str(draft), num_speculative_tokens=3)
    with LLM(
        str(checkpoint), memory="4GiB", kv_dtype="float32", speculative_config=speculative
    ) as llm:
        outputs = llm.generate(
            [{"prompt_token_ids": prompt} for prompt in prompts],
            SamplingParams(temperature=0, max_tokens=NEW_TOKENS),
        )
    for prompt, output in zip(prompts, outputs, strict=True):
        token_ids = output.outputs[0].token_ids
        check_greedy(oracle, prompt, token_ids)
        ended = token_ids[-1] == EOS_TOKEN_ID
        assert output.outputs[0].finish_reason == ("stop" if ended else "length")


def test_logprobs(checkpoint: Path, oracle: Any, prompts: list[list[int]]) -> None:
    prompt = prompts[-1]
    with LLM(str(checkpoint), memory="4GiB", kv_dtype="float32", max_num_batched_tokens=32) as llm:
        (output,) = llm.generate(
            {"prompt_token_ids": prompt},
            SamplingParams(temperature=0, max_tokens=4, logprobs=5, prompt_logprobs=-1),
        )
    completion = output.outputs[0]
    whole = prompt + completion.token_ids
    with torch.no_grad():
        wanted = oracle(torch.tensor([whole])).logits[0].log_softmax(-1).numpy()
    assert output.prompt_logprobs is not None
    assert output.prompt_logprobs[0] is None
    assert len(output.prompt_logprobs) == len(prompt)
    for position, ranked in enumerate(output.prompt_logprobs[1:], 1):
        assert ranked is not None
        row = wanted[position - 1]
        assert len(ranked) == len(row)
        got = np.array([ranked[token_id].logprob for token_id in range(len(row))])
        np.testing.assert_allclose(got, row, atol=2e-4)
        assert ranked[int(row.argmax())].rank == 1
    assert completion.logprobs is not None
    total = 0.0
    for position, ranked in enumerate(completion.logprobs, len(prompt)):
        row = wanted[position - 1]
        chosen = whole[position]
        assert chosen in ranked
        assert len(ranked) == 5
        for token_id, logprob in ranked.items():
            assert abs(logprob.logprob - row[token_id]) < 2e-4
        total += ranked[chosen].logprob
    assert completion.cumulative_logprob == pytest.approx(total)
