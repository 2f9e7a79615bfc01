"""Datasheet ceilings, used to call a time impossible. Measured ceilings stand beside them in reports."""

from __future__ import annotations

from dataclasses import dataclass

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
