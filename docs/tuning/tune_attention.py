"""Measure the attention tiles on a GPU, beside PyTorch's own attention, and print one table.

    python docs/tuning/tune_attention.py --out DIR [--quick] [--backward]

Three stages. 1. *Probes*: every candidate tile, and a list of awkward shapes, compiled and checked against float64 in
its own process, so that one that crashes or hangs loses only itself. 2. *Timing*: what passed, beside
scaled_dot_product_attention on its cuDNN and flash backends, in interleaved rounds of CUDA-graph replays over rotated
inputs larger than the L2 cache. 3. The table: TFLOP/s (4 b h sq sk d operations, half of that when causal) and ratios
to the faster peer. Compare numbers of one run only.

``--backward`` does the same for the plain backward (10 b h sq sk d operations), whose two kernels are timed apart: the
best of each is picked by itself, and the table's own pair is timed whole.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

TOKENS, HIDDEN = 16384, 2048
LENGTHS = (512, 1024, 2048, 4096, 16384)
#: (block_m, block_n, warps, stages) through tensor descriptors, by head dim.
PLAIN = {
    64: ((64, 64, 4, 3), (64, 64, 4, 2), (64, 128, 4, 3), (64, 128, 4, 2), (64, 32, 4, 4), (128, 64, 4, 3)),
    128: ((64, 64, 4, 3), (64, 64, 4, 2), (64, 32, 4, 3), (64, 32, 4, 4), (64, 128, 4, 2), (128, 64, 8, 3)),
}
#: The same through pointers, for tensors the copy engine does not take.
POINTERS = {64: ((128, 64, 8, 3), (64, 64, 4, 3)), 128: ((128, 64, 8, 3), (64, 64, 4, 2))}
#: (block_n, stages, workers, registers, round_early)
GLUON = {
    64: ((128, 4, 2, 240, False), (128, 4, 3, 160, True), (64, 8, 3, 160, False)),
    128: ((128, 2, 2, 240, False), (64, 4, 2, 240, False)),
}
#: Of the backward, through descriptors: tiles of dQ, and of dK and dV.
BACKWARD_QUERIES = {
    64: ((64, 64, 4, 2), (64, 64, 4, 3), (64, 128, 4, 2), (128, 64, 8, 2), (64, 32, 4, 3)),
    128: ((64, 64, 4, 2), (64, 64, 4, 3), (64, 32, 4, 2), (64, 32, 4, 3), (128, 64, 8, 2)),
}
BACKWARD_KEYS = {
    64: ((64, 64, 4, 2), (64, 64, 4, 3), (32, 64, 4, 3), (64, 128, 8, 2), (32, 128, 8, 3)),
    128: ((64, 64, 4, 2), (32, 64, 4, 2), (32, 64, 4, 3), (64, 128, 8, 2), (32, 128, 8, 2)),
}
BACKWARD_LENGTHS = (1024, 4096, 16384)
#: (dtype, causal, dlse, layout, dist, b, hq, hk, sq, sk, d)
BACKWARD_AWKWARD = (
    ("bf16", "none", 0, "bhsd", "normal", 2, 4, 2, 127, 129, 64),
    ("bf16", "top_left", 1, "bshd", "normal", 1, 4, 1, 257, 300, 128),
    ("fp16", "bottom_right", 1, "padded", "normal", 1, 2, 2, 300, 100, 80),
    ("bf16", "bottom_right", 0, "bhsd", "normal", 1, 2, 1, 1, 1023, 128),
    ("fp16", "none", 0, "padded", "normal", 1, 2, 2, 33, 65, 7),
    ("bf16", "top_left", 0, "bhsd", "normal", 1, 2, 2, 200, 200, 256),
    ("fp16", "bottom_right", 0, "bshd", "normal", 1, 2, 2, 200, 300, 250),
    ("fp32", "bottom_right", 1, "bhsd", "normal", 1, 2, 1, 100, 150, 64),
    ("fp32", "none", 0, "padded", "normal", 1, 2, 2, 65, 70, 200),
    ("fp32", "top_left", 0, "bhsd", "large_logits", 1, 2, 2, 65, 70, 128),
    ("fp16", "top_left", 0, "bhsd", "normal", 1, 1, 1, 40, 40, 16),
    ("bf16", "bottom_right", 0, "bhsd", "large_logits", 2, 4, 2, 700, 900, 64),
    ("bf16", "none", 0, "bhsd", "equal_keys", 1, 2, 2, 320, 192, 128),
    ("bf16", "bottom_right", 1, "padded", "normal", 1, 8, 2, 130, 77, 33),
)
#: Shapes that no tile divides: (variant, dtype, causal, b, hq, hk, sq, sk, d, layout of the inputs in memory).
AWKWARD = (
    ("", "bf16", "none", 2, 4, 2, 127, 129, 64, "bhsd"),
    ("", "bf16", "top_left", 1, 4, 1, 257, 300, 128, "bshd"),
    ("", "fp16", "bottom_right", 1, 2, 2, 300, 100, 80, "bhsd"),
    ("", "bf16", "bottom_right", 1, 2, 1, 1, 1023, 128, "bhsd"),
    ("", "fp16", "none", 1, 2, 2, 33, 65, 7, "bhsd"),
    ("", "bf16", "top_left", 1, 2, 2, 200, 200, 256, "bhsd"),
    ("", "bf16", "none", 1, 2, 2, 100, 77, 40, "bhds"),
    ("", "fp32", "bottom_right", 1, 2, 1, 100, 150, 64, "bhsd"),
    ("", "fp32", "none", 1, 2, 2, 65, 70, 200, "bhsd"),
    ("", "fp16", "top_left", 1, 1, 1, 40, 40, 16, "bhsd"),
    ("gluon", "bf16", "none", 2, 4, 2, 127, 129, 64, "bhsd"),
    ("gluon", "bf16", "top_left", 1, 4, 1, 257, 300, 128, "bshd"),
    ("gluon", "fp16", "bottom_right", 1, 2, 2, 300, 100, 64, "bhsd"),
    ("gluon", "bf16", "bottom_right", 3, 2, 1, 1, 1023, 128, "bhsd"),
    ("gluon", "fp16", "bottom_right", 2, 16, 4, 1000, 1500, 128, "bshd"),
    ("gluon", "bf16", "top_left", 4, 32, 32, 777, 777, 64, "bshd"),
    ("gluon", "bf16", "none", 1, 2, 2, 1, 1, 64, "bhsd"),
    ("gluon", "bf16", "bottom_right", 2, 16, 2, 130, 4000, 128, "bhsd"),
    ("gluon", "fp16", "top_left", 2, 64, 64, 700, 90, 64, "bhsd"),
    ("gluon", "bf16", "bottom_right", 2, 8, 8, 2000, 1999, 128, "bhsd"),
)


def make_inputs(b: int, hq: int, hk: int, sq: int, sk: int, d: int, dtype: str, seed: int, layout: str = "bhsd") -> Any:
    """q, k, v as [b, h, s, d] views; ``layout`` is the order of the axes in memory."""
    import torch

    from vbench.spec import TORCH_DTYPE_NAMES

    generator = torch.Generator("cuda").manual_seed(seed)
    tensors = {}
    for name, heads, length in (("q", hq, sq), ("k", hk, sk), ("v", hk, sk)):
        sizes = {"b": b, "h": heads, "s": length, "d": d}
        flat = torch.randn([sizes[axis] for axis in layout], generator=generator, device="cuda")
        flat = flat.to(getattr(torch, TORCH_DTYPE_NAMES[dtype]))
        tensors[name] = flat.permute([layout.index(axis) for axis in "bhsd"])
    return tensors


def poisoned_outputs(inputs: Any) -> Any:
    """out and lse full of NaN, so that an element nothing wrote shows."""
    import torch

    q = inputs["q"]
    out = torch.full(q.shape, float("nan"), dtype=q.dtype, device=q.device)
    return {"out": out, "lse": torch.full(q.shape[:3], float("nan"), device=q.device)}


def worst_over_budget(inputs: Any, outputs: Any, causal: str, dtype: str, max_rows: int = 48) -> float:
    """Largest error / budget of out and lse on sampled heads and rows; inf where a value is not finite but should be.

    Budget (elementwise, derived, for random inputs): with z scaled scores, P weights, A = P|V|, u the unit roundoffs,
    delta = scale min(6 sqrt(d), d) 2^-22 |q||k| + 2 2^-24 (|z - m| + |m|), e = 2 max delta + 2^-22,
    out: (u_P + e + 6 sqrt(sk) 2^-22) A + (e + u_out)|out|;
    lse: max delta + 2^-22 + 6 sqrt(sk) 2^-24 + 4 2^-24 (1 + |lse|).
    """
    import torch

    q, k, v = inputs["q"], inputs["k"], inputs["v"]
    (b, hq, sq, d), (_, hk, sk, _) = q.shape, k.shape
    u_io = {"bf16": 2.0**-8, "fp16": 2.0**-11, "fp32": 2.0**-24}[dtype]
    u_p = 0.0 if dtype == "fp32" else u_io
    u_sum = 2.0**-24 if dtype == "fp32" else 2.0**-22
    generator = torch.Generator().manual_seed(sq * 131 + sk)
    heads = {(0, 0), (b - 1, hq - 1)}
    heads |= {(int(torch.randint(b, (1,), generator=generator)), int(torch.randint(hq, (1,), generator=generator)))}
    rows = torch.randperm(sq, generator=generator)[:max_rows]
    rows = torch.unique(torch.cat((rows, torch.tensor([0, sq - 1])))).to(q.device)
    keys = torch.arange(sk, device=q.device)
    shift = sk - sq if causal == "bottom_right" else 0
    mask = torch.ones(len(rows), sk, dtype=torch.bool, device=q.device)
    if causal != "none":
        mask = keys[None, :] <= rows[:, None] + shift
    alive = mask.any(dim=1)
    worst = 0.0
    for batch, head in heads:
        kv_head = head // (hq // hk)
        q64, k64, v64 = q[batch, head][rows].double(), k[batch, kv_head].double(), v[batch, kv_head].double()
        z = ((q64 @ k64.T) * d**-0.5).masked_fill(~mask, -math.inf)
        m = torch.where(alive, z.amax(dim=1), 0.0)
        p = torch.exp(z - m[:, None])
        total = p.sum(dim=1)
        p = p / total.clamp(min=1e-300)[:, None]
        delta = d**-0.5 * min(6 * d**0.5, d) * u_sum * (q64.abs() @ k64.abs().T)
        delta = delta + 2.0**-23 * ((z - m[:, None]).abs() + m.abs()[:, None])
        delta = torch.where(mask, delta, 0.0).amax(dim=1)
        e = 2 * delta + 2.0**-22
        want = p @ v64
        budget = (u_p + e + min(6 * sk**0.5, sk) * u_sum)[:, None] * (p @ v64.abs()) + (e + u_io)[:, None] * want.abs()
        budget = budget + 2.0**-25 * (mask.double() @ v64.abs()) / total.clamp(min=1.0)[:, None]
        lse = torch.where(alive, m + torch.log(total.clamp(min=1e-300)), -math.inf)
        lse_budget = delta + 2.0**-22 + 6 * sk**0.5 * 2.0**-24 + 2.0**-22 * (1 + lse.abs())
        for got, value, bound in (
            (outputs["out"][batch, head][rows].double(), want, budget),
            (outputs["lse"][batch, head][rows].double(), lse, lse_budget),
        ):
            ratio = torch.where(got == value, 0.0, (got - value).abs() / bound.clamp(min=1e-300))
            worst = max(worst, float(torch.nan_to_num(ratio, nan=math.inf).max()))
    return worst


def bind(kind: str, tile: Any, case: Any, inputs: Any, outputs: Any) -> Any:
    """Launch of a candidate. ``tile`` None: what the table says."""
    from vbench.kernels.triton.attention import make
    from vbench.kernels.triton.attention_tiles import GluonTile, Tile

    kernel: Any = make(case, "gluon" if kind == "gluon" else "", "cuda")
    if tile is None:
        return kernel.bind(inputs, outputs)
    if kind == "gluon":
        return kernel.bind_tile(inputs, outputs, GluonTile(*tile))
    return kernel.bind_tile(inputs, outputs, Tile(*tile), kind == "descriptors")


def attention_case(dtype: str, causal: str, b: int, hq: int, hk: int, sq: int, sk: int, d: int) -> Any:
    """A case of op ``attention``, spelled out because a backend may not import the reference that defines the op."""
    from vbench.spec import Case

    texts = {"dtype": dtype, "causal": causal, "dist": "normal"}
    axes = {"b": b, "hq": hq, "hk": hk, "sq": sq, "sk": sk, "d": d}
    return Case("attention", (*texts.items(), *axes.items()))


def probe(job: dict[str, Any]) -> dict[str, Any]:
    """Compile, run twice, compare bitwise and with float64. The stage-1 child runs this."""
    import torch

    b, hq, hk, sq, sk, d = job["axes"]
    inputs = make_inputs(b, hq, hk, sq, sk, d, job["dtype"], 7, job["layout"])
    case = attention_case(job["dtype"], job["causal"], b, hq, hk, sq, sk, d)
    outputs, again = poisoned_outputs(inputs), poisoned_outputs(inputs)
    start = time.perf_counter()
    launch = bind(job["kind"], job["tile"], case, inputs, outputs)
    launch()
    torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    bind(job["kind"], job["tile"], case, inputs, again)()
    same = all(torch.equal(outputs[name], again[name]) for name in outputs)
    worst = worst_over_budget(inputs, outputs, job["causal"], job["dtype"])
    return {**job, "worst": worst, "same": same, "first_launch_s": round(seconds, 2)}


def run_probes(jobs: list[dict[str, Any]], processes: int, seconds: float) -> list[dict[str, Any]]:
    """Spread the jobs over child processes; a child out of time is killed and its unfinished jobs are marked so."""
    groups = [jobs[i::processes] for i in range(processes)]
    children = [
        subprocess.Popen(
            [sys.executable, __file__, "--probe", json.dumps(group)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for group in groups
        if group
    ]  # fmt: skip
    deadline = time.monotonic() + seconds
    results: list[dict[str, Any]] = []
    for group, child in zip([g for g in groups if g], children, strict=True):
        try:
            text, errors = child.communicate(timeout=max(1.0, deadline - time.monotonic()))
            note = errors[-400:]
        except subprocess.TimeoutExpired:
            child.kill()
            text, _ = child.communicate()
            note = "out of time"
        lines = [json.loads(line) for line in text.splitlines() if line.startswith("{")]
        results += lines
        for job in group[len(lines) :]:
            results.append({**job, "worst": math.inf, "same": False, "error": note})
    return results


def graph_of(launches: list[Any], repeats: int) -> Any:
    """A CUDA graph that runs the launches in turn, ``repeats`` of them in all."""
    import torch

    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]  # torch leaves it untyped
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for launch in launches:
            launch()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(repeats):
            launches[i % len(launches)]()
    return graph


def replay_in_turn(graphs: Mapping[str, Any], rounds: int, repeats: int) -> dict[str, list[float]]:
    """Seconds a launch of each graph of ``repeats`` launches, one sample a round; each runs once before the first.

    Raises:
        SystemExit: a graph died, by name.
    """
    import torch

    samples: dict[str, list[float]] = {name: [] for name in graphs}
    for name, graph in graphs.items():
        graph.replay()
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            raise SystemExit(f"{name} died: {error}") from error
    for _ in range(rounds):
        for name, graph in graphs.items():
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]  # torch has no types
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            samples[name].append(start.elapsed_time(end) * 1e-3 / repeats)
    return samples


def time_cell(d: int, causal: str, length: int, candidates: list[tuple[str, Any]], rounds: int) -> dict[str, float]:
    """Median TFLOP/s of each candidate and peer in one cell, in interleaved rounds."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention

    b, h = TOKENS // length, HIDDEN // d
    case = attention_case("bf16", causal, b, h, h, length, length, d)
    sets = [make_inputs(b, h, h, length, length, d, "bf16", seed) for seed in range(2)]
    outs = [poisoned_outputs(inputs) for inputs in sets]
    flops = 4 * b * h * length * length * d * (1.0 if causal == "none" else 0.5)
    repeats = max(2, 2 * round(0.5 * 6e-3 / (flops / 5e14)))

    def peer(inputs: Any, backend: Any) -> Any:
        def launch() -> None:
            with sdpa_kernel([backend]):
                scaled_dot_product_attention(inputs["q"], inputs["k"], inputs["v"], is_causal=causal != "none")

        return launch

    graphs: dict[str, Any] = {}
    for name, backend in (("cudnn", SDPBackend.CUDNN_ATTENTION), ("flash", SDPBackend.FLASH_ATTENTION)):
        graphs[name] = graph_of([peer(inputs, backend) for inputs in sets], repeats)
    for kind, tile in candidates:
        launches = [bind(kind, tile, case, inputs, out) for inputs, out in zip(sets, outs, strict=True)]
        graphs[label(kind, tile)] = graph_of(launches, repeats)
    samples = replay_in_turn(graphs, rounds, repeats)
    return {name: flops / statistics.median(values) / 1e12 for name, values in samples.items()}


