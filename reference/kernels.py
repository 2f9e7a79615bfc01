"""The oracle's arithmetic as kernels of backend ``torch``: float64 throughout, each output rounded once.

Every factory is a ``vbench.backend.KernelFactory``; its kernels write into the ``out`` tensors they are given.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vbench.backend import Device, Kernel, Launch
from vbench.errors import Unsupported
from vbench.reference.attention import ScoreRule, attention_float64
from vbench.reference.attention_backward import backward_float64
from vbench.reference.block import block_float64
from vbench.reference.fetch import fetched
from vbench.reference.fp4 import decode_float64, dequantize, quantize
from vbench.reference.insight import chain_float64
from vbench.reference.int8 import int8_float64
from vbench.reference.linear import activate
from vbench.reference.offload import GRADIENTS, offload_pass
from vbench.reference.sampling import torch_dtype
from vbench.reference.tiers import replay
from vbench.spec import Case, Numerics

FLOAT64 = Numerics(accumulate="fp64", probabilities="fp64")


@dataclass(slots=True)
class OracleKernel:
    """A function of the inputs whose results are copied into ``out``.

    Args:
        compute: inputs -> outputs by name, of the right dtype or wider.
        produces: names of the outputs.
        check: raises Unsupported for an input that has no meaning, before any launch.
    """

    compute: Callable[[Mapping[str, Any]], Mapping[str, Tensor]]
    produces: tuple[str, ...]
    check: Callable[[Mapping[str, Any]], None] = lambda inputs: None
    numerics: Numerics = FLOAT64
    deterministic: bool = True
    graph_safe: bool = False

    def bind(self, inputs: Mapping[str, Any], out: Mapping[str, Any]) -> Launch:
        """See ``vbench.backend.Kernel.bind``; nothing is prepared, all work is in the launch."""
        self.check(inputs)

        def launch() -> None:
            for name, value in self.compute(inputs).items():
                out[name].copy_(value)

        return launch


def _only_default(variant: str) -> None:
    if variant:
        raise Unsupported("unknown_variant", f"backend torch has a single variant, not {variant!r}")


def _finite_weight(inputs: Mapping[str, Any]) -> None:
    if not bool(torch.isfinite(inputs["w"]).all()):
        raise Unsupported("nonfinite_weight", "the weight holds NaN or Inf and FP4 has no code for them; clean it")


def make_quantize(case: Case, variant: str, device: Device) -> Kernel:
    """w [n, k] -> codes u8 [n, k/2], scale, global_scale. Raises Unsupported in ``bind`` for a non-finite weight."""
    _only_default(variant)
    fmt = case.text("fmt")
    return OracleKernel(
        lambda inputs: quantize(fmt, inputs["w"]), ("codes", "scale", "global_scale"), check=_finite_weight
    )


def make_dequantize(case: Case, variant: str, device: Device) -> Kernel:
    """codes, scale, global_scale -> weight [n, k] in dtype y (float32 products by definition of the op)."""
    _only_default(variant)
    fmt, dtype = case.text("fmt"), torch_dtype(case.text("y"))
    return OracleKernel(lambda inputs: {"weight": dequantize(fmt, dict(inputs), dtype)}, ("weight",))


def linear_float64(fmt: str, act: str, inputs: Mapping[str, Any]) -> Tensor:
    """y [m, n] in float64 = act(x @ decode(weight)^T + bias)."""
    y = inputs["x"].double() @ decode_float64(fmt, dict(inputs)).T
    if "bias" in inputs:
        y = y + inputs["bias"].double()
    return activate(act, y)


def make_linear(case: Case, variant: str, device: Device) -> Kernel:
    """x [m, k] and a packed weight [n, k] -> y [m, n] in x's dtype, one rounding."""
    _only_default(variant)
    fmt, act = case.text("fmt"), case.text("act")
    return OracleKernel(lambda inputs: {"y": linear_float64(fmt, act, inputs)}, ("y",))


def make_attention(case: Case, variant: str, device: Device) -> Kernel:
    """q, k, v (BHSD) -> out in their dtype and lse float32, one rounding each."""
    _only_default(variant)
    rule = ScoreRule.of(case)

    def compute(inputs: Mapping[str, Any]) -> Mapping[str, Tensor]:
        out, lse = attention_float64(rule, inputs["q"], inputs["k"], inputs["v"])
        return {"out": out, "lse": lse}

    return OracleKernel(compute, ("out", "lse"))


def make_attention_backward(case: Case, variant: str, device: Device) -> Kernel:
    """q, k, v, out, lse, dout (and dlse) -> dq, dk, dv in their dtype, one rounding each."""
    _only_default(variant)
    rule = ScoreRule.of(case)
    return OracleKernel(lambda inputs: backward_float64(rule, inputs), ("dq", "dk", "dv"))


def make_tier_stack(case: Case, variant: str, device: Device) -> Kernel:
    """Replay of the trace on dictionaries; capacities are obeyed, nothing moves between real devices."""
    _only_default(variant)
    return OracleKernel(lambda inputs: replay(dict(inputs)), ("values", "found_level", "level_bytes", "hits"))


def make_tier_fetch(case: Case, variant: str, device: Device) -> Kernel:
    """A packed or raw weight in host memory -> weight [n, k] in dtype y on the device."""
    _only_default(variant)
    return OracleKernel(lambda inputs: {"weight": fetched(case, dict(inputs))}, ("weight",))


def make_offload_pass(case: Case, variant: str, device: Device) -> Kernel:
    """x and the weights' seeds -> y and gradients; one layer's weight in memory at a time."""
    _only_default(variant)
    return OracleKernel(lambda inputs: offload_pass(case, inputs), ("y", *GRADIENTS))


def make_decoder_block(case: Case, variant: str, device: Device) -> Kernel:
    """The block's tensors -> y [b s, hidden] in dtype x, one rounding at the end."""
    _only_default(variant)
    return OracleKernel(lambda inputs: {"y": block_float64(case, dict(inputs))}, ("y",))


def make_int8_linear(case: Case, variant: str, device: Device) -> Kernel:
    """x [m, k] and an int8 weight [n, k] -> y [m, n] in x's dtype, one rounding."""
    _only_default(variant)
    return OracleKernel(lambda inputs: {"y": int8_float64(case, dict(inputs))}, ("y",))


def make_svd(case: Case, variant: str, device: Device) -> Kernel:
    """a [m, n] -> its singular values, by LAPACK in float64 on the host."""
    _only_default(variant)
    return OracleKernel(lambda inputs: {"values": torch.linalg.svdvals(inputs["a"].cpu().double())}, ("values",))


def make_chain(case: Case, variant: str, device: Device) -> Kernel:
    """x [n] -> y [n] after the case's steps."""
    _only_default(variant)
    steps = case.axis("steps")
    return OracleKernel(lambda inputs: {"y": chain_float64(inputs["x"], steps)[0]}, ("y",))
