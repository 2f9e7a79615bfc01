"""fp4_linear: which kernel serves which case (explicit tables), binding, and the capability check.

Batch invariance: up to SPLIT_MAX_M tokens the parts of K and the order inside them depend on (n, k) only and are the
same in every kernel, so a row of y does not depend on how many tokens come with it. Beyond, K is summed front to back.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, Literal

import torch
import triton

from vbench.backend import Device, Launch
from vbench.errors import Unsupported
from vbench.kernels.triton import linear_gluon_host, linear_stationary_host
from vbench.kernels.triton._fp4 import nf4_table
from vbench.kernels.triton.linear_dequant import OPERAND_ROUNDINGS, bind_dequant, takes
from vbench.kernels.triton.linear_fused import fused_linear_kernel
from vbench.kernels.triton.packing import (
    BYTE_SCALES,
    GROUPS,
    ROW_PAD,
    Order,
    PackedWeight,
    check_weight,
    has_far_scales,
    has_wide_scales,
    pack_weight,
)
from vbench.kernels.triton.probe import INTERPRETED, check_device
from vbench.spec import TORCH_DTYPE_NAMES, Case, Numerics

SPLIT_MAX_M = 64
#: n times the parts of K should reach this: 112 programs of 256 rows for 132 multiprocessors.
SPLIT_ROWS = 28672
#: Features from which the output tiles alone fill 132 multiprocessors (100 tiles of 128 features), so that one program
#: of the fused kernel walks all parts of K.
WALK_ROWS = 12800
#: Columns of K that a sum of its own is formed of, up to SPLIT_MAX_M tokens: what a packed block of the fused kernel
#: holds there.
PART_COLUMNS = 256
#: Such blocks a program of a split should at least have, so that its pipeline fills.
MIN_BLOCKS_PER_SPLIT = 2


@dataclass(frozen=True, slots=True)
class Plan:
    """How one case is computed.

    Args:
        path: ``fused`` (tiles; decoding in registers), ``gluon`` (the same on Hopper, warp-specialised),
            ``stationary`` (few tokens on Hopper, tokens in registers) or ``dequant_cublas`` (decode to scratch memory,
            then the vendor's GEMM).
        bn, bm: output features and tokens of a tile.
        bkw: columns of a packed tile; a K block is four times as wide.
        warps, stages: as Triton means them (``gluon``: all its partitions' warps).
        split: parts that K is summed in (in different programs, but for ``walk``).
        walk: ``fused``: one program sums all parts, in turn.
        scaled: ``gluon``, groups of 128: scales multiply weights instead of sums; both are rounded to x's dtype.
        block_sums: ``fused``: add one float32 sum a K block instead of carrying the matrix unit's accumulator along.
        chunk: ``dequant_cublas``: weight rows decoded at a time, into scratch memory of as many rows.
        wide: mxfp4 with float32 scales on sums instead of scales in the operand: see ``packing.PackedWeight``.
        dependent: ``stationary``: begin to fetch weights before the kernel in front has finished.
    """

    path: Literal["fused", "gluon", "stationary", "dequant_cublas"]
    bn: int
    bm: int
    bkw: int
    warps: int
    stages: int
    split: int = 1
    walk: bool = False
    scaled: bool = False
    block_sums: bool = True
    chunk: int = 0
    wide: bool = False
    dependent: bool = False


Table = tuple[tuple[int, Plan], ...]

_UP_TO_32: Table = (
    (8, Plan("fused", 64, 8, 64, 4, 4)),
    (16, Plan("fused", 64, 16, 64, 4, 3)),
    (32, Plan("fused", 64, 32, 64, 4, 3, walk=True)),
)
#: Warps of 32 rows or with two warps a program round a g128 sum in another order (docs/tuning/fp4.md, run 4): no entry
#: up to SPLIT_MAX_M tokens may have 128 rows on four warps.
_UP_TO_64: Table = (*_UP_TO_32, (64, Plan("fused", 64, 64, 64, 4, 3, walk=True)))
_SCALE_IN_EPILOGUE: Table = (
    (8, Plan("fused", 64, 8, 64, 2, 4)),
    *_UP_TO_64[1:],
    (2**31, Plan("fused", 128, 128, 32, 4, 3, block_sums=False)),
)
_BEYOND_64: Table = (
    (512, Plan("fused", 64, 128, 32, 4, 3)),
    (2**31, Plan("fused", 128, 128, 32, 8, 3)),
)
_E2M1: Table = ((2**31, Plan("fused", 256, 128, 32, 8, 3, block_sums=False)),)
#: Format -> (largest m, plan)..., for 16-bit x. Measured on one H200: docs/tuning/fp4.md.
TABLES: Mapping[str, Table] = {
    "absmax7_tensor": _SCALE_IN_EPILOGUE,
    "absmax7_row": _SCALE_IN_EPILOGUE,
    "absmax7_g128": (*_UP_TO_64, *_BEYOND_64),
    "nvfp4": (*_UP_TO_32, (64, Plan("fused", 128, 64, 64, 8, 3, walk=True)), *_E2M1),
    "mxfp4": (*_UP_TO_64, *_E2M1),
    "nf4": (*_UP_TO_32, (64, Plan("fused", 64, 64, 64, 4, 3)), *_BEYOND_64),
}
#: mxfp4 with float32 scales on sums: a block's code position is a group.
TABLE_WIDE: Table = (
    (16, Plan("fused", 64, 16, 32, 4, 4, wide=True)),
    (64, Plan("fused", 64, 64, 32, 4, 3, wide=True)),
    (2**31, Plan("fused", 64, 128, 32, 8, 3, wide=True)),
)
#: float32 x, whose products run on the ordinary units: small tiles, narrow blocks.
TABLE_FP32: Table = (
    (16, Plan("fused", 64, 16, 16, 4, 3)),
    (2**31, Plan("fused", 64, 32, 16, 8, 3)),
)
#: Gluon tiles (features, tokens, stages) for many tokens and the cost of one wave of them on 132 multiprocessors,
#: microseconds at k = 4096: (integers, E2M1, float32 groups). Chosen is the tile whose whole waves cost least.
GLUON_TILES: tuple[tuple[int, int, int, tuple[float, float, float]], ...] = (
    (256, 128, 3, (43.5, 50.0, math.inf)),
    (128, 128, 4, (23.2, 27.0, 25.0)),
    (128, 64, 6, (18.0, 20.0, 19.0)),
)
GLUON_PROCESSORS = 132
#: What each further part of K adds, in the same unit: its sums go through memory.
GLUON_PART_COST = 1.0
#: Most tokens for which the stationary kernel wins; the fused one reads weights as fast from 16 on.
STATIONARY_MAX_M = 8
#: Format -> smallest m from which decoding to scratch memory and the vendor's GEMM wins.
DEQUANT_FROM_M: Mapping[str, int] = {
    "absmax7_tensor": 3072,
    "absmax7_row": 3072,
    "absmax7_g128": 2048,
    "nvfp4": 2048,
    "mxfp4": 2048,
    "nf4": 192,
}
#: Rows decoded at a time. Slices that stay in L2 were tried (2048 rows) and lose: each pays a launch and a tail.
DEQUANT_CHUNK = 14336


def split_count(n: int, k: int) -> int:
    """Parts of K for up to SPLIT_MAX_M tokens, from n and k only; none is empty."""
    rows = -(-n // ROW_PAD) * ROW_PAD
    blocks = -(-k // PART_COLUMNS)
    split = 1
    while rows * split < SPLIT_ROWS and blocks // (2 * split) >= MIN_BLOCKS_PER_SPLIT and split < 16:
        split *= 2
    while blocks > split * linear_stationary_host.MAX_BLOCKS:
        split *= 2
    part = -(-blocks // split)
    return -(-blocks // part)


def needs_wide(fmt: str, x: str) -> bool:
    """Whether mxfp4's scales must multiply sums whatever they are: float16 operands have not their range."""
    return fmt == "mxfp4" and x == "fp16"


def choose_gluon(m: int, n: int, k: int, fmt: str) -> Plan:
    """The Gluon tile whose waves cost least; K in parts where the tiles would leave most multiprocessors idle."""
    column = 1 if fmt in BYTE_SCALES else 2 if GROUPS[fmt] > 0 else 0

    def tiles(bn: int, bm: int) -> int:
        return -(-m // bm) * -(-n // bn)

    def parts(bn: int, bm: int) -> int:
        blocks, split = -(-k // PART_COLUMNS), 1
        while 2 * split * tiles(bn, bm) <= GLUON_PROCESSORS and blocks // (2 * split) >= 4:
            split *= 2
        return split

    def cost(tile: tuple[int, int, int, tuple[float, float, float]]) -> float:
        bn, bm, _, costs = tile
        split = parts(bn, bm)
        waves = -(-tiles(bn, bm) * split // GLUON_PROCESSORS)
        return waves * costs[column] / split + (split - 1) * GLUON_PART_COST

    bn, bm, stages, _ = min(GLUON_TILES, key=cost)
    # nf4's two sums a block stay in flight together only where they are added block by block.
    sums = fmt == "nf4"
    return Plan(
        "gluon",
        bn,
        64 if sums else bm,
        linear_gluon_host.BKW,
        12,
        stages,
        parts(bn, bm),
        scaled=fmt == "absmax7_g128",
        block_sums=sums,
    )


def choose_plan(
    m: int, n: int, k: int, fmt: str, x: str, act: str, device: Device, hopper: bool = False, wide: bool = False,
    bias: bool = False,
) -> Plan:  # fmt: skip
    """The tables' entry for a case.

    Args:
        hopper: the Gluon kernels can run here and suit the tensors.
        wide: mxfp4 scales must multiply sums (``packing.PackedWeight``).
        bias: there is one.
    """
    if not wide and device == "cuda" and m >= DEQUANT_FROM_M[fmt] and takes(fmt, x, act, bias):
        return Plan("dequant_cublas", 0, 0, 0, 0, 0, chunk=DEQUANT_CHUNK)
    if hopper and m > SPLIT_MAX_M and linear_gluon_host.takes(fmt, x, n, k):
        return choose_gluon(m, n, k, fmt)
    if hopper and m <= STATIONARY_MAX_M and linear_stationary_host.takes(fmt, x, k):
        return Plan("stationary", 16, linear_stationary_host.tokens(m), 16, 16, 1, split_count(n, k), dependent=True)
    table = TABLE_FP32 if x == "fp32" else TABLE_WIDE if wide else TABLES[fmt]
    plan = next(p for limit, p in table if m <= limit)
    if m <= SPLIT_MAX_M:
        plan = replace(plan, split=split_count(n, k), walk=plan.walk and n >= WALK_ROWS)
    return replace(plan, wide=wide)


class LinearKernel:
    """fp4_linear of one case.

    Attributes:
        plan: the path and tile sizes taken.
        options: set by hand, see ``with_options``; they hold for whichever plan is taken.
        numerics: ``tensor_core`` sums for 16-bit x, ``fp32`` for float32 x and in the interpreter.
            ``operand_roundings`` is empty where the decoded weight is exact in the product's operand type.
    """

    produces = ("y",)
    deterministic = True

    def __init__(
        self, case: Case, device: Device, plan: Plan, options: Mapping[str, str] = MappingProxyType({})
    ) -> None:
        self.device: Device = device
        self.options = options
        self.fmt, self.x, self.act = case.text("fmt"), case.text("x"), case.text("act")
        self.m, self.n, self.k = case.axis("m"), case.axis("n"), case.axis("k")
        self.has_bias = bool(case.axis("bias"))
        self.plan = plan
        native = not INTERPRETED and self.x != "fp32"
        roundings: tuple[str, ...] = (self.x,) if native and self.fmt == "nf4" else ()
        if plan.scaled:
            roundings = (self.x, self.x)
        if plan.path == "dequant_cublas":
            roundings = OPERAND_ROUNDINGS[self.fmt, self.x]
        self.numerics = Numerics("tensor_core" if native else "fp32", roundings)

    def _check(self, inputs: Mapping[str, Any]) -> None:
        dtype = getattr(torch, TORCH_DTYPE_NAMES[self.x])
        wanted: dict[str, tuple[int, ...]] = {"x": (self.m, self.k)}
        if self.has_bias:
            wanted["bias"] = (self.n,)
        for name, shape in wanted.items():
            t = inputs[name]
            if tuple(t.shape) != shape:
                raise Unsupported("x_shape", f"{name} is {tuple(t.shape)}, the case says {shape}")
            if t.dtype != dtype:
                raise Unsupported("x_dtype", f"{name} is {t.dtype}, the case says {self.x}")
            if t.stride(-1) != 1:
                raise Unsupported("x_not_row_contiguous", f"{name}'s last stride is {t.stride(-1)}; call .contiguous()")
        for name in (*wanted, "codes", "scale", "global_scale"):
            if inputs[name].device.type != self.device:
                raise Unsupported("wrong_device", f"{name} is on {inputs[name].device}, not on {self.device}")
        check_weight(self.fmt, inputs, self.n, self.k)

    def bind(self, inputs: Mapping[str, Any], out: Mapping[str, Any]) -> Launch:
        """``x`` [m, k] (any row stride), the canonical weight, ``bias`` [n] with bias=1. Writes y [m, n].

        Packs the weight into the kernel's layout (a copy of the same size; the canonical one is not kept). With split
        K the launch owns a workspace: it must not run on two streams at once.

        Raises:
            Unsupported: ``wrong_device``, ``x_shape``, ``x_dtype``, ``x_not_row_contiguous``, ``weight_shape``,
                ``weight_dtype``, ``scale_not_finite_positive``.
        """
        self._check(inputs)
        x, y, bias = inputs["x"], out["y"], inputs.get("bias") if self.has_bias else None
        wide = needs_wide(self.fmt, self.x) or has_wide_scales(inputs["scale"])
        gluon = self.plan.path in ("gluon", "stationary")
        far = self.plan.scaled and has_far_scales(inputs["scale"])
        if (wide and not self.plan.wide) or far or (gluon and not linear_gluon_host.takes_tensors(inputs, x, y)):
            # An explicit rule, not a fallback on failure: the copy engine needs aligned rows, the fast scale decode
            # normal scales, and an operand has not the range of all scales. ``plan`` says what was taken.
            plan = choose_plan(
                self.m, self.n, self.k, self.fmt, self.x, self.act, self.device, wide=wide, bias=self.has_bias
            )
            self.plan = with_options(plan, self.options)
        if self.plan.path == "dequant_cublas":
            return bind_dequant(self.fmt, inputs, x, y, self.x, self.act, self.plan.chunk)
        packed = pack_for(self.plan, self.fmt, inputs, self.n, self.k, self.x)
        return bind_packed(packed, x, bias, y, self.x, self.act, self.plan)


def pack_for(plan: Plan, fmt: str, weight: Mapping[str, Any], n: int, k: int, x: str) -> PackedWeight:
    """The weight in the layout that the plan's kernel reads."""
    twiddled = fmt in BYTE_SCALES and x == "bf16"
    order: Order = "fragments" if plan.path == "stationary" else "rows"
    return pack_weight(fmt, weight, n, k, plan.bkw, twiddled, plan.wide, order)


def fused_call(
    weight: PackedWeight, x: Any, bias: Any, y: Any, x_name: str, act: str, plan: Plan
) -> tuple[tuple[int, int], tuple[Any, ...], dict[str, Any]]:
    """Grid, arguments and compile-time constants of the fused kernel. Allocates split-K workspace and tickets."""
    m, n, k = x.shape[0], weight.n, weight.k
    m_tiles, n_tiles = triton.cdiv(m, plan.bm), triton.cdiv(n, plan.bn)
    split = 1 if plan.walk else plan.split
    elements = m_tiles * n_tiles * split * plan.bn * plan.bm if split > 1 else 4
    partial = torch.empty(elements, dtype=torch.float32, device=x.device)
    tickets = torch.zeros(m_tiles * n_tiles, dtype=torch.int32, device=x.device)
    floats = weight.scale.dtype == torch.float32
    scale = weight.scale if floats else weight.scale.reshape(-1).view(torch.int32)
    table = nf4_table(x.device) if weight.fmt == "nf4" else weight.global_scale
    stored = y.view(torch.int16) if INTERPRETED and x_name == "bf16" else y
    constants: dict[str, Any] = {
        "FORMAT": weight.fmt,
        "GROUP": max(GROUPS[weight.fmt], 0) if floats else 0,
        "X": x_name,
        "ACT": act,
        "HAS_BIAS": bias is not None,
        "BN": plan.bn,
        "BM": plan.bm,
        "BKW": plan.bkw,
        "SPLIT": split,
        "WALK": plan.split if plan.walk else 1,
        "EVEN_K": k == weight.k_blocks * 4 * plan.bkw,
        "NATIVE": not INTERPRETED and x_name != "fp32",
        "INTERPRETED": INTERPRETED,
        "TWIDDLED": weight.twiddled,
        "GROUP_M": 8,
        "BLOCK_SUMS": plan.block_sums,
        "SMALL_SCALES": weight.small_scales,
        "num_warps": plan.warps,
        "num_stages": plan.stages,
    }
    arguments = (
        x, weight.codes, scale, weight.global_scale, table, x if bias is None else bias, stored, partial, tickets,
        m, n, k, x.stride(0), y.stride(0), weight.k_blocks, triton.cdiv(weight.k_blocks, plan.split),
    )  # fmt: skip
    return (m_tiles * n_tiles, split), arguments, constants


def bind_packed(weight: PackedWeight, x: Any, bias: Any, y: Any, x_name: str, act: str, plan: Plan) -> Launch:
    """A launch of the plan's kernel on a packed weight."""
    if plan.path == "gluon":
        tile = (plan.bn, plan.bm, plan.stages)
        return linear_gluon_host.bind_gluon(
            weight, x, bias, y, x_name, act, tile, plan.split, plan.block_sums, plan.scaled
        )
    if plan.path == "stationary":
        return linear_stationary_host.bind_stationary(weight, x, bias, y, x_name, act, plan.split, plan.dependent)
    grid, arguments, constants = fused_call(weight, x, bias, y, x_name, act, plan)

    def launch() -> None:
        fused_linear_kernel[grid](*arguments, **constants)

    return launch


def with_options(plan: Plan, options: Mapping[str, str]) -> Plan:
    """The plan with ``num_warps`` or ``num_stages`` set by hand, for comparing.

    Raises:
        Unsupported: ``option_value``, or ``option_not_taken`` where the plan's path chooses these itself.
    """
    if not options:
        return plan
    if plan.path != "fused":
        raise Unsupported("option_not_taken", f"path {plan.path} of this case takes no {', '.join(sorted(options))}")
    for name, value in options.items():
        # Triton's num_warps is a power of two; a group of warps beyond 32 exceeds a block's 1024 threads.
        if not value.isdecimal() or (name == "num_warps" and int(value) not in (1, 2, 4, 8, 16, 32)):
            raise Unsupported("option_value", f"{name}={value}: num_warps is 1, 2, 4, 8, 16 or 32, num_stages a number")
    warps, stages = (int(options.get(n, old)) for n, old in (("num_warps", plan.warps), ("num_stages", plan.stages)))
    return replace(plan, warps=warps, stages=stages)


def make(case: Case, variant: str, device: Device, **options: str) -> LinearKernel:
    """Factory of fp4_linear.

    Raises:
        Unsupported: ``zero_size``, ``k_odd``, ``k_not_multiple_of_block``, ``too_large``, ``with_options``'s and
            ``probe.check_device``'s.
    """
    check_device(device)
    m, n, k, fmt = case.axis("m"), case.axis("n"), case.axis("k"), case.text("fmt")
    if 0 in (m, n, k):
        raise Unsupported("zero_size", f"m={m}, n={n}, k={k}: nothing to multiply")
    if k % 2:
        raise Unsupported("k_odd", f"k={k}: two codes share a byte")
    group = GROUPS[fmt]
    if group > 0 and k % group:
        raise Unsupported("k_not_multiple_of_block", f"k={k} is no multiple of {fmt}'s block of {group}")
    if (n + ROW_PAD) * (k + 256) // 4 >= 2**31:
        raise Unsupported("too_large", f"n={n}, k={k}: packed offsets must fit 31 bits; split the layer")
    hopper = device == "cuda" and linear_gluon_host.available()
    x = case.text("x")
    wide = needs_wide(fmt, x)
    plan = choose_plan(m, n, k, fmt, x, case.text("act"), device, hopper and not wide, wide, bool(case.axis("bias")))
    return LinearKernel(case, device, with_options(plan, options), options)
