"""Builds the demo's pair of checkpoints: ``target``, a mixture of experts, and ``draft``, dense.

The same parameters give the same bytes on every machine. Work is done in a directory of its own
and moved into place when it is complete.
"""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from specmoeoff.demo import manifest
from specmoeoff.demo.calibrate import ffn_inputs
from specmoeoff.demo.convert import convert, dense_config, kept_layers
from specmoeoff.demo.fetch import MODEL, QUESTIONS, Progress, fetch_model
from specmoeoff.demo.gguf import GgufFile
from specmoeoff.demo.prompts import calibration_texts
from specmoeoff.demo.router import balanced_router
from specmoeoff.demo.safetensors_file import map_tensors
from specmoeoff.demo.upcycle import EXPERTS_PER_TOKEN, upcycle
from specmoeoff.errors import InvalidInputError, SpecMoEOffError

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Mapping
    from pathlib import Path

U16 = NDArray[np.uint16]

MAX_EXPERTS = 512
_CALIBRATION_CHUNKS, _CALIBRATION_TOKENS = 6, 256
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
    parameters is left as it is, one with others is replaced.

    Args:
        directory: Where to build; only ``target``, ``draft`` and ``manifest.json`` in it are ours.
        experts: Experts per layer of the target, 2 to 512; a token uses two of them.
        noise: How far experts are from the dense FFN, as a share of each matrix's standard
            deviation, 0 to 1. At 0 target and draft always agree, at 0.10 on 83 % of the tokens.
        drop_layers: Layers to leave out of the draft, which makes it weaker and cheaper.
        seed: Not negative; another one gives other noise and other routers.
        progress: Called with what is being done and the share of it that is done.

    Raises:
        InvalidInputError: A parameter is out of range, or the directory holds something else.
        SpecMoEOffError: The download fails, or the disk is full.
    """
    parameters = _checked(experts, noise, drop_layers, seed)
    report: Progress = progress or (lambda _stage, _done: None)
    with manifest.only_builder(directory):
        if not manifest.is_complete(directory, parameters):
            source = GgufFile(fetch_model(report))
            build_from(source, calibration_texts(report), directory, parameters, report)
    return DemoPaths(directory / "target", directory / "draft")


def build_from(
    source: GgufFile,
    texts: Iterable[str],
    directory: Path,
    parameters: Mapping[str, Any],
    report: Progress,
) -> None:
    """Build from a given model and given calibration texts; ``build_demo`` names the parameters.

    Raises:
        InvalidInputError, SpecMoEOffError: As ``build_demo``.
    """
    kept_layers(dense_config(source)["num_hidden_layers"], parameters["drop_layers"])
    manifest.refuse_foreign(directory)
    work = directory / ".building"
    shutil.rmtree(work, ignore_errors=True)
    try:
        _require_space(directory, source, parameters["experts"])
        sums = _write_pair(source, texts, work, parameters, report)
        manifest.install(work, directory, parameters, sums)
    except OSError as error:
        raise SpecMoEOffError(
            f"cannot write the demo model to {directory}: {error}; "
            "make room there or choose another directory"
        ) from error
    finally:
        shutil.rmtree(work, ignore_errors=True)


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
    source: GgufFile,
    texts: Iterable[str],
    work: Path,
    parameters: Mapping[str, Any],
    report: Progress,
) -> dict[str, str]:
    """Write both checkpoints under ``work`` and return the sums of their large files."""
    target, draft = work / "target", work / "draft"
    target.mkdir(parents=True)
    draft.mkdir()
    report("converting the dense model", 0.0)
    sums = {"draft/model.safetensors": convert(source, draft, parameters["drop_layers"])}
    dense = draft
    if parameters["drop_layers"]:
        # The target keeps the layers that the draft lacks.
        dense = work / "dense"
        dense.mkdir()
        convert(source, dense)
    report("converting the dense model", 1.0)

    config = json.loads((dense / "config.json").read_text(encoding="utf-8"))
    weights = map_tensors(dense / "model.safetensors")
    chunks = _calibration_chunks(dense, texts)
    shards = upcycle(
        weights,
        config,
        list(_routers(weights, config, chunks, parameters, report)),
        target,
        noise=parameters["noise"],
        seed=parameters["seed"],
        progress=lambda done: report("writing the experts", done),
    )
    for path in dense.iterdir():
        if path.name not in ("config.json", "model.safetensors"):
            shutil.copyfile(path, target / path.name)
    return sums | {f"target/{name}": digest for name, digest in shards.items()}


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
        raise InvalidInputError(
            f"the calibration texts have {len(ids)} tokens; "
            f"balancing routers takes {2 * _CALIBRATION_CHUNKS} or more"
        )
    return np.array(ids[: _CALIBRATION_CHUNKS * length], np.int32).reshape(-1, length)


def _routers(
    weights: Mapping[str, U16],
    config: Mapping[str, Any],
    chunks: NDArray[np.int32],
    parameters: Mapping[str, Any],
    report: Progress,
) -> Iterator[U16]:
    for layer, h in enumerate(ffn_inputs(weights, config, chunks)):
        report("balancing the routers", layer / config["num_hidden_layers"])
        key = (parameters["seed"], layer, _ROUTER_STREAM)
        yield balanced_router(h, parameters["experts"], EXPERTS_PER_TOKEN, key)
    report("balancing the routers", 1.0)


def _require_space(directory: Path, source: GgufFile, experts: int) -> None:
    config = dense_config(source)
    matrix_bytes = 2 * config["hidden_size"] * config["intermediate_size"]
    dense_bytes = 2 * sum(math.prod(tensor.shape) for tensor in source.tensors.values())
    needed = 3 * matrix_bytes * experts * config["num_hidden_layers"] + 3 * dense_bytes
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise SpecMoEOffError(
            f"the demo model needs {needed / 1e9:.1f} GB in {directory}, "
            f"which has {free / 1e9:.1f} GB free; choose another directory or fewer experts"
        )
