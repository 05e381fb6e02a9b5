"""The demo model beside Transformers in float32: greedy tokens of real prompts, one by one.

Transformers reads the prompt and our tokens in one pass (teacher-forced) and must choose each of
our tokens itself. Both sides hold the same bfloat16 weights and float32 activations, and our KV
cache is float32 too. A row per prompt, one line of JSON; exit code 1 if any token differs.
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from specmoeoff import LLM, SamplingParams
from specmoeoff.demo import load_prompts


def main() -> int:
    """Compare and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", required=True, help="directory of the demo's target")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--max-tokens", type=int, default=64)
    options = parser.parse_args()
    ours = _our_tokens(options)
    model = AutoModelForCausalLM.from_pretrained(options.target, dtype=torch.float32).eval()
    rows = [_compare(model, prompt, tokens) for prompt, tokens in ours]
    for index, row in enumerate(rows):
        print(f"prompt {index}: {row['different']} of {row['tokens']} tokens differ; "
              f"closest call {row['smallest_gap']:.4f} logits")  # fmt: skip
    print(json.dumps({"benchmark": "equality", "rows": rows}))
    return int(any(row["different"] for row in rows))


def _our_tokens(options: argparse.Namespace) -> list[tuple[list[int], list[int]]]:
    params = SamplingParams(temperature=0.0, max_tokens=options.max_tokens, ignore_eos=True)
    with LLM(options.target, kv_dtype="float32") as llm:
        outputs = llm.chat(load_prompts(options.prompts), params)
    return [(output.prompt_token_ids, output.outputs[0].token_ids) for output in outputs]


@torch.no_grad()
def _compare(model: Any, prompt: list[int], tokens: list[int]) -> dict[str, Any]:
    logits = model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
    best = logits.topk(2).values
    return {
        "tokens": len(tokens),
        "different": int((logits.argmax(-1) != torch.tensor(tokens)).sum()),
        "smallest_gap": float((best[:, 0] - best[:, 1]).min()),
    }


if __name__ == "__main__":
    sys.exit(main())
