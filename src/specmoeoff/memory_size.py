"""Amounts of memory as people write them: "1GiB", "900MB", "1.5 GiB" or a number of bytes."""

from __future__ import annotations

import re
from fractions import Fraction

from specmoeoff.errors import InvalidInputError

_BINARY = {"k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}
_DECIMAL = {"k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_SIZE = re.compile(r"(\d+(?:\.\d*)?|\.\d+)\s*(?:(b)|([kmgt])(i?b)?)?", re.ASCII | re.IGNORECASE)
_EXAMPLES = "write a number of bytes or a size such as 900MB, 1GiB or 1.5GiB"


def parse_memory_size(size: str | int) -> int:
    """Return ``size`` in bytes, rounded down.

    KB, MB, GB, TB are powers of 1000; KiB, MiB, GiB, TiB powers of 1024, and so are the bare
    letters K, M, G, T (as in Docker and systemd). Case and spaces do not matter.

    Args:
        size: The amount; a number without a unit is bytes.

    Raises:
        InvalidInputError: It is no size, or less than one byte.

    Example:
        >>> parse_memory_size("1.5 GiB")
        1610612736
    """
    if isinstance(size, bool) or not isinstance(size, (str, int)):
        raise InvalidInputError(f"memory size {size!r} is not understood; {_EXAMPLES}")
    num_bytes = size if isinstance(size, int) else _parse_text(size)
    if num_bytes < 1:
        raise InvalidInputError(f"memory size {size!r} is less than one byte; {_EXAMPLES}")
    return num_bytes


def _parse_text(size: str) -> int:
    match = _SIZE.fullmatch(size.strip())
    if match is None:
        raise InvalidInputError(f"memory size {size!r} is not understood; {_EXAMPLES}")
    number, _, letter, suffix = match.groups()
    units = _DECIMAL if suffix in ("b", "B") else _BINARY
    unit = units[letter.lower()] if letter else 1
    # Fractions, because float("0.1") times 2**40 is off by some bytes.
    return int(Fraction(number.rstrip(".")) * unit)


def format_memory_size(num_bytes: int | float) -> str:
    """Return ``num_bytes`` with a binary unit and three or four digits: "1.50 GiB", "900 B"."""
    sign = "-" if num_bytes < 0 else ""
    amount = abs(num_bytes)
    if amount < 1024:
        return f"{sign}{amount:.0f} B"
    for unit in ("KiB", "MiB", "GiB", "TiB"):
        amount /= 1024
        # 1023.96 would be shown as "1024 MiB": it belongs to the next unit.
        if amount < 999.5 or unit == "TiB":
            break
    digits = 2 if amount < 9.995 else 1 if amount < 99.95 else 0
    return f"{sign}{amount:.{digits}f} {unit}"
