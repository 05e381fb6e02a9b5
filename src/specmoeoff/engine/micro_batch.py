"""A micro-batch of a pass: which rows it is, where its tokens go, what its next op finds."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from collections.abc import Sequence

    from specmoeoff.devices.base import DeviceArray, Pages
    from specmoeoff.engine.forward import Span
    from specmoeoff.models.base import Model, RopeTables
    from specmoeoff.offload.kv_cache import KvCache

F32 = NDArray[np.float32]
I32 = NDArray[np.int32]


@dataclass
class Slice:
    """One micro-batch in a pass."""

    rows: slice
    token_ids: I32
    rope: RopeTables
    slots: I32
    page_table: I32
    q_offsets: I32
    kv_lens: I32
    output_rows: NDArray[np.int64]
    """Which of its rows are wanted in the end."""
    qkv: tuple[DeviceArray, DeviceArray, DeviceArray] | None = None
    host_qkv: tuple[F32, F32, F32] | None = None
    past: dict[int, Past] = field(default_factory=dict)
    """By layer: the next layer's may arrive before this one's was used."""
    attended: DeviceArray | None = None
    """On the device once it was computed or copied there."""
    host_hidden: F32 | None = None
    outputs: F32 | None = None


@dataclass
class Past:
    """Keys and values of a micro-batch in one layer, copied out of the KV cache."""

    pages: Pages
    slots: I32
    page_table: I32


def cut(spans: Sequence[Span], num_micro_batches: int) -> list[Sequence[Span]]:
    """Divide spans into at most so many runs of about as many tokens each; none is empty."""
    wanted = min(num_micro_batches, len(spans))
    ends = np.cumsum([len(span.token_ids) + span.num_drafts for span in spans])
    cuts = [0]
    for part in range(1, wanted):
        nearest = int(np.searchsorted(ends, ends[-1] * part / wanted)) + 1
        # At least one for this run, and one for each that follows.
        cuts.append(min(max(nearest, cuts[-1] + 1), len(spans) - (wanted - part)))
    cuts.append(len(spans))
    return [spans[a:b] for a, b in itertools.pairwise(cuts)]


def slice_of(model: Model, kv: KvCache, spans: Sequence[Span], first_row: int) -> Slice:
    """Take a micro-batch's place in a pass; counts its tokens into the KV cache."""
    lengths = [len(span.token_ids) for span in spans]
    positions = np.concatenate(
        [span.kv.length + np.arange(n) for span, n in zip(spans, lengths, strict=True)]
    )
    slots = np.concatenate([kv.append(span.kv, n) for span, n in zip(spans, lengths, strict=True)])
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    return Slice(
        rows=slice(first_row, first_row + int(offsets[-1])),
        token_ids=np.concatenate([np.asarray(span.token_ids, np.int32) for span in spans]),
        rope=model.rope_tables(positions.astype(np.int32)),
        slots=slots,
        page_table=kv.page_table([span.kv for span in spans]),
        q_offsets=offsets,
        kv_lens=np.array([span.kv.length for span in spans], np.int32),
        output_rows=np.concatenate(
            [
                np.arange(stop - span.num_outputs, stop)
                for span, stop in zip(spans, offsets[1:], strict=True)
            ]
        ),
    )
