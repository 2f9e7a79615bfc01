"""Builds the wheel and uses it as a stranger would: installed in an environment of its own, run from an empty folder.

``python tests/wheel_check.py ENVIRONMENT``: a virtual environment that holds vbench's dependencies and not vbench
(``make wheel-test`` makes one). Exit status 1 and a sentence where anything is not as it should be.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
#: One file of each folder that is a link in the repository, and the data that the commands need.
WANTED = (
    "vbench/kernels/triton/backend.py",
    "vbench/kernels/tiers/stack.py",
    "vbench/reference/ops/fp4.py",
    "vbench/suites/fp4.py",
    "vbench/controls/products.py",
    "vbench/suites/virtual_blackwell/claims.toml",
    "vbench/templates/report.html.j2",
    "vbench/py.typed",
)
SYMLINK = 0o120000


def refuse(sentence: str) -> None:
    raise SystemExit(f"wheel: {sentence}")


def build(folder: Path) -> Path:
    """The wheel, made from a clean build folder of setuptools."""
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), str(ROOT)]
    subprocess.run(command, check=True)
    (wheel,) = folder.glob("*.whl")
    return wheel


def inspect(wheel: Path) -> None:
    """Every wanted file is in it, as a file; nothing lies outside ``vbench``; the baselines are there."""
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        links = [i.filename for i in archive.infolist() if (i.external_attr >> 16) & 0o170000 == SYMLINK]
    missing = [name for name in WANTED if name not in names]
    if missing or links:
        refuse(f"lacks {missing}, holds links {links}")
    outside = sorted({n.split("/")[0] for n in names} - {"vbench"})
    if any(not name.endswith(".dist-info") for name in outside):
        refuse(f"would install {outside} beside vbench")
    here = {str(p.relative_to(ROOT)) for p in (ROOT / "results" / "baselines").rglob("*.jsonl")}
    there = {n.removeprefix("vbench/") for n in names if n.startswith("vbench/results/baselines/")}
    if not here or here != there:
        refuse(f"baselines differ from the repository's: {sorted(here ^ there)}")


def vbench(environment: Path, folder: Path, *arguments: str, code: int = 0) -> str:
    """Output of the installed command, run from ``folder``, which must end with ``code``."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    command = [str(environment / "bin" / "vbench"), *arguments]
    done = subprocess.run(command, cwd=folder, env=clean, capture_output=True, text=True, check=False, timeout=300)
    if done.returncode != code:
        refuse(f"vbench {' '.join(arguments)} ended with {done.returncode}, not {code}: {done.stderr[-800:]}")
    return done.stdout


def use(environment: Path, folder: Path) -> None:
    """The commands a reader would try first, and one that must fail."""
    where = "import vbench, vbench.kernels, vbench.suites; print(vbench.__file__, vbench.kernels.__path__[0])"
    done = subprocess.run(
        [environment / "bin" / "python", "-I", "-c", where], cwd=folder, capture_output=True, text=True, check=True
    )
    if any(not Path(p).is_relative_to(environment) for p in done.stdout.split()):
        refuse(f"imports from {done.stdout}")
    listed: dict[str, Any] = json.loads(vbench(environment, folder, "list", "--json"))
    if listed["problems"] or len(listed["suites"]) < 5 or any(b["problem"] for b in listed["backends"]):
        refuse(f"vbench list finds too little: {listed['problems']}, {listed['suites']}, {listed['backends']}")
    judged = json.loads(vbench(environment, folder, "claims", "list", "--json"))
    if not any(claim["restated"] and claim["restated"]["rests_on"] for claim in judged):
        refuse("no claim rests on the shipped baselines")
    run = ("run", "--suite", "fp4", "--op", "fp4_dequantize", "--json")
    summary = json.loads(vbench(environment, folder, *run))
    if summary["exit"] != 0 or summary["outcomes"].get("PASSED", 0) < 100:
        refuse(f"vbench run: {summary['exit']}, {summary['outcomes']}")
    if not Path(folder / summary["records"]).is_file():
        refuse(f"no records in {summary['records']}")
    vbench(environment, folder, "run", "--suite", "fp5", code=2)
    proved = json.loads(vbench(environment, folder, "selftest", "--control", "write_past_end", "--json"))
    if proved["caught"] != 1 or proved["twins_accused"]:
        refuse(f"vbench selftest: {proved}")
    # No compiler is a dependency of ours, and to find none is no success; torch's build for CUDA brings Triton.
    look = "import importlib.util, sys; sys.exit(importlib.util.find_spec('triton') is None)"
    brought = subprocess.run([environment / "bin" / "python", "-I", "-c", look], check=False).returncode == 0
    vbench(environment, folder, "run", "--suite", "compile", code=0 if brought else 3)
    print(f"wheel: {sum(summary['outcomes'].values())} jobs from an empty folder, {summary['outcomes']}")


def main(arguments: list[str]) -> int:
    environment = Path(arguments[0]).resolve()
    with tempfile.TemporaryDirectory() as made, tempfile.TemporaryDirectory() as empty:
        wheel = build(Path(made))
        inspect(wheel)
        command = [str(environment / "bin" / "pip"), "install", "--quiet", "--no-deps", "--force-reinstall", str(wheel)]
        subprocess.run(command, check=True)
        use(environment, Path(empty))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