def label(kind: str, tile: Any) -> str:
    return kind + ":" + ("table" if tile is None else "-".join(str(int(part)) for part in tile))


def backward_job(params: dict[str, Any], queries: Any, keys: Any) -> dict[str, Any]:
    """A probe of the backward; ``queries`` and ``keys`` None: what the table says."""
    return {"kind": "backward", "params": params, "queries": queries, "keys": keys}


def backward_jobs(quick: bool) -> list[dict[str, Any]]:
    names = ("dtype", "causal", "dlse", "layout", "dist", "b", "hq", "hk", "sq", "sk", "d")
    jobs = [backward_job(dict(zip(names, shape, strict=True)), None, None) for shape in BACKWARD_AWKWARD]
    for d in () if quick else (64, 128):
        for causal in ("none", "top_left"):
            sizes = {"causal": causal, "b": 2, "hq": 4, "hk": 4, "sq": 512, "sk": 512, "d": d}
            for queries, keys in zip(BACKWARD_QUERIES[d], BACKWARD_KEYS[d], strict=True):
                jobs.append(backward_job(sizes, queries, keys))
    return jobs


def bind_backward(case: Any, inputs: Any, out: Any, queries: Any, keys: Any) -> tuple[Any, ...]:
    """The plain backward's three launches; tiles through descriptors, or None for what the table says."""
    from vbench.kernels.triton.attention_backward import make
    from vbench.kernels.triton.attention_backward_tiles import BackwardTiles
    from vbench.kernels.triton.attention_tiles import Tile

    kernel: Any = make(case, "", "cuda")
    tiles, descriptors = kernel.plan(inputs)
    if queries is not None:
        tiles, descriptors = BackwardTiles(Tile(*queries), Tile(*keys)), True
    parts: tuple[Any, ...] = kernel.bind_parts(inputs, out, tiles, descriptors)
    return parts


