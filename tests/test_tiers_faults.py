"""The file level when the system fails, bits rot, or the process is killed: old value, new value or typed error."""

from __future__ import annotations

import errno
import gc
import os
import random
import subprocess
import sys
import tempfile
import unicodedata
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from torch import Tensor

from vbench.kernels.tiers import fileformat
from vbench.kernels.tiers.errors import (
    CorruptTensorError,
    FolderBusyError,
    TierError,
    TierFullError,
    TierIOError,
    UnknownKeyError,
)
from vbench.kernels.tiers.fileio import SystemIO
from vbench.kernels.tiers.filestore import FileStore
from vbench.kernels.tiers.stack import TierStack
from vbench.reference.tiers import DictStack

SHARED_MEMORY = Path("/dev/shm")
#: temporary folders in memory where there is such a place: nothing here depends on what a sync costs
FAST = SHARED_MEMORY if SHARED_MEMORY.is_dir() else None


@pytest.fixture
def base() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir=FAST) as name:
        yield Path(name)


@pytest.fixture
def folder(base: Path) -> Path:
    made = base / "tier"
    made.mkdir()
    return made


class FaultyIO(SystemIO):
    """The system, counting its calls; the ``fail_at``-th from ``arm`` on raises ``error`` (as do later ones if asked).

    ``short`` makes reads and writes return less than asked, and now and then be interrupted.
    """

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.fail_at = -1
        self.error = errno.EIO
        self.lasting = False
        self.short: random.Random | None = None

    def arm(self, fail_at: int = -1, error: int = errno.EIO, lasting: bool = False) -> None:
        self.calls = []
        self.fail_at, self.error, self.lasting = fail_at, error, lasting

    def _count(self, name: str) -> None:
        at = len(self.calls)
        self.calls.append(name)
        if self.fail_at >= 0 and (at == self.fail_at or (self.lasting and at > self.fail_at)):
            raise OSError(self.error, os.strerror(self.error))

    def _limit(self, data: memoryview) -> memoryview:
        if self.short is None or not len(data):
            return data
        if self.short.random() < 0.2:
            raise InterruptedError
        return data[: self.short.randint(1, max(1, len(data) // 2))]

    def create(self, path: Path) -> int:
        self._count("create")
        return super().create(path)

    def reserve(self, descriptor: int, size_bytes: int) -> None:
        self._count("reserve")
        super().reserve(descriptor, size_bytes)

    def write(self, descriptor: int, data: memoryview) -> int:
        self._count("write")
        return super().write(descriptor, self._limit(data))

    def sync_data(self, descriptor: int) -> None:
        self._count("sync_data")
        super().sync_data(descriptor)

    def rename(self, old: Path, new: Path) -> None:
        self._count("rename")
        super().rename(old, new)

    def sync_folder(self, folder: Path) -> None:
        self._count("sync_folder")
        super().sync_folder(folder)

    def unlink(self, path: Path) -> None:
        self._count("unlink")
        super().unlink(path)

    def open(self, path: Path) -> int:
        self._count("open")
        return super().open(path)

    def size(self, descriptor: int) -> int:
        self._count("size")
        return super().size(descriptor)

    def read(self, descriptor: int, into: memoryview) -> int:
        self._count("read")
        return super().read(descriptor, self._limit(into))

    def close(self, descriptor: int) -> None:
        try:
            self._count("close")
        finally:
            super().close(descriptor)


def u8(*numbers: int) -> Tensor:
    return torch.tensor(numbers, dtype=torch.uint8)


def contents(stack: TierStack) -> dict[str, bytes]:
    """Every value, read without moving anything."""
    out = {}
    for key, held in stack._held.items():
        if held.record is not None:
            assert held.block is None
            out[key] = bytes(stack.files.get(key))
        else:
            assert held.block is not None
            out[key] = stack.pools[stack.level_of(key)].view(held.block).numpy().tobytes()
    return out


def state(stack: TierStack) -> Any:
    """Levels in order of use, bytes by level, all values, and blocks in use."""
    order = [stack.ledger.keys(level) for level in range(3)]
    return order, stack.used_bytes, contents(stack), [pool.arena.used_bytes for pool in stack.pools]


def names(folder: Path) -> set[str]:
    """Files in a store's folder, its own two apart."""
    return {path.name for path in folder.iterdir()} - {".lock", ".store"}


# --- the system fails ------------------------------------------------------------------------------------------------


def furnished(folder: Path, io: FaultyIO) -> TierStack:
    """Levels of 8, 8 and 64 bytes, all but the last full: a b | c d | x y, least recent first."""
    stack = TierStack((8, 8, 64), folder, largest_bytes=8, io=io)
    for key in "xyabcd":
        stack.put(key, u8(*[ord(key)] * 4))
    stack.put("a", u8(1, 1, 1, 1))
    stack.put("b", u8(2, 2, 2, 2))
    return stack


OPERATIONS: dict[str, Callable[[TierStack], object]] = {
    "put_new_over_all_levels": lambda s: s.put("n", u8(*range(8))),
    "put_over_a_file": lambda s: s.put("x", u8(9, 9, 9, 9)),
    "access_a_file": lambda s: s.access("x"),
    "promote_a_file": lambda s: s.promote("y"),
    "access_host": lambda s: s.access(s.ledger.keys(1)[0]),
    "evict_device": lambda s: s.evict(s.ledger.keys(0)[0]),
    "evict_host": lambda s: s.evict(s.ledger.keys(1)[0]),
    "spill_device": lambda s: s.spill(s.ledger.keys(0)[0]),
    "delete_a_file": lambda s: s.delete("x"),
}


@pytest.mark.parametrize("lasting", [False, True])
@pytest.mark.parametrize("name", OPERATIONS)
def test_a_failing_call_leaves_every_copy_and_every_count_as_it_was(name: str, lasting: bool, base: Path) -> None:
    act = OPERATIONS[name]
    reached, failed = 0, 0
    for fail_at in range(100):
        error = (errno.ENOSPC, errno.EIO, errno.EROFS)[fail_at % 3]
        place = base / f"{fail_at}-{error}"
        place.mkdir()
        io = FaultyIO()
        with furnished(place, io) as stack:
            before = state(stack)
            io.arm(fail_at, error, lasting)
            try:
                act(stack)
            except TierIOError as caught:
                failed += 1
                assert isinstance(caught.__cause__, OSError) and caught.__cause__.errno == error
                io.arm()
                assert state(stack) == before
                act(stack)  # and again, now that the system works
            reached = len(io.calls)
            io.arm()
            after = state(stack)
        assert names(place) == {r.path.name for r in stack.files.records.values()}  # no orphan, no temporary file
        clean = base / f"{fail_at}-{error}-clean"
        clean.mkdir()
        with furnished(clean, FaultyIO()) as stack:
            act(stack)
            assert state(stack) == after
        with FolderLock(place) as store:  # what a later process finds is what the stack believed
            assert {key: bytes(store.get(key)) for key in store.records} == {
                key: value for key, value in after[2].items() if key in after[0][2]
            }
        if fail_at >= reached:
            break
    else:
        pytest.fail("the operation never ran out of calls")
    assert (failed > 0) == (reached > 0) == (name != "access_host")  # between levels 0 and 1 nothing can fail


class FolderLock:
    """A file store for the length of a block."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __enter__(self) -> FileStore:
        self._store = FileStore(self._folder)
        return self._store

    def __exit__(self, *exception: object) -> None:
        self._store.close()


def test_control_a_stack_that_forgets_to_undo_is_noticed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    io = FaultyIO()
    with furnished(folder, io) as stack:
        before = state(stack)
        monkeypatch.setattr(stack.ledger, "undo", lambda plan: None)
        io.arm(0)
        with pytest.raises(TierIOError):
            stack.spill(stack.ledger.keys(0)[0])
        assert (stack.ledger.keys(0), stack.used_bytes) != (before[0][0], before[1])


def test_short_and_interrupted_reads_and_writes_are_continued(folder: Path) -> None:
    io = FaultyIO()
    io.short = random.Random(1)
    with TierStack((0, 0, 1 << 16), folder, largest_bytes=5000, io=io) as stack:
        value = torch.arange(5000).to(torch.uint8)
        stack.put("x", value)
        assert torch.equal(stack.access("x"), value)
        assert io.calls.count("write") > 5 and io.calls.count("read") > 5


def test_a_write_that_makes_no_progress_ends(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    io = FaultyIO()
    with TierStack((4, 4, 64), folder, largest_bytes=8, io=io) as stack:
        stack.put("x", u8(1, 2))
        monkeypatch.setattr(io, "write", lambda descriptor, data: 0)
        with pytest.raises(TierIOError, match="0 bytes written"):
            stack.spill("x")
        assert stack.level_of("x") == 0


def test_descriptors_are_not_lost_to_faults(folder: Path) -> None:
    io = FaultyIO()
    with furnished(folder, io) as stack:
        before = len(list(Path("/proc/self/fd").iterdir()))
        for fail_at in range(40):
            io.arm(fail_at)
            for act in (lambda: stack.spill("a"), lambda: stack.access("a")):
                try:
                    act()
                except TierIOError:
                    io.arm()
        assert len(list(Path("/proc/self/fd").iterdir())) == before


@pytest.mark.parametrize("action", ["create", "list"])
def test_a_folder_that_cannot_be_used_says_so(action: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Refusing(FaultyIO):
        def names(self, folder: Path) -> list[str]:
            self._count("list")
            return super().names(folder)

    io = Refusing()
    FileStore(folder).close()
    if action == "create":
        (folder / ".store").unlink()
    io.arm(0, errno.EROFS)
    with pytest.raises(TierIOError, match=f"^{action} .*Read-only"):
        FileStore(folder, io)
    FileStore(folder).close()  # the lock was given back
    with pytest.raises(TierError, match="no folder"):
        FileStore(folder / "missing")
    with pytest.raises(TierError, match="no folder"):
        FileStore(folder / ".lock")


# --- bits rot --------------------------------------------------------------------------------------------------------

PAYLOAD = bytes(range(256)) * 3


def lone_file(folder: Path) -> Path:
    with FolderLock(folder) as store:
        return store.put("layer.0", memoryview(PAYLOAD), "uint8", (len(PAYLOAD),)).path


def readings(folder: Path, damage: Callable[[], object]) -> list[str]:
    """What a store open during the damage, and one opened after it, say: the value, or the broken rule."""
    said = []
    store = FileStore(folder)
    try:
        damage()
        for _ in ("live", "reopened"):
            try:
                payload = bytes(store.get("layer.0"))
                said.append("right" if payload == PAYLOAD else "WRONG VALUE")
            except CorruptTensorError as error:
                assert error.key == "layer.0" and error.path.startswith(str(folder))
                said.append(error.rule)
            store.close()
            store = FileStore(folder)
    finally:
        store.close()
    return said


def flip(path: Path, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


FILE_BITS = 8 * (fileformat.BLOCK_BYTES + len(PAYLOAD))


@settings(max_examples=150)
@given(st.one_of(st.integers(0, 8 * 400), st.integers(0, FILE_BITS - 1)))
def test_any_flipped_bit_is_an_error_never_a_value(bit: int) -> None:
    with tempfile.TemporaryDirectory(dir=FAST) as name:
        path = lone_file(Path(name))
        assert path.stat().st_size * 8 == FILE_BITS
        said = readings(Path(name), lambda: flip(path, bit))
        assert "right" not in said and "WRONG VALUE" not in said


def test_control_without_checksums_a_flipped_bit_becomes_a_value(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zlib, "crc32", lambda data, start=0: 7)
    path = lone_file(folder)
    assert "WRONG VALUE" in readings(folder, lambda: flip(path, FILE_BITS - 1))


def damages(folder: Path, other: Path) -> dict[str, tuple[Callable[[], object], list[str]]]:
    """Ways to damage ``layer.0``'s file, and what must be said: by the open store, then by the next."""
    path, foreign = lone_file(folder), lone_file(other)
    with FolderLock(folder) as store:
        second = store.put("layer.1", memoryview(PAYLOAD), "uint8", (len(PAYLOAD),)).path
    data = path.read_bytes()
    with FolderLock(folder) as store:  # an earlier write of layer.0, as a careless restore would bring back
        newer = store.put("layer.0", memoryview(PAYLOAD), "uint8", (len(PAYLOAD),)).path

    def swap() -> None:
        a, b = newer.read_bytes(), second.read_bytes()
        newer.write_bytes(b)
        second.write_bytes(a)

    return {
        "truncated": (lambda: newer.write_bytes(data[:-1]), ["file_length"] * 2),
        "header_cut": (lambda: newer.write_bytes(data[:100]), ["header_truncated"] * 2),
        "emptied": (lambda: newer.write_bytes(b""), ["header_truncated"] * 2),
        "extended": (lambda: newer.write_bytes(data + b"\0"), ["file_length"] * 2),
        "stale": (lambda: newer.write_bytes(data), ["header_changed", "file_name"]),
        "foreign": (lambda: newer.write_bytes(foreign.read_bytes()), ["header_changed", "foreign_store"]),
        "swapped": (swap, ["header_changed", "file_name"]),
        "other_magic": (lambda: newer.write_bytes(b"GARBAGE!" + newer.read_bytes()[8:]), ["magic"] * 2),
        "other_version": (
            lambda: newer.write_bytes(newer.read_bytes()[:8] + b"\x02" + newer.read_bytes()[9:]),
            ["version"] * 2,
        ),
    }


@pytest.mark.parametrize(
    "name",
    ["truncated", "header_cut", "emptied", "extended", "stale", "foreign", "swapped", "other_magic", "other_version"],
)
def test_damaged_files_are_named_by_the_rule_they_break(name: str, folder: Path, base: Path) -> None:
    other = base / "other"
    other.mkdir()
    damage, expected = damages(folder, other)[name]
    assert readings(folder, damage) == expected


def test_a_removed_file_is_corrupt_to_the_open_store_and_absent_to_the_next(folder: Path) -> None:
    path = lone_file(folder)
    with FolderLock(folder) as store:
        path.unlink()
        with pytest.raises(CorruptTensorError, match="file_missing"):
            store.get("layer.0")
    with FolderLock(folder) as store, pytest.raises(UnknownKeyError):
        store.get("layer.0")


def test_a_damaged_file_on_the_way_up_changes_nothing_and_the_key_can_be_written_again(folder: Path) -> None:
    io = FaultyIO()
    with furnished(folder, io) as stack:
        flip(stack.files.records["x"].path, 8 * fileformat.BLOCK_BYTES)
        order, used = stack.keys(), stack.used_bytes
        for act in (stack.access, stack.promote):
            with pytest.raises(CorruptTensorError, match="payload_checksum: key 'x'"):
                act("x")
            assert (stack.keys(), stack.used_bytes) == (order, used)
        stack.put("x", u8(5, 5))
        assert stack.access("x").tolist() == [5, 5]


# --- keys and folders ------------------------------------------------------------------------------------------------

KEYS = [
    "",
    ".",
    "../escaped",
    "/absolute",
    "a/b",
    "a.b",
    "A.B",
    "nul\0byte",
    "x" * 300,
    "y" * 9000,  # a header of more than one block
    unicodedata.normalize("NFC", "caf\u00e9"),
    unicodedata.normalize("NFD", "caf\u00e9"),
    "\udc80 lone surrogate",
    ".lock",
    "\u865a\u62df",
]


def test_any_text_is_a_key_and_stays_inside_the_folder(folder: Path, base: Path) -> None:
    with TierStack((0, 0, 1 << 16), folder, largest_bytes=8) as stack:
        for number, key in enumerate(KEYS):
            stack.put(key, u8(number))
    with TierStack((8, 8, 1 << 16), folder, largest_bytes=8) as stack:
        assert stack.ledger.keys(2) == KEYS  # oldest write first
        assert [int(stack.access(key)) for key in KEYS] == list(range(len(KEYS)))
    assert [path.name for path in base.iterdir()] == ["tier"]


def test_of_two_complete_files_of_a_key_the_newer_counts_and_the_older_goes(folder: Path) -> None:
    with FolderLock(folder) as store:
        store.put("x", memoryview(b"old"), "uint8", (3,))
        newer = store.write("x", memoryview(b"new"), "uint8", (3,))  # as far as a killed process may get
    with FolderLock(folder) as store:
        assert bytes(store.get("x")) == b"new"
        assert names(folder) == {newer.path.name}


def test_a_folder_has_one_holder_at_a_time(folder: Path) -> None:
    first = FileStore(folder)
    with pytest.raises(FolderBusyError):
        FileStore(folder)
    first.close()
    second = FileStore(folder)
    with pytest.raises(FolderBusyError):
        FileStore(folder)
    del second  # a forgotten store lets go too
    gc.collect()
    FileStore(folder).close()


def test_a_reopened_stack_takes_over_only_what_it_can_hold(folder: Path) -> None:
    with TierStack((0, 0, 64), folder, largest_bytes=8) as stack:
        stack.put("a", u8(*range(8)))
        stack.put("b", u8(*range(8)))
    with pytest.raises(TierFullError, match="level 2 is full"):
        TierStack((0, 0, 8), folder, largest_bytes=8)
    with pytest.raises(TierFullError, match="largest_bytes"):
        TierStack((0, 0, 64), folder, largest_bytes=7)
    with TierStack((8, 0, 64), folder, largest_bytes=8) as stack:
        assert stack.access("a").tolist() == list(range(8))


# --- everything at once ----------------------------------------------------------------------------------------------


class StackAgainstDictionaries(RuleBasedStateMachine):
    """The engine beside the reference, with failing system calls and reopening in between."""

    capacities = (24, 16, 400)

    def __init__(self) -> None:
        super().__init__()
        self.temporary = tempfile.TemporaryDirectory(dir=FAST)
        self.folder = Path(self.temporary.name)
        self.io = FaultyIO()
        self.model = DictStack(self.capacities)
        self.stack = TierStack(self.capacities, self.folder, largest_bytes=30, io=self.io)

    def teardown(self) -> None:
        self.stack.close()
        self.temporary.cleanup()

    def live(self) -> list[str]:
        return [key for level in self.model.levels for key in level]

    def either(self, real: Callable[[], object], model: Callable[[], object], fault: int | None) -> None:
        """Both, or with a fault that hits, neither."""
        self.io.arm(-1 if fault is None else fault)
        try:
            real()
        except TierIOError:
            assert fault is not None
        else:
            model()
        finally:
            self.io.arm()

    faults = st.one_of(st.none(), st.integers(0, 12))

    @rule(number=st.integers(0, 11), size=st.integers(0, 30), fill=st.integers(0, 255), fault=faults)
    def put(self, number: int, size: int, fill: int, fault: int | None) -> None:
        key, value = f"layer.{number}", torch.full((size,), fill, dtype=torch.uint8)
        self.either(lambda: self.stack.put(key, value), lambda: self.model.put(key, value), fault)

    @precondition(lambda self: self.live())
    @rule(pick=st.integers(0, 1000), kind=st.sampled_from(("access", "promote", "evict", "spill", "delete")), f=faults)
    def use(self, pick: int, kind: str, f: int | None) -> None:
        live = self.live()
        key = live[pick % len(live)]
        found = self.model.find(key)
        if kind == "access":
            got: list[Tensor] = []
            expected = self.model.levels[found][key]
            self.either(lambda: got.append(self.stack.access(key).clone()), lambda: self.model.access(key), f)
            assert all(torch.equal(value, expected) for value in got)
        elif kind == "delete":
            self.either(lambda: self.stack.delete(key), lambda: self.model.levels[found].pop(key), f)
        else:
            model = {"promote": self.model.access, "evict": self.model.evict, "spill": self.model.spill}[kind]
            self.either(lambda: getattr(self.stack, kind)(key), lambda: model(key), f)

    @rule()
    def reopen(self) -> None:
        """Levels 0 and 1 are memory and go; the files come back in the order they were written."""
        self.stack.close()
        files = self.model.levels[2]
        self.model = DictStack(self.capacities)
        self.stack = TierStack(self.capacities, self.folder, largest_bytes=30, io=self.io)
        by_write = sorted(self.stack.files.records.items(), key=lambda item: item[1].header.generation)
        assert {key for key, _ in by_write} == set(files)
        for key, _ in by_write:
            self.model.levels[2][key] = files[key]

    @invariant()
    def same(self) -> None:
        assert [self.stack.ledger.keys(i) for i in range(3)] == [list(level) for level in self.model.levels]
        assert list(self.stack.used_bytes) == [self.model.used(i) for i in range(3)]
        assert [pool.arena.used_bytes for pool in self.stack.pools] == list(self.stack.used_bytes[:2])
        assert contents(self.stack) == {k: v.numpy().tobytes() for level in self.model.levels for k, v in level.items()}


StackAgainstDictionaries.TestCase.settings = settings(max_examples=60, stateful_step_count=40)
TestStackAgainstDictionaries = StackAgainstDictionaries.TestCase


# --- the process is killed -------------------------------------------------------------------------------------------

#: For each store named on the command line: runs a fixed trace again and again, each time in a fork that kills itself
#: at the next point, which is before each system call and half-way through each write. A byte for each completed
#: operation goes to ``<number>.progress``; the fork that survives prints the store and the names of all its points.
KILLED = """
import os, signal, sys
from pathlib import Path
import torch
from vbench.kernels.tiers.fileio import SystemIO
from vbench.kernels.tiers.stack import TierStack
torch.set_num_threads(1)
steps = [line.split(",") for line in sys.argv[2].split()]

class Killer(SystemIO):
    def __init__(self):
        self.left = -1  # not armed
        self.points = []
    def point(self, name, before_death=lambda: None):
        self.points.append(name)
        if self.left == 0:
            before_death()
            os.kill(os.getpid(), signal.SIGKILL)
        self.left -= 1
    def write(self, descriptor, data):
        self.point("write")
        self.point("half_write", lambda: os.write(descriptor, data[: len(data) // 2]))
        return super().write(descriptor, data)

def guarded(name):
    inner = getattr(SystemIO, name)
    def call(self, *arguments):
        self.point(name)
        return inner(self, *arguments)
    return call
for name in ("create", "reserve", "sync_data", "rename", "sync_folder", "unlink", "open", "size", "read", "close"):
    setattr(Killer, name, guarded(name))

class Careless(Killer):  # writes under the final name
    def create(self, path):
        return super().create(path if path.name == ".store.tmp" else path.with_suffix(".tensor"))
    def rename(self, old, new):
        if old.name == ".store.tmp":
            super().rename(old, new)

def trace(at, folder, progress, io):
    stack = TierStack((8, 8, 64), folder, largest_bytes=8, io=io)
    io.left, io.points = at, []
    for kind, key, fill in steps:
        if kind == "put":
            stack.put(key, torch.full((4,), int(fill), dtype=torch.uint8))
        else:
            getattr(stack, kind)(key)
        os.write(progress, b".")

for kind in (Killer, Careless):
    base = Path(sys.argv[1]) / kind.__name__
    base.mkdir()
    for at in range(10000):
        folder = base / str(at)
        folder.mkdir()
        child = os.fork()
        if child == 0:
            code = 1
            try:
                io = kind()
                trace(at, folder, os.open(base / f"{at}.progress", os.O_WRONLY | os.O_CREAT), io)
                print(kind.__name__, *io.points, flush=True)
                code = 0
            finally:
                os._exit(code)
        _, status = os.waitpid(child, 0)
        if os.WIFEXITED(status):
            assert os.WEXITSTATUS(status) == 0, status
            break
        assert os.WTERMSIG(status) == signal.SIGKILL, status
"""
POINTS = {
    *("create", "reserve", "write", "half_write", "sync_data", "rename", "sync_folder"),
    *("unlink", "open", "size", "read", "close"),
}
#: operation, key, byte the value is filled with; with levels of 8, 8 and 64 bytes and values of 4, most write files
KILL_STEPS = [
    *[("put", key, number) for number, key in enumerate("abcdef")],
    ("access", "a", 0),
    ("put", "b", 20),
    ("spill", "b", 0),
    ("put", "b", 21),
    ("spill", "f", 0),
    ("promote", "f", 0),
    ("evict", "c", 0),
    ("access", "d", 0),
]


@dataclass(frozen=True, slots=True)
class Moment:
    """The model after so many operations: values, and which keys lie in files."""

    values: dict[str, int]
    files: frozenset[str]


def moments() -> Iterator[Moment]:
    model = DictStack((8, 8, 64))
    yield Moment({}, frozenset())
    values: dict[str, int] = {}
    for kind, key, fill in KILL_STEPS:
        if kind == "put":
            values[key] = fill
            model.put(key, torch.full((4,), fill, dtype=torch.uint8))
        else:
            {"access": model.access, "promote": model.access, "evict": model.evict, "spill": model.spill}[kind](key)
        yield Moment(dict(values), frozenset(model.levels[2]))


@pytest.fixture(scope="module")
def killed() -> Iterator[tuple[Path, dict[str, list[str]]]]:
    """The folders the killed processes left, and the points of each store."""
    steps = " ".join(f"{kind},{key},{fill}" for kind, key, fill in KILL_STEPS)
    with tempfile.TemporaryDirectory(dir=FAST) as name:
        command = [sys.executable, "-c", KILLED, name, steps]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stderr
        lines = [line.split() for line in done.stdout.splitlines()]
        yield Path(name), {line[0]: line[1:] for line in lines}


def wrong_after_kills(base: Path, kills: int) -> list[str]:
    """What is not as it should be in the folders, a line each."""
    history = list(moments())
    wrong = []
    for at in range(kills):
        completed = len((base / f"{at}.progress").read_bytes())
        before, during = history[completed], history[completed + 1]
        with FolderLock(base / str(at)) as store:
            wrong += [f"kill {at}: torn {error}" for error in store.corrupt.values()]
            orphans = names(base / str(at)) - {record.path.name for record in store.records.values()}
            if orphans:
                wrong.append(f"kill {at}: {orphans} survive")
            for key in list(store.records):
                allowed = {bytes([m.values[key]] * 4) for m in (before, during) if key in m.values}
                try:
                    value = bytes(store.get(key))
                except CorruptTensorError as error:
                    wrong.append(f"kill {at}: torn {error}")
                    continue
                if value not in allowed:
                    wrong.append(f"kill {at}: {key} is {value!r}, neither old nor new")
            missing = (before.files & during.files) - store.records.keys()
            if missing:
                wrong.append(f"kill {at}: {sorted(missing)} lost, though in files before and after")
    return wrong


def test_after_a_kill_at_any_point_each_key_is_old_new_or_absent(killed: tuple[Path, dict[str, list[str]]]) -> None:
    base, points = killed
    assert set(points["Killer"]) == POINTS and len(points["Killer"]) > 60
    assert wrong_after_kills(base / "Killer", len(points["Killer"])) == []


def test_control_a_store_that_writes_under_the_final_name_is_found_out(
    killed: tuple[Path, dict[str, list[str]]],
) -> None:
    base, points = killed
    wrong = wrong_after_kills(base / "Careless", len(points["Careless"]))
    assert any("torn" in line for line in wrong)
