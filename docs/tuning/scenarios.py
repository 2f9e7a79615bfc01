"""Run the document's scenarios on a GPU: ``python docs/tuning/scenarios.py --out DIR``. About two minutes.

Each row is one ``virtual-blackwell train`` of a few steps under an allocator budget (so called: the driver knows
nothing of it), by the command's own ``main`` in this process, whose allocator is emptied in between. Rows that only
differ in budget and tiers are compared: losses, step time and the GPU's peak. Writes ``scenarios.json`` and
``scenarios.md`` anew after every row; a row that would begin after ``--limit-s`` is left out and counted.

``--rehearse`` runs the same rows with the tiny preset on a CPU, under budgets that leave as little room; without fused
attention, which is refused there.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import io
import json
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from vbench.kernels.virtual import cli

#: (name, options). "free" rows have no budget and are what the others are held against.
MIXED = ["--mixed-precision", "--gradient-checkpointing"]
CLUSTER = [*MIXED, "--use-fp4", "--use-flash-attn"]
ROWS: tuple[tuple[str, list[str]], ...] = (
    ("student free", ["--preset", "medium", *MIXED]),
    ("student 8GB", ["--preset", "medium", *MIXED, "--vgpu-auto", "--budget", "8GB"]),
    ("student 4.5GB, tiered", ["--preset", "medium", *MIXED, "--vgpu-auto", "--budget", "4.5GB"]),
    ("startup free", ["--preset", "large", "--mixed-precision", "--use-flash-attn"]),
    ("startup 24GB", ["--preset", "large", "--mixed-precision", "--use-flash-attn", "--vgpu-auto", "--budget", "24GB"]),
    ("large fp32 free", ["--preset", "large", "--gradient-checkpointing"]),
    ("large fp32 5GB, tiered", ["--preset", "large", "--gradient-checkpointing", "--vgpu-auto", "--budget", "5GB"]),
    ("large bare free", ["--preset", "large"]),
    ("cluster free", ["--preset", "large", *CLUSTER]),
    ("cluster 24GB", ["--preset", "large", *CLUSTER, "--vgpu-auto", "--budget", "24GB"]),
    ("cluster 3.5GB, tiered", ["--preset", "large", *CLUSTER, "--vgpu-auto", "--budget", "3.5GB"]),
)
#: What the GPU rows ask for -> what the tiny preset is asked for on a CPU. The last budget has no room for all of it.
SMALL = {"medium": "tiny", "large": "tiny", "8GB": "1GB", "24GB": "1GB", "4.5GB": "485MB", "5GB": "485MB"} | {
    "3.5GB": "485MB"
}
STEPS = 10
#: Two checkpoints of the largest preset, with room to spare.
SCRATCH_BYTES = 16 << 30


def run(name: str, options: list[str], folder: Path, data: Path) -> dict[str, Any]:
    """One training; a refusal (exit code 2) and a failure (1) are results too."""
    out = folder / name.replace(" ", "_").replace(",", "")
    argv = ["train", "--out", str(out), "--data", str(data), "--steps", str(STEPS), "--checkpoint-every", "0"]
    argv += ["--eval-batches", "1", "--sample", "0", *options]
    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(1.0)
        torch.cuda.reset_peak_memory_stats()
    said, complained = io.StringIO(), io.StringIO()
    start = time.monotonic()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(complained):
        code = cli.main(argv)
    row: dict[str, Any] = {"name": name, "options": " ".join(options), "exit_code": code}
    row["seconds"] = time.monotonic() - start
    # The folder is this run's only, and says where somebody keeps temporary files.
    words = (said if code == 0 else complained).getvalue().replace(f"{folder}/", "")
    row["said"] = words.splitlines()[-6:]
    plan = ("estimate:", "it fits", "tiers:", "fp4:")
    row["plan"] = [line for line in said.getvalue().splitlines() if line.startswith(plan)]
    if code == 0:
        steps = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
        losses = [r for r in steps if "loss" in r]
        row["losses"] = [r["loss"] for r in losses]
        row["tokens_s"] = statistics.median(r["tokens_s"] for r in losses[3:])
        row["peak_bytes"] = losses[-1]["memory_bytes"]
        row["tiers"], row["fp4"] = losses[-1].get("tiers"), losses[-1].get("fp4")
    shutil.rmtree(out, ignore_errors=True)  # the last checkpoint alone is several GB
    return row


def rehearsed(rows: tuple[tuple[str, list[str]], ...]) -> tuple[tuple[str, list[str]], ...]:
    """The same rows, small and on a CPU."""
    sizes = ["--batch", "2", "--seq", "32", "--device", "cpu", "--threads", "1"]
    return tuple(
        (name, [SMALL.get(word, word) for word in options if word != "--use-flash-attn"] + sizes)
        for name, options in rows
    )


def write(folder: Path, rows: list[dict[str, Any]], left_out: list[str]) -> str:
    """Both files, anew; returns the table."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    body = {"gpu": gpu, "torch": str(torch.__version__), "rows": rows, "left_out": left_out}
    (folder / "scenarios.json").write_text(json.dumps(body, indent=1) + "\n")
    lines = ["| scenario | exit | tokens/s | GPU peak | last loss | plan |", "|---|---|---|---|---|---|"]
    for row in rows:
        if row["exit_code"]:
            lines.append(f"| {row['name']} | {row['exit_code']} | - | - | - | {' '.join(row['said'])} |")
            continue
        lines.append(
            f"| {row['name']} | 0 | {row['tokens_s']:,.0f} | {row['peak_bytes'] / 1e9:.2f} GB | "
            f"{row['losses'][-1]:.4f} | {'; '.join(row['plan'])} |"
        )
    lines += [f"| {name} | left out: no time | - | - | - | - |" for name in left_out]
    text = "\n".join(lines) + "\n"
    (folder / "scenarios.md").write_text(text)
    return text


