"""JSONL jobs: one request per input line, one result per line, and no line lost or repeated.

Results are appended to OUTPUT.partial as they finish; when all are done they are put in input
order and become OUTPUT at once. A job that was killed goes on from its partial file.

Knows files and lines. Knows the engine only as something that completes prompts.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from specmoeoff.batch.lines import JobLine, LineReader
from specmoeoff.batch.partial import OutputError, PartialResults, partial_path
from specmoeoff.batch.records import encode_record, error_record, result_record
from specmoeoff.batch.seen_ids import SeenIds
from specmoeoff.errors import InvalidInputError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from specmoeoff.outputs import RequestOutput
    from specmoeoff.sampling_params import SamplingParams

__all__ = [
    "BatchSummary",
    "OutputError",
    "check_paths",
    "partial_path",
    "result_record",
    "run_batch",
]


class Completes(Protocol):
    """What a job needs of an ``LLM``."""

    def iter_completed(
        self,
        prompts: Iterable[dict[str, Any]],
        sampling_params: Iterable[SamplingParams],
    ) -> Iterator[RequestOutput]:
        """Yield finished requests; ``request_id`` is the prompt's position as a string.

        Both iterables are drawn from as there is room, on the caller's thread, a prompt first and
        then its parameters.
        """


@dataclass(frozen=True)
class BatchSummary:
    """How far a job is."""

    num_lines: int
    """Lines of the input that are not blank."""
    num_finished: int
    """Lines that have a result, errors included."""
    num_failed: int
    """Lines whose result is an error."""
    num_resumed: int
    """Finished lines that an earlier run left."""

    def as_dict(self) -> dict[str, int]:
        """Return the counts as plain data."""
        return dataclasses.asdict(self)


def run_batch(
    llm: Completes,
    input_path: str | Path,
    output_path: str | Path,
    defaults: SamplingParams,
    *,
    model: str = "",
    seed: int = 0,
    resume: bool = False,
    overwrite: bool = False,
    progress: Callable[[BatchSummary], None] | None = None,
) -> BatchSummary:
    """Run every line of ``input_path`` and write the results, in input order, to ``output_path``.

    A line that cannot be read or run gets an error record and the others go on. Whatever ends the
    run early leaves the finished results in the partial file, and a note on the exception says how
    many there are.

    Args:
        llm: What completes the prompts.
        input_path: JSONL: per line ``id`` (optional), one of ``prompt``, ``prompt_token_ids`` and
            ``messages``, and any field of ``SamplingParams``. Blank lines are ignored.
        output_path: Where the results go.
        defaults: Parameters of the lines that set none of their own.
        model: Name of the model; a job is only resumed with the same one.
        seed: What the seeds of lines without one are made from.
        resume: Go on from the partial file, if there is one.
        overwrite: Replace an output, and discard a partial file unless it is resumed.
        progress: Called at the start and after every result.

    Raises:
        InvalidInputError: The paths cannot be used, or the partial file is of another job.
        OutputError: A result could not be written.
    """
    input_path, output_path = Path(input_path), Path(output_path)
    check_paths(input_path, output_path, resume=resume, overwrite=overwrite)
    if not resume:
        partial_path(output_path).unlink(missing_ok=True)
    num_lines, sha256 = _fingerprint(input_path)
    header = {
        "input_sha256": sha256,
        "model": model,
        "seed": seed,
        "params": dataclasses.asdict(defaults),
    }
    results = PartialResults(partial_path(output_path), header, num_lines)
    try:
        job = _Job(results, num_lines, LineReader(defaults, seed, SeenIds()), progress)
        job.run(llm, input_path)
        if results.num_finished != num_lines:
            raise _changed(input_path)
        results.publish(output_path)
    except BaseException as error:
        error.add_note(
            f"{results.num_finished} of {num_lines} lines are finished and kept in {results.path}; "
            "continue with --resume"
        )
        with contextlib.suppress(OutputError):
            results.sync()
        raise
    finally:
        results.close()
    return job.summary()


def check_paths(input_path: Path, output_path: Path, *, resume: bool, overwrite: bool) -> None:
    """Refuse paths that a job cannot use, before anything expensive is begun.

    Raises:
        InvalidInputError: The message names the path and the ways out.
    """
    if not input_path.is_file():
        reason = "is not a file" if input_path.exists() else "does not exist"
        raise InvalidInputError(f"the input {input_path} {reason}")
    if output_path.is_dir() or not output_path.parent.is_dir():
        raise InvalidInputError(
            f"the output {output_path} must be a file in a directory that exists"
        )
    if output_path.exists():
        if output_path.samefile(input_path):
            raise InvalidInputError(f"input and output are the same file, {output_path}")
        if not overwrite:
            raise InvalidInputError(
                f"{output_path} exists already; replace it with --overwrite or choose another name"
            )
    partial = partial_path(output_path)
    if partial.exists() and not (resume or overwrite):
        raise InvalidInputError(
            f"{partial} has the results of a job that did not end; "
            "continue it with --resume or start afresh with --overwrite"
        )


class _Job:
    """One run over the lines of a job."""

    def __init__(
        self,
        results: PartialResults,
        num_lines: int,
        reader: LineReader,
        progress: Callable[[BatchSummary], None] | None,
    ) -> None:
        self._results = results
        self._num_lines = num_lines
        self._num_resumed = results.num_finished
        self._reader = reader
        self._progress = progress
        self._running: dict[int, JobLine] = {}  # by position among the prompts handed over
        self._params: deque[SamplingParams] = deque()

    def summary(self) -> BatchSummary:
        return BatchSummary(
            num_lines=self._num_lines,
            num_finished=self._results.num_finished,
            num_failed=self._results.num_failed,
            num_resumed=self._num_resumed,
        )

    def run(self, llm: Completes, input_path: Path) -> None:
        self._report()
        completed = llm.iter_completed(self._prompts(input_path), self._line_params())
        try:
            for output in completed:
                line = self._running.pop(int(output.request_id))
                self._write(result_record(line, output), failed=output.error is not None)
        finally:
            # A generator is closed so that what still runs is given up at once.
            close = getattr(completed, "close", None)
            if close is not None:
                close()
        if self._running:
            raise RuntimeError(f"{len(self._running)} requests were never completed")

    def _prompts(self, input_path: Path) -> Iterator[dict[str, Any]]:
        """Yield the prompts that have no result yet; bad lines get theirs in passing."""
        position = 0
        for index, raw in enumerate(_lines(input_path)):
            if index >= self._num_lines:
                raise _changed(input_path)
            line = self._reader.read(index, raw)  # finished ones too: their ids are taken
            if self._results.is_finished(index):
                continue
            if line.params is None:
                self._write(error_record(line, line.error or ""), failed=True)
                continue
            self._running[position] = line
            self._params.append(line.params)
            yield line.prompt
            position += 1

    def _line_params(self) -> Iterator[SamplingParams]:
        """Yield the parameters of the prompts, in step with them."""
        while self._params:
            yield self._params.popleft()

    def _write(self, record: dict[str, Any], *, failed: bool) -> None:
        self._results.append(record["index"], encode_record(record), failed=failed)
        self._report()

    def _report(self) -> None:
        if self._progress is not None:
            self._progress(self.summary())


def _changed(path: Path) -> InvalidInputError:
    return InvalidInputError(f"{path} was changed while the job ran; start afresh with --overwrite")


def _lines(path: Path) -> Iterator[bytes]:
    """Yield the lines that are not blank, without a byte order mark or line ends."""
    try:
        with path.open("rb") as file:
            for number, raw in enumerate(file):
                line = (raw.removeprefix(b"\xef\xbb\xbf") if number == 0 else raw).strip()
                if line:
                    yield line
    except OSError as error:
        raise InvalidInputError(f"cannot read {path}: {error.strerror or error}") from error


def _fingerprint(path: Path) -> tuple[int, str]:
    """Return the number of lines that are not blank, and the file's SHA-256."""
    num_lines = sum(1 for _ in _lines(path))
    with path.open("rb") as file:
        return num_lines, hashlib.file_digest(file, "sha256").hexdigest()
