"""Attention backward of backend ``triton``: capability checks, then three launches. See attention_backward_kernels.py.

Imports no torch and no Triton at the top, so that listing what a kernel takes stays cheap.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vbench.backend import Device, Kernel, Launch, refuse_beyond
from vbench.errors import Unsupported
from vbench.kernels.triton.attention import (
    GLUON_PARAMETERS,
    PLAIN_PARAMETERS,
    Shape,
    block_source,
    check_all,
    check_spans,
    plain_machine,
    plain_numerics,
    takes_descriptor,
)
from vbench.kernels.triton.attention_backward_tiles import (
    INTERPRETED,
    PREPARE_ROWS,
    ROW_PADDING,
    BackwardTiles,
    choose,
)
from vbench.kernels.triton.attention_tiles import Tile, heads_per_group, padded_head_dim
from vbench.spec import Case, Numerics

#: "" takes every shape; the others are for Hopper. "gluon" sums dq in any order, "gluon_deterministic" in one.
VARIANTS = ("", "gluon", "gluon_deterministic")
INPUT_KINDS = {"q": "q", "k": "k", "v": "k", "out": "q", "lse": "row", "dout": "q"}
OUTPUT_KINDS = {"dq": "q", "dk": "k", "dv": "k"}
#: What the two kernels read block after block.
WALKED = ("q", "k", "v", "dout")


def check_gradient_tensors(shape: Shape, inputs: Mapping[str, Any], out: Mapping[str, Any], device: Device) -> None:
    """Refuse what would read or write out of bounds or silently convert.

    Args:
        inputs: ``q``, ``out``, ``dout`` [b, hq, sq, d], ``k``, ``v`` [b, hk, sk, d] of the case's dtype, ``lse`` and
            (optional) ``dlse`` float32 [b, hq, sq]; any strides.
        out: ``dq`` like ``q``, ``dk`` and ``dv`` like ``k``; any strides that do not overlap.

    Raises:
        Unsupported: see ``check_all``.
    """
    kinds = INPUT_KINDS | ({"dlse": "row"} if "dlse" in inputs else {})
    check_all(shape, inputs, kinds, device)
    check_all(shape, out, OUTPUT_KINDS, device, outputs=True)
    if out["dq"].device != inputs["q"].device:
        raise Unsupported("wrong_device", f"dq is on {out['dq'].device}, q on {inputs['q'].device}; move one")


@dataclass(frozen=True)
class PlainBackward:
    """The plain Triton kernels for one case. See ``vbench.backend.Kernel``.

    ``copy_engine``: the GPU has the bulk tensor copy engine and 227 KB of shared memory for a program.
    """

    shape: Shape
    device: Device
    interpreted: bool
    copy_engine: bool
    numerics: Numerics
    produces: tuple[str, ...] = ("dq", "dk", "dv")
    deterministic: bool = True

    def plan(self, inputs: Mapping[str, Any]) -> tuple[BackwardTiles, bool]:
        """The tiles, and whether blocks come through tensor descriptors."""
        fits = all(takes_descriptor(inputs[name]) for name in WALKED)
        descriptors = self.copy_engine and self.shape.dtype != "fp32" and fits
        if self.interpreted:
            return INTERPRETED, descriptors
        shape = self.shape
        edges = shape.window > 0 or shape.softcap > 0
        tiles = choose(shape.dtype, shape.d, descriptors=descriptors, shared_227kb=self.copy_engine, edges=edges)
        return tiles, descriptors

    def bind(self, inputs: Mapping[str, Any], out: Mapping[str, Any]) -> Launch:
        """Bind the inputs (any strides) to a launch that writes ``dq``, ``dk`` and ``dv``.

        Allocates the scratch of lse and delta: two float32 a query row.

        Raises:
            Unsupported: see ``check_gradient_tensors`` and ``attention.check_spans``.
        """
        check_gradient_tensors(self.shape, inputs, out, self.device)
        tiles, descriptors = self.plan(inputs)
        return self.bind_tiles(inputs, out, tiles, descriptors)

    def bind_tiles(
        self, inputs: Mapping[str, Any], out: Mapping[str, Any], tiles: BackwardTiles, descriptors: bool
    ) -> Launch:
        """As ``bind``, with tiles of the caller's choice (the tuner's)."""
        parts = self.bind_parts(inputs, out, tiles, descriptors)

        def launch() -> None:
            for part in parts:
                part()

        return launch

    def bind_parts(
        self, inputs: Mapping[str, Any], out: Mapping[str, Any], tiles: BackwardTiles, descriptors: bool
    ) -> tuple[Launch, Launch, Launch]:
        """The three launches, in order: rows prepared, dQ, dK and dV."""
        import torch

        from vbench.kernels.triton.attention_backward_kernels import gradient_of_keys, gradient_of_queries, prepare_rows

        shape, width = self.shape, padded_head_dim(self.shape.d)
        q, k, v, dout, lse = (inputs[name] for name in ("q", "k", "v", "dout", "lse"))
        dq, dk, dv = (out[name] for name in self.produces)
        queries, keys = tiles.queries, tiles.keys
        tensors = {name: inputs[name] for name in ("q", "k", "v", "out", "dout")} | dict(out)
        longest = max(queries.block_m, queries.block_n, keys.block_m, keys.block_n)
        check_spans(tensors, longest, width, walked=WALKED)
        heads, kv_heads = shape.b * shape.hq, shape.b * shape.hk
        per_kv = shape.hq // shape.hk
        padded_rows = -(-shape.sq // ROW_PADDING) * ROW_PADDING
        exponent, delta = torch.empty(2, heads, padded_rows, dtype=torch.float32, device=q.device)
        dlse = inputs.get("dlse")
        row_strides = (*inputs["out"].stride(), *dout.stride(), *lse.stride())
        prepare = (
            inputs["out"], dout, lse, dlse, exponent, delta, shape.hq, shape.sq, padded_rows,
            *row_strides, *((0, 0, 0) if dlse is None else dlse.stride()),
        )  # fmt: skip
        # Q and dO of a key head's query heads are what its blocks share: as many bytes as per_kv heads of K and V.
        sizes = (shape.hq, per_kv, shape.sq, shape.sk, shape.above, shape.below)
        query_group = heads_per_group(heads, per_kv, shape.sk, shape.d, q.element_size())
        key_group = heads_per_group(kv_heads, 1, shape.sq * per_kv, shape.d, q.element_size())
        strides = (*q.stride(), *k.stride(), *v.stride(), *dout.stride())
        scales = (shape.tanh_scale, shape.cap_exponent, shape.d**-0.5)

        def sources(tile: Tile) -> tuple[Any, ...]:
            rows = (tile.block_m, tile.block_n, tile.block_n, tile.block_m)
            return tuple(block_source(t, n, width, descriptors) for t, n in zip((q, k, v, dout), rows, strict=True))

        by_queries = (
            *sources(queries), exponent, delta, dq,
            *scales, *sizes, heads, query_group, padded_rows, *strides, *dq.stride(),
        )  # fmt: skip
        by_keys = (
            *sources(keys), exponent, delta, dk, dv,
            *scales, *sizes, kv_heads, key_group, padded_rows, *strides, *dk.stride(), *dv.stride(),
        )  # fmt: skip
        shared: dict[str, Any] = {"D": shape.d, "BLOCK_D": width, "EMULATE": self.interpreted}
        walk = shared | {
            "BOUNDED": shape.bounded,
            "WINDOW": shape.window > 0,
            "SOFTCAP": shape.softcap > 0,
            "DESCRIPTORS": descriptors,
            # "ieee" keeps fp32 products exact; Triton's default would silently round operands to tf32.
            "PRECISION": "ieee" if shape.dtype == "fp32" else "tf32",
        }
        query_constants, key_constants = (
            walk
            | {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "num_warps": tile.warps, "num_stages": tile.stages}
            for tile in (queries, keys)
        )
        prepare_grid = (heads * padded_rows // PREPARE_ROWS,)
        query_grid = (heads * -(-shape.sq // queries.block_m),)
        key_grid = (kv_heads * -(-shape.sk // keys.block_n),)

        def rows() -> None:
            prepare_rows[prepare_grid](*prepare, **shared, BLOCK_M=PREPARE_ROWS, DLSE=dlse is not None)

        def of_queries() -> None:
            gradient_of_queries[query_grid](*by_queries, **query_constants)

        def of_keys() -> None:
            gradient_of_keys[key_grid](*by_keys, **key_constants)

        return rows, of_queries, of_keys


def make(case: Case, variant: str, device: Device) -> Kernel:
    """Kernel factory of op ``attention_backward``.

    Args:
        variant: ``""`` plain Triton (sm_80 and later, or the interpreter on a CPU); ``"gluon"`` the Hopper kernel, dq
            summed in any order; ``"gluon_deterministic"`` the Hopper kernels with the same bits every time.

    Raises:
        Unsupported: ``unknown_variant``; ``parameter_not_taken``; what ``Shape.of``, ``attention.plain_machine`` and
            the Gluon kernels refuse.
    """
    shape = Shape.of(case)
    if variant not in VARIANTS:
        raise Unsupported("unknown_variant", f"{variant!r} is not one of {VARIANTS}")
    if variant:
        from vbench.kernels.triton.attention_backward_gluon_host import make_gluon_backward

        refuse_beyond(case, GLUON_PARAMETERS)
        return make_gluon_backward(shape, device, deterministic=variant == "gluon_deterministic")
    refuse_beyond(case, PLAIN_PARAMETERS)
    interpreted, copy_engine = plain_machine(device)
    return PlainBackward(shape, device, interpreted, copy_engine, plain_numerics(shape))
