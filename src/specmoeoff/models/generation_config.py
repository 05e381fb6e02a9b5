"""The sampling a checkpoint recommends, from its generation_config.json."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from specmoeoff.errors import CheckpointError

if TYPE_CHECKING:
    from pathlib import Path

FIELDS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


def sampling_defaults(directory: Path) -> dict[str, Any]:
    """Return the SamplingParams fields that the checkpoint states; empty if it states none.

    Raises:
        CheckpointError: The file is not a JSON object.
    """
    file = directory / "generation_config.json"
    if not file.exists():
        return {}
    try:
        content = json.loads(file.read_bytes())
    except ValueError as error:
        raise CheckpointError(f"{file} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} holds {type(content).__name__}, not a JSON object")
    stated = {name: content[name] for name in FIELDS if content.get(name) is not None}
    if "max_new_tokens" in content and content["max_new_tokens"] is not None:
        stated["max_tokens"] = content["max_new_tokens"]
    return stated
