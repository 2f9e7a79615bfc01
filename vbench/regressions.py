"""Cases that once failed, one JSON object a line: they are tried before all others, on every backend, for good.

Keys: ``suite``, ``case`` (id), ``backend`` (``backend`` or ``backend[variant]``), ``outcome``, ``reason``, ``found``
(date), and ``note`` where someone wrote why.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path

from vbench import registry
from vbench.errors import CaseError, DataError
from vbench.record import Outcome, Record
from vbench.spec import Case, Suite


@dataclass(frozen=True, slots=True)
class Regression:
    """One line. ``case``: id; the rest says where it came from and decides nothing."""

    suite: str
    case: str
    backend: str
    outcome: str
    reason: str
    found: str
    note: str = ""


def data_file(reference: str) -> Path:
    """The file that ``package:file`` names. Raises DataError where the package is not on disk or not there."""
    package, _, name = reference.partition(":")
    try:
        return Path(str(resources.files(package).joinpath(name)))
    except (ModuleNotFoundError, ValueError) as error:
        raise DataError(f"{reference}: {error}; it must be 'package:file'") from None


def load(path: Path) -> list[Regression]:
    """The lines of a file; none where there is no file yet.

    Raises:
        DataError: a line that is no such object (file, line and rule named), or a case that stands there twice.
    """
    found: dict[str, Regression] = {}
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    for number, line in enumerate(text.splitlines(), start=1):
        try:
            one = Regression(**json.loads(line))
            Outcome(one.outcome)
        except (ValueError, TypeError) as error:
            raise DataError(f"{path}:{number}: no regression ({error})") from None
        if one.case in found:
            raise DataError(f"{path}:{number}: case {one.case} stands there twice")
        found[one.case] = one
    return list(found.values())


def cases_of(suite: Suite) -> tuple[Case, ...]:
    """The regressions of a suite, as cases.

    Raises:
        DataError: an operation that is not registered, or an id that is none.
    """
    if not suite.regressions:
        return ()
    path = data_file(suite.regressions)
    known, cases = registry.ops(), []
    for one in load(path):
        if one.suite != suite.name:
            continue
        op = known.get(one.case.partition("[")[0])
        if op is None:
            raise DataError(f"{path}: {one.case}: no such operation")
        try:
            cases.append(op.parse(one.case))
        except CaseError as error:
            raise DataError(f"{path}: {error}; correct the line or delete it") from None
    return tuple(cases)


def add(path: Path, suite: str, records: Iterable[Record]) -> list[Regression]:
    """Append those whose case is not there yet; returns them.

    Raises:
        DataError: the file cannot be read or written.
    """
    there = {one.case for one in load(path)}
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    new: dict[str, Regression] = {}
    for r in records:
        if r.case not in there:
            new.setdefault(r.case, Regression(suite, r.case, r.who, r.outcome.value, r.reason, today))
    lines = [json.dumps({k: v for k, v in asdict(one).items() if v != "" or k != "note"}) for one in new.values()]
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write("".join(line + "\n" for line in lines))
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}; name another file with --regressions") from None
    return list(new.values())
