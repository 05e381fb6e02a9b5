"""``specmoeoff demo``: the same 16 prompts without and with speculation, each run on its own.

Both runs are processes of ``specmoeoff generate``, so that each has the memory budget for itself
and anyone can repeat them by hand.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from specmoeoff.cli import demo_report
from specmoeoff.cli.console import note, say
from specmoeoff.errors import SpecMoEOffError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from specmoeoff.cli.options import DemoOptions
    from specmoeoff.demo import DemoPaths

NUM_PROMPTS = 16


@dataclass(frozen=True)
class Run:
    """One finished run: its results in input order and its figures."""

    results: list[dict[str, Any]]
    stats: dict[str, Any]

    @property
    def token_ids(self) -> list[list[int] | None]:
        """The tokens of every answer; None where there was an error."""
        return [result.get("token_ids") for result in self.results]


def run(options: DemoOptions) -> int:
    """Run the command and return its exit code: 1 if the answers differ."""
    if options.build is not None:
        paths = _build(options, Path(options.build))
        say(json.dumps({"target": str(paths.target), "draft": str(paths.draft)}))
        return 0
    from specmoeoff.demo import cache_directory, load_prompts

    paths = _build(options, cache_directory() / _build_name(options))
    prompts = load_prompts(NUM_PROMPTS)
    with tempfile.TemporaryDirectory(prefix="specmoeoff-demo-") as directory:
        work = Path(directory)
        _write_job(work / "prompts.jsonl", prompts)
        size = sum(file.stat().st_size for file in paths.target.glob("*.safetensors"))
        note(f"{size / 1e9:.2f} GB of target, {options.memory} of memory, {NUM_PROMPTS} prompts")
        plain = _generate(options, paths, work, "plain", ())
        k = str(options.num_speculative_tokens)
        speculation = ("--draft", str(paths.draft), "--num-speculative-tokens", k)
        speculative = _generate(options, paths, work, "speculative", speculation)
    return _report(options, [prompt[-1]["content"] for prompt in prompts], plain, speculative)


def _report(options: DemoOptions, questions: list[str], plain: Run, speculative: Run) -> int:
    identical = plain.token_ids == speculative.token_ids and None not in plain.token_ids
    speedup = _speedup(plain, speculative)
    if options.json:
        report = {
            "identical": identical,
            "speedup": speedup,
            "plain": {"stats": plain.stats, "results": plain.results},
            "speculative": {"stats": speculative.stats, "results": speculative.results},
        }
        say(json.dumps(report))
    else:
        demo_report.show_answers(questions, plain.results, speculative.results)
        demo_report.show_figures(plain.stats, speculative.stats)
        say(demo_report.verdict(identical, speedup))
    return 0 if identical else 1


def _speedup(plain: Run, speculative: Run) -> float:
    before = float(plain.stats["decode_tokens_per_s"])
    return float(speculative.stats["decode_tokens_per_s"]) / before if before else 0.0


def _build(options: DemoOptions, directory: Path) -> DemoPaths:
    from specmoeoff.demo import build_demo

    stages: set[str] = set()

    def report(stage: str, done: float) -> None:
        if stage not in stages:
            stages.add(stage)
            note(f"{stage} ...")

    return build_demo(
        directory,
        experts=options.experts,
        noise=options.noise,
        drop_layers=options.drop_layers,
        seed=options.seed,
        progress=report,
    )


def _build_name(options: DemoOptions) -> str:
    dropped = "".join(f"-without{layer}" for layer in sorted(set(options.drop_layers)))
    return f"demo-{options.experts}x135m-noise{options.noise:g}-seed{options.seed}{dropped}"


def _write_job(path: Path, prompts: Sequence[Sequence[dict[str, str]]]) -> None:
    lines = [json.dumps({"id": f"q{i}", "messages": prompt}) for i, prompt in enumerate(prompts)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _generate(
    options: DemoOptions, paths: DemoPaths, work: Path, name: str, extra: Sequence[str]
) -> Run:
    """Run one job in a process of its own; its progress goes to our stderr."""
    output, stats = work / f"{name}.jsonl", work / f"{name}.stats.json"
    command = [
        *("generate", str(paths.target), "--prompts", str(work / "prompts.jsonl")),
        *("--output", str(output), "--stats", str(stats), "--memory", options.memory),
        *("--max-tokens", str(options.max_tokens), *extra),
        *(("--schedule", options.schedule) if options.schedule is not None else ()),
    ]
    note(f"\n{name}: specmoeoff {' '.join(command)}")
    code = subprocess.run(
        [sys.executable, "-P", "-m", "specmoeoff", *command], check=False
    ).returncode
    if code in (130, -2):
        raise KeyboardInterrupt
    if code:
        error = SpecMoEOffError(f"the {name} run ended with exit code {code}, see above")
        error.exit_code = code if code > 0 else 1
        raise error
    results = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    return Run(results, json.loads(stats.read_text(encoding="utf-8")))
