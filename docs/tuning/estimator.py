"""Measure training steps on a GPU and compare with the estimate: ``python docs/tuning/estimator.py [--out DIR]``.

Each point is one model, workload and optimizer: real steps, then ``torch.cuda.max_memory_allocated`` of the second
(optimizer states exist from the first on). What is compared is the allocator's peak; the context is outside it. Writes
``estimator.json`` and the table ``estimator.md``, both anew after every point; about a minute on an H200. Exit code 1
if the median error is above 5 %, the worst above 15 %, or fewer than 40 points were measured.

With ``--device cpu`` it rehearses: every point's options on a model that is tiny, stepped for real; no allocator counts
there, so no peak is measured, and only a point that cannot be stepped fails.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from vbench.kernels.virtual.estimate import estimate
from vbench.kernels.virtual.hardware import find_card
from vbench.kernels.virtual.modules import LanguageModel
from vbench.kernels.virtual.program import Dtype, Workload
from vbench.kernels.virtual.shapes import PRESETS, ModelShape

DTYPES: tuple[Dtype, ...] = ("fp32", "bf16", "amp")
STEPS = 2
MEDIAN_LIMIT, WORST_LIMIT = 0.05, 0.15
LEAST_POINTS = 40


def points() -> Iterator[tuple[ModelShape, Workload, str]]:
    """At least 40 points over model, batch, sequence, numbers, attention, checkpointing, dropout and optimizer."""
    llama = PRESETS["llama-3-8b"]
    llama_4 = replace(llama, name="llama-3-8b, 4 layers", layers=4)
    llama_7b_4 = replace(PRESETS["llama-7b"], name="llama-7b, 4 layers", layers=4)
    for name, batch in (("gpt2", 8), ("vb-medium", 4), ("gpt2-medium", 4), ("vb-large", 8), ("gpt2-large", 2)):
        for dtype in DTYPES:
            for checkpointing in (False, True):
                yield PRESETS[name], Workload(batch, 1024, dtype, "sdpa", checkpointing), "adamw"
    for dtype in DTYPES:
        yield PRESETS["gpt2"], Workload(4, 1024, dtype, "eager", dropout=True), "adamw"
        yield PRESETS["gpt2"], Workload(16, 256, dtype, "eager"), "adamw"
        yield llama_7b_4, Workload(2, 1024, dtype, "sdpa"), "adamw"
    for shape in (llama_4, llama_7b_4):
        for checkpointing in (False, True):
            yield shape, Workload(4, 2048, "bf16", "sdpa", checkpointing), "adamw"
    yield llama_4, Workload(1, 4096, "amp"), "adamw"
    yield llama_4, Workload(2, 1024, "fp32"), "adamw"
    yield llama_4, Workload(2, 1024, "bf16", "eager"), "adamw"
    yield PRESETS["gpt2-xl"], Workload(2, 1024, "bf16"), "adamw"
    yield PRESETS["gpt2"], Workload(1, 128), "sgd"
    yield PRESETS["gpt2"], Workload(32, 128), "momentum"
    yield PRESETS["gpt2-medium"], Workload(2, 512), "sgd"


def make_optimizer(name: str, model: torch.nn.Module) -> torch.optim.Optimizer:
    """The fused optimizer an estimate speaks of."""
    if name == "adamw":
        return torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    return torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9 if name == "momentum" else 0.0, fused=True)


def small(shape: ModelShape, work: Workload) -> tuple[ModelShape, Workload]:
    """The point with everything kept that is not a size."""
    shape = replace(
        shape, layers=2, width=64, heads=4, kv_heads=4 if shape.kv_heads == shape.heads else 2, head_dim=16, inner=96,
        vocabulary=300, context=64,
    )  # fmt: skip
    return shape, replace(work, batch=1, sequence=16)


def measure(shape: ModelShape, work: Workload, optimizer: str, device: torch.device) -> int | None:
    """Peak bytes the allocator gave out during the last step; ``None`` on a CPU."""
    on_cuda = device.type == "cuda"
    with device:
        model = LanguageModel(
            shape, attention=work.attention, checkpointing=work.checkpointing, dropout=0.1 if work.dropout else 0.0
        )
        if work.dtype == "bf16":
            model = model.bfloat16()
        optim = make_optimizer(optimizer, model)
        ids, targets = (torch.randint(shape.vocabulary, (work.batch, work.sequence)) for _ in range(2))
    peak = None
    for _ in range(STEPS):
        if on_cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=work.dtype == "amp"):
            loss = model(ids, targets)
        loss.backward()
        optim.step()
        optim.zero_grad(set_to_none=True)
        del loss
        if on_cuda:
            torch.cuda.synchronize()
            peak = torch.cuda.max_memory_allocated()
    return peak


def matrix_workspace_bytes() -> int:
    """What cuBLAS keeps of the allocator once both threads have multiplied, with and without bias."""
    x = torch.ones(64, 64, device="cuda", requires_grad=True)
    for bias in (True, False):
        torch.nn.Linear(64, 64, bias=bias, device="cuda")(x).sum().backward()
    del x
    gc.collect()
    torch.cuda.synchronize()
    return torch.cuda.memory_allocated()


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, write, judge."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--out", type=Path, default=Path(), metavar="DIR", help="where to write (here)")
    arguments.add_argument("--limit-s", type=float, default=110.0, metavar="S", help="start no point after this (110)")
    arguments.add_argument("--show", type=int, default=8, metavar="N", help="rows to print, the worst first (8)")
    arguments.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu rehearses (cuda)")
    options = arguments.parse_args(argv)
    device, start, rows = torch.device(options.device), time.monotonic(), []
    on_cuda = device.type == "cuda"
    card = find_card("auto" if on_cuda else "h200")
    workspace, skipped = matrix_workspace_bytes() if on_cuda else 0, 0
    for shape, work, optimizer in points():
        if time.monotonic() - start > options.limit_s:
            skipped += 1
            continue
        if not on_cuda:
            shape, work = small(shape, work)
        predicted = estimate(shape, work, optimizer, card)
        row: dict[str, Any] = {"model": shape.name, **asdict(work), "optimizer": optimizer}
        try:
            row["measured_bytes"] = measure(shape, work, optimizer, device)
        except torch.cuda.OutOfMemoryError:
            row["measured_bytes"] = None
        gc.collect()
        if on_cuda:
            torch.cuda.empty_cache()
        row.update(predicted_bytes=predicted.allocated, peak_at=predicted.peak_at)
        if row["measured_bytes"]:
            row["error"] = predicted.allocated / row["measured_bytes"] - 1
        rows.append(row)
        write(options.out, summarise(rows, workspace, card.matrix_workspace_bytes, time.monotonic() - start), rows)
    summary = summarise(rows, workspace, card.matrix_workspace_bytes, time.monotonic() - start)
    summary["skipped"] = skipped
    write(options.out, summary, rows)
    # The worst ones and the summary; all of them are in the files.
    print("\n".join(table(summary, rows).splitlines()[: options.show + 4]))
    if not on_cuda:
        return int(len(rows) < LEAST_POINTS)
    bad = summary["median_error"] > MEDIAN_LIMIT or summary["worst_error"] > WORST_LIMIT
    return int(bad or summary["points"] < LEAST_POINTS)


def summarise(rows: list[dict[str, Any]], workspace: int, assumed: int, seconds: float) -> dict[str, Any]:
    """The errors of the rows measured so far."""
    errors = [abs(r["error"]) for r in rows if "error" in r] or [0.0]
    return {
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "torch": str(torch.__version__),
        "matrix_workspace_bytes": workspace,
        "matrix_workspace_bytes_assumed": assumed,
        "points": sum("error" in r for r in rows),
        "skipped": 0,
        "median_error": statistics.median(errors),
        "worst_error": max(errors),
        "seconds": seconds,
    }


def write(folder: Path, summary: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """Both files, anew."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "estimator.json").write_text(json.dumps({"summary": summary, "rows": rows}, indent=1) + "\n")
    (folder / "estimator.md").write_text(table(summary, rows))


def table(summary: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown, worst error first."""
    lines = [
        f"{summary['points']} points on {summary['gpu']}, torch {summary['torch']}: median error "
        f"{summary['median_error']:.2%}, worst {summary['worst_error']:.2%}; "
        f"cuBLAS workspaces {summary['matrix_workspace_bytes']:,} bytes, assumed "
        f"{summary['matrix_workspace_bytes_assumed']:,}",
        "",
        "| model | batch x seq | numbers | attention | ckpt | optimizer | measured | predicted | error | peak at |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in sorted(rows, key=lambda r: -abs(r.get("error", 0.0))):
        unmeasured = "out of memory" if torch.cuda.is_available() else "not measured"
        got = f"{r['measured_bytes'] / 1e9:.3f} GB" if r["measured_bytes"] else unmeasured
        error = f"{r['error']:+.2%}" if "error" in r else "-"
        lines.append(
            f"| {r['model']} | {r['batch']} x {r['sequence']} | {r['dtype']}{' dropout' if r['dropout'] else ''} | "
            f"{r['attention']} | {'yes' if r['checkpointing'] else 'no'} | {r['optimizer']} | {got} | "
            f"{r['predicted_bytes'] / 1e9:.3f} GB | {error} | {r['peak_at']} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
