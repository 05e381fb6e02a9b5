"""The budget of a tier of memory, split by name before anything is put there, and what it held.

What does not fit is refused with the arithmetic, so that nothing fails half-way for want of memory.
"""

from __future__ import annotations

from dataclasses import dataclass

from specmoeoff.errors import DoesNotFitError
from specmoeoff.memory_size import format_memory_size


@dataclass(frozen=True)
class TierUse:
    """What a tier was given and what it held, in bytes."""

    budget: int
    planned: int
    """Reserved before the start."""
    reserved: int
    """Reserved now: what the last step took where that is counted, else as planned."""
    peak: int
    """Most that was held at once."""


class Tier:
    """``budget`` bytes of one kind of memory and the names that hold them."""

    def __init__(self, name: str, budget: int) -> None:
        self.name = name
        self.budget = budget
        self.planned = 0
        """Bytes reserved before anything was taken."""
        self.peak = 0
        """Most bytes reserved at once since something was taken."""
        self._reserved: dict[str, int] = {}

    @property
    def reserved(self) -> int:
        """Bytes that are reserved now."""
        return sum(self._reserved.values())

    @property
    def free(self) -> int:
        """Bytes that are not."""
        return self.budget - self.reserved

    def reserve(self, name: str, num_bytes: int) -> None:
        """Reserve bytes under a name, instead of what it had, before the start.

        Raises:
            DoesNotFitError: The tier has less left; what the name had is kept.
        """
        self._put(name, num_bytes)
        self.planned = self.reserved

    def take(self, name: str, num_bytes: int) -> None:
        """Reserve what a step needs under a name, instead of what was put aside for it.

        Raises:
            DoesNotFitError: The tier has less left; what the name had is kept.
        """
        self._put(name, num_bytes)
        self.peak = max(self.peak, self.reserved)

    def _put(self, name: str, num_bytes: int) -> None:
        others = self.reserved - self._reserved.get(name, 0)
        if others + num_bytes > self.budget:
            parts = [f"{n} {format_memory_size(b)}" for n, b in self._reserved.items() if n != name]
            parts.append(f"{name} {format_memory_size(num_bytes)}")
            raise DoesNotFitError(
                f"{self.name} memory of {format_memory_size(self.budget)} is too small for "
                f"{' + '.join(parts)} = {format_memory_size(others + num_bytes)}; "
                "give it more, or make the batch smaller"
            )
        self._reserved[name] = num_bytes

    def use(self, peak: int) -> TierUse:
        """Return what was given and held, with a peak that was found elsewhere."""
        return TierUse(self.budget, self.planned, self.reserved, peak)

    def as_dict(self) -> dict[str, int]:
        """Return the bytes by name."""
        return dict(self._reserved)
