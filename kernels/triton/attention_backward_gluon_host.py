"""Host side of the Gluon attention backward: what it takes, its tiles, and the three launches."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vbench.backend import Device, Launch
from vbench.errors import Unsupported
from vbench.kernels.triton.attention import Shape, descriptor_strides, takes_descriptor
from vbench.kernels.triton.attention_backward import check_gradient_tensors
from vbench.kernels.triton.attention_backward_tiles import PREPARE_ROWS, ROW_PADDING
from vbench.kernels.triton.attention_gluon_host import HEAD_DIMS, TRITON_VERSIONS
from vbench.spec import Numerics

#: Keys of a program, and rows of a program of ``finish_dq``.
BLOCK_N, ROWS = 128, 64
WARPS = 8

#: Query rows of a program of the dQ kernel.
DQ_BLOCK_M = 128
#: (keys of a step, stages of K and of V) of the dQ kernel, by head dim. 128 keys at 128 are too many registers.
DQ_TILES = {64: (128, 3), 128: (64, 4)}


@dataclass(frozen=True, slots=True)
class GluonBackwardTile:
    """Geometry of the Hopper backward.

    Args:
        block_m: queries of a step, 64 or 128. q_stages: tiles of Q in shared memory, at least 3.
        consumers: 0, eight warps copy and multiply, without dQ; 2, a producer and two partitions of four.
        early: with two consumers, see attention_backward_gluon_pair.py.
    """

    block_m: int
    q_stages: int
    consumers: int
    early: bool = False


#: Candidates by head dim, the first in use (docs/tuning/attention.md, Backward on Hopper): what ptxas compiles without
#: running every wgmma by itself.
TILES = {
    64: (GluonBackwardTile(128, 3, 2, early=True), GluonBackwardTile(128, 3, 2)),
    128: (GluonBackwardTile(64, 3, 2), GluonBackwardTile(64, 3, 2, early=True)),
}
#: The same without dQ, for the deterministic variant. ptxas runs two consumers at head dim 64 one wgmma at a time.
DETERMINISTIC_TILES = {64: (GluonBackwardTile(128, 3, 0),), 128: (GluonBackwardTile(64, 3, 2),)}


def choose_backward(d: int, *, deterministic: bool) -> GluonBackwardTile:
    """The tile for head dim 64 or 128."""
    return (DETERMINISTIC_TILES if deterministic else TILES)[d][0]


def check_backward_tensors(shape: Shape, inputs: Mapping[str, Any], out: Mapping[str, Any]) -> None:
    """As ``check_gradient_tensors``, and what the bulk tensor copy engine cannot take.

    Raises:
        Unsupported: see ``check_gradient_tensors``; ``layout_not_for_copy_engine``.
    """
    check_gradient_tensors(shape, inputs, out, "cuda")
    copied = {name: inputs[name] for name in ("q", "k", "v", "dout")} | dict(out)
    for name, tensor in copied.items():
        if not takes_descriptor(tensor):
            raise Unsupported(
                "layout_not_for_copy_engine",
                f"{name} has strides {tuple(tensor.stride())}: the base and every stride but the last must be"
                " multiples of 16 bytes and the last 1; make it contiguous or use the plain variant",
            )


@dataclass(frozen=True)
class GluonBackward:
    """dq, dk and dv of one case. See ``vbench.backend.Kernel``.

    Beside its outputs it holds two float32 a query row. Deterministic, dq comes from a kernel of its own, which works
    out scores and dP once more (7 products where 5 would do); else it is summed in a float32 workspace like q, in any
    order.
    """

    shape: Shape
    numerics: Numerics
    deterministic: bool
    produces: tuple[str, ...] = ("dq", "dk", "dv")

    def bind(self, inputs: Mapping[str, Any], out: Mapping[str, Any]) -> Launch:
        """Bind to a launch that writes dq, dk and dv. Raises what ``check_backward_tensors`` raises."""
        return self.bind_tile(inputs, out, choose_backward(self.shape.d, deterministic=self.deterministic))

    def bind_tile(self, inputs: Mapping[str, Any], out: Mapping[str, Any], tile: GluonBackwardTile) -> Launch:
        """As ``bind``, with a tile of the caller's choice."""
        parts = self.bind_parts(inputs, out, tile)

        def launch() -> None:
            for part in parts:
                part()

        return launch

    def bind_parts(
        self, inputs: Mapping[str, Any], out: Mapping[str, Any], tile: GluonBackwardTile
    ) -> tuple[Launch, Launch, Launch]:
        """The three launches in their order: statistics and zeros; products; dq's rounding or own kernel."""
        shape = self.shape
        check_backward_tensors(shape, inputs, out)
        import torch
        from triton.experimental.gluon import language as gl
        from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

        from vbench.kernels.triton.attention_backward_finish import finish_dq
        from vbench.kernels.triton.attention_backward_gluon import attention_backward_hopper
        from vbench.kernels.triton.attention_backward_gluon_dq import attention_backward_dq_hopper
        from vbench.kernels.triton.attention_backward_gluon_pair import attention_backward_pair_hopper
        from vbench.kernels.triton.attention_backward_kernels import prepare_rows

        q, lse, dq = inputs["q"], inputs["lse"], out["dq"]
        forward_out, dout = inputs["out"], inputs["dout"]
        dlse = inputs.get("dlse")
        heads = shape.b * shape.hq
        padded = -(-shape.sq // ROW_PADDING) * ROW_PADDING
        stats = torch.empty((2, heads, padded), dtype=torch.float32, device=q.device)
        swizzled = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=4)
        plain = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=3)

        def describe(tensor: Any, rows: int) -> Any:
            block = [1, 1, rows, shape.d]
            return TensorDescriptor(tensor, list(tensor.shape), descriptor_strides(tensor), block, swizzled)

        keys = BLOCK_N // 2 if tile.consumers == 2 else BLOCK_N
        dk_desc, dv_desc = describe(out["dk"], keys), describe(out["dv"], keys)
        # Unused where deterministic, and then any tensor and descriptor serve.
        sums, sums_desc = stats, dk_desc
        if not self.deterministic:
            sums = torch.empty((heads * padded, shape.d), dtype=torch.float32, device=q.device)
            walked = sums.view(-1, 128)
            block = [32, 128]
            of_sums = gl.NVMMASharedLayout(0, element_bitwidth=32, rank=2)
            sums_desc = TensorDescriptor(walked, list(walked.shape), list(walked.stride()), block, of_sums)
        descriptors = (
            describe(q, tile.block_m),
            describe(inputs["k"], keys),
            describe(inputs["v"], keys),
            describe(dout, tile.block_m),
            TensorDescriptor(stats, list(stats.shape), list(stats.stride()), [2, 1, tile.block_m], plain),
            *((sums_desc,) if tile.consumers == 2 else ()),
            dk_desc,
            dv_desc,
        )
        scale = 1.0 / math.sqrt(shape.d)
        sizes = (shape.hq, shape.hk, shape.sq, shape.sk, padded, shape.shift)
        constants: dict[str, Any] = {
            "D": shape.d,
            "BLOCK_M": tile.block_m,
            "Q_STAGES": tile.q_stages,
            "DO_STAGES": 2,
            "CAUSAL": shape.causal != "none",
        }
        if tile.consumers == 2:
            products = attention_backward_pair_hopper
            constants |= {
                "COMPUTE_DQ": not self.deterministic,
                "EARLY": tile.early,
                # The producer's; the consumers' are asked for in the kernel.
                "num_warps": 4,
            }
        else:
            products = attention_backward_hopper
            constants["num_warps"] = WARPS
        arguments = (*descriptors, shape.exponent_scale, scale, *sizes)
        grid = (-(-shape.sk // BLOCK_N) * shape.b * shape.hk,)
        prepare_grid = (heads * padded // PREPARE_ROWS,)
        strides = (*forward_out.stride(), *dout.stride(), *lse.stride())
        dlse_strides = (0, 0, 0) if dlse is None else dlse.stride()
        before = (
            forward_out, dout, lse, dlse, *stats, shape.hq, shape.sq, padded, *strides, *dlse_strides,
        )  # fmt: skip
        before_constants = {"D": shape.d, "BLOCK_D": shape.d, "BLOCK_M": PREPARE_ROWS, "DLSE": dlse is not None}
        dq_keys, dq_stages = DQ_TILES[shape.d]
        dq_grid = (-(-shape.sq // DQ_BLOCK_M) * heads,)
        dq_descriptors = (
            *(describe(tensor, DQ_BLOCK_M // 2) for tensor in (q, dout)),
            *(describe(inputs[name], dq_keys) for name in ("k", "v")),
            describe(dq, DQ_BLOCK_M // 2),
        )
        dq_constants = {"D": shape.d, "BLOCK_N": dq_keys, "STAGES": dq_stages, "CAUSAL": shape.causal != "none"}
        finish_grid = (heads * padded // ROWS,)
        after = (sums, dq, scale, shape.hq, shape.sq, padded, *dq.stride()[:3])

        def prepare() -> None:
            if not self.deterministic:
                sums.zero_()
            prepare_rows[prepare_grid](*before, **before_constants, EMULATE=False)

        def multiply() -> None:
            products[grid](*arguments, **constants)

        def finish() -> None:
            if self.deterministic:
                attention_backward_dq_hopper[dq_grid](
                    *dq_descriptors, *stats, shape.exponent_scale, scale, *sizes, **dq_constants, num_warps=4
                )
                return
            finish_dq[finish_grid](*after, D=shape.d, num_warps=4)

        return prepare, multiply, finish


def make_gluon_backward(shape: Shape, device: Device, *, deterministic: bool) -> GluonBackward:
    """The Hopper kernel for a case of op ``attention_backward``; ``shape``: the case, read.

    Args:
        deterministic: the same bits every time, at 1.4 times the products.

    Raises:
        Unsupported: ``gluon_needs_cuda``, ``gluon_dtype``, ``gluon_head_dim``, ``gluon_needs_sm_90``,
            ``gluon_triton_version``, ``gluon_no_reduction``.
    """
    if device != "cuda":
        raise Unsupported("gluon_needs_cuda", "Gluon cannot be interpreted; use the plain variant on a CPU")
    if shape.dtype not in ("bf16", "fp16"):
        raise Unsupported("gluon_dtype", f"{shape.dtype}: wgmma multiplies 16-bit types; use the plain variant")
    if shape.d not in HEAD_DIMS:
        raise Unsupported("gluon_head_dim", f"d={shape.d} is not one of {HEAD_DIMS}; use the plain variant")
    import torch
    import triton

    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    if (properties.major, properties.minor) != (9, 0):
        raise Unsupported("gluon_needs_sm_90", f"compute capability is {properties.major}.{properties.minor}, not 9.0")
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if version not in TRITON_VERSIONS:
        raise Unsupported("gluon_triton_version", f"triton {triton.__version__} is not one of {TRITON_VERSIONS}")
    from triton._C.libtriton import gluon_ir

    if not hasattr(gluon_ir.GluonOpBuilder, "create_async_tma_reduce"):
        raise Unsupported("gluon_no_reduction", f"triton {triton.__version__} has no builder call for bulk reductions")
    numerics = Numerics(accumulate="tensor_core", probabilities=shape.dtype)
    return GluonBackward(shape, numerics, deterministic)
