"""Bytes to train on: files joined into one memory-mapped file, split, and dealt out in an order that a number fixes.

A training's position is the count of samples dealt so far; epoch, window and order follow from it and the seed, so that
a resumed training goes on exactly where it stood.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from vbench.errors import DataError, UsageError

#: Share of the bytes, at the end, that is never trained on.
VALIDATION_SHARE = 0.1
_CHUNK_BYTES = 1 << 20
_SKIPPED_FOLDERS = {"__pycache__", "site-packages", "dist-packages"}


@dataclass(frozen=True, slots=True)
class Source:
    """What the data was made from.

    Args:
        files: how many were joined; ``skipped``: how many of given folders were left out as binary.
        size_bytes, sha256: of the joined bytes.
    """

    files: int
    skipped: int
    size_bytes: int
    sha256: str


def standard_library() -> Path:
    """The folder of the running Python's own sources."""
    return Path(sysconfig.get_path("stdlib"))


def join(paths: Sequence[Path], target: Path) -> Source:
    """Join files, and the text files below folders in the order of their paths, into ``target``.

    Args:
        paths: none: the standard library's Python sources.

    Raises:
        UsageError: a path does not exist.
        DataError: a file given by name is binary or unreadable, or there is not one byte in all.
    """
    digest, files, skipped, size = hashlib.sha256(), 0, 0, 0
    temporary = target.with_suffix(".tmp")
    try:
        with temporary.open("wb") as out:
            for path, named in _files(paths):
                data = _read(path, named)
                if data is None:
                    skipped += 1
                    continue
                out.write(data)
                digest.update(data)
                files, size = files + 1, size + len(data)
            out.flush()
            os.fsync(out.fileno())
        if not size:
            where = ", ".join(map(str, paths)) or str(standard_library())
            raise DataError(f"{where}: no byte to train on ({files} empty files, {skipped} binary ones)")
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)
    return Source(files, skipped, size, digest.hexdigest())


def digest_of(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _files(paths: Sequence[Path]) -> Iterator[tuple[Path, bool]]:
    """(file, whether it was given by name)."""
    if not paths:
        yield from ((p, False) for p in _below(standard_library()) if p.suffix == ".py")
    for path in paths:
        if path.is_dir():
            yield from ((p, False) for p in _below(path))
        elif path.exists():
            yield path, True
        else:
            raise UsageError(f"--data {path}: no such file or folder")


def _below(folder: Path) -> Iterator[Path]:
    for entry in sorted(folder.iterdir()):
        if entry.name.startswith(".") or entry.is_symlink():
            continue
        if entry.is_dir():
            if entry.name not in _SKIPPED_FOLDERS:
                yield from _below(entry)
        elif entry.is_file():
            yield entry


def _read(path: Path, named: bool) -> bytes | None:
    """The file's bytes; ``None`` for a binary one that was not given by name."""
    if named and not path.is_file():
        raise DataError(f"--data {path}: not a regular file")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"--data {path}: cannot be read: {error.strerror or error}") from error
    at = data.find(b"\0")
    if at < 0:
        return data
    if named:
        raise DataError(
            f"--data {path}: binary (a zero byte at {at}); give text, or a folder, whose text files are taken"
        )
    return None


class Corpus:
    """A joined file, mapped into memory.

    Args:
        path: as ``join`` wrote it.
        sequence: tokens (bytes) of a sample; one more byte is needed for the last target.
        seed: of the order.

    Raises:
        DataError: training or validation part holds not even one sample.
    """

    def __init__(self, path: Path, sequence: int, seed: int) -> None:
        with path.open("rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        data = np.frombuffer(self._map, dtype=np.uint8)
        split = len(data) - int(len(data) * VALIDATION_SHARE)
        self._train, self._validation = data[:split], data[split:]
        self._sequence = sequence
        self._seed = seed
        self._epoch = -1
        self._order = torch.empty(0, dtype=torch.int64)
        shortest = min(len(self._train), len(self._validation))
        if shortest < sequence + 1:
            raise DataError(
                f"--seq {sequence}: longer than the data: of {len(data)} bytes {len(self._train)} are for training and "
                f"{len(self._validation)} for validation, and a sample takes {sequence + 1}. Give more --data or a "
                "smaller --seq"
            )

    @property
    def windows(self) -> int:
        """Samples of an epoch; the last up to two sequences' bytes vary with the epoch's offset."""
        return max(1, (len(self._train) - 1 - self._sequence) // self._sequence)

    def batch(self, position: int, batch: int) -> tuple[Tensor, Tensor]:
        """Samples ``position`` to ``position + batch``: ids and targets, int64 [batch, sequence] each."""
        rows = [self._sample(position + i) for i in range(batch)]
        return _pair(rows)

    def validation_batches(self, batch: int, most: int) -> Iterator[tuple[Tensor, Tensor]]:
        """At most ``most`` batches, evenly spread over the validation bytes, always the same."""
        step = self._sequence
        count = (len(self._validation) - 1) // step
        taken = min(count, most * batch)
        starts = [count * i // taken * step for i in range(taken)]
        for at in range(0, taken, batch):
            yield _pair([self._validation[s : s + step + 1] for s in starts[at : at + batch]])

    def _sample(self, index: int) -> npt.NDArray[np.uint8]:
        epoch, at = divmod(index, self.windows)
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed((self._seed << 20) + epoch)
            slack = min(self._sequence, len(self._train) - 1 - self.windows * self._sequence)
            self._offset = int(torch.randint(slack + 1, (1,), generator=generator))
            self._order = torch.randperm(self.windows, generator=generator)
            self._epoch = epoch
        start = self._offset + int(self._order[at]) * self._sequence
        return self._train[start : start + self._sequence + 1]


def _pair(rows: Sequence[npt.NDArray[np.uint8]]) -> tuple[Tensor, Tensor]:
    joined = torch.from_numpy(np.stack(rows).astype(np.int64))
    return joined[:, :-1].contiguous(), joined[:, 1:].contiguous()
