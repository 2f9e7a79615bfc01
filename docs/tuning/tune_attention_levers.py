"""Time what might bring the attention forward to cuDNN's rate where it lags: grouped heads, S = 512 and 1024.

    python docs/tuning/tune_attention_levers.py --out DIR [--seconds 240] [--rounds 15] [--only WORD] [--compile-only]

1. *Compile*: every candidate for sm_90 on all cores, no GPU; out goes what spills more than its gate allows or waits
for each product by itself. 2. *Check*: the rest in processes of their own, on shapes that no tile divides and on scores
that grow along the walk, against float64; 100 launches must give the same bits, and one batch element alone the same as
among others. 3. *Time*: what passed, beside cuDNN, in interleaved rounds of CUDA-graph replays over two rotated input
sets, the cells worth most first, until ``--seconds`` are over. 4. A short table, last: per cell the ratio to cuDNN
(median of the rounds, and the interval that holds it with 95 %) of what the table says and of the best candidates.

``levers.json`` in DIR is written after every stage and cell. What was predicted: docs/tuning/attention.md.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

MIB = 1 << 20
#: Launches of each check that must give the same bits.
REPEATS = 100
#: Of a kernel's products, how many may have a wait of their own: all that ptxas runs one by one have.
WAITS_PER_PRODUCT = 0.25
#: Seconds of the whole that are kept for the timing.
TIMING_SHARE = 0.5


@dataclass(frozen=True, slots=True)
class Cell:
    """A case to time: bf16, 16384 tokens. Fields as in the op, ``s`` queries and keys."""

    d: int
    causal: str
    s: int
    hq: int
    hk: int

    @property
    def b(self) -> int:
        return 16384 // self.s

    @property
    def flops(self) -> float:
        """Operations of both products; half of them under a causal mask."""
        return 4.0 * self.b * self.hq * self.s * self.s * self.d * (1.0 if self.causal == "none" else 0.5)

    @property
    def name(self) -> str:
        grouped = f" {self.hq}/{self.hk}" if self.hq != self.hk else ""
        return f"D{self.d}{grouped} S{self.s} {'full' if self.causal == 'none' else 'causal'}"


@dataclass(frozen=True, slots=True)
class Candidate:
    """A kernel, its tile (a GluonTile or a Tile, field by field) and its order of tiles.

    ``l2_mib``: MiB of K and V of the heads walked together, 0 for one K/V head's worth.
    """

    kind: str
    tile: tuple[int, ...]
    l2_mib: int = 32
    even: bool = False

    @property
    def name(self) -> str:
        tile = "-".join(str(int(part)) for part in self.tile)
        return f"{self.kind}:{tile}/{self.l2_mib}M{'e' if self.even else ''}"


def cell(d: int, causal: str, s: int) -> Cell:
    return Cell(d, causal, s, 2048 // d, 2048 // d)


#: Worth most first: what was furthest below 0.97 of cuDNN.
CELLS = (
    Cell(128, "none", 4096, 32, 8),
    cell(128, "none", 512),
    cell(64, "none", 1024),
    cell(128, "none", 1024),
    cell(128, "none", 4096),
    cell(64, "none", 512),
    cell(64, "top_left", 16384),
    cell(64, "none", 4096),
    cell(128, "top_left", 512),
    cell(64, "top_left", 512),
    cell(64, "top_left", 4096),
    cell(128, "none", 16384),
    cell(64, "none", 16384),
)
#: Head dim 128 up to S = 1024, where the plain kernel is below 0.72 of cuDNN. (block_m, block_n, warps, stages).
PLAIN_LENGTH = 1024
PLAIN_TILES = ((64, 64, 4, 3), (128, 32, 8, 3), (128, 32, 8, 4), (128, 128, 8, 2), (64, 32, 4, 3))


def table_tile(where: Cell) -> tuple[int, ...]:
    """The Gluon tile that the tables give."""
    from vbench.kernels.triton.attention_tiles import choose_gluon

    tile = choose_gluon(where.d, where.s, causal=where.causal != "none")
    return tuple(int(value) for value in asdict(tile).values())


def table_candidate(where: Cell) -> Candidate:
    return Candidate("gluon", table_tile(where))


def plain_table(where: Cell) -> Candidate:
    """The plain tile that the tables give."""
    from vbench.kernels.triton.attention_tiles import choose

    tile = choose("bf16", where.d, where.s, where.s, causal=where.causal != "none", descriptors=True, shared_227kb=True)
    return Candidate("plain", tuple(asdict(tile).values()))


def candidates(where: Cell) -> list[Candidate]:
    """What is timed in a cell, what the tables say first."""
    tile = table_tile(where)
    keeping = (*tile[:6], 1)
    found = [table_candidate(where)]
    if where.causal == "none":
        found += [Candidate("gluon", tile, mib) for mib in (16, 8, 4, 0)]
        found += [Candidate("gluon", tile, mib, even=True) for mib in (32, 8)]
        best_order = 8
    else:
        # Smaller groups leave the static schedule up to half again as long as its even share.
        found += [Candidate("gluon", tile, 16)]
        best_order = 32
    found += [Candidate("gluon", keeping, best_order)]
    if where.d == 64:
        for polynomial in (1, 2):
            found += [Candidate("gluon", (*tile[:5], polynomial, 0), best_order)]
        found += [Candidate("gluon", (*tile[:5], 1, 1), best_order)]
    if where.d == 128 and where.s <= PLAIN_LENGTH:
        found += [plain_table(where)]
        found += [Candidate("plain", plain, mib) for plain in PLAIN_TILES for mib in (32, 8)]
    return list(dict.fromkeys(found))


def code_key(candidate: Candidate, where: Cell) -> str:
    """What the machine code depends on: kernel, tile, head dim, mask."""
    tile = "-".join(str(int(part)) for part in candidate.tile)
    return f"{candidate.kind}:{tile}:D{where.d}:{'full' if where.causal == 'none' else 'causal'}"


# --- 1. compile ------------------------------------------------------------------------------------------------------


def compiled_figures(kind: str, tile: Sequence[int], d: int, causal: bool) -> dict[str, Any]:
    """Registers, local memory, products and waits of a candidate's loops, compiled for sm_90; no GPU."""
    from vbench import machine_code
    from vbench.kernels.triton import attention_aot
    from vbench.kernels.triton.attention_tiles import Tile

    if kind == "gluon":
        configuration = attention_aot.gluon("bf16", d, gluon_tile(tile), causal=causal)
    else:
        configuration = attention_aot.plain("bf16", d, Tile(*tile), causal=causal, descriptors=True, arch=90)
    cubin = configuration.compile()
    code = machine_code.read(cubin.code, 90)
    return {
        "registers": code.registers,
        "spill_bytes": code.spill_bytes,
        "spill_bytes_allowed": configuration.spill_bytes_allowed,
        "shared_bytes": cubin.dynamic_shared_bytes,
        "products": machine_code.count(code.loop, "HGMMA"),
        "waits": machine_code.count(code.loop, "WARPGROUP.DEPBAR"),
        "exponentials": machine_code.count(code.loop, "MUFU.EX2"),
        "instructions": sum(code.loop.values()),
    }


