"""The budget of a tier of memory, split by name before anything is put there.

What does not fit is refused with the arithmetic, so that nothing fails half-way for want of memory.
"""

from __future__ import annotations

from specmoeoff.errors import DoesNotFitError
from specmoeoff.memory_size import format_memory_size


class Tier:
    """``budget`` bytes of one kind of memory and the names that hold them."""

    def __init__(self, name: str, budget: int) -> None:
        self.name = name
        self.budget = budget
        self.peak = 0
        """Most bytes that were reserved at once."""
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
        """Reserve bytes under a name, instead of what it had.

        Raises:
            DoesNotFitError: The tier has less left; what the name had is kept.
        """
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
        self.peak = max(self.peak, self.reserved)

    def as_dict(self) -> dict[str, int]:
        """Return the bytes by name."""
        return dict(self._reserved)
