"""``specmoeoff generate``: a JSONL job, or a few prompts answered on stdout."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from specmoeoff.cli.console import note, say
from specmoeoff.cli.figures import duration, rates, totals
from specmoeoff.cli.options import GenerateOptions, sampling_params
from specmoeoff.errors import InvalidInputError, SpecMoEOffError

if TYPE_CHECKING:
    from specmoeoff.batch import BatchSummary
    from specmoeoff.llm import LLM
    from specmoeoff.outputs import RequestOutput
    from specmoeoff.sampling_params import SamplingParams


def run(options: GenerateOptions) -> int:
    """Run the command and return its exit code."""
    if bool(options.prompt) == bool(options.prompts):
        raise InvalidInputError("give either --prompts FILE --output FILE or --prompt TEXT")
    if options.stats is not None and not Path(options.stats).absolute().parent.is_dir():
        raise InvalidInputError(f"--stats {options.stats} is in a directory that does not exist")
    params = sampling_params(options.sampling)
    return _run_prompts(options, params) if options.prompt else _run_job(options, params)


def _run_job(options: GenerateOptions, params: SamplingParams) -> int:
    from specmoeoff.batch import check_paths, run_batch
    from specmoeoff.cli.progress import JobProgress

    if options.prompts is None or options.output is None:
        raise InvalidInputError("--prompts needs --output FILE for the results")
    paths = Path(options.prompts), Path(options.output)
    check_paths(*paths, resume=options.resume, overwrite=options.overwrite)
    started_at = time.monotonic()
    with options.engine.open_llm() as llm:
        progress = JobProgress(lambda: llm.stats().as_dict(), quiet=options.quiet)
        with progress:
            summary = run_batch(
                llm,
                *paths,
                params,
                model=_model_name(options.engine.model),
                seed=options.engine.seed,
                resume=options.resume,
                overwrite=options.overwrite,
                progress=progress.update,
            )
        stats = _finish(options, llm, started_at)
    _report_job(options, summary, stats)
    return 0


def _report_job(options: GenerateOptions, summary: BatchSummary, stats: dict[str, Any]) -> None:
    if options.json:
        say(json.dumps({"output": options.output, **summary.as_dict(), "stats": stats}))
    elif not options.quiet:
        errors = f", {summary.num_failed} of them errors" if summary.num_failed else ""
        note(
            f"{summary.num_lines} results{errors} in {options.output} "
            f"after {duration(stats['wall_s'])}\n{rates(stats)}\n{totals(stats)}"
        )


def _run_prompts(options: GenerateOptions, params: SamplingParams) -> int:
    if options.output is not None:
        raise InvalidInputError("--output goes with --prompts; answers to --prompt go to stdout")
    for prompt in options.prompt:
        if not _is_unicode(prompt):
            raise InvalidInputError(f"--prompt {prompt!r} is not valid UTF-8")
    started_at = time.monotonic()
    with options.engine.open_llm() as llm:
        outputs = llm.generate(list(options.prompt), params)
        for index, (prompt, output) in enumerate(zip(options.prompt, outputs, strict=True)):
            _say_answer(options, index, prompt, output)
        stats = _finish(options, llm, started_at)
    if not (options.quiet or options.json):
        note(f"{rates(stats)}\n{totals(stats)}")
    failed = [output.error for output in outputs if output.error is not None]
    if failed:
        raise InvalidInputError(f"{len(failed)} of {len(outputs)} prompts failed: {failed[0]}")
    return 0


def _say_answer(options: GenerateOptions, index: int, prompt: str, output: RequestOutput) -> None:
    if options.json:
        from specmoeoff.batch.lines import JobLine
        from specmoeoff.batch.records import encode_record, result_record

        line = JobLine(index=index, id=f"line-{index}", prompt={"prompt": prompt})
        say(encode_record(result_record(line, output)).decode(), end="")
        return
    for sample in output.outputs:
        if len(options.prompt) > 1 or len(output.outputs) > 1:
            say(f"--- {prompt}")
        say(sample.text)


def _finish(options: GenerateOptions, llm: LLM, started_at: float) -> dict[str, Any]:
    """Return the figures of the run, written to ``--stats`` if asked for."""
    stats = {**llm.stats().as_dict(), "wall_s": time.monotonic() - started_at}
    if options.stats is not None:
        path = Path(options.stats)
        try:
            text = json.dumps({**stats, "policy": llm.policy.as_dict()}, indent=2)
            path.write_text(text + "\n", encoding="utf-8")
        except OSError as error:
            raise SpecMoEOffError(f"cannot write --stats {path}: {error.strerror}") from error
    return stats


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # bytes of the command line that Python could not decode
        return False
    return True


def _model_name(model: str) -> str:
    """Return what tells this model from others: the directory's full path, or the hub id."""
    path = Path(model)
    return str(path.resolve()) if path.is_dir() else model
