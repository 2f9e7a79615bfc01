"""The tier stack: device memory, pinned host memory, files; the rules of op ``tier_stack`` on real bytes.

How an operation runs
    1. The ledger plans it: who moves where, in bytes and recency, nothing touched yet. It can be undone.
    2. All that may fail, failing changes nothing: new files are written, a file that leaves the lowest level is read
       and verified, and last the named tensor's old file is unlinked, which commits.
    3. All that cannot fail: blocks are given back and taken, copies are issued on the side stream.
If step 2 raises, new files are removed and the plan is undone: every tensor is where it was, with its value. If step 3
raises (a device error), the stack declares itself broken instead of guessing.

Capacity. Level 0 is one slab of exactly its capacity and never holds more, not even for an instant. Level 1 is one
pinned slab of its capacity plus ``largest_bytes`` of transit room, through which files are read and written and in
which a tensor waits while it swaps places with others; settled tensors never exceed the capacity. The file level may
hold, besides its capacity, the files of tensors in motion, since a file is removed only after its successor exists.
``Arena`` says how exact bytes and fragmentation go together; a slab that must be packed gets a bounce buffer of at most
1 MiB beside it (``pool.SCRATCH_BYTES``), the only memory outside the slabs.

Cost. A hit on level 0 moves two list links. A miss costs that for each tensor moved, whatever the number of tensors
held (``Ledger.steps`` counts).

Not thread-safe: one caller at a time. A value handed out is a view of a slot: use it on the stream current at the call,
before the next call on the stack. Writing through the view changes the value (a copy out of a slot waits for the
compute issued on it). Its dtype and shape are kept, its strides are not (contiguous).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from vbench.kernels.tiers.arena import Block
from vbench.kernels.tiers.errors import BrokenStackError, TierFullError
from vbench.kernels.tiers.fileio import FileIO
from vbench.kernels.tiers.filestore import FileStore, Record
from vbench.kernels.tiers.ledger import ABSENT, Ledger, Move, Plan
from vbench.kernels.tiers.links import CudaLinks, HostLinks, Links
from vbench.kernels.tiers.marks import join
from vbench.kernels.tiers.pool import Pool
from vbench.kernels.tiers.slab import pinned_slab, plain_slab

DEVICE, HOST, FILE = 0, 1, 2


@dataclass(slots=True)
class Held:
    """A live tensor: what it is, and where its only valid bytes lie (a block on levels 0 and 1, a file on level 2)."""

    size_bytes: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    block: Block | None = None
    record: Record | None = None


@dataclass(slots=True)
class Incoming:
    """A new value on its way in: its bytes as a uint8 vector, on whatever device the caller had it."""

    source_u8: Tensor
    held: Held


@dataclass(slots=True)
class Counters:
    """What happened since the stack was made. ``hits``: accesses by the level found; ``moved_bytes``: by (from, to)."""

    hits: list[int] = field(default_factory=lambda: [0, 0, 0])
    moved_bytes: dict[tuple[int, int], int] = field(default_factory=dict)

    def moved(self, move: Move, size_bytes: int) -> None:
        if move.was != move.now:
            edge = (move.was, move.now)
            self.moved_bytes[edge] = self.moved_bytes.get(edge, 0) + size_bytes


def bytes_of(value: Tensor) -> Tensor:
    """The value's bytes in row-major order as a uint8 vector; a view where the value is contiguous."""
    return value.detach().resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8)


