"""Append-only JSONL of records, fsynced one by one, and a small run.json beside it."""

from __future__ import annotations

import datetime
import json
import os
import secrets
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from vbench.errors import DataError
from vbench.record import Record

RECORDS = "records.jsonl"


def new_run_id() -> str:
    """UTC time and six random hex digits, sortable by name."""
    return datetime.datetime.now(datetime.UTC).strftime("%Y%m%dT%H%M%S") + "-" + secrets.token_hex(3)


class RunStore:
    """One run's folder. Every finished record survives Ctrl-C, SIGKILL and a full disk later on.

    Raises:
        DataError: the folder cannot be made or written to.
    """

    def __init__(self, folder: Path, plan_summary: Mapping[str, Any]) -> None:
        self.folder = folder
        self._lock = threading.Lock()
        try:
            folder.mkdir(parents=True, exist_ok=False)
            (folder / "run.json").write_text(json.dumps(plan_summary, indent=1) + "\n", encoding="utf-8")
            self._fd = os.open(folder / RECORDS, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        except OSError as error:
            raise DataError(f"results folder {folder}: {error.strerror}; choose another with --out") from None

    @property
    def path(self) -> Path:
        return self.folder / RECORDS

    def append(self, record: Record) -> None:
        """Write one line and fsync. Raises DataError if the disk refuses; lines before it stay whole."""
        data = (record.to_json() + "\n").encode()
        with self._lock:
            try:
                while data:
                    data = data[os.write(self._fd, data) :]
                os.fsync(self._fd)
            except OSError as error:
                raise DataError(f"{self.path}: {error.strerror}; the records before it are kept") from None

    def close(self) -> None:
        os.close(self._fd)


def read_records(path: Path) -> list[Record]:
    """Records of a JSONL file, a run's folder, or every ``*.jsonl`` below a folder (sorted by path).

    Raises:
        DataError: nothing there, or a line that is no record (file, line and rule named), or an id seen twice.
    """
    if path.is_dir():
        files = [path / RECORDS] if (path / RECORDS).is_file() else sorted(path.rglob("*.jsonl"))
    elif path.is_file():
        files = [path]
    else:
        raise DataError(f"{path}: no such file or folder of records")
    records: dict[str, Record] = {}
    for file in files:
        try:
            text = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{file}: cannot be read as UTF-8 text ({error})") from None
        for number, line in enumerate(text.splitlines(), start=1):
            if not line.strip():
                continue
            record = Record.from_json(line, f"{file}:{number}")
            if record.id in records:
                raise DataError(f"{file}:{number}: id {record.id} occurs twice; a job leaves one record a run")
            records[record.id] = record
    return list(records.values())


def write_records(path: Path, records: Iterable[Record]) -> None:
    """Write a whole JSONL file, atomically replacing what was there."""
    temporary = path.with_suffix(".tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary.write_text("".join(r.to_json() + "\n" for r in records), encoding="utf-8")
    temporary.replace(path)