def in_turn(parts: tuple[Any, ...]) -> Any:
    """One launch of several."""

    def launch() -> None:
        for part in parts:
            part()

    return launch


def like_inputs(inputs: Any) -> Any:
    """dq, dk and dv full of NaN."""
    import torch

    return {f"d{name}": torch.full_like(inputs[name], math.nan).contiguous() for name in "qkv"}


def probe_backward(job: dict[str, Any]) -> dict[str, Any]:
    """Run twice, compare bitwise and with the float64 oracle."""
    import torch

    from vbench.check import judge_outputs
    from vbench.reference.attention_backward import backward_inputs, backward_oracle
    from vbench.reference.ops.attention import ATTENTION_BACKWARD
    from vbench.spec import Numerics

    case = ATTENTION_BACKWARD.case(**job["params"])
    inputs = backward_inputs(case, "cuda")
    results = []
    start = time.perf_counter()
    for _ in range(2):
        out = like_inputs(inputs)
        for part in bind_backward(case, inputs, out, job["queries"], job["keys"]):
            part()
        torch.cuda.synchronize()
        results.append(out)
    seconds = time.perf_counter() - start
    dtype = case.text("dtype")
    numerics = Numerics(accumulate="fp32" if dtype == "fp32" else "tensor_core", probabilities=dtype)
    error = judge_outputs(results[0], backward_oracle(case, inputs, numerics, None), ("dq", "dk", "dv")).error
    same = all(torch.equal(results[0][name], results[1][name]) for name in results[0])
    worst = math.inf if error is None else error.worst_over_budget
    return {**job, "worst": worst, "same": same, "two_launches_s": round(seconds, 2)}


