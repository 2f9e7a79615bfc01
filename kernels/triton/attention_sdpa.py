"""Our attention under ``F.scaled_dot_product_attention``: torch's own choice of a flash attention implementation.

    attention_sdpa.register()
    torch.nn.attention.activate_flash_attention_impl("vbench")
    ...                                                          # models that call SDPA, torch.compile included
    torch.nn.attention.restore_flash_attention_impl()

or ``with attention_sdpa.active():`` for a stretch of code. What is active holds for the whole process, whichever
thread asks; ``current()`` tells, and backend ``torch_native`` writes it into its records. torch 2.11 and 2.13 have this
registry (``torch.nn.attention``); where it is missing, ``register`` refuses.

SDPA decides first whether its flash backend takes a call (half types and no mask on CUDA), and only then comes here.
What comes and is not taken (dropout, a scale other than 1/sqrt(d), a mask) raises ``Unsupported``; nothing falls back.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.attention
from torch import Tensor

from vbench.errors import Unsupported
from vbench.kernels.triton.attention_autograd import _of as kernel_of

#: Name in torch's registry -> variant of the kernels, see ``attention_autograd.attention``.
IMPLEMENTATIONS: Mapping[str, str] = {"vbench": "", "vbench_gluon": "gluon"}
REGISTRY = (
    "register_flash_attention_impl",
    "activate_flash_attention_impl",
    "current_flash_attention_impl",
    "restore_flash_attention_impl",
)
#: Alignment of ``is_causal`` in the flash operators: torch.nn.attention.bias.causal_lower_right calls the CUDA operator
#: with it for bottom right (SDPA itself sends causal calls there only if sq = sk); the CPU operator's is top left.
ALIGNMENT = {"cuda": "bottom_right", "cpu": "top_left"}


def available() -> bool:
    """Has this torch the registry?"""
    return all(hasattr(torch.nn.attention, name) for name in REGISTRY)


def current() -> str:
    """Name of the active implementation, ``""`` for torch's own. Process-global."""
    return (torch.nn.attention.current_flash_attention_impl() or "") if available() else ""


def register() -> None:
    """Enter our implementations in torch's registry. Activates nothing; may be called again.

    Raises:
        Unsupported: ``no_flash_registry``.
    """
    if not available():
        raise Unsupported(
            "no_flash_registry",
            f"torch {torch.__version__} lacks torch.nn.attention.{REGISTRY[0]}; take torch 2.11 or later, or call "
            "vbench.kernels.triton.attention_autograd.attention instead of SDPA",
        )
    for name, variant in IMPLEMENTATIONS.items():
        torch.nn.attention.register_flash_attention_impl(name, register_fn=partial(_override, variant))


@contextlib.contextmanager
def active(name: str = "vbench") -> Iterator[None]:
    """SDPA's flash backend is ours inside, for the whole process; what was active before is put back.

    Raises:
        Unsupported: ``no_flash_registry``; ``unknown_variant``.
    """
    if name not in IMPLEMENTATIONS:
        raise Unsupported("unknown_variant", f"{name!r} is not one of {', '.join(IMPLEMENTATIONS)}")
    register()
    before = current()
    torch.nn.attention.activate_flash_attention_impl(name)
    try:
        yield
    finally:
        torch.nn.attention.restore_flash_attention_impl()
        if before:
            torch.nn.attention.activate_flash_attention_impl(before)


@dataclass
class _Handle:
    """Keeps the overriding kernels; torch takes its own again when their last reference goes."""

    libraries: tuple[Any, ...]

    def remove(self) -> None:
        self.libraries = ()


def _override(variant: str) -> _Handle:
    """Put ours in the place of torch's flash operators, for CUDA and CPU tensors. Shapes for tracing stay torch's."""
    prefix = "_scaled_dot_product_flash_attention"
    cuda, cpu = (torch.library.Library("aten", "IMPL", key) for key in ("CUDA", "CPU"))
    with warnings.catch_warnings():
        # torch warns, once a process, that a kernel is overridden: that is what was asked for.
        warnings.simplefilter("ignore", UserWarning)
        cuda.impl(prefix, partial(_forward_cuda, variant))
        cuda.impl(f"{prefix}_backward", partial(_backward_cuda, variant))
        cpu.impl(f"{prefix}_for_cpu", partial(_forward_cpu, variant))
        cpu.impl(f"{prefix}_for_cpu_backward", partial(_backward_cpu, variant))
    return _Handle((cuda, cpu))


