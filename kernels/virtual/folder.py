"""A training's folder: one training at a time, its settings, and its log. Standard library only.

``run.json`` settings, ``data.bin`` the joined data, ``log.jsonl`` a line a step, ``checkpoint-*.safetensors``.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vbench.errors import DataError, UsageError

SETTINGS_FILE = "run.json"
LOG_FILE = "log.jsonl"
DATA_FILE = "data.bin"
_LOCK_FILE = ".lock"


class TrainingFolder:
    """Holds a folder for one training; ``close`` lets go.

    Args:
        path: made if missing.

    Raises:
        UsageError: another training holds it, or it cannot be made or written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            path.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(path / _LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except (OSError, ValueError) as error:  # the latter for a name with a NUL
            raise UsageError(
                f"--out {str(path)!r}: cannot be used: {getattr(error, 'strerror', '') or error}"
            ) from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._lock)
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                raise UsageError(f"--out {path}: another training is going on in this folder") from error
            raise UsageError(f"--out {path}: cannot be locked: {error.strerror or error}") from error

    def close(self) -> None:
        """Let go of the folder; closing the only descriptor of the lock releases it."""
        os.close(self._lock)

    @property
    def holds_training(self) -> bool:
        """Whether a training was begun here."""
        return (self.path / SETTINGS_FILE).exists()

    def write_settings(self, settings: Mapping[str, Any]) -> None:
        """Publish ``run.json`` at once or not at all."""
        temporary = self.path / (SETTINGS_FILE + ".tmp")
        with temporary.open("w", encoding="utf-8") as file:
            json.dump(dict(settings), file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self.path / SETTINGS_FILE)

    def forget(self) -> None:
        """Remove settings, data and log of a training that never began."""
        for name in (SETTINGS_FILE, DATA_FILE, LOG_FILE):
            (self.path / name).unlink(missing_ok=True)

    def read_settings(self) -> dict[str, Any]:
        """What ``write_settings`` wrote. Raises DataError if it is not that."""
        path = self.path / SETTINGS_FILE
        try:
            body = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise DataError(f"{path}: cannot be read: {error}") from error
        if not isinstance(body, dict):
            raise DataError(f"{path}: holds no settings")
        return body


class Log:
    """Appends one JSON object a line.

    Args:
        path: the file; lines of steps after ``after_step``, and a torn last line, are cut off, for they will be written
            again.
    """

    def __init__(self, path: Path, after_step: int) -> None:
        kept: list[bytes] = []
        if path.exists():
            for line in path.read_bytes().splitlines(keepends=True):
                try:
                    step = json.loads(line)["step"] if line.endswith(b"\n") else after_step + 1
                except (ValueError, KeyError, TypeError) as error:
                    raise DataError(f"{path}: line {len(kept) + 1} is no line of this log") from error
                if step > after_step:
                    break
                kept.append(line)
        temporary = path.with_suffix(".tmp")
        temporary.write_bytes(b"".join(kept))
        temporary.replace(path)
        self._file = path.open("a", encoding="utf-8")

    def write(self, line: Mapping[str, Any]) -> None:
        """Append; in the file when this returns, though not yet on the disk."""
        self._file.write(json.dumps(dict(line)) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()
