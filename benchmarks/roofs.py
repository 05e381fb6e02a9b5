"""The ceilings of this machine, measured with the threads and CPU target the kernels use."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace

import numpy as np

from specmoeoff import kernels
from specmoeoff.kernels import _native

READ_BYTES = 512 << 20


@dataclass(frozen=True)
class Roofs:
    """What a kernel could reach at best."""

    read_bandwidth: float
    """Bytes per second of a plain streaming read of a large array."""
    multiply_add: float
    """Float32 operations per second of multiply-adds on registers."""
    num_threads: int
    cpu_target: str

    def share(self, seconds: float, num_bytes: float, flops: float) -> float:
        """Return the least possible time over ``seconds``: 1 is a kernel at its roof."""
        return max(num_bytes / self.read_bandwidth, flops / self.multiply_add) / seconds

    def best_with(self, other: Roofs) -> Roofs:
        """Return the higher of each roof: a busy machine measures them too low, never too high."""
        return replace(
            self,
            read_bandwidth=max(self.read_bandwidth, other.read_bandwidth),
            multiply_add=max(self.multiply_add, other.multiply_add),
        )

    def describe(self) -> str:
        """Return one line for people."""
        return (
            f"roofs with {self.num_threads} threads, {self.cpu_target}: "
            f"read {self.read_bandwidth / 1e9:.1f} GB/s, "
            f"multiply-add {self.multiply_add / 1e9:.0f} GFLOP/s"
        )

    def as_dict(self) -> dict[str, object]:
        """Return plain data for the line of JSON."""
        return asdict(self)


class RoofMeter:
    """Measures both roofs, again and again, over memory that it holds."""

    def __init__(self) -> None:
        self._data = np.ones(READ_BYTES // 4, np.float32)

    def measure(self, passes: int = 20) -> Roofs:
        """Return the best of so many passes, each of some 3 ms, of either loop."""
        return Roofs(
            read_bandwidth=_native.measure_read_bandwidth(self._data, passes),
            multiply_add=_native.measure_fma(passes),
            num_threads=kernels.num_threads(),
            cpu_target=kernels.cpu_target(),
        )