def main(argv: Sequence[str] | None = None, rows: tuple[tuple[str, list[str]], ...] = ROWS) -> int:
    """Run every row; exit code 1 if one is ``wrong``."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path(), metavar="DIR", help="where to write (here)")
    parser.add_argument("--limit-s", type=float, default=150.0, metavar="S", help="begin no row after this (150)")
    parser.add_argument("--rehearse", action="store_true", help="tiny models on a CPU")
    options = parser.parse_args(argv)
    rows = rehearsed(rows) if options.rehearse else rows
    options.out.mkdir(parents=True, exist_ok=True)
    start, text = time.monotonic(), ""
    done: list[dict[str, Any]] = []
    left_out: list[str] = []
    bad: list[str] = []
    with tempfile.TemporaryDirectory(dir=scratch()) as name:
        folder = Path(name)
        data = folder / "data.txt"
        data.write_text(
            "".join(p.read_text(encoding="utf-8") for p in sorted(Path(json.__file__).parent.parent.glob("*.py")))
        )
        for title, given in rows:
            if time.monotonic() - start > options.limit_s:
                left_out.append(title)
            else:
                done.append(run(title, given, folder, data))
            bad = [row["name"] for row in done if wrong(row, done)]
            text = write(options.out, done, left_out)
    print(text + (f"wrong: {', '.join(bad)}" if bad else ""))
    return int(bool(bad))


def wrong(row: dict[str, Any], rows: list[dict[str, Any]]) -> bool:
    """A row that failed though it may not, or whose first forward is not bitwise its free twin's.

    Later losses may differ where weights are tiered: their optimizer steps on the host. ``same_losses`` tells.
    """
    twin = next((r for r in rows if r["name"].endswith(" free") and row["name"].startswith(r["name"][:-5])), None)
    if row["exit_code"] or twin is None or "losses" not in twin:
        return bool(row["exit_code"])
    row["same_losses"] = twin["losses"] == row["losses"]
    return bool(twin["losses"][0] != row["losses"][0])


def scratch() -> Path | None:
    """Memory to write checkpoints to, where there is enough: several GB each would take the disk most of the minute."""
    shared = Path("/dev/shm")
    return shared if shared.is_dir() and shutil.disk_usage(shared).free > SCRATCH_BYTES else None


if __name__ == "__main__":
    sys.exit(main())
