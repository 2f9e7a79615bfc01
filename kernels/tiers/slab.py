"""The memory of a level: one allocation, made once, of exactly its bytes.

torch's own pinned allocator rounds every block up to a power of two (measured at up to 1.9x by its users: vllm #56410,
pytorch #95823), so the pinned slab is an anonymous mapping, page-locked in place by ``cudaHostRegister``.
"""

from __future__ import annotations

import mmap
import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vbench.kernels.tiers.errors import PinError


@dataclass(slots=True, weakref_slot=True)
class Slab:
    """``memory_u8``: uint8 vector of exactly the level's bytes.

    ``close`` lets go of it and unlocks it where it is pinned; copies must be over by then. Views keep the memory itself
    mapped, so a forgotten one reads stale bytes and never crashes.
    """

    memory_u8: Tensor
    _unpin: Any = None

    def close(self) -> None:
        if self._unpin is not None:
            self._unpin()
            self._unpin = None
        self.memory_u8 = torch.empty(0, dtype=torch.uint8)


def plain_slab(size_bytes: int, device: torch.device) -> Slab:
    """Pageable memory on a CPU, device memory on a GPU."""
    return Slab(torch.empty(size_bytes, dtype=torch.uint8, device=device))


def pinned_slab(size_bytes: int) -> Slab:
    """Page-locked host memory of exactly ``size_bytes`` (rounded to a page by the system, not by us).

    Raises:
        PinError: the driver refused; nothing stays locked.
    """
    if size_bytes == 0:
        return Slab(torch.empty(0, dtype=torch.uint8))
    mapping = mmap.mmap(-1, size_bytes)
    memory_u8 = torch.frombuffer(mapping, dtype=torch.uint8)
    cuda: Any = torch.cuda  # its binding of the runtime carries no types
    runtime = cuda.cudart()
    address = memory_u8.data_ptr()
    status = runtime.cudaHostRegister(address, size_bytes, 0)
    if int(status) != 0:
        raise PinError(f"cudaHostRegister of {size_bytes} bytes: error {int(status)}; lower the host budget")
    slab = Slab(memory_u8)
    # Runs at close, or when the slab is collected without; holding the mapping keeps it mapped until it is unlocked.
    slab._unpin = weakref.finalize(slab, _unregister, runtime, address, mapping)
    return slab


def _unregister(runtime: Any, address: int, mapping: mmap.mmap) -> None:
    runtime.cudaHostUnregister(address)
