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
from vbench.reference.attention import visible
from vbench.reference.block import block_float64
from vbench.reference.fetch import fetched
from vbench.reference.fp4 import decode_float64, dequantize, quantize
from vbench.reference.linear import activate
from vbench.reference.sampling import torch_dtype
from vbench.reference.tiers import replay
from vbench.spec import Case, Numerics

FLOAT64 = Numerics(accumulate="fp64", probabilities="fp64")

#: Scores of one slice of query rows, in elements: 128 MiB of float64 bounds what long sequences allocate at once.
SCORE_ELEMENTS = 1 << 24


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


def attention_float64(causal: str, q_BHSD: Tensor, k_BHSD: Tensor, v_BHSD: Tensor) -> tuple[Tensor, Tensor]:
    """out [b, hq, sq, d] and lse [b, hq, sq] in float64; a row with nothing to attend to gives 0 and -inf.

    Query rows go in slices, one head at a time, so that scores of a long sequence fit memory.
    """
    b, hq, sq, d = q_BHSD.shape
    hk, sk = k_BHSD.shape[1:3]
    out = torch.zeros(b, hq, sq, d, dtype=torch.float64, device=q_BHSD.device)
    lse = torch.full((b, hq, sq), -torch.inf, dtype=torch.float64, device=q_BHSD.device)
    step = max(1, SCORE_ELEMENTS // sk)
    for i in range(b):
        for h in range(hq):
            k, v = (t[i, h // (hq // hk)].double() for t in (k_BHSD, v_BHSD))
            for first in range(0, sq, step):
                rows = torch.arange(first, min(first + step, sq), device=q_BHSD.device)
                z = (q_BHSD[i, h, rows].double() @ k.T) * d**-0.5
                z = z.masked_fill(~visible(causal, rows, sq, sk), -torch.inf)
                lse[i, h, rows] = torch.logsumexp(z, dim=1)
                weights = torch.softmax(z, dim=1)
                # softmax over nothing is 0/0; the op defines that row as 0.
                out[i, h, rows] = torch.where(z.amax(dim=1, keepdim=True) > -torch.inf, weights, 0.0) @ v
    return out, lse


def make_attention(case: Case, variant: str, device: Device) -> Kernel:
    """q, k, v (BHSD) -> out in their dtype and lse float32, one rounding each."""
    _only_default(variant)
    causal = case.text("causal")

    def compute(inputs: Mapping[str, Any]) -> Mapping[str, Tensor]:
        out, lse = attention_float64(causal, inputs["q"], inputs["k"], inputs["v"])
        return {"out": out, "lse": lse}

    return OracleKernel(compute, ("out", "lse"))


def make_tier_stack(case: Case, variant: str, device: Device) -> Kernel:
    """Replay of the trace on dictionaries; capacities are obeyed, nothing moves between real devices."""
    _only_default(variant)
    return OracleKernel(lambda inputs: replay(dict(inputs)), ("values", "found_level", "level_bytes", "hits"))


def make_tier_fetch(case: Case, variant: str, device: Device) -> Kernel:
    """A packed or raw weight in host memory -> weight [n, k] in dtype y on the device."""
    _only_default(variant)
    return OracleKernel(lambda inputs: {"weight": fetched(case, dict(inputs))}, ("weight",))


def make_decoder_block(case: Case, variant: str, device: Device) -> Kernel:
    """The block's tensors -> y [b s, hidden] in dtype x, one rounding at the end."""
    _only_default(variant)
    return OracleKernel(lambda inputs: {"y": block_float64(case, dict(inputs))}, ("y",))
