"""Datasheet ceilings, used to call a time impossible. Measured ceilings stand beside them in reports."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from vbench.record import Outcome, Record
from vbench.spec import Case, Op

#: PCI Express 5.0, 16 lanes, one direction: 32 GT/s a lane, 128 bits of every 130 are data. Packet headers take a few
#: percent more, so that no transfer reaches it.
PCIE5_X16_BYTES_PER_S = 16 * 32e9 * 128 / 130 / 8


@dataclass(frozen=True, slots=True)
class Datasheet:
    """Peaks of one GPU.

    Args:
        memory_bytes_per_s: device memory bandwidth.
        dense_flops_per_s: fastest dense 16-bit matrix rate; 8-bit operands have twice that.
        source: where the figures stand.
        host_link_bytes_per_s: the host's link, one direction.
    """

    memory_bytes_per_s: float
    dense_flops_per_s: float
    source: str
    host_link_bytes_per_s: float = PCIE5_X16_BYTES_PER_S


DATASHEETS = {
    "NVIDIA H200": Datasheet(4.8e12, 989.4e12, "NVIDIA H200 datasheet, SXM column"),
    "NVIDIA H100 80GB HBM3": Datasheet(3.35e12, 989.4e12, "NVIDIA H100 datasheet, SXM column"),
}


def floor_s(gpu: str, bytes_moved: int, flops: int, host_bytes: int = 0, operands: str = "16bit") -> float:
    """No kernel on ``gpu`` can move these bytes and do these operations faster; 0 for a GPU not listed.

    Args:
        host_bytes: bytes that come over the host's link.
        operands: ``16bit``, or ``8bit`` for products that may run on 8-bit operands.
    """
    sheet = DATASHEETS.get(gpu)
    if sheet is None:
        return 0.0
    return max(
        bytes_moved / sheet.memory_bytes_per_s,
        flops / (sheet.dense_flops_per_s * (2 if operands == "8bit" else 1)),
        host_bytes / sheet.host_link_bytes_per_s,
    )


def case_floor_s(gpu: str, op: Op, case: Case) -> float:
    """``floor_s`` of what a case must move and compute."""
    return floor_s(gpu, *_needs(op, case), op.operands)


def _needs(op: Op, case: Case) -> tuple[int, int, int]:
    """Bytes of device memory, operations, and bytes over the host's link; 0 for a figure the op does not give."""
    figures = (op.bytes, op.flops, op.host_bytes)
    moved, work, fetched = (0 if figure is None else figure(case) for figure in figures)
    return moved, work, fetched


@dataclass(frozen=True, slots=True)
class Ceilings:
    """What one machine gave at best, from its records of kind ``roofline``.

    Args:
        bytes_per_s: device memory, the faster of reading and copying.
        flops_per_s: matrix products by dtype (``bf16``, ``fp16``, ``fp8``, ``tf32``, ``fp32``).
        host_bytes_per_s: from pinned memory to the device; infinite where it was not measured.
    """

    bytes_per_s: float
    flops_per_s: Mapping[str, float]
    host_bytes_per_s: float = math.inf

    def floor_s(self, bytes_moved: int, flops: int, dtype: str, host_bytes: int = 0) -> float:
        """Seconds these bytes and operations take at the measured ceilings; ``dtype`` of the operands."""
        peak = self.flops_per_s.get(dtype) or max(self.flops_per_s.values(), default=math.inf)
        return max(bytes_moved / self.bytes_per_s, flops / peak, host_bytes / self.host_bytes_per_s)


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
        machine: Ceilings(
            max(found.get(m, 0.0) for m in memory),
            {k: v for k, v in found.items() if k not in links},
            found.get("h2d", math.inf),
        )
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
    moved, work, fetched = _needs(op, case)
    sheet_s = floor_s(machine_of(record), moved, work, fetched, op.operands)
    here = known.get(machine_of(record))
    dtype = next((str(v) for k, v in case.params if k in ("x", "dtype", "y")), "bf16")
    measured_s = here.floor_s(moved, work, dtype, fetched) if here is not None else 0.0
    if not sheet_s and not measured_s:
        return None
    return Attained(
        measured_s or sheet_s,
        measured_s / median_s if measured_s else None,
        sheet_s / median_s if sheet_s else None,
    )
