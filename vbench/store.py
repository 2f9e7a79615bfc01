"""Append-only JSONL of records and of started jobs, fsynced one by one, and a small run.json beside them."""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import json
import math
import os
import secrets
import threading
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vbench.errors import DataError
from vbench.record import Outcome, Record

RECORDS = "records.jsonl"
STARTED = "started.jsonl"
PHASES = "phases.jsonl"
RUN_FILE = "run.json"


def new_run_id() -> str:
    """UTC time and six random hex digits, sortable by name."""
    return datetime.datetime.now(datetime.UTC).strftime("%Y%m%dT%H%M%S") + "-" + secrets.token_hex(3)


Key = tuple[str, str, str, str]


class RunStore:
    """One run's folder. Every finished record survives Ctrl-C, SIGKILL and a full disk later on.

    ``records.jsonl`` holds what ended. ``started.jsonl`` holds one line ``{"started": [kind, case, backend, variant]}``
    before each job that goes to a worker, and ``{"withdrawn": [...]}`` for one that an orderly interruption ended, so
    that a later run can tell which jobs were in flight when the harness itself was killed. ``phases.jsonl`` holds two
    lines for each phase of each process of the run, ``{"began": NAME}`` and ``{"ended": NAME, "wall_s": SECONDS}``.

    Args:
        folder: made here, or with ``resume`` opened again.
        plan_summary: written to ``run.json``; not used with ``resume``.
        resume: reopen the folder of an unfinished run; a line torn by the end of the process is cut off.

    Raises:
        DataError: the folder cannot be made, opened or written to, or another process is writing to it.
    """

    def __init__(self, folder: Path, plan_summary: Mapping[str, Any], *, resume: bool = False) -> None:
        self.folder = folder
        self._lock = threading.Lock()
        self._broken = False
        self.torn = 0
        try:
            if not resume:
                folder.mkdir(parents=True, exist_ok=False)
                _write_whole(folder / RUN_FILE, json.dumps(plan_summary, indent=1) + "\n")
            flags = os.O_RDWR | os.O_APPEND | os.O_CREAT
            self._fd = os.open(folder / RECORDS, flags, 0o644)
            try:
                # One writer a folder: a second one would do the same jobs again under the same ids.
                fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                self._started_fd = os.open(folder / STARTED, flags, 0o644)
            except OSError:
                os.close(self._fd)
                raise
        except BlockingIOError:
            raise DataError(
                f"results folder {folder}: another process is running into it; wait until it ends"
            ) from None
        except OSError as error:
            raise DataError(f"results folder {folder}: {error.strerror}; choose another with --out") from None
        if resume:
            self.torn = cut_torn_line(self._fd) + cut_torn_line(self._started_fd)

    @property
    def path(self) -> Path:
        return self.folder / RECORDS

    def append(self, record: Record) -> None:
        """Write one line and fsync. Raises DataError if the disk refuses; lines before it stay whole."""
        self._write(self._fd, record.to_json(), self.path)

    def started(self, key: Key) -> None:
        """Note, before it begins, that a job goes to a worker. Raises DataError as ``append`` does."""
        self._write(self._started_fd, json.dumps({"started": key}), self.folder / STARTED)

    def withdrawn(self, key: Key) -> None:
        """Note that a started job was ended by the user and is not to blame. Raises DataError as ``append`` does."""
        self._write(self._started_fd, json.dumps({"withdrawn": key}), self.folder / STARTED)

    def phase(self, name: str, wall_s: float | None = None) -> None:
        """Note that a phase of this process began, or ended after ``wall_s``. Raises DataError as ``append`` does."""
        path = self.folder / PHASES
        body = {"began": name} if wall_s is None else {"ended": name, "wall_s": wall_s}
        try:
            fd = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        except OSError as error:
            raise DataError(f"{path}: {error.strerror}; the records before it are kept") from None
        try:
            cut_torn_line(fd)
            self._write(fd, json.dumps(body), path)
        finally:
            os.close(fd)

    def _write(self, fd: int, line: str, path: Path) -> None:
        data = (line + "\n").encode()
        with self._lock:
            if self._broken:
                raise DataError(f"{path}: an earlier write failed; the records before it are kept")
            before = os.fstat(fd).st_size
            try:
                while data:
                    data = data[os.write(fd, data) :]
                os.fsync(fd)
            except OSError as error:
                # Another thread must not append to half a line.
                self._broken = True
                with contextlib.suppress(OSError):
                    os.ftruncate(fd, before)
                raise DataError(f"{path}: {error.strerror}; the records before it are kept") from None

    def close(self) -> None:
        os.close(self._started_fd)
        os.close(self._fd)


