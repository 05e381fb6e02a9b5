"""What is wished (EngineConfig, SpeculativeConfig), chosen (Policy), and there (ModelConfig).

All four are frozen: a value that must change is replaced, never edited. Shapes and options only;
nothing here opens a file or knows where weights lie.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from specmoeoff.errors import InvalidInputError

KvDtype = Literal["bfloat16", "float16", "float32", "int8"]
ExpertMode = Literal["auto", "belt", "demand"]
Dtype = Literal["float32", "bfloat16"]
Device = Literal["auto", "cpu", "sim", "cuda"]
SpeculativeMethod = Literal["draft_model", "ngram"]

KV_DTYPES: tuple[KvDtype, ...] = get_args(KvDtype)
DTYPES: tuple[Dtype, ...] = get_args(Dtype)
WITH_MEMORY: tuple[Device, ...] = ("sim", "cuda")
"""Devices with a memory of their own."""
MAX_SPECULATIVE_TOKENS = 32


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding, as a checkpoint's config describes it."""

    theta: float = 10000.0
    """Base of the geometric series of frequencies."""
    rope_type: str = "default"
    """``default``, ``linear``, ``dynamic``, ``yarn`` or ``llama3``."""
    parameters: tuple[tuple[str, Any], ...] = ()
    """What else the scaling rule needs (``factor``, ``low_freq_factor``, ...), sorted by name."""

    def parameter(self, name: str, default: Any = None) -> Any:
        """Return one scaling parameter, or ``default`` if the checkpoint does not state it."""
        return dict(self.parameters).get(name, default)


@dataclass(frozen=True)
class ModelConfig:
    """The shapes of one model. ``num_experts == 0`` says that it is dense."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    max_position_embeddings: int
    rope: RopeConfig
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    sliding_window: int | None = None
    num_experts: int = 0
    num_experts_per_tok: int = 0
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    @property
    def is_moe(self) -> bool:
        """Whether the FFN is a set of routed experts."""
        return self.num_experts > 0


@dataclass(frozen=True)
class SpeculativeConfig:
    """How drafts are made. ``LLM(speculative_config=None)`` turns speculation off."""

    method: SpeculativeMethod = "draft_model"
    """``draft_model``: a small model with the target's vocabulary. ``ngram``: look the last tokens
    up in the sequence's own past and propose what followed them there (prompt lookup)."""
    model: str | None = None
    """Directory or hub id of the draft model (``draft_model`` only)."""
    num_speculative_tokens: int = 4
    """Most tokens drafted per sequence and step (k), 1 to 32."""
    adaptive: bool = False
    """Let the measured acceptance and step times choose k, zero (speculation off) included."""
    prompt_lookup_max: int = 4
    """Longest n-gram that is looked up (``ngram`` only)."""
    prompt_lookup_min: int = 2
    """Shortest n-gram that is looked up (``ngram`` only)."""
    draft_weight_dtype: Literal["auto", "int8"] = "int8"
    """``int8`` keeps the draft's matrices as int8 with one float32 scale per row, which halves the
    memory it takes from the target; ``auto`` keeps the checkpoint's dtype. Output is the same."""
    draft_kv_dtype: Literal["auto"] | KvDtype = "int8"
    """Element type of the draft's own KV cache; ``auto`` is the target's. Output is the same."""
    share_kv: bool = True
    """Let a draft that has the target's key and value projections read the target's KV cache, so
    that it takes no memory for its own and reads no prompt. Output is the same."""

    def __post_init__(self) -> None:
        if self.method not in ("draft_model", "ngram"):
            raise InvalidInputError(
                f"speculative method {self.method!r} is unknown; use 'draft_model' or 'ngram'"
            )
        if self.method == "draft_model" and not self.model:
            raise InvalidInputError(
                "speculative method 'draft_model' needs a model: give its directory or hub id"
            )
        if not 1 <= self.num_speculative_tokens <= MAX_SPECULATIVE_TOKENS:
            raise InvalidInputError(
                f"num_speculative_tokens is {self.num_speculative_tokens}; "
                f"it must be 1 to {MAX_SPECULATIVE_TOKENS}"
            )
        if not 1 <= self.prompt_lookup_min <= self.prompt_lookup_max:
            raise InvalidInputError(
                f"prompt_lookup_min {self.prompt_lookup_min} and prompt_lookup_max "
                f"{self.prompt_lookup_max} must satisfy 1 <= min <= max"
            )
        if self.draft_weight_dtype not in ("auto", "int8"):
            raise InvalidInputError(
                f"draft_weight_dtype is {self.draft_weight_dtype!r}; use 'auto' or 'int8'"
            )
        if self.draft_kv_dtype not in ("auto", *KV_DTYPES):
            raise InvalidInputError(
                f"draft_kv_dtype is {self.draft_kv_dtype!r}; "
                f"use one of auto, {', '.join(KV_DTYPES)}"
            )


