"""fp4_linear: which kernel serves which case (explicit tables), binding, and the capability check.

Batch invariance: up to SPLIT_MAX_M tokens the parts of K and the order inside them depend on (n, k) only, so a row of y
does not depend on how many tokens come with it. Beyond, K is summed front to back.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import triton

from vbench.backend import Device, Launch
from vbench.errors import Unsupported
from vbench.kernels.triton import linear_gluon_host
from vbench.kernels.triton.linear_dequant import OPERAND_ROUNDINGS, bind_dequant, takes
from vbench.kernels.triton.linear_fused import fused_linear_kernel
from vbench.kernels.triton.packing import GROUPS, ROW_PAD, PackedWeight, check_weight, pack_weight
from vbench.kernels.triton.probe import INTERPRETED, check_device
from vbench.spec import TORCH_DTYPE_NAMES, Case, Numerics

SPLIT_MAX_M = 64
#: n times the parts of K should reach this: 200 programs of 64 rows keep 132 multiprocessors' loads in flight.
SPLIT_ROWS = 12800
#: Packed blocks a program of a split should at least have, so that its pipeline fills.
MIN_BLOCKS_PER_SPLIT = 4


@dataclass(frozen=True, slots=True)
class Plan:
    """How one case is computed.

    Args:
        path: ``fused`` (tiles; decoding in registers), ``gluon`` (the same on Hopper, warp-specialised) or
            ``dequant_cublas`` (decode to scratch memory, then the vendor's GEMM).
        bn, bm: output features and tokens of a tile.
        bkw: columns of a packed tile; a K block is four times as wide.
        warps, stages: as Triton means them (``gluon``: all its partitions' warps).
        split: parts of K in different programs (``fused``).
        block_sums: ``fused``: add one float32 sum a K block instead of carrying the matrix unit's accumulator along.
        chunk: ``dequant_cublas``: weight rows decoded at a time; the scratch they fill should stay in L2.
    """

    path: Literal["fused", "gluon", "dequant_cublas"]
    bn: int
    bm: int
    bkw: int
    warps: int
    stages: int
    split: int = 1
    block_sums: bool = True
    chunk: int = 0


Table = tuple[tuple[int, Plan], ...]

_UP_TO_32: Table = (
    (8, Plan("fused", 64, 8, 64, 4, 4)),
    (16, Plan("fused", 64, 16, 64, 4, 4)),
    (32, Plan("fused", 64, 32, 64, 4, 4)),
)
_SCALE_IN_EPILOGUE: Table = (
    (8, Plan("fused", 64, 8, 64, 2, 4)),
    *_UP_TO_32[1:],
    (64, Plan("fused", 64, 64, 64, 4, 3)),
    (2**31, Plan("fused", 128, 128, 32, 4, 3, block_sums=False)),
)
#: Format -> (largest m, plan)..., for 16-bit x. Measured on one H200: docs/tuning/fp4.md.
TABLES: Mapping[str, Table] = {
    "absmax7_tensor": _SCALE_IN_EPILOGUE,
    "absmax7_row": _SCALE_IN_EPILOGUE,
    "absmax7_g128": (
        *_UP_TO_32,
        (64, Plan("fused", 128, 64, 64, 8, 3)),
        (512, Plan("fused", 64, 128, 32, 4, 3)),
        (2**31, Plan("fused", 128, 128, 32, 8, 3)),
    ),
    "nvfp4": (
        *_UP_TO_32,
        (64, Plan("fused", 128, 64, 64, 8, 3)),
        (2**31, Plan("fused", 256, 128, 32, 8, 3, block_sums=False)),
    ),
}
#: float32 x, whose products run on the ordinary units: small tiles, narrow blocks.
TABLE_FP32: Table = (
    (16, Plan("fused", 64, 16, 16, 4, 3)),
    (2**31, Plan("fused", 64, 32, 16, 8, 3)),
)
#: Gluon tiles (features, tokens, stages) and the measured cost of one wave of them on 132 multiprocessors, microseconds
#: at k = 4096: (absmax7_row, nvfp4). Chosen is the tile whose whole waves cost least.
GLUON_TILES: tuple[tuple[int, int, int, float, float], ...] = (
    (256, 128, 3, 43.5, 53.0),
    (128, 128, 4, 23.2, 29.0),
    (128, 64, 6, 18.0, 21.7),
)
GLUON_PROCESSORS = 132
#: Format -> smallest m from which decoding to scratch memory and the vendor's GEMM wins.
DEQUANT_FROM_M: Mapping[str, int] = {
    "absmax7_tensor": 3072,
    "absmax7_row": 3072,
    "absmax7_g128": 1024,
    "nvfp4": 2048,
}
DEQUANT_CHUNK = 2048


def split_count(n: int, k: int, bkw: int) -> int:
    """Parts of K for up to SPLIT_MAX_M tokens: a power of two, from n and k only."""
    rows = -(-n // ROW_PAD) * ROW_PAD
    blocks = -(-k // (4 * bkw))
    split = 1
    while rows * split < SPLIT_ROWS and blocks // (2 * split) >= MIN_BLOCKS_PER_SPLIT and split < 16:
        split *= 2
    return split


def choose_gluon(m: int, n: int, fmt: str) -> Plan:
    """The Gluon tile whose waves cost least."""

    def cost(tile: tuple[int, int, int, float, float]) -> float:
        bn, bm, _, integers, nvfp4 = tile
        waves = -(-(-(-m // bm) * -(-n // bn)) // GLUON_PROCESSORS)
        return waves * (nvfp4 if fmt == "nvfp4" else integers)

    bn, bm, stages, _, _ = min(GLUON_TILES, key=cost)
    return Plan("gluon", bn, bm, linear_gluon_host.BKW, 12, stages)


def choose_plan(m: int, n: int, k: int, fmt: str, x: str, act: str, device: Device, hopper: bool = False) -> Plan:
    """The tables' entry for a case. ``hopper``: the Gluon kernel can run here and suits the tensors."""
    if device == "cuda" and m >= DEQUANT_FROM_M[fmt] and takes(fmt, x, act):
        return Plan("dequant_cublas", 0, 0, 0, 0, 0, chunk=DEQUANT_CHUNK)
    if hopper and m > SPLIT_MAX_M and linear_gluon_host.takes(fmt, x, n, k):
        return choose_gluon(m, n, fmt)
    plan = next(p for limit, p in (TABLE_FP32 if x == "fp32" else TABLES[fmt]) if m <= limit)
    if m <= SPLIT_MAX_M:
        plan = replace(plan, split=split_count(n, k, plan.bkw))
    return plan


class LinearKernel:
    """fp4_linear of one case.

    Attributes:
        plan: the path and tile sizes taken.
        numerics: ``tensor_core`` sums for 16-bit x, ``fp32`` for float32 x and in the interpreter.
            ``operand_roundings`` is empty where the decoded weight is exact in the product's operand type.
    """

    produces = ("y",)
    deterministic = True

    def __init__(self, case: Case, device: Device, plan: Plan) -> None:
        self.device: Device = device
        self.fmt, self.x, self.act = case.text("fmt"), case.text("x"), case.text("act")
        self.m, self.n, self.k = case.axis("m"), case.axis("n"), case.axis("k")
        self.has_bias = bool(case.axis("bias"))
        self.plan = plan
        roundings = OPERAND_ROUNDINGS[self.fmt, self.x] if plan.path == "dequant_cublas" else ()
        self.numerics = Numerics("fp32" if INTERPRETED or self.x == "fp32" else "tensor_core", roundings)

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
        if self.plan.path == "dequant_cublas":
            return bind_dequant(self.fmt, inputs, x, bias, y, self.x, self.act, self.plan.chunk)
        twiddled = self.fmt == "nvfp4" and self.x == "bf16"
        if self.plan.path == "gluon" and not linear_gluon_host.takes_tensors(inputs, x, y):
            # An explicit rule, not a fallback on failure: the copy engine needs aligned rows, the fast scale decode
            # normal scales. ``plan`` says what was taken.
            self.plan = choose_plan(self.m, self.n, self.k, self.fmt, self.x, self.act, self.device)
        packed = pack_weight(self.fmt, inputs, self.n, self.k, self.plan.bkw, twiddled)
        return bind_packed(packed, x, bias, y, self.x, self.act, self.plan)


def fused_call(
    weight: PackedWeight, x: Any, bias: Any, y: Any, x_name: str, act: str, plan: Plan
) -> tuple[tuple[int, int], tuple[Any, ...], dict[str, Any]]:
    """Grid, arguments and compile-time constants of the fused kernel. Allocates split-K workspace and tickets."""
    m, n, k = x.shape[0], weight.n, weight.k
    m_tiles, n_tiles = triton.cdiv(m, plan.bm), triton.cdiv(n, plan.bn)
    split = plan.split
    elements = m_tiles * n_tiles * split * plan.bn * plan.bm if split > 1 else 4
    partial = torch.empty(elements, dtype=torch.float32, device=x.device)
    tickets = torch.zeros(m_tiles * n_tiles, dtype=torch.int32, device=x.device)
    scale = weight.scale.reshape(-1).view(torch.int32) if weight.fmt == "nvfp4" else weight.scale
    stored = y.view(torch.int16) if INTERPRETED and x_name == "bf16" else y
    constants: dict[str, Any] = {
        "FORMAT": weight.fmt,
        "X": x_name,
        "ACT": act,
        "HAS_BIAS": bias is not None,
        "BN": plan.bn,
        "BM": plan.bm,
        "BKW": plan.bkw,
        "SPLIT": split,
        "EVEN_K": k % (4 * plan.bkw) == 0,
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
        x, weight.codes, scale, weight.global_scale, x if bias is None else bias, stored, partial, tickets,
        m, n, k, x.stride(0), y.stride(0), weight.k_blocks, triton.cdiv(weight.k_blocks, split),
    )  # fmt: skip
    return (m_tiles * n_tiles, split), arguments, constants


def bind_packed(weight: PackedWeight, x: Any, bias: Any, y: Any, x_name: str, act: str, plan: Plan) -> Launch:
    """A launch of the plan's kernel on a packed weight."""
    if plan.path == "gluon":
        return linear_gluon_host.bind_gluon(weight, x, bias, y, x_name, act, plan.bn, plan.bm, plan.stages)
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
    plan = choose_plan(m, n, k, fmt, case.text("x"), case.text("act"), device, hopper)
    return LinearKernel(case, device, with_options(plan, options))
