"""Definition of the fetch of a packed weight from host memory. Imports no torch."""

from __future__ import annotations

from vbench.reference.ops.fp4 import FORMATS, packed_bytes, reject_weight
from vbench.reference.ops.types import DTYPES, ITEMSIZE
from vbench.spec import Case, Op, Output, Param

#: The weight as it is: elements of the output's dtype, copied bit for bit.
RAW = "raw"
FETCH_DISTRIBUTIONS = ("normal", "grid", "zeros")


def _reject(case: Case) -> tuple[str, str] | None:
    if case.text("fmt") != RAW:
        return reject_weight(case)
    n, k = case.axis("n"), case.axis("k")
    return None if n and k else ("zero_size", f"n={n}, k={k}: nothing to fetch")


def host_bytes(case: Case) -> int:
    """Bytes that must come over the host's link: codes and all scales, or the raw weight."""
    fmt, n, k = case.text("fmt"), case.axis("n"), case.axis("k")
    return n * k * ITEMSIZE[case.text("y")] if fmt == RAW else packed_bytes(fmt, n, k)


TIER_FETCH = Op(
    name="tier_fetch",
    summary=(
        "weight[n,k] in device memory from a packed weight in (on cuda: pinned) host memory, decoded on the way as "
        "fp4_dequantize does; fmt raw copies elements of dtype y bit for bit. The inputs stay on the host"
    ),
    params=(
        Param("fmt", "choice", "raw or a 4-bit weight format", (RAW, *FORMATS)),
        Param("y", "choice", "dtype of the weight on the device", DTYPES, "bf16"),
        Param(
            "dist",
            "choice",
            "distribution of the values; grid: every bit pattern or code",
            FETCH_DISTRIBUTIONS,
            "normal",
        ),
        Param("n", "axis", "output features"),
        Param("k", "axis", "input features"),
    ),
    outputs=(Output("weight", "y", "n, k"),),
    inputs="vbench.reference.fetch:fetch_inputs",
    oracle="vbench.reference.fetch:fetch_oracle",
    reject=_reject,
    bytes=lambda c: c.axis("n") * c.axis("k") * ITEMSIZE[c.text("y")],
    host_bytes=host_bytes,
)

OPS: tuple[Op, ...] = (TIER_FETCH,)
