"""A model is a directory or a hub id; what goes wrong with an id is said by its name."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from specmoeoff.errors import CheckpointError
from specmoeoff.offload.checkpoint import Checkpoint
from specmoeoff.offload.hub import resolve_model
from tiny import write_tiny

hub = pytest.importorskip("huggingface_hub")

REVISION = "0123456789abcdef0123456789abcdef01234567"


def test_a_directory_is_used_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)  # importing it would fail
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "name").mkdir(parents=True)
    assert resolve_model(str(tmp_path)) == tmp_path
    assert resolve_model("owner/name") == Path("owner/name")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve_model("~/owner") == tmp_path / "owner"


@pytest.mark.parametrize("model", ["/no/such/dir", "./x", "a/b/c", "", "a b/c", "../x", "a/"])
def test_what_cannot_be_a_hub_id_is_not_asked_for(
    model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(CheckpointError, match="neither a directory nor a hub id"):
        resolve_model(model)


def test_a_file_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").touch()
    with pytest.raises(CheckpointError, match=r"model\.gguf is a file"):
        resolve_model(str(tmp_path / "model.gguf"))


def test_only_safe_files_are_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub.utils import filter_repo_objects

    asked: dict[str, Any] = {}

    def fetch(repo_id: str, **options: Any) -> str:
        asked.update(options, repo_id=repo_id)
        return str(tmp_path)

    monkeypatch.setattr(hub, "snapshot_download", fetch)
    assert resolve_model("owner/name") == tmp_path
    assert asked.pop("repo_id") == "owner/name"
    wanted = [
        "model-00001-of-00002.safetensors",
        "model.safetensors.index.json",
        "config.json",
        "generation_config.json",
        "chat_template.jinja",
        "tokenizer.json",
        "tokenizer.model",
    ]
    others = [
        "pytorch_model.bin",
        "consolidated.safetensors",
        "original/model.safetensors",
        "onnx/config.json",
        "modeling_custom.py",
        "README.md",
        "model.gguf",
    ]
    assert list(filter_repo_objects(wanted + others, **asked)) == wanted


def hub_error(name: str) -> Exception:
    """Make an error of the hub client without the response that it usually carries."""
    kind = getattr(hub.errors, name)
    error: Exception = kind.__new__(kind)
    error.args = (f"{name} happened\nand more lines",)
    return error


@pytest.mark.parametrize(
    ("error", "message"),
    [
        ("GatedRepoError", "is gated"),
        ("RepositoryNotFoundError", "the hub has no such model"),
        ("LocalEntryNotFoundError", "not in the hub cache, and the hub cannot be reached"),
        ("OfflineModeIsEnabled", "cannot be fetched from the hub: OfflineModeIsEnabled happened"),
        ("HFValidationError", "cannot be fetched"),
    ],
)
def test_each_refusal_of_the_hub_names_the_id(
    error: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> str:
        raise hub_error(error)

    monkeypatch.setattr(hub, "snapshot_download", refuse)
    with pytest.raises(CheckpointError, match=message) as caught:
        resolve_model("owner/name")
    assert str(caught.value).startswith("owner/name ")
    assert "\n" not in str(caught.value)


def cached(cache: Path) -> Path:
    """Lay a checkpoint out as the hub's cache does: blobs, and links to them by revision."""
    root = cache / "models--owner--name"
    snapshot = root / "snapshots" / REVISION
    for directory in (snapshot, root / "refs", root / "blobs"):
        directory.mkdir(parents=True)
    (root / "refs" / "main").write_text(REVISION)
    for file in write_tiny(cache / "plain", "llama", sharded=True).iterdir():
        file.rename(root / "blobs" / f"blob-{file.name}")
        (snapshot / file.name).symlink_to(Path("../../blobs") / f"blob-{file.name}")
    return snapshot


def test_offline_a_cached_model_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = cached(tmp_path)
    real = hub.snapshot_download

    def offline(repo_id: str, **options: Any) -> str:
        return str(real(repo_id, cache_dir=tmp_path, local_files_only=True, **options))

    monkeypatch.setattr(hub, "snapshot_download", offline)
    found = resolve_model("owner/name")
    assert found.resolve() == snapshot.resolve()
    checkpoint = Checkpoint.open(found)
    assert checkpoint.read("model.norm.weight").shape == (60,)
    with pytest.raises(CheckpointError, match=r"owner/absent .* not in the hub cache"):
        resolve_model("owner/absent")
