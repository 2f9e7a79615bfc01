"""Static places on the device through which units stream, and the rules of their reuse.

A slot is written again only when nobody can read it any more: no call holds it (``leases``), no tensor aliases it (the
reference count of its storage; autograd may keep one for as long as it likes), and the compute issued on it is over
(marks, waited for by the copy, not by the host).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vbench.errors import Unsupported
from vbench.kernels.tiers.links import Links
from vbench.kernels.tiers.marks import Marks, join


def storage_references(memory_u8: Tensor) -> int:
    """How many owners the tensor's storage has, C++ ones included.

    Raises:
        Unsupported: ``no_use_count``: this torch does not tell (``torch._C._storage_Use_Count``, used by its own CUDA
            graph trees), and without it a slot could be overwritten under a saved tensor.
    """
    count = getattr(torch._C, "_storage_Use_Count", None)
    if count is None:
        raise Unsupported("no_use_count", f"torch {torch.__version__} cannot count references to a storage")
    storage: Any = memory_u8.untyped_storage()
    return int(count(storage._cdata))


class Slot:
    """One place.

    Attributes:
        memory_u8: its bytes, an allocation of its own, so that its reference count speaks of it alone.
        occupant: index of the unit whose bytes are in it or on their way; ``None`` for none.
        ready: when the copy in is over.
        used: when the compute issued on it is over.
        leases: calls in progress that read it.
        touched: when it was last acquired, in acquisitions.
    """

    __slots__ = ("_alone", "_open", "leases", "memory_u8", "occupant", "ready", "touched", "used")

    def __init__(self, size_bytes: int, device: torch.device) -> None:
        self.memory_u8 = torch.empty(size_bytes, dtype=torch.uint8, device=device)
        self.occupant: int | None = None
        self.ready: Marks = ()
        self.used: Marks = ()
        self.leases = 0
        self.touched = 0
        self._open: list[Any] = []
        self.count_owners()

    def count_owners(self) -> None:
        """Whoever looks at the memory now does so for good (launches bound to it) and does not hold the slot."""
        self._alone = storage_references(self.memory_u8)

    @property
    def idle(self) -> bool:
        """Nobody holds it and no tensor aliases it."""
        return self.leases == 0 and storage_references(self.memory_u8) <= self._alone

    def read_on(self, stream: Any) -> None:
        """Compute on ``stream`` will read the slot until no alias is left (autograd says no more than that)."""
        if not any(stream is known or stream == known for known in self._open):
            self._open.append(stream)

    def settle(self, links: Links) -> Marks:
        """Marks of all compute issued so far that may read the slot; it is idle, so no more will come."""
        for stream in self._open:
            self.used = join(self.used, links.compute_mark(stream))
        self._open.clear()
        return self.used
