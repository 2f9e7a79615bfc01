"""The lowest level: one file a tensor, published whole or not at all, checked when read.

A write goes to a temporary name, is synced, renamed to its own final name and the folder synced; an older file of the
same key is unlinked only afterwards, by ``unlink``. So at every instant each key has an old value, a new value, or
none, and the index can be rebuilt from the files alone. No torch: payloads are byte views.
"""

from __future__ import annotations

import errno
import fcntl
import os
import uuid
import weakref
import zlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from vbench.kernels.tiers import fileformat
from vbench.kernels.tiers.errors import CorruptTensorError, FolderBusyError, TierError, TierIOError, UnknownKeyError
from vbench.kernels.tiers.fileformat import BLOCK_BYTES, FormatError, Header
from vbench.kernels.tiers.fileio import FileIO, SystemIO

LOCK_NAME = ".lock"
STORE_NAME = ".store"
_TEMPORARY = ".tmp"
_FINAL = ".tensor"

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Record:
    """A published file: its path and the header it was written with."""

    path: Path
    header: Header


class FileStore:
    """A folder of tensors, held by one process at a time.

    Args:
        folder: exists, is writable. Files that are not ours are left alone.
        io: the system calls.

    Attributes:
        records: key -> its current file.
        corrupt: file name -> why its header is not trusted. Such files are kept as evidence.

    Raises:
        FolderBusyError: another store holds the folder.
        TierError: there is no such folder.
        TierIOError: the folder cannot be read or written.
    """

    def __init__(self, folder: Path, io: FileIO | None = None) -> None:
        if not folder.is_dir():
            raise TierError(f"{folder} is no folder; make it first")
        self.folder = folder
        self._io: FileIO = io if io is not None else SystemIO()
        self.records: dict[str, Record] = {}
        self.corrupt: dict[str, CorruptTensorError] = {}
        self._garbage: set[Path] = set()
        self._generation = 0
        # Closing the only descriptor of the lock file releases the lock, at ``close`` or when the store is collected.
        self._release = weakref.finalize(self, os.close, self._take_lock())
        try:
            self._id = self._read_or_make_id()
            self._scan()
        except BaseException:
            self._release()
            raise

    def close(self) -> None:
        """Let go of the folder; the files stay."""
        if self._release.alive:
            self._clear_garbage()
            self._release()

    def lookup(self, key: str) -> Record:
        """The current file of ``key``.

        Raises:
            CorruptTensorError: a file that can only be this key's is damaged.
            UnknownKeyError: there is none.
        """
        record = self.records.get(key)
        if record is not None:
            return record
        digest = fileformat.key_digest(key)
        for name, why in self.corrupt.items():
            if name.startswith(digest):
                raise CorruptTensorError(key, str(self.folder / name), why.rule, "a trusted header", str(why))
        raise UnknownKeyError(f"no tensor {key!r} in {self.folder}")

    def write(self, key: str, payload: memoryview, dtype: str, shape: tuple[int, ...]) -> Record:
        """Write and publish a new file for ``key``, durable on return. The index is not changed: see ``link``.

        Raises:
            TierIOError: nothing of the new file remains, or it is remembered as garbage.
        """
        self._clear_garbage()
        self._generation += 1
        payload = _flat(payload)
        header = Header(self._id, key, self._generation, dtype, shape, len(payload), zlib.crc32(payload))
        path = self.folder / fileformat.file_name(key, header.generation)
        temporary = path.with_suffix(_TEMPORARY)
        block = fileformat.encode(header)
        try:
            descriptor = self._try("create", temporary, lambda: self._io.create(temporary))
            try:
                self._try("reserve", temporary, lambda: self._io.reserve(descriptor, len(block) + len(payload)))
                self._write_all(descriptor, temporary, memoryview(block))
                self._write_all(descriptor, temporary, payload)
                self._try("sync", temporary, lambda: self._io.sync_data(descriptor))
            finally:
                self._try("close", temporary, lambda: self._io.close(descriptor))
            self._try("rename", path, lambda: self._io.rename(temporary, path))
            self._try("sync_folder", self.folder, lambda: self._io.sync_folder(self.folder))
        except BaseException:
            # Either name may exist: a failed close comes before the rename, a failed folder sync after it.
            self._discard_path(temporary)
            self._discard_path(path)
            raise
        return Record(path, header)

    def link(self, record: Record) -> None:
        """Make ``record`` the value of its key. Cannot fail."""
        self.records[record.header.key] = record

    def unlink(self, record: Record) -> None:
        """Remove a file, and its key from the index if it is the key's value.

        Raises:
            TierIOError: file and index are as before.
        """
        self._try("unlink", record.path, lambda: self._io.unlink(record.path))
        if self.records.get(record.header.key) is record:
            del self.records[record.header.key]

    def discard(self, record: Record) -> None:
        """Undo ``write``: remove a file that was never linked, now or at the next chance. Cannot fail."""
        self._discard_path(record.path)

    def put(self, key: str, payload: memoryview, dtype: str, shape: tuple[int, ...]) -> Record:
        """Write, remove the old file, link: what a caller with nothing else at stake wants.

        Raises:
            TierIOError: the old value is still the value.
        """
        old = self.records.get(key)
        record = self.write(key, payload, dtype, shape)
        if old is not None:
            try:
                self.unlink(old)
            except BaseException:
                self.discard(record)
                raise
        self.link(record)
        return record

    def read(self, record: Record, into: memoryview) -> None:
        """Read and verify the payload.

        Args:
            into: writable, exactly the payload's length. Holds rubbish after an error.

        Raises:
            CorruptTensorError: any bit of the file differs from what was written, or the file is gone.
            TierIOError: the system refused to read.
        """
        into = _flat(into)
        key, path = record.header.key, record.path
        try:
            descriptor = self._io.open(path)
        except FileNotFoundError as error:
            raise CorruptTensorError(key, str(path), "file_missing", "a file", "none") from error
        except OSError as error:
            raise TierIOError("open", str(path), error.strerror or str(error)) from error
        try:
            header = self._read_header(descriptor, path)
            if header != record.header:
                raise CorruptTensorError(key, str(path), "header_changed", record.header, header)
            if len(into) != header.payload_bytes:
                raise CorruptTensorError(key, str(path), "payload_length", header.payload_bytes, len(into))
            got = self._read_all(descriptor, path, into)
            if got != len(into):
                raise CorruptTensorError(key, str(path), "payload_truncated", len(into), got)
            checksum = zlib.crc32(into)
            if checksum != header.payload_crc32:
                raise CorruptTensorError(key, str(path), "payload_checksum", header.payload_crc32, checksum)
        except FormatError as error:
            raise CorruptTensorError(key, str(path), error.rule, error.expected, error.got) from error
        finally:
            with suppress(OSError):  # a file opened for reading has nothing to lose
                self._io.close(descriptor)

    def get(self, key: str) -> bytearray:
        """The payload of ``key`` in memory of its own. Raises as ``lookup`` and ``read`` do."""
        record = self.lookup(key)
        payload = bytearray(record.header.payload_bytes)
        self.read(record, memoryview(payload))
        return payload

    # --- opening ---------------------------------------------------------------------------------------------------

    def _take_lock(self) -> int:
        path = self.folder / LOCK_NAME
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise TierIOError("lock", str(path), error.strerror or str(error)) from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(descriptor)
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                raise FolderBusyError(f"{self.folder} is held by another stack; close it first") from error
            raise TierIOError("lock", str(path), error.strerror or str(error)) from error
        return descriptor

    def _read_or_make_id(self) -> str:
        """The folder's own id, made once; files carry it."""
        path = self.folder / STORE_NAME
        try:
            text = path.read_text("ascii")
        except FileNotFoundError:
            text = ""
        except (OSError, UnicodeDecodeError) as error:
            raise TierIOError("read", str(path), str(error)) from error
        if not text:  # a folder we are the first to use
            text = uuid.uuid4().hex
            temporary = path.with_suffix(_TEMPORARY)
            descriptor = self._try("create", temporary, lambda: self._io.create(temporary))
            try:
                self._write_all(descriptor, temporary, memoryview(text.encode("ascii")))
                self._try("sync", temporary, lambda: self._io.sync_data(descriptor))
            finally:
                self._try("close", temporary, lambda: self._io.close(descriptor))
            self._try("rename", path, lambda: self._io.rename(temporary, path))
            self._try("sync_folder", self.folder, lambda: self._io.sync_folder(self.folder))
        elif len(text) != 32:
            raise CorruptTensorError("", str(path), "store_id", "32 hexadecimal digits", repr(text))
        return text

    def _scan(self) -> None:
        for name in self._try("list", self.folder, lambda: self._io.names(self.folder)):
            path = self.folder / name
            if name.endswith(_TEMPORARY):
                self._discard_path(path)  # a write that never ended
            elif name.endswith(_FINAL):
                self._index(path)

    def _index(self, path: Path) -> None:
        with suppress(ValueError):  # even an untrusted file reserves its number
            self._generation = max(self._generation, int(path.stem.partition("-")[2], 16))
        try:
            header = self._trusted_header(path)
        except CorruptTensorError as error:
            self.corrupt[path.name] = error
            return
        record, known = Record(path, header), self.records.get(header.key)
        if known is None:
            self.records[header.key] = record
            return
        # A crash came between publishing the newer and removing the older.
        older, newer = sorted((known, record), key=lambda r: r.header.generation)
        self.records[header.key] = newer
        self._discard_path(older.path)

    def _trusted_header(self, path: Path) -> Header:
        descriptor = self._try("open", path, lambda: self._io.open(path))
        try:
            header = self._read_header(descriptor, path)
        except FormatError as error:
            raise CorruptTensorError("", str(path), error.rule, error.expected, error.got) from error
        finally:
            with suppress(OSError):
                self._io.close(descriptor)
        if header.store != self._id:
            raise CorruptTensorError(header.key, str(path), "foreign_store", self._id, header.store)
        if path.name != fileformat.file_name(header.key, header.generation):
            expected = fileformat.file_name(header.key, header.generation)
            raise CorruptTensorError(header.key, str(path), "file_name", expected, path.name)
        return header

    # --- system calls ----------------------------------------------------------------------------------------------

    def _try(self, action: str, path: Path, call: Callable[[], T]) -> T:
        try:
            return call()
        except OSError as error:
            raise TierIOError(action, str(path), error.strerror or str(error)) from error

    def _discard_path(self, path: Path) -> None:
        try:
            self._io.unlink(path)
        except FileNotFoundError:
            self._garbage.discard(path)
        except OSError:
            self._garbage.add(path)
        else:
            self._garbage.discard(path)

    def _clear_garbage(self) -> None:
        for path in list(self._garbage):
            self._discard_path(path)

    def _write_all(self, descriptor: int, path: Path, data: memoryview) -> None:
        done = 0
        while done < len(data):
            try:
                count = self._io.write(descriptor, data[done:])
            except InterruptedError:
                continue
            except OSError as error:
                raise TierIOError("write", str(path), error.strerror or str(error)) from error
            if count <= 0:
                raise TierIOError("write", str(path), f"{count} bytes written of {len(data) - done}")
            done += count

    def _read_all(self, descriptor: int, path: Path, into: memoryview) -> int:
        done = 0
        while done < len(into):
            try:
                count = self._io.read(descriptor, into[done:])
            except InterruptedError:
                continue
            except OSError as error:
                raise TierIOError("read", str(path), error.strerror or str(error)) from error
            if count == 0:
                break
            done += count
        return done

    def _read_header(self, descriptor: int, path: Path) -> Header:
        """Header of an open file whose length fits it; leaves the descriptor at the payload."""
        size = self._try("size", path, lambda: self._io.size(descriptor))
        block = bytearray(BLOCK_BYTES)
        got = self._read_all(descriptor, path, memoryview(block))
        length = fileformat.block_bytes(bytes(block[:got]))
        if length > size:
            raise FormatError("header_length", f"<= {size}", length)
        rest = bytearray(length - BLOCK_BYTES)
        got = self._read_all(descriptor, path, memoryview(rest))
        header = fileformat.decode(bytes(block) + bytes(rest[:got]))
        if size != length + header.payload_bytes:
            raise FormatError("file_length", length + header.payload_bytes, size)
        return header


def _flat(view: memoryview) -> memoryview:
    """The view as bytes (``cast`` refuses empty views, which are flat enough)."""
    return view.cast("B") if view.nbytes else memoryview(b"")
