"""Sub-allocation of one slab: offsets only, no memory. No torch.

Byte-exact capacity and fragmentation. The ledger counts exact bytes, so any set of tensors whose sizes sum to no more
than the capacity must fit a slab of exactly that size. An arena keeps the promise in three steps: an aligned hole
(best fit); else a hole of any alignment; else the caller packs the live blocks to the front (``pack``), which leaves
one hole of exactly ``size - used`` bytes. Tensors of one size, or of sizes that are multiples of the alignment, as
layers are, leave no gaps and practically never pack. Packing is counted by the pool, so that its cost is visible.

Costs: ``give`` and ``take`` O(log distinct hole lengths); adjacent holes are joined at once.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass, field

from vbench.kernels.tiers.marks import Marks, join

#: of CUDA's allocator; wide enough for every vector load and for copy engines
ALIGNMENT_BYTES = 512
#: holes that are long enough but perhaps not at an aligned start, looked at before longer ones
_PROBES = 16


def alignment_of(size_bytes: int) -> int:
    """512 from 512 bytes on; below, the largest power of two not above the size, so that small tensors do not waste."""
    return min(ALIGNMENT_BYTES, 1 << max(size_bytes.bit_length() - 1, 0))


def align_up(offset: int, alignment: int) -> int:
    return -(-offset // alignment) * alignment


@dataclass(slots=True)
class Hole:
    """Free bytes [start, start + length). ``marks``: reads and writes of them that may still be under way."""

    start: int
    length: int
    marks: Marks = ()


@dataclass(slots=True, eq=False)
class Block:
    """Live bytes [start, start + size_bytes).

    Args:
        fence: what must be over before the block is first written.
        ready: what must be over before it is read.
        readers: reads that must be over before it is overwritten.
    """

    start: int
    size_bytes: int
    fence: Marks = ()
    ready: Marks = ()
    readers: Marks = ()


@dataclass(slots=True)
class Arena:
    """Offsets in a slab of ``size_bytes``. Empty blocks are legal and take no bytes."""

    size_bytes: int
    used_bytes: int = 0
    peak_bytes: int = 0
    live: dict[int, Block] = field(default_factory=dict)
    _by_start: dict[int, Hole] = field(default_factory=dict)
    _by_end: dict[int, Hole] = field(default_factory=dict)
    _bins: dict[int, dict[int, Hole]] = field(default_factory=dict)
    _lengths: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.size_bytes < 0:
            raise ValueError(f"arena of {self.size_bytes} bytes")
        if self.size_bytes:
            self._add(Hole(0, self.size_bytes))

    def take(self, size_bytes: int) -> Block | None:
        """A block, or ``None`` when no hole is long enough (``pack`` first). ``fence`` carries the hole's marks."""
        if size_bytes == 0:
            return Block(0, 0)
        found = self._find(size_bytes, alignment_of(size_bytes)) or self._find(size_bytes, 1)
        if found is None:
            return None
        hole, start = found
        self._drop(hole)
        if start > hole.start:
            self._add(Hole(hole.start, start - hole.start, hole.marks))
        end, hole_end = start + size_bytes, hole.start + hole.length
        if end < hole_end:
            self._add(Hole(end, hole_end - end, hole.marks))
        block = Block(start, size_bytes, fence=hole.marks)
        self.live[start] = block
        self.used_bytes += size_bytes
        self.peak_bytes = max(self.peak_bytes, self.used_bytes)
        return block

    def give(self, block: Block) -> None:
        """Take a block back; its pending reads and writes stay with the bytes."""
        if block.size_bytes == 0:
            return
        if self.live.get(block.start) is not block:
            raise ValueError(f"block at {block.start} is not live in this arena")
        del self.live[block.start]
        self.used_bytes -= block.size_bytes
        start, end = block.start, block.start + block.size_bytes
        marks = join(block.fence, block.ready, block.readers)
        left, right = self._by_end.get(start), self._by_start.get(end)
        if left is not None:
            self._drop(left)
            start, marks = left.start, join(marks, left.marks)
        if right is not None:
            self._drop(right)
            end, marks = right.start + right.length, join(marks, right.marks)
        self._add(Hole(start, end - start, marks))

    def pending(self) -> Marks:
        """Everything that may still be reading or writing any byte."""
        parts = [hole.marks for hole in self._by_start.values()]
        for block in self.live.values():
            parts += [block.fence, block.ready, block.readers]
        return join(*parts)

    def pack(self, wanted_bytes: int) -> list[tuple[Block, int]]:
        """Slide live blocks to the front until ``wanted_bytes`` fit at the end; aligned if that leaves enough room.

        Returns:
            (block, its old start) for each block that must be copied, in an order in which a forward copy is safe. The
            blocks' starts are already the new ones; all marks are cleared, since the caller waits for ``pending``.
        """
        if self.used_bytes + wanted_bytes > self.size_bytes:
            raise ValueError(f"{wanted_bytes} bytes asked of {self.size_bytes - self.used_bytes} free ones")
        blocks = sorted(self.live.values(), key=lambda b: b.start)
        starts = self._packed(blocks, aligned=True)
        end = starts[-1] + blocks[-1].size_bytes if blocks else 0
        if end + wanted_bytes > self.size_bytes:
            starts = self._packed(blocks, aligned=False)
        for holes in (self._by_start, self._by_end, self._bins, self._lengths):
            holes.clear()
        self.live = {}
        moves: list[tuple[Block, int]] = []
        cursor = 0
        for block, start in zip(blocks, starts, strict=True):
            if start > cursor:
                self._add(Hole(cursor, start - cursor))
            if start != block.start:
                moves.append((block, block.start))
            block.start, block.fence, block.ready, block.readers = start, (), (), ()
            self.live[start] = block
            cursor = start + block.size_bytes
        if cursor < self.size_bytes:
            self._add(Hole(cursor, self.size_bytes - cursor))
        return moves

    @staticmethod
    def _packed(blocks: list[Block], aligned: bool) -> list[int]:
        starts, cursor = [], 0
        for block in blocks:
            start = align_up(cursor, alignment_of(block.size_bytes)) if aligned else cursor
            start = min(start, block.start)  # never upwards: that would run into the next block
            starts.append(start)
            cursor = start + block.size_bytes
        return starts

    def _find(self, size_bytes: int, alignment: int) -> tuple[Hole, int] | None:
        probes = 0
        for index in range(bisect_left(self._lengths, size_bytes), len(self._lengths)):
            for hole in self._bins[self._lengths[index]].values():
                start = align_up(hole.start, alignment)
                if start + size_bytes <= hole.start + hole.length:
                    return hole, start
                probes += 1
                if probes == _PROBES:  # a hole this long holds an aligned block wherever it starts
                    sure = bisect_left(self._lengths, size_bytes + alignment - 1)
                    if sure == len(self._lengths):
                        return None
                    hole = next(iter(self._bins[self._lengths[sure]].values()))
                    return hole, align_up(hole.start, alignment)
        return None

    def _add(self, hole: Hole) -> None:
        self._by_start[hole.start] = hole
        self._by_end[hole.start + hole.length] = hole
        if hole.length not in self._bins:
            self._bins[hole.length] = {}
            insort(self._lengths, hole.length)
        self._bins[hole.length][hole.start] = hole

    def _drop(self, hole: Hole) -> None:
        del self._by_start[hole.start]
        del self._by_end[hole.start + hole.length]
        holes = self._bins[hole.length]
        del holes[hole.start]
        if not holes:
            del self._bins[hole.length]
            del self._lengths[bisect_left(self._lengths, hole.length)]
