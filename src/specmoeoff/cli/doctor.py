"""``specmoeoff doctor``: what the machine has, how a model would share it, what it would stream."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from specmoeoff.cli.console import say
from specmoeoff.cli.machine import Machine, disk_bandwidth, inspect_machine
from specmoeoff.memory_size import format_memory_size

if TYPE_CHECKING:
    from specmoeoff.cli.options import DoctorOptions, EngineOptions
    from specmoeoff.config import Policy


@dataclasses.dataclass(frozen=True)
class ModelReport:
    """How one model would run here."""

    policy: Policy
    num_experts: int
    """Experts of all layers together."""
    streamed_bytes: int
    """Bytes that a step streams at least when it touches all experts."""
    disk_bandwidth: float | None
    """Bytes/s the model's files were read at; None if no step reads them, or none could be."""

    @property
    def stream_s(self) -> float | None:
        """Seconds a step takes at least to stream its experts."""
        if self.disk_bandwidth is None:
            return None
        return self.streamed_bytes / self.disk_bandwidth


def run(options: DoctorOptions) -> int:
    """Run the command and return its exit code; DoesNotFitError leaves with 3."""
    machine = inspect_machine()
    if not options.json:
        _show(_machine_rows(machine), "This machine")
    report = None
    if options.engine is not None:
        report = examine(options.engine)
    if options.json:
        say(json.dumps(_as_dict(machine, report)))
    elif report is not None:
        _show(
            _policy_rows(report.policy),
            f"Memory of {options.engine.model if options.engine else ''}",
        )
        _show(_stream_rows(report), "What is streamed")
    return 0


def examine(engine: EngineOptions) -> ModelReport:
    """Plan a model's memory and time a short read of its files.

    Raises:
        DoesNotFitError: The budget is too small; the message has the arithmetic.
        CheckpointError: The model cannot be used.
    """
    from specmoeoff.engine.memory_plan import open_models, plan_memory
    from specmoeoff.engine.planned_policy import plan_passes
    from specmoeoff.models.hf_config import parse_config
    from specmoeoff.offload.hub import resolve_model

    wanted, from_disk = engine.engine(), True
    if wanted.is_planned:
        split, plan = plan_passes(wanted, *open_models(wanted))
        policy = plan.policy
        from_disk = "disk" in split.placement.weights
    else:
        policy = plan_memory(wanted)
    directory = resolve_model(engine.model)
    config = parse_config(directory)
    num_experts = config.num_layers * max(1, config.num_experts)
    streamed = max(0, num_experts - policy.num_expert_slots)
    return ModelReport(
        policy=policy,
        num_experts=num_experts,
        streamed_bytes=streamed * policy.expert_slot_bytes,
        disk_bandwidth=disk_bandwidth(sorted(Path(directory).glob("*.safetensors")))
        if from_disk
        else None,
    )


def _machine_rows(machine: Machine) -> list[tuple[str, str]]:
    limit = machine.cgroup_limit
    return [
        ("cores", str(machine.num_cores)),
        ("kernel targets", ", ".join(machine.cpu_targets) or "none: the native module is missing"),
        ("memory", format_memory_size(machine.total_memory)),
        ("free memory", format_memory_size(machine.available_memory)),
        ("limit of the control group", "none" if limit is None else format_memory_size(limit)),
    ]


def _policy_rows(policy: Policy) -> list[tuple[str, str]]:
    parts = [(name, format_memory_size(num_bytes)) for name, num_bytes in policy.reservations]
    return [
        *parts,
        ("budget", format_memory_size(policy.memory)),
        ("sequences at once", str(policy.max_num_seqs)),
        ("tokens per step", str(policy.max_num_batched_tokens)),
        ("longest sequence", f"{policy.max_model_len} tokens"),
        ("activations in products", policy.dtype),
        *([("draft is left out", policy.left_out)] if policy.left_out else []),
    ]


def _stream_rows(report: ModelReport) -> list[tuple[str, str]]:
    policy, bandwidth, stream_s = report.policy, report.disk_bandwidth, report.stream_s
    slots = min(policy.num_expert_slots, report.num_experts)
    trades = ", less what the KV cache takes while it needs it"
    held = f"{slots}{trades if policy.min_expert_slots < policy.num_expert_slots else ''}"
    rows = [
        ("experts", f"{report.num_experts} of {format_memory_size(policy.expert_slot_bytes)}"),
        ("held where they are used", held),
        ("streamed per full pass", f"at least {format_memory_size(report.streamed_bytes)}"),
    ]
    if bandwidth is not None:
        rows.append(("disk, measured now", f"{bandwidth / 1e9:.2f} GB/s"))
    if stream_s is not None and report.streamed_bytes:
        rows.append(("time per full pass", f"at least {stream_s:.3f} s"))
    return rows


def _show(rows: list[tuple[str, str]], title: str) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(title), title_justify="left", show_header=False)
    for name, value in rows:
        table.add_row(Text(name), Text(value, justify="right"))
    Console().print(table)


def _as_dict(machine: Machine, report: ModelReport | None) -> dict[str, Any]:
    found: dict[str, Any] = {"machine": dataclasses.asdict(machine)}
    if report is not None:
        found["model"] = {
            "policy": report.policy.as_dict(),
            "num_experts": report.num_experts,
            "streamed_bytes": report.streamed_bytes,
            "disk_bandwidth": report.disk_bandwidth,
            "stream_s": report.stream_s,
        }
    return found
