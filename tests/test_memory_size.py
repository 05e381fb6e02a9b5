"""Memory sizes: what is accepted, what is refused, and that formatting is honest."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from specmoeoff.errors import InvalidInputError
from specmoeoff.memory_size import format_memory_size, parse_memory_size


@pytest.mark.parametrize(
    ("size", "num_bytes"),
    [
        ("1GiB", 2**30),
        ("1 GiB", 2**30),
        (" 1gib ", 2**30),
        ("1G", 2**30),
        ("1.5 GiB", 3 * 2**29),
        (".5GiB", 2**29),
        ("2.KiB", 2048),
        ("900MB", 900_000_000),
        ("900mb", 900_000_000),
        ("1TB", 10**12),
        ("0.1TiB", 2**40 // 10),
        ("1073741824", 2**30),
        ("512B", 512),
        ("0.0009765625KiB", 1),
        (4096, 4096),
    ],
)
def test_sizes_are_read(size: str | int, num_bytes: int) -> None:
    assert parse_memory_size(size) == num_bytes


@pytest.mark.parametrize(
    "size",
    [
        "",
        "GiB",
        "1 GiB RAM",
        "-1GiB",
        "1e9",
        "1,5GiB",
        "0",
        "0.5",
        "1PiB",
        "1.2.3GB",
        "\u0661GiB",
        "1iB",
    ],
)
def test_nonsense_is_refused_and_quoted(size: str) -> None:
    with pytest.raises(InvalidInputError, match="memory size") as caught:
        parse_memory_size(size)
    assert repr(size) in str(caught.value)


@pytest.mark.parametrize("size", [0, -5, True, 1.5, None, b"1GiB"])
def test_other_values_are_refused(size: object) -> None:
    with pytest.raises(InvalidInputError):
        parse_memory_size(size)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.00 KiB"),
        (2**20 - 1, "1.00 MiB"),
        (900 * 2**20, "900 MiB"),
        (1023 * 2**20, "1.00 GiB"),
        (3 * 2**29, "1.50 GiB"),
        (12_345_678_901, "11.5 GiB"),
        (-(2**30), "-1.00 GiB"),
        (5000 * 2**40, "5000 TiB"),
    ],
)
def test_sizes_are_written(num_bytes: int, text: str) -> None:
    assert format_memory_size(num_bytes) == text


@given(st.integers(1, 2**45))
def test_what_is_written_reads_back_within_its_digits(num_bytes: int) -> None:
    assert parse_memory_size(format_memory_size(num_bytes)) == pytest.approx(num_bytes, rel=6e-3)
