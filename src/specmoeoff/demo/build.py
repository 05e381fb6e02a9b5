"""Builds the demo's pair of checkpoints: ``target``, a mixture of experts, and ``draft``, dense.

The same parameters give the same bytes everywhere. A build is complete when its manifest is
there, which is written last; anything else is begun again.
"""

from __future__ import annotations

import fcntl
import json
import shutil
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from specmoeoff.demo import prompts
from specmoeoff.demo.calibrate import ffn_inputs
from specmoeoff.demo.convert import convert, dense_config, kept_layers, write_json
from specmoeoff.demo.fetch import MODEL, QUESTIONS, Progress, fetch_model, fetch_questions, sha256_of
from specmoeoff.demo.gguf import GgufFile
from specmoeoff.demo.router import balanced_router
from specmoeoff.demo.safetensors_file import map_tensors
from specmoeoff.demo.upcycle import EXPERTS_PER_TOKEN, upcycle
from specmoeoff.errors import CheckpointError, InvalidInputError, SpecMoEOffError

U16 = NDArray[np.uint16]

RECIPE = 1
"""Raised whenever the bytes of a build change, so that older builds are made anew."""
MAX_EXPERTS = 512
_MANIFEST = "manifest.json"
_CALIBRATION_CHUNKS, _CALIBRATION_TOKENS = 6, 256
_COPIED_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")
# Streams of random numbers beside those of the experts, which are (seed, layer, expert, matrix).
_ROUTER_STREAM = 1_000_003


@dataclass(frozen=True)
class DemoPaths:
    """Where the two checkpoints are."""

    target: Path
    draft: Path


def build_demo(
    directory: Path,
    *,
    experts: int = 8,
    noise: float = 0.10,
    drop_layers: Collection[int] = (),
    seed: int = 0,
    progress: Progress | None = None,
) -> DemoPaths:
    """Make ``directory/target`` and ``directory/draft``, or find them there.

    The first call downloads SmolLM2-135M-Instruct (93 MB). A complete build with the same
    parameters is left as it is; one with others is replaced.

    Args:
        directory: Where to build. Only ``target``, ``draft`` and ``manifest.json`` in it are touched.
        experts: Experts per layer of the target, 2 to 512; a token uses two.
        noise: How far experts are from the dense FFN, as a share of each matrix's standard
            deviation, 0 to 1. At 0 target and draft always agree, at 0.10 on 84 % of the tokens.
        drop_layers: Layers to leave out of the draft, which makes it weaker and cheaper.
        seed: Another one gives other noise and other routers.
        progress: Called with what is being done and the share of it that is done.

    Raises:
        InvalidInputError: A parameter is out of range, or the directory holds something else.
        SpecMoEOffError: The download fails, or the disk is full.
    """
    parameters = _checked(experts, noise, drop_layers, seed)
    paths = DemoPaths(directory / "target", directory / "draft")
    report: Progress = progress or (lambda stage, done: None)
    with _only_builder(directory):
        if _is_complete(directory, parameters):
            return paths
        source = GgufFile(fetch_model(report))
        fetch_questions(report)
        build_from(source, prompts.calibration_texts(), directory, parameters, report)
    return paths


def build_from(
    source: GgufFile,
    texts: Iterable[str],
    directory: Path,
    parameters: dict[str, Any],
    report: Progress,
) -> None:
    """Build from a given model and given calibration texts; ``build_demo`` names the parameters.

    Raises:
        InvalidInputError, SpecMoEOffError: As ``build_demo``.
    """
    kept_layers(dense_config(source)["num_hidden_layers"], parameters["drop_layers"])
    _refuse_foreign(directory)
    work = directory / ".building"
    shutil.rmtree(work, ignore_errors=True)
    try:
        _require_space(directory, source, parameters["experts"])
        files = _write_pair(source, texts, work, parameters, report)
        _replace(directory, work, {"recipe": RECIPE, "parameters": parameters, "files": files})
    except OSError as error:
        raise SpecMoEOffError(
            f"cannot write the demo model to {directory}: {error}; make room or choose another directory"
        ) from error
    finally:
        shutil.rmtree(work, ignore_errors=True)


def verify(directory: Path) -> None:
    """Check every file of a build against the manifest's sums (a second per 1.5 GB).

    Raises:
        CheckpointError: A file is missing or differs, or there is no build.
    """
    manifest = _read_manifest(directory)
    if manifest is None:
        raise CheckpointError(f"{directory} holds no complete demo model (no {_MANIFEST})")
    for name, entry in manifest["files"].items():
        path = directory / name
        if not path.is_file() or sha256_of(path) != entry["sha256"]:
            raise CheckpointError(f"{path} is missing or damaged; remove {directory} and build again")


def _checked(experts: int, noise: float, drop_layers: Collection[int], seed: int) -> dict[str, Any]:
    if not EXPERTS_PER_TOKEN <= experts <= MAX_EXPERTS:
        raise InvalidInputError(
            f"experts is {experts}; it must be {EXPERTS_PER_TOKEN} to {MAX_EXPERTS}"
        )
    if not 0.0 <= noise <= 1.0:
        raise InvalidInputError(f"noise is {noise}; it must be 0 to 1")
    if seed < 0:
        raise InvalidInputError(f"seed is {seed}; it must not be negative")
    return {
        "experts": experts,
        "noise": float(noise),
        "drop_layers": sorted(set(drop_layers)),
        "seed": seed,
        "sources": [MODEL.sha256, QUESTIONS.sha256],
    }