def time_backward(d: int, causal: str, length: int, bad: set[Any], rounds: int, quick: bool) -> dict[str, Any]:
    """Median seconds of the peers, the table's pair and each candidate kernel in one cell."""
    import torch

    from vbench.kernels.peers.sdpa_backward import PREPARE
    from vbench.reference.ops.attention import ATTENTION_BACKWARD

    b, h = TOKENS // length, HIDDEN // d
    case = ATTENTION_BACKWARD.case(causal=causal, b=b, hq=h, hk=h, sq=length, sk=length, d=d)
    flops = 10 * b * h * length * length * d * (1.0 if causal == "none" else 0.5)
    repeats = max(2, 2 * round(0.5 * 6e-3 / (flops / 4e14)))
    sets = []
    for seed in range(2):
        inputs = make_inputs(b, h, h, length, length, d, "bf16", seed)
        inputs["dout"] = make_inputs(b, h, h, length, length, d, "bf16", seed + 2)["q"]
        forward = torch.ops.aten._scaled_dot_product_flash_attention(*(inputs[n] for n in "qkv"), 0.0, causal != "none")
        sets.append(inputs | {"out": forward[0].contiguous(), "lse": forward[1].contiguous()})
    outs = [like_inputs(inputs) for inputs in sets]
    graphs: dict[str, Any] = {}
    for name in ("sdpa_cudnn", "sdpa_flash"):
        prepare = PREPARE[name, "cuda"]
        peers = [prepare(i["q"], i["k"], i["v"], i["dout"], causal != "none") for i in sets]
        graphs[name[5:]] = graph_of(peers, repeats)
    whole = [bind_backward(case, inputs, out, None, None) for inputs, out in zip(sets, outs, strict=True)]
    graphs["table"] = graph_of([in_turn(parts) for parts in whole], repeats)
    graphs["prepare"] = graph_of([parts[0] for parts in whole], repeats)
    pairs = [] if quick else list(zip(BACKWARD_QUERIES[d], BACKWARD_KEYS[d], strict=True))
    for queries, keys in pairs:
        if (d, causal, queries, keys) in bad:
            continue
        bound = [bind_backward(case, inputs, out, queries, keys) for inputs, out in zip(sets, outs, strict=True)]
        graphs[label("dq", queries)] = graph_of([parts[1] for parts in bound], repeats)
        graphs[label("dkdv", keys)] = graph_of([parts[2] for parts in bound], repeats)
    samples = replay_in_turn(graphs, rounds, repeats)
    seconds = {name: statistics.median(values) for name, values in samples.items()}
    return {"d": d, "causal": causal, "s": length, "flops": flops, "seconds": seconds, "samples_s": samples}


