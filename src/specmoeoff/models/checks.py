"""What can be wrong with a checkpoint's tensors beyond name and shape, said before it runs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from specmoeoff import kernels
from specmoeoff.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import NDArray

FUSED_EXPERTS = "experts.gate_up_proj"


def check_router(name: str, router: NDArray[np.generic]) -> None:
    """Refuse a router [E, hidden] that holds NaN or infinity, in any stored dtype.

    Such a router still picks some expert for every token, so nothing else would notice.

    Args:
        name: The tensor's name in the checkpoint, for the message.
        router: Its weights.

    Raises:
        CheckpointError: A value is not finite.
    """
    finite = np.isfinite(kernels.widen(router))
    if not finite.all():
        expert = int(np.argwhere(~finite)[0][0])
        raise CheckpointError(
            f"router tensor {name!r} holds {int((~finite).sum())} values that are NaN or infinite "
            f"(the first in the row of expert {expert}); the checkpoint is damaged"
        )


def check_layout(names: Iterable[str]) -> None:
    """Refuse a checkpoint whose experts are fused into one tensor per layer.

    Raises:
        CheckpointError: A tensor name shows fused experts; the message says how to split them.
    """
    for name in names:
        if name.endswith(FUSED_EXPERTS):
            raise CheckpointError(
                f"tensor {name!r} holds all experts of a layer in one piece, which cannot be "
                "streamed expert by expert; save the model again with transformers' "
                "save_pretrained(save_original_format=True), which writes one tensor per expert"
            )
