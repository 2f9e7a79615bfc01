"""How much memory a tiered module may use. No torch."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from vbench.kernels.tiers.errors import TierError

_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
_UNITS |= {"kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30, "tib": 1 << 40}


class BudgetError(TierError):
    """A budget that is malformed or too small; the message says by how many bytes and which knob to turn."""


def parse_bytes(text: int | str, what: str = "size") -> int:
    """Bytes of ``8GiB`` (binary), ``8GB`` (decimal), ``512`` or an integer.

    Raises:
        BudgetError: anything else, or a negative number.
    """
    if isinstance(text, bool) or not isinstance(text, (int, str)):
        raise BudgetError(f"{what}={text!r} must be bytes or text like '8GiB'")
    if isinstance(text, int):
        if text < 0:
            raise BudgetError(f"{what}={text} must not be negative")
        return text
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    unit = _UNITS.get(match.group(2).lower()) if match else None
    if match is None or unit is None:
        raise BudgetError(f"{what}={text!r} is no size; write bytes, or a number with B, KB, MB, GB, KiB, MiB or GiB")
    return int(float(match.group(1)) * unit)


@dataclass(frozen=True, slots=True)
class Budget:
    """Bytes each level may hold.

    Args:
        gpu: device memory for everything the process allocates through torch there: weights, gradients, activations.
        pinned: page-locked host memory for weights and, once a backward ran, their gradients.
        file: of files in ``dir`` for the frozen weights that ``pinned`` has no room for; 0 for none.
        dir: an existing folder that nobody else uses meanwhile.
        activations: the part of ``gpu`` to leave to activations and workspace; ``auto`` starts with no weight held on
            the device and measures the first step.

    Raises:
        BudgetError: from the properties, for text that is no size.
    """

    gpu: int | str
    pinned: int | str
    activations: int | str = "auto"
    file: int | str = 0
    dir: str | Path | None = None

    @property
    def gpu_bytes(self) -> int:
        return parse_bytes(self.gpu, "gpu")

    @property
    def pinned_bytes(self) -> int:
        return parse_bytes(self.pinned, "pinned")

    @property
    def file_bytes(self) -> int:
        return parse_bytes(self.file, "file")

    @property
    def activation_bytes(self) -> int | Literal["auto"]:
        return "auto" if self.activations == "auto" else parse_bytes(self.activations, "activations")
