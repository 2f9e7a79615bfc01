"""Peers of the extended attention ops: ``scaled_dot_product_attention`` with an additive mask, one backend forced.

ALiBi is handed over as the dense bias it is. SDPA has no sinks, no packed sequences, no windows and no capped scores;
whether a fused backend takes a mask is asked of torch on the very tensors. The backward goes through autograd, on a
graph kept from ``bind``: what a training step calls.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.backends.cuda import SDPAParams
from torch.nn.attention import sdpa_kernel

from vbench.backend import Device, Kernel, Launch, refuse_beyond
from vbench.errors import Unsupported
from vbench.kernels.peers import sdpa
from vbench.kernels.peers.sdpa import BACKENDS, CAN_USE, expand_heads
from vbench.spec import Case, Numerics

PARAMETERS = (*sdpa.PARAMETERS, "alibi", "sinks", "mask", "maskdims", "packed")


def dense_bias(causal: str, inputs: Mapping[str, Any]) -> Tensor | None:
    """What SDPA adds to the scores, in q's dtype, broadcastable to [b, hq, sq, sk]; ``None`` if nothing.

    Mask, ALiBi rounded to that dtype, and a causal mask as -inf where it comes with either or is aligned bottom right.
    """
    q, k, mask, slopes = inputs["q"], inputs["k"], inputs.get("mask"), inputs.get("slopes")
    sq, sk = q.shape[2], k.shape[2]
    if mask is None and slopes is None and (causal != "bottom_right" or sq == sk):
        return None
    total = torch.zeros(1, 1, sq, sk, dtype=torch.float32, device=q.device)
    if mask is not None:
        total = total + mask
    if slopes is not None:
        shift = sk - sq if causal == "bottom_right" else 0
        rows, keys = (torch.arange(n, device=q.device) for n in (sq, sk))
        total = total - slopes[:, None, None] * (keys[None, :] - rows[:, None] - shift).abs()
    if causal != "none":
        diagonal = sk - sq if causal == "bottom_right" else 0
        seen = torch.ones(sq, sk, dtype=torch.bool, device=q.device).tril(diagonal)
        total = total.masked_fill(~seen, -torch.inf)
    return total.to(q.dtype)


@dataclass(slots=True)
class _Call:
    """The forced forward. ``groups``: query heads per key head."""

    variant: str
    causal: str
    groups: int
    numerics: Numerics

    def prepare(self, inputs: Mapping[str, Any], leaves: tuple[Tensor, Tensor, Tensor]) -> Any:
        """A function that gives out.

        Raises:
            Unsupported: ``backend_refuses`` where torch says that the forced backend does not take these tensors.
        """
        q, k, v = leaves
        bias = dense_bias(self.causal, inputs)
        is_causal = bias is None and self.causal != "none"
        # As in sdpa.py: the efficient backend has no grouped heads.
        expand = self.groups > 1 and self.variant == "sdpa_efficient"
        grouped = self.groups > 1 and not expand
        b, hq, sq, _ = q.shape
        if bias is not None:
            # Expanded, not copied: what the fused backends take.
            bias = bias.expand(b, hq, sq, k.shape[2])
        if q.device.type == "cuda":
            torch.set_float32_matmul_precision("highest")
            if self.variant in CAN_USE:
                keys, values = (expand_heads(t, self.groups) if expand else t for t in (k, v))
                if not CAN_USE[self.variant](SDPAParams(q, keys, values, bias, 0.0, is_causal, grouped), False):
                    raise Unsupported(
                        "backend_refuses",
                        f"torch {torch.__version__} says {self.variant} does not take {q.dtype}, d={q.shape[3]}, "
                        f"sq={sq}, sk={k.shape[2]}, groups={self.groups}, mask={bias is not None} on this GPU",
                    )

        def forward() -> Tensor:
            keys, values = (expand_heads(t, self.groups) if expand else t for t in (k, v))
            with sdpa_kernel(BACKENDS[self.variant]):
                return torch.nn.functional.scaled_dot_product_attention(
                    q, keys, values, attn_mask=bias, is_causal=is_causal, enable_gqa=grouped
                )

        return forward


@dataclass(slots=True)
class ExtendedSdpa(_Call):
    """``attention_extended`` by one SDPA backend."""

    produces: tuple[str, ...] = ("out",)
    deterministic: bool = True

    def bind(self, inputs: Mapping[str, Any], out: Mapping[str, Any]) -> Launch:
        """See ``_Call.prepare``."""
        forward = self.prepare(inputs, (inputs["q"], inputs["k"], inputs["v"]))
        return lambda: {"out": forward()}


@dataclass(slots=True)
class ExtendedSdpaBackward(_Call):
    """``attention_extended_backward`` by autograd through one SDPA backend."""

    produces: tuple[str, ...] = ("dq", "dk", "dv")
    deterministic: bool = False
    # The engine launches on the stream the forward ran on, which is not the one being captured.
    graph_safe: bool = False

    def bind(self, inputs: Mapping[str, Any], out: Mapping[str, Any]) -> Launch:
        """Run the forward, and bind the gradients of its output. See ``_Call.prepare``."""
        q, k, v = (inputs[name].detach().requires_grad_() for name in "qkv")
        with torch.enable_grad():
            result = self.prepare(inputs, (q, k, v))()
        dout = inputs["dout"]

        def launch() -> Mapping[str, Tensor]:
            found = torch.autograd.grad(result, (q, k, v), dout, retain_graph=True)
            return dict(zip(("dq", "dk", "dv"), found, strict=True))

        return launch


def _read(case: Case, variant: str, device: Device) -> tuple[str, str, int]:
    """(variant, causal, groups), or Unsupported."""
    refuse_beyond(case, PARAMETERS)
    if variant not in BACKENDS:
        raise Unsupported("unknown_variant", f"{variant!r} is not one of {', '.join(BACKENDS)}")
    if device == "cpu" and variant in ("sdpa_cudnn", "sdpa_efficient"):
        raise Unsupported("needs_cuda", f"{variant} exists on CUDA devices only; take sdpa_flash or sdpa_math")
    if case.axis("sinks"):
        raise Unsupported("no_sinks", "sinks=1: scaled_dot_product_attention takes no sink")
    if case.axis("packed"):
        raise Unsupported("no_packed_sequences", f"packed={case.axis('packed')}: SDPA takes no cu_seqlens")
    rows_without_keys = case.text("causal") == "bottom_right" and case.axis("sq") > case.axis("sk")
    if case.text("mask") == "blocked" or rows_without_keys:
        raise Unsupported("peer_documents_nothing", "no word on rows with nothing to attend to")
    return variant, case.text("causal"), case.axis("hq") // case.axis("hk")


def _numerics(case: Case, variant: str, device: Device, *, backward: bool) -> Numerics:
    """As in sdpa.py and sdpa_backward.py; ALiBi comes as a bias rounded to the dtype, which no budget allows for."""
    dtype = case.text("dtype")
    if case.axis("alibi") and dtype != "fp32":
        raise Unsupported("bias_rounded", f"alibi=1: SDPA takes the bias in {dtype}, rounded; give it fp32 tensors")
    if variant == "sdpa_math":
        return Numerics("fp32", probabilities="fp32", own_forward=backward)
    expanded = backward and case.axis("hq") > case.axis("hk") and (device == "cpu" or variant == "sdpa_efficient")
    return Numerics(
        accumulate="tensor_core" if device == "cuda" else "fp32",
        # The gradients of repeated heads are rounded to dtype before they are summed.
        operand_roundings=(dtype,) if expanded else (),
        probabilities=dtype,
        own_forward=backward,
    )


def make(case: Case, variant: str, device: Device) -> Kernel:
    """Raises Unsupported: ``parameter_not_taken``; ``unknown_variant``; ``needs_cuda``; ``no_sinks``;
    ``no_packed_sequences``; ``peer_documents_nothing`` (rows with nothing to attend to); ``bias_rounded``."""
    return ExtendedSdpa(*_read(case, variant, device), _numerics(case, variant, device, backward=False))


def make_backward(case: Case, variant: str, device: Device) -> Kernel:
    """Raises Unsupported: as ``make``, and ``no_lse_gradient``."""
    if case.axis("dlse"):
        raise Unsupported("no_lse_gradient", "dlse=1: scaled_dot_product_attention returns no lse to differentiate")
    return ExtendedSdpaBackward(*_read(case, variant, device), _numerics(case, variant, device, backward=True))
