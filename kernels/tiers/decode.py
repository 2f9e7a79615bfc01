"""Decode of a packed 4-bit weight in plain torch, for levels that hold codes and consumers that want values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

#: format -> (value of each of the 16 codes, elements along k that share a scale; 0: the whole tensor, -1: a row).
#: E2M1 with bit 3 as the sign is OCP Microscaling v1.0's; absmax7 codes are the integer plus 8.
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
_INTEGERS = tuple(float(code - 8) for code in range(16))
FORMATS: Mapping[str, tuple[tuple[float, ...], int]] = {
    "absmax7_tensor": (_INTEGERS, 0),
    "absmax7_row": (_INTEGERS, -1),
    "absmax7_g128": (_INTEGERS, 128),
    "nvfp4": (_E2M1, 16),
}


class Decoder:
    """Decodes weights of one format on one device, into a tensor given.

    Args:
        fmt: a key of FORMATS.
    """

    def __init__(self, fmt: str, device: torch.device) -> None:
        values, _ = FORMATS[fmt]
        table = torch.tensor(values, dtype=torch.float32)
        # Both values of a byte at once: one look-up a pair, element 0 from the low nibble.
        byte = torch.arange(256)
        self._pairs = torch.stack((table[byte & 0xF], table[byte >> 4]), dim=-1).to(device)

    def into(self, target: Tensor, packed: Mapping[str, Any]) -> None:
        """target [n, k] = value x scale x global scale, in float32 in that order, rounded once to target's dtype.

        Args:
            packed: ``codes`` u8 [n, k/2], ``scale``, ``global_scale`` float32 [1], on the device.
        """
        n, k = target.shape
        scale = packed["scale"].to(torch.float32)
        groups = scale.shape[1] if scale.dim() == 2 else 1
        values = self._pairs[packed["codes"].int()].reshape(n, groups, -1)
        values.mul_(scale.reshape(-1, groups, 1)).mul_(packed["global_scale"])
        target.copy_(values.reshape(n, k))
