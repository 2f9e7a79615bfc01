"""Tuning of the FP4 kernels on a GPU: check and time variants, print ratios.

    python docs/tuning/tune_fp4.py bench --out FOLDER [--seconds S] [--checks S] [CELLS]
    python docs/tuning/tune_fp4.py compile [CELLS]

    CELLS: [--cells NxK:M,M... ...] [--formats FORMAT ...]; without them, everything.

``bench`` first compiles every variant in parallel processes (they meet again in Triton's disk cache) and runs check
cases of all formats through the dispatch tables. Then each regime of token counts runs in a process of its own, so that
a kernel that hangs takes no other regime along: each variant is checked against float64 on the oracle's budget, twice
bitwise, and only then timed, as CUDA-graph replays over copies of the weight that together exceed the L2 cache several
times. Ratios are over ``torch.nn.functional.linear`` in bfloat16, timed the same way in the same process. Last comes a
table of at most 60 lines; FOLDER/bench.json has everything. ``compile`` compiles the variants for sm_90 without a GPU.
Not part of any backend: nothing here is imported by a kernel.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import triton

from vbench.kernels.triton import codec, linear, packing
from vbench.kernels.triton.linear import Plan
from vbench.kernels.triton.linear_fused import fused_linear_kernel
from vbench.kernels.triton.linear_gluon_host import gluon_call
from vbench.kernels.triton.linear_stationary_host import stationary_call

SHAPES = ((14336, 4096),)
ROTATE_BYTES = 320 << 20

# ---------------------------------------------------------------- measure

REGIMES: dict[str, tuple[int, ...]] = {"few": (4, 16), "mid": (32, 64), "many": (256, 1024, 4096)}


@dataclass(frozen=True, slots=True)
class Cells:
    """Layers of n x k that are timed with each token count of ``ms`` (all regimes' if None), in ``formats``."""

    n: int
    k: int
    formats: tuple[str, ...]
    ms: tuple[int, ...] | None = None

    def tokens(self, regime: str) -> tuple[int, ...]:
        """The regime's token counts that are timed here."""
        return tuple(m for m in REGIMES[regime] if self.ms is None or m in self.ms)


CELLS = (
    Cells(14336, 4096, ("absmax7_row", "nvfp4", "mxfp4", "absmax7_g128", "nf4")),
    Cells(4096, 14336, ("absmax7_row", "nvfp4", "mxfp4", "absmax7_g128")),
    Cells(4096, 4096, ("absmax7_row", "nvfp4")),
)


def parse_cells(text: str) -> Cells:
    """``NxK:M,M...`` in the formats that CELLS has for the layer, or all.

    Raises:
        argparse.ArgumentTypeError: another form, or a token count that no regime has.
    """
    try:
        layer, tokens = text.split(":")
        n, k = (int(part) for part in layer.split("x"))
        ms = tuple(int(part) for part in tokens.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form NxK:M,M..., as 14336x4096:64,256") from None
    known = {m for regime in REGIMES.values() for m in regime}
    if not known.issuperset(ms):
        raise argparse.ArgumentTypeError(f"{text!r}: token counts are {', '.join(map(str, sorted(known)))}")
    formats = next((c.formats for c in CELLS if (c.n, c.k) == (n, k)), CELLS[0].formats)
    return Cells(n, k, formats, ms)


def candidates(m: int, n: int, k: int, fmt: str) -> list[Plan]:
    """Variants worth timing for a case. Predictions and outcomes: docs/tuning/fp4.md."""
    parts = linear.split_count(n, k)
    if m <= linear.SPLIT_MAX_M:
        bm = next(b for b in (8, 16, 32, 64) if m <= b)
        if n < linear.WALK_ROWS:
            chosen = [linear.choose_plan(m, n, k, fmt, "bf16", "none", "cuda", hopper=True)]
            return chosen + [Plan("gluon", 128, 64, 32, 12, 6, parts)] * (m > 32)
        fused = [(64, 4, 4), (64, 4, 3), (128, 8, 3), (128, 4, 3)] if m >= 16 else [(64, 2, 4), (64, 4, 4)]
        plans = [
            Plan("fused", bn, bm, 64, warps, stages, parts, walk=walk)
            for bn, warps, stages in fused
            for walk in ((False, True) if bn == 64 else (True,))
        ]
        if m > 32:
            plans = [plan for plan in plans if (plan.bn, plan.warps) != (128, 4)]  # spills
            # Two sums of 256 x 64 do not fit a consumer's registers.
            wide = () if fmt in ("absmax7_g128", "nf4") else ((256, 4), (256, 3))
            plans += [Plan("gluon", bn, bm, 32, 12, stages, parts) for bn, stages in (*wide, (128, 6))]
        if m <= 16:
            plans.append(Plan("stationary", 16, max(8, bm), 16, 16, 1, parts, dependent=True))
        return plans
    plans = []
    tiles = ((128, 64, 6),) if fmt == "nf4" else ((256, 128, 3), (128, 128, 4), (128, 64, 6))
    for bn, bm, stages in tiles:
        if m > 256 and bm == 64 and fmt != "nf4":
            continue
        count = -(-n // bn) * -(-m // bm)
        for scaled in (False, True) if fmt == "absmax7_g128" else (False,):
            if fmt == "absmax7_g128" and not scaled and bn * bm > 128 * 128:
                continue  # no registers for two sums
            splits = [1, *(s for s in (2, 4) if count * s <= 2 * linear.GLUON_PROCESSORS)]
            plans += [
                Plan("gluon", bn, bm, 32, 12, stages, split, scaled=scaled, block_sums=fmt == "nf4") for split in splits
            ]
    if m >= 256:
        plans.append(Plan("dequant_cublas", 0, 0, 0, 0, 0, chunk=linear.DEQUANT_CHUNK))
    return plans


def _order(plan: Plan) -> packing.Order:
    return "fragments" if plan.path == "stationary" else "rows"


def _fake_inputs(
    fmt: str, m: int, n: int, k: int, plan: Plan
) -> tuple[Any, tuple[int, ...], tuple[Any, ...], dict[str, Any]]:
    """Kernel and arguments of the right types and alignment that need no memory, for compiling only."""
    import torch

    group = packing.GROUPS[fmt]
    scale_shape = (1,) if group == 0 else (n,) if group == -1 else (n, k // group)
    scale_dtype = packing.BYTE_SCALES.get(fmt, torch.float32)
    # Shapes and types only: the packing itself runs on a sliver of the weight, whose first axis is then widened.
    sliver = {
        "codes": torch.zeros(128, k // 2, dtype=torch.uint8),
        "scale": torch.ones(scale_shape if group == 0 else (128, *scale_shape[1:])).to(scale_dtype),
        "global_scale": torch.ones(1),
    }
    packed = linear.pack_for(plan, fmt, sliver, 128, k, "bf16")

    def meta(t: Any) -> Any:
        rows = t.shape[0] if t.numel() == 1 else t.shape[0] * n // 128
        return torch.empty((rows, *t.shape[1:]), dtype=t.dtype, device="meta")

    weight = replace(packed, n=n, codes=meta(packed.codes), scale=meta(packed.scale), global_scale=meta(torch.ones(1)))
    x = torch.empty(m, k, dtype=torch.bfloat16, device="meta")
    y = torch.empty(m, n, dtype=torch.bfloat16, device="meta")
    if plan.path == "gluon":
        from vbench.kernels.triton.linear_gluon import gluon_linear_kernel

        how = (plan.bn, plan.bm, plan.stages), plan.split, plan.block_sums, plan.scaled
        return gluon_linear_kernel, *gluon_call(weight, x, None, y, "bf16", "none", *how)
    if plan.path == "stationary":
        from vbench.kernels.triton.linear_stationary import stationary_kernel

        return stationary_kernel, *stationary_call(weight, x, None, y, "bf16", "none", plan.split, plan.dependent)
    return fused_linear_kernel, *linear.fused_call(weight, x, None, y, "bf16", "none", plan)


def _compile_one(job: tuple[str, int, int, int, Plan]) -> str:
    try:
        kernel, grid, arguments, constants = _fake_inputs(*job)
        kernel.warmup(*arguments, grid=grid, **constants)
    except Exception as error:  # a variant that does not compile is a result of tuning
        return f"{type(error).__name__}: {str(error)[:200]}"
    return ""


def all_jobs(cells: Sequence[Cells]) -> list[tuple[str, int, int, int, Plan]]:
    """One job for each kernel that must be compiled: format, m, n, k, plan."""
    jobs: dict[Any, tuple[str, int, int, int, Plan]] = {}
    for cell in cells:
        n, k = cell.n, cell.k
        for fmt in cell.formats:
            for m in (m for regime in REGIMES for m in cell.tokens(regime)):
                for plan in candidates(m, n, k, fmt):
                    if plan.path != "dequant_cublas":
                        jobs.setdefault((fmt, plan, k), (fmt, m, n, k, plan))
    return list(jobs.values())


def compile_all(cells: Sequence[Cells]) -> int:
    """Every variant for sm_90 with no GPU: prints registers and spills. Exit code 1 on a failure."""
    from vbench import machine_code
    from vbench.kernels.triton import linear_aot

    failed = 0
    seen: set[Any] = set()
    for fmt, _, _, k, plan in all_jobs(cells):
        if (fmt, plan) in seen:
            continue
        seen.add((fmt, plan))
        try:
            if plan.path == "gluon":
                compiled = linear_aot.compile_gluon(plan, fmt, "bf16")
            elif plan.path == "stationary":
                compiled = linear_aot.compile_stationary(plan, fmt, "bf16", k)
            else:
                compiled = linear_aot.compile_fused(plan, fmt, "bf16", 90)
            code = machine_code.read(compiled.asm["cubin"], 90)
            spills = sum(machine_code.count(code.loop, opcode) for opcode in machine_code.SPILLS)
            text = f"registers {code.registers} stack {code.stack_bytes} spills in loop {spills}"
            print(fmt, plan_name(plan), text, f"shared {compiled.metadata.shared}", flush=True)
            failed += compiled.metadata.shared > 232448
        except Exception as error:  # shown, and counted
            failed += 1
            print(fmt, plan_name(plan), f"{type(error).__name__}: {str(error)[-300:]}", flush=True)
    return int(failed > 0)


def plan_name(plan: Plan) -> str:
    """A short name: path, tile, stages, parts, warps of the fused kernel, and a letter for each switch."""
    if plan.path == "dequant_cublas":
        return f"dq{plan.chunk}"
    name = f"{plan.path[0]}{plan.bn}x{plan.bm}s{plan.stages}k{plan.split}"
    flags = {"w": plan.walk, "x": plan.scaled, "c": not plan.block_sums, "d": plan.dependent}
    return name + f"n{plan.warps}" * (plan.path == "fused") + "".join(letter for letter, on in flags.items() if on)


def check_cases() -> list[str]:
    """Case ids that between them take every format, dtype, activation, regime and ragged size on the GPU."""
    from vbench.reference.ops import fp4 as ops
    from vbench.reference.ops.types import DTYPES

    shapes = (
        (1, 200, 384), (3, 64, 4096), (8, 130, 2304), (9, 257, 1152), (16, 1024, 8192), (33, 96, 640), (64, 300, 4096),
        (65, 128, 256), (200, 500, 896), (512, 640, 1024), (24, 12800, 1152), (60, 12800, 4096),
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
                if fmt == "mxfp4":
                    ids += [
                        ops.FP4_QUANTIZE.case(fmt=encoding, w=x, dist=dist, n=100, k=1152).id
                        for encoding in ops.MXFP4_ENCODINGS
                    ]
                ids.append(ops.FP4_DEQUANTIZE.case(fmt=fmt, y=x, dist=dist, n=100, k=1152).id)
    ids += [f"one_hot:{fmt}:{x}:{m}" for fmt in ops.FORMATS for x in ("bf16", "fp16") for m in (8, 16, 64, 128, 300)]
    ids += [f"one_hot_wide:mxfp4:{x}:{m}" for x in ("bf16", "fp16") for m in (8, 64, 300)]
    return ids


def check_one_hot(name: str, plan: Plan | None = None) -> dict[str, Any]:
    """x of unit rows must give decoded columns bitwise, with random codes and, for nvfp4, every positive E4M3 scale."""
    import torch

    from vbench.reference import fp4
    from vbench.reference.ops import fp4 as ops

    kind, fmt, x_name, m_text = name.split(":")
    m, n, k = int(m_text), 192, 4352
    case = ops.FP4_LINEAR.case(fmt=fmt, x=x_name, m=m, n=n, k=k)
    weight = _canonical(fmt, n, k, 7)
    if fmt == "nvfp4":
        weight["scale"] = torch.randint(0, 0x7F, (n, k // 16), device="cuda").to(torch.uint8).view(torch.float8_e4m3fn)
    if kind == "one_hot_wide":
        weight["scale"] = torch.randint(0, 255, (n, k // 32), device="cuda").to(torch.uint8)
    dtype = torch.bfloat16 if x_name == "bf16" else torch.float16
    picks = torch.randint(0, k, (m,), device="cuda")
    inputs = {**weight, "x": torch.nn.functional.one_hot(picks, k).to(dtype)}
    y = torch.full((m, n), float("nan"), device="cuda", dtype=dtype)
    kernel = linear.make(case, "", "cuda") if plan is None else linear.LinearKernel(case, "cuda", plan)
    kernel.bind(inputs, {"y": y})()
    if fmt == "nf4" and kernel.plan.path != "dequant_cublas":  # its values are rounded to the operand's type first
        values = torch.tensor(fp4.NF4_TABLE, device="cuda").to(dtype).float()[fp4.unpack(inputs["codes"]).long()]
        want = (values * inputs["scale"].repeat_interleave(64, dim=1)).T[picks]
    else:
        want = fp4.decode_float64(fmt, inputs).T[picks].float()
    want = want.to(dtype)  # value x scale rounds once in float32, then to y
    wrong = int((y != want).sum())
    return {"case": name, "outcome": "PASSED" if wrong == 0 else "WRONG", "wrong": wrong, "plan": asdict(kernel.plan)}


def check_case(case_id: str, plan: Plan | None = None) -> dict[str, Any]:
    """Run one case natively against its oracle, poisoned output, twice."""
    import torch

    from vbench.reference.ops import fp4 as ops
    from vbench.spec import resolve

    if case_id.startswith("one_hot"):
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
                same = got == e.value
                if e.value.is_floating_point():
                    same |= got.isnan() & e.value.isnan()
                wrong += int((~same).sum())
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
    group = packing.GROUPS[fmt]
    shape = (1,) if group == 0 else (n,) if group == -1 else (n, k // group)
    scale = torch.rand(shape, generator=gen, device="cuda") * 1.5 + 0.5
    if fmt == "nvfp4":
        scale = scale.to(torch.float8_e4m3fn)
    elif fmt == "mxfp4":
        scale = torch.randint(118, 126, shape, generator=gen, device="cuda").to(torch.uint8)
    return {
        "codes": torch.randint(0, 256, (n, k // 2), generator=gen, device="cuda", dtype=torch.uint8),
        "scale": scale,
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
        tiles = ((2, 512, 8),) if group <= 0 else [(b // (group // 2), group // 2, 4) for b in (1024, 2048)]
        for tile in tiles:
            decode = codec.decode_launcher(fmt, "bf16", want, target, n, k, tile)
            decode()
            good = bool(torch.equal(target, fp4.dequantize(fmt, want, torch.bfloat16)))
            rates[f"decode {fmt} {tile}{'' if good else ' WRONG'}"] = moved / graph_seconds([decode] * 3, 10)
    report["codecs"] = rates
    return "codec TB/s: " + ", ".join(f"{name} {rate * 1e-12:.2f}" for name, rate in rates.items())


def bench_cell(
    fmt: str, m: int, n: int, k: int, weights: list[dict[str, Any]], packs: dict[Any, list[Any]], x: Any, base: float
) -> list[dict[str, Any]]:
    """Check and time every candidate of one cell: one row each, with its plan, error, time, ratio or problem."""
    import torch

    from vbench.kernels.triton.linear_dequant import OPERAND_ROUNDINGS, bind_dequant
    from vbench.reference.linear import linear_oracle
    from vbench.reference.ops.fp4 import FP4_LINEAR
    from vbench.spec import Numerics

    case = FP4_LINEAR.case(fmt=fmt, x="bf16", m=m, n=n, k=k)
    inputs = {**weights[0], "x": x}
    y = torch.empty(m, n, device="cuda", dtype=torch.bfloat16)
    oracles: dict[tuple[str, ...], Any] = {}
    rows = []
    for plan in candidates(m, n, k, fmt):
        row: dict[str, Any] = {"fmt": fmt, "m": m, "n": n, "k": k, "plan": asdict(plan), "name": plan_name(plan)}
        rows.append(row)
        try:
            rounding: tuple[str, ...] = ("bf16",) if fmt == "nf4" else ("bf16", "bf16") if plan.scaled else ()
            if plan.path == "dequant_cublas":
                calls = [bind_dequant(fmt, w, x, y, "bf16", "none", plan.chunk) for w in weights[:4]]
                rounding = OPERAND_ROUNDINGS[fmt, "bf16"]
            else:
                key = (_order(plan), plan.bkw)
                if key not in packs:
                    packs[key] = [linear.pack_for(plan, fmt, w, n, k, "bf16") for w in weights]
                calls = [linear.bind_packed(w, x, None, y, "bf16", "none", plan) for w in packs[key]]
            if rounding not in oracles:
                oracles[rounding] = linear_oracle(case, inputs, Numerics("tensor_core", rounding), 128)["y"]
            e = oracles[rounding]
            y.fill_(float("nan"))
            calls[0]()
            got = (e.take(y) if e.take else y).double()
            worst = ((got - e.value).abs() / e.budget).nan_to_num(nan=1e9).max()
            row["worst_over_budget"] = float(worst)
            if not worst <= 1:
                row["problem"] = "wrong"
                continue
            first = y.clone()
            calls[0]()
            row["repeats"] = bool(torch.equal(first, y))
            if m <= linear.SPLIT_MAX_M:
                positions = torch.arange(1, n + 1, device="cuda")
                row["row0"] = int(first[0].view(torch.int16).long().mul(positions).sum())
            row["seconds"] = graph_seconds(calls, 10 if m >= 256 else 16)
            row["ratio"] = base / row["seconds"]
        except Exception as error:  # a failing variant is a result of tuning
            row["problem"] = f"{type(error).__name__}: {str(error)[:160]}"
    return rows


def bench_regime(regime: str, cells: Sequence[Cells], out: Path, deadline: float) -> None:
    """All cells of a regime; appends rows to FOLDER/REGIME.jsonl as they come. Starts no cell after ``deadline``."""
    import torch

    gen = torch.Generator(device="cuda").manual_seed(1)
    with (out / f"{regime}.jsonl").open("w") as f:
        for cell in cells:
            n, k, formats, ms = cell.n, cell.k, cell.formats, cell.tokens(regime)
            if not ms:
                continue
            count = max(2, ROTATE_BYTES // (2 * n * k))
            dense = [torch.randn(n, k, generator=gen, device="cuda", dtype=torch.bfloat16) for _ in range(count)]
            tokens = torch.randn(max(ms), k, generator=gen, device="cuda").to(torch.bfloat16)
            base: dict[int, float] = {}
            for m in ms:
                y = torch.empty(m, n, device="cuda", dtype=torch.bfloat16)
                base[m] = graph_seconds([partial(torch.mm, tokens[:m], w.T, out=y) for w in dense], 16)
                f.write(json.dumps({"base": base[m], "m": m, "n": n, "k": k}) + "\n")
            del dense
            for fmt in formats:
                weights = [_canonical(fmt, n, k, seed) for seed in range(max(2, ROTATE_BYTES // (n * k // 2)))]
                packs: dict[Any, list[Any]] = {}
                for m in ms:
                    if time.time() > deadline:
                        f.write(json.dumps({"skipped": f"{fmt} {n}x{k} m={m}"}) + "\n")
                        continue
                    for row in bench_cell(fmt, m, n, k, weights, packs, tokens[:m], base[m]):
                        f.write(json.dumps(row) + "\n")
                    f.flush()
        if regime == "few" and any(cell.ms is None for cell in cells):
            report: dict[str, Any] = {}
            f.write(json.dumps({"codecs": bench_codecs(report)}) + "\n")


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Best three variants a cell, problems, and whether a row's bits depend on the tokens beside it."""
    lines = []
    cells: dict[Any, list[dict[str, Any]]] = {}
    for row in rows:
        if "fmt" in row:
            cells.setdefault((row["n"], row["k"], row["fmt"]), []).append(row)
    bases = {(r["n"], r["k"], r["m"]): r["base"] for r in rows if "base" in r}
    for (n, k), items in groupby(sorted(bases.items()), key=lambda item: item[0][:2]):
        lines.append(f"bf16 {n}x{k} us: " + " ".join(f"{m}={base * 1e6:.1f}" for (_, _, m), base in items))
    for (n, k, fmt), variants in cells.items():
        best = {}
        for v in sorted((v for v in variants if "seconds" in v), key=lambda v: -float(v["seconds"])):
            best[v["m"]] = v["ratio"]
        ratios = " ".join(f"{m}={best[m]:.2f}" for m in sorted(best))
        lines.append(f"{n}x{k} {fmt.removeprefix('absmax7_')}: {ratios}")
    for (n, _, fmt), variants in cells.items():
        for m in sorted({v["m"] for v in variants} if n == SHAPES[0][0] else {64, 256}):
            timed = sorted((v for v in variants if v["m"] == m and "seconds" in v), key=lambda v: float(v["seconds"]))
            text = " ".join(f"{v['name']}={v['seconds'] * 1e6:.1f}({v['ratio']:.2f})" for v in timed[:4])
            lines.append(f"{n} {fmt.removeprefix('absmax7_')} {m}: {text}")
    for r in rows:
        lines += [str(r[name])[:400] for name in ("skipped", "codecs", "regime") if name in r]
    problems = Counter(f"{r['fmt']} {r['name']} {r['problem']}"[:150] for r in rows if "problem" in r)
    lines += [f"PROBLEM {times} x {text}" for text, times in problems.most_common(8)]
    unsteady = [r["name"] for r in rows if r.get("repeats") is False]
    bits: dict[Any, set[int]] = {}
    for r in rows:
        if "row0" in r:
            bits.setdefault((r["n"], r["k"], r["fmt"], r["plan"]["split"]), set()).add(r["row0"])
    varying = [key for key, seen in bits.items() if len(seen) > 1]
    lines.append(f"not repeatable: {unsteady[:5]}; row 0 of {len(bits)} weights x splits depends on m: {varying[:6]}")
    return lines


def run_checks(out: Path, seconds: float) -> None:
    """The check cases in parallel processes; FOLDER/checks.json has their outcomes."""
    checks = multiprocessing.get_context("spawn").Pool(12)
    checks.apply_async(str).get(60)  # the pool starts while nothing is waited for
    summary = checks.map_async(check_case, check_cases(), chunksize=1)
    try:
        results = summary.get(seconds)
        (out / "checks.json").write_text(json.dumps(results))
        wrong = [c for c in results if c["outcome"] != "PASSED"]
        worst = max((c.get("worst", 0.0) for c in results), default=0.0)
        print(f"{len(results)} check cases, {len(wrong)} not passed, worst error/budget {worst:.3f}", flush=True)
        for c in wrong[:10]:
            print("  ", str(c)[:260], flush=True)
    except multiprocessing.TimeoutError:
        print(f"the check cases did not end in {seconds:.0f} s", flush=True)
    checks.terminate()


def bench(out: Path, cells: Sequence[Cells], seconds: float, check_seconds: float) -> None:
    """See the module's text. The regimes share what is left of ``seconds`` after compiling and checking.

    ``check_seconds``: how long check cases may take; 0 for none.
    """
    import torch

    began = time.time()
    order = all_jobs(cells)
    spawn = multiprocessing.get_context("spawn")
    with spawn.Pool(16) as pool:
        problems = pool.map(_compile_one, order, chunksize=2)
        print(f"compiled {len(order)} variants in {time.time() - began:.0f} s", flush=True)
        for text, times in Counter(p for p in problems if p).most_common(6):
            print(f"  {times} x {text}")
    if check_seconds:
        run_checks(out, check_seconds)
    print(f"checked after {time.time() - began:.0f} s", flush=True)

    rows: list[dict[str, Any]] = []
    shares = {"few": 0.25, "mid": 0.27, "many": 0.48}
    shares = {regime: share for regime, share in shares.items() if any(cell.tokens(regime) for cell in cells)}
    left = began + seconds - time.time()
    for regime, share in shares.items():
        deadline = time.time() + left * share / sum(shares.values())
        process = spawn.Process(target=bench_regime, args=(regime, cells, out, deadline - 3))
        process.start()
        process.join(deadline + 12 - time.time())
        if process.is_alive():
            process.kill()
            rows.append({"regime": f"{regime} was killed: a variant hung or the time was too short"})
        elif process.exitcode:
            rows.append({"regime": f"{regime} ended with exit code {process.exitcode}"})
        path = out / f"{regime}.jsonl"
        if path.exists():
            rows += [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]
        print(f"{regime} done after {time.time() - began:.0f} s", flush=True)
    props = torch.cuda.get_device_properties(0)
    report = {"gpu": props.name, "torch": torch.__version__, "triton": triton.__version__, "rows": rows}
    (out / "bench.json").write_text(json.dumps(report))
    print(f"{props.name}, {sum('seconds' in r for r in rows)} variants timed, {time.time() - began:.0f} s")
    print("\n".join(table(rows)))


def main(arguments: list[str]) -> int:
    """See the module's text."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("action", choices=("bench", "compile"))
    parser.add_argument("--out", type=Path, help="bench: folder of the records")
    parser.add_argument("--seconds", type=float, default=200.0, help="bench: of everything, compiling included")
    parser.add_argument("--checks", type=float, default=60.0, help="bench: seconds the check cases may take; 0: none")
    parser.add_argument("--cells", type=parse_cells, nargs="+", default=CELLS, metavar="NxK:M,M")
    parser.add_argument("--formats", nargs="+", choices=sorted(packing.GROUPS))
    chosen = parser.parse_args(arguments)
    cells = tuple(
        replace(c, formats=tuple(f for f in c.formats if chosen.formats is None or f in chosen.formats))
        for c in chosen.cells
    )
    if chosen.action == "compile":
        return compile_all(cells)
    if chosen.out is None:
        parser.error("bench writes records: give --out FOLDER")
    chosen.out.mkdir(parents=True, exist_ok=True)
    bench(chosen.out, cells, chosen.seconds, chosen.checks)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
