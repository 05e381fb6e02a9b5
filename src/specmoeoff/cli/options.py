"""What each command was asked to do, as plain frozen data that can cross a process border."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from specmoeoff.config import EngineConfig, SpeculativeConfig
from specmoeoff.errors import InvalidInputError
from specmoeoff.memory_size import parse_memory_size

if TYPE_CHECKING:
    from collections.abc import Mapping

    from specmoeoff.llm import LLM
    from specmoeoff.sampling_params import SamplingParams


@dataclass(frozen=True)
class EngineOptions:
    """The options that all commands with a model share."""

    model: str
    memory: str | None = None
    draft: str = "off"
    """A directory or hub id, ``ngram``, ``off`` or ``auto``."""
    draft_model: str | None = None
    """The draft that ``auto`` may use."""
    num_speculative_tokens: int | None = None
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    max_model_len: int | None = None
    dtype: str | None = None
    kv_dtype: str | None = None
    num_threads: int | None = None
    expert_mode: str | None = None
    schedule: str | None = None
    device: str | None = None
    device_memory: str | None = None
    num_micro_batches: int | None = None
    cpu_target: str | None = None
    seed: int = 0

    def speculative(self) -> SpeculativeConfig | None:
        """Return how drafts are made; None is off."""
        if self.draft_model is not None and self.draft != "auto":
            raise InvalidInputError("--draft-model goes with --draft auto; give the draft itself")
        if self.draft == "off":
            return None
        adaptive = self.draft == "auto"
        draft = self.draft_model if adaptive else self.draft
        if draft in (None, "ngram"):
            config = SpeculativeConfig(method="ngram", adaptive=adaptive)
        else:
            config = SpeculativeConfig(method="draft_model", model=draft, adaptive=adaptive)
        if self.num_speculative_tokens is None:
            return config
        return replace(config, num_speculative_tokens=self.num_speculative_tokens)

    def engine(self) -> EngineConfig:
        """Return what is asked of the engine.

        Raises:
            InvalidInputError: A value is out of range.
        """
        return EngineConfig(
            model=self.model,
            memory=None if self.memory is None else parse_memory_size(self.memory),
            speculative=self.speculative(),
            seed=self.seed,
            **self._given(),
        )

    def open_llm(self) -> LLM:
        """Open the model; the first import of anything heavy."""
        config = self.engine()
        from specmoeoff.llm import LLM

        return LLM(
            config.model,
            memory=config.memory,
            seed=config.seed,
            speculative_config=config.speculative,
            **self._given(),
        )

    def _given(self) -> dict[str, Any]:
        """Return the options that were given, so that defaults are said in one place only."""
        optional = {
            "max_num_seqs": self.max_num_seqs,
            "max_num_batched_tokens": self.max_num_batched_tokens,
            "max_model_len": self.max_model_len,
            "dtype": self.dtype,
            "kv_dtype": self.kv_dtype,
            "num_threads": self.num_threads,
            "expert_mode": self.expert_mode,
            "schedule": self.schedule,
            "device": self.device,
            "device_memory": None
            if self.device_memory is None
            else parse_memory_size(self.device_memory),
            "num_micro_batches": self.num_micro_batches,
            "cpu_target": self.cpu_target,
        }
        return {name: value for name, value in optional.items() if value is not None}


@dataclass(frozen=True)
class GenerateOptions:
    """``specmoeoff generate``."""

    engine: EngineOptions
    sampling: dict[str, Any] = field(default_factory=dict)
    """Fields of ``SamplingParams`` that were given."""
    prompts: str | None = None
    output: str | None = None
    prompt: tuple[str, ...] = ()
    resume: bool = False
    overwrite: bool = False
    stats: str | None = None
    json: bool = False
    quiet: bool = False


@dataclass(frozen=True)
class ChatOptions:
    """``specmoeoff chat``."""

    engine: EngineOptions
    sampling: dict[str, Any] = field(default_factory=dict)
    system: str | None = None
    quiet: bool = False


@dataclass(frozen=True)
class DoctorOptions:
    """``specmoeoff doctor``; without a model it looks at the machine alone."""

    engine: EngineOptions | None = None
    json: bool = False


@dataclass(frozen=True)
class DemoOptions:
    """``specmoeoff demo``."""

    build: str | None = None
    experts: int = 8
    noise: float = 0.10
    drop_layers: tuple[int, ...] = ()
    seed: int = 0
    memory: str = "1GiB"
    max_tokens: int = 256
    num_speculative_tokens: int = 4
    schedule: str | None = None
    json: bool = False


@dataclass(frozen=True)
class PackOptions:
    """``specmoeoff pack``."""

    model: str
    output: str
    quiet: bool = False
    json: bool = False


@dataclass(frozen=True)
class TraceOptions:
    """``specmoeoff trace``."""

    engine: EngineOptions
    output: str
    png: str | None = None
    schedule: str = "specmoeoff"
    device: str = "cpu"
    device_memory: str | None = None
    host: str = "a30"
    scale: float = 1.0
    num_seqs: int = 8
    num_micro_batches: int = 2
    context: int = 64
    num_steps: int = 2
    simulate: bool = False
    json: bool = False


def sampling_params(given: Mapping[str, Any]) -> SamplingParams:
    """Return the parameters of a run: greedy unless a temperature was given.

    Raises:
        InvalidInputError: A value cannot be used.
    """
    from specmoeoff.sampling_params import SamplingParams

    return SamplingParams.from_dict({"temperature": 0.0, **given})


def from_dict(command: str, fields: dict[str, Any]) -> GenerateOptions | ChatOptions:
    """Return the options that ``dataclasses.asdict`` and JSON made ``fields`` of."""
    engine = EngineOptions(**fields.pop("engine"))
    if command == ChatOptions.__name__:
        return ChatOptions(engine=engine, **fields)
    return GenerateOptions(engine=engine, prompt=tuple(fields.pop("prompt")), **fields)
