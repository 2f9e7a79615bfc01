"""Runs the parts of a script that a GPU is rented for: isolated steps with limits, each on disk as soon as it ends.

No script of its own: ``systems.py`` and ``proofs.py`` say what their parts are.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
#: Last lines of a part's output that are printed again.
LINES = 14
#: A part is left out rather than begun with less than this.
LEAST_S = 15.0
#: From the interrupt, on which a command stores what it has and ends its workers, to the kill.
GRACE_S = 8.0

#: Part -> its arguments to Python and the seconds it may take.
Parts = Mapping[str, tuple[list[str], float]]


def run(part: str, argv: list[str], limit_s: float, out: Path) -> tuple[str, int | None]:
    """One part; its output goes to ``out/PART.log``. Returns the last lines and the exit code, ``None`` for no time."""
    log = out / f"{part}.log"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    # The interpreter's switches are for machines without a GPU; a rehearsal on one sets them back.
    environment |= {name: os.environ.get(f"REHEARSE_{name}", "0") for name in SWITCHES}
    code: int | None
    with log.open("wb") as sink:
        process = subprocess.Popen(
            [sys.executable, *argv], cwd=ROOT, env=environment, stdout=sink, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
        try:
            code = process.wait(timeout=limit_s)
        except subprocess.TimeoutExpired:
            code = None
            os.killpg(process.pid, signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=GRACE_S)
        finally:
            # What it left running in its session must not slow the next part.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-LINES:]), code


SWITCHES = ("TRITON_INTERPRET", "NUMBA_ENABLE_CUDASIM")


def write(path: Path, table: list[dict[str, object]]) -> None:
    """The table, anew and whole: a process that is killed leaves the one before or this one."""
    draft = path.with_suffix(".json.tmp")
    draft.write_text(json.dumps({"parts": table}, indent=1) + "\n", encoding="utf-8")
    draft.replace(path)


def parser(doc: str | None, limit_s: float) -> argparse.ArgumentParser:
    """Of a script whose docstring is ``doc``; ``limit_s`` is its default."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("parts", nargs="*", metavar="PART", help="which, in this order")
    made.add_argument("--out", type=Path, required=True, metavar="DIR", help="where everything is written")
    made.add_argument("--limit-s", type=float, default=limit_s, metavar="S", help=f"all parts together ({limit_s:g})")
    return made


def work(
    chosen: Sequence[str],
    known: Parts,
    out: Path,
    name: str,
    limit_s: float,
    lacking: Callable[[str], list[str]] = lambda part: [],
) -> int:
    """Run the parts, with ``out/NAME.json`` and a table at the end. Exit code 1 if any did not end with 0.

    Args:
        lacking: the packages that a part needs and that are not here; such a part is left out.
    """
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{name}.json"
    table: list[dict[str, object]] = []
    end = time.monotonic() + limit_s
    for part in chosen:
        command, part_s = known[part]
        start = time.monotonic()
        row: dict[str, object] = {"part": part, "ended": "running", "seconds": 0.0, "exit_code": None}
        table.append(row)
        if end - start < LEAST_S:
            row["ended"] = "left out: no time"
            continue
        if missing := lacking(part):
            row["ended"] = f"left out: no {', '.join(missing)}"
            continue
        write(path, table)
        said, code = run(part, command, min(part_s, end - start), out)
        row["seconds"] = time.monotonic() - start
        row["exit_code"] = code
        row["ended"] = "out of time" if code is None else f"exit code {code}"
        write(path, table)
        print(f"== {part} ==\n{said}\n", flush=True)
    write(path, table)
    for row in table:
        print(f"{row['part']:10} {row['seconds']:6.1f} s  {row['ended']}", flush=True)
    return int(any(row["exit_code"] != 0 for row in table))
