"""fp4_linear: which kernel serves which case (an explicit table), binding, and the capability check.

Batch invariance: a row of y does not depend on how many tokens come with it as long as both counts fall under the same
accumulation order. Up to ``DECODE_MAX_M`` tokens that order depends on (n, k) only; from there to ``SPLIT_MAX_M`` the
parts of K do; beyond, K is summed front to back.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import triton

from vbench.backend import Device, Launch
from vbench.errors import Unsupported
from vbench.kernels.triton.linear_decode import decode_linear_kernel
from vbench.kernels.triton.linear_dequant import OPERAND_ROUNDINGS, bind_dequant
from vbench.kernels.triton.linear_fused import fused_linear_kernel
from vbench.kernels.triton.linear_gluon_host import available, bind_gluon, takes, takes_tensors
from vbench.kernels.triton.packing import GROUPS, ROW_PAD, PackedWeight, check_weight, pack_weight
from vbench.kernels.triton.probe import INTERPRETED, check_device
from vbench.spec import TORCH_DTYPE_NAMES, Case, Numerics

DECODE_MAX_M = 16
SPLIT_MAX_M = 64
#: Programs wanted when K is split among programs: about one on every multiprocessor of the largest Hopper part (132).
SPLIT_PROGRAMS = 128
#: Packed blocks a program of a split should at least have, so that its pipeline fills.
MIN_BLOCKS_PER_SPLIT = 4


@dataclass(frozen=True, slots=True)
class Plan:
    """How one case is computed.

    Args:
        path: ``decode`` (few tokens, K split among warps), ``fused`` (tiles; decoding in registers), ``gluon`` (the same
            on Hopper, warp-specialised) or ``dequant_cublas`` (decode to scratch memory, then the vendor's GEMM).
        bn, bm: output features and tokens of a tile.
        bkw: columns of a packed tile; a K block is four times as wide.
        warps, stages: as Triton means them; in ``decode`` the warps are the slices of K.
        split: parts of K in different programs (``fused``).
        block_sums: ``fused``: add one float32 sum a K block instead of carrying the matrix unit's accumulator along.
        chunk: ``dequant_cublas``: weight rows decoded at a time; the scratch they fill should stay in L2.
    """

    path: Literal["decode", "fused", "gluon", "dequant_cublas"]
    bn: int
    bm: int
    bkw: int
    warps: int
    stages: int
    split: int = 1
    block_sums: bool = True
    chunk: int = 0


#: Largest m -> plan, for 16-bit x. Measured on one H200: docs/tuning/fp4.md.
TABLE_16BIT: tuple[tuple[int, Plan], ...] = (
    (8, Plan("decode", 32, 8, 32, 4, 4)),
    (16, Plan("decode", 32, 16, 32, 4, 4)),
    (32, Plan("fused", 64, 32, 64, 4, 4)),
    (64, Plan("fused", 64, 64, 64, 4, 3)),
    (2**31, Plan("fused", 128, 128, 32, 8, 3)),
)
#: The same for float32 x, whose products run on the ordinary units: small tiles, narrow blocks.
TABLE_FP32: tuple[tuple[int, Plan], ...] = (
    (16, Plan("fused", 64, 16, 16, 4, 3)),
    (2**31, Plan("fused", 64, 64, 16, 8, 3)),
)


def split_count(n: int, k: int, bn: int, bkw: int) -> int:
    """Parts of K for up to SPLIT_MAX_M tokens: a power of two, from n and k only."""
    tiles = -(-n // ROW_PAD) * ROW_PAD // bn
    blocks = -(-k // (4 * bkw))
    split = 1
    while tiles * split < SPLIT_PROGRAMS and blocks // (2 * split) >= MIN_BLOCKS_PER_SPLIT and split < 16:
        split *= 2
    return split


#: Largest m -> plan on Hopper where the Gluon kernel takes the case (``linear_gluon_host``). Same source.
TABLE_HOPPER: tuple[tuple[int, Plan], ...] = (
    (DECODE_MAX_M, Plan("fused", 0, 0, 0, 0, 0)),
    (2**31, Plan("gluon", 256, 128, 32, 12, 3)),
)


def choose_plan(m: int, n: int, k: int, fmt: str, x: str, act: str, hopper: bool = False) -> Plan:
    """The table's entry for a case. ``hopper``: the Gluon kernel can run and its inputs are aligned."""
    table = TABLE_FP32 if x == "fp32" else TABLE_16BIT
    plan = next(p for limit, p in table if m <= limit)
    if m <= SPLIT_MAX_M and plan.path == "fused":
        plan = replace(plan, split=split_count(n, k, plan.bn, plan.bkw))
    return plan


class LinearKernel:
    """fp4_linear of one case.

    Attributes:
        plan: the path and tile sizes taken.
        numerics: ``tensor_core`` sums for 16-bit x, ``fp32`` for float32 x and in the interpreter. ``operand_roundings``
            is empty where the decoded weight is exact in the product's operand type.
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

        Packs the weight into the kernel's layout (a copy of the same size; the canonical one is not kept).

        Raises:
            Unsupported: ``wrong_device``, ``x_shape``, ``x_dtype``, ``x_not_row_contiguous``, ``weight_shape``,
                ``weight_dtype``, ``scale_not_finite_positive``.
        """
        self._check(inputs)
        x, y, bias = inputs["x"], out["y"], inputs.get("bias") if self.has_bias else None
        if self.plan.path == "dequant_cublas":
            return bind_dequant(self.fmt, inputs, x, bias, y, self.x, self.act, self.plan.chunk)
        twiddled = self.fmt == "nvfp4" and self.x == "bf16"
        if self.plan.path == "gluon" and not takes_tensors(inputs, x, y):
            # An explicit rule, not a fallback on failure: the copy engine needs aligned rows, the fast scale decode
            # normal scales. ``plan`` says what was taken.
            self.plan = choose_plan(self.m, self.n, self.k, self.fmt, self.x, self.act, hopper=False)
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
    scale = weight.scale.view(torch.int32) if weight.fmt == "nvfp4" else weight.scale
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


def decode_call(
    weight: PackedWeight, x: Any, bias: Any, y: Any, x_name: str, act: str, plan: Plan
) -> tuple[tuple[int, int], tuple[Any, ...], dict[str, Any]]:
    """Grid, arguments and compile-time constants of the decode kernel."""
    m, n, k = x.shape[0], weight.n, weight.k
    scale = weight.scale.view(torch.int32) if weight.fmt == "nvfp4" else weight.scale
    stored = y.view(torch.int16) if INTERPRETED and x_name == "bf16" else y
    constants: dict[str, Any] = {
        "FORMAT": weight.fmt,
        "X": x_name,
        "ACT": act,
        "HAS_BIAS": bias is not None,
        "SLICES": plan.warps,
        "BN": plan.bn,
        "BM": plan.bm,
        "BKW": plan.bkw,
        "EVEN_K": k % (4 * plan.bkw * plan.warps) == 0,
        "NATIVE": not INTERPRETED,
        "INTERPRETED": INTERPRETED,
        "TWIDDLED": weight.twiddled,
        "SMALL_SCALES": weight.small_scales,
        "num_warps": plan.warps,
        "num_stages": plan.stages,
    }
    arguments = (
        x, weight.codes, scale, weight.global_scale, x if bias is None else bias, stored,
        m, n, k, x.stride(0), y.stride(0), weight.k_blocks,
    )  # fmt: skip
    return (triton.cdiv(n, plan.bn), triton.cdiv(m, plan.bm)), arguments, constants


def bind_packed(weight: PackedWeight, x: Any, bias: Any, y: Any, x_name: str, act: str, plan: Plan) -> Launch:
    """A launch of the plan's kernel on a packed weight."""
    if plan.path == "gluon":
        return bind_gluon(weight, x, bias, y, x_name, act, plan.bn, plan.bm, plan.stages)
    call, kernel = (decode_call, decode_linear_kernel) if plan.path == "decode" else (fused_call, fused_linear_kernel)
    grid, arguments, constants = call(weight, x, bias, y, x_name, act, plan)

    def launch() -> None:
        kernel[grid](*arguments, **constants)

    return launch


def make(case: Case, variant: str, device: Device) -> LinearKernel:
    """Factory of fp4_linear.

    Raises:
        Unsupported: ``zero_size``, ``k_odd``, ``k_not_multiple_of_block``, ``too_large``, and ``probe.check_device``'s.
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
    return LinearKernel(case, device, choose_plan(m, n, k, fmt, case.text("x"), case.text("act")))
