"""llama.cpp as a peer: its BF16 GGUF, and its runs."""

from __future__ import annotations

import json
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from harness.measured_process import Finished, Limits, prepare_page_cache, run_measured
from harness.peer_result import PeerResult

if TYPE_CHECKING:
    from collections.abc import Sequence

_WRITER = Path(__file__).with_name("write_gguf.py")
CHECK_PROMPT = "The capital of France is"
NAME, TEXT_NAME = "llama.cpp", "llama.cpp-text"
_TIMING = re.compile(r": +((?:prompt )?eval) time =.*?([\d.]+) tokens per second")


def ensure_gguf(python: Path, checkpoint: Path, directory: Path) -> Path:
    """Return the checkpoint as GGUF, written the first time; it is as large as the checkpoint."""
    directory.mkdir(parents=True, exist_ok=True)
    changed_ns = max(file.stat().st_mtime_ns for file in checkpoint.glob("*.safetensors"))
    name = "-".join(checkpoint.resolve().parts[-2:])
    path = directory / f"{name}-{changed_ns:x}.gguf"
    if not path.is_file():
        subprocess.run([python, _WRITER, checkpoint, path], check=True)
    return path


@dataclass(frozen=True)
class LlamaCpp:
    """llama.cpp's tools, a model for them, and what all runs have in common."""

    tools: Path
    model: Path
    num_threads: int
    extra: Sequence[str] = ()
    """Further flags, given to every run."""

    def continuation(self, prompt: str, num_tokens: int) -> str:
        """Return prompt and greedy continuation: a check that the GGUF means what it should."""
        arguments = ["-p", prompt, "-n", num_tokens, "--temp", 0, "-no-cnv"]
        limits = Limits(memory=None, timeout_s=600)
        process = self._run("llama-completion", len(prompt) + num_tokens, arguments, limits)
        if process.failure:
            raise SystemExit(f"llama-completion: {process.failure}\n{process.stderr[-1000:]}")
        return process.stdout

    def run_batch(
        self, batch: int, prompt_tokens: int, max_tokens: int, limits: Limits
    ) -> PeerResult:
        """Run llama-batched-bench: random tokens, equal lengths."""
        lengths = ["-npp", prompt_tokens, "-ntg", max_tokens, "-npl", batch]
        context = batch * (prompt_tokens + max_tokens)
        process = self._run(
            "llama-batched-bench", context, [*lengths, "--output-format", "jsonl"], limits
        )
        lines = process.stdout.splitlines()
        record = next((json.loads(line) for line in lines if line.startswith("{")), None)
        if record is None:
            return PeerResult(NAME, batch, process, note=process.failure or "no result")
        return PeerResult(
            NAME,
            batch,
            process,
            decode_tok_s=record["speed_tg"],
            prefill_tok_s=record["speed_pp"],
        )

    def run_text(self, prompt: str, max_tokens: int, limits: Limits) -> PeerResult:
        """Run llama-completion on a real prompt, as real text may route less evenly."""
        arguments = ["-p", prompt, "-n", max_tokens, "--temp", 0, "-no-cnv", "--ignore-eos"]
        process = self._run("llama-completion", 4 * len(prompt) + max_tokens, arguments, limits)
        # One line each: "prompt eval time = ... 3.78 tokens per second)", "eval time = ...".
        rates = dict(_TIMING.findall(process.stdout + process.stderr))
        decode, prefill = rates.get("eval"), rates.get("prompt eval")
        if decode is None or prefill is None:
            return PeerResult(TEXT_NAME, 1, process, note=process.failure or "no result")
        return PeerResult(
            TEXT_NAME, 1, process, decode_tok_s=float(decode), prefill_tok_s=float(prefill)
        )

    def _run(
        self, tool: str, context: int, arguments: Sequence[object], limits: Limits
    ) -> Finished:
        command: list[object] = [self.tools / tool, "-m", self.model, "-c", context]
        command += ["-b", 2048, "-ub", 512, "-fa", "auto", "-fit", "off"]
        command += ["-t", self.num_threads, "-tb", self.num_threads, *arguments, *self.extra]
        prepare_page_cache(limits, [self.model])
        return run_measured([str(word) for word in command], limits)