def show_backward(row: dict[str, Any]) -> str:
    """One line: TFLOP/s of peers, of the table's pair and of the best pair put together; each kernel's milliseconds."""
    seconds, flops = row["seconds"], row["flops"]
    peer = min(seconds["cudnn"], seconds["flash"])
    text = f"D{row['d']} {row['causal'][:4]} S{row['s']:5d} cudnn {flops / seconds['cudnn'] / 1e12:.0f}"
    text += f" flash {flops / seconds['flash'] / 1e12:.0f}"
    text += f" table {flops / seconds['table'] / 1e12:.0f} ({peer / seconds['table']:.2f})"
    best = {
        kind: sorted((s, name) for name, s in seconds.items() if name.startswith(kind)) for kind in ("dq:", "dkdv:")
    }
    if all(best.values()):
        together = seconds["prepare"] + sum(found[0][0] for found in best.values())
        text += f" best {flops / together / 1e12:.0f} ({peer / together:.2f})"
    text += f" | prepare {seconds['prepare'] * 1e3:.3f} ms"
    for found in best.values():
        text += " | " + " ".join(f"{name}={s * 1e3:.3f}" for s, name in found)
    return text


def main_backward(arguments: Any) -> None:
    """Stages 1 to 3 for the backward."""
    began = time.monotonic()
    results = run_probes(backward_jobs(arguments.quick), os.cpu_count() or 4, arguments.seconds)
    print(f"{len(results)} probes in {time.monotonic() - began:.0f} s")
    wrong = [r for r in results if not (r["worst"] <= 1.0 and r["same"])]
    for r in wrong:
        print("FAILED", r["params"], r["queries"], r["keys"], r["worst"], r["same"], r.get("error", ""))
    print("worst error/budget of the rest", max((r["worst"] for r in results if r["worst"] <= 1.0), default=None))
    bad = {
        (r["params"]["d"], r["params"]["causal"], tuple(r["queries"]), tuple(r["keys"]))
        for r in wrong
        if r["queries"] is not None
    }
    import torch

    environment = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__}
    table = [
        time_backward(d, causal, length, bad, arguments.rounds, arguments.quick)
        for d in (64, 128)
        for causal in ("none", "top_left")
        for length in BACKWARD_LENGTHS
    ]
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "attention_plain_backward.json").write_text(
        json.dumps({"environment": environment, "probes": results, "table": table}, indent=1)
    )
    print(environment, f"{time.monotonic() - began:.0f} s; TFLOP/s (of the faster peer)")
    for row in table:
        print(show_backward(row))


