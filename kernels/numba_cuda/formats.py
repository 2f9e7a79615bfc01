"""Facts of the four 4-bit formats that kernels need (meaning: the op definitions). Imports neither torch nor numba."""

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
        e2m1: codes are E2M1 (else integers, code - 8).
        scaling: what shares a scale: ``tensor``, ``row`` (of K) or ``group``.
        group: elements along K sharing a scale, for scaling ``group``.
        e4m3_scale: scales are E4M3 bytes under one float32 global scale (else float32, global scale 1).
    """

    name: str
    e2m1: bool
    scaling: Literal["tensor", "row", "group"]
    group: int
    e4m3_scale: bool

    def scale_shape(self, n: int, k: int) -> tuple[int, ...]:
        """Shape of the scales of an n x k weight."""
        if self.scaling == "tensor":
            return (1,)
        return (n,) if self.scaling == "row" else (n, k // self.group)


FORMATS = {
    f.name: f
    for f in (
        Format("absmax7_tensor", False, "tensor", 0, False),
        Format("absmax7_row", False, "row", 0, False),
        Format("absmax7_g128", False, "group", 128, False),
        Format("nvfp4", True, "group", 16, True),
    )
}

#: Largest block count along y of a CUDA grid.
MAX_GRID_Y = 65535
#: Largest block count along x of a CUDA grid.
MAX_GRID_X = 2**31 - 1


def format_of(case: Case) -> Format:
    """The case's format, after checking that its n x k weight can exist in it.

    Raises:
        Unsupported: unknown format, a zero size, odd k, k no multiple of the group, or too many rows for a grid.
    """
    name, n, k = case.text("fmt"), case.axis("n"), case.axis("k")
    fmt = FORMATS.get(name)
    if fmt is None:
        raise Unsupported("format", f"fmt={name}: these kernels know {', '.join(FORMATS)}")
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
