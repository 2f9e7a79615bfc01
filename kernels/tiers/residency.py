"""Which units stay on the device and which stream through slots. Pure arithmetic, no torch.

Even interleaving of resident and streamed units meets the lower bound of the total time where a resident prefix does
not: transfers then always have a resident neighbour's compute to hide behind.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from vbench.kernels.tiers.budget import BudgetError


@dataclass(frozen=True, slots=True)
class Residency:
    """A plan.

    Args:
        resident: by unit, whether it stays on the device.
        slots: how many slots the streamed units share; 0 if none streams.
        slot_bytes: of each slot.
        device_bytes: of resident units (with what each costs beside its weights) and slots together.
        streamed_bytes: what one pass over the module copies to the device.
    """

    resident: tuple[bool, ...]
    slots: int
    slot_bytes: int
    device_bytes: int
    streamed_bytes: int


def plan(
    sizes_bytes: Sequence[int],
    device_bytes: int,
    slots: int,
    costs: Sequence[float] | None = None,
    movable: Sequence[bool] | None = None,
) -> Residency:
    """The plan that streams the fewest bytes within ``device_bytes``, spread evenly over the pass.

    Args:
        sizes_bytes: of the units, in order of use.
        device_bytes: room for weights.
        slots: streaming needs at least this many (two to overlap; more where calls nest).
        costs: device bytes a resident unit takes per byte of weight (its gradient and optimizer state may stay there
            too); 1 for all by default.
        movable: whether a unit may be resident at all; all may by default.

    Raises:
        BudgetError: not even streaming as much as may be fits; says by how many bytes.
    """
    costs = costs if costs is not None else [1.0] * len(sizes_bytes)
    movable = movable if movable is not None else [True] * len(sizes_bytes)
    weighed = [math.ceil(size * cost) for size, cost in zip(sizes_bytes, costs, strict=True)]
    if all(movable) and sum(weighed) <= device_bytes:
        return Residency((True,) * len(sizes_bytes), 0, 0, sum(weighed), 0)
    best: Residency | None = None
    least = sum(weighed) if all(movable) else None
    # A slot holds the largest streamed unit, so units above some size must be resident; try each size as that limit.
    for limit in sorted(set(sizes_bytes)):
        above = [size > limit for size in sizes_bytes]
        if any(over and not free for over, free in zip(above, movable, strict=True)):
            continue
        needed = slots * limit + sum(weight for weight, over in zip(weighed, above, strict=True) if over)
        least = needed if least is None else min(least, needed)
        if needed > device_bytes:
            continue
        free = [weight if not over and may else 0 for weight, over, may in zip(weighed, above, movable, strict=True)]
        chosen = _spread(free, device_bytes - needed)
        resident = tuple(over or stays for over, stays in zip(above, chosen, strict=True))
        streamed = sum(size for size, stays in zip(sizes_bytes, resident, strict=True) if not stays)
        used = slots * limit + sum(weight for weight, stays in zip(weighed, resident, strict=True) if stays)
        if best is None or streamed < best.streamed_bytes:
            best = Residency(resident, slots, limit, used, streamed)
    if best is None:
        assert least is not None, "the largest size as limit always leaves nothing above it"
        raise BudgetError(
            f"weights need at least {least} bytes of device memory (all, or {slots} slots of the largest "
            f"streamed unit and what is larger), {device_bytes} are left for them: {least - device_bytes} short; "
            "raise gpu or lower activations"
        )
    return best


def _spread(weights_bytes: Sequence[int], room_bytes: int) -> list[bool]:
    """Resident or not, at most ``room_bytes`` in all and, up to whole units, in proportion everywhere.

    A weight of 0 means that the unit may not stay.
    """
    total = sum(weights_bytes)
    out: list[bool] = []
    taken, passed = 0, 0
    for weight in weights_bytes:
        passed += weight
        stays = weight > 0 and (taken + weight) * total <= min(room_bytes, total) * passed
        out.append(stays)
        taken += weight if stays else 0
    # Whole units leave a remainder; fill it front to back.
    for i, weight in enumerate(weights_bytes):
        if weight > 0 and not out[i] and taken + weight <= room_bytes:
            out[i] = True
            taken += weight
    return out


def filed(
    sizes_bytes: Sequence[int], trainable: Sequence[bool], pinned_bytes: int, file_bytes: int, buffers: int
) -> tuple[bool, ...]:
    """Which units lie in files, as few bytes as may be: all host memory, and ``buffers`` of the largest filed unit.

    Trainable units stay in host memory, where their optimizer steps, and room for their gradients is kept beside them.

    Raises:
        BudgetError: host memory or files are too small; says by how many bytes.
    """
    total = sum(sizes_bytes)
    if total <= pinned_bytes:
        return (False,) * len(sizes_bytes)
    if file_bytes == 0:
        raise BudgetError(
            f"weights take {total} bytes of host memory and pinned={pinned_bytes}: {total - pinned_bytes} short; "
            "raise pinned, or give file and dir"
        )
    fixed = 2 * sum(size for size, trains in zip(sizes_bytes, trainable, strict=True) if trains)
    if fixed > pinned_bytes:
        raise BudgetError(
            f"trainable weights and their gradients take {fixed} host bytes (files hold frozen ones only) and "
            f"pinned={pinned_bytes}: {fixed - pinned_bytes} short; raise pinned, or freeze parameters"
        )
    frozen = [size for size, trains in zip(sizes_bytes, trainable, strict=True) if not trains]
    try:
        chosen = plan(frozen, pinned_bytes - fixed, buffers)
    except BudgetError as error:
        raise BudgetError(
            f"pinned={pinned_bytes} has no room for {buffers} staging buffers of the units that would lie in files "
            f"beside {fixed} trainable bytes; raise pinned"
        ) from error
    if chosen.streamed_bytes > file_bytes:
        raise BudgetError(
            f"weights beyond pinned={pinned_bytes} take {chosen.streamed_bytes} bytes of files and file={file_bytes}: "
            f"{chosen.streamed_bytes - file_bytes} short; raise file or pinned"
        )
    stays = iter(chosen.resident)
    return tuple(not trains and not next(stays) for trains in trainable)
