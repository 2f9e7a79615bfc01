"""Peer ``torchao``: its ``Int8Tensor`` built from the op's integers, called through ``F.linear`` as its users do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vbench.backend import Availability, DeclaredBackend, Device, Kernel, Launch
from vbench.errors import Unsupported
from vbench.spec import TORCH_DTYPE_NAMES, Case, Numerics


def probe(device: Device) -> Availability:
    """See ``vbench.backend.Backend.probe``."""
    from vbench.kernels.peers.optional import probe_package

    return probe_package("torchao", device)


BACKEND = DeclaredBackend(
    name="torchao",
    role="peer",
    summary="torchao: Int8Tensor, weight-only and with dynamically rounded activations; NVFP4Tensor, weight-only",
    ops={
        "int8_linear": "vbench.kernels.peers.int8_torchao:make",
        "fp4_linear": "vbench.kernels.peers.fp4_torchao:make",
    },
    probe_function="vbench.kernels.peers.int8_torchao:probe",
)


@dataclass(slots=True)
class TorchaoLinear:
    """``F.linear(x, Int8Tensor, bias)``."""

    dtype: str
    round_x: bool
    numerics: Numerics
    produces: tuple[str, ...] = ("y",)
    deterministic: bool = True

    def bind(self, inputs: Mapping[str, Any], out: Mapping[str, Any]) -> Launch:
        """See ``vbench.backend.Kernel.bind``."""
        import torch
        from torchao.quantization import PerRow
        from torchao.quantization.quantize_.workflows import Int8Tensor, QuantizeTensorToInt8Kwargs

        x, codes, bias = inputs["x"], inputs["codes"], inputs.get("bias")
        weight = Int8Tensor(
            codes,
            inputs["scale"][:, None],
            [1, codes.shape[1]],
            getattr(torch, TORCH_DTYPE_NAMES[self.dtype]),
            act_quant_kwargs=QuantizeTensorToInt8Kwargs(granularity=PerRow()) if self.round_x else None,
        )

        def launch() -> Mapping[str, Any]:
            return {"y": torch.nn.functional.linear(x, weight, bias)}

        return launch


def make(case: Case, variant: str, device: Device) -> Kernel:
    """Factory for op ``int8_linear``.

    Raises:
        Unsupported: ``act_quant_not_of_peer``; ``int_mm_shape``.
    """
    x, quant = case.text("x"), case.text("act_quant")
    if quant == "row127":
        raise Unsupported("act_quant_not_of_peer", "torchao rounds activations to absmax/127.5: act_quant=row127h")
    n, k = case.axis("n"), case.axis("k")
    if quant != "none" and device == "cuda" and (n % 8 or k % 8):
        raise Unsupported("int_mm_shape", f"n={n}, k={k}: torch._int_mm takes multiples of 8 on CUDA; pad them")
    if quant == "none":
        # The product with the bare integers is stored in x's dtype, its scale rounded to it, their product and the bias
        # stored again.
        roundings = (x, x) if x != "fp32" and device == "cuda" else (x,)  # the scale; split-K partial sums
        accumulate = "tensor_core" if device == "cuda" and x != "fp32" else "fp32"
        return TorchaoLinear(x, False, Numerics(accumulate, roundings, stores=(x, x)))
    return TorchaoLinear(x, True, Numerics("int32", stores=(x, x)))
