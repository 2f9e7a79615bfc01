"""Datasheet ceilings, used to call a time impossible. Measured ceilings stand beside them in reports."""

from __future__ import annotations

from dataclasses import dataclass


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
