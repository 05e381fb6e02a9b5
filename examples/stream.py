"""Show an answer while it is being generated.

python examples/stream.py MODEL_DIR 1GiB "Why is the sky blue?"
"""

import sys

from specmoeoff import LLM, SamplingParams


def main(model: str, memory: str, question: str) -> None:
    """Ask one question and print the answer piece by piece."""
    messages = [{"role": "user", "content": question}]
    params = SamplingParams(temperature=0.0, max_tokens=200)
    with LLM(model, memory=memory) as llm:
        for output in llm.generate_stream([{"messages": messages}], params):
            if output.error is not None:
                sys.exit(output.error)
            print(output.outputs[0].text, end="", flush=True)
    print()


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    main(*sys.argv[1:])
