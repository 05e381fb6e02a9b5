"""Complete a few prompts under a memory budget, without and with a draft model.

    python examples/generate.py TARGET_DIR DRAFT_DIR 1GiB

`specmoeoff demo --build DIR` makes such a pair: DIR/target and DIR/draft.
"""

import sys

from specmoeoff import LLM, SamplingParams, SpeculativeConfig

PROMPTS = ["The capital of France is", "Once upon a time, in a small village by the sea,"]


def main(target: str, draft: str, memory: str) -> None:
    """Generate twice and show that the tokens are the same."""
    params = SamplingParams(temperature=0.0, max_tokens=48)
    tokens = []
    for speculative in (None, SpeculativeConfig(model=draft, num_speculative_tokens=4)):
        with LLM(target, memory=memory, speculative_config=speculative) as llm:
            outputs = llm.generate(PROMPTS, params)
            stats = llm.stats()
        tokens.append([output.outputs[0].token_ids for output in outputs])
        for output in outputs:
            print(repr(output.prompt), "->", repr(output.outputs[0].text))
        print(
            f"{stats.decode_tokens_per_s:.1f} tokens/s, "
            f"{stats.mean_acceptance_length:.2f} tokens per verification, "
            f"{stats.streamed_bytes / 1e9:.2f} GB streamed\n"
        )
    print("identical:", tokens[0] == tokens[1])


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    main(*sys.argv[1:])
