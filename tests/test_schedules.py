"""What every schedule's plans have in common, over random shapes, and what sets each apart.

That a plan can be built at all says that its buffers are sound: plans check themselves.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from random_plans import shapes, tiny_shape_config
from specmoeoff.errors import InvalidInputError
from specmoeoff.pipeline.chain import chain
from specmoeoff.pipeline.costs import Costs, Rate
from specmoeoff.pipeline.schedules import SCHEDULES, build_plan
from specmoeoff.pipeline.schedules.belt import KEPT, split
from specmoeoff.pipeline.schedules.shape import CPU, DEVICE, DEVICE_AND_DISK, MicroBatch, StepShape
from specmoeoff.pipeline.tune import steady_step_s, steps_of, tuned

if TYPE_CHECKING:
    from specmoeoff.pipeline.plan import Held, Op, Plan

NAMES = sorted(SCHEDULES)
EXPERT = 2304


def shape(num_batches: int = 2, num_slots: int = 8, **fields: object) -> StepShape:
    batches = (MicroBatch(4, 4, 100, 4),) * num_batches
    made = StepShape(tiny_shape_config(), batches, DEVICE, num_slots, EXPERT)
    return replace(made, **fields)  # type: ignore[arg-type]


def before(plan: Plan) -> list[set[int]]:
    """Return for each op all that must have ended before it starts."""
    found: list[set[int]] = []
    for op in plan.ops:
        found.append(set(op.waits).union(*(found[wait] for wait in op.waits)))
    return found


def only(plan: Plan, kind: str, layer: int | None, m: int) -> int:
    """Return the one op of a kind for a layer and a micro-batch."""
    (number,) = (
        n
        for n, op in enumerate(plan.ops)
        if op.kind == kind and op.layer == layer and m in op.micro_batches
    )
    return number


@pytest.mark.parametrize("name", NAMES)
@given(step=shapes())
@settings(max_examples=25)
def test_every_micro_batch_goes_through_every_layer_in_order(name: str, step: StepShape) -> None:
    plan = build_plan(name, step)
    earlier = before(plan)
    for m in range(len(step.micro_batches)):
        done = only(plan, "embed", None, m)
        for layer in range(step.config.num_layers):
            for kind in ("pre_attention", "attend", "post_attention"):
                number = only(plan, kind, layer, m)
                assert done in earlier[number]
                done = number
            store = only(plan, "store_kv", layer, m)
            assert only(plan, "pre_attention", layer, m) in earlier[store]
            runs = [n for n, op in enumerate(plan.ops) if is_run_of(op, layer, m)]
            # Each expert once, in rising order: the order of the sum is part of the result.
            assert [e for n in runs for e in plan.ops[n].experts] == list(range(step.num_experts))
            for number in runs:
                assert done in earlier[number]
                done = number
        head = only(plan, "head", None, m)
        assert done in earlier[head]
        drafts = [op for op in plan.ops if op.kind == "draft" and m in op.micro_batches]
        assert len(drafts) == (step.draft is not None)


def is_run_of(op: Op, layer: int, m: int) -> bool:
    return op.kind == "experts" and op.layer == layer and m in op.micro_batches


@pytest.mark.parametrize("name", NAMES)
@given(step=shapes())
@settings(max_examples=25)
def test_what_an_expert_runs_on_was_loaded_or_stays(name: str, step: StepShape) -> None:
    """Over steps in a row, so that what was loaded ahead counts."""
    plans = steps_of(name, step)
    assert plans[0].held_at_start == ()
    # The joined plan is checked like any other: a buffer filled ahead is used after it was filled.
    whole = chain(plans)
    slots: dict[str, tuple[int, int]] = {}
    for op in whole.ops:
        assert op.layer is not None or not op.experts
        if op.kind in ("read", "load") and op.acquires[0].startswith("slot"):
            slots[op.acquires[0]] = (op.layer or 0, op.experts[0])
        if op.kind == "experts":
            streamed = {slots[b] for b in (*op.uses, *op.releases) if b.startswith("slot")}
            assert all(layer == op.layer and e in op.experts for layer, e in streamed)
    ring = sum(name.startswith("slot") for name in whole.buffers)
    assert ring + resident(whole) <= step.num_slots


def resident(plan: Plan) -> int:
    stay = plan.buffers.get("resident experts")
    return stay.num_bytes // EXPERT if stay else 0


@pytest.mark.parametrize("name", NAMES)
def test_lanes_are_those_of_the_machine(name: str) -> None:
    lanes = {
        placement: {op.lane for op in build_plan(name, shape(3, placement=placement)).ops}
        for placement in (CPU, DEVICE, DEVICE_AND_DISK)
    }
    assert lanes[CPU] == {"disk", "cpu"}
    assert "disk" not in lanes[DEVICE]
    assert {"h2d", "device"} <= lanes[DEVICE] < lanes[DEVICE_AND_DISK]


@pytest.mark.parametrize("name", NAMES)
def test_with_room_for_all_nothing_is_streamed(name: str) -> None:
    plan = build_plan(name, shape(num_slots=12))
    assert not [op for op in plan.ops if op.kind in ("read", "load")]


def loads(name: str, step: StepShape) -> int:
    """Return how many experts a step among others loads."""
    return sum(op.kind == "load" for op in steps_of(name, step)[-1].ops)


def test_how_often_a_step_streams_the_weights() -> None:
    step = shape(num_batches=4, num_slots=8)
    streamed = {name: 12 - resident(build_plan(name, step)) for name in NAMES}
    counts = {name: loads(name, step) / streamed[name] for name in NAMES}
    once = ("specmoeoff", "flexgen", "moe_lightning", "moe_gen")
    assert counts == dict.fromkeys(once, 1) | {"spec_offload": 2, "zero_inference": 4}


def test_who_runs_experts_over_the_whole_batch() -> None:
    most = {
        name: max(len(op.micro_batches) for op in build_plan(name, shape(4)).ops) for name in NAMES
    }
    whole = {"specmoeoff": 4, "moe_gen": 4}
    assert most == whole | {
        "spec_offload": 2,
        "zero_inference": 1,
        "flexgen": 1,
        "moe_lightning": 1,
    }
    waves = build_plan("specmoeoff", shape(4, waves=2))
    assert {op.micro_batches for op in waves.ops if op.kind == "experts"} == {(0, 1), (2, 3)}


def test_where_attention_is() -> None:
    lanes = {
        name: Counter(op.lane for op in build_plan(name, shape(5)).ops if op.kind == "attend")
        for name in NAMES
    }
    on_host, on_device = Counter(cpu=15), Counter(device=15)
    assert lanes["moe_gen"] == Counter(cpu=9, device=6)
    assert all(lanes[name] == on_host for name in ("specmoeoff", "moe_lightning", "spec_offload"))
    assert all(lanes[name] == on_device for name in ("flexgen", "zero_inference"))


def test_who_loads_ahead_for_the_next_step() -> None:
    ahead = {name for name in NAMES if any(op.ahead for op in build_plan(name, shape()).ops)}
    assert ahead == {"specmoeoff", "flexgen", "moe_lightning", "spec_offload"}


def test_flexgen_goes_in_lock_step() -> None:
    plan = build_plan("flexgen", shape(3))
    earlier = before(plan)
    last = only(plan, "experts", 0, 0)
    for m in (1, 2):
        assert last in earlier[only(plan, "pre_attention", 0, m)]
        last = only(plan, "experts", 0, m)


def test_moe_lightning_runs_attention_ahead_across_layers() -> None:
    plan = build_plan("moe_lightning", shape(4))
    earlier = before(plan)
    assert only(plan, "experts", 0, 3) not in earlier[only(plan, "attend", 1, 0)]


def test_waves_overlap_attention_with_experts_and_one_wave_does_not() -> None:
    step = shape(2)
    for waves, overlaps in ((1, False), (2, True)):
        plan = build_plan("specmoeoff", replace(step, waves=waves))
        experts = max(n for n, op in enumerate(plan.ops) if is_run_of(op, 0, 1))
        assert (experts not in before(plan)[only(plan, "attend", 1, 0)]) == overlaps


@given(
    num_slots=st.integers(1, 14),
    layers_ahead=st.sampled_from([0.0, 1.0, 2.0]),
    extra=st.integers(0, 3),
)
def test_the_split_uses_every_slot(num_slots: int, layers_ahead: float, extra: int) -> None:
    found = split(shape(num_slots=num_slots), layers_ahead, extra)
    if num_slots >= 12:
        assert len(found.resident) == 12
        return
    assert found.ring_slots + len(found.resident) == num_slots
    assert found.ring_slots >= 1
    per_layer = [len(found.streamed(layer, 4)) for layer in range(3)]
    assert max(per_layer) - min(per_layer) <= 1, "what stays is spread evenly"


@pytest.mark.parametrize("name", NAMES)
@given(counts=st.lists(st.integers(0, 9), min_size=2, max_size=8), num_slots=st.integers(4, 11))
@settings(max_examples=40)
def test_extra_slots_come_and_go_at_no_load(name: str, counts: list[int], num_slots: int) -> None:
    """Each step loads what it did without them, less what they keep; the first keep the same."""
    step = shape(num_slots=num_slots)
    try:
        plain = steps_of(name, step, 3)[-1]
    except InvalidInputError:
        return
    places: dict[str, tuple[int, int]] = {}
    held: tuple[Held, ...] = plain.held_at_start
    before: list[Held] = []
    for count in [*counts, counts[-1], counts[-1]]:
        plan = build_plan(name, replace(step, extra_slots=count), held)
        kept = [h for h in plan.held_at_end if h.buffer.startswith(KEPT)]
        assert len(kept) <= count
        for h in kept:
            assert places.setdefault(h.buffer, (h.layer, h.expert)) == (h.layer, h.expert)
        # Those whose slots are still there are not loaded again.
        there = {h for h in before if int(h.buffer.split()[-1]) < count}
        assert there <= set(plan.held_at_start)
        loaded = {(op.layer, op.experts[0]) for op in plan.ops if op.kind == "load"}
        assert not loaded & {(h.layer, h.expert) for h in there}
        held, before = plan.held_at_end, kept
    streamed = {(op.layer, op.experts) for op in plain.ops if op.kind == "load"}
    assert len(kept) == min(counts[-1], len(streamed))
    assert len(loaded) == len(streamed) - len(kept)


def test_too_few_slots_and_unknown_names_are_refused() -> None:
    with pytest.raises(InvalidInputError, match="'zero_inference' needs more than 3 expert slots"):
        build_plan("zero_inference", shape(num_slots=3))
    assert build_plan("specmoeoff", shape(num_slots=1)).ops
    with pytest.raises(
        InvalidInputError, match="schedule 'best' is unknown; use one of specmoeoff"
    ):
        build_plan("best", shape())
    for field in ("num_slots", "host_slots", "waves", "ring_slots"):
        with pytest.raises(InvalidInputError, match=f"{field} is 0"):
            shape(**{field: 0})
    with pytest.raises(InvalidInputError, match="at least one micro-batch"):
        shape(micro_batches=())


def test_tuning_takes_two_waves_where_attention_is_slow() -> None:
    slow_host = Costs({"h2d": Rate(1e6), "device": Rate(1e8, 2e7), "cpu": Rate(4e5)})
    step = shape(4, num_slots=9)
    best = tuned(step, slow_host)
    assert best.waves == 2
    assert steady_step_s("specmoeoff", best, slow_host) < steady_step_s(
        "specmoeoff", step, slow_host
    )


def test_tuning_takes_one_wave_where_weights_are_slow_to_read_again() -> None:
    slow_device = Costs({"device": Rate(1e6), "cpu": Rate(1e9)})
    assert tuned(shape(4, num_slots=12), slow_device).waves == 1


def test_tuning_takes_a_short_ring_where_only_bytes_count() -> None:
    costs = Costs({"h2d": Rate(1e6), "device": Rate(4e6), "cpu": Rate(1e9)})
    assert tuned(shape(1, num_slots=10), costs).ring_slots == 2


@pytest.mark.parametrize("name", NAMES)
@given(first=shapes(), second=shapes())
@settings(max_examples=25)
def test_a_belt_that_ran_ahead_serves_a_step_of_another_batch(
    name: str, first: StepShape, second: StepShape
) -> None:
    """Batches change from step to step; what stays and what the ring holds do not."""
    other = replace(first, micro_batches=second.micro_batches, draft=second.draft)
    plans: list[Plan] = []
    for step in (first, other, first, other):
        held = plans[-1].held_at_end if plans else ()
        plans.append(build_plan(name, step, held))
        # Nothing that was loaded ahead is dropped, and the plan has checked itself.
        assert plans[-1].held_at_start == held
    assert len({frozenset(slots_of(plan)) for plan in plans}) == 1
    stays = [loaded_or_held(plan) for plan in plans]
    assert all(those == stays[0] for those in stays)


def slots_of(plan: Plan) -> set[str]:
    return {name for name, buffer in plan.buffers.items() if buffer.pool == "experts"}


def loaded_or_held(plan: Plan) -> set[tuple[int | None, int]]:
    """Return the experts that do not stay."""
    loaded = {(op.layer, op.experts[0]) for op in plan.ops if op.kind in ("read", "load")}
    return loaded | {(held.layer, held.expert) for held in plan.held_at_start}
