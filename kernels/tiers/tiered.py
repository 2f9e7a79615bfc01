"""``tier(module, budget)``: run any ``nn.Module`` whose weights do not fit the device.

At rest a parameter *is* its host copy: ``p.data`` lies in page-locked memory, so ``state_dict``, ``load_state_dict``,
a plain optimizer and ``clip_grad_norm_`` work on it unchanged. While a module's ``forward`` runs, its parameters look
at a device slot that a side stream has filled. Parameters stay the same objects throughout.

Backward. A weight saved for it is not kept: the saved tensor is replaced by its place in a unit
(``saved_tensors_hooks``, chained to hooks already active, so activation checkpointing works), and fetched again when
the backward asks, in whatever order. A streamed parameter's gradient is copied to the host as soon as it is
accumulated and is ``p.grad`` when ``backward`` returns.

Order. The first pass of each kind (training or not) fetches on demand and is recorded; later passes prefetch by the
record (``Order``). Host copies are never assumed unchanged between passes: an optimizer step needs no notice.

Files. Frozen weights that page-locked memory has no room for lie in checksummed files and are read ahead by a thread.
At rest their parameters are empty (``numel() == 0``: no memory stands for them, so no stale value can be read);
``state_dict`` reads the files, ``close`` brings the weights back into memory.

Codes. With ``codec="nvfp4"`` the weights of linear layers lie and travel as 4-bit codes and are decoded on their way
into a slot (``codec.py``); frozen ones only. At rest they are empty too, and what ``state_dict`` and ``close`` give is
decode(encode(w)): the weight the module computed with.

Threads may call the module at once; they share the slots, and a thread waits while others hold what it needs.
"""

from __future__ import annotations

import math
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vbench.errors import Unsupported
from vbench.kernels.tiers.budget import Budget, BudgetError
from vbench.kernels.tiers.codec import (
    Expander,
    TorchDecoder,
    WeightDecoder,
    default_decoder,
    mark_packed,
    restore,
    store,
)
from vbench.kernels.tiers.errors import TierError
from vbench.kernels.tiers.fileio import FileIO
from vbench.kernels.tiers.gradients import HostGradients
from vbench.kernels.tiers.links import CudaLinks, HostLinks, Links
from vbench.kernels.tiers.marks import Marks, join
from vbench.kernels.tiers.readahead import BUFFERS, FiledUnits
from vbench.kernels.tiers.residency import Residency, filed, plan
from vbench.kernels.tiers.schedule import Order
from vbench.kernels.tiers.slab import Slab, pinned_slab, plain_slab
from vbench.kernels.tiers.slots import Slot, storage_references
from vbench.kernels.tiers.units import Unit, View, deepest, discover

#: Device bytes a resident trainable weight costs per byte of its own: itself, its gradient, two moments.
TRAINING_COST = 4.0

# Handles are held weakly too: a handle knows its module, so a strong value would keep both alive for ever.
_tiered: weakref.WeakKeyDictionary[nn.Module, weakref.ref[Tiered]] = weakref.WeakKeyDictionary()


@dataclass(slots=True)
class Stats:
    """What happened so far.

    Args:
        resident, timely, late, miss: acquisitions of units that stay on the device (where all do: modules with weights,
            each pass), whose prefetch was over, whose prefetch was still under way, and that nobody had asked for.
        to_device_bytes, to_host_bytes: weights and gradients copied.
        from_file_bytes: read from files, ahead or on demand.
        prefetches: copies begun before they were asked for; ``wasted``: those overwritten unread.
        waits: times a thread waited for another's slots.
    """

    resident: int = 0
    timely: int = 0
    late: int = 0
    miss: int = 0
    to_device_bytes: int = 0
    to_host_bytes: int = 0
    from_file_bytes: int = 0
    prefetches: int = 0
    wasted: int = 0
    waits: int = 0


@dataclass(slots=True)
class _Saved:
    """A tensor saved for backward that lies in a slot: where its bytes are in the unit, and at which version."""

    unit: int
    order: Order
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    start_bytes: int
    versions: tuple[int, ...]


@dataclass(slots=True)
class _Call:
    """A call in progress of one module on one thread: what it holds, and the hooks it entered."""

    module: nn.Module
    units: tuple[int, ...]
    hooks: Any


@dataclass(slots=True)
class _Local:
    """What one thread is doing: the pass it is in, its calls in progress, and how many leases it holds."""

    order: Order | None = None
    calls: list[_Call] = field(default_factory=list)
    held: int = 0


