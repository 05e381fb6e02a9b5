"""The options that several commands share, each described once.

Values are judged by the classes that own them; what is said here is their name and their meaning.
"""

from __future__ import annotations

from typing import Annotated, Any

import typer

ENGINE, SAMPLING, OUTPUT = "Engine", "Sampling", "Input and output"

Model = Annotated[
    str,
    typer.Argument(metavar="MODEL", help="Hugging Face directory or hub id.", show_default=False),
]


def engine_option(*names: str, **kwargs: Any) -> Any:
    """Declare an option of the engine panel."""
    return typer.Option(*names, rich_help_panel=ENGINE, **kwargs)


def sampling_option(*names: str, **kwargs: Any) -> Any:
    """Declare an option of the sampling panel."""
    return typer.Option(*names, rich_help_panel=SAMPLING, **kwargs)


def output_option(*names: str, **kwargs: Any) -> Any:
    """Declare an option of the input and output panel."""
    return typer.Option(*names, rich_help_panel=OUTPUT, **kwargs)


Memory = Annotated[
    str | None,
    engine_option(
        "--memory",
        "-m",
        metavar="SIZE",
        help="Budget for the whole process, such as 1GiB or 900MB. Default: what is free.",
    ),
]
Draft = Annotated[
    str,
    engine_option(
        "--draft",
        metavar="DRAFT",
        help="What proposes tokens: a draft model's directory or hub id, 'ngram', 'off', or 'auto' "
        "(the measured speed decides how much to draft, nothing included).",
    ),
]
DraftModel = Annotated[
    str | None,
    engine_option(
        "--draft-model", metavar="DIR", help="The draft that --draft auto uses; else n-grams."
    ),
]
DraftTokens = Annotated[
    int | None,
    engine_option(
        "--num-speculative-tokens",
        "-k",
        metavar="K",
        help="Most tokens drafted per step. Default: 4.",
    ),
]
MaxSeqs = Annotated[
    int | None,
    engine_option(
        "--max-num-seqs", metavar="N", help="Most sequences that run at once. Default: 64."
    ),
]
MaxBatched = Annotated[
    int | None,
    engine_option(
        "--max-num-batched-tokens", metavar="N", help="Tokens in one step. Default: by the memory."
    ),
]
MaxLen = Annotated[
    int | None,
    engine_option(
        "--max-model-len", metavar="N", help="Longest prompt + output. Default: the model's."
    ),
]
Dtype = Annotated[
    str | None,
    engine_option(
        "--dtype",
        metavar="DTYPE",
        help="Activations in the target's products: float32, bfloat16 (rounded, as a model run in "
        "bfloat16 has them), or auto (bfloat16 where this CPU gains 1.5x). Default: float32.",
    ),
]
KvDtype = Annotated[
    str | None,
    engine_option(
        "--kv-dtype",
        metavar="DTYPE",
        help="KV cache: bfloat16, float16, float32 or int8 (half the memory, rounds more). "
        "Default: bfloat16.",
    ),
]
Threads = Annotated[
    int | None, engine_option("--threads", metavar="N", help="Compute threads. Default: all cores.")
]
ExpertMode = Annotated[
    str | None,
    engine_option(
        "--expert-mode",
        metavar="MODE",
        help="belt streams all experts in order, demand reads the chosen ones, auto decides per "
        "step. Default: auto.",
    ),
]
CpuTarget = Annotated[
    str | None,
    engine_option(
        "--cpu-target", metavar="NAME", help="Kernels to use (see doctor). Default: the best."
    ),
]
Schedule = Annotated[
    str | None,
    engine_option(
        "--schedule",
        metavar="NAME",
        help="Order of work in a step: reactive (read experts as tokens need them), or the plan of "
        "specmoeoff, zero_inference, flexgen, moe_lightning, moe_gen or spec_offload. Default: "
        "reactive on cpu, specmoeoff elsewhere.",
    ),
]
Device = Annotated[
    str | None,
    engine_option(
        "--device",
        metavar="KIND",
        help="cpu; cuda: a GPU (needs torch); sim: a device that is simulated. Default: cpu.",
    ),
]
DeviceMemory = Annotated[
    str | None,
    engine_option(
        "--device-memory",
        metavar="SIZE",
        help="The device's memory, beside --memory; sim needs it, cuda by default takes what is "
        "free.",
    ),
]
MicroBatches = Annotated[
    int | None,
    engine_option(
        "--micro-batches", metavar="M", help="Parts of a step's sequences in a plan. Default: 2."
    ),
]
Seed = Annotated[int, engine_option("--seed", help="Seed of requests that set none.")]

MaxTokens = Annotated[
    int | None,
    sampling_option("--max-tokens", "-n", metavar="N", help="Most tokens of output per prompt."),
]
Temperature = Annotated[
    float | None,
    sampling_option(
        "--temperature", "-t", metavar="T", help="0 is greedy, the default; above it samples."
    ),
]
TopP = Annotated[float | None, sampling_option("--top-p", metavar="P", help="Nucleus, 0 to 1.")]
TopK = Annotated[int | None, sampling_option("--top-k", metavar="K", help="Likeliest tokens kept.")]
MinP = Annotated[
    float | None,
    sampling_option("--min-p", metavar="P", help="Least share of the best probability kept."),
]
Samples = Annotated[
    int | None, sampling_option("--n", metavar="N", help="Samples per prompt. Default: 1.")
]
MinTokens = Annotated[
    int | None, sampling_option("--min-tokens", metavar="N", help="Fewest tokens.")
]
Repetition = Annotated[
    float | None, sampling_option("--repetition-penalty", metavar="X", help="Above 1 repeats less.")
]
Presence = Annotated[
    float | None, sampling_option("--presence-penalty", metavar="X", help="-2 to 2.")
]
Frequency = Annotated[
    float | None, sampling_option("--frequency-penalty", metavar="X", help="-2 to 2.")
]
Stop = Annotated[
    list[str] | None, sampling_option("--stop", metavar="TEXT", help="Ends the output. Repeatable.")
]
IgnoreEos = Annotated[bool, sampling_option("--ignore-eos", help="Go on after the end token.")]
Logprobs = Annotated[
    int | None,
    sampling_option("--logprobs", metavar="N", help="Log-probabilities of the N likeliest."),
]

Json = Annotated[bool, output_option("--json", help="Print the report as JSON on stdout.")]
Quiet = Annotated[bool, output_option("--quiet", "-q", help="No progress and no summary.")]