def _causal(q: Tensor, dropout_p: float, is_causal: bool, scale: float | None, mask: Tensor | None = None) -> str:
    """The case's ``causal``, or a refusal of what the kernels do not take."""
    if dropout_p:
        raise Unsupported("dropout", f"dropout_p={dropout_p}: these kernels have none; train with dropout_p=0")
    if mask is not None:
        raise Unsupported("mask", "attn_mask is given: these kernels take is_causal only")
    d = q.shape[-1]
    if scale is not None and not math.isclose(scale, d**-0.5, rel_tol=2.0**-40):
        raise Unsupported(
            "scale",
            f"scale={scale} is not 1/sqrt(d) for d={d}: scale q yourself; on CUDA, SDPA pads head dims that are no "
            "multiple of 8 and then asks for the scale of the smaller one: call attention_autograd.attention for those",
        )
    return ALIGNMENT[q.device.type] if is_causal else "none"


def _forward(variant: str, causal: str, q: Tensor, k: Tensor, v: Tensor, lse: Tensor) -> Tensor:
    """out with q's strides, as the operators' own shape functions promise; fills lse, float32 [b, hq, sq]."""
    out = torch.empty_like(q)
    kernel_of("attention", variant, q, k, causal, 0, 0).bind({"q": q, "k": k, "v": v}, {"out": out, "lse": lse})()
    return out


def _backward(
    variant: str, causal: str, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = (torch.empty_like(t) for t in (q, k, v))
    inputs = {"q": q, "k": k, "v": v, "out": out, "lse": lse, "dout": dout}
    kernel_of("attention_backward", variant, q, k, causal, 0, 0).bind(inputs, {"dq": dq, "dk": dk, "dv": dv})()
    return dq, dk, dv


def _forward_cuda(
    variant: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    return_debug_mask: bool = False,
    *,
    scale: float | None = None,
) -> tuple[Any, ...]:
    """``aten::_scaled_dot_product_flash_attention``; the two random numbers it returns stay unused."""
    if return_debug_mask:
        raise Unsupported("debug_mask", "return_debug_mask=True: these kernels never hold the weights")
    causal = _causal(query, dropout_p, is_causal, scale)
    lse = query.new_empty(query.shape[:3], dtype=torch.float32)
    out = _forward(variant, causal, query, key, value, lse)
    state = query.new_empty(2, dtype=torch.uint64)
    unused = query.new_empty((), dtype=torch.uint64)
    return out, lse, None, None, query.shape[2], key.shape[2], state, unused, query.new_empty(0)


def _backward_cuda(
    variant: str,
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    cum_seq_q: Tensor | None,
    cum_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    philox_seed: Tensor,
    philox_offset: Tensor,
    *,
    scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """``aten::_scaled_dot_product_flash_attention_backward``."""
    causal = _causal(query, dropout_p, is_causal, scale)
    return _backward(variant, causal, grad_out, query, key, value, out, logsumexp)


def _forward_cpu(
    variant: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """``aten::_scaled_dot_product_flash_attention_for_cpu``, by the interpreter; lse lies as [b, sq, hq]."""
    causal = _causal(query, dropout_p, is_causal, scale, attn_mask)
    b, hq, sq, _ = query.shape
    lse = query.new_empty((b, sq, hq), dtype=torch.float32).transpose(1, 2)
    return _forward(variant, causal, query, key, value, lse), lse


def _backward_cpu(
    variant: str,
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    dropout_p: float,
    is_causal: bool,
    *,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """``aten::_scaled_dot_product_flash_attention_for_cpu_backward``."""
    causal = _causal(query, dropout_p, is_causal, scale, attn_mask)
    return _backward(variant, causal, grad_out, query, key, value, out, logsumexp)
