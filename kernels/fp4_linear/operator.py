"""The torch operators behind ``FP4Linear``: one node to ``torch.compile`` and CUDA graphs; dX by the decoded weight.

``vbench::fp4_linear`` and ``vbench::fp4_linear_backward`` take the tensors a module holds and the text and numbers that
say what they are; nothing is read back from the device.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from vbench.kernels.fp4_linear import codec, tiles


def _dense(engine: str, fmt: str, w: Mapping[str, Tensor], n: int, k: int, layout: Sequence[int], dtype: Any) -> Tensor:
    if engine == "torch":
        return codec.decode(fmt, w, dtype)
    return tiles.dense(tiles.packed(fmt, w, n, k, layout), dtype)


@torch.library.custom_op("vbench::fp4_linear", mutates_args=())
def fp4_linear(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    global_scale: Tensor,
    bias: Tensor | None,
    fmt: str,
    n: int,
    engine: str,
    layout: Sequence[int],
) -> Tensor:
    """y [m, n] = x [m, k] decode(weight)^T + bias, contiguous, in x's dtype."""
    w = {"codes": codes, "scale": scale, "global_scale": global_scale}
    m, k = x.shape
    y = x.new_empty(m, n)
    if m == 0:
        return y
    if engine == "torch":
        y.copy_(torch.nn.functional.linear(x, codec.decode(fmt, w, x.dtype), bias))
        return y
    x = x if x.stride(1) == 1 else x.contiguous()
    tiles.launch(tiles.packed(fmt, w, n, k, layout), x, bias, y)
    return y


@torch.library.custom_op("vbench::fp4_linear_backward", mutates_args=())
def fp4_linear_backward(
    dy: Tensor,
    codes: Tensor,
    scale: Tensor,
    global_scale: Tensor,
    fmt: str,
    k: int,
    engine: str,
    layout: Sequence[int],
) -> Tensor:
    """dx [m, k] = dy [m, n] decode(weight); the weight is decoded to dy's dtype in scratch memory."""
    w = {"codes": codes, "scale": scale, "global_scale": global_scale}
    n = dy.shape[1]
    return dy @ _dense(engine, fmt, w, n, k, layout, dy.dtype)


@fp4_linear.register_fake
def _(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    global_scale: Tensor,
    bias: Tensor | None,
    fmt: str,
    n: int,
    engine: str,
    layout: Sequence[int],
) -> Tensor:
    return x.new_empty(x.shape[0], n)


@fp4_linear_backward.register_fake
def _(
    dy: Tensor,
    codes: Tensor,
    scale: Tensor,
    global_scale: Tensor,
    fmt: str,
    k: int,
    engine: str,
    layout: Sequence[int],
) -> Tensor:
    return dy.new_empty(dy.shape[0], k)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, codes, scale, global_scale, _, ctx.fmt, _, ctx.engine, ctx.layout = inputs
    ctx.k = x.shape[1]
    ctx.save_for_backward(codes, scale, global_scale)


def _differentiate(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    needs_x, needs_bias = ctx.needs_input_grad[0], ctx.needs_input_grad[4]
    dx = fp4_linear_backward(dy, *ctx.saved_tensors, ctx.fmt, ctx.k, ctx.engine, ctx.layout) if needs_x else None
    return dx, None, None, None, dy.sum(0) if needs_bias else None, None, None, None, None


fp4_linear.register_autograd(_differentiate, setup_context=_keep)
