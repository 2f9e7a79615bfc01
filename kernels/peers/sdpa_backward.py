"""Peers of ``attention_backward``: the backward of ``scaled_dot_product_attention`` on one of its backends.

A fused backend's backward is called by its aten operator, on the output and whatever else its own forward returned in
``bind``: autograd would add its engine's time and the stream of the forward, which a CUDA graph cannot capture. The
maths backend has no backward of its own; torch differentiates it, so that one goes through ``torch.autograd.grad``.
The given ``out`` and ``lse`` are not read (``Numerics.own_forward``): cuDNN and the efficient backend keep their
log-sum-exp in layouts of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.backends.cuda import SDPAParams
from torch.nn.attention import sdpa_kernel

from vbench.backend import Device, Kernel, Launch, refuse_beyond
from vbench.errors import Unsupported
from vbench.kernels.peers.sdpa import BACKENDS, CAN_USE, PARAMETERS, expand_heads, lower_right_mask
from vbench.spec import Case, Numerics

#: Backends that take fewer key heads than query heads. For the others K and V are repeated in the forward, and the
#: gradients of the repeats summed in the backward, as autograd does for a user who repeats them.
GROUPED = ("sdpa_flash", "sdpa_cudnn")

aten: Any = torch.ops.aten

#: (q, k, v, dout) -> a backward on them; the forward runs at once.
Prepare = Callable[[Tensor, Tensor, Tensor, Tensor, bool], Callable[[], tuple[Tensor, Tensor, Tensor]]]


def _flash_cpu(q: Tensor, k: Tensor, v: Tensor, dout: Tensor, causal: bool) -> Callable[[], Any]:
    out, lse = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal)
    backward = aten._scaled_dot_product_flash_attention_for_cpu_backward
    return lambda: backward(dout, q, k, v, out, lse, 0.0, causal)


def _flash(q: Tensor, k: Tensor, v: Tensor, dout: Tensor, causal: bool) -> Callable[[], Any]:
    out, lse, *state, _ = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal)
    sequences, random = state[:4], state[4:]
    backward = aten._scaled_dot_product_flash_attention_backward
    return lambda: backward(dout, q, k, v, out, lse, *sequences, 0.0, causal, *random)


def _cudnn(q: Tensor, k: Tensor, v: Tensor, dout: Tensor, causal: bool) -> Callable[[], Any]:
    out, lse, *state, _ = aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, causal)
    sequences, random = state[:4], state[4:]
    backward = aten._scaled_dot_product_cudnn_attention_backward
    return lambda: backward(dout, q, k, v, out, lse, *random, None, *sequences, 0.0, causal)


def _efficient(q: Tensor, k: Tensor, v: Tensor, dout: Tensor, causal: bool) -> Callable[[], Any]:
    out, lse, *random = aten._scaled_dot_product_efficient_attention(q, k, v, None, True, 0.0, causal)
    backward = aten._scaled_dot_product_efficient_attention_backward
    wanted = [True, True, True, False]
    return lambda: backward(dout, q, k, v, None, out, lse, *random, 0.0, wanted, causal)[:3]


PREPARE: Mapping[tuple[str, Device], Prepare] = {
    ("sdpa_flash", "cpu"): _flash_cpu,
    ("sdpa_flash", "cuda"): _flash,
    ("sdpa_cudnn", "cuda"): _cudnn,
    ("sdpa_efficient", "cuda"): _efficient,
}


@dataclass(slots=True)
class SdpaBackward:
    """``attention_backward`` by one fused SDPA backend.

    Args:
        groups: query heads per key head.
    """

    variant: str
    causal: str
    groups: int
    device: Device
    numerics: Numerics
    produces: tuple[str, ...] = ("dq", "dk", "dv")
    # dq, and in places dk and dv, are summed by atomic additions.
    deterministic: bool = False

    def bind(self, inputs: Mapping[str, Any], out: Mapping[str, Any]) -> Launch:
        """Run the forward, and bind its backward. See ``vbench.backend.Kernel.bind``.

        Raises:
            Unsupported: ``backend_refuses`` where torch says that the forced backend does not take these tensors.
        """
        q, k, v, dout = (inputs[name] for name in ("q", "k", "v", "dout"))
        is_causal = self.causal != "none"
        expand = self.groups > 1 and not (self.device == "cuda" and self.variant in GROUPED)
        if self.device == "cuda":
            # What takes a forward need not take a backward; torch decides by whether a gradient is wanted.
            keys, values = self._repeated(k, v, expand)
            of_q, of_k, of_v = (t.detach().requires_grad_() for t in (q, keys, values))
            params = SDPAParams(of_q, of_k, of_v, None, 0.0, is_causal, self.groups > 1 and not expand)
            if not CAN_USE[self.variant](params, False):
                raise Unsupported(
                    "backend_refuses",
                    f"torch {torch.__version__} says {self.variant} does not take {q.dtype}, d={q.shape[3]}, "
                    f"sq={q.shape[2]}, sk={k.shape[2]}, causal={self.causal}, groups={self.groups} on this GPU",
                )
        prepare = PREPARE[self.variant, self.device]
        if not expand:
            backward = prepare(q, k, v, dout, is_causal)
            return lambda: dict(zip(self.produces, backward(), strict=True))
        on_repeated = prepare(q, *self._repeated(k, v, True), dout, is_causal)
        b, hk, sk, d = k.shape

        def launch() -> Mapping[str, Tensor]:
            dq, *repeats = on_repeated()
            dk, dv = (t.reshape(b, hk, self.groups, sk, d).sum(2) for t in repeats)
            return {"dq": dq, "dk": dk, "dv": dv}

        return launch

    def _repeated(self, k: Tensor, v: Tensor, expand: bool) -> tuple[Tensor, Tensor]:
        return (expand_heads(k, self.groups), expand_heads(v, self.groups)) if expand else (k, v)


@dataclass(slots=True)
class MathBackward:
    """``attention_backward`` by torch's autograd through the maths backend, on a graph kept from ``bind``."""

    causal: str
    groups: int
    numerics: Numerics
    produces: tuple[str, ...] = ("dq", "dk", "dv")
    deterministic: bool = True
    # The engine launches on the stream the forward ran on, which is not the one being captured.
    graph_safe: bool = False

    def bind(self, inputs: Mapping[str, Any], out: Mapping[str, Any]) -> Launch:
        """Run the forward, and bind the gradients of its output. See ``vbench.backend.Kernel.bind``."""
        leaves = [inputs[name].detach().requires_grad_() for name in ("q", "k", "v")]
        q, k, v = leaves
        sq, sk = q.shape[2], k.shape[2]
        if q.device.type == "cuda":
            torch.set_float32_matmul_precision("highest")
        # is_causal is aligned top left.
        mask = lower_right_mask(sq, sk, q.device) if self.causal == "bottom_right" and sq != sk else None
        is_causal = self.causal != "none" and mask is None
        with sdpa_kernel(BACKENDS["sdpa_math"]):
            result = torch.nn.functional.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=is_causal, enable_gqa=self.groups > 1
            )
        dout = inputs["dout"]

        def launch() -> Mapping[str, Tensor]:
            found = torch.autograd.grad(result, leaves, dout, retain_graph=True)
            return dict(zip(self.produces, found, strict=True))

        return launch


