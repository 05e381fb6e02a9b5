"""Transformers with disk offload as a peer: starts the process and reads its lines."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from harness.measured_process import Finished, Limits, drop_page_cache, run_measured
from harness.peer_result import PeerResult

_PROCESS = Path(__file__).with_name("transformers_process.py")
NAME = "transformers + disk offload"


def run_transformers(
    python: Path,
    model: Path,
    *,
    prompts: list[list[int]],
    max_tokens: int,
    num_threads: int,
    memory: int,
    limits: Limits,
    scratch: Path,
) -> PeerResult:
    """Run one batch from a cold page cache; prompts are of equal length.

    Of ``memory``, weights may take what torch and activations leave. Accelerate writes its own
    copy of the offloaded weights under ``scratch``; it is removed at the end.
    """
    scratch.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="offload-", dir=scratch) as folder:
        job = {
            "model": str(model),
            "prompts": prompts,
            "max_tokens": max_tokens,
            "num_threads": num_threads,
            "cpu_bytes": _weight_bytes(memory),
            "offload_folder": folder,
        }
        drop_page_cache([model])
        process = run_measured(
            [str(python), str(_PROCESS), json.dumps(job)],
            limits,
            environment={"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(num_threads)},
        )
    return _result(prompts, process)


def _weight_bytes(memory: int) -> int:
    """Return what accelerate may keep in memory: 256 MiB of 1 GiB, 1.4 GiB of 4 GiB."""
    return max(128 << 20, memory * 3 // 8 - (128 << 20))


def _result(prompts: list[list[int]], process: Finished) -> PeerResult:
    batch = len(prompts)
    events: dict[str, list[float]] = {"loaded": [], "prefill": [], "step": []}
    for line in process.stdout.splitlines():
        if line.startswith("{"):
            event = json.loads(line)
            events[event["event"]].append(event["s"])
    steps, prefill = events["step"], events["prefill"]
    if steps:
        note = f"{process.failure}, {len(steps)} steps done" if process.failure else ""
    else:
        reached = "prefill" if prefill else "loading" if events["loaded"] else "start"
        note = f"{process.failure or 'no step'}, came as far as {reached}"
    return PeerResult(
        NAME,
        batch,
        process,
        decode_tok_s=batch * len(steps) / sum(steps) if steps else None,
        prefill_tok_s=sum(map(len, prompts)) / prefill[0] if prefill else None,
        note=note,
        details=dict(events),
    )
