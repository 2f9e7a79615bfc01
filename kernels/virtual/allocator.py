"""PyTorch's caching allocator as arithmetic: what a sequence of allocations reserves on a card. Standard library only.

A limit (``torch.cuda.set_per_process_memory_fraction``) holds for what is *reserved*: whole segments, of which a live
tensor may be a small part. Whether a training dies is therefore decided by where its tensors come to lie, not by their
sum. The rules are those of c10/cuda/CUDACachingAllocator.cpp with its default settings (PyTorch 2.4 to 2.13): sizes
round up to 512 bytes; up to 1 MiB they come from segments of 2 MiB, below 10 MiB from segments of 20 MiB, from there on
from segments of their own in steps of 2 MiB; the smallest free block that is large enough is taken, and split if what
remains is worth it; neighbours that are free join; where a new segment would exceed the limit, segments that are wholly
free are given back, and only if that does not suffice is it out of memory.

Not modelled: other streams than one, addresses (of equal blocks the oldest is taken), and other processes.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass

GRANULE_BYTES = 512
SMALL_BYTES, LARGE_BYTES = 1 << 20, 10 << 20
SMALL_SEGMENT_BYTES, LARGE_SEGMENT_BYTES, SEGMENT_STEP_BYTES = 2 << 20, 20 << 20, 2 << 20


class SimulatedOutOfMemory(Exception):
    """A segment of ``short_bytes`` more than the limit leaves was needed, with every free segment given back."""

    def __init__(self, short_bytes: int) -> None:
        super().__init__(f"{short_bytes} bytes short")
        self.short_bytes = short_bytes


@dataclass(eq=False, slots=True)
class Block:
    """A part of a segment; ``before`` and ``after`` are its neighbours there."""

    size_bytes: int
    start: int
    segment_bytes: int
    small: bool
    free: bool = False
    before: Block | None = None
    after: Block | None = None


class CachingAllocator:
    """One device's memory, allocations of one stream.

    Args:
        limit_bytes: most that may be reserved; ``None`` for any amount.

    Attributes:
        allocated_bytes, reserved_bytes: now; ``peak_allocated_bytes``, ``peak_reserved_bytes``: the most so far.
    """

    def __init__(self, limit_bytes: int | None = None) -> None:
        self._limit_bytes = limit_bytes
        #: by pool (small or not), free blocks by size and then place
        self._free: dict[bool, list[tuple[int, int, Block]]] = {True: [], False: []}
        self._next_start = 0
        self.allocated_bytes = self.reserved_bytes = 0
        self.peak_allocated_bytes = self.peak_reserved_bytes = 0

    def allocate(self, size_bytes: int) -> Block | None:
        """A block for ``size_bytes``; none for none.

        Raises:
            SimulatedOutOfMemory: the limit does not allow it.
        """
        if size_bytes <= 0:
            return None
        size = -(-size_bytes // GRANULE_BYTES) * GRANULE_BYTES
        small = size <= SMALL_BYTES
        block = self._best_fit(size, small) or self._new_segment(size, small)
        remaining = block.size_bytes - size
        if remaining >= GRANULE_BYTES if small else remaining > SMALL_BYTES:
            rest = Block(remaining, block.start + size, block.segment_bytes, small, True, block, block.after)
            if block.after is not None:
                block.after.before = rest
            block.after, block.size_bytes = rest, size
            self._keep_free(rest)
        self.allocated_bytes += block.size_bytes
        self.peak_allocated_bytes = max(self.peak_allocated_bytes, self.allocated_bytes)
        return block

    def free(self, block: Block | None) -> None:
        """Give a block back to its pool, joined with free neighbours."""
        if block is None:
            return
        assert not block.free, "freed twice"
        self.allocated_bytes -= block.size_bytes
        for neighbour in (block.before, block.after):
            if neighbour is None or not neighbour.free:
                continue
            self._take(neighbour)
            block.start = min(block.start, neighbour.start)
            block.size_bytes += neighbour.size_bytes
            if neighbour is block.before:
                block.before = neighbour.before
                if block.before is not None:
                    block.before.after = block
            else:
                block.after = neighbour.after
                if block.after is not None:
                    block.after.before = block
        block.free = True
        self._keep_free(block)

    def _best_fit(self, size: int, small: bool) -> Block | None:
        pool = self._free[small]
        at = bisect_left(pool, size, key=lambda entry: entry[0])
        if at == len(pool):
            return None
        block = pool.pop(at)[2]
        block.free = False
        return block

    def _new_segment(self, size: int, small: bool) -> Block:
        if small:
            segment = SMALL_SEGMENT_BYTES
        elif size < LARGE_BYTES:
            segment = LARGE_SEGMENT_BYTES
        else:
            segment = -(-size // SEGMENT_STEP_BYTES) * SEGMENT_STEP_BYTES
        if self._over(segment) > 0:
            self.empty_cache()
            if self._over(segment) > 0:
                raise SimulatedOutOfMemory(self._over(segment))
        self.reserved_bytes += segment
        self.peak_reserved_bytes = max(self.peak_reserved_bytes, self.reserved_bytes)
        block = Block(segment, self._next_start, segment, small)
        self._next_start += segment + 1  # never adjacent to another
        return block

    def _over(self, more_bytes: int) -> int:
        return 0 if self._limit_bytes is None else self.reserved_bytes + more_bytes - self._limit_bytes

    def empty_cache(self) -> None:
        """Segments without a live block go back to the driver: ``torch.cuda.empty_cache``, and before giving up."""
        for pool in self._free.values():
            for entry in [e for e in pool if e[2].size_bytes == e[2].segment_bytes]:
                pool.remove(entry)
                self.reserved_bytes -= entry[2].segment_bytes

    def _keep_free(self, block: Block) -> None:
        insort(self._free[block.small], (block.size_bytes, block.start, block), key=lambda entry: entry[:2])

    def _take(self, block: Block) -> None:
        pool = self._free[block.small]
        pool.pop(bisect_left(pool, (block.size_bytes, block.start), key=lambda entry: entry[:2]))
