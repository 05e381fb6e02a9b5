"""SpecMoEOff: mixture-of-experts models that do not fit memory, sped up by speculative decoding.

The public names are imported when they are first used, so ``import specmoeoff`` costs a
millisecond and brings in neither numpy nor anything else that is not in the standard library.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from specmoeoff.config import EngineConfig, Policy, SpeculativeConfig
    from specmoeoff.llm import LLM
    from specmoeoff.outputs import RequestOutput
    from specmoeoff.sampling_params import SamplingParams

__version__ = "0.1.0"

__all__ = [
    "LLM",
    "EngineConfig",
    "Policy",
    "RequestOutput",
    "SamplingParams",
    "SpeculativeConfig",
    "__version__",
]

_HOMES = {
    "LLM": "specmoeoff.llm",
    "EngineConfig": "specmoeoff.config",
    "Policy": "specmoeoff.config",
    "RequestOutput": "specmoeoff.outputs",
    "SamplingParams": "specmoeoff.sampling_params",
    "SpeculativeConfig": "specmoeoff.config",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(_HOMES))
