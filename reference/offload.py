"""Meaning of ``offload_pass``: layer by layer, in plain torch, on the device where the pass is to run.

Bitwise: where weights lie and when they travel must change nothing, so the oracle multiplies as the layers do
(``F.linear`` in bfloat16 on the same device) and only its bookkeeping is independent: one layer's weight exists at a
time, made anew from its seed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from vbench.reference.fp4 import dequantize, quantize
from vbench.reference.ops.offload import RAW, weight_bytes
from vbench.reference.sampling import seeded
from vbench.spec import Case, Expected, Numerics

GRADIENTS = ("dx", "dw_first", "dw_middle", "dw_last")

#: Figures that a kernel may give beside the outputs, as ``traffic`` (a dictionary of integers), of its first launch:
#: bytes for weights between launches; peak of the allocator, weights and activations, over what it held before weights
#: came (cuda); weight bytes copied to the device and gradient bytes back; how many acquisitions found their weight
#: resident, there in time, on its way, or not asked for yet.
TRAFFIC = ("held_bytes", "peak_bytes", "to_device_bytes", "to_host_bytes", "resident", "timely", "late", "miss")


@dataclass(frozen=True, slots=True)
class Weights:
    """The layers' weights by seed, not a container of them: several GB are made where and when a kernel wants them.

    They depend on layers, width and seed alone, not on the codec, so that cases of one stack and different tokens share
    them. Kernels call ``make`` in ``bind`` only. The oracle never reads what a kernel keeps, so a kernel that spoils
    its copies is caught by its second launch.
    """

    layers: int
    width: int
    seed: int
    device: str
    codec: str = RAW

    def make(self, layer: int) -> Tensor:
        """[width, width] bf16 on ``device``, normal with variance 2 / width: relu keeps the scale of its input."""
        gen = torch.Generator(self.device).manual_seed(
            seeded("offload_pass", self.layers, self.width, self.seed, layer).initial_seed()
        )
        weight = torch.randn(self.width, self.width, generator=gen, device=self.device, dtype=torch.bfloat16)
        return weight.mul_((2 / self.width) ** 0.5)

    def decoded(self, layer: int) -> Tensor:
        """The weight the layer multiplies with: ``make``'s, or what is left of it after the codec."""
        weight = self.make(layer)
        return weight if self.codec == RAW else dequantize(self.codec, quantize(self.codec, weight), weight.dtype)


def offload_inputs(case: Case, device: str) -> dict[str, Any]:
    """``x`` [tokens, width] bf16 and ``weights``; in mode train also ``dy`` like x. Normal values, on the device."""
    shape = (case.axis("tokens"), case.axis("width"))

    def normal(stream: str) -> Tensor:
        gen = torch.Generator(device).manual_seed(seeded(case.id, stream).initial_seed())
        return torch.randn(shape, generator=gen, device=device, dtype=torch.bfloat16)

    inputs: dict[str, Any] = {
        "x": normal("x"),
        "weights": Weights(case.axis("layers"), case.axis("width"), case.seed, device, case.text("codec")),
    }
    if case.text("mode") == "train":
        inputs["dy"] = normal("dy")
    return inputs


def layer(x: Tensor, weight: Tensor, *, last: bool) -> Tensor:
    """One layer [tokens, width]."""
    y = F.linear(x, weight)
    return y if last else torch.relu(y)


def offload_pass(case: Case, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    """All outputs. Backward goes layer by layer too, from the saved input of each."""
    weights: Weights = inputs["weights"]
    train = case.text("mode") == "train"
    last = weights.layers - 1
    at: list[Tensor] = [inputs["x"]]
    for i in range(weights.layers):
        out = layer(at[-1], weights.decoded(i), last=i == last)
        if not train:
            at.clear()
        at.append(out)
    empty = torch.empty(0, 0, dtype=torch.bfloat16, device=inputs["x"].device)
    outputs = {"y": at[-1], **dict.fromkeys(GRADIENTS, empty)}
    if not train:
        return outputs
    sampled = {"dw_first": 0, "dw_middle": weights.layers // 2, "dw_last": last}
    gradient = inputs["dy"]
    for i in reversed(range(weights.layers)):
        with torch.enable_grad():
            x, weight = at[i].detach().requires_grad_(), weights.decoded(i).requires_grad_()
            y = layer(x, weight, last=i == last)
        gradient, weight_gradient = torch.autograd.grad(y, (x, weight), gradient)
        outputs |= {name: weight_gradient for name, index in sampled.items() if index == i}
    return {**outputs, "dx": gradient}


def offload_oracle(case: Case, inputs: dict[str, Any], numerics: Numerics, max_rows: int | None) -> dict[str, Expected]:
    """Bitwise, all rows: to sample rows would save nothing here."""
    return {name: Expected(t, None, t.dtype, tuple(t.shape)) for name, t in offload_pass(case, inputs).items()}


def offload_metrics(
    case: Case, inputs: dict[str, Any], outputs: dict[str, Any], expected: dict[str, Expected]
) -> dict[str, float]:
    """What a kernel tells of its traffic, and ``held_over_budget``: bytes of weights held / gpu_bytes."""
    metrics = {"weight_bytes": float(weight_bytes(case))}
    if "traffic" in outputs:
        told = outputs["traffic"]
        metrics |= {name: float(told[name]) for name in TRAFFIC if name in told}
        metrics["held_over_budget"] = told["held_bytes"] / case.axis("gpu_bytes")
    return metrics
