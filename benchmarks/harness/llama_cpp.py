"""llama.cpp as a peer: its BF16 GGUF, and one run of llama-batched-bench."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

from harness.measured_process import Finished, drop_page_cache, run_measured
from harness.peer_result import PeerResult

if TYPE_CHECKING:
    from collections.abc import Sequence

_WRITER = Path(__file__).with_name("write_gguf.py")
CHECK_PROMPT = "The capital of France is"


def ensure_gguf(python: Path, checkpoint: Path, directory: Path) -> Path:
    """Return the checkpoint as GGUF, written the first time; it is as large as the checkpoint."""
    directory.mkdir(parents=True, exist_ok=True)
    changed_ns = max(file.stat().st_mtime_ns for file in checkpoint.glob("*.safetensors"))
    name = "-".join(checkpoint.resolve().parts[-2:])
    path = directory / f"{name}-{changed_ns:x}.gguf"
    if not path.is_file():
        subprocess.run([python, _WRITER, checkpoint, path], check=True)
    return path


def generated_text(tools: Path, model: Path, prompt: str, num_tokens: int) -> str:
    """Return what llama.cpp answers greedily: a check that the GGUF means what it should."""
    command = [tools / "llama-completion", "-m", model, "-p", prompt, "-n", num_tokens]
    command += ["--temp", "0", "-no-cnv", "--no-warmup", "-t", "2", "-fit", "off"]
    words = [str(word) for word in command]
    done = subprocess.run(
        words, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, timeout=600
    )
    if done.returncode:
        raise SystemExit(f"llama-completion failed: {done.stderr[-1000:]}")
    return done.stdout


def run_llama_cpp(
    tools: Path,
    model: Path,
    *,
    batch: int,
    prompt_tokens: int,
    max_tokens: int,
    num_threads: int,
    extra: Sequence[str],
    memory: int | None,
    timeout_s: float,
) -> PeerResult:
    """Run one batch from a cold page cache; every sequence has a prompt of random tokens."""
    command: list[object] = [tools / "llama-batched-bench", "-m", model]
    command += ["-npp", prompt_tokens, "-ntg", max_tokens, "-npl", batch]
    command += ["-c", batch * (prompt_tokens + max_tokens), "-b", 2048, "-ub", 512]
    command += ["-t", num_threads, "-tb", num_threads, "-fa", "auto", "-fit", "off"]
    command += ["--output-format", "jsonl", *extra]
    drop_page_cache([model])
    words = [str(word) for word in command]
    process = run_measured(words, memory=memory, timeout_s=timeout_s)
    return _result(batch, process)


def _result(batch: int, process: Finished) -> PeerResult:
    record = next(
        (json.loads(line) for line in process.stdout.splitlines() if line.startswith("{")), None
    )
    if record is None:
        return PeerResult("llama.cpp", batch, process, note=process.failure or "no result")
    return PeerResult(
        "llama.cpp",
        batch,
        process,
        decode_tok_s=record["speed_tg"],
        prefill_tok_s=record["speed_pp"],
    )
