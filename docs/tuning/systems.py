"""Everything about the systems that needs a GPU, in one command: ``python docs/tuning/systems.py --out DIR [PART...]``.

Parts, each a process of its own with its time limit; what a part wrote before it was cut off stays in DIR.

    tests      the tests that are skipped without a GPU: streams, slots, decoding into slots      40 s
    codec      offload_pass of raw against nvfp4 weights, 6.44 GB, 16 to 8192 tokens              60 s
    estimator  the table of estimated and measured peaks, at least 40 points                      70 s
    scenarios  the document's three scenarios under 8 and 24 GB                                   90 s
    overhead   a fully resident tiered stack against the plain one, in pairs of processes        100 s
    large      54 GB forward and backward under 8 GiB against all-resident, 101 GiB of host      120 s
    models     train_step of whole models under 8 and 24 GB and without: virtual, eager, fsdp2   240 s

All but ``models`` fit a call of ten minutes, even if each takes all of its time; ``models`` fits one of its own.

Prints one line a part at the end, and writes them to DIR/systems.json as parts end, with one for the part that is
running: a run that is cut off says where. After ``--limit-s`` no part begins, and none may run on past it. A part
whose packages are missing is left out and says which. Exit code 1 if any part failed, ran out of time or was left out.

``--rehearse`` runs the same parts on a CPU with everything small, about a minute: it finds what a GPU's minutes should
not be spent on, such as an argument nobody takes. ``python docs/tuning/targets.py`` judges what a run left in DIR.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib.metadata import distributions
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
GIB = 1 << 30


#: What an interpreter must be able to import. vbench finds its backends by its own metadata, so it must be installed.
PACKAGES = ("torch", "numpy")
OF_VBENCH = ("hypothesis", "vbench-kernels")
NEEDED = {"tests": ("pytest", "hypothesis"), "overhead": OF_VBENCH, "models": OF_VBENCH}


def lacking(part: str) -> list[str]:
    """Distributions this part needs and this interpreter has not."""
    found = {distribution.name.lower().replace("_", "-") for distribution in distributions() if distribution.name}
    return [name for name in (*PACKAGES, *NEEDED.get(part, ())) if name not in found]


def commands(out: Path, rehearse: bool = False) -> dict[str, tuple[list[str], float]]:
    """Part -> its command and the seconds it may take."""
    here, vbench = Path(__file__).parent, ["-m", "vbench"]
    device = "cpu" if rehearse else "cuda"
    sizes = "layers=3,width=64,tokens=4" if rehearse else "layers=12,width=8192,tokens=1024"
    resident = f"offload_pass[mode=forward,{sizes},gpu_bytes={4 * GIB}]"
    pairs, effort = ("2", "quick") if rehearse else ("5", "standard")
    codec = "--layers 5 --width 128 --gpu 100KiB --tokens 3 5" if rehearse else ""
    large = "--layers 6 --width 128 --tokens 8 --gpu 200KiB --activations 0 --pinned 10MB" if rehearse else ""
    small = ["--rehearse"] if rehearse else []
    tests = [f"tests/{name}.py" for name in ("test_tiers", "test_tiered_codec", "test_virtualize", "test_model_steps")]
    return {
        "tests": (["-m", "pytest", "-q", "-rs", *tests, "-k", "on_a_gpu or on_a_device"], 60),
        "codec": ([str(here / "tier_codec.py"), "--out", str(out), "--device", device, *codec.split()], 75),
        "estimator": ([str(here / "estimator.py"), "--out", str(out), "--device", device, "--limit-s", "60"], 85),
        "scenarios": ([str(here / "scenarios.py"), "--out", str(out), "--limit-s", "80", *small], 105),
        "overhead": (
            [*vbench, "ab", "torch_native[all_resident]", "tiers", "--case", resident, "--device", device,
             "--pairs", pairs, "--max-pairs", pairs, "--limit-s", "100", "--out", str(out / "runs")],
            115,
        ),
        "large": ([str(here / "tier_54gb.py"), "--out", str(out), "--device", device, *large.split()], 140),
        "models": (
            [*vbench, "run", "--suite", "model", "--op", "train_step", "--backend", "virtual", "--backend",
             "torch_native", "--effort", effort, "--device", device, "--out", str(out / "runs")],
            300,
        ),
    }  # fmt: skip


def run(part: str, argv: list[str], limit_s: float, out: Path) -> tuple[str, int | None]:
    """One part; its output goes to ``out/PART.log``. Returns the last lines and the exit code, ``None`` for no time."""
    log = out / f"{part}.log"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    # The interpreter's switches are for machines without a GPU.
    environment |= {"TRITON_INTERPRET": "0", "NUMBA_ENABLE_CUDASIM": "0"}
    code: int | None
    with log.open("wb") as sink:
        try:
            done = subprocess.run(
                [sys.executable, *argv], cwd=ROOT, env=environment, stdout=sink, stderr=subprocess.STDOUT,
                timeout=limit_s, check=False,
            )  # fmt: skip
            code = done.returncode
        except subprocess.TimeoutExpired:
            code = None
    return "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-LINES:]), code


LINES = 14


#: A part is left out rather than begun with less than this.
LEAST_S = 15.0


def write(out: Path, table: list[dict[str, object]]) -> None:
    """``systems.json``, anew and whole: a process that is killed leaves the one before or this one."""
    draft = out / "systems.json.tmp"
    draft.write_text(json.dumps({"parts": table}, indent=1) + "\n", encoding="utf-8")
    draft.replace(out / "systems.json")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the parts asked for, all by default."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help="which, in this order (all)")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where everything is written")
    parser.add_argument("--limit-s", type=float, default=580.0, metavar="S", help="for all parts together (580)")
    parser.add_argument("--rehearse", action="store_true", help="everything small, on a CPU")
    given = parser.parse_args(argv)
    given.out.mkdir(parents=True, exist_ok=True)
    known = commands(given.out.resolve(), given.rehearse)
    unknown = [part for part in given.parts if part not in known]
    if unknown:
        parser.error(f"no part {unknown[0]!r}: one of {', '.join(known)}")
    table: list[dict[str, object]] = []
    end = time.monotonic() + given.limit_s
    for part in given.parts or known:
        command, limit_s = known[part]
        start = time.monotonic()
        row: dict[str, object] = {"part": part, "ended": "running", "seconds": 0.0, "exit_code": None}
        table.append(row)
        if end - start < LEAST_S:
            row["ended"] = "left out: no time"
            continue
        if missing := lacking(part):
            row["ended"] = f"left out: no {', '.join(missing)}"
            continue
        write(given.out, table)
        said, code = run(part, command, min(limit_s, end - start), given.out)
        row["seconds"] = time.monotonic() - start
        row["exit_code"] = code
        row["ended"] = "out of time" if code is None else f"exit code {code}"
        write(given.out, table)
        print(f"== {part} ==\n{said}\n", flush=True)
    write(given.out, table)
    for row in table:
        print(f"{row['part']:10} {row['seconds']:6.1f} s  {row['ended']}", flush=True)
    return int(any(row["exit_code"] != 0 for row in table))


if __name__ == "__main__":
    sys.exit(main())