def make(case: Case, variant: str, device: Device) -> Kernel:
    """Raises Unsupported: ``parameter_not_taken``; ``unknown_variant``; ``needs_cuda``; ``no_lse_gradient`` (SDPA
    returns no log-sum-exp); ``alignment_not_offered``: the fused operators know one causal alignment each, flash on
    CUDA bottom right, the others top left, which differ where sq != sk; ``peer_documents_nothing``;
    ``head_dim_not_multiple_of_8`` (SDPA pads such heads in a forward, and slices their gradients, outside the operators
    timed here).

    Numerics: see ``sdpa.make``; weights and score gradients are rounded to the input's dtype by the fused backends.
    """
    refuse_beyond(case, PARAMETERS)
    if variant not in BACKENDS:
        raise Unsupported("unknown_variant", f"{variant!r} is not one of {', '.join(BACKENDS)}")
    if device == "cpu" and variant in ("sdpa_cudnn", "sdpa_efficient"):
        raise Unsupported("needs_cuda", f"{variant} exists on CUDA devices only; take sdpa_flash or sdpa_math")
    if case.axis("dlse"):
        raise Unsupported("no_lse_gradient", "dlse=1: scaled_dot_product_attention returns no lse to differentiate")
    sq, sk, causal, dtype = case.axis("sq"), case.axis("sk"), case.text("causal"), case.text("dtype")
    groups = case.axis("hq") // case.axis("hk")
    if variant == "sdpa_math":
        return MathBackward(causal, groups, Numerics("fp32", probabilities="fp32", own_forward=True))
    own = "bottom_right" if device == "cuda" and variant == "sdpa_flash" else "top_left"
    if sq != sk and causal not in ("none", own):
        raise Unsupported("alignment_not_offered", f"{variant} aligns {own}; with sq={sq}, sk={sk} {causal} differs")
    if sq > sk and causal == "bottom_right":
        raise Unsupported("peer_documents_nothing", f"sq={sq} > sk={sk}: no word on rows with nothing to attend to")
    if device == "cuda" and case.axis("d") % 8:
        raise Unsupported("head_dim_not_multiple_of_8", f"d={case.axis('d')}: pad the heads to a multiple of 8")
    expanded = groups > 1 and not (device == "cuda" and variant in GROUPED)
    numerics = Numerics(
        accumulate="tensor_core" if device == "cuda" else "fp32",
        # The gradients of repeated heads are rounded to dtype before they are summed.
        operand_roundings=(dtype,) if expanded else (),
        probabilities=dtype,
        own_forward=True,
    )
    return SdpaBackward(variant, causal, groups, device, numerics)
