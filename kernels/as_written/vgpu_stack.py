"""The document's VGPUStack, as its "technical details" print it, on plain torch. Wrong where the document is wrong.

Given by the document: three levels GPU -> CPU -> SSD; "LRU cache management"; ``access`` and ``_promote``, copied here
statement by statement (``VGPUStack.access``, ``VGPUStack._promote``).

Where it is silent, the plainest reading, and nothing that would repair it:
    ``levels[i]``   an LRU cache: ``put`` drops its least recently used tensors until the new one fits, and returns
                    False only for a tensor larger than the whole level. The code passes a level nothing but key and
                    tensor and gives the dropped tensor no receiver, so it is lost: the directory still names it, and
                    ``get`` answers None. (Variant ``refuse``: ``put`` never drops and returns False when full, the
                    other meaning "try to put it into the target level" may have. Nothing is lost, nothing moves up
                    into a full level.)
    put             a new tensor goes to the first level that takes it, from 0 on; an old one of the key is removed
                    first. A tensor that no level takes is not stored.
    evict, spill    ``_promote``, its only means of moving, to the next level and to the last.
    promote         ``access`` without a use of the value.
    level 0, 1, 2   tensors on the device; tensors on the CPU; one ``torch.save`` file each.
    recency         ``get`` and ``put`` make a tensor the most recent of its level.
A lost tensor weighs no bytes; where the trace asks for its value, the output keeps zeros.
"""

from __future__ import annotations

import tempfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from vbench.backend import Device, Launch
from vbench.errors import Unsupported
from vbench.spec import Case, Numerics

LEVELS = 3
#: how a level's ``put`` reads "try": make room by dropping, or refuse when full
VARIANTS = ("", "refuse")
WhenFull = Literal["drop", "refuse"]