def gluon_tile(tile: Sequence[int]) -> Any:
    from vbench.kernels.triton.attention_tiles import GluonTile

    block_n, stages, workers, registers, early, polynomial, keep = tile
    return GluonTile(block_n, stages, workers, registers, bool(early), polynomial, bool(keep))


def refused(figures: Mapping[str, Any]) -> str:
    """Why a candidate is not worth timing, or ``""``."""
    if figures["spill_bytes"] > figures["spill_bytes_allowed"]:
        return f"{figures['spill_bytes']} bytes of local memory, {figures['spill_bytes_allowed']} allowed"
    if not figures["products"]:
        return "no warp-group product in its loops"
    if figures["waits"] > WAITS_PER_PRODUCT * figures["products"]:
        return f"{figures['waits']} waits for {figures['products']} products: they run one by one"
    return ""


def compile_all(pairs: Iterable[tuple[Candidate, Cell]]) -> dict[str, dict[str, Any]]:
    """``code_key`` -> figures, ``refused`` among them, of every machine code once, on all cores."""
    jobs = {code_key(candidate, where): (candidate, where) for candidate, where in pairs}
    found: dict[str, dict[str, Any]] = {}
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
        futures = {
            key: pool.submit(compiled_figures, candidate.kind, candidate.tile, where.d, where.causal != "none")
            for key, (candidate, where) in jobs.items()
        }
        for key, future in futures.items():
            try:
                figures = future.result()
            except Exception as error:  # a compiler may raise anything; the others go on
                found[key] = {"refused": f"{type(error).__name__}: {str(error)[:300]}"}
                continue
            found[key] = {**figures, "refused": refused(figures)}
    return found


