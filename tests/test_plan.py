from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given

from random_plans import plans
from specmoeoff.errors import PlanError
from specmoeoff.pipeline.chain import chain
from specmoeoff.pipeline.plan import Buffer, Held, Op, Plan
from specmoeoff.pipeline.plan_json import from_json, to_json

SLOT = {"slot": Buffer("experts", 100)}
BUDGET = {"experts": 100}
LOAD = Op("load", "h2d", layer=3, experts=(1,), num_bytes=100, acquires=("slot",))
RUN = Op("experts", "device", layer=3, experts=(1,), waits=(0,), releases=("slot",))


def plan(*ops: Op, **fields: Any) -> Plan:
    return Plan("test", ops, **{"buffers": SLOT, "budgets": BUDGET, **fields})


def test_ops_are_named_for_people() -> None:
    op = Op("experts", "device", layer=3, micro_batches=(0, 1, 3), experts=(0, 1, 2, 5))
    assert op.name == "experts L3 M0-1,3 E0-2,5"
    assert plan(LOAD, RUN).label(1) == "op 1 (experts L3 E1)"


@pytest.mark.parametrize(
    ("ops", "message"),
    [
        ([replace(LOAD, waits=(1,)), RUN], r"op 0 \(load L3 E1\) waits for op 1"),
        ([replace(LOAD, waits=(0,)), RUN], r"op 0 \(load L3 E1\) waits for op 0"),
        ([replace(LOAD, waits=(-1,)), RUN], r"op 0 \(load L3 E1\) waits for op -1"),
        ([LOAD, replace(RUN, waits=())], r"op 1 \(experts L3 E1\) uses buffer 'slot' without"),
        ([LOAD], r"'slot', acquired by op 0 \(load L3 E1\), is never released"),
        ([replace(RUN, waits=())], r"op 0 \(experts L3 E1\) uses buffer 'slot', which is not held"),
        ([LOAD, replace(LOAD, waits=(0,)), RUN], r"op 1 .* acquires buffer 'slot', which is held"),
        ([LOAD, RUN, LOAD, replace(RUN, waits=(2,))], r"op 2 .* without waiting for op 1"),
        (
            [LOAD, replace(RUN, uses=("slot",), releases=()), RUN],
            r"op 2 .* releases buffer 'slot' without waiting for op 1",
        ),
        ([LOAD, replace(RUN, uses=("other",))], r"op 1 .* names buffer 'other', which does not"),
        ([replace(LOAD, num_bytes=-1), RUN], r"op 0 .* has -1 bytes"),
        ([replace(LOAD, lane="moon"), RUN], r"op 0 .* on lane 'moon'"),
        ([replace(LOAD, ahead=True), RUN], r"op 1 .* waits for one of the next"),
    ],
)
def test_a_plan_that_could_go_wrong_is_refused(ops: list[Op], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        plan(*ops)


def test_a_pool_never_has_more_than_its_budget() -> None:
    with pytest.raises(PlanError, match="pool 'experts' take 100 bytes; its budget is 99"):
        plan(LOAD, RUN, budgets={"experts": 99})
    with pytest.raises(PlanError, match="its budget is 0"):
        plan(LOAD, RUN, budgets={})


def test_a_buffer_may_come_from_the_step_before_and_go_to_the_next() -> None:
    held = (Held("slot", 3, 1),)
    use = replace(RUN, waits=())
    assert plan(use, held_at_start=held).held_at_end == ()
    refill = replace(LOAD, waits=(0,), ahead=True)
    assert plan(use, refill, held_at_start=held, held_at_end=held).ops[1].ahead
    with pytest.raises(PlanError, match="ends with buffer 'slot', which nothing holds"):
        plan(use, held_at_start=held, held_at_end=held)
    with pytest.raises(PlanError, match="'slot', acquired by the step before, is never released"):
        plan(held_at_start=held)
    with pytest.raises(PlanError, match="begins with buffer 'moon'"):
        plan(held_at_start=(Held("moon", 0, 0),))


@given(plans())
def test_json_there_and_back(made: Plan) -> None:
    assert from_json(to_json(made)) == made


@given(plans())
def test_every_wait_that_a_buffer_needs_is_checked(made: Plan) -> None:
    """Without its waits, an op that shares a buffer with an earlier one is refused."""
    shared: set[str] = set()
    for number, op in enumerate(made.ops):
        if shared & set(op.touches):
            ops = [*made.ops]
            ops[number] = replace(op, waits=())
            with pytest.raises(PlanError, match=rf"op {number} "):
                replace(made, ops=tuple(ops))
        shared |= set(op.touches)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "other"}, "must be a JSON object with"),
        ({"ops": [{"kind": "load"}]}, "op 0 must be an object with kind, lane"),
        ({"ops": [{"kind": "load", "lane": "h2d", "speed": 1}]}, "op 0 must be .* known fields"),
        ({"ops": [{"kind": "load", "lane": "h2d", "waits": ["0"]}]}, "op 0 has waits"),
        ({"ops": [{"kind": "load", "lane": "h2d", "num_bytes": 1.5}]}, "op 0 has num_bytes 1.5"),
        ({"ops": [{"kind": "load", "lane": "h2d", "ahead": 1}]}, "op 0 has ahead 1"),
        ({"colour": "red"}, "colour"),
        ({"buffers": {"slot": 3}}, "missing, unknown or malformed"),
    ],
)
def test_json_that_is_no_plan_is_refused(change: dict[str, Any], message: str) -> None:
    fields = json.loads(to_json(plan(LOAD, RUN))) | change
    with pytest.raises(PlanError, match=message):
        from_json(json.dumps(fields))


def test_text_that_is_no_json_is_refused() -> None:
    with pytest.raises(PlanError, match="must be JSON"):
        from_json("{")


def test_chained_steps_wait_for_the_step_before_and_for_what_it_did_ahead() -> None:
    held = (Held("slot", 3, 1),)
    first = plan(LOAD, RUN, replace(LOAD, waits=(1,), ahead=True), held_at_end=held)
    other = Op("embed", "cpu")
    second = plan(other, replace(RUN, waits=()), held_at_start=held)
    joined = chain([first, second])
    assert [op.waits for op in joined.ops] == [(), (0,), (1,), (1,), (1, 2)]
    assert not any(op.ahead for op in joined.ops)
    with pytest.raises(PlanError, match="plan 1 does not begin with what plan 0 leaves"):
        chain([first, first])
    with pytest.raises(PlanError, match="no plan"):
        chain([])
