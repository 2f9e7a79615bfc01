"""Finds operations, suites, ledgers and backends by entry point. A broken plug-in becomes a problem, never a crash.

Our own backends' modules are light and loaded here. A stranger's backend is described by a child process, because its
import may print, hang or kill the interpreter.
"""

from __future__ import annotations

import contextlib
import difflib
import io
import json
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

from vbench.errors import UsageError
from vbench.spec import Case, Law, Op, Suite

OWN_DISTRIBUTION = "vbench-kernels"
#: Entry points of ``vbench.control.Corpus`` objects; no run takes them up.
CONTROLS = "vbench.controls"
ROLES = ("own", "peer", "subject")
DESCRIBE_DEADLINE_S = 60.0


@dataclass(frozen=True, slots=True)
class BackendInfo:
    """A backend as planned with: everything static about it, or why it cannot be loaded.

    Args:
        name: its entry point's name; a second claimant of a name is listed as ``name@distribution``.
        problem: stable code, ``""`` when it loaded: ``import_error``, ``prints_to_stdout``, ``duplicate_name``,
            ``not_a_backend``, ``crashed_on_load``, ``hung_on_load``.
        detail: the problem in words.
    """

    name: str
    distribution: str
    role: str = "own"
    summary: str = ""
    ops: Mapping[str, str] = field(default_factory=dict)
    variants: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    environment: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    timed: bool = True
    options: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    configurations: str = ""
    problem: str = ""
    detail: str = ""

    def variants_of(self, op: str) -> tuple[str, ...]:
        return self.variants.get(op, ("",))


def _distribution(entry: EntryPoint) -> str:
    return entry.dist.name if entry.dist is not None else "?"


def _entries(group: str) -> Iterator[EntryPoint]:
    """Entry points of a group, ours first, then by distribution and name, each (distribution, name, value) once."""
    found = {(_distribution(e), e.name, e.value): e for e in entry_points(group=group)}
    yield from (found[key] for key in sorted(found, key=lambda key: (key[0] != OWN_DISTRIBUTION, *key)))


def describe_object(name: str, distribution: str, backend: Any) -> BackendInfo:
    """Check that ``backend`` keeps the contract's static part and copy it."""

    def bad(detail: str) -> BackendInfo:
        return BackendInfo(name, distribution, problem="not_a_backend", detail=detail)

    for attribute in ("name", "role", "summary", "ops", "variants", "environment", "probe"):
        if not hasattr(backend, attribute):
            return bad(f"the object has no attribute {attribute!r} (see vbench.backend.Backend)")
    if backend.name != name:
        return bad(f"its name is {backend.name!r} but its entry point is {name!r}; make them equal")
    if backend.role not in ROLES:
        return bad(f"role {backend.role!r} is not one of {', '.join(ROLES)}")
    for op, factory in dict(backend.ops).items():
        if not (isinstance(factory, str) and ":" in factory):
            return bad(f"ops[{op!r}] must be 'module:factory', not {factory!r}")
    configurations = getattr(backend, "configurations", "")
    if not isinstance(configurations, str) or (configurations and ":" not in configurations):
        return bad(f"configurations must be 'module:function', not {configurations!r}")
    return BackendInfo(
        name=name,
        distribution=distribution,
        role=str(backend.role),
        summary=str(backend.summary),
        ops=dict(backend.ops),
        variants={op: tuple(v) for op, v in dict(backend.variants).items()},
        environment={d: dict(v) for d, v in dict(backend.environment).items()},
        timed=bool(getattr(backend, "timed", True)),
        options={op: tuple(names) for op, names in dict(getattr(backend, "options", {})).items()},
        configurations=configurations,
    )


def load_backend(entry: EntryPoint) -> tuple[BackendInfo, Any]:
    """Import in this process. Returns (info, object or None); never raises for the plug-in's faults."""
    name, distribution = entry.name, _distribution(entry)
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            backend = entry.load()
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        return BackendInfo(name, distribution, problem="import_error", detail=f"{type(error).__name__}: {error}"), None
    if printed.getvalue():
        detail = f"its import printed to stdout, which belongs to reports: {printed.getvalue()[:80]!r}"
        return BackendInfo(name, distribution, problem="prints_to_stdout", detail=detail), None
    info = describe_object(name, distribution, backend)
    return info, None if info.problem else backend


