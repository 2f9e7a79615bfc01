"""Host side of the Gluon attention forward: what it takes, its tiles, and the launch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vbench.backend import Device, Launch
from vbench.errors import Unsupported
from vbench.kernels.triton.attention import Shape, check_tensors, descriptor_strides, takes_descriptor
from vbench.kernels.triton.attention_tiles import GluonTile, Order, choose_gluon, heads_per_group
from vbench.spec import Numerics

#: Gluon is experimental and its names move: 3.9 removed ``tma.async_copy_global_to_shared``. Compiled with these two.
TRITON_VERSIONS = ((3, 6), (3, 7))
HEAD_DIMS = (64, 128)
#: Query rows of one consumer warpgroup.
WORKER_ROWS = 64


@dataclass(frozen=True)
class GluonForward:
    """The warp-specialised kernel for one case. See ``vbench.backend.Kernel``."""

    shape: Shape
    processors: int
    numerics: Numerics
    produces: tuple[str, ...] = ("out", "lse")
    deterministic: bool = True
    #: Tile and path follow from lengths, head dim, mask and strides, not from the number of heads or batch elements.
    batch_invariant: bool = True

    def bind(self, inputs: Mapping[str, Any], out: Mapping[str, Any]) -> Launch:
        """Bind q, k, v to a launch that writes ``out`` and ``lse``.

        Raises:
            Unsupported: see ``check_tensors``; ``layout_not_for_copy_engine`` for a tensor whose base or strides the
                bulk tensor copy engine cannot take; ``lse_rows_not_contiguous``.
        """
        tile = choose_gluon(self.shape.d, self.shape.sk, causal=self.shape.causal != "none")
        return self.bind_tile(inputs, out, tile)

    def bind_tile(
        self, inputs: Mapping[str, Any], out: Mapping[str, Any], tile: GluonTile, order: Order | None = None
    ) -> Launch:
        """As ``bind``, with a tile and an order of the caller's choice (the tuner's)."""
        order = order or Order()
        check_tensors(self.shape, inputs, out, "cuda")
        q, k, v, out_tensor, lse = inputs["q"], inputs["k"], inputs["v"], out["out"], out["lse"]
        for name, tensor in (("q", q), ("k", k), ("v", v), ("out", out_tensor)):
            if not takes_descriptor(tensor):
                raise Unsupported(
                    "layout_not_for_copy_engine",
                    f"{name} has strides {tuple(tensor.stride())}: the base and every stride but the last must be"
                    " multiples of 16 bytes and the last 1; make it contiguous or use the plain variant",
                )
        if lse.stride(2) != 1 and self.shape.sq > 1:
            raise Unsupported("lse_rows_not_contiguous", f"lse has strides {tuple(lse.stride())}; the last must be 1")

        from triton.experimental.gluon import language as gl
        from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

        from vbench.kernels.triton.attention_gluon import attention_forward_hopper

        shape = self.shape
        layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=4)

        def describe(tensor: Any, rows: int) -> Any:
            block = [1, 1, rows, shape.d]
            return TensorDescriptor(tensor, list(tensor.shape), descriptor_strides(tensor), block, layout)

        heads = shape.b * shape.hq
        per_kv = shape.hq // shape.hk
        tiles = heads * -(-shape.sq // (tile.workers * WORKER_ROWS))
        grid = (order.programs(tiles, self.processors),)
        group = heads_per_group(heads, per_kv, shape.sk, shape.d, q.element_size(), order.l2_bytes)
        descriptors = (
            describe(q, WORKER_ROWS),
            describe(k, tile.block_n),
            describe(v, tile.block_n),
            describe(out_tensor, WORKER_ROWS),
        )
        sizes = (shape.exponent_scale, shape.hq, per_kv, shape.sq, shape.sk, shape.shift, heads, group)
        arguments = (*descriptors, lse, *sizes, lse.stride(0), lse.stride(1))
        constants: dict[str, Any] = {
            "D": shape.d,
            "BLOCK_N": tile.block_n,
            "STAGES": tile.stages,
            "WORKERS": tile.workers,
            "WORKER_REGISTERS": tile.registers,
            "ROUND_EARLY": tile.round_early,
            "POLYNOMIAL": tile.polynomial,
            "KEEP_PEAK": tile.keep_peak,
            "CAUSAL": shape.causal != "none",
            "num_warps": 4,
        }

        def launch() -> None:
            attention_forward_hopper[grid](*arguments, **constants)

        return launch


def make_gluon(shape: Shape, device: Device) -> GluonForward:
    """The Hopper kernel for a case.

    Raises:
        Unsupported: ``gluon_needs_cuda``, ``gluon_dtype``, ``gluon_head_dim``, ``gluon_needs_sm_90``,
            ``gluon_triton_version``.
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
    numerics = Numerics(accumulate="tensor_core", probabilities=shape.dtype)
    return GluonForward(shape, properties.multi_processor_count, numerics)
