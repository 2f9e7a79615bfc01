"""Decode of a packed 4-bit weight in plain torch, for levels that hold codes and consumers that want values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

#: format -> value of each of its 16 codes. How many weights share a scale shows in the scale's shape.
#: E2M1 with bit 3 as the sign is OCP Microscaling v1.0's; absmax7 codes are the integer plus 8;
#: NF4's values are QLoRA's (arXiv 2305.14314, appendix E). mxfp4's scales are E8M0 bytes, 2^(byte - 127).
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
_INTEGERS = tuple(float(code - 8) for code in range(16))
_NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
TABLES: Mapping[str, tuple[float, ...]] = {
    "absmax7_tensor": _INTEGERS,
    "absmax7_row": _INTEGERS,
    "absmax7_g128": _INTEGERS,
    "nvfp4": _E2M1,
    "mxfp4": _E2M1,
    "nf4": _NF4,
}


class Decoder:
    """Decodes weights of one format on one device, into a tensor given.

    Args:
        fmt: a key of TABLES.
    """

    def __init__(self, fmt: str, device: torch.device) -> None:
        table = torch.tensor(TABLES[fmt], dtype=torch.float32)
        self._powers_of_two = fmt == "mxfp4"
        # Both values of a byte at once: one look-up a pair, element 0 from the low nibble.
        byte = torch.arange(256)
        self._pairs = torch.stack((table[byte & 0xF], table[byte >> 4]), dim=-1).to(device)

    def into(self, target: Tensor, packed: Mapping[str, Any]) -> None:
        """target [n, k] = value x scale x global scale, in float32 in that order, rounded once to target's dtype.

        Args:
            packed: ``codes`` u8 [n, k/2], ``scale``, ``global_scale`` float32 [1], on the device.
        """
        n, k = target.shape
        scale = packed["scale"]
        scale = (scale.view(torch.float8_e8m0fnu) if self._powers_of_two else scale).to(torch.float32)
        groups = scale.shape[1] if scale.dim() == 2 else 1
        values = self._pairs[packed["codes"].int()].reshape(n, groups, -1)
        values.mul_(scale.reshape(-1, groups, 1)).mul_(packed["global_scale"])
        target.copy_(values.reshape(n, k))
