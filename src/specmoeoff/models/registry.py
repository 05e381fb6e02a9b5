"""model_type -> model class."""

from __future__ import annotations

from typing import TYPE_CHECKING

from specmoeoff.errors import CheckpointError
from specmoeoff.models.llama import Llama
from specmoeoff.models.mixtral import Mixtral

if TYPE_CHECKING:
    from specmoeoff.config import ModelConfig
    from specmoeoff.kernels import Activations
    from specmoeoff.models.base import Model

MODELS: dict[str, type[Llama]] = {"llama": Llama, "mistral": Llama, "mixtral": Mixtral}


def build_model(config: ModelConfig, activations: Activations = "float32") -> Model:
    """Return the model of a config, its products rounding their activations as told.

    Raises:
        CheckpointError: Its model_type is none that is known.
    """
    if config.model_type not in MODELS:
        raise CheckpointError(
            f"model_type {config.model_type!r} is unknown; supported: {', '.join(MODELS)}"
        )
    return MODELS[config.model_type](config, activations)
