from __future__ import annotations

import pytest

from specmoeoff.errors import DoesNotFitError
from specmoeoff.offload.tiers import Tier, TierUse


def test_a_tier_keeps_names_its_plan_and_its_peak() -> None:
    tier = Tier("device", 100)
    tier.reserve("weights", 60)
    tier.reserve("activations", 40)
    assert (tier.free, tier.reserved, tier.planned, tier.peak) == (0, 100, 100, 0)
    for taken, peak in ((20, 80), (35, 95), (10, 95)):
        tier.take("activations", taken)
        assert (tier.reserved, tier.planned, tier.peak) == (60 + taken, 100, peak)
    assert tier.as_dict() == {"weights": 60, "activations": 10}
    assert tier.use(95) == TierUse(budget=100, planned=100, reserved=70, peak=95)


def test_what_was_not_there_to_take_is_no_peak() -> None:
    tier = Tier("device", 100)
    tier.reserve("weights", 60)
    with pytest.raises(DoesNotFitError, match="too small for weights 60 B"):
        tier.take("activations", 41)
    assert (tier.reserved, tier.peak) == (60, 0)


def test_what_does_not_fit_is_refused_with_the_arithmetic() -> None:
    tier = Tier("device", 3 << 20)
    tier.reserve("weights", 2 << 20)
    tier.reserve("activations", 1 << 20)
    with pytest.raises(DoesNotFitError) as caught:
        tier.reserve("activations", 2 << 20)
    assert str(caught.value).startswith(
        "device memory of 3.00 MiB is too small for "
        "weights 2.00 MiB + activations 2.00 MiB = 4.00 MiB"
    )
    assert tier.as_dict()["activations"] == 1 << 20
