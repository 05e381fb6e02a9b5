"""What ``--help`` says of the program and its commands, and the examples it ends with."""

PROGRAM = (
    "Run mixture-of-experts models that do not fit memory: experts stream from disk under a "
    "memory budget, and speculative decoding makes every streamed byte count more."
)

EXIT_CODES = (
    "Exit codes: 0 done, 2 bad usage or input, 3 does not fit the memory, 130 interrupted, "
    "1 anything else."
)

GENERATE_EXAMPLES = (
    "Examples:\n\n"
    "specmoeoff generate MODEL --prompt 'The capital of France is' -n 32\n\n"
    "specmoeoff generate MODEL --prompts in.jsonl --output out.jsonl -m 1GiB --draft DRAFT\n\n"
    "specmoeoff generate MODEL --prompts in.jsonl --output out.jsonl --resume   (after a kill)"
)

GENERATE = (
    "Complete prompts: a JSONL job, or a few prompts given here.\n\n"
    'A line of a job has an "id", one of "prompt", "prompt_token_ids" or "messages", and any '
    "sampling parameter for itself. Each gets one result line, in the same order; a line that "
    'cannot be run gets an "error". Finished results are kept whatever happens, and --resume '
    "goes on from there."
)

CHAT_EXAMPLES = (
    "Examples:\n\n"
    "specmoeoff chat MODEL --memory 1GiB --draft DRAFT\n\n"
    "echo 'Why is the sky blue?' | specmoeoff chat MODEL --system 'Answer in one sentence.'"
)

DOCTOR_EXAMPLES = (
    "Examples:\n\n"
    "specmoeoff doctor\n\n"
    "specmoeoff doctor MODEL --memory 1GiB --draft DRAFT   (exit code 3 if it does not fit)"
)

TRACE_EXAMPLES = (
    "Examples:\n\n"
    "specmoeoff trace MODEL -o step.json --memory 1GiB --png step.png\n\n"
    "specmoeoff trace MODEL -o step.json --device sim --device-memory 400MB --scale 0.001\n\n"
    "specmoeoff trace MODEL -o step.json --device sim --device-memory 24GB --simulate"
)

TRACE = (
    "Run decoding steps by a plan and write when each op ran, for Perfetto (ui.perfetto.dev).\n\n"
    "'--device cpu' measures this machine, '--device cuda' its GPU; '--device sim' runs on a "
    "simulated device behind links and processors of a set speed; '--simulate' runs nothing and "
    "prices the plan on those speeds, from the model's file headers alone."
)

PACK_EXAMPLES = (
    "Examples:\n\n"
    "specmoeoff pack mistralai/Mixtral-8x7B-Instruct-v0.1 -o mixtral-packed\n\n"
    "specmoeoff generate mixtral-packed --memory 16GiB --prompts in.jsonl --output out.jsonl"
)

PACK = (
    "Write a copy of a bfloat16 model whose experts take a quarter fewer bytes, without loss.\n\n"
    "Weights use few of the exponents that bfloat16 has, so 12 bits an element hold all that 16 "
    "did. A third more experts fit in memory, the others take a quarter less time to stream, and "
    "the answers are the same, bit for bit. CPU and simulated devices read it; other programs "
    "don't."
)

DEMO_EXAMPLES = (
    "Examples:\n\n"
    "specmoeoff demo\n\n"
    "specmoeoff demo --build DIR --experts 64   (only writes DIR/target and DIR/draft, 10 GB)"
)

DEMO = (
    "Watch a real model that is larger than its memory answer 16 prompts, without and with "
    "speculation.\n\nThe first run downloads a small model (100 MB) and makes a mixture of experts "
    "of it (1.4 GB)."
)
