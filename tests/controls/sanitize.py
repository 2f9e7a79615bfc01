"""``python -m vbench.controls.sanitize`` runs GPU controls under compute-sanitizer: it must report each, and no twin.

A red zone shows what is read or written within 4 KiB of a tensor, and a race only where it changes a value; the
sanitizer shows both at their source. It is far too slow for every check and is no part of one. About a minute.
Exit code 1 if a control was not reported or a twin was, 3 where the sanitizer does not run (no GPU, none installed, or
a machine on which it refuses the device), else 0.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass

#: Exit code asked of the sanitizer where it reports something.
REPORTED = 86
#: Of all runs, which go side by side: most of each is a start and a compilation on the host.
DEADLINE_S = 75.0
#: Where the toolkit's installer puts it.
TOOLKIT = "/usr/local/cuda/bin"
#: Tool -> controls of ``gpu_kernels.CHECKED``, each with its twin.
TOOLS = {"racecheck": ("missing_barrier",), "memcheck": ("read_past_x",)}


@dataclass(frozen=True, slots=True)
class Report:
    """One run. ``reported``: the sanitizer found something; ``ran``: sanitizer and kernel ran to their end."""

    tool: str
    name: str
    reported: bool
    ran: bool
    text: str


def command(sanitizer: str, tool: str, name: str) -> list[str]:
    options = ["--tool", tool, "--error-exitcode", str(REPORTED)]
    return [sanitizer, *options, sys.executable, "-m", "vbench.controls.gpu_kernels", name]


def read(tool: str, name: str, code: int, text: str) -> Report:
    """What an exit code and an output mean: a code of neither kind is no result."""
    refused = "Device not supported" in text or "No attachable process" in text
    return Report(tool, name, code == REPORTED, code in (0, REPORTED) and not refused, text)


def run(sanitizer: str, tool: str, name: str) -> Report:
    environment = {**os.environ, "NUMBA_ENABLE_CUDASIM": "0"}
    asked = command(sanitizer, tool, name)
    # A session of its own: the sanitizer's child must not keep the device when the sanitizer is ended.
    process = subprocess.Popen(
        asked, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, start_new_session=True
    )
    try:
        text, _ = process.communicate(timeout=DEADLINE_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return Report(tool, name, False, False, f"longer than {DEADLINE_S:g} s")
    return read(tool, name, process.returncode, text[-2000:])


def verdict(reports: list[Report]) -> int:
    if any(not r.ran for r in reports) or not reports:
        return 3
    return 0 if all(r.reported != r.name.endswith("+honest") for r in reports) else 1


def main() -> int:
    sanitizer = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=TOOLKIT)
    if sanitizer is None:
        print(f"compute-sanitizer is neither on the path nor in {TOOLKIT}: it comes with the CUDA toolkit")
        return 3
    asked = [(tool, name + end) for tool, names in TOOLS.items() for name in names for end in ("", "+honest")]
    reports = []
    with ThreadPoolExecutor(max_workers=len(asked)) as pool:
        for r in pool.map(lambda one: run(sanitizer, *one), asked):
            reports.append(r)
            word = "reported" if r.reported else "clean" if r.ran else f"did not run: {r.text.strip()[-300:]}"
            print(f"{r.tool:<10} {r.name:<24} {word}", flush=True)
    print(json.dumps([asdict(r) for r in reports]))
    return verdict(reports)


if __name__ == "__main__":
    raise SystemExit(main())
