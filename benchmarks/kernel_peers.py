"""Our products and experts beside llama.cpp's and kt-kernel's, at known models' shapes.

bf16 weights everywhere. ``linear`` is one product of activations [rows, K] with a weight [I, K],
beside llama.cpp's MUL_MAT; ``expert_ffn`` a layer whose experts each work on all rows, beside
llama.cpp's MUL_MAT_ID with SwiGLU between (its sum over the experts left out) and kt-kernel's
AMXBF16_MOE, which without AMX uses AVX-512. Both peers round activations to bfloat16, so ours is
shown both ways. Weights are more than the caches hold. Every peer is a process that is stopped
while others are measured; all take turns, the best time of each counts, and each result is compared
with ours. A factor is the peer's time over ours: above 1 ours is faster.

The peers are installed the first time; see harness/peer_installation.py.

    python benchmarks/kernel_peers.py [--peers DIR] [--json FILE]
"""

from __future__ import annotations

import argparse
import contextlib
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from harness.kernel_peer import KernelPeer, PeerFailedError
from harness.layer_shapes import SHAPES, copies, copies_beyond_caches, random_bfloat16
from harness.peer_installation import KT_KERNEL_PACKAGE, LLAMA_CPP_PACKAGE, PeerInstallation
from harness.record import add_json_option, finish
from harness.table import number, table
from harness.turns import best_seconds, rotating
from roofs import RoofMeter
from specmoeoff import kernels
from specmoeoff.demo import cache_directory

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from specmoeoff.kernels import Activations

KT_PROCESS = Path(__file__).with_name("harness") / "kt_kernel_process.py"
ROWS = (1, 4, 16, 64, 256)
KINDS = ("linear", "expert_ffn")
OURS: dict[str, Activations] = {"ours f32": "float32", "ours bf16": "bfloat16"}
"""By what activations are rounded to."""
LLAMA = "llama.cpp"
MOST_ERROR = 0.02
"""Of a peer's result, relative to ours: activations are rounded to 8 bits, once or twice."""


@dataclass(frozen=True)
class Commands:
    """How to start the peers; None is a peer that cannot be had here."""

    ggml: Path
    kt_python: Path | None
    threads: int

    def peers(self, kind: str, arguments: list[object], directory: str) -> dict[str, list[object]]:
        """Return the command of every peer of a kind, by name."""
        mode = "linear" if kind == "linear" else "experts"
        commands = {LLAMA: [self.ggml, mode, *arguments, self.threads, directory]}
        if kind == "expert_ffn" and self.kt_python is not None:
            # Its pool has one thread more than it is told, which waits by spinning.
            for threads in sorted({1, self.threads}):
                command = [self.kt_python, KT_PROCESS, *arguments, threads, directory]
                commands[f"kt-kernel, {threads} thread{'s' * (threads > 1)}"] = command
        return commands


class Workload:
    """Our side of a kind at a shape, and the files that the peers read."""

    def __init__(self, kind: str, k: int, inner: int, most_rows: int) -> None:
        rng = np.random.default_rng(0)
        self.kind, self.k = kind, k
        self.width = inner if kind == "linear" else k
        self.x = rng.standard_normal((most_rows, k)).astype(np.float32)
        shapes = [(inner, k)] if kind == "linear" else [(inner, k), (inner, k), (k, inner)]
        self.matrices = [random_bfloat16(rng, *shape) for shape in shapes]
        self.num_bytes = sum(matrix.nbytes for matrix in self.matrices)
        self.count = max(2, copies_beyond_caches(self.num_bytes))
        self.copies = copies(tuple(self.matrices), self.count)

    def write(self, directory: Path) -> None:
        """Write the activations and one copy of the weights for the peers."""
        self.x.tofile(directory / "x")
        with (directory / "weights").open("wb") as file:
            for matrix in self.matrices:
                matrix.tofile(file)

    def call(
        self, rows: int, activations: Activations
    ) -> tuple[Callable[[], object], NDArray[np.float32]]:
        """Return a call of our kernel, and the array [rows, width] that it writes or adds to."""
        x = self.x[:rows]
        out = np.zeros((rows, self.width), np.float32)
        if self.kind == "linear":
            weights = [matrix for (matrix,) in self.copies]
            call = rotating(
                lambda w: kernels.linear(x, w, out=out, activations=activations), weights
            )
            return call, out
        offsets = (np.arange(self.count + 1) * rows).astype(np.int32)
        ids = np.tile(np.arange(rows, dtype=np.int32), self.count)
        ones = np.ones(len(ids), np.float32)

        def experts() -> None:
            kernels.expert_ffn_many(
                x, self.copies, offsets, ids, ones, out, activations=activations
            )

        return experts, out

    def expected(self, rows: int) -> NDArray[np.float32]:
        """Return our result with float32 activations, [rows, width]."""
        call, out = self.call(rows, "float32")
        call()
        return out

    def error(self, file: Path, rows: int) -> float:
        """Return how far a peer's result is from ours, relative to its length."""
        theirs = np.fromfile(file, np.float32).reshape(rows, -1, self.width).sum(1)
        ours = self.expected(rows)
        return float(np.linalg.norm(theirs - ours) / np.linalg.norm(ours))


