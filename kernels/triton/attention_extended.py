"""Extended attention and its backward, backend ``triton``: capability checks and launches; see its kernels' file.

Imports no torch and no Triton at the top, so that listing what a kernel takes stays cheap.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from vbench.backend import Device, Kernel, Launch, refuse_beyond
from vbench.errors import Unsupported
from vbench.kernels.triton.attention import (
    PLAIN_PARAMETERS,
    Shape,
    check_spans,
    check_tensors,
    plain_machine,
    plain_numerics,
)
from vbench.kernels.triton.attention_backward import check_gradient_tensors
from vbench.kernels.triton.attention_backward_tiles import PREPARE_ROWS, ROW_PADDING, BackwardTiles
from vbench.kernels.triton.attention_tiles import Tile, padded_head_dim
from vbench.spec import TORCH_DTYPE_NAMES, Case, Numerics

PARAMETERS = (*PLAIN_PARAMETERS, "alibi", "sinks", "mask", "maskdims", "packed")
#: "No bound" of a diagonal band, and the longest sequence: their sums stay below 2^31.
UNBOUNDED = 1 << 29
SINK_BLOCK = 128
#: Rows of the backward's statistics are padded to a multiple of ROW_PADDING, so of SINK_BLOCK.
assert ROW_PADDING % SINK_BLOCK == 0

#: Small on purpose, and unequal, so that a mix-up of rows and keys shows.
INTERPRETED = (Tile(32, 16, 4, 1), BackwardTiles(Tile(32, 16, 4, 1), Tile(16, 32, 4, 1)))
#: Padded head dim -> forward's tile, backward's tiles; chosen by compile reports: no spill with every feature on, but
#: in fp32 at head dim 256 (attention_extended_aot.py).
FP32 = {
    16: (Tile(32, 32, 4, 1), BackwardTiles(Tile(32, 32, 4, 1), Tile(32, 32, 4, 1))),
    32: (Tile(32, 32, 4, 1), BackwardTiles(Tile(32, 32, 8, 1), Tile(32, 32, 8, 1))),
    64: (Tile(32, 32, 8, 1), BackwardTiles(Tile(32, 16, 8, 1), Tile(16, 32, 8, 1))),
    128: (Tile(32, 16, 8, 1), BackwardTiles(Tile(16, 16, 8, 1), Tile(16, 16, 8, 1))),
    256: (Tile(16, 16, 8, 1), BackwardTiles(Tile(16, 16, 8, 1), Tile(16, 16, 8, 1))),
}
HALF = {
    16: (Tile(64, 32, 4, 2), BackwardTiles(Tile(64, 32, 4, 2), Tile(32, 64, 4, 2))),
    32: (Tile(64, 32, 4, 2), BackwardTiles(Tile(64, 32, 4, 2), Tile(32, 64, 4, 2))),
    64: (Tile(64, 32, 4, 2), BackwardTiles(Tile(64, 32, 4, 2), Tile(16, 64, 4, 2))),
    128: (Tile(64, 32, 8, 2), BackwardTiles(Tile(64, 32, 8, 2), Tile(16, 64, 8, 1))),
    256: (Tile(64, 16, 8, 1), BackwardTiles(Tile(32, 32, 8, 1), Tile(16, 16, 8, 1))),
}


@dataclass(frozen=True, slots=True)
class Features:
    """What a case adds to op ``attention``; see ``reference/ops/attention_extended.py``."""

    alibi: bool
    sinks: bool
    mask: bool
    mask_axes: str
    packed: int

    @classmethod
    def of(cls, case: Case) -> Features:
        """Raises Unsupported: ``packed_batch``."""
        packed = case.axis("packed")
        if packed and case.axis("b") != 1:
            raise Unsupported("packed_batch", f"b={case.axis('b')}: packed sequences lie end to end in a batch of 1")
        mask = case.text("mask") != "none"
        return cls(bool(case.axis("alibi")), bool(case.axis("sinks")), mask, case.text("maskdims"), packed)

    def constants(self, shape: Shape, *, sinks: bool) -> dict[str, Any]:
        """Compile-time arguments; ``sinks``: the kernel has that one."""
        return {
            "ALIGNED_RIGHT": shape.causal == "bottom_right",
            "SOFTCAP": shape.softcap > 0,
            "ALIBI": self.alibi,
            "MASK": self.mask,
            "PACKED": self.packed > 0,
            # "ieee" keeps fp32 products exact; Triton's default would silently round operands to tf32.
            "PRECISION": "ieee" if shape.dtype == "fp32" else "tf32",
        } | ({"SINK": self.sinks} if sinks else {})


def check_features(shape: Shape, features: Features, inputs: Mapping[str, Any]) -> None:
    """Refuse feature inputs of another shape, dtype or device than the case says.

    Raises:
        Unsupported: ``wrong_shape``, ``wrong_dtype``, ``wrong_device``, ``sequence_bounds`` (``cu_q`` or ``cu_k`` does
            not ascend from 0 to the length: reading them waits for the device).
    """
    axes, mask_axes = {"b": shape.b, "h": shape.hq}, features.mask_axes
    of_mask = (*(axes[a] if a in mask_axes else 1 for a in "bh"), shape.sq, shape.sk)
    wanted: dict[str, tuple[tuple[int, ...], str]] = {}
    if features.alibi:
        wanted["slopes"] = ((shape.hq,), "float32")
    if features.sinks:
        wanted["sink"] = ((shape.hq,), "float32")
    if features.mask:
        wanted["mask"] = (of_mask, TORCH_DTYPE_NAMES[shape.dtype])
    if features.packed:
        wanted |= dict.fromkeys(("cu_q", "cu_k"), ((features.packed + 1,), "int32"))
    for name, (want, dtype) in wanted.items():
        if name not in inputs:
            raise Unsupported("missing_input", f"the case needs {name} {list(want)} of torch.{dtype}; pass it")
        tensor = inputs[name]
        if tuple(tensor.shape) != want:
            raise Unsupported("wrong_shape", f"{name} has shape {tuple(tensor.shape)}, the case needs {want}")
        if str(tensor.dtype) != f"torch.{dtype}":
            raise Unsupported("wrong_dtype", f"{name} is {tensor.dtype}, the case needs torch.{dtype}; convert it")
        if tensor.device != inputs["q"].device:
            raise Unsupported("wrong_device", f"{name} is on {tensor.device}, q on {inputs['q'].device}; move one")
        if name != "mask" and not tensor.is_contiguous():
            raise Unsupported("not_contiguous", f"{name} has strides {tensor.stride()}; call contiguous()")
    for name, length in (("cu_q", shape.sq), ("cu_k", shape.sk)):
        if features.packed:
            bounds = inputs[name].tolist()
            if bounds[0] != 0 or bounds[-1] != length or any(b < a for a, b in pairwise(bounds)):
                raise Unsupported("sequence_bounds", f"{name} must ascend from 0 to {length}, and reads {bounds}")


def block_table(bounds: Sequence[int], block: int) -> list[tuple[int, int]]:
    """(sequence, first row inside it) of every block of ``block`` rows; none of an empty sequence."""
    return [
        (index, first) for index, (begin, end) in enumerate(pairwise(bounds)) for first in range(0, end - begin, block)
    ]


@dataclass(frozen=True)
class _Extended:
    """What forward and backward share."""

    shape: Shape
    features: Features
    device: Device
    interpreted: bool
    numerics: Numerics
    deterministic: bool = True

    @property
    def tiles(self) -> tuple[Tile, BackwardTiles]:
        if self.interpreted:
            return INTERPRETED
        return (FP32 if self.shape.dtype == "fp32" else HALF)[padded_head_dim(self.shape.d)]

    @property
    def band(self) -> tuple[int, int]:
        """(above, below): key j is seen by row i if i - below <= j - shift <= i + above."""
        reach = self.shape.window - 1 if self.shape.window else UNBOUNDED
        return (0 if self.shape.causal != "none" else reach), reach

    def blocks(self, inputs: Mapping[str, Any], of: str, block: int) -> tuple[Any, int]:
        """(table on the device or ``None``, blocks) of rows (``of`` q) or keys (k)."""
        import torch

        if not self.features.packed:
            return None, -(-(self.shape.sq if of == "q" else self.shape.sk) // block)
        table = block_table(inputs[f"cu_{of}"].tolist(), block)
        return torch.tensor(table, dtype=torch.int32, device=inputs["q"].device), len(table)

    def optional(self, inputs: Mapping[str, Any]) -> tuple[Any, Any, Any, Any, Any, tuple[int, ...]]:
        """slopes, sink, mask, cu_q, cu_k (``None`` where off) and the mask's strides, 0 along what it lacks."""
        slopes, sink, mask, cu_q, cu_k = (inputs.get(name) for name in ("slopes", "sink", "mask", "cu_q", "cu_k"))
        strides: tuple[int, ...] = (0, 0, 0, 0)
        if mask is not None:
            strides = tuple(0 if n == 1 else s for n, s in zip(mask.shape, mask.stride(), strict=True))
        return slopes, sink, mask, cu_q, cu_k, strides