def _write_whole(path: Path, text: str) -> None:
    """Write a small file so that it is there whole or not at all."""
    temporary = path.with_suffix(".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def cut_torn_line(fd: int) -> int:
    """Cut a file back to its last newline: what follows is a write that a SIGKILL or a power failure ended.

    A line without its newline is cut too, even if it could be parsed: nobody was told that it is stored.

    Returns:
        how many bytes were cut.
    """
    size = os.fstat(fd).st_size
    end = size
    while end > 0:
        step = min(end, 1 << 16)
        chunk = os.pread(fd, step, end - step)
        newline = chunk.rfind(b"\n")
        if newline >= 0:
            end = end - step + newline + 1
            break
        end -= step
    if end < size:
        os.ftruncate(fd, end)
        os.fsync(fd)
    return size - end


def start_counts(folder: Path) -> Counter[Key]:
    """How often each job was begun in this run without being withdrawn; a job with a record counts too.

    Raises:
        DataError: a line of ``started.jsonl`` is neither (file, line and rule named).
    """
    path = folder / STARTED
    counts: Counter[Key] = Counter()
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    for number, line in enumerate(text.splitlines(), start=1):
        try:
            ((word, parts),) = json.loads(line).items()
            kind, case, backend, variant = (str(part) for part in parts)
            counts[(kind, case, backend, variant)] += {"started": 1, "withdrawn": -1}[word]
        except (ValueError, TypeError, KeyError, AttributeError):
            raise DataError(f"{path}:{number}: not {{started: [kind, case, backend, variant]}}") from None
    return counts


def phase_walls(folder: Path) -> tuple[dict[str, float], bool]:
    """Phase -> seconds by the clock on the wall, over all processes of a run that ended; and whether one did not.

    A folder from before phases were noted has none.

    Raises:
        DataError: a whole line of ``phases.jsonl`` is none of the two that are written (file and line named).
    """
    path = folder / PHASES
    walls: dict[str, float] = {}
    under_way = 0
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    for number, line in enumerate(text.splitlines(keepends=True), start=1):
        if not line.endswith("\n"):
            continue  # torn; the next process cuts it off
        try:
            body = json.loads(line)
            if "began" in body:
                under_way += 1
            else:
                walls[str(body["ended"])] = walls.get(str(body["ended"]), 0.0) + float(body["wall_s"])
                under_way -= 1
        except (ValueError, TypeError, KeyError):
            raise DataError(f"{path}:{number}: neither a phase that began nor one that ended") from None
    return walls, under_way > 0


def read_summary(folder: Path) -> dict[str, Any]:
    """What ``run.json`` of a run's folder says.

    Raises:
        DataError: none there, or not a JSON object.
    """
    path = folder / RUN_FILE
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as UTF-8 text ({error})") from None
    except json.JSONDecodeError as error:
        raise DataError(f"{path}: not JSON ({error.msg})") from None
    if not isinstance(body, dict):
        raise DataError(f"{path}: must be a JSON object")
    return body


def _files(path: Path) -> list[Path]:
    """A JSONL file, a run's file of records, or every ``*.jsonl`` below a folder (sorted by path)."""
    if path.is_dir():
        if (path / RECORDS).is_file():
            return [path / RECORDS]
        return [p for p in sorted(path.rglob("*.jsonl")) if p.name not in (STARTED, PHASES)]
    if path.is_file():
        return [path]
    raise DataError(f"{path}: no such file or folder of records")


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file}: cannot be read as UTF-8 text ({error})") from None


