"""Tuning of the FP4 kernels on a GPU: check and time variants, print ratios.

    python docs/tuning/tune_fp4.py bench FOLDER [SECONDS [gluon]]

``bench`` compiles every variant in parallel processes first (they meet again in Triton's disk cache), checks each
against float64 on the oracle's budget, and times CUDA-graph replays over copies of the weight that together exceed the
L2 cache several times. Ratios are over ``torch.nn.functional.linear`` in bfloat16, timed the same way in the same run.
Not part of any backend: nothing here is imported by a kernel.
"""

from __future__ import annotations

import json
import multiprocessing
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import triton

from vbench.kernels.triton import codec, linear
from vbench.kernels.triton.linear import Plan
from vbench.kernels.triton.linear_fused import fused_linear_kernel
from vbench.kernels.triton.linear_gluon_host import gluon_call

SHAPES = ((14336, 4096), (4096, 14336), (4096, 4096))
ROTATE_BYTES = 320 << 20

# ---------------------------------------------------------------- compile and read


# ---------------------------------------------------------------- measure


def candidates(m: int, n: int, k: int, fmt: str, gluon_only: bool = False) -> list[Plan]:
    """Variants worth timing for a case. Predictions and outcomes: docs/tuning/fp4.md."""
    gluon: list[Plan] = []
    if m >= 64 and fmt != "absmax7_g128":
        for bn, bm, stages in ((128, 64, 6), (256, 64, 4), (256, 128, 3), (128, 128, 4), (128, 256, 2)):
            if bm <= m and (m > 64 or bm == 64):
                gluon.append(Plan("gluon", bn, bm, 32, 12, stages))
    if gluon_only:
        return gluon
    plans: list[Plan] = []
    if m <= 64:
        width = max(8, 1 << (m - 1).bit_length())
        shapes: tuple[tuple[int, int, int, int], ...] = ((64, 4, 64, 4), (64, 4, 64, 3), (128, 8, 64, 3))
        if m <= 8:
            shapes = (*shapes[:2], (64, 2, 64, 4), (128, 4, 64, 4))
        for bn, warps, bkw, stages in shapes:
            for split in (1, 2, 4, 8):
                if 60 <= n // bn * split <= 520 and k // (4 * bkw) >= 2 * split:
                    plans.append(Plan("fused", bn, width, bkw, warps, stages, split))
        return plans
    plans += [
        Plan("fused", 128, 128, 32, 4, 3, block_sums=False),
        Plan("fused", 128, 128, 32, 8, 3),
        Plan("fused", 256, 128, 32, 8, 3, block_sums=False),
        Plan("fused", 64, 128, 32, 4, 3, block_sums=False),
    ]
    if fmt == "absmax7_g128":
        plans = [p for p in plans if p.bn * p.bm <= 128 * 64 * p.warps // 4]
    if m >= 1024:
        chunks = sorted({n, 2048} & set(range(n + 1)))
        plans += [Plan("dequant_cublas", 0, 0, 0, 0, 0, chunk=chunk) for chunk in chunks]
    return plans


def _fake_inputs(
    fmt: str, m: int, n: int, k: int, plan: Plan
) -> tuple[tuple[int, ...], tuple[Any, ...], dict[str, Any]]:
    """Arguments of the right types and alignment that need no memory, for compiling only."""
    import torch

    from vbench.kernels.triton.packing import PackedWeight

    blocks = k // (4 * plan.bkw)

    def meta(dtype: torch.dtype, *shape: int) -> Any:
        return torch.empty(shape, dtype=dtype, device="meta")

    scale = meta(torch.uint8, n // 64, blocks, 64, plan.bkw // 16, 4) if fmt == "nvfp4" else meta(torch.float32, n)
    weight = PackedWeight(
        fmt, n, k, plan.bkw, fmt == "nvfp4", meta(torch.int16, n // 64, blocks, 64, plan.bkw), scale,
        meta(torch.float32, 1),
    )  # fmt: skip
    x, y = meta(torch.bfloat16, m, k), meta(torch.bfloat16, m, n)
    if plan.path == "gluon":
        return gluon_call(weight, x, None, y, "bf16", "none", plan.bn, plan.bm, plan.stages)
    return linear.fused_call(weight, x, None, y, "bf16", "none", plan)


def _compile_one(job: tuple[str, int, int, int, Plan]) -> str:
    fmt, m, n, k, plan = job
    try:
        grid, arguments, constants = _fake_inputs(fmt, m, n, k, plan)
        kernel: Any = fused_linear_kernel
        if plan.path == "gluon":
            from vbench.kernels.triton.linear_gluon import gluon_linear_kernel

            kernel = gluon_linear_kernel
        kernel.warmup(*arguments, grid=grid, **constants)
    except Exception as error:  # a variant that does not compile is a result of tuning
        return f"{type(error).__name__}: {str(error)[:200]}"
    return ""


def check_cases() -> list[str]:
    """Case ids that between them take every format, dtype, activation, regime and ragged size on the GPU."""
    from vbench.reference.ops import fp4 as ops
    from vbench.reference.ops.types import DTYPES

    shapes = (
        (1, 200, 384), (3, 64, 4096), (8, 130, 2304), (9, 257, 1152), (16, 1024, 8192), (33, 96, 640), (64, 300, 4096),
        (65, 128, 256), (200, 500, 896), (512, 640, 1024),
    )  # fmt: skip
    extras = (("normal", "none", 0), ("grid", "none", 1), ("student5", "gelu", 1), ("outlier", "silu", 0),
              ("grid", "relu", 1))  # fmt: skip
    ids: list[str] = []
    turn = 0
    for fmt in ops.FORMATS:
        for x in DTYPES:
            for step in range(turn % 2, len(shapes), 2):
                m, n, k = shapes[step]
                dist, act, bias = extras[(step + turn) % len(extras)]
                k -= 2 if ops.FORMAT_GROUPS[fmt] <= 0 and step % 3 == 0 else 0
                ids.append(ops.FP4_LINEAR.case(fmt=fmt, x=x, act=act, bias=bias, dist=dist, m=m, n=n, k=k).id)
            turn += 1
            for dist in ("grid", "student5"):
                ids.append(ops.FP4_QUANTIZE.case(fmt=fmt, w=x, dist=dist, n=100, k=1152).id)
                ids.append(ops.FP4_DEQUANTIZE.case(fmt=fmt, y=x, dist=dist, n=100, k=1152).id)
    ids += [f"one_hot:{fmt}:{x}:{m}" for fmt in ops.FORMATS for x in ("bf16", "fp16") for m in (8, 16, 64, 128, 300)]
    return ids


def check_one_hot(name: str, plan: Plan | None = None) -> dict[str, Any]:
    """x of unit rows must give decoded columns bitwise, with random codes and, for nvfp4, every positive E4M3 scale."""
    import torch

    from vbench.reference import fp4
    from vbench.reference.ops import fp4 as ops

    _, fmt, x_name, m_text = name.split(":")
    m, n, k = int(m_text), 192, 4352
    case = ops.FP4_LINEAR.case(fmt=fmt, x=x_name, m=m, n=n, k=k)
    weight = _canonical(fmt, n, k, 7)
    if fmt == "nvfp4":
        weight["scale"] = torch.randint(0, 0x7F, (n, k // 16), device="cuda").to(torch.uint8).view(torch.float8_e4m3fn)
    dtype = torch.bfloat16 if x_name == "bf16" else torch.float16
    picks = torch.randint(0, k, (m,), device="cuda")
    inputs = {**weight, "x": torch.nn.functional.one_hot(picks, k).to(dtype)}
    y = torch.full((m, n), float("nan"), device="cuda", dtype=dtype)
    kernel = linear.make(case, "", "cuda") if plan is None else linear.LinearKernel(case, "cuda", plan)
    kernel.bind(inputs, {"y": y})()
    want = fp4.decode_float64(fmt, inputs).T[picks]
    want = want.float().to(dtype)  # value x scale rounds once in float32, then to y
    wrong = int((y != want).sum())
    return {"case": name, "outcome": "PASSED" if wrong == 0 else "WRONG", "wrong": wrong, "plan": asdict(kernel.plan)}


def check_case(case_id: str, plan: Plan | None = None) -> dict[str, Any]:
    """Run one case natively against its oracle, poisoned output, twice."""
    import torch

    from vbench.reference.ops import fp4 as ops
    from vbench.spec import resolve

    if case_id.startswith("one_hot:"):
        try:
            return check_one_hot(case_id, plan)
        except Exception as error:  # any failure of a check is its result
            return {"case": case_id, "outcome": "ERROR", "detail": f"{type(error).__name__}: {str(error)[:300]}"}
    op = next(o for o in ops.OPS if case_id.startswith(o.name + "["))
    case = op.parse(case_id)
    factory: dict[str, Callable[..., Any]] = {
        "fp4_linear": linear.make,
        "fp4_quantize": codec.make_quantize,
        "fp4_dequantize": codec.make_dequantize,
    }
    try:
        kernel: Any = factory[op.name](case, "", "cuda") if plan is None else linear.LinearKernel(case, "cuda", plan)
        inputs = resolve(op.inputs)(case, "cuda")
        expected = resolve(op.oracle)(case, inputs, kernel.numerics, None)
        out = {name: torch.empty(e.shape, dtype=e.dtype, device="cuda") for name, e in expected.items()}
        for t in out.values():
            t.view(torch.uint8).fill_(0xFF)
        launch = kernel.bind(inputs, out)
        launch()
        first = {name: t.clone() for name, t in out.items()}
        launch()
        worst, wrong, moved = 0.0, 0, 0
        for name, e in expected.items():
            got = out[name]
            moved += int((got.view(torch.uint8) != first[name].view(torch.uint8)).sum())
            if e.budget is None:
                wrong += (
                    int((got.view(torch.uint8) != e.value.view(torch.uint8)).sum())
                    if op.name != "fp4_linear"
                    else int((got != e.value).sum())
                )
            else:
                ratio = (got.double() - e.value).abs() / e.budget
                overflowed = e.value.to(e.dtype).isinf() & (got == e.value.to(e.dtype))
                ratio = torch.where(overflowed, 0.0, ratio)
                wrong += int((~(ratio <= 1)).sum())
                worst = max(worst, float(ratio.nan_to_num(nan=1e9).max()))
        outcome = "PASSED" if wrong == 0 and moved == 0 else "WRONG"
        return {"case": case_id, "outcome": outcome, "wrong": wrong, "moved": moved, "worst": worst}
    except Exception as error:  # any failure of a check is its result
        return {"case": case_id, "outcome": "ERROR", "detail": f"{type(error).__name__}: {str(error)[:300]}"}


def graph_seconds(launches: Sequence[Callable[[], Any]], repeats: int) -> float:
    """Median over replays of the mean time of one launch; each replay runs every launch once, in order."""
    import torch

    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]  # torch has no types
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        launches[0]()
        launches[0]()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for launch in launches:
            launch()
    for _ in range(3):
        graph.replay()
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]  # type: ignore[no-untyped-call]  # torch has no types
    for start, stop in events:
        start.record()
        graph.replay()
        stop.record()
    torch.cuda.synchronize()
    median_ms = statistics.median(float(a.elapsed_time(b)) for a, b in events)
    return median_ms * 1e-3 / len(launches)


def _canonical(fmt: str, n: int, k: int, seed: int) -> dict[str, Any]:
    """A random canonical weight made on the GPU (uniform codes, scales in [0.5, 2))."""
    import torch

    gen = torch.Generator(device="cuda").manual_seed(seed)
    group = {"absmax7_row": -1, "absmax7_tensor": 0, "absmax7_g128": 128, "nvfp4": 16}[fmt]
    shape = (1,) if group == 0 else (n,) if group == -1 else (n, k // group)
    scale = torch.rand(shape, generator=gen, device="cuda") * 1.5 + 0.5
    return {
        "codes": torch.randint(0, 256, (n, k // 2), generator=gen, device="cuda", dtype=torch.uint8),
        "scale": scale.to(torch.float8_e4m3fn) if fmt == "nvfp4" else scale,
        "global_scale": torch.full((1,), 0.013 if fmt == "nvfp4" else 1.0, device="cuda"),
    }


def bench_codecs(report: dict[str, Any]) -> str:
    """Encoders and decoders at 14336 x 4096 bf16, over rotated weights: bytes moved a second, beside a copy's."""
    import torch

    from vbench.reference import fp4
    from vbench.reference.ops import fp4 as ops

    n, k = SHAPES[0]
    weights = [torch.randn(n, k, device="cuda").to(torch.bfloat16) for _ in range(3)]
    target = torch.empty_like(weights[0])
    copied = graph_seconds([partial(target.copy_, w) for w in weights], 10)
    rates = {"copy": 4 * n * k / copied}
    for fmt in ops.FORMATS:
        want = fp4.quantize(fmt, weights[0])
        outs = {name: torch.empty_like(t) for name, t in want.items()}
        case = ops.FP4_QUANTIZE.case(fmt=fmt, w="bf16", n=n, k=k)
        calls = [codec.make_quantize(case, "", "cuda").bind({"w": w}, outs) for w in weights]
        calls[0]()
        same = all(torch.equal(outs[name].view(torch.uint8), t.view(torch.uint8)) for name, t in want.items())
        moved = 2 * n * k + ops.packed_bytes(fmt, n, k)
        rates[f"encode {fmt}{'' if same else ' WRONG'}"] = moved / graph_seconds(calls, 10)
        group = ops.FORMAT_GROUPS[fmt]
        tiles = (
            ((2, 512, 8), (4, 512, 4))
            if group <= 0
            else [(b // (group // 2), group // 2, 4) for b in (512, 1024, 2048)]
        )
        for tile in tiles:
            decode = codec.decode_launcher(fmt, "bf16", want, target, n, k, tile)
            decode()
            good = bool(torch.equal(target, fp4.dequantize(fmt, want, torch.bfloat16)))
            rates[f"decode {fmt} {tile}{'' if good else ' WRONG'}"] = moved / graph_seconds([decode] * 3, 10)
    report["codecs"] = rates
    return "codec TB/s: " + ", ".join(f"{name} {rate * 1e-12:.2f}" for name, rate in rates.items())


def gluon_checks() -> list[tuple[str, Plan]]:
    """Cases that take each Gluon tile through ragged sizes, activations and all formats it has."""
    from vbench.reference.ops import fp4 as ops

    tiles = ((128, 64, 6), (256, 64, 4), (256, 128, 3), (128, 128, 4), (128, 256, 2))
    shapes = ((100, 256, 1024), (65, 136, 264), (300, 640, 4096), (520, 1000, 648))
    extras = (("normal", "none", 1), ("grid", "none", 1), ("student5", "gelu", 0), ("outlier", "silu", 1),
              ("grid", "relu", 0))  # fmt: skip
    found: list[tuple[str, Plan]] = []
    for t, (bn, bm, stages) in enumerate(tiles):
        plan = Plan("gluon", bn, bm, 32, 12, stages)
        for f, fmt in enumerate(("absmax7_row", "nvfp4", "absmax7_tensor")):
            for s, (m, n, k) in enumerate(shapes):
                if fmt == "absmax7_tensor" and s != t % 4:
                    continue
                dist, act, bias = extras[(s + t + f) % len(extras)]
                x = "fp16" if (s + t) % 3 == 0 else "bf16"
                k -= k % 16 if fmt == "nvfp4" else 0
                case = ops.FP4_LINEAR.case(fmt=fmt, x=x, act=act, bias=bias, dist=dist, m=m, n=n, k=k)
                found.append((case.id, plan))
    return found


def bench(out: Path, formats: tuple[str, ...], ms: tuple[int, ...], seconds: float, gluon_only: bool = False) -> None:
    """Check and time every candidate; stops starting new cells after ``seconds``. Writes bench.json under ``out``.

    ``gluon_only``: the warp-specialised kernel alone, so that a fault of its barriers cannot take the rest along.
    """
    import torch

    from vbench.kernels.triton.linear_dequant import OPERAND_ROUNDINGS, bind_dequant
    from vbench.kernels.triton.packing import pack_weight
    from vbench.reference.linear import linear_oracle
    from vbench.reference.ops.fp4 import FP4_LINEAR
    from vbench.spec import Numerics

    began = time.monotonic()
    cells = [(fmt, m, n, k) for n, k in SHAPES for fmt in formats for m in ms]
    jobs: dict[Any, Any] = {}
    for fmt, m, n, k in cells:
        for plan in candidates(m, n, k, fmt, gluon_only):
            if plan.path != "dequant_cublas":
                jobs.setdefault((fmt, plan), (fmt, m, n, k, plan))
    order = list(jobs.values())
    with multiprocessing.get_context("spawn").Pool(16) as pool:
        work = gluon_checks() if gluon_only else [(c, None) for c in check_cases()]
        checking = pool.starmap_async(check_case, work, chunksize=1)
        problems = pool.map(_compile_one, order, chunksize=2)
        checks = checking.get()
    bad = Counter(v for v in problems if v)
    print(f"compiled {len(order)} variants in {time.monotonic() - began:.0f} s; problems: {dict(bad)}", flush=True)
    wrong_checks = [c for c in checks if c["outcome"] != "PASSED"]
    worst_check = max(c.get("worst", 0.0) for c in checks)
    print(f"{len(checks)} check cases, {len(wrong_checks)} not passed, worst error/budget {worst_check:.3f}")
    for c in wrong_checks[:6]:
        print("  ", c)

    props = torch.cuda.get_device_properties(0)
    report: dict[str, Any] = {
        "gpu": props.name, "torch": torch.__version__, "triton": triton.__version__, "rows": [], "baseline": [],
        "checks": checks,
    }  # fmt: skip
    gen = torch.Generator(device="cuda").manual_seed(1)
    table = [] if gluon_only else [bench_codecs(report)]
    for n, k in SHAPES:
        dense = [
            torch.randn(n, k, generator=gen, device="cuda", dtype=torch.bfloat16)
            for _ in range(max(2, ROTATE_BYTES // (2 * n * k)))
        ]
        base: dict[int, float] = {}
        tokens = torch.randn(max(ms), k, generator=gen, device="cuda").to(torch.bfloat16)
        xs = {m: tokens[:m] for m in ms}
        for m in ms:
            y = torch.empty(m, n, device="cuda", dtype=torch.bfloat16)
            base[m] = graph_seconds([partial(torch.mm, xs[m], w.T, out=y) for w in dense], 20)
            report["baseline"].append({"m": m, "n": n, "k": k, "seconds": base[m]})
        del dense
        for fmt in formats:
            copies = max(2, ROTATE_BYTES // (n * k // 2))
            weights = [_canonical(fmt, n, k, s) for s in range(copies)]
            twiddled = fmt == "nvfp4"
            packs: dict[int, list[Any]] = {}
            for m in ms:
                if time.monotonic() - began > seconds:
                    print(f"stopped before {fmt} {n}x{k} m={m}: out of time", flush=True)
                    continue
                case = FP4_LINEAR.case(fmt=fmt, x="bf16", m=m, n=n, k=k)
                inputs = {**weights[0], "x": xs[m]}
                y = torch.empty(m, n, device="cuda", dtype=torch.bfloat16)
                oracles: dict[tuple[str, ...], Any] = {}
                results: list[tuple[float, Plan]] = []
                for plan in candidates(m, n, k, fmt, gluon_only):
                    row: dict[str, Any] = {"fmt": fmt, "m": m, "n": n, "k": k, "plan": asdict(plan)}
                    try:
                        if plan.path != "dequant_cublas":
                            if plan.bkw not in packs:
                                packs[plan.bkw] = [pack_weight(fmt, w, n, k, plan.bkw, twiddled) for w in weights]
                            calls = [
                                linear.bind_packed(w, xs[m], None, y, "bf16", "none", plan) for w in packs[plan.bkw]
                            ]
                            rounding: tuple[str, ...] = ()
                        else:
                            calls = [
                                bind_dequant(fmt, w, xs[m], None, y, "bf16", "none", plan.chunk) for w in weights[:4]
                            ]
                            rounding = OPERAND_ROUNDINGS[(fmt, "bf16")]
                        if rounding not in oracles:
                            numerics = Numerics("tensor_core", rounding)
                            oracles[rounding] = linear_oracle(case, inputs, numerics, 128)["y"]
                        e = oracles[rounding]
                        y.fill_(float("nan"))
                        calls[0]()
                        got = (e.take(y) if e.take else y).double()
                        worst = ((got - e.value).abs() / e.budget).max()
                        row["worst_over_budget"] = float(worst)
                        if not worst <= 1:
                            row["problem"] = "wrong"
                        else:
                            first = y.clone()
                            calls[0]()
                            row["repeats"] = bool(torch.equal(first, y))
                            if m <= 64:
                                row["row0"] = int(first[0].view(torch.int16).long().mul(
                                    torch.arange(1, n + 1, device="cuda")).sum())  # fmt: skip
                            row["seconds"] = graph_seconds(calls, 12 if m >= 256 else 20)
                            row["ratio"] = base[m] / row["seconds"]
                            results.append((row["seconds"], plan))
                    except Exception as error:  # a failing variant is a result of tuning
                        row["problem"] = f"{type(error).__name__}: {str(error)[:160]}"
                    report["rows"].append(row)
                results.sort(key=lambda r: r[0])
                line = f"{n}x{k} {fmt} m={m} base {base[m] * 1e6:.1f}us:"
                for seconds_, p in results[:3]:
                    name = (
                        f"dq{p.chunk}"
                        if p.path == "dequant_cublas"
                        else f"{p.path[0]}{p.bn}x{p.bm}b{p.bkw}w{p.warps}s{p.stages}k{p.split}"
                        + ("" if p.block_sums else "c")
                    )
                    line += f" {name}={seconds_ * 1e6:.2f}({base[m] / seconds_:.2f})"
                table.append(line)
                (out / "bench.json").write_text(json.dumps(report))
            packs.clear()
            del weights
        torch.cuda.empty_cache()
    wrong = [r for r in report["rows"] if "problem" in r]
    print(f"{len(report['rows'])} variants, {len(wrong)} failed, {time.monotonic() - began:.0f} s")
    for text, times in Counter(r["problem"] for r in wrong).most_common(8):
        print(f"  {times} x {text}")
    print("not repeatable:", sum(1 for r in report["rows"] if r.get("repeats") is False))
    print("\n".join(table))


def main(arguments: list[str]) -> int:
    """See the module's text."""
    if arguments[:1] == ["bench"] and len(arguments) >= 2:
        out = Path(arguments[1])
        out.mkdir(parents=True, exist_ok=True)
        limit = float(arguments[2]) if len(arguments) > 2 else 120.0
        if arguments[3:] == ["gluon"]:
            bench(out, ("absmax7_row", "nvfp4"), (64, 256, 1024, 4096), limit, gluon_only=True)
        else:
            bench(out, ("absmax7_row", "nvfp4", "absmax7_g128"), (1, 4, 16, 64, 256, 1024, 4096), limit)
        return 0
    print(__doc__, file=sys.stderr)
    return 2


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
