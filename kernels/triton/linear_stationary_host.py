"""Host side of the stationary linear: what it takes, how a sum's parts lie on programs and warps, and the launch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from vbench.backend import Launch
from vbench.kernels.triton.packing import FRAGMENT_COLUMNS, FRAGMENT_ROWS, PackedWeight

FORMATS = ("absmax7_tensor", "absmax7_row", "absmax7_g128", "nvfp4", "mxfp4", "nf4")
MAX_TOKENS = 16
#: K blocks of 256 columns that the warps of a program hold at most, one each.
MAX_BLOCKS = 16
#: Warps of all programs of a multiprocessor: 16 leave each thread 128 registers.
WARPS = 16


@dataclass(frozen=True, slots=True)
class Mapping:
    """How the parts of a sum lie on programs and warps.

    Args:
        warps: of a program; each holds one K block.
        part: K blocks of a part; parts: parts of a program; split: programs along K.
    """

    warps: int
    part: int
    parts: int
    split: int


def takes(fmt: str, x: str, k: int) -> bool:
    """Whether format, dtype and row length suit it: integers in both 16-bit types, E2M1 in bfloat16; x in pairs."""
    return fmt in FORMATS and (x == "bf16" or (x == "fp16" and fmt.startswith("absmax7"))) and k % 8 == 0


def tokens(m: int) -> int:
    """Token columns of the product for m <= MAX_TOKENS tokens."""
    return 8 if m <= 8 else 16


def mapping(k: int, parts: int) -> Mapping:
    """Mapping of a sum over k columns in ``parts`` parts: as many whole parts in a program as its warps can hold."""
    blocks = -(-k // FRAGMENT_COLUMNS)
    part = -(-blocks // parts)
    if part > MAX_BLOCKS:
        raise ValueError(f"{parts} parts of {blocks} K blocks: a part may have {MAX_BLOCKS} at most")
    held = min(MAX_BLOCKS // part, parts)
    return Mapping(16 if held * part > 8 else 8, part, held, -(-parts // held))


def stationary_call(
    weight: PackedWeight, x: Any, bias: Any, y: Any, x_name: str, act: str, parts: int, dependent: bool
) -> tuple[tuple[int, int], tuple[Any, ...], dict[str, Any]]:
    """Grid, arguments and constants. Allocates the workspace of sums that cross programs, and their tickets."""
    m, bm = x.shape[0], tokens(x.shape[0])
    on = mapping(weight.k, parts)
    tiles = weight.n_pad // FRAGMENT_ROWS
    split = on.split
    processors = torch.cuda.get_device_properties(torch.cuda.current_device()).multi_processor_count
    programs = min(tiles, max(1, processors * (WARPS // on.warps) // split))
    elements = split * on.parts * tiles * FRAGMENT_ROWS * bm if split > 1 else 4
    partial = torch.empty(elements, dtype=torch.float32, device=x.device)
    tickets = torch.zeros(tiles, dtype=torch.int32, device=x.device)
    floats = weight.scale.dtype == torch.float32
    scale = weight.scale if floats else weight.scale.reshape(-1).view(torch.int32)
    groups = weight.scale.shape[2] if floats and weight.scale.dim() == 4 else 0
    arguments = (
        x, weight.codes.reshape(-1).view(torch.int32), scale, weight.global_scale, x if bias is None else bias, y,
        partial, tickets, m, weight.n, weight.k, x.stride(0), y.stride(0), weight.k_blocks, tiles,
    )  # fmt: skip
    constants: dict[str, Any] = {
        "FORMAT": weight.fmt,
        "X": x_name,
        "ACT": act,
        "HAS_BIAS": bias is not None,
        "BM": bm,
        "W": on.warps,
        "PART": on.part,
        "PARTS": on.parts,
        "SPLIT": split,
        "GROUPS": groups,
        "DEPENDENT": dependent,
        "num_warps": on.warps,
        "launch_pdl": dependent,
        "maxnreg": 65536 // (32 * WARPS),
    }
    return (programs, split), arguments, constants


def bind_stationary(
    weight: PackedWeight, x: Any, bias: Any, y: Any, x_name: str, act: str, parts: int, dependent: bool
) -> Launch:
    """A launch that writes y [m, n]. The caller has asked ``takes`` and ``linear_gluon_host``'s rules.

    ``dependent``: the packed weight must be complete before the first launch, since the kernel does not wait for
    what is queued in front of it before it fetches weights; so this waits for the device.
    """
    from vbench.kernels.triton.linear_stationary import stationary_kernel

    grid, arguments, constants = stationary_call(weight, x, bias, y, x_name, act, parts, dependent)
    if dependent:
        torch.cuda.synchronize()

    def launch() -> None:
        stationary_kernel[grid](*arguments, **constants)

    return launch