def tile_jobs() -> list[dict[str, Any]]:
    jobs = []
    for d in (64, 128):
        for causal in ("none", "top_left"):
            h, s = HIDDEN // d, 1024
            for kind, tiles in (("gluon", GLUON), ("descriptors", PLAIN), ("pointers", POINTERS)):
                for tile in tiles[d]:
                    axes = (TOKENS // s, h, h, s, s, d)
                    jobs.append(
                        {"kind": kind, "tile": tile, "causal": causal, "axes": axes, "dtype": "bf16", "layout": "bhsd"}
                    )
    return jobs


def awkward_jobs() -> list[dict[str, Any]]:
    return [
        {"kind": variant or "plain", "tile": None, "causal": causal, "axes": axes, "dtype": dtype, "layout": layout}
        for variant, dtype, causal, *axes, layout in AWKWARD
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(), help="folder for attention.json")
    parser.add_argument("--probe", help="internal: JSON list of jobs for a stage-1 child")
    parser.add_argument("--quick", action="store_true", help="time only what the tile table says")
    parser.add_argument("--seconds", type=float, default=75.0, help="deadline of stage 1")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--backward", action="store_true", help="the plain backward instead of the forward")
    arguments = parser.parse_args()
    if arguments.probe:
        for job in json.loads(arguments.probe):
            print(json.dumps(probe_backward(job) if job["kind"] == "backward" else probe(job)), flush=True)
        return
    if arguments.backward:
        main_backward(arguments)
        return
    began = time.monotonic()
    jobs = awkward_jobs() + ([] if arguments.quick else tile_jobs())
    results = run_probes(jobs, min(len(jobs), os.cpu_count() or 4), arguments.seconds)
    passed = {
        (r["axes"][5], r["causal"], label(r["kind"], r["tile"]))
        for r in results
        if r["tile"] is not None and r["worst"] <= 1.0 and r["same"]
    }
    print(f"{len(results)} probes in {time.monotonic() - began:.0f} s")
    for r in results:
        if not (r["worst"] <= 1.0 and r["same"]):
            axes = "x".join(map(str, r["axes"]))
            what = (label(r["kind"], r["tile"]), r["causal"], r["dtype"], axes, r["layout"])
            print("FAILED", *what, r["worst"], r.get("error", ""))
    print("worst error/budget of the rest", max((r["worst"] for r in results if r["worst"] <= 1.0), default=None))

    import torch

    table: list[dict[str, Any]] = []
    for d in (64, 128):
        for causal in ("none", "top_left"):
            if arguments.quick:
                candidates: list[tuple[str, Any]] = [("gluon", None), ("descriptors", None)]
            else:
                candidates = [
                    (job["kind"], job["tile"])
                    for job in tile_jobs()
                    if job["axes"][5] == d and job["causal"] == causal
                    and (d, causal, label(job["kind"], job["tile"])) in passed
                ]  # fmt: skip
            for length in LENGTHS:
                rates = time_cell(d, causal, length, candidates, arguments.rounds)
                table.append({"d": d, "causal": causal, "s": length, "tflops": rates})
    arguments.out.mkdir(parents=True, exist_ok=True)
    environment = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__}
    (arguments.out / "attention.json").write_text(
        json.dumps({"environment": environment, "probes": results, "table": table}, indent=1)
    )
    print(environment, f"{time.monotonic() - began:.0f} s")
    for row in table:
        rates = row["tflops"]
        peer = max(rates["cudnn"], rates["flash"])
        where = f"D{row['d']} {row['causal'][:4]} S{row['s']:5d}"
        parts = [f"{where} cudnn {rates['cudnn']:.0f} flash {rates['flash']:.0f}"]
        for kind in ("gluon", "descriptors", "pointers"):
            best = sorted(((rate, name) for name, rate in rates.items() if name.startswith(kind)), reverse=True)[:3]
            parts.append(" ".join(f"{name[len(kind) + 1 :]}={rate:.0f}({rate / peer:.2f})" for rate, name in best))
        print(" | ".join(parts))


if __name__ == "__main__":
    main()
