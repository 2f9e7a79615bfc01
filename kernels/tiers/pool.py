"""A slab with its arena: blocks of real memory, packed when fragmentation demands it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from vbench.kernels.tiers.arena import Arena, Block
from vbench.kernels.tiers.links import Links
from vbench.kernels.tiers.marks import Marks
from vbench.kernels.tiers.slab import Slab

#: bounce buffer of a packing copy, whose source and target may overlap; lies beside the slab, made when first needed
SCRATCH_BYTES = 1 << 20


class Pool:
    """Blocks out of one slab.

    Args:
        slab: the memory.
        links: for copies; ``on_host`` memory is packed by the calling thread, device memory on the copy stream.
        on_host: the slab can be read and written by the host.
    """

    def __init__(self, slab: Slab, links: Links, *, on_host: bool) -> None:
        self._slab = slab
        self._links = links
        self._on_host = on_host
        self._scratch_u8: Tensor | None = None
        self.arena = Arena(slab.memory_u8.numel())
        self.packings = 0
        self.packed_bytes = 0

    def take(self, size_bytes: int) -> Block:
        """A block; the ledger has made sure that the bytes are there, so a lack of them is a programming error."""
        block = self.arena.take(size_bytes)
        if block is None:
            self._pack(size_bytes)
            block = self.arena.take(size_bytes)
            assert block is not None, "packing leaves one hole of all free bytes"
        return block

    def give(self, block: Block) -> None:
        self.arena.give(block)

    def view(self, block: Block) -> Tensor:
        """The block's bytes as a uint8 vector; no copy."""
        return self._slab.memory_u8[block.start : block.start + block.size_bytes]

    def close(self) -> None:
        self._scratch_u8 = None
        self._slab.close()

    def _pack(self, wanted_bytes: int) -> None:
        pending = self.arena.pending()
        moves = self.arena.pack(wanted_bytes)
        assert moves, "with nothing to move, one hole would have been long enough"
        self.packings += 1
        self.packed_bytes += sum(block.size_bytes for block, _ in moves)
        if self._on_host:
            self._links.host_wait(pending)
            for block, old_start in moves:
                self._slide(block, old_start, lambda to, source: to.copy_(source))
            return
        # Every copy waits for all earlier use of the slab, so holes need no marks: their next writer comes after these
        # copies on the same stream.
        done: list[Marks] = []
        for block, old_start in moves:
            self._slide(block, old_start, lambda to, source: done.append(self._links.copy(to, source, pending)))
            block.ready = done[-1]

    def _slide(self, block: Block, old_start: int, copy: Callable[[Tensor, Tensor], object]) -> None:
        """Copy a block from ``old_start`` down to its start, chunk by chunk over the bounce buffer.

        Each chunk is read whole before its target is written, and a target never reaches a later chunk's source.
        """
        memory_u8 = self._slab.memory_u8
        if self._scratch_u8 is None:
            scratch_bytes = min(SCRATCH_BYTES, memory_u8.numel())
            self._scratch_u8 = torch.empty(scratch_bytes, dtype=torch.uint8, device=memory_u8.device)
        step = self._scratch_u8.numel()
        for offset in range(0, block.size_bytes, step):
            length = min(step, block.size_bytes - offset)
            scratch_u8 = self._scratch_u8[:length]
            copy(scratch_u8, memory_u8[old_start + offset : old_start + offset + length])
            copy(memory_u8[block.start + offset : block.start + offset + length], scratch_u8)
