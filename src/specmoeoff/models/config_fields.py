"""Typed access to the fields of a JSON file, with errors that name file and field."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from specmoeoff.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path


@dataclass(frozen=True)
class Fields:
    """The fields of one JSON object. A default of None means that the field is required."""

    file: Path
    values: Mapping[str, Any]
    prefix: str = ""
    """How the object is reached from the top of the file, for messages (``rope_scaling.``)."""

    @classmethod
    def load(cls, file: Path) -> Fields:
        """Read a JSON file that holds an object.

        Raises:
            CheckpointError: It does not exist, cannot be read, or is something else.
        """
        try:
            values = json.loads(file.read_bytes())
        except FileNotFoundError:
            raise CheckpointError(f"{file} does not exist; is this a model's directory?") from None
        except OSError as error:
            raise CheckpointError(f"{file} cannot be read: {error.strerror or error}") from error
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{file} is not JSON: {error}") from error
        if not isinstance(values, dict):
            raise CheckpointError(f"{file} holds no JSON object")
        return cls(file, values)

    def get(self, name: str) -> Any:
        """Return a field as it is; None if absent."""
        return self.values.get(name)

    def invalid(self, name: str, complaint: str) -> CheckpointError:
        """Return the error that quotes a field's value."""
        value = self.values.get(name)
        return CheckpointError(
            f"{self.file}: field '{self.prefix}{name}' is {value!r}, which {complaint}"
        )

    def _value(self, name: str, default: Any = None) -> Any:
        """Return a field; null counts as absent, and absent is an error without a default."""
        value = self.values.get(name)
        if value is None:
            value = default
        if value is None:
            raise CheckpointError(f"{self.file}: field '{self.prefix}{name}' is missing")
        return value

    def integer(self, name: str, minimum: int = 1) -> int:
        """Return a required integer of at least ``minimum``."""
        value = self._value(name)
        if type(value) is not int or value < minimum:
            raise self.invalid(name, f"must be an integer of at least {minimum}")
        return value

    def optional_integer(self, name: str, minimum: int = 1) -> int | None:
        """Return an integer, or None where the field is null or absent."""
        return None if self.values.get(name) is None else self.integer(name, minimum)

    def number(self, name: str, default: float | None = None) -> float:
        """Return a finite number above zero."""
        value = self._value(name, default)
        if type(value) not in (int, float) or not math.isfinite(value) or value <= 0:
            raise self.invalid(name, "must be a number above 0")
        return float(value)

    def boolean(self, name: str, default: bool) -> bool:
        """Return true or false."""
        value = self._value(name, default)
        if not isinstance(value, bool):
            raise self.invalid(name, "must be true or false")
        return value

    def text(self, name: str, default: str | None = None) -> str:
        """Return a string."""
        value = self._value(name, default)
        if not isinstance(value, str):
            raise self.invalid(name, "must be a string")
        return value
