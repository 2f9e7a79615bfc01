"""Wrong stacks of memory levels, and wrong fetches. What leaves level 1 lies in real files of a temporary folder."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vbench.control import Corpus
from vbench.controls.kit import BY_NAME, Register, Setting
from vbench.reference.fetch import fetched
from vbench.reference.ops.fetch import TIER_FETCH
from vbench.reference.ops.tiers import TIER_STACK
from vbench.reference.tiers import LEVELS, DictStack

control = Register()

TRACE: dict[str, int | str] = {
    "trace": "mixed",
    "keys": 12,
    "item_bytes": 64,
    "steps": 200,
    "gpu_bytes": 160,
    "host_bytes": 256,
    "file_bytes": 1 << 14,
}


class FileStack(DictStack):
    """The rules of ``reference.tiers``; a value in level 2 lies in a file, and only there.

    ``fault`` names what goes wrong; each fault is one branch, so that without it the class is the honest twin of all.
    """

    def __init__(self, capacities_bytes: tuple[int, int, int], folder: Path, fault: str) -> None:
        super().__init__(capacities_bytes)
        self.folder, self.fault = folder, fault
        self.freed: Tensor | None = None

    def path(self, key: str) -> Path:
        if self.fault == "key_escape":
            # Everything after the dot is taken for a suffix: all keys share a file.
            return (self.folder / key).with_suffix("")
        return self.folder / key

    def save(self, key: str, value: Tensor) -> None:
        path = self.path(key)
        if self.fault == "stale_file" and path.exists():
            return
        raw = value.numpy().tobytes()
        if self.fault == "torn_write" and len(raw) > 32:
            # The second half never reached the disk; the file has its full size all the same.
            raw = raw[: len(raw) // 2] + bytes(len(raw) - len(raw) // 2)
        path.write_bytes(raw)

    def load(self, key: str, like: Tensor) -> Tensor:
        raw = bytearray(self.path(key).read_bytes()[: like.numel()])
        raw.extend(bytes(like.numel() - len(raw)))
        return torch.frombuffer(raw, dtype=torch.uint8).clone()

    def insert(self, key: str, value: Tensor, level: int) -> None:
        while level < LEVELS and value.numel() > self.capacities[level]:
            level += 1
        while self.used(level) + value.numel() > self.capacities[level]:
            last = self.fault == "newest_first" and level == 0
            oldest = next(reversed(self.levels[level])) if last else next(iter(self.levels[level]))
            moved = self.levels[level].pop(oldest)
            if self.fault == "early_slot" and level == 0:
                # The slot is given to the new value while the old one is still being copied out of it.
                moved = torch.cat((value[: moved.numel() // 2], moved))[: moved.numel()]
            self.insert(oldest, moved, level + 1)
        if level == LEVELS - 1:
            self.save(key, value)
        self.levels[level][key] = value

    def move(self, key: str, to: int) -> Tensor:
        found = self.find(key)
        value = self.levels[found].pop(key)
        if found == LEVELS - 1:
            value = self.load(key, value)
        if self.fault == "promotion_keeps_age" and found == to == 0:
            self.levels[0][key] = value
            self.levels[0].move_to_end(key, last=False)
            return value
        self.insert(key, value, to)
        return value

    def put(self, key: str, value: Tensor) -> None:
        found = self.find(key)
        if self.fault == "lost_dirty_page" and found == 0 and self.levels[0][key].numel() == value.numel():
            # Only marked as used; that it is dirty is forgotten.
            self.levels[0].move_to_end(key)
            return
        super().put(key, value)

    def evict(self, key: str) -> None:
        if self.fault == "evict_skips_level" and self.find(key) == 0:
            self.move(key, LEVELS - 1)
        else:
            super().evict(key)


def replayed(s: Setting, fault: str) -> dict[str, Tensor]:
    """The trace on a FileStack; outputs as the op declares them."""
    read: list[Tensor] = []
    found_level: list[int] = []
    level_bytes: list[list[int]] = []
    hits = [0] * LEVELS
    with tempfile.TemporaryDirectory() as folder:
        stack = FileStack(s.inputs["capacities_bytes"], Path(folder), fault if s.wrong else "")
        for kind, key, index in s.inputs["steps"]:
            found = stack.find(key)
            found_level.append(found)
            if kind == "put":
                stack.put(key, s.inputs["values"][index])
            elif kind == "access":
                hits[found] += 1
                read.append(stack.access(key))
            elif kind == "promote":
                stack.move(key, 0)
            elif kind == "evict":
                stack.evict(key)
            else:
                stack.spill(key)
            level_bytes.append([stack.used(i) for i in range(LEVELS)])
    return {
        "values": torch.cat(read),
        "found_level": torch.tensor(found_level),
        "level_bytes": torch.tensor(level_bytes),
        "hits": torch.tensor(hits),
    }


def _stack(name: str, fault: str, **values: int | str) -> None:
    @control(
        TIER_STACK,
        TRACE | values,
        TRACE | values | {"seed": 1},
        family="tiers",
        oracle="value",
        fault=fault,
        name=name,
        returns=True,
    )
    def replay(s: Setting) -> Mapping[str, Any]:
        return replayed(s, name)


_stack("torn_write", "the second half of a file was never written")
_stack("stale_file", "a file that exists is not written again")
_stack("key_escape", "keys that differ after the dot share a file")
_stack("newest_first", "the newest value is evicted instead of the oldest")
_stack("early_slot", "a slot is reused before its old value was copied out")
_stack("promotion_keeps_age", "an access in level 0 makes a value the oldest, not the newest")
_stack("lost_dirty_page", "a value put over another of its size in level 0 is dropped", item_bytes=4)
_stack("evict_skips_level", "evict goes to the file level at once")

FETCH: dict[str, int | str] = {"fmt": "nvfp4", "y": "bf16", "n": 16, "k": 128}


@control(
    TIER_FETCH,
    FETCH | {"fmt": "raw", "dist": "grid", "y": "fp32"},
    family="fetch",
    oracle="value",
    fault="raw bits go through a float conversion: NaN payloads and subnormals change",
)
def converted_raw(s: Setting) -> Mapping[str, Any]:
    w = fetched(s.case, dict(s.inputs))
    return {"weight": torch.nan_to_num(w) if s.wrong else w}


@control(
    TIER_FETCH,
    FETCH,
    family="fetch",
    oracle="value",
    fault="the last chunk of the transfer is consumed before it arrived",
)
def early_chunk(s: Setting) -> Mapping[str, Any]:
    w = fetched(s.case, dict(s.inputs)).clone()
    if s.wrong:
        w[-4:] = w[-8:-4].clone()
    return {"weight": w}


@control(
    TIER_FETCH,
    FETCH,
    family="fetch",
    oracle="rerun",
    fault="of two staging buffers the second launch reads the one of the first",
)
def wrong_staging_buffer(s: Setting) -> Mapping[str, Any]:
    w = fetched(s.case, dict(s.inputs))
    return {"weight": w.roll(1, dims=0) if s.wrong and s.calls == 2 else w}


make = control.factory(BY_NAME)
CORPUS = Corpus("controls_stack", "wrong stacks and fetches", control.controls, "vbench.controls.stack:make")
