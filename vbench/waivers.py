"""Known failures of other people's code: each names an issue, still runs, and is told when it passes after all.

A TOML file of ``[[waiver]]`` tables; a suite names it (``Suite.waivers``). A waiver excuses a record in verdicts; it
hides none. Our own backends can have none.
"""

from __future__ import annotations

import re
import tomllib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vbench import registry
from vbench.errors import CaseError, DataError
from vbench.record import EXCUSED, Outcome, Record
from vbench.regressions import data_file
from vbench.spec import Suite

_ISSUE = re.compile(r"https://[^/\s]+/[^/\s]+/[^/\s]+/(issues|pull)/\d+")


@dataclass(frozen=True, slots=True)
class Waiver:
    """One known failure.

    Args:
        issue: address of the issue it is known by.
        says: what is wrong, in a sentence.
        backend, variant, op: whose; ``variant`` ``*`` means any.
        outcome: how it ends.
        hardware: where (``sm_90``); ``""`` means everywhere.
        where: parameter -> values, of the cases it speaks of.
    """

    issue: str
    says: str
    backend: str
    op: str
    outcome: str
    variant: str = ""
    hardware: str = ""
    where: Mapping[str, tuple[int | str, ...]] = field(default_factory=dict)

    def speaks_of(self, record: Record) -> bool:
        """Whether the record is of one of its cases, however it ended."""
        if record.kind not in ("check", "time") or record.backend != self.backend:
            return False
        if self.variant not in ("*", record.variant) or self.hardware not in ("", record.hardware):
            return False
        op = registry.ops().get(self.op)
        if op is None or record.case.partition("[")[0] != self.op:
            return False
        try:
            case = op.parse(record.case)
            return all(case[name] in values for name, values in self.where.items())
        except CaseError:
            return False

    def excuses(self, record: Record) -> bool:
        return record.outcome == self.outcome and self.speaks_of(record)


def load(path: Path) -> tuple[Waiver, ...]:
    """The waivers of a file.

    Raises:
        DataError: not TOML, a key that is missing or unknown, or an issue that is no address of one.
    """
    try:
        body = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise DataError(f"{path}: cannot be read as TOML ({error})") from None
    unknown = set(body) - {"waiver"}
    if unknown:
        raise DataError(f"{path}: {sorted(unknown)[0]!r} is not [[waiver]]")
    return tuple(_waiver(path, number, entry) for number, entry in enumerate(body.get("waiver", ()), start=1))


def _waiver(path: Path, number: int, entry: Mapping[str, Any]) -> Waiver:
    where = {name: tuple(v) if isinstance(v, list) else (v,) for name, v in entry.get("where", {}).items()}
    try:
        made = Waiver(**{**entry, "where": where})
        Outcome(made.outcome)
    except (TypeError, ValueError) as error:
        raise DataError(f"{path}: waiver {number}: {error}") from None
    if not _ISSUE.fullmatch(made.issue):
        raise DataError(
            f"{path}: waiver {number}: issue {made.issue!r} is no address of an issue; without one, no waiver"
        )
    return made


def of_suites(suites: Iterable[Suite]) -> tuple[Waiver, ...]:
    """The waivers of these suites, each file read once."""
    files = dict.fromkeys(suite.waivers for suite in suites if suite.waivers)
    return tuple(waiver for file in files for waiver in load(data_file(file)))


@dataclass(frozen=True, slots=True)
class Waived:
    """What waivers say of some records: ids of excused ones with their waiver, and waivers of which nothing failed."""

    excused: Mapping[str, Waiver]
    passed: tuple[Waiver, ...]

    def lines(self) -> list[str]:
        """For people: one line a waiver that mattered."""
        texts = [f"{w.backend} {w.op} {w.outcome}: {w.says} ({w.issue})" for w in self.excused.values()]
        out = [f"waived    {n} of {text}" for text, n in Counter(texts).items()]
        for w in self.passed:
            out.append(f"UNEXPECTED PASS of {w.backend} {w.op}: {w.says} ({w.issue}); delete the waiver")
        return out


def judge(waivers: Sequence[Waiver], records: Sequence[Record]) -> Waived:
    """Records that a waiver excuses (never of role ``own``), and waivers whose cases ran and all passed."""
    excused: dict[str, Waiver] = {}
    passed = []
    for waiver in waivers:
        spoken = [r for r in records if r.role != "own" and waiver.speaks_of(r)]
        ran = [r for r in spoken if r.outcome is Outcome.PASSED or r.outcome not in EXCUSED]
        excused |= {r.id: waiver for r in spoken if waiver.excuses(r)}
        if ran and all(r.outcome is Outcome.PASSED for r in ran):
            passed.append(waiver)
    return Waived(excused, tuple(passed))
