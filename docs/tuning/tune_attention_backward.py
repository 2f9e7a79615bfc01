"""Check and time the Hopper attention backward on a GPU, beside PyTorch's own and the plain one, and print
one table.

    python docs/tuning/tune_attention_backward.py --out DIR [--rounds N] [--seconds S]

1. *Probes*: each tile of each head dim in a process of its own (one that crashes or hangs loses only itself), on shapes
from one tile to awkward tails, against the float64 oracle and its budget; dk and dv must also repeat bitwise.
2. *Timing* of what passed, beside the cuDNN and flash backwards called directly, in interleaved rounds of CUDA-graph
replays over two rotated input sets. 3. The table: TFLOP/s (10 b h sq sk d operations, half of that when causal), ratio
to the faster peer, and the parts of the time. Compare numbers of one run only.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

TOKENS, HIDDEN = 16384, 2048
LENGTHS = (1024, 4096, 16384)
#: (causal, dtype, layout, dist, dlse, b, hq, hk, sq, sk); the head dim comes from the tile.
SHAPES = (
    ("none", "bf16", "bhsd", "normal", 0, 1, 1, 1, 128, 128),
    ("none", "bf16", "bhsd", "normal", 0, 1, 2, 2, 512, 512),
    ("top_left", "bf16", "bhsd", "normal", 0, 2, 4, 4, 512, 512),
    ("bottom_right", "bf16", "bhsd", "normal", 1, 2, 4, 2, 1024, 1024),
    ("none", "fp16", "bhsd", "normal", 0, 2, 4, 2, 127, 129),
    ("top_left", "bf16", "bshd", "normal", 1, 1, 4, 1, 257, 300),
    ("bottom_right", "fp16", "bhsd", "normal", 0, 1, 2, 2, 300, 100),
    ("bottom_right", "bf16", "bhsd", "normal", 0, 3, 2, 1, 1, 1023),
    ("none", "bf16", "padded", "normal", 1, 1, 2, 2, 1, 1),
    ("top_left", "fp16", "bhsd", "normal", 0, 2, 4, 4, 700, 90),
    ("bottom_right", "bf16", "bshd", "large_logits", 0, 2, 4, 2, 700, 900),
    ("none", "bf16", "bhsd", "equal_keys", 0, 1, 2, 2, 320, 192),
)


def poisoned(inputs: Any) -> dict[str, Any]:
    """dq, dk, dv full of NaN, so that an element nothing wrote shows."""
    import torch

    return {
        name: torch.full(inputs[like].shape, float("nan"), dtype=inputs[like].dtype, device="cuda")
        for name, like in (("dq", "q"), ("dk", "k"), ("dv", "v"))
    }


def bind(case: Any, inputs: Any, out: Any, tile: Any) -> tuple[Callable[[], Any], ...]:
    """The candidate's three launches. ``tile``: deterministic, then the fields of a GluonBackwardTile."""
    from vbench.kernels.triton.attention import Shape
    from vbench.kernels.triton.attention_backward_gluon_host import GluonBackwardTile, make_gluon_backward

    shape = Shape.of(case)
    parts: tuple[Callable[[], Any], ...] = make_gluon_backward(shape, "cuda", deterministic=tile[0]).bind_parts(
        inputs, out, GluonBackwardTile(*tile[1:])
    )
    return parts


def probe(d: int, tile: Any, shape: Any) -> dict[str, Any]:
    """Worst error / budget of each output on one shape, and whether a second run gave the same bits."""
    import torch

    from vbench.reference.attention_backward import backward_inputs, backward_oracle
    from vbench.reference.ops.attention import ATTENTION_BACKWARD
    from vbench.spec import Numerics

    names = ("causal", "dtype", "layout", "dist", "dlse", "b", "hq", "hk", "sq", "sk")
    case = ATTENTION_BACKWARD.case(**dict(zip(names, shape, strict=True)), d=d)
    inputs = backward_inputs(case, "cuda")
    results = []
    start = time.perf_counter()
    for _ in range(2):
        out = poisoned(inputs)
        for part in bind(case, inputs, out, tile):
            part()
        torch.cuda.synchronize()
        results.append(out)
    seconds = time.perf_counter() - start
    numerics = Numerics(accumulate="tensor_core", probabilities=case.text("dtype"))
    worst = {}
    for name, expected in backward_oracle(case, inputs, numerics, None).items():
        assert expected.budget is not None
        got = results[0][name].double()
        ratio = (got - expected.value).abs() / expected.budget.clamp(min=1e-300)
        ratio = torch.where(got == expected.value, 0.0, ratio)
        worst[name] = float(torch.nan_to_num(ratio, nan=math.inf).max())
    same = [name for name in worst if torch.equal(results[0][name], results[1][name])]
    return {"d": d, "tile": tile, "shape": shape, "worst": worst, "same": same, "two_launches_s": round(seconds, 2)}


