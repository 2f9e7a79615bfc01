"""Who lies on which level, in bytes and in order of use: the state machine, without any memory. No torch.

One doubly linked list a level, least recent first, so that every operation costs O(1 + tensors it moves) links,
whatever the number of tensors; ``Ledger.steps`` counts them. A plan is applied at once and can be undone exactly
(a list node goes back between its old neighbours), which lets the stack do its fallible work between the two.

The rules are those of op ``tier_stack``:
    a tensor placed on a level becomes its most recent; a level that must make room moves its least recent tensor one
    level down, and so on; a tensor larger than a level's capacity passes it by; the last level has nothing below it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from vbench.kernels.tiers.errors import TierFullError, UnknownKeyError

#: "level" of a tensor that is not held
ABSENT = -1


class Entry:
    """A tensor's node: on the list of ``level``, between ``before`` (less recent) and ``after`` (more recent)."""

    __slots__ = ("after", "before", "key", "level", "size_bytes")

    def __init__(self, key: str, size_bytes: int) -> None:
        self.key = key
        self.size_bytes = size_bytes
        self.level = ABSENT
        self.before: Entry = self
        self.after: Entry = self


@dataclass(frozen=True, slots=True)
class Move:
    """A tensor's change of level, intermediate stops left out. ``ABSENT`` stands for outside the stack."""

    key: str
    was: int
    now: int


@dataclass(slots=True)
class Plan:
    """What one operation changed.

    Args:
        subject: the move of the tensor the operation names; ``was == now`` where it only became most recent.
        others: the tensors that made room, in the order they were first displaced, each with another final level.
    """

    subject: Move
    others: list[Move]
    _journal: list[tuple[str, Entry, int, Entry]] = field(default_factory=list)


class Ledger:
    """Levels with byte capacities.

    Args:
        capacities_bytes: of each level, fastest first.
    """

    def __init__(self, capacities_bytes: Sequence[int]) -> None:
        if not capacities_bytes or any(c < 0 for c in capacities_bytes):
            raise ValueError(f"capacities must be non-negative, at least one: {list(capacities_bytes)}")
        self.capacities_bytes = tuple(capacities_bytes)
        self.used_bytes = [0] * len(self.capacities_bytes)
        self.steps = 0
        self._entries: dict[str, Entry] = {}
        # a sentinel a level: its ``after`` is the least recent entry, its ``before`` the most recent
        self._ends = [Entry("", 0) for _ in self.capacities_bytes]
        self._journal: list[tuple[str, Entry, int, Entry]] = []

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, key: str) -> bool:
        return key in self._entries

    def level_of(self, key: str) -> int:
        """Level of ``key``, ``ABSENT`` if not held."""
        self.steps += 1
        entry = self._entries.get(key)
        return ABSENT if entry is None else entry.level

    def keys(self, level: int) -> list[str]:
        """Keys of a level, least recent first. Costs O(tensors); for inspection."""
        out = []
        entry = self._ends[level].after
        while entry is not self._ends[level]:
            out.append(entry.key)
            entry = entry.after
        return out

    def put(self, key: str, size_bytes: int, level: int = 0) -> Plan:
        """Drop any old value of ``key`` and place a new one on ``level``.

        Raises:
            TierFullError: nothing at or below the level can hold it, or what it displaces; the ledger is unchanged.
        """
        old = self._entries.get(key)
        was = ABSENT
        if old is not None:
            was = old.level
            self._unlink(old)
        entry = Entry(key, size_bytes)
        self._entries[key] = entry
        self._journal.append(("replaced", entry, ABSENT, old if old is not None else entry))
        return self._finish(entry, was, level)

    def move(self, key: str, level: int) -> Plan:
        """Take ``key`` out and place it on ``level``; in its own level it becomes most recent.

        Raises:
            UnknownKeyError: not held.
            TierFullError: as for ``put``.
        """
        entry = self._entries.get(key)
        if entry is None:
            raise UnknownKeyError(f"no tensor {key!r}")
        was = entry.level
        self._unlink(entry)
        return self._finish(entry, was, level)

    def remove(self, key: str) -> Plan:
        """Forget ``key``.

        Raises:
            UnknownKeyError: not held.
        """
        entry = self._entries.get(key)
        if entry is None:
            raise UnknownKeyError(f"no tensor {key!r}")
        was = entry.level
        self._unlink(entry)
        del self._entries[key]
        self._journal.append(("removed", entry, ABSENT, entry))
        return self._plan(Move(key, was, ABSENT))

    def undo(self, plan: Plan) -> None:
        """Restore the state before ``plan``: levels, bytes and order. Only the latest plan may be undone."""
        for what, entry, level, other in reversed(plan._journal):
            if what == "linked":
                self._detach(entry)
            elif what == "unlinked":
                self._attach(entry, level, other)
            elif what == "removed":
                self._entries[entry.key] = entry
            elif other is entry:  # replaced nothing
                del self._entries[entry.key]
            else:
                self._entries[entry.key] = other
        plan._journal.clear()

    def _finish(self, entry: Entry, was: int, level: int) -> Plan:
        try:
            self._insert(entry, level)
        except TierFullError:
            self.undo(self._plan(Move(entry.key, was, ABSENT)))
            raise
        return self._plan(Move(entry.key, was, entry.level))

    def _plan(self, subject: Move) -> Plan:
        journal, self._journal = self._journal, []
        first_level: dict[str, tuple[int, Entry]] = {}
        for what, entry, level, _ in journal:
            if what == "unlinked" and entry.key != subject.key:
                first_level.setdefault(entry.key, (level, entry))
        others = [Move(key, was, entry.level) for key, (was, entry) in first_level.items()]
        return Plan(subject, others, journal)

    def _insert(self, entry: Entry, level: int) -> None:
        last = len(self.capacities_bytes) - 1
        while entry.size_bytes > self.capacities_bytes[level]:
            if level == last:
                raise TierFullError(
                    f"{entry.key!r}: {entry.size_bytes} bytes, more than level {last} holds in all "
                    f"({self.capacities_bytes[last]}); raise its capacity"
                )
            level += 1
            self.steps += 1
        while self.used_bytes[level] + entry.size_bytes > self.capacities_bytes[level]:
            if level == last:
                short = self.used_bytes[level] + entry.size_bytes - self.capacities_bytes[level]
                raise TierFullError(f"{entry.key!r}: level {last} is full, {short} bytes short; raise its capacity")
            oldest = self._ends[level].after
            self._unlink(oldest)
            self._insert(oldest, level + 1)
        self._attach(entry, level, self._ends[level])
        self._journal.append(("linked", entry, level, entry))

    def _unlink(self, entry: Entry) -> None:
        self._journal.append(("unlinked", entry, entry.level, entry.after))
        self._detach(entry)

    def _detach(self, entry: Entry) -> None:
        self.steps += 1
        entry.before.after = entry.after
        entry.after.before = entry.before
        self.used_bytes[entry.level] -= entry.size_bytes
        entry.level = ABSENT

    def _attach(self, entry: Entry, level: int, after: Entry) -> None:
        self.steps += 1
        entry.after = after
        entry.before = after.before
        after.before.after = entry
        after.before = entry
        entry.level = level
        self.used_bytes[level] += entry.size_bytes
