"""Weights streamed raw against weights streamed as nvfp4 codes: ``python docs/tuning/tier_codec.py [--out DIR]``.

The stack of the suite's timed cases: 48 square bf16 layers of 8192 features, 6.44 GB, under 1 GiB of device memory. For
each codec the stack is tiered, one pass is held against the oracle bit for bit, and passes are timed at several token
counts (median of REPEATS, device included). ``tier_codec.json`` is written anew after each; about a minute on an H200.
Exit code 1 where a pass differs, or where nvfp4 is not FASTER times as fast as raw at the fewest tokens. With
``--device cpu`` and small sizes it tests itself: equality alone decides.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vbench.kernels.tiers.budget import Budget
from vbench.kernels.tiers.offload import LinearStack
from vbench.kernels.tiers.tiered import tier
from vbench.reference.offload import Weights, layer

REPEATS = 7
#: Of nvfp4 over raw where the link is what a pass waits for; codes alone would give 3.56.
FASTER = 2.5


def seconds(work: Callable[[], Any], device: torch.device) -> float:
    """Wall time of one call, device included."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def oracle(weights: Weights, x: Tensor) -> Tensor:
    """The pass, one decoded layer at a time."""
    for i in range(weights.layers):
        x = layer(x, weights.decoded(i), last=i == weights.layers - 1)
    return x


def measure(weights: Weights, gpu: str, tokens: Sequence[int], device: torch.device) -> dict[str, Any]:
    """One codec: placement, equality and times by token count."""
    stack = LinearStack(weights, trainable=False)
    budget = Budget(gpu=gpu, pinned=weights.layers * weights.width**2 * 3, activations=0)
    start = time.perf_counter()
    with tier(stack, budget=budget, device=device, codec=weights.codec) as handle, torch.no_grad():
        told: dict[str, Any] = {"tier_s": time.perf_counter() - start}
        told |= {name: value for name, value in handle.plan().items() if name != "units"}
        gen = torch.Generator(device).manual_seed(1)
        draws = [torch.randn(t, weights.width, generator=gen, device=device, dtype=torch.bfloat16) for t in tokens]
        first = stack(draws[0])
        told["equal"] = torch.equal(first, oracle(weights, draws[0])) and torch.equal(first, stack(draws[0]))
        for x in draws:
            stack(x)
            before = handle.stats()
            samples = [seconds(partial(stack, x), device) for _ in range(REPEATS)]
            after = handle.stats()
            told[f"tokens_{x.shape[0]}"] = {
                "samples_s": samples,
                "median_s": statistics.median(samples),
                "stats": {name: (after[name] - before[name]) / REPEATS for name in after},
            }
    return told


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, write, judge."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path(), metavar="DIR", help="where to write (here)")
    parser.add_argument("--layers", type=int, default=48)
    parser.add_argument("--width", type=int, default=8192)
    parser.add_argument("--gpu", default="1GiB")
    parser.add_argument("--tokens", type=int, nargs="+", default=[16, 1024, 8192])
    parser.add_argument("--device", default="cuda")
    given = parser.parse_args(argv)
    device = torch.device(given.device)
    given.out.mkdir(parents=True, exist_ok=True)
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else "none"
    report: dict[str, Any] = {"gpu": gpu, "torch": str(torch.__version__), "layers": given.layers, "width": given.width}
    for codec in ("raw", "nvfp4"):
        weights = Weights(given.layers, given.width, 0, str(device), codec)
        report[codec] = measure(weights, given.gpu, given.tokens, device)
        (given.out / "tier_codec.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print("| tokens | raw ms | nvfp4 ms | ratio | raw GB | nvfp4 GB |\n|---|---|---|---|---|---|")
    ratios = []
    for t in given.tokens:
        raw, coded = (report[codec][f"tokens_{t}"] for codec in ("raw", "nvfp4"))
        ratios.append(raw["median_s"] / coded["median_s"])
        moved = [one["stats"]["to_device_bytes"] / 1e9 for one in (raw, coded)]
        took = f"{raw['median_s'] * 1e3:.1f} | {coded['median_s'] * 1e3:.1f} | {ratios[-1]:.2f}"
        print(f"| {t} | {took} | {moved[0]:.2f} | {moved[1]:.2f} |")
    equal = report["raw"]["equal"] and report["nvfp4"]["equal"]
    print(f"{'EQUAL' if equal else 'DIFFERENT'}; target at {given.tokens[0]} tokens: {FASTER}, got {ratios[0]:.2f}")
    return int(not equal or (device.type == "cuda" and ratios[0] < FASTER))


if __name__ == "__main__":
    sys.exit(main())