def run_probes(jobs: list[tuple[int, Any]], seconds: float) -> list[dict[str, Any]]:
    """A child process a tile, all at once; one out of time is killed, and the shapes it did not finish are marked."""
    children = [
        subprocess.Popen(
            [sys.executable, __file__, "--probe", json.dumps(job)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for job in jobs
    ]  # fmt: skip
    deadline = time.monotonic() + seconds
    results: list[dict[str, Any]] = []
    for (d, tile), child in zip(jobs, children, strict=True):
        try:
            text, errors = child.communicate(timeout=max(1.0, deadline - time.monotonic()))
            note = errors[-600:]
        except subprocess.TimeoutExpired:
            child.kill()
            text, errors = child.communicate()
            note = "out of time; " + errors[-300:]
        lines = [json.loads(line) for line in text.splitlines() if line.startswith("{")]
        results += lines
        for shape in SHAPES[len(lines) :]:
            results.append(
                {"d": d, "tile": tile, "shape": shape, "worst": {"all": math.inf}, "same": [], "error": note}
            )
    return results


def right(result: dict[str, Any]) -> bool:
    repeat = {"dk", "dv"} | ({"dq"} if result["tile"][0] else set())
    return max(result["worst"].values()) <= 1.0 and repeat <= set(result["same"])


def peer(name: str, inputs: Any, causal: bool) -> Callable[[], Any]:
    """A backward of PyTorch, its forward already run: the library's own operator, no autograd around it."""
    import torch

    q, k, v = (inputs[n].detach() for n in ("q", "k", "v"))
    aten = torch.ops.aten
    if name == "cudnn":
        made = aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, causal, False)
        out, lse, cum_q, cum_k, max_q, max_k, seed, offset, _ = made
        sizes = (cum_q, cum_k, max_q, max_k, 0.0, causal)
        no_bias = None
        return lambda: aten._scaled_dot_product_cudnn_attention_backward(
            inputs["dout"], q, k, v, out, lse, seed, offset, no_bias, *sizes
        )
    made = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, False)
    out, lse, cum_q, cum_k, max_q, max_k, seed, offset, _ = made
    sizes = (cum_q, cum_k, max_q, max_k, 0.0, causal)
    return lambda: aten._scaled_dot_product_flash_attention_backward(
        inputs["dout"], q, k, v, out, lse, *sizes, seed, offset
    )


def make_inputs(case: Any, seed: int) -> dict[str, Any]:
    """Random q, k, v, dout and a right forward's out and lse, from the library's flash forward."""
    import torch

    generator = torch.Generator("cuda").manual_seed(seed)
    shape = [case.axis(name) for name in ("b", "hq", "sq", "d")]
    made = {
        name: torch.randn(shape, generator=generator, device="cuda").to(torch.bfloat16)
        for name in ("q", "k", "v", "dout")
    }
    causal = case.text("causal") != "none"
    forward = torch.ops.aten._scaled_dot_product_flash_attention(made["q"], made["k"], made["v"], 0.0, causal, False)
    return {**made, "out": forward[0].contiguous(), "lse": forward[1].contiguous()}


def label(tile: Any) -> str:
    deterministic, block_m, q_stages, consumers, *switches = tile
    letters = "".join(letter for letter, on in zip("efr", switches, strict=True) if on)
    return f"{'det' if deterministic else ''}{block_m}c{consumers}q{q_stages}{letters}"


