"""The commands, as typer sees them; each turns its arguments into a frozen options object."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from specmoeoff import __version__
from specmoeoff.cli import texts
from specmoeoff.cli.arguments import (
    CpuTarget,
    Device,
    DeviceMemory,
    Draft,
    DraftModel,
    DraftTokens,
    Dtype,
    ExpertMode,
    Frequency,
    IgnoreEos,
    Json,
    KvDtype,
    Logprobs,
    MaxBatched,
    MaxLen,
    MaxSeqs,
    MaxTokens,
    Memory,
    MicroBatches,
    MinP,
    MinTokens,
    Model,
    Presence,
    Quiet,
    Repetition,
    Samples,
    Schedule,
    Seed,
    Stop,
    Temperature,
    Threads,
    TopK,
    TopP,
    output_option,
)
from specmoeoff.cli.options import (
    ChatOptions,
    DemoOptions,
    DoctorOptions,
    EngineOptions,
    GenerateOptions,
)
from specmoeoff.errors import InvalidInputError

app = typer.Typer(
    name="specmoeoff",
    help=texts.PROGRAM,
    epilog=texts.EXIT_CODES,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(f"specmoeoff {__version__}")
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    pass


def _sampling_fields(**fields: Any) -> dict[str, Any]:
    """Return what was given: 0 counts, an empty list or a flag that is not there does not."""
    absent = (None, False)
    return {k: v for k, v in fields.items() if not any(v is a for a in absent) and v != []}


@app.command(epilog=texts.GENERATE_EXAMPLES, help=texts.GENERATE)
def generate(
    model: Model,
    prompts: Annotated[
        str | None, output_option("--prompts", metavar="FILE", help="Job to run.")
    ] = None,
    output: Annotated[
        str | None, output_option("--output", "-o", metavar="FILE", help="Where its results go.")
    ] = None,
    prompt: Annotated[
        list[str] | None,
        output_option("--prompt", "-p", metavar="TEXT", help="Answer this on stdout. Repeatable."),
    ] = None,
    resume: Annotated[
        bool, output_option("--resume", help="Go on with a job that was stopped.")
    ] = False,
    overwrite: Annotated[
        bool, output_option("--overwrite", help="Replace earlier results.")
    ] = False,
    stats: Annotated[
        str | None, output_option("--stats", metavar="FILE", help="Write the run's figures there.")
    ] = None,
    json: Json = False,
    quiet: Quiet = False,
    memory: Memory = None,
    draft: Draft = "off",
    draft_model: DraftModel = None,
    num_speculative_tokens: DraftTokens = None,
    max_num_seqs: MaxSeqs = None,
    max_num_batched_tokens: MaxBatched = None,
    max_model_len: MaxLen = None,
    dtype: Dtype = None,
    kv_dtype: KvDtype = None,
    threads: Threads = None,
    expert_mode: ExpertMode = None,
    schedule: Schedule = None,
    device: Device = None,
    device_memory: DeviceMemory = None,
    micro_batches: MicroBatches = None,
    cpu_target: CpuTarget = None,
    seed: Seed = 0,
    max_tokens: MaxTokens = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    min_p: MinP = None,
    n: Samples = None,
    min_tokens: MinTokens = None,
    repetition_penalty: Repetition = None,
    presence_penalty: Presence = None,
    frequency_penalty: Frequency = None,
    stop: Stop = None,
    ignore_eos: IgnoreEos = False,
    logprobs: Logprobs = None,
) -> GenerateOptions:
    """Return what ``generate`` was asked to do; the user reads ``help``."""
    return GenerateOptions(
        engine=EngineOptions(
            model=model,
            memory=memory,
            draft=draft,
            draft_model=draft_model,
            num_speculative_tokens=num_speculative_tokens,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            max_model_len=max_model_len,
            dtype=dtype,
            kv_dtype=kv_dtype,
            num_threads=threads,
            expert_mode=expert_mode,
            schedule=schedule,
            device=device,
            device_memory=device_memory,
            num_micro_batches=micro_batches,
            cpu_target=cpu_target,
            seed=seed,
        ),
        sampling=_sampling_fields(
            max_tokens=max_tokens,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            min_p=min_p,
            n=n,
            min_tokens=min_tokens,
            repetition_penalty=repetition_penalty,
            presence_penalty=presence_penalty,
            frequency_penalty=frequency_penalty,
            stop=stop,
            ignore_eos=ignore_eos,
            logprobs=logprobs,
        ),
        prompts=prompts,
        output=output,
        prompt=tuple(prompt or ()),
        resume=resume,
        overwrite=overwrite,
        stats=stats,
        json=json,
        quiet=quiet,
    )


@app.command(epilog=texts.CHAT_EXAMPLES)
def chat(
    model: Model,
    system: Annotated[
        str | None, typer.Option("--system", "-s", metavar="TEXT", help="System prompt.")
    ] = None,
    quiet: Quiet = False,
    memory: Memory = None,
    draft: Draft = "off",
    draft_model: DraftModel = None,
    num_speculative_tokens: DraftTokens = None,
    max_model_len: MaxLen = None,
    dtype: Dtype = None,
    kv_dtype: KvDtype = None,
    threads: Threads = None,
    expert_mode: ExpertMode = None,
    schedule: Schedule = None,
    device: Device = None,
    device_memory: DeviceMemory = None,
    micro_batches: MicroBatches = None,
    cpu_target: CpuTarget = None,
    seed: Seed = 0,
    max_tokens: MaxTokens = 512,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    min_p: MinP = None,
    repetition_penalty: Repetition = None,
) -> ChatOptions:
    """Talk to a model. Commands in the conversation: /help, /reset, /stats, /exit."""
    return ChatOptions(
        engine=EngineOptions(
            model=model,
            memory=memory,
            draft=draft,
            draft_model=draft_model,
            num_speculative_tokens=num_speculative_tokens,
            max_num_seqs=1,
            max_model_len=max_model_len,
            dtype=dtype,
            kv_dtype=kv_dtype,
            num_threads=threads,
            expert_mode=expert_mode,
            schedule=schedule,
            device=device,
            device_memory=device_memory,
            num_micro_batches=micro_batches,
            cpu_target=cpu_target,
            seed=seed,
        ),
        sampling=_sampling_fields(
            max_tokens=max_tokens,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
        ),
        system=system,
        quiet=quiet,
    )


@app.command(epilog=texts.DOCTOR_EXAMPLES)
def doctor(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="[MODEL]", help="Hugging Face directory or hub id.", show_default=False
        ),
    ] = None,
    json: Json = False,
    memory: Memory = None,
    draft: Draft = "off",
    draft_model: DraftModel = None,
    num_speculative_tokens: DraftTokens = None,
    max_num_seqs: MaxSeqs = None,
    max_num_batched_tokens: MaxBatched = None,
    max_model_len: MaxLen = None,
    dtype: Dtype = None,
    kv_dtype: KvDtype = None,
    schedule: Schedule = None,
    device: Device = None,
    device_memory: DeviceMemory = None,
    micro_batches: MicroBatches = None,
) -> DoctorOptions:
    """Show what this machine has, and how a model would share the memory."""
    if model is None:
        return DoctorOptions(json=json)
    engine = EngineOptions(
        model=model,
        memory=memory,
        draft=draft,
        draft_model=draft_model,
        num_speculative_tokens=num_speculative_tokens,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        max_model_len=max_model_len,
        dtype=dtype,
        kv_dtype=kv_dtype,
        schedule=schedule,
        device=device,
        device_memory=device_memory,
        num_micro_batches=micro_batches,
    )
    return DoctorOptions(engine=engine, json=json)


@app.command(epilog=texts.DEMO_EXAMPLES, help=texts.DEMO)
def demo(
    build: Annotated[
        str | None,
        typer.Option("--build", metavar="DIR", help="Only write DIR/target and DIR/draft."),
    ] = None,
    experts: Annotated[int, typer.Option(help="Experts per layer of the target.")] = 8,
    noise: Annotated[float, typer.Option(help="How far experts are from the dense model.")] = 0.10,
    drop_layers: Annotated[
        str,
        typer.Option(
            metavar="N,N", help="Layers left out of the draft, such as 4,5; weaker drafts."
        ),
    ] = "",
    seed: Annotated[int, typer.Option(help="Seed of the noise and the routers.")] = 0,
    memory: Annotated[
        str, typer.Option("--memory", "-m", metavar="SIZE", help="Budget of each of the two runs.")
    ] = "1GiB",
    max_tokens: Annotated[
        int, typer.Option("--max-tokens", "-n", metavar="N", help="Most tokens per answer.")
    ] = 256,
    num_speculative_tokens: Annotated[
        int, typer.Option("--num-speculative-tokens", "-k", metavar="K", help="Tokens drafted.")
    ] = 4,
    schedule: Schedule = None,
    json: Json = False,
) -> DemoOptions:
    """Return what ``demo`` was asked to do; the user reads ``help``."""
    return DemoOptions(
        build=build,
        experts=experts,
        noise=noise,
        drop_layers=_layers(drop_layers),
        seed=seed,
        memory=memory,
        max_tokens=max_tokens,
        num_speculative_tokens=num_speculative_tokens,
        schedule=schedule,
        json=json,
    )


def _layers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError as error:
        raise InvalidInputError(f"--drop-layers {text!r} must be numbers such as 4,5,26") from error
