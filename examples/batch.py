"""Run a JSONL job from Python; run it again after a kill and it goes on where it was.

    python examples/batch.py MODEL_DIR 1GiB examples/prompts.jsonl results.jsonl

The same in the shell:

    specmoeoff generate MODEL_DIR --memory 1GiB \
        --prompts examples/prompts.jsonl --output results.jsonl --resume
"""

import sys

from specmoeoff import LLM, SamplingParams
from specmoeoff.batch import run_batch


def main(model: str, memory: str, input_path: str, output_path: str) -> None:
    """Run the job and say how it went."""
    defaults = SamplingParams(temperature=0.0, max_tokens=128)
    with LLM(model, memory=memory) as llm:
        summary = run_batch(llm, input_path, output_path, defaults, model=model, resume=True)
    print(f"{summary.num_finished} results, {summary.num_failed} of them errors, in {output_path}")


if __name__ == "__main__":
    if len(sys.argv) != 5:
        sys.exit(__doc__)
    main(*sys.argv[1:])
