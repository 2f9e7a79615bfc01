"""Sizes as people write them. Standard library only."""

from __future__ import annotations

import re

from vbench.errors import UsageError

_FACTORS = {
    "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
    "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40,
}  # fmt: skip


def parse_bytes(text: str, option: str) -> int:
    """``8GB`` (10^9) or ``8GiB`` (2^30) in bytes.

    Raises:
        UsageError: not a number above zero followed by a unit; the message names ``option``.
    """
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([KMGT]?i?B)\s*", text, re.IGNORECASE)
    size = int(float(match.group(1)) * _FACTORS[match.group(2).upper()]) if match else 0
    if size <= 0:
        raise UsageError(f"{option} {text!r}: give a size above zero with its unit, such as 8GB (10^9) or 8GiB (2^30)")
    return size


def show_bytes(size_bytes: float) -> str:
    """In the largest decimal unit that leaves at least 1: ``12.79 GB``."""
    sign, size = ("-", -size_bytes) if size_bytes < 0 else ("", size_bytes)
    for unit, factor in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= factor:
            return f"{sign}{size / factor:.2f} {unit}"
    return f"{sign}{size:.0f} B"