def _size_bytes(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.numel() * tensor.element_size()


class Level:
    """An LRU cache of tensors in one kind of memory.

    Args:
        capacity_bytes: largest sum of its tensors' bytes.
        when_full: what ``put`` does without room.
        device: where the tensors lie; ``None`` for files.
        folder: of the files.
    """

    def __init__(
        self, capacity_bytes: int, when_full: WhenFull, device: torch.device | None, folder: Path | None = None
    ) -> None:
        self.capacity_bytes = capacity_bytes
        self.used_bytes = 0
        self._when_full = when_full
        self._device = device
        self._folder = folder
        self._files = 0
        self._sizes: OrderedDict[str, int] = OrderedDict()  # least recent first
        self._stored: dict[str, Tensor | Path | None] = {}

    def get(self, key: str) -> Tensor | None:
        """The tensor, which becomes most recent, or None."""
        if key not in self._sizes:
            return None
        self._sizes.move_to_end(key)
        stored = self._stored[key]
        if isinstance(stored, Path):
            loaded = torch.load(stored, weights_only=True)
            assert isinstance(loaded, Tensor)
            return loaded
        return stored

    def put(self, key: str, tensor: Tensor | None) -> bool:
        """Store the tensor as most recent; whether that was possible."""
        size = _size_bytes(tensor)
        if size > self.capacity_bytes:
            return False
        if self._when_full == "refuse" and self.used_bytes - self._sizes.get(key, 0) + size > self.capacity_bytes:
            return False
        self.remove(key)
        while self.used_bytes + size > self.capacity_bytes:
            self.remove(next(iter(self._sizes)))
        self._sizes[key] = size
        self._stored[key] = self._keep(tensor)
        self.used_bytes += size
        return True

    def remove(self, key: str) -> None:
        """Forget the tensor, if it is there."""
        if key in self._sizes:
            self.used_bytes -= self._sizes.pop(key)
            stored = self._stored.pop(key)
            if isinstance(stored, Path):
                stored.unlink()

    def _keep(self, tensor: Tensor | None) -> Tensor | Path | None:
        if tensor is None:
            return None
        if self._device is not None:
            return tensor.to(self._device, copy=True)
        assert self._folder is not None
        self._files += 1
        path = self._folder / f"{self._files}.pt"
        torch.save(tensor.cpu(), path)
        return path


class VGPUStack:
    """The document's class; ``access`` and ``_promote`` are its code."""

    def __init__(
        self, capacities_bytes: tuple[int, int, int], when_full: WhenFull, device: torch.device, folder: Path
    ) -> None:
        gpu_bytes, cpu_bytes, ssd_bytes = capacities_bytes
        self.levels = [
            Level(gpu_bytes, when_full, device),
            Level(cpu_bytes, when_full, torch.device("cpu")),
            Level(ssd_bytes, when_full, None, folder),
        ]
        self.directory: dict[str, int] = {}

    def access(self, key: str) -> Tensor | None:
        current_level = self.directory[key]

        tensor = self.levels[current_level].get(key)

        if current_level > 0:
            self._promote(key, tensor, current_level, 0)

        return tensor

    def _promote(self, key: str, tensor: Tensor | None, from_level: int, to_level: int) -> None:
        if self.levels[to_level].put(key, tensor):
            self.levels[from_level].remove(key)
            self.directory[key] = to_level

    def put(self, key: str, tensor: Tensor) -> None:
        """Not in the document: see the module's text."""
        if key in self.directory:
            self.levels[self.directory.pop(key)].remove(key)
        for number, level in enumerate(self.levels):
            if level.put(key, tensor):
                self.directory[key] = number
                return

    def move_down(self, key: str, to_level: int) -> None:
        """evict and spill; not in the document: see the module's text."""
        from_level = self.directory[key]
        if from_level < to_level:
            self._promote(key, self.levels[from_level].get(key), from_level, to_level)


def make(case: Case, variant: str, device: Device) -> VGPUStackKernel:
    """Factory for op ``tier_stack``: variant ``""`` (levels drop) or ``refuse``.

    Raises:
        Unsupported: ``unknown_variant``.
    """
    if variant not in VARIANTS:
        raise Unsupported("unknown_variant", f"tier_stack has no variant {variant!r} here: one of {VARIANTS}")
    return VGPUStackKernel("refuse" if variant == "refuse" else "drop")


class VGPUStackKernel:
    """Replays a trace on the document's stack and reports what it believes: ``found_level`` is the directory's word."""

    numerics = Numerics()
    produces = ("values", "found_level", "level_bytes", "hits")
    deterministic = True
    graph_safe = False

    def __init__(self, when_full: WhenFull) -> None:
        self._when_full: WhenFull = when_full

    def bind(self, inputs: Mapping[str, Any], out: Mapping[str, Any]) -> Launch:
        """Nothing to prepare: the stack and a temporary folder for its files are made anew in each launch.

        Args:
            inputs: ``capacities_bytes``, ``steps``, ``values`` as the op's generator makes them.
            out: all four outputs, written by the launch.
        """
        steps: list[tuple[str, str, int]] = inputs["steps"]
        values: list[Tensor] = inputs["values"]
        capacities: tuple[int, int, int] = inputs["capacities_bytes"]

        def launch() -> None:
            with tempfile.TemporaryDirectory(prefix="vbench-vgpu-") as folder:
                stack = VGPUStack(capacities, self._when_full, out["values"].device, Path(folder))
                _replay(stack, steps, values, out)

        return launch


def _replay(stack: VGPUStack, steps: list[tuple[str, str, int]], values: list[Tensor], out: Mapping[str, Any]) -> None:
    found_level: list[int] = []
    level_bytes: list[list[int]] = []
    hits = [0] * LEVELS
    sizes: dict[str, int] = {}
    done_bytes = 0
    out["values"].zero_()
    for kind, key, index in steps:
        found = stack.directory.get(key, -1)
        found_level.append(found)
        if kind == "put":
            stack.put(key, values[index])
            sizes[key] = values[index].numel()
        elif found == -1:  # no level took it: the document's directory lookup would end in a KeyError
            done_bytes += sizes[key] if kind == "access" else 0
        elif kind == "access":
            hits[found] += 1
            value = stack.access(key)
            if value is not None:
                out["values"][done_bytes : done_bytes + sizes[key]].copy_(value)
            done_bytes += sizes[key]
        elif kind == "promote":
            stack.access(key)
        else:
            stack.move_down(key, min(found + 1, LEVELS - 1) if kind == "evict" else LEVELS - 1)
        level_bytes.append([level.used_bytes for level in stack.levels])
    device = out["values"].device
    out["found_level"].copy_(torch.tensor(found_level, dtype=torch.int64, device=device))
    out["level_bytes"].copy_(torch.tensor(level_bytes, dtype=torch.int64, device=device).reshape(-1, LEVELS))
    out["hits"].copy_(torch.tensor(hits, dtype=torch.int64, device=device))
