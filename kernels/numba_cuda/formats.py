"""Facts of the 4-bit formats that kernels need (meaning: the op definitions). Imports neither torch nor numba."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from vbench.backend import Device
from vbench.errors import Unsupported
from vbench.spec import Case


@dataclass(frozen=True, slots=True)
class Format:
    """A 4-bit weight format.

    Args:
        name: as in case ids.
        element: what a code stands for: ``int4`` (code - 8), ``e2m1`` or ``nf4`` (an entry of QLoRA's table).
        scaling: what shares a scale: ``tensor``, ``row`` (of K) or ``group``.
        group: elements along K sharing a scale, for scaling ``group``.
        scale: ``fp32``, ``e4m3`` (under one float32 global scale, which is 1 elsewhere) or ``e8m0``.
    """

    name: str
    element: Literal["int4", "e2m1", "nf4"]
    scaling: Literal["tensor", "row", "group"]
    group: int
    scale: Literal["fp32", "e4m3", "e8m0"]

    @property
    def scale_torch(self) -> str:
        """torch's name of the scale's dtype."""
        return {"fp32": "float32", "e4m3": "float8_e4m3fn", "e8m0": "uint8"}[self.scale]

    @property
    def scale_held(self) -> str:
        """numpy's name of the array element scales are held as; its size is the alignment they need."""
        return "float32" if self.scale == "fp32" else "uint8"

    def scale_shape(self, n: int, k: int) -> tuple[int, ...]:
        """Shape of the scales of an n x k weight."""
        if self.scaling == "tensor":
            return (1,)
        return (n,) if self.scaling == "row" else (n, k // self.group)


FORMATS = {
    f.name: f
    for f in (
        Format("absmax7_tensor", "int4", "tensor", 0, "fp32"),
        Format("absmax7_row", "int4", "row", 0, "fp32"),
        Format("absmax7_g128", "int4", "group", 128, "fp32"),
        Format("nvfp4", "e2m1", "group", 16, "e4m3"),
        Format("mxfp4", "e2m1", "group", 32, "e8m0"),
        Format("nf4", "nf4", "group", 64, "fp32"),
    )
}

#: Encoders of mxfp4 by the rule for a block's scale: what is added to the bits of its absmax before the exponent is
#: taken. ``mxfp4``: OCP's floor; even: up from a significand of 1.75; rceil: from above 1.5; ceil: from above 1.
MXFP4_ROUNDING = {"mxfp4": 0, "mxfp4_even": 1 << 21, "mxfp4_rceil": (1 << 22) - 1, "mxfp4_ceil": (1 << 23) - 1}

#: Largest block count along y of a CUDA grid.
MAX_GRID_Y = 65535
#: Largest block count along x of a CUDA grid.
MAX_GRID_X = 2**31 - 1


def format_of(case: Case) -> Format:
    """The format that the case's weight is in, or is encoded to, after checking that n x k can exist in it.

    Raises:
        Unsupported: unknown format, a zero size, odd k, k no multiple of the group, or too many rows for a grid.
    """
    name, n, k = case.text("fmt"), case.axis("n"), case.axis("k")
    fmt = FORMATS.get("mxfp4" if name in MXFP4_ROUNDING else name)
    if fmt is None:
        known = ", ".join(dict.fromkeys((*FORMATS, *MXFP4_ROUNDING)))
        raise Unsupported("format", f"fmt={name}: these kernels know {known}")
    if n == 0 or k == 0:
        raise Unsupported("zero_size", f"n={n}, k={k}: a weight needs at least one element")
    if k % 2:
        raise Unsupported("k_odd", f"k={k}: two codes share a byte, so k must be even; pad the weight")
    if fmt.scaling == "group" and k % fmt.group:
        raise Unsupported("k_not_multiple_of_block", f"k={k} is no multiple of {name}'s block of {fmt.group}")
    if n > MAX_GRID_X:
        raise Unsupported("too_large", f"n={n}: a grid has at most {MAX_GRID_X} blocks along x")
    return fmt


#: Weights and multiply-adds the simulator is given at most: it computes some two thousand a second.
SIMULATED_WEIGHTS = 2**11
SIMULATED_PRODUCTS = 2**13


def require_simulable(case: Case, device: Device, products: int = 0) -> None:
    """Refuse on the CPU what would take the simulator minutes.

    Args:
        products: multiply-adds of the case; 0 for the codec.

    Raises:
        Unsupported: device is cpu and the case is too large.
    """
    weights = case.axis("n") * case.axis("k")
    if device == "cpu" and (weights > SIMULATED_WEIGHTS or products > SIMULATED_PRODUCTS):
        raise Unsupported(
            "too_large_for_simulator",
            f"{weights} weights, {products} products: the simulator takes {SIMULATED_WEIGHTS} and "
            f"{SIMULATED_PRODUCTS}; check this case on a GPU",
        )
