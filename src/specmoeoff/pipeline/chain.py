"""Several steps as one plan, joined as they are when they run one after the other.

A step's ops start when the step before has ended, except what was done ahead; what uses a buffer
that the step before filled waits for the filling.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from specmoeoff.errors import PlanError
from specmoeoff.pipeline.plan import Plan

if TYPE_CHECKING:
    from collections.abc import Sequence


def chain(plans: Sequence[Plan]) -> Plan:
    """Return one plan of several; each must begin with the buffers that its forerunner ends with.

    Raises:
        PlanError: They do not follow one another, or there is none.
    """
    if not plans:
        raise PlanError("there is no plan to chain")
    joined = plans[0]
    for step, plan in enumerate(plans[1:], start=1):
        if set(plan.held_at_start) != set(joined.held_at_end):
            raise PlanError(f"plan {step} does not begin with what plan {step - 1} leaves")
        joined = _append(joined, plan)
    return joined


def _append(before: Plan, plan: Plan) -> Plan:
    offset = len(before.ops)
    # What nothing of the step waits for ends it; a new step starts after that.
    ends = _last_ops(before)
    filled_by: dict[str, int] = {}
    for number, op in enumerate(before.ops):
        filled_by |= dict.fromkeys((*op.acquires, *op.releases), number)
    ops = []
    for op in plan.ops:
        waits = {offset + wait for wait in op.waits} or set(ends)
        waits |= {filled_by[name] for name in op.touches if name in filled_by}
        ops.append(replace(op, waits=tuple(sorted(waits))))
    # Within the joined plan nothing but the last step's tail is ahead of what follows.
    settled = tuple(replace(op, ahead=False) for op in before.ops)
    return Plan(
        schedule=plan.schedule,
        ops=(*settled, *ops),
        buffers={**before.buffers, **plan.buffers},
        budgets={**before.budgets, **plan.budgets},
        held_at_start=before.held_at_start,
        held_at_end=plan.held_at_end,
    )


def _last_ops(plan: Plan) -> list[int]:
    waited_for = {wait for op in plan.ops if not op.ahead for wait in op.waits}
    return [n for n, op in enumerate(plan.ops) if not op.ahead and n not in waited_for]
