"""The system calls of the file level, behind one small object, so that tests can make any of them fail or be the last.

Each method is one fault point. Short reads and writes are legal results; the store loops.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Protocol


class FileIO(Protocol):
    """What the file store asks of the system. Every method may raise OSError."""

    def create(self, path: Path) -> int: ...
    def reserve(self, descriptor: int, size_bytes: int) -> None: ...
    def write(self, descriptor: int, data: memoryview) -> int: ...
    def sync_data(self, descriptor: int) -> None: ...
    def rename(self, old: Path, new: Path) -> None: ...
    def sync_folder(self, folder: Path) -> None: ...
    def unlink(self, path: Path) -> None: ...
    def open(self, path: Path) -> int: ...
    def size(self, descriptor: int) -> int: ...
    def read(self, descriptor: int, into: memoryview) -> int: ...
    def close(self, descriptor: int) -> None: ...
    def names(self, folder: Path) -> list[str]: ...


class SystemIO:
    """The real calls (POSIX)."""

    def create(self, path: Path) -> int:
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)

    def reserve(self, descriptor: int, size_bytes: int) -> None:
        os.posix_fallocate(descriptor, 0, size_bytes)

    def write(self, descriptor: int, data: memoryview) -> int:
        return os.write(descriptor, data)

    def sync_data(self, descriptor: int) -> None:
        os.fdatasync(descriptor)

    def rename(self, old: Path, new: Path) -> None:
        old.rename(new)

    def sync_folder(self, folder: Path) -> None:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def unlink(self, path: Path) -> None:
        path.unlink()

    def open(self, path: Path) -> int:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def size(self, descriptor: int) -> int:
        return os.fstat(descriptor).st_size

    def read(self, descriptor: int, into: memoryview) -> int:
        return os.readv(descriptor, [into])

    def close(self, descriptor: int) -> None:
        os.close(descriptor)

    def names(self, folder: Path) -> list[str]:
        return sorted(path.name for path in folder.iterdir())