class Tiered:
    """Handle of a tiered module; see ``tier``. A context manager that closes."""

    def __init__(
        self,
        module: nn.Module,
        budget: Budget,
        device: torch.device,
        slots: int,
        reads_children: tuple[type[nn.Module], ...],
        links: tuple[Links, Links] | None,
        io: FileIO | None,
        codec: str = "raw",
        decoder: WeightDecoder | None = None,
    ) -> None:
        on_cuda = device.type == "cuda"
        self.module = module
        self.budget = budget
        self.device = device
        self._units, self._needs = discover(module, reads_children)
        mark_packed(module, self._units, codec)
        self._depth = deepest(module, self._needs)
        self._slots_wanted = max(slots, self._depth + 1)
        if links is None:
            links = (CudaLinks(device), CudaLinks(device)) if on_cuda else (HostLinks(), HostLinks())
        self._down_links: Links = links[0]
        if any(unit.packed for unit in self._units):
            decoder = decoder or default_decoder(device)
        self._expander = Expander(self._units, device, self._down_links, decoder or TorchDecoder())
        self._room_bytes(0)  # malformed or hopeless budgets are refused before anything moves
        self._up_links: Links = links[1]
        self._changed = threading.Condition(threading.RLock())
        self._locals = threading.local()
        self._slots: list[Slot] = []
        self._slot_of: dict[int, Slot] = {}
        self._by_address: dict[int, Slot] = {}
        self._bound = [0] * len(self._units)
        self._holders: dict[int, int] = {}
        self._waiting = 0
        self._clock = 0
        self._records: dict[bool, Order] = {}
        self._measured = budget.activation_bytes != "auto" or not _has_allocator(device)
        self.stats_ = Stats()
        self._state = "open"
        self._hooks: list[Any] = []
        self._call_hooks: list[Any] = []
        self._with_gradient: set[int] = set()
        self.activation_bytes: int | None = None

        sizes = [unit.stored_bytes for unit in self._units]
        trainable = [_trains(unit) for unit in self._units]
        self._in_file = filed(sizes, trainable, budget.pinned_bytes, budget.file_bytes, BUFFERS)
        self._starts: list[int] = []
        at = 0
        for unit in self._units:
            self._starts.append(at)
            at += 0 if self._in_file[unit.index] else unit.stored_bytes
        activations = 0 if budget.activation_bytes == "auto" else int(budget.activation_bytes)
        self.residency = self._plan(self._room_bytes(activations), first=True)
        make_slab = pinned_slab if on_cuda else _pageable
        self._files: FiledUnits | None = None
        self._staging_bytes = 0
        if any(self._in_file):
            self._files = self._write_files(make_slab, io)
        try:
            self._host: Slab = make_slab(at)
        except BaseException:
            if self._files is not None:
                self._files.close()
            raise
        self._gradients = HostGradients(
            self._up_links, budget.pinned_bytes - at - self._staging_bytes, make_slab, self.stats_
        )
        for unit in self._units:
            self._move_to_host(unit)
        self._buffers_to_device()
        self._install(self.residency)
        self._attach()

    # --- what the user asks ----------------------------------------------------------------------------------------

    def plan(self) -> dict[str, Any]:
        """The placement in numbers: bytes by level, slots, and by unit its name, bytes and whether it is resident."""
        now = self.residency
        return {
            "device_bytes": now.device_bytes + self._staged_bytes,
            "slots": now.slots,
            "slot_bytes": now.slot_bytes,
            "decode_staging_bytes": self._staged_bytes,
            "streamed_bytes_per_pass": sum(u.stored_bytes for u in self._units if not now.resident[u.index]),
            "pinned_weight_bytes": self._host.memory_u8.numel(),
            "pinned_staging_bytes": self._staging_bytes,
            "file_bytes": sum(unit.stored_bytes for unit in self._units if self._in_file[unit.index]),
            "pinned_gradient_bytes": self._gradients.held_bytes,
            "activation_bytes": self.activation_bytes,
            "units": [
                {
                    "name": unit.name,
                    "bytes": unit.size_bytes,
                    "stored_bytes": unit.stored_bytes,
                    "resident": now.resident[unit.index],
                    "home": "file" if self._in_file[unit.index] else "host",
                }
                for unit in self._units
            ],
        }

    def stats(self) -> dict[str, int]:
        """Counts so far; see ``Stats``."""
        with self._changed:
            if self._files is not None:
                self.stats_.from_file_bytes = self._files.read_bytes
            return asdict(self.stats_)

    def unit_of(self, parameter: nn.Parameter) -> int:
        """Index in ``plan()["units"]`` of the unit that a parameter travels with.

        Raises:
            TierError: it is none of the module's, or has no elements.
        """
        for unit in self._units:
            if any(parameter is known for known in unit.parameters):
                return unit.index
        raise TierError("no such parameter travels with this module")

    @property
    def closed(self) -> bool:
        return self._state == "closed"

    def close(self) -> None:
        """Take the hooks off and leave every parameter on the host, with its value and gradient. Idempotent.

        Raises:
            TierError: a forward is in progress.
            CorruptTensorError, TierIOError: a file cannot be read back; the module stays tiered.
        """
        with self._changed:
            if self._state == "closed":
                return
            if self._holders:
                raise TierError("close: a forward of the module is in progress on some thread; wait for it")
            homes = {u.index: self._read_back(u) for u in self._units if u.packed or self._in_file[u.index]}
            self._state = "closed"
        for hook in self._hooks + self._call_hooks:
            hook.remove()
        self._down_links.drain()
        self._up_links.drain()
        for unit in self._units:
            resident = self.residency.resident[unit.index]
            if resident or unit.index in homes:
                home_u8 = homes[unit.index] if unit.index in homes else self._host_bytes(unit)
                for view, host in unit.views(home_u8):
                    if resident:
                        host.copy_(view.parameter.data)
                    _point(view.parameter, host)
        self._slots.clear()
        self._slot_of.clear()
        self._by_address.clear()
        self._expander.close()
        self._gradients.close()
        self._host.close()
        for part in self.module.modules():
            _tiered.pop(part, None)
        if self._files is not None:
            self._files.close()

    def __enter__(self) -> Tiered:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    # --- placing ---------------------------------------------------------------------------------------------------

    def _room_bytes(self, activations: int) -> int:
        """Device bytes for weights: the budget less activations, buffers, and staging of packed weights."""
        buffers = sum(buffer.untyped_storage().nbytes() for buffer in self.module.buffers())
        staging = self._expander.staging_bytes
        room = self.budget.gpu_bytes - activations - buffers - staging
        if room < 0:
            raise BudgetError(
                f"gpu={self.budget.gpu_bytes} is {-room} bytes less than activations ({activations}), buffers "
                f"({buffers}) and staging of packed weights ({staging}) take; raise gpu"
            )
        return room

    def _plan(self, room_bytes: int, *, first: bool) -> Residency:
        """Which units stay on the device, in ``room_bytes``.

        A trainable unit is placed once and for all: an optimizer keeps its state where the parameter was at the first
        step. With activations still to be measured, nothing stays yet.
        """
        trainable = [_trains(unit) for unit in self._units]
        movable = [self._measured if first else not trains for trains in trainable]
        costs = [TRAINING_COST if trains else 1.0 for trains in trainable]
        return plan([unit.size_bytes for unit in self._units], room_bytes, self._slots_wanted, costs, movable)

    def _host_bytes(self, unit: Unit) -> Tensor:
        start = self._starts[unit.index]
        return self._host.memory_u8[start : start + unit.stored_bytes]

    def _write_files(self, make_slab: Callable[[int], Slab], io: FileIO | None) -> FiledUnits:
        """Write the units that live in files. No parameter is touched yet, so a folder that fails changes nothing.

        Raises:
            BudgetError: no folder is named.
            FolderBusyError, TierError, TierIOError: the folder is in use, missing, or refuses.
        """
        if self.budget.dir is None:
            raise BudgetError(f"file={self.budget.file} needs dir, an existing folder for the files")
        sizes = {unit.index: unit.stored_bytes for unit in self._units if self._in_file[unit.index]}
        self._staging_bytes = BUFFERS * max(sizes.values())
        slab = make_slab(self._staging_bytes)
        try:
            files = FiledUnits(Path(self.budget.dir), sizes, slab, self._down_links, io)
        except BaseException:
            slab.close()
            raise
        try:
            for unit in self._units:
                if self._in_file[unit.index]:
                    files.write(unit.index, unit.name, partial(store, unit, device=self.device))
        except BaseException:
            files.close()
            raise
        return files

    def _read_back(self, unit: Unit) -> Tensor:
        """A unit from where it is stored, verified if that is a file, decoded, in ordinary memory."""
        stored_u8 = torch.empty(unit.stored_bytes, dtype=torch.uint8)
        if self._in_file[unit.index]:
            assert self._files is not None
            self._files.read_into(unit.index, stored_u8)
        else:
            stored_u8.copy_(self._host_bytes(unit))
        return restore(unit, stored_u8) if unit.packed else stored_u8

    def _move_to_host(self, unit: Unit) -> None:
        in_file = self._in_file[unit.index]
        if not in_file:
            store(unit, self._host_bytes(unit), self.device)
        for view, host in self._at_rest(unit):
            gradient = view.parameter.grad
            view.parameter.grad = None
            _point(view.parameter, host)
            if gradient is not None and not in_file:
                view.parameter.grad = gradient.to("cpu" if self.device.type == "cuda" else self.device)

    def _at_rest(self, unit: Unit) -> list[tuple[View, Tensor]]:
        """What each parameter looks at while nobody runs: its host copy, or nothing where that is a file or codes."""
        rest: list[tuple[View, Tensor]] = []
        for piece in unit.pieces:
            for view in piece.views:
                if self._in_file[unit.index] or piece.packing is not None:
                    rest.append((view, torch.empty(0, dtype=view.dtype)))
                else:
                    stored_u8 = self._host_bytes(unit)[piece.stored_start : piece.stored_start + piece.stored_bytes]
                    rest.append((view, view.over(stored_u8)))
        return rest

    def _source(self, unit: Unit) -> Tensor:
        """The unit's bytes in host memory; from a file this waits for its read. ``_copied`` must follow the copy."""
        if self._files is not None and self._in_file[unit.index]:
            return self._files.take(unit.index)
        return self._host_bytes(unit)

    def _copied(self, unit: Unit, marks: Marks) -> None:
        if self._files is not None and self._in_file[unit.index]:
            self._files.copied(unit.index, marks)

    def _buffers_to_device(self) -> None:
        for buffer in self.module.buffers():
            if buffer.device != self.device:
                buffer.data = buffer.data.to(self.device)

    def _install(self, residency: Residency) -> None:
        """Make the slots and bring resident units in; whatever was resident before has gone back to the host."""
        self.residency = residency
        self._slots = [Slot(residency.slot_bytes, self.device) for _ in range(residency.slots)]
        self._slot_of.clear()
        self._by_address = {slot.memory_u8.untyped_storage().data_ptr(): slot for slot in self._slots}
        self._expander.close()  # its launches were bound to the slots of before
        self._expander.open()
        streamed = [unit for unit in self._units if unit.packed and not residency.resident[unit.index]]
        self._expander.prepare(streamed, [slot.memory_u8 for slot in self._slots])
        for slot in self._slots:
            slot.count_owners()
            slot.used = self._down_links.compute_mark(self._down_links.compute_stream())
        for unit in self._units:
            if residency.resident[unit.index]:
                device_u8 = torch.empty(unit.size_bytes, dtype=torch.uint8, device=self.device)
                if unit.packed:
                    self._expander.prepare([unit], [device_u8])
                    self._down_links.host_wait(self._expander.bring(unit, device_u8, self._source(unit), ()))
                    self._expander.forget(device_u8)
                else:
                    device_u8.copy_(self._source(unit))
                self._copied(unit, ())  # the copy is over by now
                for view, there in unit.views(device_u8):
                    _point(view.parameter, there)
                    if view.parameter.grad is not None and view.parameter.grad.device != self.device:
                        view.parameter.grad = view.parameter.grad.to(self.device)
        if not residency.slots:
            self._expander.close()
        self._staged_bytes = self._expander.staging_bytes if residency.slots else 0
        self._attach_calls()

    # --- hooks -----------------------------------------------------------------------------------------------------

    def _attach(self) -> None:
        add = self._hooks.append
        add(self.module.register_forward_pre_hook(self._enter_pass, prepend=True))
        add(self.module.register_forward_hook(self._leave_pass, always_call=True))
        if any(self._in_file) or any(unit.packed for unit in self._units):
            parts: Any = self.module.modules()  # the registration methods of state dicts carry no types
            for submodule in parts:
                add(submodule.register_state_dict_post_hook(partial(self._fill_state_dict)))
                add(submodule.register_load_state_dict_pre_hook(self._refuse_to_load))

    def _attach_calls(self) -> None:
        """Hooks around every module that has weights, as long as any of them streams: torch's price for a pair is more
        than a small layer's launch."""
        for hook in self._call_hooks:
            hook.remove()
        self._call_hooks.clear()
        for submodule, units in self._needs.items() if self.residency.slots else ():
            self._call_hooks.append(submodule.register_forward_pre_hook(self._enter(units)))
            leave = submodule.register_forward_hook(self._leave, always_call=True, prepend=True)
            self._call_hooks.append(leave)

    def _attach_gradients(self) -> None:
        """Hooks on every parameter that wants a gradient by now; freezing and unfreezing between passes is allowed."""
        for unit in self._units:
            for piece in unit.pieces:
                if piece.packing is not None and piece.views[0].parameter.requires_grad:
                    raise Unsupported(
                        "codec_trainable",
                        f"a weight of {unit.name} was unfrozen, and codes have no gradient; close(), and tier it raw",
                    )
            for parameter in unit.parameters:
                if parameter.requires_grad and self._in_file[unit.index]:
                    raise BudgetError(
                        f"a parameter of {unit.name} was unfrozen, and files hold frozen ones only: "
                        f"{unit.size_bytes} bytes of pinned are missing; close(), raise pinned and tier again"
                    )
                if parameter.requires_grad and id(parameter) not in self._with_gradient:
                    self._with_gradient.add(id(parameter))
                    tensor: Any = parameter  # its registration methods carry no types
                    before = self._gradients.before(parameter, self._is_streamed(unit))
                    after = self._gradients.after(parameter, self._is_streamed(unit))
                    self._hooks.append(tensor.register_hook(before))
                    self._hooks.append(tensor.register_post_accumulate_grad_hook(after))

    def _fill_state_dict(self, module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
        """Put what lies in files or as codes into a state dict, each unit read, verified and decoded."""
        own = [(prefix + name, parameter) for name, parameter in module._parameters.items() if parameter is not None]
        for unit in self._units:
            wanted = [(key, p) for key, p in own if any(p is known for known in unit.parameters) and key in state]
            if (unit.packed or self._in_file[unit.index]) and wanted:
                with self._changed:
                    views = unit.views(self._read_back(unit))
                state.update({key: value for key, p in wanted for view, value in views if view.parameter is p})

    def _refuse_to_load(self, module: nn.Module, state: Any, prefix: str, *others: Any) -> None:
        for unit in self._units:
            for parameter in module._parameters.values():
                away = unit.packed or self._in_file[unit.index]
                if away and any(parameter is known for known in unit.parameters):
                    where = "in a file" if self._in_file[unit.index] else "there as codes"
                    raise TierError(f"{unit.name} lies {where}; close() the tiers, load, and tier the module again")

    def _is_streamed(self, unit: Unit) -> Callable[[], bool]:
        """For hooks of tensors, hence weak (see ``HostGradients``). Nothing streams whose handle is gone."""
        known, index = weakref.ref(self), unit.index

        def streamed() -> bool:
            handle = known()
            return handle is not None and not handle.residency.resident[index]

        return streamed

    @property
    def _mine(self) -> _Local:
        mine: _Local | None = getattr(self._locals, "mine", None)
        if mine is None:
            mine = self._locals.mine = _Local()
        return mine

    def _enter_pass(self, module: nn.Module, arguments: Any) -> None:
        mine = self._mine
        if mine.calls:
            return  # a recursive call of the root is part of the pass it is in
        with self._changed:
            self._attach_gradients()
            kind = torch.is_grad_enabled()
            if not self._measured:
                if not self._records:
                    torch.cuda.reset_peak_memory_stats(self.device)
                elif not self._holders:
                    self._measure()
            before = self._records.get(kind)
            mine.order = self._records[kind] = Order(before.happened if before is not None else ())
            if not self.residency.slots:
                self.stats_.resident += len(self._needs)
            # What the slots hold may be older than the host copies by now.
            for unit, slot in list(self._slot_of.items()):
                if slot.leases == 0 and slot.idle:
                    slot.occupant = None
                    del self._slot_of[unit]

    def _leave_pass(self, module: nn.Module, arguments: Any, output: Any) -> None:
        mine = self._mine
        if not mine.calls:
            mine.order = None

    def _enter(self, units: tuple[int, ...]) -> Callable[[nn.Module, Any], None]:
        def hook(module: nn.Module, arguments: Any) -> None:
            mine = self._mine
            if not self.residency.slots:
                return  # this hook was taken off in the call it still runs in
            if mine.order is None:
                mine.order = Order()  # a submodule called by itself: nothing to go by
                self._attach_gradients()
            taken: list[int] = []
            try:
                for unit in units:
                    self._acquire(unit, mine)
                    taken.append(unit)
            except BaseException:
                for unit in taken:
                    self._release(unit, mine)
                raise
            hooks = self._saving(mine.order)
            hooks.__enter__()
            mine.calls.append(_Call(module, units, hooks))

        return hook

    def _leave(self, module: nn.Module, arguments: Any, output: Any) -> None:
        mine = self._mine
        # An exception in another pre-hook leaves a call that never began; there is nothing of ours to undo then.
        if not mine.calls or mine.calls[-1].module is not module:
            return
        call = mine.calls.pop()
        call.hooks.__exit__(None, None, None)
        for unit in call.units:
            self._release(unit, mine)

    # --- forward ---------------------------------------------------------------------------------------------------

    def _acquire(self, index: int, mine: _Local) -> None:
        """Have the unit on the device and its parameters point there, until ``_release``."""
        assert mine.order is not None
        with self._changed:
            if self._state != "open":
                raise TierError("the module's tiers are closed; its parameters are on the host")
            if self.residency.resident[index]:
                self.stats_.resident += 1
                return
            if self._bound[index] == 0:
                for parameter in self._units[index].parameters:
                    self._still_ours(parameter, index)
            # A thread begins only where the slots suffice for all, also when its first unit is there already: threads
            # that each hold a part of what they need would wait for each other.
            while not mine.held and self._holders and not self._room_for_one_more:
                self.stats_.waits += 1
                self._changed.wait()
            slot = self._on_device(index, mine.order, waits=mine.held == 0)
            slot.leases += 1
            mine.held += 1
            thread = threading.get_ident()
            self._holders[thread] = self._holders.get(thread, 0) + 1
            if self._bound[index] == 0:
                for view, there in self._units[index].views(slot.memory_u8):
                    _point(view.parameter, there)
            self._bound[index] += 1
            self._prefetch(mine.order)
        self._down_links.compute_wait(slot.ready)

    @property
    def _room_for_one_more(self) -> bool:
        """Whether the slots suffice for one more whole call beside those of the threads that hold some."""
        return (len(self._holders) + 1) * self._depth <= len(self._slots)

    def _release(self, index: int, mine: _Local) -> None:
        if self.residency.resident[index]:
            return
        with self._changed:
            slot = self._slot_of[index]
            slot.used = join(slot.used, self._down_links.compute_mark(self._down_links.compute_stream()))
            slot.leases -= 1
            mine.held -= 1
            thread = threading.get_ident()
            self._holders[thread] -= 1
            if not self._holders[thread]:
                del self._holders[thread]
            self._bound[index] -= 1
            if self._bound[index] == 0:
                for view, host in self._at_rest(self._units[index]):
                    _point(view.parameter, host)
            self._changed.notify_all()

    def _still_ours(self, parameter: nn.Parameter, index: int) -> None:
        unit = self._units[index]
        start = self._host_bytes(unit).data_ptr()
        packed = any(p.packing is not None and p.views[0].parameter is parameter for p in unit.pieces)
        if packed or self._in_file[index]:
            same = parameter.numel() == 0
        else:
            same = start <= parameter.data_ptr() < start + unit.stored_bytes
        if not same:
            raise TierError(
                f"a parameter of {self._units[index].name} was given new data (by .to(), .half() or .data=) while "
                "tiered; close() first, change the module, and tier it again"
            )

    def _on_device(self, index: int, order: Order, *, waits: bool) -> Slot:
        """The slot with the unit's bytes, perhaps still on their way; counts how well it was foreseen."""
        order.advance(index)
        self._clock += 1
        slot = self._slot_of.get(index)
        if slot is None:
            slot = self._place(index, order, waits=waits)
            if slot.occupant == index:  # another thread brought it while this one waited
                self.stats_.late += 1
            else:
                self.stats_.miss += 1
                self._fetch(index, slot)
        elif self._down_links.over(slot.ready):
            self.stats_.timely += 1
        else:
            self.stats_.late += 1
        slot.touched = self._clock
        return slot

    def _fetch(self, index: int, slot: Slot) -> None:
        unit = self._units[index]
        source_u8 = self._source(unit)  # may fail, so before anything changes
        if slot.occupant is not None:
            del self._slot_of[slot.occupant]
        after = slot.settle(self._down_links)
        if unit.packed:
            # What was to arrive in the slot may still be on its way there by the other stream.
            slot.ready = self._expander.bring(unit, slot.memory_u8, source_u8, join(after, slot.ready))
        else:
            slot.ready = self._down_links.copy(slot.memory_u8[: unit.size_bytes], source_u8, join(after, slot.ready))
        self._copied(unit, slot.ready)
        slot.used = ()
        slot.occupant = index
        slot.touched = -1
        self._slot_of[index] = slot
        self.stats_.to_device_bytes += unit.stored_bytes

    def _place(self, index: int, order: Order, *, waits: bool) -> Slot:
        """A slot for a unit that is needed now: an empty one, else the one whose unit is needed last."""
        waited = False
        try:
            while True:
                if index in self._slot_of:
                    return self._slot_of[index]
                idle = [slot for slot in self._slots if slot.idle]
                if idle and (self._room_for_one_more or not waits or not self._holders):
                    best = max(idle, key=lambda slot: self._distance(slot, order))
                    if best.occupant is not None and best.touched < 0:
                        self.stats_.wasted += 1
                    return best
                if not waited and threading.get_ident() in self._holders:
                    self._waiting += 1
                    waited = True
                if self._waiting >= len(self._holders):  # nobody is left who could give one back
                    raise BudgetError(
                        f"all {len(self._slots)} slots hold weights that saved tensors still look at (activation "
                        f"checkpointing over many layers does that); pass slots={len(self._slots) + 1} or more, "
                        f"{self.residency.slot_bytes} bytes of device memory each"
                    )
                self.stats_.waits += 1
                self._changed.wait()
        finally:
            if waited:
                self._waiting -= 1

    def _distance(self, slot: Slot, order: Order) -> tuple[float, int]:
        """How far off the occupant's next use is; among equals, how long ago its last was."""
        if slot.occupant is None:
            return math.inf, 1 << 62
        return order.next_use(slot.occupant), -slot.touched

    def _prefetch(self, order: Order) -> None:
        """Begin copies of the units expected next, into idle slots whose units are needed later than they."""
        if self._files is not None:
            self._files.ahead(self._next_filed(order))
        spare = [slot for slot in self._slots if slot.idle]
        seen: set[int] = set()
        for steps, index in enumerate(order.ahead()):
            if not spare or steps > 4 * len(self._units):
                return
            if index in seen or self.residency.resident[index]:
                continue
            seen.add(index)
            held = self._slot_of.get(index)
            if held is not None:
                if held in spare:
                    spare.remove(held)
                continue
            best = max(spare, key=lambda slot: self._distance(slot, order))
            if best.occupant is not None and order.next_use(best.occupant) <= steps:
                return
            if self._files is not None and self._in_file[index] and not self._files.ready(index):
                return  # to wait for the disk now would hold up what is computed before
            spare.remove(best)
            if best.occupant is not None and best.touched < 0:
                self.stats_.wasted += 1
            self._fetch(index, best)
            self.stats_.prefetches += 1

    def _next_filed(self, order: Order) -> Iterator[int]:
        """Units expected next that must be read from files first."""
        for steps, index in enumerate(order.ahead()):
            if steps > 4 * len(self._units):
                return
            if self._in_file[index] and index not in self._slot_of and not self.residency.resident[index]:
                yield index

    # --- backward --------------------------------------------------------------------------------------------------

    @contextmanager
    def _saving(self, order: Order) -> Iterator[None]:
        """While active, tensors saved for backward that lie in slots are kept as places in units."""
        outer = _outer_hooks()

        def pack(saved: Tensor) -> Any:
            slot = self._by_address.get(saved.untyped_storage().data_ptr()) if saved.layout is torch.strided else None
            if slot is None or slot.occupant is None or saved.is_conj() or saved.is_neg():
                # Detached: an operation's own output would keep the operation alive, which keeps it, for ever.
                return saved.detach() if outer is None else _Outer(outer[1], outer[0](saved))
            unit = self._units[slot.occupant]
            return _Saved(
                unit.index,
                order,
                saved.dtype,
                tuple(saved.shape),
                saved.stride(),
                int(saved.storage_offset()) * saved.element_size(),
                tuple(parameter._version for parameter in unit.parameters),
            )

        def unpack(packed: Any) -> Tensor:
            if isinstance(packed, _Outer):
                return packed.unpack()
            return self._fetch_saved(packed) if isinstance(packed, _Saved) else packed

        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            yield

    def _fetch_saved(self, saved: _Saved) -> Tensor:
        unit = self._units[saved.unit]
        if tuple(parameter._version for parameter in unit.parameters) != saved.versions:
            raise RuntimeError(
                f"a weight of {unit.name} needed for gradient computation has been modified by an inplace operation "
                "since the forward; run the backward before the optimizer step"
            )
        with self._changed:
            if self._state != "open":
                raise TierError("backward after close(): the weights it needs are no longer on the device")
            if self.residency.resident[saved.unit]:
                raise TierError("the placement changed between forward and backward; run the forward again")
            slot = self._on_device(saved.unit, saved.order, waits=True)
            slot.read_on(self._down_links.compute_stream())
            bytes_u8 = slot.memory_u8[saved.start_bytes :]
            usable = bytes_u8.numel() // saved.dtype.itemsize * saved.dtype.itemsize
            value = bytes_u8[:usable].view(saved.dtype)
            value = value.as_strided(saved.shape, saved.stride, value.storage_offset())
            del bytes_u8
            self._prefetch(saved.order)
            self._down_links.compute_wait(slot.ready)
        return value

    # --- measuring -------------------------------------------------------------------------------------------------

    def _measure(self) -> None:
        """Take the peak of what ran so far as the room activations need, and give the rest to resident units.

        Raises:
            BudgetError: activations leave too little. Nothing has changed: the next pass measures, and says so, again.
        """
        if any(not slot.idle for slot in self._slots):
            self._measured = True
            return  # a graph is still alive: its saved weights must stay where they are said to be
        peak = torch.cuda.max_memory_allocated(self.device)
        activations = max(0, peak - self.residency.device_bytes - self._staged_bytes)
        try:
            fresh = self._plan(self._room_bytes(activations), first=False)
        except BudgetError as error:
            raise BudgetError(f"activations were measured at {activations} bytes: {error}") from error
        self._measured = True
        self.activation_bytes = activations
        self._down_links.drain()
        self._slots.clear()
        self._slot_of.clear()
        self._by_address.clear()
        self._install(fresh)


@dataclass(slots=True)
class _Outer:
    """A tensor packed by the hooks that were active around ours."""

    unpack_with: Callable[[Any], Tensor]
    packed: Any

    def unpack(self) -> Tensor:
        return self.unpack_with(self.packed)


def _outer_hooks() -> tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]] | None:
    """The innermost saved-tensor hooks now active; torch calls only those, so ours must pass on what is not theirs.

    Raises:
        Unsupported: ``no_outer_hooks``: this torch does not tell.
    """
    top = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    if top is None:
        raise Unsupported(
            "no_outer_hooks", f"torch {torch.__version__} does not tell which saved-tensor hooks are active"
        )
    found: tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]] | None = top(True)
    return found


