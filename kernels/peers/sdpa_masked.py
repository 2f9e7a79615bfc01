"""Peers of ``attention_masked_backward``: ``scaled_dot_product_attention`` with a mask, differentiated by torch.

The forward runs in ``bind`` on the forced backend; the launch is autograd's, so that it is what a user trains with.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.backends.cuda import SDPAParams
from torch.nn.attention import sdpa_kernel

from vbench.backend import Device, Kernel, Launch
from vbench.errors import Unsupported
from vbench.kernels.peers.sdpa import BACKENDS, CAN_USE
from vbench.spec import Case, Numerics


@dataclass(slots=True)
class MaskedBackward:
    """``attention_masked_backward`` by one SDPA backend."""

    variant: str
    device: Device
    numerics: Numerics
    produces: tuple[str, ...] = ("dq", "dk", "dv")
    # Fused backends sum dq by atomic additions.
    deterministic: bool = False
    # The engine launches on the stream the forward ran on, which is not the one being captured.
    graph_safe: bool = False

    def bind(self, inputs: Mapping[str, Any], out: Mapping[str, Any]) -> Launch:
        """Run the forward, and bind the gradients of its output. See ``vbench.backend.Kernel.bind``.

        Raises:
            Unsupported: ``backend_refuses`` where torch says that the forced backend does not take these tensors.
        """
        leaves = [inputs[name].detach().requires_grad_() for name in ("q", "k", "v")]
        q, k, v = leaves
        mask: Tensor = inputs["mask"][None, None].expand(q.shape[0], q.shape[1], -1, -1)
        if self.device == "cuda":
            torch.set_float32_matmul_precision("highest")
            params = SDPAParams(q, k, v, mask, 0.0, False, False)
            if self.variant != "sdpa_math" and not CAN_USE[self.variant](params, False):
                raise Unsupported(
                    "backend_refuses",
                    f"torch {torch.__version__} says {self.variant} does not take {q.dtype}, d={q.shape[3]}, "
                    f"sq={q.shape[2]}, sk={k.shape[2]} with a mask on this GPU",
                )
        with sdpa_kernel(BACKENDS[self.variant]):
            result = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        dout = inputs["dout"]

        def launch() -> Mapping[str, Tensor]:
            found = torch.autograd.grad(result, leaves, dout, retain_graph=True)
            return dict(zip(self.produces, found, strict=True))

        return launch


def make(case: Case, variant: str, device: Device) -> Kernel:
    """Raises Unsupported: ``unknown_variant``; ``needs_cuda``; ``no_mask`` (flash on CUDA takes none);
    ``head_dim_not_multiple_of_8``.
    """
    if variant not in BACKENDS:
        raise Unsupported("unknown_variant", f"{variant!r} is not one of {', '.join(BACKENDS)}")
    if device == "cpu" and variant in ("sdpa_cudnn", "sdpa_efficient"):
        raise Unsupported("needs_cuda", f"{variant} exists on CUDA devices only; take sdpa_flash or sdpa_math")
    if device == "cuda" and variant == "sdpa_flash":
        raise Unsupported("no_mask", "flash attention on CUDA takes no mask; take sdpa_cudnn or sdpa_efficient")
    if device == "cuda" and variant != "sdpa_math" and case.axis("d") % 8:
        raise Unsupported("head_dim_not_multiple_of_8", f"d={case.axis('d')}: pad the heads to a multiple of 8")
    if variant == "sdpa_math":
        return MaskedBackward(variant, device, Numerics("fp32", own_forward=True))
    accumulate = "tensor_core" if device == "cuda" else "fp32"
    return MaskedBackward(variant, device, Numerics(accumulate, probabilities=case.text("dtype"), own_forward=True))
