"""Finds a model: a directory as it is, or a hub id, fetched into (or found in) the hub's cache."""

from __future__ import annotations

import re
from pathlib import Path

from specmoeoff.errors import CheckpointError

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")

WANTED = ["*.safetensors", "*.json", "*.jinja", "tokenizer*"]
"""What is fetched. Pickled weights never are: loading them can run code."""
UNWANTED = ["*/*", "consolidated*"]
"""Copies of the same weights in other layouts; they would double the download."""


def resolve_model(model: str) -> Path:
    """Return the local directory of a model given as a directory or a hub id.

    Raises:
        CheckpointError: It is neither, the hub does not have it or will not give it, or the hub
            cannot be reached and its cache lacks the model.
    """
    path = Path(model).expanduser()
    if model and path.is_dir():
        return path
    if model and path.exists():
        raise CheckpointError(f"{model} is a file; give the directory that holds config.json")
    if not _HUB_ID.fullmatch(model):
        raise CheckpointError(f"{model!r} is neither a directory nor a hub id such as owner/name")
    return _fetch(model)


def _fetch(hub_id: str) -> Path:
    """Fetch a model, or find it in the cache when the hub cannot be reached."""
    # Imported here: it takes longer than everything else that a local model needs.
    from huggingface_hub import errors, snapshot_download

    try:
        return Path(snapshot_download(hub_id, allow_patterns=WANTED, ignore_patterns=UNWANTED))
    except errors.GatedRepoError as error:
        raise CheckpointError(
            f"{hub_id} is gated: accept its licence on the hub and log in with 'hf auth login'"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise CheckpointError(
            f"{hub_id} is no directory here, and the hub has no such model (or it is private)"
        ) from error
    except errors.LocalEntryNotFoundError as error:
        raise CheckpointError(
            f"{hub_id} is no directory here, is not in the hub cache, and the hub cannot be "
            "reached; download it first, or give a directory"
        ) from error
    except Exception as error:
        # The client's errors share no base across its versions (nor do those of its HTTP library),
        # and none of them is a fault of ours.
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"{hub_id} cannot be fetched from the hub: {reason}") from error