def _constants(tile: Tile, width: int, d: int, interpreted: bool) -> dict[str, Any]:
    return {
        "D": d,
        "BLOCK_D": width,
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "EMULATE": interpreted,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }


@dataclass(frozen=True)
class ExtendedForward(_Extended):
    """Forward for one case. See ``vbench.backend.Kernel``."""

    produces: tuple[str, ...] = ("out", "lse")

    def bind(self, inputs: Mapping[str, Any], out: Mapping[str, Any]) -> Launch:
        """Bind the inputs (any strides of q, k, v and mask) to a launch that writes ``out`` and ``lse``.

        Raises:
            Unsupported: see ``attention.check_tensors``, ``attention.check_spans`` and ``check_features``.
        """
        check_tensors(self.shape, inputs, out, self.device)
        check_features(self.shape, self.features, inputs)
        from vbench.kernels.triton.attention_extended_kernels import extended_forward

        shape, width, tile = self.shape, padded_head_dim(self.shape.d), self.tiles[0]
        q, k, v, out_tensor, lse = inputs["q"], inputs["k"], inputs["v"], out["out"], out["lse"]
        check_spans({"q": q, "k": k, "v": v, "out": out_tensor}, tile.block_n, width, walked=("k", "v"))
        slopes, sink, mask, cu_q, cu_k, mask_strides = self.optional(inputs)
        table, blocks = self.blocks(inputs, "q", tile.block_m)
        arguments = (
            q, k, v, slopes, sink, mask, cu_q, cu_k, table, out_tensor, lse, shape.tanh_scale, shape.cap_exponent,
            shape.hq, shape.hq // shape.hk, shape.sq, shape.sk, blocks, *self.band,
            *q.stride(), *k.stride(), *v.stride(), *mask_strides, *out_tensor.stride(), *lse.stride(),
        )  # fmt: skip
        constants = self.features.constants(shape, sinks=True) | _constants(tile, width, shape.d, self.interpreted)
        grid = (shape.b * shape.hq * blocks,)

        def launch() -> None:
            extended_forward[grid](*arguments, **constants)

        return launch


