"""What activations are rounded to: float32 unless asked, and ``auto`` by a measured gain."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from specmoeoff import LLM, kernels
from specmoeoff.config import EngineConfig
from specmoeoff.engine import dtype as dtype_module
from specmoeoff.engine.dtype import LEAST_GAIN, measure_gain
from specmoeoff.engine.memory_plan import plan_memory
from tiny import write_tiny

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.usefixtures("kernel_settings")


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """Stands in for the measurement and for the CPU: what it will find, and what it was asked."""
    found: dict[str, float] = {"gain": 9.0}

    def measure(n: int, k: int) -> float:
        found.update(n=n, k=k)
        return found["gain"]

    monkeypatch.setattr(dtype_module, "measure_gain", measure)
    monkeypatch.setattr(kernels, "multiplies_bfloat16", lambda: True)
    return found


def chosen(model: Path, **options: object) -> str:
    config = EngineConfig(model=str(model), memory=4 << 30, **options)  # type: ignore[arg-type]
    return plan_memory(config).dtype


def test_it_is_what_was_asked_for_and_float32_if_nothing_was(
    tiny_mixtral: Path, measured: dict[str, float]
) -> None:
    assert chosen(tiny_mixtral) == "float32"
    assert chosen(tiny_mixtral, dtype="float32") == "float32"
    assert chosen(tiny_mixtral, dtype="bfloat16") == "bfloat16"
    assert "n" not in measured  # nothing is timed for nothing


@pytest.mark.parametrize(
    ("gain", "dtype"),
    [(1.0, "float32"), (LEAST_GAIN - 0.01, "float32"), (LEAST_GAIN, "bfloat16"), (4.0, "bfloat16")],
)
def test_auto_goes_by_the_measured_gain(
    tiny_mixtral: Path, measured: dict[str, float], gain: float, dtype: str
) -> None:
    measured["gain"] = gain
    assert chosen(tiny_mixtral, dtype="auto") == dtype
    assert (measured["n"], measured["k"]) == (84, 60)  # the shape of its experts


@pytest.mark.parametrize("stored", ["float16", "float32"])
def test_auto_is_float32_for_weights_of_another_dtype(
    tmp_path: Path, measured: dict[str, float], stored: str
) -> None:
    assert chosen(write_tiny(tmp_path, dtype=stored), dtype="auto") == "float32"
    assert "n" not in measured


def test_auto_is_float32_without_instructions_for_bfloat16(tiny_mixtral: Path) -> None:
    kernels.use_cpu_target("scalar")
    assert chosen(tiny_mixtral, dtype="auto") == "float32"


@pytest.mark.parametrize(("n", "k"), [(84, 60), (1, 1), (14336, 4096), (2, 3 << 19)])
def test_any_shape_can_be_measured(n: int, k: int) -> None:
    assert measure_gain(n, k) > 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_choice_reaches_the_policy_and_every_product(tiny_mixtral: Path, dtype: str) -> None:
    with LLM(str(tiny_mixtral), memory="4GiB", dtype=dtype) as llm:  # type: ignore[arg-type]
        assert llm.policy.dtype == llm.policy.as_dict()["dtype"] == dtype
        assert llm._engine._target.model.activations == dtype