@dataclass(frozen=True)
class Case:
    """The best seconds of everybody at one kind, shape and number of rows."""

    kind: str
    shape: str
    rows: int
    copies: int
    seconds: dict[str, float]
    errors: dict[str, float]

    def best_peer(self, prefix: str) -> float | None:
        """Return the best time of the peers whose names begin so; None if there is none."""
        return min((s for n, s in self.seconds.items() if n.startswith(prefix)), default=None)

    def factor(self, prefix: str, ours: str) -> float | None:
        """Return a peer's time over ours."""
        theirs = self.best_peer(prefix)
        return theirs / self.seconds[ours] if theirs else None

    def row(self) -> list[str]:
        """Return the cells of the table."""
        times = [*(self.seconds[name] for name in OURS), *map(self.best_peer, (LLAMA, "kt-"))]
        factors = [self.factor(peer, name) for peer in (LLAMA, "kt-") for name in OURS]
        cells = [number(s and s * 1e6, 0) for s in times]
        return [self.kind, self.shape, str(self.rows), *cells, *map(number, factors)]

    def as_dict(self) -> dict[str, Any]:
        """Return the figures as plain data."""
        factors = {
            f"{peer.rstrip('-')} over {name}": self.factor(peer, name)
            for peer in (LLAMA, "kt-")
            for name in OURS
        }
        return {**vars(self), "factors": factors}


HEADER = ["kernel", "shape", "rows", "ours f32 us", "ours bf16 us", "llama.cpp us", "kt-kernel us"]
HEADER += ["llama.cpp / f32", "llama.cpp / bf16", "kt / f32", "kt / bf16"]


def measure(kind: str, shape: str, options: argparse.Namespace, commands: Commands) -> list[Case]:
    """Measure everybody at a kind and shape; a peer that fails is named, and left out."""
    workload = Workload(kind, *SHAPES[shape], max(options.rows))
    with contextlib.ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        workload.write(directory)
        peers = []
        arguments = [*SHAPES[shape], workload.count]
        for name, command in commands.peers(kind, arguments, str(directory)).items():
            try:
                peers.append(stack.enter_context(KernelPeer(name, command)))
            except PeerFailedError as error:
                print(f"{kind} {shape}: no {name}, {error}", flush=True)
        return [
            _measure_rows(workload, shape, rows, peers, options, directory) for rows in options.rows
        ]


def _measure_rows(
    workload: Workload,
    shape: str,
    rows: int,
    peers: list[KernelPeer],
    options: argparse.Namespace,
    directory: Path,
) -> Case:
    calls = {name: workload.call(rows, activations)[0] for name, activations in OURS.items()}
    seconds: dict[str, float] = {}
    errors: dict[str, float] = {}
    for _ in range(options.turns):
        for name, call in calls.items():
            best = best_seconds([call], options.seconds)[0]
            seconds[name] = min(best, seconds.get(name, best))
        for peer in list(peers):
            try:
                best = peer.best_seconds(rows, options.seconds)
            except PeerFailedError as error:
                print(f"{shape}, {rows} rows: {peer.name} ended, {error}", flush=True)
                peers.remove(peer)
                continue
            seconds[peer.name] = min(best, seconds.get(peer.name, best))
    for peer in peers:
        file = "ggml.out" if peer.name == LLAMA else "kt-kernel.out"
        errors[peer.name] = workload.error(directory / file, rows)
        if not errors[peer.name] < MOST_ERROR:
            raise SystemExit(f"{peer.name} computes something else: error {errors[peer.name]:.3f}")
    case = Case(workload.kind, shape, rows, workload.count, seconds, errors)
    print(" ".join(case.row()), flush=True)
    return case


def main() -> None:
    """Install the peers, measure, compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peers", type=Path, default=cache_directory() / "peers")
    parser.add_argument("--jobs", type=int, default=2, help="compilers that build llama.cpp")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS)
    parser.add_argument("--seconds", type=float, default=0.3, help="per turn of each")
    parser.add_argument("--turns", type=int, default=3)
    add_json_option(parser)
    options = parser.parse_args()
    installation = PeerInstallation(options.peers, options.jobs)
    ggml = installation.ensure_ggml_peer()
    try:
        kt_python = installation.ensure_kt_kernel() if "expert_ffn" in options.kinds else None
    except SystemExit as error:
        print(f"no kt-kernel: {error}")
        kt_python = None
    commands = Commands(ggml, kt_python, kernels.num_threads())
    meter = RoofMeter()
    roofs = meter.measure(200)
    print(roofs.describe())
    cases = []
    for kind in options.kinds:
        for shape in options.shapes:
            cases += measure(kind, shape, options, commands)
            roofs = roofs.best_with(meter.measure())
    print("\n" + table(HEADER, [case.row() for case in cases]))
    finish(
        "kernel_peers",
        options.json,
        {
            "versions": [LLAMA_CPP_PACKAGE, KT_KERNEL_PACKAGE],
            "roofs": roofs.as_dict(),
            "results": [case.as_dict() for case in cases],
        },
    )


if __name__ == "__main__":
    main()