def _describe_in_child(entry: EntryPoint) -> BackendInfo:
    name, distribution = entry.name, _distribution(entry)
    command = [sys.executable, "-m", "vbench.describe", name, distribution]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=DESCRIBE_DEADLINE_S, check=False)
    except subprocess.TimeoutExpired:
        detail = f"importing it took longer than {DESCRIBE_DEADLINE_S:.0f} s"
        return BackendInfo(name, distribution, problem="hung_on_load", detail=detail)
    last = done.stdout.rstrip("\n").rpartition("\n")
    try:
        body = json.loads(last[2])
        if last[0]:
            detail = f"its import printed to stdout, which belongs to reports: {last[0][:80]!r}"
            return BackendInfo(name, distribution, problem="prints_to_stdout", detail=detail)
        for key in ("variants", "options"):
            body[key] = {op: tuple(v) for op, v in body[key].items()}
        return BackendInfo(**body)
    except (json.JSONDecodeError, KeyError, TypeError):
        detail = f"importing it ended the process with code {done.returncode}"
        return BackendInfo(name, distribution, problem="crashed_on_load", detail=detail)


def find_entry(name: str, distribution: str) -> EntryPoint:
    """The backend entry point, or that of a corpus of controls, that a distribution registers under ``name``."""
    for group in ("vbench.backends", CONTROLS):
        for entry in _entries(group):
            if entry.name == name and _distribution(entry) == distribution:
                return entry
    raise UsageError(f"no backend {name!r} of distribution {distribution!r} is installed")


def backends() -> dict[str, BackendInfo]:
    """Every registered backend by name, ours first."""
    found: dict[str, BackendInfo] = {}
    for entry in _entries("vbench.backends"):
        distribution = _distribution(entry)
        if entry.name in found:
            key = f"{entry.name}@{distribution}"
            detail = f"the name {entry.name!r} is already registered by {found[entry.name].distribution}; rename yours"
            found[key] = BackendInfo(key, distribution, problem="duplicate_name", detail=detail)
        elif distribution == OWN_DISTRIBUTION:
            found[entry.name] = load_backend(entry)[0]
        else:
            found[entry.name] = _describe_in_child(entry)
    return found


def corpora() -> dict[str, tuple[BackendInfo, Any]]:
    """Every registered corpus of controls by name, with its object; imported here, torch and all.

    Raises:
        UsageError: one cannot be loaded: a self-test must not shrink in silence.
    """
    found: dict[str, tuple[BackendInfo, Any]] = {}
    for entry in _entries(CONTROLS):
        info, corpus = load_backend(entry)
        if info.problem:
            raise UsageError(f"controls {entry.name!r} of {info.distribution}: {info.problem}: {info.detail}")
        if entry.name in found:
            raise UsageError(f"controls {entry.name!r} are registered by {info.distribution} too; rename one")
        found[entry.name] = (info, corpus)
    return found


def laws_of(op: str) -> Callable[[Case, dict[str, Any]], Iterable[Law]]:
    """The laws of an operation, all those registered for it; imported here, torch and all. Without any: none apply."""
    functions = [entry.load() for entry in _entries("vbench.laws") if entry.name == op]
    return lambda case, inputs: (law for function in functions for law in function(case, inputs))


@dataclass(frozen=True, slots=True)
class Problem:
    """An op, suite or ledger entry point that could not be loaded."""

    group: str
    name: str
    detail: str


def _load_light(group: str, problems: list[Problem]) -> Iterator[tuple[str, Any]]:
    for entry in _entries(group):
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                yield entry.name, entry.load()
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            problems.append(Problem(group, entry.name, f"{type(error).__name__}: {error}"))


def ops(problems: list[Problem] | None = None) -> dict[str, Op]:
    """Every registered operation by name."""
    found: dict[str, Op] = {}
    for _, table in _load_light("vbench.ops", problems if problems is not None else []):
        for op in table:
            found.setdefault(op.name, op)
    return found


def suites(problems: list[Problem] | None = None) -> dict[str, Suite]:
    """Every registered suite by name."""
    found: dict[str, Suite] = {}
    for name, suite in _load_light("vbench.suites", problems if problems is not None else []):
        found.setdefault(name, suite)
    return found


def ledger_paths(problems: list[Problem] | None = None) -> dict[str, Path]:
    """Every registered claims ledger: name -> TOML file."""
    found = _load_light("vbench.ledgers", problems if problems is not None else [])
    return {name: Path(path) for name, path in found}


def choose(what: str, wanted: Iterable[str], known: Iterable[str]) -> list[str]:
    """The wanted names in the order known, ``all`` or nothing meaning every one.

    Raises:
        UsageError: an unknown name; the message offers the nearest.
    """
    known = list(known)
    wanted = list(wanted)
    if not wanted or "all" in wanted:
        return known
    for name in wanted:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise UsageError(f"unknown {what} {name!r}{hint} (known: {', '.join(known)})")
    return [name for name in known if name in wanted]


def describe_to_json(info: BackendInfo) -> str:
    return json.dumps(asdict(info))