class _Ids:
    """Records by id, with the line of each, so that a second one of an id can be told from the first."""

    def __init__(self) -> None:
        self.records: dict[str, Record] = {}
        self._where: dict[str, str] = {}

    def add(self, record: Record, where: str) -> None:
        if record.id in self.records:
            first = self._where[record.id]
            raise DataError(
                f"{where}: id {record.id} occurs twice (first: {first}); a job leaves one record a run: remove one"
            )
        self.records[record.id] = record
        self._where[record.id] = where


def read_records(path: Path) -> list[Record]:
    """Records of a JSONL file, a run's folder, or every ``*.jsonl`` below a folder (sorted by path).

    Raises:
        DataError: nothing there, or a line that is no record (file, line and rule named), or an id seen twice.
    """
    found = _Ids()
    for file in _files(path):
        text = _text(file)
        for number, line in enumerate(text.splitlines(), start=1):
            if not line.strip():
                continue
            try:
                record = Record.from_json(line, f"{file}:{number}")
            except DataError as error:
                if text.endswith("\n") or number < text.count("\n") + 1:
                    raise
                resume = file.name == RECORDS and (file.parent / RUN_FILE).is_file()
                advice = f"vbench run --resume {file.parent}" if resume else "remove this line to keep the rest"
                raise DataError(f"{error}; the file was cut off here: {advice}") from None
            found.add(record, f"{file}:{number}")
    return list(found.records.values())


@dataclass(frozen=True, slots=True)
class Loaded:
    """What ``load_records`` could read.

    Args:
        records: a record whose times cannot be (zero, negative, infinite, not a number) is here without them, as
            INVALID(impossible_time).
        torn: ``file:line: why`` for each line that is not whole JSON.
    """

    records: tuple[Record, ...]
    torn: tuple[str, ...] = ()


def load_records(path: Path) -> Loaded:
    """As ``read_records``, but half-written lines are named and the rest kept, and impossible times make a record.

    Raises:
        DataError: nothing there, whole JSON that is no record, or an id seen twice.
    """
    found = _Ids()
    torn: list[str] = []
    for file in _files(path):
        for number, line in enumerate(_text(file).splitlines(), start=1):
            where = f"{file}:{number}"
            if not line.strip():
                continue
            try:
                body = json.loads(line)
            except json.JSONDecodeError as error:
                torn.append(f"{where}: not whole JSON ({error.msg} at column {error.colno})")
                continue
            impossible = _impossible_time(body)
            if impossible:
                kept = {**body, "measurements": [], "outcome": Outcome.INVALID.value, "reason": "impossible_time"}
                line = json.dumps({**kept, "detail": impossible})
            found.add(Record.from_json(line, where), where)
    return Loaded(tuple(found.records.values()), tuple(torn))


def _impossible_time(body: Any) -> str:
    """Which sample of a parsed record is no time, in words; ``""`` if each is, or if this is no record at all."""
    measurements = body.get("measurements") if isinstance(body, dict) else None
    for measured in measurements if isinstance(measurements, list) else ():
        samples = measured.get("samples_s") if isinstance(measured, dict) else None
        for i, sample in enumerate(samples if isinstance(samples, list) else ()):
            if isinstance(sample, float | int) and not (math.isfinite(sample) and sample > 0):
                return f"{measured.get('quantity')} sample {i} is {sample} s"
    return ""


def write_records(path: Path, records: Iterable[Record]) -> None:
    """Write a whole JSONL file, atomically replacing what was there."""
    temporary = path.with_suffix(".tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary.write_text("".join(r.to_json() + "\n" for r in records), encoding="utf-8")
    temporary.replace(path)
