"""Cards an estimate can be made for: memory, rates and links, each with its source. torch only inside ``auto``."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from vbench.errors import UsageError
from vbench.kernels.virtual.units import parse_bytes

GIB = 2**30


@dataclass(frozen=True, slots=True)
class Card:
    """A GPU and what it hangs on.

    Args:
        name: as given on the command line.
        memory_bytes: in all.
        context_bytes: taken by the CUDA context and its loaded kernels, outside PyTorch's allocator.
        matrix_workspace_bytes: what cuBLAS takes from the allocator: one workspace for the forward's thread, one for
            the backward's.
        flops: dtype -> matrix operations per second that a large product reaches.
        link_bytes_s: pinned host memory to GPU, one way.
        disk_bytes_s: file reads, page cache aside.
        source: where the figures come from, or what was assumed for want of one.
    """

    name: str
    memory_bytes: int
    context_bytes: int
    matrix_workspace_bytes: int
    flops: Mapping[str, float]
    link_bytes_s: float
    disk_bytes_s: float
    source: str


# PyTorch, aten/src/ATen/cuda/CUDABlas: 32 MiB on Hopper, else 4096 KiB x 2 + 16 KiB x 8; one a thread and stream.
_WORKSPACE = 2 * (2 * 4096 * 1024 + 8 * 16 * 1024)
_WORKSPACE_HOPPER = 2 * 32 * 1024 * 1024
_CONTEXT = "context 0.45 GB assumed (300-600 MB is usual)"

CARDS: Mapping[str, Card] = {
    card.name: card
    for card in (
        Card(
            "rtx3070", 8 * GIB, 450_000_000, _WORKSPACE, {"fp32": 0.8 * 20.3e12, "16bit": 0.8 * 40.6e12},
            25e9, 3e9,
            "NVIDIA GA102 whitepaper: 8 GB, 20.3 / 40.6 TFLOP/s dense fp32 / 16-bit with fp32 sums, of which 80 % are "
            f"assumed reached; PCIe 4 x16 at 25 GB/s and NVMe at 3 GB/s assumed; {_CONTEXT}",
        ),
        Card(
            "rtx3090", 24 * GIB, 450_000_000, _WORKSPACE, {"fp32": 0.8 * 35.6e12, "16bit": 0.8 * 71e12},
            25e9, 3e9,
            "NVIDIA GA102 whitepaper: 24 GB, 35.6 / 71 TFLOP/s dense fp32 / 16-bit with fp32 sums, of which 80 % are "
            f"assumed reached; PCIe 4 x16 at 25 GB/s and NVMe at 3 GB/s assumed; {_CONTEXT}",
        ),
        Card(
            "h200", 143_771 * 2**20, 600_000_000, _WORKSPACE_HOPPER, {"fp32": 0.8 * 67e12, "16bit": 690e12},
            55.2e9, 2.4e9,
            "measured on one H200: 690 TFLOP/s bf16, 55.2 GB/s pinned host to device, disk 2.4 GB/s; 143771 MiB as "
            "nvidia-smi gives it; fp32 without TF32: 80 % of the datasheet's 67 TFLOP/s; context 0.6 GB assumed",
        ),
    )
}  # fmt: skip


def find_card(text: str, option: str = "--gpu") -> Card:
    """The card called ``text``, an unnamed one of that size (``8GB``), or the one in this machine (``auto``).

    Raises:
        UsageError: none of these; the message names ``option``.
    """
    if text == "auto":
        return _this_machines_card()
    key = re.sub(r"[\s_-]", "", text.lower())
    if key in CARDS:
        return CARDS[key]
    if text[:1].isdigit():
        like = CARDS["rtx3070"]
        return Card(
            text, parse_bytes(text, option), like.context_bytes, like.matrix_workspace_bytes, like.flops,
            like.link_bytes_s, like.disk_bytes_s,
            f"only its size was given; rates and links of an RTX 3070: {like.source}",
        )  # fmt: skip
    raise UsageError(f"unknown {option} {text!r}: give a size such as 8GB, one of {', '.join(CARDS)}, or auto")


def _this_machines_card() -> Card:
    import torch

    if not torch.cuda.is_available():
        raise UsageError("--gpu auto: torch sees no GPU here; name one, such as --gpu rtx3070 or --gpu 8GB")
    found = torch.cuda.get_device_properties(0)
    for name, known in CARDS.items():
        if name in re.sub(r"\s", "", found.name.lower()):
            return Card(
                name, found.total_memory, known.context_bytes, known.matrix_workspace_bytes, known.flops,
                known.link_bytes_s, known.disk_bytes_s, f"memory as the driver gives it; {known.source}",
            )  # fmt: skip
    like = CARDS["rtx3070"]
    workspace = _WORKSPACE_HOPPER if found.major >= 9 else _WORKSPACE
    return Card(
        found.name, found.total_memory, like.context_bytes, workspace, like.flops, like.link_bytes_s,
        like.disk_bytes_s, f"memory as the driver gives it; rates and links of an RTX 3070: {like.source}",
    )  # fmt: skip