class TierStack:
    """Three levels behind one set of keys.

    Args:
        capacities_bytes: of device, host and files.
        folder: existing folder for the files; tensors found there are taken over into level 2, oldest write first.
        device: of level 0; on ``cpu`` level 0 is plain memory and copies are synchronous.
        largest_bytes: the largest tensor ever put; sizes the transit room.
        links, io: stand-ins for tests; by default the real ones.

    Raises:
        FolderBusyError, TierIOError, PinError: see their classes.
        TierFullError: the folder holds more than the last capacity, or a tensor above ``largest_bytes``.
    """

    def __init__(
        self,
        capacities_bytes: tuple[int, int, int],
        folder: Path,
        *,
        largest_bytes: int,
        device: torch.device | str = "cpu",
        links: Links | None = None,
        io: FileIO | None = None,
    ) -> None:
        self.device = torch.device(device)
        self.largest_bytes = largest_bytes
        self.ledger = Ledger(capacities_bytes)
        self.counters = Counters()
        self._held: dict[str, Held] = {}
        self._lease: tuple[Block, Any] | None = None
        self._state: Literal["open", "broken", "closed"] = "open"
        on_cuda = self.device.type == "cuda"
        if links is None:
            links = CudaLinks(self.device) if on_cuda else HostLinks()
        self._links = links
        self.files = FileStore(folder, io)
        try:
            self._adopt()
            host_bytes = capacities_bytes[HOST] + largest_bytes
            host = pinned_slab(host_bytes) if on_cuda else plain_slab(host_bytes, torch.device("cpu"))
            self.pools = (
                Pool(plain_slab(capacities_bytes[DEVICE], self.device), links, on_host=False),
                Pool(host, links, on_host=True),
            )
        except BaseException:
            self.files.close()
            raise

    # --- the operations --------------------------------------------------------------------------------------------

    def put(self, key: str, value: Tensor) -> None:
        """Drop any old value of ``key`` and store ``value`` as most recent on level 0, or the first that holds it.

        Args:
            value: any dtype and shape; copied, so the caller may change it afterwards.

        Raises:
            TierFullError, TierIOError, BrokenStackError: the stack, the old value included, is unchanged.
        """
        self._begin()
        source_u8 = bytes_of(value)
        size = source_u8.numel()
        if size > self.largest_bytes:
            raise TierFullError(f"{key!r}: {size} bytes, more than largest_bytes={self.largest_bytes}; raise it")
        held = Held(size, value.dtype, tuple(value.shape))
        self._carry_out(self.ledger.put(key, size), Incoming(source_u8, held), read=False)

    def access(self, key: str) -> Tensor:
        """The value, on the device, after moving it to level 0 (or as high as it fits) as most recent.

        Returns:
            a view of its slot, valid until the next call on the stack; a fresh tensor where it fits no slot of level 0.

        Raises:
            UnknownKeyError: not held.
            CorruptTensorError, TierIOError: its file cannot be read; the stack is unchanged.
        """
        self._begin()
        level = self._require(key)
        plan = self.ledger.move(key, DEVICE)
        transit = self._carry_out(plan, None, read=True)
        self.counters.hits[level] += 1
        held = self._held[key]
        if plan.subject.now == DEVICE:
            assert held.block is not None
            self._links.compute_wait(held.block.ready)
            self._lease = (held.block, self._links.compute_stream())
            return _typed(self.pools[DEVICE].view(held.block), held)
        block = held.block if transit is None else transit
        assert block is not None
        fresh_u8 = torch.empty(held.size_bytes, dtype=torch.uint8, device=self.device)
        # Its memory may still be in use by earlier work of the compute stream, from which the allocator took it.
        earlier = self._links.compute_mark(self._links.compute_stream())
        done = self._links.copy(fresh_u8, self.pools[HOST].view(block), join(block.ready, earlier))
        block.readers = join(block.readers, done)
        self._links.compute_wait(done)
        if transit is not None:
            self.pools[HOST].give(transit)
        return _typed(fresh_u8, held)

    def access_into(self, key: str, into_u8: Tensor) -> None:
        """``access``, then copy the value's bytes on the compute stream: the least a consumer can do with a value.

        Args:
            into_u8: uint8 vector of the value's bytes, on the device.
        """
        self._links.compute_copy(into_u8, bytes_of(self.access(key)))

    def promote(self, key: str) -> None:
        """As ``access``, without handing out the value. Raises as it does."""
        self._begin()
        self._require(key)
        self._carry_out(self.ledger.move(key, DEVICE), None, read=False)

    def evict(self, key: str) -> None:
        """Move ``key`` one level down, as most recent there; on the last level nothing happens.

        Raises:
            UnknownKeyError, TierFullError, TierIOError: the stack is unchanged.
        """
        self._begin()
        level = self._require(key)
        if level != FILE:
            self._carry_out(self.ledger.move(key, level + 1), None, read=False)

    def spill(self, key: str) -> None:
        """Move ``key`` to the files; if it is there, nothing happens. Raises as ``evict`` does."""
        self._begin()
        if self._require(key) != FILE:
            self._carry_out(self.ledger.move(key, FILE), None, read=False)

    def delete(self, key: str) -> None:
        """Forget ``key`` and its bytes.

        Raises:
            UnknownKeyError: not held.
            TierIOError: its file cannot be removed; it is still held.
        """
        self._begin()
        self._delete(key)

    def clear(self) -> None:
        """Forget every tensor. Raises TierIOError with some of them still held."""
        self._begin()
        for key in list(self._held):
            self._delete(key)

    def close(self) -> None:
        """Wait for copies, give memory and folder back. The files stay; levels 0 and 1 are gone."""
        if self._state == "closed":
            return
        self._state = "closed"
        self._lease = None
        self._links.drain()
        for pool in self.pools:
            pool.close()
        self.files.close()

    def __enter__(self) -> TierStack:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    # --- looking ---------------------------------------------------------------------------------------------------

    def level_of(self, key: str) -> int:
        """0 device, 1 host, 2 file, -1 not held."""
        return self.ledger.level_of(key)

    def size_of(self, key: str) -> int:
        """Bytes of a held tensor. Raises UnknownKeyError, CorruptTensorError as ``access`` does."""
        self._require(key)
        return self._held[key].size_bytes

    def keys(self) -> list[str]:
        """All keys, level by level, least recent first."""
        return [key for level in (DEVICE, HOST, FILE) for key in self.ledger.keys(level)]

    @property
    def used_bytes(self) -> tuple[int, ...]:
        """Bytes of the settled tensors of each level."""
        return tuple(self.ledger.used_bytes)

    # --- how -------------------------------------------------------------------------------------------------------

    def _begin(self) -> None:
        if self._state != "open":
            raise BrokenStackError(f"the stack is {self._state}; make a new one (files are picked up from the folder)")
        if self._lease is not None:
            block, stream = self._lease
            block.readers = join(block.readers, self._links.compute_mark(stream))
            self._lease = None

    def _require(self, key: str) -> int:
        """Level of a held key; the file store says whether another is unknown or damaged."""
        level = self.level_of(key)
        if level == ABSENT:
            self.files.lookup(key)
        return level

    def _adopt(self) -> None:
        for key, record in sorted(self.files.records.items(), key=lambda item: item[1].header.generation):
            header = record.header
            if header.payload_bytes > self.largest_bytes:
                raise TierFullError(f"{key!r}: {header.payload_bytes} bytes in its file > largest_bytes; raise it")
            self.ledger.put(key, header.payload_bytes, FILE)
            dtype = getattr(torch, header.dtype)
            self._held[key] = Held(header.payload_bytes, dtype, header.shape, record=record)

    def _delete(self, key: str) -> None:
        plan = self.ledger.remove(key)
        held = self._held[key]
        if held.record is not None:
            try:
                self.files.unlink(held.record)
            except BaseException:
                self.ledger.undo(plan)
                raise
        if held.block is not None:
            self.pools[plan.subject.was].give(held.block)
        del self._held[key]

    def _carry_out(self, plan: Plan, incoming: Incoming | None, *, read: bool) -> Block | None:
        """Steps 2 and 3 for an applied plan.

        Args:
            incoming: the new value, for ``put``.
            read: the value is wanted even if it stays in its file.

        Returns:
            the transit block with the value, where it was wanted and stays in its file; the caller gives it back.
        """
        key, was, now = plan.subject.key, plan.subject.was, plan.subject.now
        old = self._held.get(key)
        written: dict[str, Record] = {}
        transit: Block | None = None
        try:
            for move in plan.others:
                if move.now == FILE:
                    written[move.key] = self._write(move.key, self._held[move.key], move.was)
            if now == FILE and incoming is not None:
                written[key] = self._write_bytes(key, incoming.held, self._on_host(incoming.source_u8))
            elif now == FILE and was != FILE and old is not None:
                written[key] = self._write(key, old, was)
            elif was == FILE and incoming is None and old is not None and (read or now != FILE):
                transit = self._read(old)
            if old is not None and old.record is not None and (incoming is not None or now != FILE):
                self.files.unlink(old.record)
        except BaseException:
            for record in written.values():
                self.files.discard(record)
            if transit is not None:
                self.pools[HOST].give(transit)
            self.ledger.undo(plan)
            raise
        try:
            self._settle(plan, incoming, written, transit)
        except BaseException:
            self._state = "broken"
            raise
        return transit if now == FILE else None

    def _settle(self, plan: Plan, incoming: Incoming | None, written: dict[str, Record], transit: Block | None) -> None:
        """Step 3. First all that frees room, then what fills it."""
        key, was, now = plan.subject.key, plan.subject.was, plan.subject.now
        if incoming is not None:
            old = self._held.get(key)
            if old is not None and old.block is not None:
                self.pools[was].give(old.block)
            self._held[key] = incoming.held
        for move in plan.others:
            held = self._held[move.key]
            self.counters.moved(move, held.size_bytes)
            if move.now == FILE:
                self._into_file(held, move.was, written[move.key])
        for move in plan.others:
            if move.now != FILE:
                self._transfer(self._held[move.key], move.was, move.now)
        held = self._held[key]
        self.counters.moved(Move(key, ABSENT, now) if incoming is not None else plan.subject, held.size_bytes)
        if incoming is not None:
            if now == FILE:
                self._into_file(held, ABSENT, written[key])
            else:
                self._bring_in(incoming, now)
        elif was == now:
            return
        elif now == FILE:
            self._into_file(held, was, written[key])
        elif was == FILE:
            assert transit is not None
            held.record, held.block = None, transit
            if now == DEVICE:  # on level 1 the transit block simply stays
                self._transfer(held, HOST, DEVICE)
        else:
            self._transfer(held, was, now)

    def _transfer(self, held: Held, source: int, to: int) -> None:
        assert held.block is not None
        old, new = held.block, self.pools[to].take(held.size_bytes)
        # ``take`` may have packed the pool, and so moved ``old`` if it lies in the same one: look at it only now.
        done = self._links.copy(
            self.pools[to].view(new), self.pools[source].view(old), join(new.fence, old.ready, old.readers)
        )
        new.ready = done
        old.readers = join(old.readers, done)
        self.pools[source].give(old)
        held.block = new

    def _bring_in(self, incoming: Incoming, level: int) -> None:
        pool, source_u8 = self.pools[level], incoming.source_u8
        block = pool.take(incoming.held.size_bytes)
        incoming.held.block = block
        if level == HOST and source_u8.device.type == "cpu":
            self._links.host_wait(block.fence)
            pool.view(block).copy_(source_u8)
            return
        if source_u8.device.type == "cpu":
            block.ready = self._links.copy(pool.view(block), source_u8, block.fence)
            if source_u8.is_pinned():  # pageable memory has been read when the call returns, pinned memory has not
                self._links.host_wait(block.ready)
            return
        # A value made on the device is complete when the compute stream gets there, and may be freed or overwritten in
        # that stream's order.
        produced = self._links.compute_mark(self._links.compute_stream())
        block.ready = self._links.copy(pool.view(block), source_u8, join(block.fence, produced))
        self._links.compute_wait(block.ready)

    def _into_file(self, held: Held, was: int, record: Record) -> None:
        if held.block is not None:
            self.pools[was].give(held.block)
        held.block, held.record = None, record
        self.files.link(record)

    def _write(self, key: str, held: Held, level: int) -> Record:
        """Write the file of a tensor on level 0 or 1, which keeps its block for now."""
        assert held.block is not None
        if level == HOST:
            self._links.host_wait(held.block.ready)
            return self._write_bytes(key, held, self.pools[HOST].view(held.block))
        transit = self.pools[HOST].take(held.size_bytes)
        try:
            done = self._links.copy(
                self.pools[HOST].view(transit),
                self.pools[DEVICE].view(held.block),
                join(transit.fence, held.block.ready, held.block.readers),
            )
            held.block.readers = join(held.block.readers, done)
            self._links.host_wait(done)
            return self._write_bytes(key, held, self.pools[HOST].view(transit))
        finally:
            self.pools[HOST].give(transit)

    def _write_bytes(self, key: str, held: Held, payload_u8: Tensor) -> Record:
        name = str(held.dtype).removeprefix("torch.")
        return self.files.write(key, payload_u8.numpy().data, name, held.shape)

    def _read(self, held: Held) -> Block:
        """A transit block with the verified bytes of a tensor on level 2."""
        assert held.record is not None
        transit = self.pools[HOST].take(held.size_bytes)
        try:
            self._links.host_wait(transit.fence)
            self.files.read(held.record, self.pools[HOST].view(transit).numpy().data)
        except BaseException:
            self.pools[HOST].give(transit)
            raise
        return transit

    def _on_host(self, source_u8: Tensor) -> Tensor:
        return source_u8.cpu()  # waits for the current stream if it was on the device


def _typed(view_u8: Tensor, held: Held) -> Tensor:
    """The bytes as dtype and shape; a copy only where a tightly packed slab gave an offset unfit for the dtype."""
    if view_u8.storage_offset() % held.dtype.itemsize:
        view_u8 = view_u8.clone()
    return view_u8.view(held.dtype).reshape(held.shape)
