"""The thread pool and the choice of CPU target, as Python sees them."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from specmoeoff import kernels

pytestmark = pytest.mark.usefixtures("kernel_settings")


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def test_starts_with_the_cpus_of_this_process() -> None:
    done = run_python("from specmoeoff import kernels; print(kernels.num_threads())")
    assert int(done.stdout) == len(os.sched_getaffinity(0))


def test_two_threads_call_at_once_and_both_are_right() -> None:
    rng = np.random.default_rng(0)
    xs = rng.standard_normal((4, 37, 300)).astype(np.float32)
    weight = rng.standard_normal((200, 300)).astype(np.float32)
    want = [kernels.linear(x, weight) for x in xs]
    wrong: list[int] = []

    def call(i: int) -> None:
        results = [kernels.linear(xs[i], weight) for _ in range(60)]
        wrong.extend(i for result in results if not np.array_equal(result, want[i]))

    callers = [threading.Thread(target=call, args=(i,)) for i in range(4)]
    for caller in callers:
        caller.start()
    for n in (1, 4, 2, 3):
        kernels.set_num_threads(n)
    for caller in callers:
        caller.join()
    assert wrong == []


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_busy_neighbours_leave_results_and_affinities_alone() -> None:
    """Workers that find themselves on the caller's CPU move, and may come back later."""
    rng = np.random.default_rng(1)
    x = rng.standard_normal((64, 576)).astype(np.float32)
    weight = rng.standard_normal((1536, 576)).astype(np.float32)
    cpus = sorted(os.sched_getaffinity(0))
    kernels.set_num_threads(len(cpus))
    want, before = kernels.linear(x, weight), threads_bound_elsewhere(cpus)
    neighbours = [subprocess.Popen([sys.executable, "-S", "-c", "while True: pass"]) for _ in cpus]
    try:
        for _ in range(60):
            assert np.array_equal(kernels.linear(x, weight), want)
    finally:
        for neighbour in neighbours:
            neighbour.kill()
            neighbour.wait()
    # A worker may be on its way yet when the last call is over.
    deadline = time.monotonic() + 10
    while (bound := threads_bound_elsewhere(cpus)) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert bound <= before


def threads_bound_elsewhere(cpus: list[int]) -> set[str]:
    """Return the threads of this process that may not run on just these CPUs."""
    bound = set()
    for thread in Path("/proc/self/task").iterdir():
        with contextlib.suppress(ProcessLookupError):
            if sorted(os.sched_getaffinity(int(thread.name))) != cpus:
                bound.add(thread.name)
    return bound


def test_the_number_of_threads_can_change() -> None:
    x, w = np.ones((3, 64), np.float32), np.ones((256, 64), np.float32)
    for n in (1, 5, 2, 3):
        kernels.set_num_threads(n)
        assert kernels.num_threads() == n
        assert (kernels.linear(x, w) == 64).all()


def test_leaves_cleanly_with_threads_asleep() -> None:
    done = run_python(
        "import numpy as np\n"
        "from specmoeoff import kernels\n"
        "kernels.set_num_threads(3)\n"
        "kernels.linear(np.ones((64, 512), np.float32), np.ones((512, 512), np.float32))\n"
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_targets_are_listed_and_chosen() -> None:
    targets = kernels.cpu_targets()
    assert targets[0] == "scalar"
    for target in targets:
        kernels.use_cpu_target(target)
        assert kernels.cpu_target() == target


def test_the_environment_chooses_a_target() -> None:
    code = "from specmoeoff import kernels; print(kernels.cpu_target())"
    assert run_python(code, SPECMOEOFF_CPU_TARGET="scalar").stdout == "scalar\n"
    refused = run_python(code, SPECMOEOFF_CPU_TARGET="pentium")
    assert refused.returncode != 0
    assert "SPECMOEOFF_CPU_TARGET is 'pentium'" in refused.stderr
    assert "scalar" in refused.stderr
