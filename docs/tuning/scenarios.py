"""Run the document's scenarios on a GPU: ``python docs/tuning/scenarios.py --out DIR``. About two minutes.

Each row is one ``virtual-blackwell train`` of a few steps under an allocator budget (so called: the driver knows
nothing of it). Rows that only differ in budget and tiers are compared: losses, step time and the GPU's peak. Writes
``scenarios.json`` and ``scenarios.md``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

#: (name, options). "free" rows have no budget and are what the others are held against.
MIXED = ["--mixed-precision", "--gradient-checkpointing"]
ROWS: tuple[tuple[str, list[str]], ...] = (
    ("student free", ["--preset", "medium", *MIXED]),
    ("student 8GB", ["--preset", "medium", *MIXED, "--vgpu-auto", "--budget", "8GB"]),
    ("student 4.5GB, tiered", ["--preset", "medium", *MIXED, "--vgpu-auto", "--budget", "4.5GB"]),
    ("startup free", ["--preset", "large", "--mixed-precision", "--use-flash-attn"]),
    ("startup 24GB", ["--preset", "large", "--mixed-precision", "--use-flash-attn", "--vgpu-auto", "--budget", "24GB"]),
    ("large fp32 free", ["--preset", "large", "--gradient-checkpointing"]),
    ("large fp32 5GB, tiered", ["--preset", "large", "--gradient-checkpointing", "--vgpu-auto", "--budget", "5GB"]),
    ("cluster", ["--preset", "large", *MIXED, "--vgpu-auto", "--use-fp4", "--use-flash-attn", "--budget", "24GB"]),
)
STEPS = 10


def run(name: str, options: list[str], folder: Path, data: Path) -> dict[str, Any]:
    """One training; a refusal (exit code 2) and a failure (1) are results too."""
    out = folder / name.replace(" ", "_").replace(",", "")
    argv = [sys.executable, "-m", "vbench.kernels.virtual.cli", "train", "--out", str(out), "--data", str(data)]
    argv += ["--steps", str(STEPS), "--checkpoint-every", "0", "--eval-batches", "1", "--sample", "0", *options]
    start = time.monotonic()
    done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=200)
    row: dict[str, Any] = {"name": name, "options": " ".join(options), "exit_code": done.returncode}
    row["seconds"] = time.monotonic() - start
    row["said"] = (done.stdout if done.returncode == 0 else done.stderr).splitlines()[-6:]
    row["plan"] = [line for line in done.stdout.splitlines() if line.startswith(("estimate:", "it fits", "tiers:"))]
    log = out / "log.jsonl"
    if done.returncode == 0:
        steps = [json.loads(line) for line in log.read_text().splitlines()]
        losses = [r for r in steps if "loss" in r]
        row["losses"] = [r["loss"] for r in losses]
        row["tokens_s"] = statistics.median(r["tokens_s"] for r in losses[3:])
        row["peak_bytes"] = losses[-1]["memory_bytes"]
        row["tiers"] = losses[-1].get("tiers")
    return row


def main() -> int:
    """Run every row."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(), metavar="DIR", help="where to write (here)")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = folder / "data.txt"
        data.write_text(
            "".join(p.read_text(encoding="utf-8") for p in sorted(Path(json.__file__).parent.parent.glob("*.py")))
        )
        rows = [run(name, argv, folder, data) for name, argv in ROWS]
    (options.out / "scenarios.json").write_text(json.dumps(rows, indent=1) + "\n")
    lines = ["| scenario | exit | tokens/s | GPU peak | last loss | plan |", "|---|---|---|---|---|---|"]
    for row in rows:
        if row["exit_code"]:
            lines.append(f"| {row['name']} | {row['exit_code']} | - | - | - | {' '.join(row['said'])} |")
            continue
        lines.append(
            f"| {row['name']} | 0 | {row['tokens_s']:,.0f} | {row['peak_bytes'] / 1e9:.2f} GB | "
            f"{row['losses'][-1]:.4f} | {'; '.join(row['plan'])} |"
        )
    text = "\n".join(lines) + "\n"
    (options.out / "scenarios.md").write_text(text)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