def _write_pair(
    source: GgufFile, texts: Iterable[str], work: Path, parameters: dict[str, Any], report: Progress
) -> dict[str, dict[str, Any]]:
    """Write both checkpoints under ``work`` and return what the manifest says of their files."""
    target, draft, dense = work / "target", work / "draft", work / "dense"
    for path in (target, draft, dense):
        path.mkdir(parents=True)
    report("converting the dense model", 0.0)
    digests = {"draft/model.safetensors": convert(source, draft, parameters["drop_layers"])}
    whole = draft
    if parameters["drop_layers"]:
        whole = dense
        convert(source, whole)
    report("converting the dense model", 1.0)

    config = json.loads((whole / "config.json").read_text(encoding="utf-8"))
    weights = map_tensors(whole / "model.safetensors")
    chunks = _calibration_chunks(whole, texts)
    routers = list(_routers(weights, config, chunks, parameters, report))
    shards = upcycle(
        weights,
        config,
        routers,
        target,
        noise=parameters["noise"],
        seed=parameters["seed"],
        progress=lambda done: report("writing the experts", done),
    )
    digests |= {f"target/{name}": digest for name, digest in shards.items()}
    for name in _COPIED_FILES:
        if (whole / name).is_file():
            shutil.copyfile(whole / name, target / name)
    shutil.rmtree(dense)
    files = sorted(path for path in work.rglob("*") if path.is_file())
    names = {path.relative_to(work).as_posix(): path for path in files}
    return {
        name: {"bytes": path.stat().st_size, "sha256": digests.get(name) or sha256_of(path)}
        for name, path in names.items()
    }


def _calibration_chunks(checkpoint: Path, texts: Iterable[str]) -> NDArray[np.int32]:
    tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    wanted = _CALIBRATION_CHUNKS * _CALIBRATION_TOKENS
    ids: list[int] = []
    for text in texts:
        ids += tokenizer.encode(text + "\n\n").ids
        if len(ids) >= wanted:
            break
    length = min(_CALIBRATION_TOKENS, len(ids) // _CALIBRATION_CHUNKS)
    if length < 2:
        raise InvalidInputError("the calibration texts are too short to balance routers on")
    return np.array(ids[: _CALIBRATION_CHUNKS * length], np.int32).reshape(-1, length)


def _routers(
    weights: dict[str, U16],
    config: dict[str, Any],
    chunks: NDArray[np.int32],
    parameters: dict[str, Any],
    report: Progress,
) -> Iterator[U16]:
    for layer, h in enumerate(ffn_inputs(weights, config, chunks)):
        report("balancing the routers", layer / config["num_hidden_layers"])
        key = (parameters["seed"], layer, _ROUTER_STREAM)
        yield balanced_router(h, parameters["experts"], EXPERTS_PER_TOKEN, key)
    report("balancing the routers", 1.0)


def _require_space(directory: Path, source: GgufFile, experts: int) -> None:
    config = dense_config(source)
    expert_bytes = 2 * 3 * config["hidden_size"] * config["intermediate_size"]
    dense_bytes = 2 * sum(int(np.prod(t.shape)) for t in source.tensors.values())
    needed = experts * config["num_hidden_layers"] * expert_bytes + 3 * dense_bytes
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise SpecMoEOffError(
            f"the demo model needs up to {needed / 1e9:.1f} GB in {directory}, "
            f"which has {free / 1e9:.1f} GB free; choose another directory or fewer experts"
        )


def _refuse_foreign(directory: Path) -> None:
    """Leave alone what no build of ours has made."""
    if _read_manifest(directory) is None:
        for name in ("target", "draft"):
            if (directory / name).exists() and not (directory / ".replacing").exists():
                raise InvalidInputError(
                    f"{directory / name} exists and was not made by this demo; choose another directory"
                )


def _replace(directory: Path, work: Path, manifest: dict[str, Any]) -> None:
    # The mark says, should this be interrupted, that target and draft are ours to overwrite.
    mark = directory / ".replacing"
    mark.touch()
    (directory / _MANIFEST).unlink(missing_ok=True)
    for name in ("target", "draft"):
        shutil.rmtree(directory / name, ignore_errors=True)
        (work / name).rename(directory / name)
    write_json(work / _MANIFEST, manifest)
    (work / _MANIFEST).rename(directory / _MANIFEST)
    mark.unlink()


def _read_manifest(directory: Path) -> dict[str, Any] | None:
    try:
        manifest = json.loads((directory / _MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return manifest if isinstance(manifest, dict) and "recipe" in manifest else None


def _is_complete(directory: Path, parameters: dict[str, Any]) -> bool:
    """Whether the manifest fits and every file has its size; ``verify`` reads them as well."""
    manifest = _read_manifest(directory)
    if manifest is None or (manifest["recipe"], manifest["parameters"]) != (RECIPE, parameters):
        return False
    return all(
        (directory / name).is_file() and (directory / name).stat().st_size == entry["bytes"]
        for name, entry in manifest["files"].items()
    )


@contextmanager
def _only_builder(directory: Path) -> Iterator[None]:
    """Hold the directory's lock: a second process waits, and then finds the build complete."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock = (directory / ".lock").open("w")
    except OSError as error:
        raise SpecMoEOffError(f"cannot write to {directory}: {error}; choose another directory") from error
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
