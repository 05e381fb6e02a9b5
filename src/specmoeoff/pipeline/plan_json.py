"""Plans as JSON text and back, so that a step can be kept, looked at and run again elsewhere."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from specmoeoff.errors import PlanError
from specmoeoff.pipeline.plan import Buffer, Held, Op, Plan

FORMAT = "specmoeoff-plan-1"

_OP_DEFAULTS = {f.name: f.default for f in dataclasses.fields(Op)}


def to_json(plan: Plan) -> str:
    """Return a plan as JSON, one op per line; what an op leaves at its default is not written."""
    head = {
        "format": FORMAT,
        "schedule": plan.schedule,
        "budgets": dict(plan.budgets),
        "buffers": {name: [b.pool, b.num_bytes] for name, b in plan.buffers.items()},
        "held_at_start": [[h.buffer, h.layer, h.expert] for h in plan.held_at_start],
        "held_at_end": [[h.buffer, h.layer, h.expert] for h in plan.held_at_end],
    }
    lines = ",\n  ".join(json.dumps(_op_fields(op)) for op in plan.ops)
    return f'{json.dumps(head, indent=1)[:-2]},\n "ops": [\n  {lines}\n ]\n}}\n'


def from_json(text: str) -> Plan:
    """Read a plan and check it.

    Raises:
        PlanError: It is no plan, has a field that is not known, or breaks a promise.
    """
    try:
        fields = json.loads(text)
    except ValueError as error:
        raise PlanError(f"a plan must be JSON: {error}") from None
    if not isinstance(fields, dict) or fields.pop("format", None) != FORMAT:
        raise PlanError(f'a plan must be a JSON object with "format": "{FORMAT}"')
    try:
        ops = tuple(_op(number, op) for number, op in enumerate(fields.pop("ops")))
        plan_fields: dict[str, Any] = {
            "buffers": {n: Buffer(str(p), int(b)) for n, (p, b) in fields.pop("buffers").items()},
            "held_at_start": _held(fields.pop("held_at_start")),
            "held_at_end": _held(fields.pop("held_at_end")),
        }
        return Plan(ops=ops, **plan_fields, **fields)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, PlanError):
            raise
        raise PlanError(f"a field of the plan is missing, unknown or malformed: {error}") from None


def _op_fields(op: Op) -> dict[str, Any]:
    fields = {name: getattr(op, name) for name in _OP_DEFAULTS}
    return {name: value for name, value in fields.items() if value != _OP_DEFAULTS[name]}


def _op(number: int, fields: Any) -> Op:
    if not isinstance(fields, dict) or not {"kind", "lane"} <= fields.keys() <= set(_OP_DEFAULTS):
        raise PlanError(f"op {number} must be an object with kind, lane and known fields")
    read: dict[str, Any] = {
        name: tuple(v) if isinstance(v, list) else v for name, v in fields.items()
    }
    for name, value in read.items():
        if not _is_of_field(name, value):
            raise PlanError(f"op {number} has {name} {value!r}, which is of another type")
    return Op(**read)


def _is_of_field(name: str, value: Any) -> bool:
    if name in ("kind", "lane"):
        return isinstance(value, str)
    if name == "ahead":
        return isinstance(value, bool)
    if name in ("num_bytes", "flops", "layer"):
        return type(value) is int
    of = str if name in ("acquires", "uses", "releases") else int
    return isinstance(value, tuple) and all(type(item) is of for item in value)


def _held(items: list[Any]) -> tuple[Held, ...]:
    return tuple(Held(str(buffer), int(layer), int(expert)) for buffer, layer, expert in items)
