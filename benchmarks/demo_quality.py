"""How often the demo's drafts agree with its target, and how evenly its routers spread the load.

    python benchmarks/demo_quality.py DIR/target DIR/draft [OTHER/draft ...] [--prompts 16]

Runs with Transformers in float32 (greedy, at most 64 tokens per prompt, teacher-forced drafts), so
it says what the checkpoints are, whatever our engine does with them. Ends in one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from specmoeoff.demo import load_prompts

TOP_K = 2


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("target")
    parser.add_argument("drafts", nargs="*")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--max-tokens", type=int, default=64)
    options = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(options.target)
    target = load(options.target)
    drafts = {path: load(path) for path in options.drafts}
    agreed = dict.fromkeys(drafts, 0)
    logits: list[torch.Tensor] = []
    for layer in target.model.layers:
        layer.mlp.gate.register_forward_hook(
            lambda gate, inputs, _: logits.append(inputs[0].flatten(0, -2) @ gate.weight.T)
        )
    num_tokens = 0
    routing: list[dict[str, torch.Tensor]] = []
    for messages in load_prompts(options.prompts):
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        prompt = tokenizer(text, return_tensors="pt").input_ids
        with torch.no_grad():
            whole = target.generate(
                prompt, max_new_tokens=options.max_tokens, do_sample=False, pad_token_id=2
            )
            logits.clear()
            target(whole)
            for path, draft in drafts.items():
                guesses = draft(whole).logits[0, prompt.shape[1] - 1 : -1].argmax(-1)
                agreed[path] += int((guesses == whole[0, prompt.shape[1] :]).sum())
        num_tokens += whole.shape[1] - prompt.shape[1]
        print(
            f"{num_tokens} tokens", {k: v / num_tokens for k, v in agreed.items()}, file=sys.stderr
        )
        routing.append(routes(torch.stack(logits)[:, prompt.shape[1] :]))
    figures: dict[str, Any] = {"tokens": num_tokens, **summary(routing)}
    figures["alpha"] = {path: round(count / num_tokens, 4) for path, count in agreed.items()}
    for name, value in figures.items():
        print(f"{name:28} {value}")
    print(json.dumps(figures))


def load(path: str) -> Any:
    """Return a checkpoint as a float32 model."""
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def routes(logits: torch.Tensor) -> dict[str, torch.Tensor]:
    """Say where generated tokens go: router logits [layers, T, E]."""
    best = logits.topk(TOP_K, dim=-1)
    chosen = torch.zeros_like(logits).scatter_(-1, best.indices, 1.0)
    return {
        "load": chosen.sum(1),
        "first_weight": best.values.softmax(-1)[..., 0].mean(),
        "reuse": (chosen[:, 1:] * chosen[:, :-1]).sum(-1).mean() / TOP_K,
    }


def summary(routing: list[dict[str, torch.Tensor]]) -> dict[str, float]:
    """Average over layers and prompts; loads are in shares of an even load."""
    share = torch.stack([part["load"] for part in routing]).sum(0)
    share = share / share.sum(-1, keepdim=True)
    num_experts = share.shape[-1]
    entropy = torch.special.entr(share).sum(-1) / torch.tensor(float(num_experts)).log()
    heaviest = share.max(-1).values * num_experts
    return {
        "load_entropy": round(float(entropy.mean()), 4),
        "load_entropy_worst_layer": round(float(entropy.min()), 4),
        "heaviest_load": round(float(heaviest.mean()), 3),
        "heaviest_load_worst_layer": round(float(heaviest.max()), 3),
        "first_expert_weight": round(
            sum(float(p["first_weight"]) for p in routing) / len(routing), 3
        ),
        "reused_by_next_token": round(sum(float(p["reuse"]) for p in routing) / len(routing), 3),
    }


if __name__ == "__main__":
    main()