# --- 2. check --------------------------------------------------------------------------------------------------------

#: (dtype, causal, b, hq, hk, sq, sk, rising): lengths that no tile divides. rising: early keys, which are walked last,
#: get the large scores, so that the peak grows by more than 2^8 many times.
CHECKS = (
    ("bf16", "none", 2, 8, 2, 517, 1023, False),
    ("fp16", "bottom_right", 2, 4, 4, 1300, 777, False),
    ("bf16", "top_left", 3, 16, 4, 777, 900, True),
    ("fp16", "none", 2, 8, 8, 300, 2049, True),
)


def bind(candidate: Candidate, case: Any, inputs: Any, outputs: Any) -> Any:
    """The launch of a candidate."""
    from vbench.kernels.triton.attention import make
    from vbench.kernels.triton.attention_tiles import Order, Tile

    kernel: Any = make(case, "gluon" if candidate.kind == "gluon" else "", "cuda")
    if candidate.kind == "gluon":
        order = Order(candidate.l2_mib * MIB, candidate.even)
        return kernel.bind_tile(inputs, outputs, gluon_tile(candidate.tile), order)
    return kernel.bind_tile(inputs, outputs, Tile(*candidate.tile), True, candidate.l2_mib * MIB)


def checked(candidate: Candidate, d: int) -> dict[str, Any]:
    """Worst error / budget over ``CHECKS``, whether every launch and a batch element alone gave the same bits."""
    import torch
    from tune_attention import attention_case, make_inputs, poisoned_outputs, worst_over_budget

    worst, same, alone_same = 0.0, True, True
    for dtype, causal, b, hq, hk, sq, sk, rising in CHECKS:
        inputs = make_inputs(b, hq, hk, sq, sk, d, dtype, 7)
        if rising:
            ramp = torch.linspace(8.0, 0.1, sk, device="cuda")[:, None]
            inputs["k"] = (inputs["k"] * ramp).to(inputs["k"].dtype)
        outputs, again = poisoned_outputs(inputs), poisoned_outputs(inputs)
        case = attention_case(dtype, causal, b, hq, hk, sq, sk, d)
        bind(candidate, case, inputs, outputs)()
        repeat = bind(candidate, case, inputs, again)
        for _ in range(REPEATS):
            repeat()
            same = same and all(torch.equal(outputs[name], again[name]) for name in outputs)
        one = {name: tensor[:1].contiguous() for name, tensor in inputs.items()}
        alone = poisoned_outputs(one)
        bind(candidate, attention_case(dtype, causal, 1, hq, hk, sq, sk, d), one, alone)()
        alone_same = alone_same and all(torch.equal(outputs[name][:1], alone[name]) for name in alone)
        worst = max(worst, worst_over_budget(inputs, outputs, causal, dtype))
    return {"worst": worst, "same": same, "batch_invariant": alone_same}


def passed(row: Mapping[str, Any]) -> bool:
    return bool(row["worst"] <= 1.0 and row["same"] and row["batch_invariant"])


