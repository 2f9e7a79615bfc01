"""Units that lie in files: written once, read ahead by a thread into page-locked staging buffers, verified each time.

A buffer is taken again only after the copies issued from it are over (marks). Reads that nobody took are given up for
one that is needed now.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from vbench.kernels.tiers.errors import TierError
from vbench.kernels.tiers.fileio import FileIO
from vbench.kernels.tiers.filestore import FileStore, Record
from vbench.kernels.tiers.links import Links
from vbench.kernels.tiers.marks import Marks
from vbench.kernels.tiers.slab import Slab

#: One buffer is read into while another is copied to the device.
BUFFERS = 2

#: Keys of the files a module's units lie in. Those of a run that ended without ``close`` are removed by the next.
PREFIX = "tier(module)/"


def _bytes(memory_u8: Tensor) -> memoryview:
    array: Any = memory_u8.numpy()  # its type does not say that it is a buffer
    return memoryview(array)


@dataclass(slots=True, eq=False)
class _Buffer:
    """``unit``: what is in it or being read; ``reading``: until it was taken; ``copied``: copies out of it."""

    memory_u8: Tensor
    unit: int | None = None
    reading: Future[None] | None = None
    copied: Marks = ()


class FiledUnits:
    """The files of a module's units. Not for several threads at once: its owner's lock is held around each call.

    Args:
        folder: exists, is writable, and nobody else's while this is open.
        sizes_bytes: of the units that lie in files, by unit.
        slab: staging, ``BUFFERS`` times the largest of them.
        links: by which copies out of the buffers travel.
        io: the system calls.

    Raises:
        FolderBusyError, TierError, TierIOError: as ``FileStore`` does.
    """

    def __init__(
        self, folder: Path, sizes_bytes: Mapping[int, int], slab: Slab, links: Links, io: FileIO | None = None
    ) -> None:
        self._store = FileStore(folder, io)
        self._sizes_bytes = dict(sizes_bytes)
        self._slab = slab
        self._links = links
        largest = max(sizes_bytes.values())
        self._buffers = [_Buffer(slab.memory_u8[i * largest : (i + 1) * largest]) for i in range(BUFFERS)]
        self._records: dict[int, Record] = {}
        self._threads = ThreadPoolExecutor(1, "vbench-tier-read")
        self.read_bytes = 0
        for key, record in list(self._store.records.items()):
            if key.startswith(PREFIX):
                self._store.unlink(record)

    def write(self, unit: int, name: str, fill: Callable[[Tensor], None]) -> None:
        """Let ``fill`` write the unit's bytes into staging, and those into a file, durable on return.

        Raises:
            TierIOError: the folder is full, read-only, or broken; nothing of this file remains.
        """
        memory_u8 = self._buffers[0].memory_u8[: self._sizes_bytes[unit]]
        memory_u8.zero_()
        fill(memory_u8)
        key = f"{PREFIX}{unit}/{name}"
        self._records[unit] = self._store.put(key, _bytes(memory_u8), "uint8", (memory_u8.numel(),))

    def ahead(self, units: Iterable[int]) -> None:
        """Begin to read the next units into buffers that are free; never waits."""
        wanted = list(units)[:BUFFERS]
        for unit in wanted:
            if self._holding(unit) is not None:
                continue
            for buffer in self._buffers:
                if buffer.reading is None and buffer.unit not in wanted and self._links.over(buffer.copied):
                    self._begin(unit, buffer)
                    break

    def ready(self, unit: int) -> bool:
        """Whether ``take`` would neither wait nor fail."""
        buffer = self._holding(unit)
        if buffer is None or buffer.reading is None:
            return buffer is not None
        return buffer.reading.done() and buffer.reading.exception() is None

    def take(self, unit: int) -> Tensor:
        """The unit's bytes (uint8 vector in staging), read and verified; ``copied`` must follow.

        Raises:
            CorruptTensorError: the file is not what was written.
            TierIOError: the system refused to read. The next call tries again.
        """
        buffer = self._holding(unit)
        if buffer is None:
            # A buffer whose bytes were taken, else the one whose read is given up.
            buffer = min(self._buffers, key=lambda b: b.reading is not None)
            if buffer.reading is not None:
                with suppress(TierError):  # whatever came of it, nobody asked for it
                    buffer.reading.result()
            self._links.host_wait(buffer.copied)
            self._begin(unit, buffer)
        if buffer.reading is not None:
            try:
                buffer.reading.result()
            except BaseException:
                buffer.unit, buffer.reading = None, None
                raise
            buffer.reading = None
        return buffer.memory_u8[: self._sizes_bytes[unit]]

    def copied(self, unit: int, marks: Marks) -> None:
        """The bytes taken are on their way by copies that end with ``marks``."""
        buffer = self._holding(unit)
        assert buffer is not None, "copied follows take"
        buffer.copied = marks

    def read_into(self, unit: int, into_u8: Tensor) -> None:
        """Read a unit, verified, into other host memory. Raises as ``take`` does."""
        self._store.read(self._records[unit], _bytes(into_u8))
        self.read_bytes += into_u8.numel()

    def close(self) -> None:
        """Remove the files and let go of the folder; copies out of staging must be over."""
        self._threads.shutdown(wait=True, cancel_futures=True)
        try:
            for record in self._records.values():
                self._store.unlink(record)
        finally:
            self._records.clear()
            self._store.close()
            self._buffers.clear()
            self._slab.close()

    def _holding(self, unit: int) -> _Buffer | None:
        return next((buffer for buffer in self._buffers if buffer.unit == unit), None)

    def _begin(self, unit: int, buffer: _Buffer) -> None:
        view = _bytes(buffer.memory_u8[: self._sizes_bytes[unit]])
        record = self._records[unit]
        buffer.unit, buffer.copied = unit, ()
        buffer.reading = self._threads.submit(self._store.read, record, view)
        self.read_bytes += len(view)
