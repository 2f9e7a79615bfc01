"""Datasheet ceilings, used to call a time impossible. Measured ceilings stand beside them in reports."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from vbench.record import Outcome, Record
from vbench.spec import Op


@dataclass(frozen=True, slots=True)
class Datasheet:
    """Peaks of one GPU.

    Args:
        memory_bytes_per_s: device memory bandwidth.
        dense_flops_per_s: fastest dense 16-bit matrix rate.
        source: where the figures stand.
    """

    memory_bytes_per_s: float
    dense_flops_per_s: float
    source: str


DATASHEETS = {
    "NVIDIA H200": Datasheet(4.8e12, 989.4e12, "NVIDIA H200 datasheet, SXM column"),
    "NVIDIA H100 80GB HBM3": Datasheet(3.35e12, 989.4e12, "NVIDIA H100 datasheet, SXM column"),
}


def floor_s(gpu: str, bytes_moved: int, flops: int) -> float:
    """No kernel on ``gpu`` can move these bytes and do these operations faster; 0 for a GPU not listed."""
    sheet = DATASHEETS.get(gpu)
    if sheet is None:
        return 0.0
    return max(bytes_moved / sheet.memory_bytes_per_s, flops / sheet.dense_flops_per_s)


@dataclass(frozen=True, slots=True)
class Ceilings:
    """What one machine gave at best, from its records of kind ``roofline``.

    Args:
        bytes_per_s: device memory, the faster of reading and copying.
        flops_per_s: matrix products by dtype (``bf16``, ``fp16``, ``fp8``, ``tf32``, ``fp32``).
    """

    bytes_per_s: float
    flops_per_s: Mapping[str, float]

    def floor_s(self, bytes_moved: int, flops: int, dtype: str) -> float:
        """Seconds these bytes and operations take at the measured ceilings; ``dtype`` of the operands."""
        peak = self.flops_per_s.get(dtype) or max(self.flops_per_s.values(), default=math.inf)
        return max(bytes_moved / self.bytes_per_s, flops / peak)


def ceilings(records: Iterable[Record]) -> dict[str, Ceilings]:
    """GPU's name (CPU model where there is none) -> its ceilings, from records of kind ``roofline``."""
    rates: dict[str, dict[str, float]] = {}
    for r in records:
        if r.kind == "roofline" and r.outcome is Outcome.PASSED:
            what = dict(part.partition("=")[::2] for part in r.case.partition("[")[2].rstrip("]").split(","))
            name = what["dtype"] if what["what"] == "matmul" else what["what"]
            here = rates.setdefault(machine_of(r), {})
            here[name] = max(here.get(name, 0.0), r.metrics["per_s"])
    memory = ("read", "copy")
    links = {*memory, "exp", "launch", "h2d", "d2h", "duplex", "file_read", "file_write"}
    return {
        machine: Ceilings(max(found.get(m, 0.0) for m in memory), {k: v for k, v in found.items() if k not in links})
        for machine, found in rates.items()
        if any(m in found for m in memory)
    }


def machine_of(record: Record) -> str:
    """What the ceilings of a record's machine are known by."""
    return str(record.environment.get("gpu") or record.environment.get("cpu") or "")


@dataclass(frozen=True, slots=True)
class Attained:
    """How near a time comes to what is possible; a fraction is ``None`` where its ceiling is not known.

    Args:
        floor_s: at the measured ceilings, else the datasheet's.
        of_measured, of_datasheet: floor over time: 1 is as fast as possible.
    """

    floor_s: float
    of_measured: float | None
    of_datasheet: float | None


def attained(record: Record, median_s: float, op: Op, known: Mapping[str, Ceilings]) -> Attained | None:
    """What a record's median attains, ``None`` where the op gives no figures or no ceiling is known."""
    case = op.parse(record.case)
    moved = op.bytes(case) if op.bytes is not None else 0
    work = op.flops(case) if op.flops is not None else 0
    sheet_s = floor_s(machine_of(record), moved, work)
    here = known.get(machine_of(record))
    dtype = next((str(v) for k, v in case.params if k in ("x", "dtype", "y")), "bf16")
    measured_s = here.floor_s(moved, work, dtype) if here is not None else 0.0
    if not sheet_s and not measured_s:
        return None
    return Attained(
        measured_s or sheet_s,
        measured_s / median_s if measured_s else None,
        sheet_s / median_s if sheet_s else None,
    )