def check_all(jobs: Mapping[str, tuple[Candidate, int]], processes: int, seconds: float) -> dict[str, dict[str, Any]]:
    """Each job's verdict; those of a process that crashes or runs out of time are failures."""
    names = list(jobs)
    groups = [group for group in (names[i::processes] for i in range(processes)) if group]
    children = []
    for group in groups:
        text = json.dumps([[name, asdict(jobs[name][0]), jobs[name][1]] for name in group])
        command = [sys.executable, __file__, "--check", text]
        children.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
    deadline = time.monotonic() + seconds
    rows: dict[str, dict[str, Any]] = {}
    for group, child in zip(groups, children, strict=True):
        try:
            text, errors = child.communicate(timeout=max(1.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            child.kill()
            text, errors = child.communicate()[0], "out of time"
        rows |= {row["name"]: row for row in map(json.loads, text.splitlines())}
        for name in group:
            missing = {"worst": math.inf, "same": False, "batch_invariant": False, "error": errors[-400:]}
            rows.setdefault(name, {"name": name, **missing})
    return rows


# --- 3. time ---------------------------------------------------------------------------------------------------------


def time_cell(where: Cell, timed: Sequence[Candidate], rounds: int) -> dict[str, list[float]]:
    """Seconds of a launch in each of the interleaved rounds: ``cudnn``, then each candidate by name."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention
    from tune_attention import attention_case, graph_of, make_inputs, poisoned_outputs, replay_in_turn

    case = attention_case("bf16", where.causal, where.b, where.hq, where.hk, where.s, where.s, where.d)
    sets = [
        make_inputs(where.b, where.hq, where.hk, where.s, where.s, where.d, "bf16", seed) for seed in range(2)
    ]  # fmt: skip
    outs = [poisoned_outputs(inputs) for inputs in sets]
    # About 5 ms a replay at 550 TFLOP/s, an even number of launches, so that both sets are used as often.
    repeats = max(2, 2 * round(0.5 * 5e-3 / (where.flops / 5.5e14)))
    masked, grouped = where.causal != "none", where.hq != where.hk

    def peer(inputs: Any) -> Any:
        def launch() -> None:
            with sdpa_kernel([SDPBackend.CUDNN_ATTENTION]):
                scaled_dot_product_attention(
                    inputs["q"], inputs["k"], inputs["v"], is_causal=masked, enable_gqa=grouped
                )

        return launch

    graphs = {"cudnn": graph_of([peer(inputs) for inputs in sets], repeats)}
    for candidate in timed:
        launches = [bind(candidate, case, inputs, out) for inputs, out in zip(sets, outs, strict=True)]
        graphs[candidate.name] = graph_of(launches, repeats)
    return replay_in_turn(graphs, rounds, repeats)


# --- 4. table --------------------------------------------------------------------------------------------------------


def median_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Median, and the narrowest pair of order statistics that holds it with 95 % (sign test); all where too few."""
    ordered, n = sorted(values), len(values)
    below = 0
    # P(fewer than k + 1 of n values below the median), both tails together.
    while below + 1 <= n // 2 and 2 * sum(math.comb(n, i) for i in range(below + 1)) / 2**n <= 0.05:
        below += 1
    outer = max(0, below - 1)
    return median(ordered), ordered[outer], ordered[n - 1 - outer]


def ratios(samples: Mapping[str, Sequence[float]]) -> dict[str, tuple[float, float, float]]:
    """Candidate -> (median, low, high) of cuDNN's seconds over its own, round by round."""
    return {
        name: median_interval([peer / own for peer, own in zip(samples["cudnn"], seconds, strict=True)])
        for name, seconds in samples.items()
        if name != "cudnn"
    }


def shown(row: Mapping[str, Any]) -> list[str]:
    """A cell's lines: for each kind what the tables say, then the two best that are something else."""
    where = Cell(**row["cell"])
    found = ratios(row["samples_s"])
    rate = where.flops / median(row["samples_s"]["cudnn"]) / 1e12
    lines = []
    for kind, table in (("gluon", table_candidate(where).name), ("plain", plain_table(where).name)):
        ranked = sorted((name for name in found if name.startswith(kind + ":")), key=lambda name: -found[name][0])
        if not ranked:
            continue
        best = [name for name in ranked if name != table][:2]
        parts = []
        for name in ([table] if table in found else []) + best:
            middle, low, high = found[name]
            label = "table" if name == table else name[len(kind) + 1 :]
            parts.append(f"{label} {middle:.3f} [{low:.3f}, {high:.3f}]")
        lines.append(f"{where.name:22s} cudnn {rate:4.0f} | {kind} | " + " | ".join(parts))
    return lines


def save(folder: Path, report: Mapping[str, Any]) -> None:
    """Write ``levers.json`` whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / "levers.json.partial"
    partial.write_text(json.dumps(report, indent=1), encoding="utf-8")
    partial.replace(folder / "levers.json")


def check_main(text: str) -> None:
    """A child of stage 2: one line of JSON a job."""
    for name, fields, d in json.loads(text):
        fields["tile"] = tuple(fields["tile"])
        print(json.dumps({"name": name, **checked(Candidate(**fields), d)}), flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(), help="folder for levers.json")
    parser.add_argument("--seconds", type=float, default=240.0, help="when to stop timing")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--only", default="", help="cells whose name holds this, such as 'S512' or '32/8'")
    parser.add_argument("--compile-only", action="store_true", help="stage 1 alone; needs no GPU")
    parser.add_argument("--check", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.check:
        check_main(options.check)
        return 0
    began = time.monotonic()
    cells = [where for where in CELLS if options.only in where.name]
    if not cells:
        parser.error(f"--only {options.only!r}: no cell is called so; there are {', '.join(w.name for w in CELLS)}")
    plan = [(where, candidates(where)) for where in cells]
    report: dict[str, Any] = {"compiled": compile_all((c, where) for where, found in plan for c in found)}
    save(options.out, report)
    compiled = report["compiled"]
    print(f"{len(compiled)} machine codes in {time.monotonic() - began:.0f} s")
    for key, figures in compiled.items():
        if figures["refused"]:
            print("REFUSED", key, figures["refused"])
    if options.compile_only:
        for key, figures in compiled.items():
            if not figures["refused"]:
                print(key, *(f"{name}={value}" for name, value in figures.items() if name != "refused"))
        return 0
    plan = [(where, [c for c in found if not compiled[code_key(c, where)]["refused"]]) for where, found in plan]
    jobs = {f"{c.name}:D{where.d}": (c, where.d) for where, found in plan for c in found}
    left = options.seconds * (1 - TIMING_SHARE) - (time.monotonic() - began)
    report["checked"] = check_all(jobs, min(16, os.cpu_count() or 4), max(30.0, left))
    save(options.out, report)
    wrong = {name: row for name, row in report["checked"].items() if not passed(row)}
    print(f"{len(jobs)} candidates checked by {time.monotonic() - began:.0f} s, {len(wrong)} failed")
    for name, row in wrong.items():
        print("FAILED", name, row["worst"], row["same"], row["batch_invariant"], row.get("error", ""))
    import torch

    report["environment"] = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__}
    report["timed"] = []
    for where, found in plan:
        if time.monotonic() - began > options.seconds:
            print(f"out of time before {where.name}")
            break
        timed = [c for c in found if f"{c.name}:D{where.d}" not in wrong]
        report["timed"].append({"cell": asdict(where), "samples_s": time_cell(where, timed, options.rounds)})
        save(options.out, report)
    worst = max((row["worst"] for row in report["checked"].values() if passed(row)), default=None)
    print(
        report["environment"], f"{time.monotonic() - began:.0f} s; worst error/budget {worst}; cuDNN's time over ours"
    )
    for row in report["timed"]:
        print("\n".join(shown(row)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