def time_cell(d: int, causal: str, length: int, tiles: list[Any], rounds: int) -> dict[str, Any]:
    """Median seconds of each peer, candidate and part in one cell, in interleaved rounds."""
    from tune_attention import graph_of, replay_in_turn

    from vbench.reference.ops.attention import ATTENTION_BACKWARD

    b, h = TOKENS // length, HIDDEN // d
    case = ATTENTION_BACKWARD.case(causal=causal, b=b, hq=h, hk=h, sq=length, sk=length, d=d)
    # Half of all pairs when causal, as the peers count, and not the op's exact number of visible ones.
    flops = 10 * b * h * length * length * d * (1.0 if causal == "none" else 0.5)
    sets = [make_inputs(case, seed) for seed in range(2)]
    outs = [poisoned(inputs) for inputs in sets]
    repeats = max(2, 2 * round(0.5 * 6e-3 / (flops / 5e14)))
    graphs: dict[str, Any] = {}
    # A graph holds addresses, not tensors, and each capture empties torch's cache: what a graph reads must stay alive.
    kept: list[Any] = []
    notes: dict[str, str] = {}
    for name in ("cudnn", "flash"):
        try:
            kept.append([peer(name, inputs, causal != "none") for inputs in sets])
            graphs[name] = graph_of(kept[-1], repeats)
        except (RuntimeError, TypeError, ValueError):  # a peer's fault must not cost the run; it is shown
            notes[name] = traceback.format_exc()[-300:]
    from vbench.kernels.triton.attention_backward import make

    plain = make(case, "", "cuda")
    kept.append([plain.bind(inputs, out) for inputs, out in zip(sets, outs, strict=True)])
    graphs["plain"] = graph_of(kept[-1], repeats)
    for tile in tiles:
        bound = [bind(case, inputs, out, tile) for inputs, out in zip(sets, outs, strict=True)]
        kept.append(bound)
        launches = [lambda parts=parts: [part() for part in parts] for parts in bound]
        graphs[label(tile)] = graph_of(launches, repeats)
        for i, part in enumerate(("prepare", "multiply", "finish")):
            graphs[f"{label(tile)}.{part}"] = graph_of([parts[i] for parts in bound], repeats)
    samples = replay_in_turn(graphs, rounds, repeats)
    seconds = {name: statistics.median(values) for name, values in samples.items()}
    return {"d": d, "causal": causal, "s": length, "flops": flops, "seconds": seconds, "samples_s": samples, **notes}


def show(row: dict[str, Any]) -> str:
    """One line of the table: TFLOP/s of all, ratios to the faster peer, parts of the candidates in microseconds."""
    seconds, flops = row["seconds"], row["flops"]
    rates = {name: flops / s / 1e12 for name, s in seconds.items() if "." not in name}
    peers = [rates[name] for name in ("cudnn", "flash") if name in rates]
    parts = [f"D{row['d']} {row['causal'][:4]} S{row['s']:5d}"]
    for name, rate in rates.items():
        text = f"{name} {rate:.0f}"
        if name not in ("cudnn", "flash"):
            if peers:
                text += f" ({rate / max(peers):.2f})"
            parts_s = [seconds[key] for p in ("prepare", "multiply", "finish") if (key := f"{name}.{p}") in seconds]
            text += " " + "+".join(f"{s * 1e6:.0f}" for s in parts_s)
        parts.append(text)
    return " | ".join(parts) + "".join(f" {name}: {row[name][-100:]!r}" for name in ("cudnn", "flash") if name in row)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(), help="folder for attention_backward.json")
    parser.add_argument("--probe", help="internal: JSON [head dim, tile] of a child of stage 1")
    parser.add_argument("--seconds", type=float, default=90.0, help="deadline of stage 1")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    if arguments.probe:
        d, tile = json.loads(arguments.probe)
        for shape in SHAPES:
            print(json.dumps(probe(d, tile, shape)), flush=True)
        return
    from dataclasses import astuple

    from vbench.kernels.triton.attention_backward_gluon_host import DETERMINISTIC_TILES, TILES

    began = time.monotonic()
    jobs = [
        (d, (deterministic, *astuple(tile)))
        for deterministic, table in ((False, TILES), (True, DETERMINISTIC_TILES))
        for d, tiles in table.items()
        for tile in tiles
    ]
    results = run_probes(jobs, arguments.seconds)
    print(f"{len(results)} probes in {time.monotonic() - began:.0f} s")
    passed: dict[int, list[Any]] = {64: [], 128: []}
    for d, tile in jobs:
        mine = [r for r in results if r["d"] == d and r["tile"] == list(tile)]
        bad = [r for r in mine if not right(r)]
        # A tile that is right where tiles divide is timed all the same; its faults are shown above the table.
        if mine and all(r not in bad for r in mine[:4]):
            passed[d].append(tile)
        worst = max((max(r["worst"].values()) for r in mine if right(r)), default=math.nan)
        print(f"D{d} {label(tile)}: {len(mine) - len(bad)} of {len(mine)} right, worst of these {worst:.2f}")
        for r in bad[:4]:
            print(
                "   WRONG", *r["shape"], {n: f"{v:.3g}" for n, v in r["worst"].items()}, r["same"], r.get("error", "")
            )
    arguments.out.mkdir(parents=True, exist_ok=True)
    target = arguments.out / "attention_backward.json"
    target.write_text(json.dumps({"probes": results}))

    import torch

    environment = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__}
    table = [
        time_cell(d, causal, length, passed[d], arguments.rounds)
        for d in (64, 128)
        for causal in ("none", "top_left")
        for length in LENGTHS
    ]
    target.write_text(json.dumps({"environment": environment, "probes": results, "table": table}))
    print(environment, f"{time.monotonic() - began:.0f} s; columns: TFLOP/s (of the faster peer) us of the parts")
    for row in table:
        print(show(row))


if __name__ == "__main__":
    main()
