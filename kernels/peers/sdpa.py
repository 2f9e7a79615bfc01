"""Peers of ``attention``: ``scaled_dot_product_attention`` with one of its backends forced.

What a backend takes is asked of torch before any launch (``torch.backends.cuda.can_use_*``, on the very tensors); on
the CPU only math and flash exist. ``is_causal`` is aligned top left (torch's documentation of the function); bottom
right goes through ``causal_lower_right`` where the backend has it and an explicit mask elsewhere. SDPA gives no
log-sum-exp.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.backends.cuda import (
    SDPAParams,
    can_use_cudnn_attention,
    can_use_efficient_attention,
    can_use_flash_attention,
)
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right

from vbench.backend import Device, Kernel, Launch, refuse_beyond
from vbench.errors import Unsupported
from vbench.spec import Case, Numerics

BACKENDS = {
    "sdpa_math": SDPBackend.MATH,
    "sdpa_flash": SDPBackend.FLASH_ATTENTION,
    "sdpa_cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa_efficient": SDPBackend.EFFICIENT_ATTENTION,
}

#: What torch itself answers for tensors on a CUDA device; math takes everything.
CAN_USE: Mapping[str, Callable[[Any, bool], bool]] = {
    "sdpa_flash": can_use_flash_attention,
    "sdpa_cudnn": can_use_cudnn_attention,
    "sdpa_efficient": can_use_efficient_attention,
}

#: Parameters of a case that SDPA takes; it has neither windows nor capped scores.
PARAMETERS = ("dtype", "causal", "dist", "layout", "dlse", "b", "hq", "hk", "sq", "sk", "d")

#: On CUDA, the backends with a bottom-right mask of their own.
OWN_LOWER_RIGHT = ("sdpa_flash", "sdpa_efficient")


def lower_right_mask(sq: int, sk: int, device: Any) -> Tensor:
    """bool [sq, sk], True where key j <= i + sk - sq."""
    return torch.ones(sq, sk, dtype=torch.bool, device=device).tril(sk - sq)


def expand_heads(t_BHSD: Tensor, groups: int) -> Tensor:
    """[b, hk, s, d] -> [b, hk * groups, s, d], each head repeated ``groups`` times in place."""
    b, hk, s, d = t_BHSD.shape
    return t_BHSD[:, :, None].expand(b, hk, groups, s, d).reshape(b, hk * groups, s, d)


@dataclass(slots=True)
class Sdpa:
    """``attention`` by one SDPA backend.

    Args:
        groups: query heads per key head.
    """

    variant: str
    causal: str
    groups: int
    numerics: Numerics
    produces: tuple[str, ...] = ("out",)
    deterministic: bool = True

    def bind(self, inputs: Mapping[str, Any], out: Mapping[str, Any]) -> Launch:
        """See ``vbench.backend.Kernel.bind``.

        Raises:
            Unsupported: ``backend_refuses`` where torch says that the forced backend does not take these tensors.
        """
        q, k, v = inputs["q"], inputs["k"], inputs["v"]
        b, hq, sq, _ = q.shape
        sk = k.shape[2]
        on_cuda = q.device.type == "cuda"
        # The efficient backend has no grouped heads: its user expands K and V at each call, so that is timed.
        expand = self.groups > 1 and self.variant == "sdpa_efficient"
        grouped = self.groups > 1 and not expand
        mask: Any = None
        plain_mask: Tensor | None = None
        is_causal = self.causal == "top_left" or (self.causal == "bottom_right" and sq == sk)
        if self.causal == "bottom_right" and sq != sk:
            if on_cuda and self.variant in OWN_LOWER_RIGHT:
                mask = causal_lower_right(sq, sk)
            else:
                # cuDNN wants the mask in four dimensions.
                mask = plain_mask = lower_right_mask(sq, sk, q.device).expand(b, hq, sq, sk)
        if on_cuda:
            torch.set_float32_matmul_precision("highest")
            if self.variant in CAN_USE:
                keys, values = (expand_heads(k, self.groups), expand_heads(v, self.groups)) if expand else (k, v)
                params = SDPAParams(q, keys, values, plain_mask, 0.0, is_causal, grouped)
                if not CAN_USE[self.variant](params, False):
                    raise Unsupported(
                        "backend_refuses",
                        f"torch {torch.__version__} says {self.variant} does not take {q.dtype}, d={q.shape[3]}, "
                        f"sq={sq}, sk={sk}, causal={self.causal}, groups={self.groups} on this GPU",
                    )
        backend = BACKENDS[self.variant]

        def launch() -> Mapping[str, Tensor]:
            keys, values = (expand_heads(k, self.groups), expand_heads(v, self.groups)) if expand else (k, v)
            forced: AbstractContextManager[None] = sdpa_kernel(backend)
            with forced:
                result = torch.nn.functional.scaled_dot_product_attention(
                    q, keys, values, attn_mask=mask, is_causal=is_causal, enable_gqa=grouped
                )
            return {"out": result}

        return launch


def make(case: Case, variant: str, device: Device) -> Kernel:
    """Raises Unsupported: ``parameter_not_taken``; ``unknown_variant``; ``needs_cuda``; ``peer_documents_nan``
    (``causal_lower_right`` warns that rows with nothing to attend to come out NaN); ``peer_documents_nothing`` (cuDNN
    on such rows).

    Numerics: math upcasts half types to float32 (torch's default, ``allow_fp16_bf16_reduction_math_sdp`` off); the
    fused backends sum in float32 and round the weights to the input's dtype before P V.
    """
    refuse_beyond(case, PARAMETERS)
    if variant not in BACKENDS:
        raise Unsupported("unknown_variant", f"{variant!r} is not one of {', '.join(BACKENDS)}")
    if device == "cpu" and variant in ("sdpa_cudnn", "sdpa_efficient"):
        raise Unsupported("needs_cuda", f"{variant} exists on CUDA devices only; take sdpa_flash or sdpa_math")
    sq, sk, causal, dtype = case.axis("sq"), case.axis("sk"), case.text("causal"), case.text("dtype")
    if device == "cuda" and causal == "bottom_right" and sq > sk and variant in OWN_LOWER_RIGHT:
        raise Unsupported("peer_documents_nan", f"sq={sq} > sk={sk}: causal_lower_right documents NaN for masked rows")
    if device == "cuda" and causal == "bottom_right" and sq > sk and variant == "sdpa_cudnn":
        detail = f"sq={sq} > sk={sk}: no word on rows with nothing to attend to; they come out as some mean of V"
        raise Unsupported("peer_documents_nothing", detail)
    fused = variant != "sdpa_math"
    numerics = Numerics(
        accumulate="tensor_core" if fused and device == "cuda" else "fp32",
        probabilities=dtype if fused else "fp32",
    )
    return Sdpa(variant, causal, case.axis("hq") // case.axis("hk"), numerics)
