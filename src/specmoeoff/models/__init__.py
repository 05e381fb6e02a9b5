"""Models as pure maths on weights passed in: config.json -> ModelConfig -> model class."""

from specmoeoff.models.base import Model, TensorSpec, Weights
from specmoeoff.models.checks import check_layout, check_router
from specmoeoff.models.hf_config import parse_config
from specmoeoff.models.registry import build_model

__all__ = [
    "Model",
    "TensorSpec",
    "Weights",
    "build_model",
    "check_layout",
    "check_router",
    "parse_config",
]