@dataclass(frozen=True)
class EngineConfig:
    """What the user asks of the engine."""

    model: str
    """Hugging Face directory or hub id of the target."""
    memory: int | None = None
    """Budget in bytes for the whole process (peak RSS); None takes what is free, less a margin."""
    device: Device = "auto"
    """Where the target runs: ``cpu``, which ``auto`` takes; ``cuda``, a GPU through torch, with
    attention on the host; or ``sim``, a device that is simulated with a memory of its own, through
    which all that a GPU would get is copied. ``cuda`` adds in another order than the others, so its
    tokens may differ from theirs where two logits are nearly equal."""
    device_memory: int | None = None
    """Bytes of the device's memory, beside ``memory``. ``sim`` needs it; on ``cuda`` None takes
    what is free."""
    schedule: str = "auto"
    """The order of work in a step. ``reactive`` reads experts as tokens are routed to them and
    ahead of that; the names of ``pipeline.schedules`` run the plan of that schedule. ``auto`` takes
    ``reactive`` on the CPU and ``specmoeoff`` elsewhere. On ``cpu`` and ``sim`` the output is the
    same when it is greedy or sampled without a draft model; else its distribution is."""
    num_micro_batches: int = 2
    """Most parts that a plan cuts a step's sequences into."""
    dtype: Literal["auto"] | Dtype = "float32"
    """What the target's activations are rounded to before each product; sums and everything between
    products stay float32, and weights are as the checkpoint has them. ``bfloat16`` may change the
    output, as it does in Transformers; each gives the same tokens whatever the schedule and the
    drafts. ``auto`` takes ``bfloat16`` where this CPU multiplies it at least 1.5 times as fast."""
    kv_dtype: KvDtype = "bfloat16"
    """Element type of the KV cache. ``int8`` has one float32 scale per token and KV head and takes
    little more than half of ``bfloat16``. Another dtype is another rounding of keys and values, so
    it may change the output; each gives the same tokens whatever the schedule and the drafts."""
    max_num_seqs: int = 64
    """Most sequences that run at once."""
    max_num_batched_tokens: int | None = None
    """Token budget of one step: decode tokens, drafts and prompt chunks together; None takes as
    many as the memory budget has room for."""
    max_model_len: int | None = None
    """Longest prompt + output in tokens; None takes the model's own limit."""
    num_threads: int | None = None
    """Compute threads; None takes the cores this process may use."""
    expert_mode: ExpertMode = "auto"
    """``belt`` streams every expert in cyclic order, ``demand`` reads experts after routing,
    ``auto`` decides per step by the number of experts the step is expected to touch."""
    cpu_target: str | None = None
    """Kernel target (see ``specmoeoff doctor``); None takes the best this CPU has."""
    seed: int = 0
    """Seed of requests that set none of their own."""
    speculative: SpeculativeConfig | None = None
    """Speculation; None is off."""

    def __post_init__(self) -> None:
        for name in (
            "max_num_seqs",
            "max_num_batched_tokens",
            "max_model_len",
            "num_threads",
            "device_memory",
            "num_micro_batches",
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InvalidInputError(f"{name} is {value}; it must be at least 1")
        if self.seed < 0:
            raise InvalidInputError(f"seed is {self.seed}; it must be 0 or more")
        for name, allowed in (
            ("device", get_args(Device)),
            ("dtype", ("auto", *DTYPES)),
            ("kv_dtype", KV_DTYPES),
            ("expert_mode", ("auto", "belt", "demand")),
        ):
            if getattr(self, name) not in allowed:
                raise InvalidInputError(
                    f"{name} is {getattr(self, name)!r}; use one of {', '.join(allowed)}"
                )
        is_missing = self.device == "sim" and self.device_memory is None
        if is_missing or (self.device_memory is not None and self.device not in WITH_MEMORY):
            raise InvalidInputError(
                "device 'sim' and device_memory go together: give both, such as device_memory "
                "'8GiB', or neither; device 'cuda' may have it"
            )
        if self.is_planned and self.expert_mode != "auto":
            raise InvalidInputError(
                f"expert_mode is {self.expert_mode!r}, but a plan decides by itself what is read "
                "when: leave it 'auto', or use schedule 'reactive' on device 'cpu'"
            )

    @property
    def is_planned(self) -> bool:
        """Whether passes run by plans."""
        return self.schedule not in ("auto", "reactive") or self.device in WITH_MEMORY


@dataclass(frozen=True)
class Policy:
    """What was chosen for a run: the memory split and the limits that follow from it."""

    memory: int
    """The budget the split adds up to, in bytes."""
    reservations: tuple[tuple[str, int], ...] = field(default=())
    """Named parts of the budget in bytes, in the order they were taken."""
    num_expert_slots: int = 0
    """Experts that the slot arena holds while the KV cache is at its smallest."""
    min_expert_slots: int = 0
    """Slots that are never given to the KV cache."""
    expert_slot_bytes: int = 0
    """Bytes of one slot, read alignment included."""
    max_num_seqs: int = 0
    max_num_batched_tokens: int = 0
    max_model_len: int = 0
    dtype: Dtype = "float32"
    """What the target's activations are rounded to before each product."""
    left_out: str = ""
    """Why a draft that was asked for is not loaded; empty if it is, or none was asked for."""

    def as_dict(self) -> dict[str, Any]:
        """Return the policy as plain data for ``--json``."""
        return dataclasses.asdict(self)