def _point(parameter: nn.Parameter, at: Tensor) -> None:
    """Let the parameter look at other memory; same object, same version counter."""
    parameter.data = at


def _trains(unit: Unit) -> bool:
    return any(parameter.requires_grad for parameter in unit.parameters)


def _pageable(size_bytes: int) -> Slab:
    return plain_slab(size_bytes, torch.device("cpu"))


def tier(
    module: nn.Module,
    *,
    budget: Budget,
    device: torch.device | str = "cuda",
    slots: int = 2,
    reads_children: tuple[type[nn.Module], ...] = (),
    codec: str = "raw",
    decoder: WeightDecoder | None = None,
    links: tuple[Links, Links] | None = None,
    io: FileIO | None = None,
) -> Tiered:
    """Keep the module's weights on the host and bring them to ``device`` as its forward and backward need them.

    Args:
        module: any; calls to it and its submodules work as before, with inputs on ``device``.
        budget: see ``Budget``.
        device: where it computes; ``cpu`` stands in for a GPU in tests.
        slots: streamed units share at least this many places; raised where calls nest.
        reads_children: classes of submodules whose forward uses parameters of their children without calling them;
            torch's own are known.
        codec: ``nvfp4`` stores and moves the frozen weights of linear layers as 4-bit codes. Lossy: the module computes
            with decode(encode(w)), and so it is left. Weights that are no linear layer's, or tied to such, stay raw;
            ``plan`` tells each unit's ``stored_bytes``.
        decoder: of codes on the device; Triton's kernel on a GPU and plain torch elsewhere by default.
        links: stand-ins for tests: to the device, and back.
        io: stand-in for tests: the system calls of the files.

    Returns:
        the handle. ``close`` (or leaving it as a context manager) undoes it.

    Raises:
        BudgetError: too small, by how many bytes, and which knob.
        FolderBusyError, TierIOError: the folder of ``budget.dir`` is in use, or refuses; nothing has moved.
        TierError: the module, or a part of it, is tiered already.
        Unsupported: parameters that cannot be moved as bytes, or a torch without what this needs; and of a codec
            ``unknown_codec``, ``codec_trainable``, ``codec_shape``, ``codec_dtype``, ``nonfinite_weight``,
            ``no_decoder``.
    """
    storage_references(torch.empty(1, dtype=torch.uint8))
    _outer_hooks()
    tiered = tiered_modules()
    for part in module.modules():
        if part in tiered:
            raise TierError(f"{type(part).__name__} is tiered already; close() its handle first")
    handle = Tiered(module, budget, torch.device(device), slots, reads_children, links, io, codec, decoder)
    for part in module.modules():
        _tiered[part] = weakref.ref(handle)
    return handle


def _has_allocator(device: torch.device) -> bool:
    """Whether torch counts what it gives out there, so that activations can be measured."""
    return device.type == "cuda"


def tiered_modules() -> Mapping[nn.Module, Tiered]:
    """Modules tiered now, each with its handle."""
    return {part: handle for part, held in list(_tiered.items()) if (handle := held()) is not None}
