"""``trace`` as typer sees it; commands.py has the other commands."""

from __future__ import annotations

from typing import Annotated

import typer

from specmoeoff.cli.arguments import Json, KvDtype, Memory, Model, Threads, output_option
from specmoeoff.cli.options import EngineOptions, TraceOptions

PLAN, SPEED = "Plan", "Device"


def trace(
    model: Model,
    output: Annotated[
        str, output_option("--output", "-o", metavar="FILE", help="Where the trace goes.")
    ],
    png: Annotated[
        str | None,
        output_option("--png", metavar="FILE", help="Draw the steps too (needs matplotlib)."),
    ] = None,
    json: Json = False,
    memory: Memory = None,
    kv_dtype: KvDtype = None,
    threads: Threads = None,
    schedule: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            rich_help_panel=PLAN,
            help="specmoeoff, zero_inference, flexgen, moe_lightning, moe_gen or spec_offload.",
        ),
    ] = "specmoeoff",
    num_seqs: Annotated[
        int, typer.Option("--batch", metavar="B", rich_help_panel=PLAN, help="Sequences.")
    ] = 8,
    num_micro_batches: Annotated[
        int, typer.Option("--micro-batches", metavar="M", rich_help_panel=PLAN, help="Slices of B.")
    ] = 2,
    context: Annotated[
        int,
        typer.Option(
            metavar="TOKENS", rich_help_panel=PLAN, help="Random tokens in front of the steps."
        ),
    ] = 64,
    num_steps: Annotated[
        int, typer.Option("--steps", metavar="N", rich_help_panel=PLAN, help="Steps to keep.")
    ] = 2,
    device: Annotated[
        str, typer.Option(metavar="KIND", rich_help_panel=SPEED, help="cpu, sim or cuda.")
    ] = "cpu",
    device_memory: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            rich_help_panel=SPEED,
            help="Memory of the device. Default on cuda: what is free.",
        ),
    ] = None,
    host: Annotated[
        str,
        typer.Option(metavar="NAME", rich_help_panel=SPEED, help="Whose speeds: a30 or 4090d."),
    ] = "a30",
    scale: Annotated[
        float,
        typer.Option(
            metavar="X", rich_help_panel=SPEED, help="Times those speeds; small, to run them here."
        ),
    ] = 1.0,
    simulate: Annotated[
        bool,
        typer.Option("--simulate", rich_help_panel=SPEED, help="Price the plan, run nothing."),
    ] = False,
) -> TraceOptions:
    """Return what ``trace`` was asked to do; the user reads ``help``."""
    return TraceOptions(
        engine=EngineOptions(model, memory=memory, kv_dtype=kv_dtype, num_threads=threads),
        output=output,
        png=png,
        schedule=schedule,
        device=device,
        device_memory=device_memory,
        host=host,
        scale=scale,
        num_seqs=num_seqs,
        num_micro_batches=num_micro_batches,
        context=context,
        num_steps=num_steps,
        simulate=simulate,
        json=json,
    )
