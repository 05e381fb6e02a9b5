"""What a schedule must know of a step: the model's shapes, the micro-batches, the memory.

Sizes of ops follow from here: bytes moved or read, and arithmetic. Activations are float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from specmoeoff.errors import InvalidInputError

if TYPE_CHECKING:
    from specmoeoff.config import ModelConfig
    from specmoeoff.pipeline.plan import Lane

FLOAT_BYTES = 4


@dataclass(frozen=True)
class Placement:
    """Which lanes a kind of machine has."""

    weights: tuple[Lane, ...]
    """How an expert gets to where it is used: ``read`` on the disk lane, ``load`` on h2d."""
    compute: Lane
    """Where projections and experts run."""

    @property
    def has_link(self) -> bool:
        """Whether device and host memory are apart, so that activations have to travel."""
        return self.compute != "cpu"


CPU = Placement(("disk",), "cpu")
"""One memory, experts on disk."""
DEVICE = Placement(("h2d",), "device")
"""A device with memory of its own, experts in host memory."""
DEVICE_AND_DISK = Placement(("disk", "h2d"), "device")
"""The same with a model larger than host memory."""


@dataclass(frozen=True)
class MicroBatch:
    """A slice of the step's sequences."""

    num_tokens: int
    num_seqs: int
    kv_tokens: int
    """Tokens in the KV cache that its sequences attend to, new ones included."""
    num_outputs: int
    """Rows whose logits are wanted."""
    paged_tokens: int | None = None
    """Tokens that the pages of ``kv_tokens`` have room for, each sequence's last one included; None
    is no more than those."""


@dataclass(frozen=True)
class Draft:
    """A draft model that proposes ``num_tokens`` tokens a sequence, one pass each."""

    num_tokens: int
    weight_bytes: int
    num_weights: int


@dataclass(frozen=True)
class StepShape:
    """Everything a builder asks for."""

    config: ModelConfig
    micro_batches: tuple[MicroBatch, ...]
    placement: Placement
    num_slots: int
    """Experts that fit where they are used."""
    expert_bytes: int
    """Bytes of a slot."""
    extra_slots: int = 0
    """Slots beside those, which a later step may not have; see ``belt.py``."""
    weight_bytes: int = 2
    """Bytes of one dense weight."""
    kv_item_bytes: int = 2
    """Bytes of one element of the KV cache."""
    kv_scale_bytes: int = 0
    """Bytes of the scale of a token's keys in one KV head, where the cache has them; values have
    one too."""
    host_slots: int = 2
    """Experts on their way through host memory, with DEVICE_AND_DISK."""
    waves: int = 1
    """Groups of micro-batches that each run the experts by themselves (``specmoeoff`` only)."""
    ring_slots: int | None = None
    """Slots that streamed experts share, where ``specmoeoff`` shall not choose by itself."""
    draft: Draft | None = None

    def __post_init__(self) -> None:
        if not self.micro_batches:
            raise InvalidInputError("a step must have at least one micro-batch")
        for name in ("num_slots", "host_slots", "waves"):
            if getattr(self, name) < 1:
                raise InvalidInputError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.extra_slots < 0:
            raise InvalidInputError(f"extra_slots is {self.extra_slots}; it must be at least 0")
        if self.ring_slots is not None and self.ring_slots < 1:
            raise InvalidInputError(f"ring_slots is {self.ring_slots}; it must be at least 1")

    @property
    def num_experts(self) -> int:
        """Experts of a layer; a dense feed-forward is one."""
        return max(self.config.num_experts, 1)

    @property
    def total_experts(self) -> int:
        """Experts of all layers."""
        return self.config.num_layers * self.num_experts

    def tokens(self, batch: tuple[int, ...]) -> int:
        """Return the tokens of some micro-batches."""
        return sum(self.micro_batches[m].num_tokens for m in batch)

    @property
    def wide(self) -> int:
        """Elements of a token's queries, and of its attention's result."""
        return self.config.num_heads * self.config.head_dim

    @property
    def narrow(self) -> int:
        """Elements of a token's keys, and of its values, in one layer."""
        return self.config.num_kv_heads * self.config.head_dim

    # -- sizes of ops: (bytes, flops) -------------------------------------------------------------

    def hidden(self, m: int) -> int:
        """Return the bytes of a micro-batch's hidden states."""
        return self.micro_batches[m].num_tokens * self.config.hidden_size * FLOAT_BYTES

    def qkv(self, m: int, queries: bool = True) -> int:
        """Return the bytes of a micro-batch's new keys and values in a layer, queries included."""
        width = 2 * self.narrow + (self.wide if queries else 0)
        return self.micro_batches[m].num_tokens * width * FLOAT_BYTES

    def attention(self, m: int) -> int:
        """Return the bytes of a micro-batch's result of attention."""
        return self.micro_batches[m].num_tokens * self.wide * FLOAT_BYTES

    def kv(self, m: int) -> int:
        """Return the bytes of a layer's keys and values that a micro-batch has in whole pages."""
        batch = self.micro_batches[m]
        tokens = batch.kv_tokens if batch.paged_tokens is None else batch.paged_tokens
        return tokens * self._kv_token

    def pre_attention(self, m: int) -> tuple[int, int]:
        """Q, K and V projections."""
        return self._dense(m, self.wide + 2 * self.narrow, self.config.hidden_size)

    def post_attention(self, m: int) -> tuple[int, int]:
        """Output projection; the router is small beside it."""
        return self._dense(m, self.config.hidden_size, self.wide)

    def attend(self, m: int) -> tuple[int, int]:
        """Every new token of a sequence against its whole past, which is read once."""
        batch = self.micro_batches[m]
        tokens_per_seq = batch.num_tokens / max(batch.num_seqs, 1)
        flops = int(4 * tokens_per_seq * batch.kv_tokens * self.wide)
        return batch.kv_tokens * self._kv_token, flops

    def experts(self, batch: tuple[int, ...], num_experts: int) -> tuple[int, int]:
        """Some experts over the rows routed to them, if all experts are equally likely."""
        per_token = max(self.config.num_experts_per_tok, 1)
        rows = self.tokens(batch) * per_token * num_experts / self.num_experts
        weights = 3 * self.config.hidden_size * self.config.intermediate_size
        return num_experts * self.expert_bytes, int(2 * rows * weights)

    def head(self, m: int) -> tuple[int, int]:
        """The LM head over the rows whose logits are wanted."""
        size = self.config.vocab_size * self.config.hidden_size
        return size * self.weight_bytes, 2 * self.micro_batches[m].num_outputs * size

    def drafting(self, m: int) -> tuple[int, int]:
        """The draft's passes for one micro-batch."""
        draft = self.draft
        if draft is None:
            return 0, 0
        rows = draft.num_tokens * self.micro_batches[m].num_seqs
        return draft.num_tokens * draft.weight_bytes, 2 * rows * draft.num_weights

    @property
    def _kv_token(self) -> int:
        """Bytes of a token's keys and values in one layer, scales included."""
        scales = self.config.num_kv_heads * self.kv_scale_bytes
        return 2 * (self.narrow * self.kv_item_bytes + scales)

    def _dense(self, m: int, rows: int, columns: int) -> tuple[int, int]:
        tokens = self.micro_batches[m].num_tokens
        return rows * columns * self.weight_bytes, 2 * tokens * rows * columns
