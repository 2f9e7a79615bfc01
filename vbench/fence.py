"""Red zones: a tensor in the middle of a storage of its own whose ends are filled, so that access beyond it shows.

A write past either end changes the fill. A read past an input's end finds NaN (in every floating type, and 255 or -1 in
the others). A right answer with a write out of bounds passes every other check (flashinfer issue 3978).
Every function imports torch inside.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

#: Bytes on either side: more than the widest vector access, and several rows of a small case.
ZONE_BYTES = 4096
#: All ones is NaN in bf16, fp16, fp32, fp64 and E4M3, and the NaN of E8M0.
INPUT_FILL = 0xFF
#: No NaN: a kernel that writes NaN beyond an output must be seen too.
OUTPUT_FILL = 0xA5
#: Where in a line of this many bytes a tensor begins is kept: kernels may ask for alignment.
LINE_BYTES = 256


@dataclass(frozen=True, slots=True)
class Fence:
    """One fenced tensor.

    Args:
        tensor: the view a kernel gets.
        storage_u8: all bytes [before, the tensor's extent, after].
        first, end: extent of the tensor in ``storage_u8``, bytes.
        fill: what every byte outside held.
    """

    tensor: Any
    storage_u8: Any
    first: int
    end: int
    fill: int

    @property
    def zones_u8(self) -> tuple[Any, Any]:
        """The bytes before and after the tensor."""
        return self.storage_u8[: self.first], self.storage_u8[self.end :]

    def breach(self) -> str:
        """Where bytes outside the tensor were written to, or ``""``."""
        for side, zone in zip(("before", "after"), self.zones_u8, strict=True):
            changed = int((zone != self.fill).sum())
            if changed:
                return f"{changed} bytes {side} a tensor of shape {tuple(self.tensor.shape)} were written to"
        return ""


def _extent_bytes(t: Any) -> int:
    return int((1 + sum((n - 1) * stride for n, stride in zip(t.shape, t.stride(), strict=True))) * t.element_size())


def fence(t: Any, fill: int) -> Fence:
    """A copy of ``t`` between red zones: same strides, same place within a line, gaps between rows included."""
    import torch

    extent = _extent_bytes(t)
    first = ZONE_BYTES + t.data_ptr() % LINE_BYTES
    total = first + extent + ZONE_BYTES
    # Slack for a base that is no multiple of a line itself.
    pinned = t.device.type == "cpu" and t.is_pinned()
    raw = torch.empty(total + LINE_BYTES, dtype=torch.uint8, device=t.device, pin_memory=pinned)
    raw = raw[-raw.data_ptr() % LINE_BYTES :][:total]
    raw.fill_(fill)
    source = torch.empty(0, dtype=torch.uint8, device=t.device).set_(
        t.untyped_storage(), t.storage_offset() * t.element_size(), (extent,), (1,)
    )
    raw[first : first + extent].copy_(source)
    offset = (raw.storage_offset() + first) // t.element_size()
    view = torch.empty(0, dtype=t.dtype, device=t.device).set_(raw.untyped_storage(), offset, t.shape, t.stride())
    return Fence(view, raw, first, first + extent, fill)


def fenced(value: Any, fill: int, fences: list[Fence]) -> Any:
    """``value`` with every plain, non-empty tensor inside nested dicts, lists and tuples replaced by a fenced copy.

    Args:
        fences: takes the fences made.
    """
    import torch

    if type(value) is torch.Tensor and value.numel() and value.layout is torch.strided:
        made = fence(value, fill)
        fences.append(made)
        return made.tensor
    if type(value) is dict:
        return {name: fenced(item, fill, fences) for name, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(fenced(item, fill, fences) for item in value)
    return value


def first_breach(fences: Mapping[str, list[Fence]]) -> str:
    """The first breach among named groups of fences (``input``, ``output``), or ``""``.

    All zones of a device are looked at before it is waited for, once.
    """
    import torch

    changed: dict[Any, list[Any]] = {}
    for one in (f for made in fences.values() for f in made):
        for zone in one.zones_u8:
            changed.setdefault(zone.device, []).append((zone != one.fill).any())
    if not any(bool(torch.stack(found).any()) for found in changed.values()):
        return ""
    for group, made in fences.items():
        for one in made:
            breach = one.breach()
            if breach:
                return f"{group}: {breach}"
    return ""
