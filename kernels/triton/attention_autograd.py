"""Attention for use in a model: a torch operator with gradients, one node to ``torch.compile`` and CUDA graphs.

    out, lse = attention(q, k, v, causal="top_left")

Both results are differentiable, lse too. Importing this module registers the operators ``vbench::attention`` and
``vbench::attention_backward`` (torch.library custom operators, each with a fake kernel for shapes). Kernels are those
of backend ``triton`` and refuse what they refuse; nothing falls back.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from vbench.backend import Device, Kernel, KernelFactory
from vbench.errors import Unsupported
from vbench.kernels.triton import attention as forward
from vbench.kernels.triton import attention_backward as backward
from vbench.spec import TORCH_DTYPE_NAMES, Case, ParamValue

#: torch dtype -> its name in cases.
DTYPES: Mapping[torch.dtype, str] = {getattr(torch, TORCH_DTYPE_NAMES[name]): name for name in ("bf16", "fp16", "fp32")}

#: Cases differ by their lengths, so a training run sees few and a server many; a kernel object is small.
CACHED_KERNELS = 4096


@lru_cache(maxsize=CACHED_KERNELS)
def _kernel(
    op: str,
    variant: str,
    dtype: torch.dtype,
    sizes: tuple[int, ...],
    causal: str,
    window: int,
    softcap: int,
    device: str,
) -> Kernel:
    if dtype not in DTYPES:
        raise Unsupported("dtype", f"q is {dtype}; these kernels take {', '.join(map(str, DTYPES))}")
    if device not in ("cpu", "cuda"):
        raise Unsupported("device", f"q is on {device}; these kernels run on cuda, and interpreted on cpu")
    values: dict[str, ParamValue] = {"dtype": DTYPES[dtype], "causal": causal, "window": window, "softcap": softcap}
    values |= dict(zip(("b", "hq", "hk", "sq", "sk", "d"), sizes, strict=True))
    # Features that are off go unsaid, so that a kernel that does not know them is not asked about them.
    off = tuple(name for name in ("window", "softcap") if not values[name])
    place: Device = "cuda" if device == "cuda" else "cpu"
    make: KernelFactory = forward.make if op == "attention" else backward.make
    return make(Case(op, tuple(values.items()), unsaid=off), variant, place)


def _of(op: str, variant: str, q: Tensor, k: Tensor, causal: str, window: int, softcap: int) -> Kernel:
    if q.dim() != 4 or k.dim() != 4:
        raise Unsupported("wrong_shape", f"q has {q.dim()} axes and k {k.dim()}; both take [batch, heads, length, dim]")
    if causal not in ("none", "top_left", "bottom_right"):
        raise Unsupported("mask", f"causal={causal!r} is not one of none, top_left, bottom_right")
    b, hq, sq, d = q.shape
    sizes = (b, hq, k.shape[1], sq, k.shape[2], d)
    return _kernel(op, variant, q.dtype, sizes, causal, window, softcap, q.device.type)


@torch.library.custom_op("vbench::attention", mutates_args=())
def attention_op(
    q: Tensor, k: Tensor, v: Tensor, causal: str, window: int, softcap: int, variant: str
) -> tuple[Tensor, Tensor]:
    """The operator behind ``attention``, which describes arguments and results."""
    kernel = _of("attention", variant, q, k, causal, window, softcap)
    out, lse = _like_forward(q)
    kernel.bind({"q": q, "k": k, "v": v}, {"out": out, "lse": lse})()
    return out, lse


@torch.library.custom_op("vbench::attention_backward", mutates_args=())
def attention_backward_op(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    causal: str,
    window: int,
    softcap: int,
    variant: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk and dv from the gradients of out and (where not ``None``) lse."""
    kernel = _of("attention_backward", variant, q, k, causal, window, softcap)
    inputs: dict[str, Any] = {"q": q, "k": k, "v": v, "out": out, "lse": lse, "dout": dout}
    if dlse is not None:
        inputs["dlse"] = dlse
    dq, dk, dv = _like_backward(q, k, v)
    kernel.bind(inputs, {"dq": dq, "dk": dk, "dv": dv})()
    return dq, dk, dv


def _like_forward(q: Tensor) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=torch.float32)


def _like_backward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


@attention_op.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, causal: str, window: int, softcap: int, variant: str) -> tuple[Tensor, Tensor]:
    return _like_forward(q)


@attention_backward_op.register_fake
def _(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    causal: str,
    window: int,
    softcap: int,
    variant: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return _like_backward(q, k, v)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, *ctx.rule = inputs
    ctx.save_for_backward(q, k, v, *output)
    # A loss that does not use lse sends no gradient into it; zeros would be read for nothing.
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, out, lse = ctx.saved_tensors
    causal, window, softcap, variant = ctx.rule
    if dout is None and dlse is None:
        return (None,) * 7
    if dout is None:
        dout = torch.zeros_like(out)
    found = attention_backward_op(dout, dlse, q, k, v, out, lse, causal, window, softcap, variant)
    return (*found, None, None, None, None)


attention_op.register_autograd(_differentiate, setup_context=_keep)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: str = "none",
    window: int = 0,
    softcap: int = 0,
    variant: str = "",
) -> tuple[Tensor, Tensor]:
    """softmax(q k^T / sqrt(d)) v and its log-sum-exp, as op ``attention`` defines them.

    Args:
        q: [b, hq, sq, d], bf16, fp16 or fp32, any strides. ``k``, ``v``: [b, hk, sk, d], hq a multiple of hk.
        causal, window, softcap: as in op ``attention``.
        variant: ``""`` plain Triton, every shape; ``"gluon"`` the Hopper kernels.

    Returns:
        out like q, contiguous; lse float32 [b, hq, sq], natural logarithm. Both differentiable once.

    Raises:
        vbench.errors.Unsupported: what the kernels do not take, with the rule and what to do.
    """
    out, lse = attention_op(q, k, v, causal, window, softcap, variant)
    return out, lse