@dataclass(frozen=True)
class ExtendedBackward(_Extended):
    """Backward for one case, bitwise reproducible. See ``vbench.backend.Kernel``."""

    produces: tuple[str, ...] = ("dq", "dk", "dv", "dsink")

    def bind(self, inputs: Mapping[str, Any], out: Mapping[str, Any]) -> Launch:
        """Bind the inputs to four launches that write ``dq``, ``dk``, ``dv`` and ``dsink``.

        Allocates the scratch of lse and delta: two float32 a query row.

        Raises:
            Unsupported: see ``check_gradient_tensors``, ``check_spans`` and ``check_features``.
        """
        shape, features = self.shape, self.features
        check_gradient_tensors(shape, inputs, out, self.device)
        check_features(shape, features, inputs)
        dsink = out["dsink"]
        if tuple(dsink.shape) != (shape.hq,) or not dsink.is_contiguous():
            raise Unsupported("wrong_shape", f"dsink must be contiguous [{shape.hq}], and is {tuple(dsink.shape)}")
        import torch

        from vbench.kernels.triton.attention_backward_kernels import prepare_rows
        from vbench.kernels.triton.attention_extended_kernels import (
            extended_gradient_of_keys,
            extended_gradient_of_queries,
            gradient_of_sinks,
        )

        width, tiles = padded_head_dim(shape.d), self.tiles[1]
        q, k, v, dout, lse = (inputs[name] for name in ("q", "k", "v", "dout", "lse"))
        dq, dk, dv = (out[name] for name in ("dq", "dk", "dv"))
        longest = max(n for tile in (tiles.queries, tiles.keys) for n in (tile.block_m, tile.block_n))
        tensors = {name: inputs[name] for name in ("q", "k", "v", "out", "dout")} | {"dq": dq, "dk": dk, "dv": dv}
        check_spans(tensors, longest, width, walked=("q", "k", "v", "dout"))
        slopes, sink, mask, cu_q, cu_k, mask_strides = self.optional(inputs)
        heads = shape.b * shape.hq
        padded_rows = -(-shape.sq // ROW_PADDING) * ROW_PADDING
        exponent, delta = torch.empty(2, heads, padded_rows, dtype=torch.float32, device=q.device)
        dlse = inputs.get("dlse")
        row_strides = (*inputs["out"].stride(), *dout.stride(), *lse.stride())
        prepare = (
            inputs["out"], dout, lse, dlse, exponent, delta, shape.hq, shape.sq, padded_rows,
            *row_strides, *((0, 0, 0) if dlse is None else dlse.stride()),
        )  # fmt: skip
        row_table, row_blocks = self.blocks(inputs, "q", tiles.queries.block_m)
        key_table, key_blocks = self.blocks(inputs, "k", tiles.keys.block_n)
        common = (q, k, v, dout, exponent, delta, slopes, mask, cu_q, cu_k)
        scales = (shape.tanh_scale, shape.cap_exponent, shape.d**-0.5)
        sizes = (shape.hq, shape.hq // shape.hk, shape.sq, shape.sk)
        strides = (*q.stride(), *k.stride(), *v.stride(), *dout.stride(), *mask_strides)
        by_rows = (
            *common, row_table, dq, *scales, *sizes, row_blocks, *self.band, padded_rows, *strides, *dq.stride()
        )  # fmt: skip
        by_keys = (
            *common, key_table, dk, dv, *scales, *sizes, key_blocks, *self.band, padded_rows,
            *strides, *dk.stride(), *dv.stride(),
        )  # fmt: skip
        constants = features.constants(shape, sinks=False)
        row_constants, key_constants = (
            constants | _constants(tile, width, shape.d, self.interpreted) for tile in (tiles.queries, tiles.keys)
        )
        prepare_grid = (heads * padded_rows // PREPARE_ROWS,)
        row_grid, key_grid = (heads * row_blocks,), (shape.b * shape.hk * key_blocks,)

        def launch() -> None:
            prepare_rows[prepare_grid](
                *prepare,
                D=shape.d,
                BLOCK_D=width,
                BLOCK_M=PREPARE_ROWS,
                DLSE=dlse is not None,
                EMULATE=self.interpreted,
            )
            extended_gradient_of_queries[row_grid](*by_rows, **row_constants)
            extended_gradient_of_keys[key_grid](*by_keys, **key_constants)
            gradient_of_sinks[(shape.hq,)](
                exponent, delta, sink, dsink, shape.b, shape.hq, padded_rows, BLOCK=SINK_BLOCK, SINK=features.sinks
            )

        return launch


def _read(case: Case, variant: str, device: Device) -> tuple[Shape, Features, Device, bool, Numerics]:
    shape = Shape.of(case)
    if variant:
        raise Unsupported("unknown_variant", f"{variant!r}: only the plain kernels ('') know these features")
    refuse_beyond(case, PARAMETERS)
    if max(shape.sq, shape.sk, shape.window) >= UNBOUNDED:
        raise Unsupported("too_long", f"sq={shape.sq}, sk={shape.sk}: lengths and windows must be below {UNBOUNDED}")
    interpreted, _ = plain_machine(device)
    return shape, Features.of(case), device, interpreted, plain_numerics(shape)


def make(case: Case, variant: str, device: Device) -> Kernel:
    """Kernel factory of op ``attention_extended``.

    Raises:
        Unsupported: ``unknown_variant`` (the Gluon kernels have none of these features); ``too_long``;
            ``packed_batch``; what ``attention.Shape.of`` and ``attention.plain_machine`` refuse.
    """
    return ExtendedForward(*_read(case, variant, device))


def make_backward(case: Case, variant: str, device: Device) -> Kernel:
    """Kernel factory of op ``attention_extended_backward``. Raises as ``make``."""
    return ExtendedBackward(*_read(case, variant, device))
