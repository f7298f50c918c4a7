from __future__ import annotations

import re

import pytest

from lightning_memtrain.core import GIB, KIB, MIB, parse_bytes


@pytest.mark.parametrize(
    ("value", "num_bytes"),
    [
        (1, 1),
        (4 * GIB, 4 * GIB),
        ("1B", 1),
        ("3 B", 3),
        ("4GiB", 4 * GIB),
        ("512 MiB", 512 * MIB),
        (" 1.5 GiB ", 3 * GIB // 2),
        ("2KiB", 2 * KIB),
        ("1TiB", 1024 * GIB),
        ("1kB", 1000),
        ("800MB", 800_000_000),
        ("4.7GB", 4_700_000_000),
        ("0.1TB", 100_000_000_000),
        ("0.3KiB", 307),  # 307.2
        ("9007199254740993B", 9007199254740993),  # no float on the way
    ],
)
def test_bytes_are_read_exactly(value, num_bytes: int):
    assert parse_bytes(value) == num_bytes


@pytest.mark.parametrize(
    "value",
    [
        *(0, -1, True, 4.0, None, "", "4096", "4G", "4Gi", "4gib", "4GIB", "4KB", "4kiB", "4mb", "4Mb"),
        *("-1GiB", "1e3MB", "1.GiB", ".5GiB", "1,5GiB", "4  GiB", "GiB", "0GiB", "0.5B", "٤GiB", "4GiB/s"),
    ],
)
def test_anything_else_is_refused_with_the_cure(value):
    message = (
        "`parse_bytes(value)` must be a number of bytes, at least 1, or a text such as '4GiB', '512 MiB' or "
        f"'800MB', but got {value!r}. The units are B, kB, MB, GB, TB, KiB, MiB, GiB, TiB; capitals matter."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        parse_bytes(value)


def test_the_error_names_what_the_user_wrote():
    with pytest.raises(ValueError, match=r"^`plan\(budget\)` must be .* but got '4G'\."):
        parse_bytes("4G", argument="plan(budget)")
