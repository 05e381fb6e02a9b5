"""Transformers with accelerate's disk offload: a forward loop with the KV cache, timed by step.

Runs in the peers' environment. The job is the JSON in the first argument. Prints a line of JSON
after loading, after the prefill and after every step, so that a run that is stopped still tells
how far it came.
"""

from __future__ import annotations

import inspect
import json
import sys
import time
from typing import Any

import torch
from transformers import AutoModelForCausalLM, DynamicCache


def main() -> None:
    """Load, read the prompts, decode."""
    job: dict[str, Any] = json.loads(sys.argv[1])
    torch.set_num_threads(job["num_threads"])
    start = time.monotonic()
    model = AutoModelForCausalLM.from_pretrained(
        job["model"],
        dtype=torch.bfloat16,
        device_map="auto",
        max_memory={"cpu": job["cpu_bytes"]},
        offload_folder=job["offload_folder"],
    )
    _tell("loaded", start)
    with torch.inference_mode():
        # Transformers 5.24 calls it ``cache``, those before it ``past_key_values``.
        takes_cache = "cache" in inspect.signature(model.forward).parameters
        cache = {"cache" if takes_cache else "past_key_values": DynamicCache()}
        start = time.monotonic()
        output = model(torch.tensor(job["prompts"]), use_cache=True, logits_to_keep=1, **cache)
        _tell("prefill", start)
        for _ in range(job["max_tokens"]):
            start = time.monotonic()
            output = model(
                output.logits[:, -1:].argmax(-1),
                use_cache=True,
                logits_to_keep=1,
                **cache,
            )
            _tell("step", start)


def _tell(event: str, start: float) -> None:
    print(json.dumps({"event": event, "s": time.monotonic() - start}), flush=True)


if __name__ == "__main__":
    main()
