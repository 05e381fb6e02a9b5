"""Opens a model's files and says what its parts weigh, before any weight is read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from specmoeoff.engine.weights import Loader, dense_specs, expert_specs
from specmoeoff.errors import CheckpointError
from specmoeoff.models.checks import check_layout
from specmoeoff.models.hf_config import parse_config
from specmoeoff.models.registry import build_model
from specmoeoff.offload.arena import round_up
from specmoeoff.offload.checkpoint import Checkpoint
from specmoeoff.offload.expert_layout import ExpertLayout, lay_out
from specmoeoff.offload.hub import resolve_model

if TYPE_CHECKING:
    from pathlib import Path

    from specmoeoff.models.base import Model


@dataclass(frozen=True)
class ModelFiles:
    """A checkpoint whose config and tensor table were read and found to agree."""

    directory: Path
    checkpoint: Checkpoint
    model: Model

    @classmethod
    def open(cls, name: str) -> ModelFiles:
        """Open a directory or hub id.

        Raises:
            CheckpointError: It cannot be used; the message names the file and the field or tensor.
        """
        directory = resolve_model(name)
        model = build_model(parse_config(directory))
        checkpoint = Checkpoint.open(directory)
        check_layout(checkpoint.tensors)
        return cls(directory, checkpoint, model)

    @property
    def total_experts(self) -> int:
        """Experts of all layers."""
        return self.model.config.num_layers * self.model.num_ffn_experts

    def dense_bytes(self, loader: Loader) -> int:
        """Return the bytes of everything but the experts, once loaded."""
        return sum(round_up(loader.stored_bytes(spec)) for spec in dense_specs(self.model))

    def expert_bytes(self, loader: Loader) -> int:
        """Return the bytes of all experts, once loaded."""
        return sum(loader.stored_bytes(spec) for spec in expert_specs(self.model))

    def expert_layouts(self) -> list[list[ExpertLayout]]:
        """Return where every expert lies, [num_layers][num_experts]."""
        return [
            [self._layout(layer, e) for e in range(self.model.num_ffn_experts)]
            for layer in range(self.model.config.num_layers)
        ]

    def _layout(self, layer: int, expert: int) -> ExpertLayout:
        specs = self.model.expert_tensors(layer, expert)
        refs = {
            canonical: self.checkpoint.require(spec.name, spec.shape)
            for canonical, spec in specs.items()
        }
        return lay_out(f"expert {expert} of layer {layer} ({specs['gate'].name})", refs)


def check_pair(target: ModelFiles, draft: ModelFiles) -> None:
    """Refuse a draft that does not speak the target's tokens.

    Raises:
        CheckpointError: The vocabularies differ in size.
    """
    wanted, found = target.model.config.vocab_size, draft.model.config.vocab_size
    if wanted != found:
        raise CheckpointError(
            f"{draft.directory}/config.json: the draft's vocab_size is {found}, the target's is "
            f"{wanted}; a draft must have the target's vocabulary"
        )
