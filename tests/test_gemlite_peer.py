"""Peer ``gemlite``: what is asked of its interface, against the oracle through a stand-in; it has no CPU kernels.

The stand-in has the names and the parameters of gemlite 0.6.0 (helper.py, core.py) and reads weights as they say:
packed bytes low nibble first, E8M0 scales by value, unpacked integers less an integer zero.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from vbench.backend import Device
from vbench.errors import Unsupported
from vbench.kernels.peers import fp4_gemlite, gemlite
from vbench.plan import BATTERY
from vbench.record import Outcome
from vbench.reference.ops.fp4 import FORMATS, FP4_LINEAR
from vbench.spec import Case
from vbench.worker import Worker

E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], dtype=torch.float64)


class Layer:
    """``y = x w^T + bias`` as its split kernels add up: four parts along k, each rounded to x's dtype."""

    def __init__(self, weight_NK: Tensor, bias: Tensor | None, parts: int = 4) -> None:
        self.weight_NK, self.bias, self.parts = weight_NK, bias, parts

    def forward(self, x: Tensor) -> Tensor:
        y = torch.zeros(x.shape[0], self.weight_NK.shape[0], dtype=x.dtype)
        for part, weight in zip(
            x.float().chunk(self.parts, 1), self.weight_NK.float().chunk(self.parts, 1), strict=True
        ):
            y = y + (part @ weight.T).to(x.dtype)
        return y if self.bias is None else y + self.bias


class A16W4_MXFP:
    def __init__(self, device: Any = "cuda:0", dtype: torch.dtype | None = None) -> None:
        self.dtype = dtype

    def from_packed_weights(self, W_q_packed: Tensor, scales: Tensor, bias: Tensor | None = None) -> Layer:
        assert W_q_packed.dtype == torch.uint8 and self.dtype is not None
        n, half = W_q_packed.shape
        values = E2M1[torch.stack((W_q_packed & 0xF, W_q_packed >> 4), -1).reshape(n, 2 * half).long()]
        exponents = scales.view(n, -1).to(torch.float8_e8m0fnu).view(torch.uint8).double() - 127
        return Layer((values * torch.exp2(exponents).repeat_interleave(32, 1)).to(self.dtype), bias)


class GemLiteLinearTriton:
    def __init__(
        self, W_nbits: int, group_size: int, in_features: int, out_features: int, input_dtype: str,
        output_dtype: str, acc_dtype: Any = None, scaled_activations: bool = False,
    ) -> None:  # fmt: skip
        assert W_nbits == 4 and input_dtype == output_dtype and not scaled_activations
        self.group_size, self.shape = group_size, (out_features, in_features)

    def pack(self, W_q: Tensor, scales: Tensor, zeros: int, bias: Tensor | None = None) -> None:
        assert type(zeros) is int and W_q.dtype == torch.uint8 and W_q.shape == self.shape
        wide = scales.view(self.shape[0], -1).repeat_interleave(self.group_size, 1)
        self.layer = Layer((W_q.to(scales.dtype) - zeros) * wide, bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer.forward(x)


@pytest.fixture(autouse=True)
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    package, helper, core = ModuleType("gemlite"), ModuleType("gemlite.helper"), ModuleType("gemlite.core")
    vars(helper)["A16W4_MXFP"] = A16W4_MXFP
    vars(core).update(
        GemLiteLinearTriton=GemLiteLinearTriton, TORCH_TO_DTYPE={torch.float16: "FP16", torch.bfloat16: "BF16"}
    )
    for module in (package, helper, core):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    yield


def cases() -> list[Case]:
    return [
        FP4_LINEAR.case(fmt=fmt, x=x, act=act, bias=bias, dist=dist, m=m, n=1024, k=1024)
        for fmt, x, act, bias, dist, m in (
            ("mxfp4", "bf16", "none", 0, "normal", 1),
            ("mxfp4", "fp16", "gelu", 1, "student5", 3),
            ("absmax7_g128", "bf16", "silu", 1, "outlier", 2),
            ("absmax7_g128", "fp16", "none", 0, "normal", 5),
        )
    ]


@pytest.fixture(scope="module")
def worker() -> Worker:
    return Worker(BATTERY, "vbench-kernels", "cpu")


@pytest.mark.parametrize("case", cases(), ids=lambda c: c.id)
def test_what_is_asked_is_the_op_within_the_declared_budget(worker: Worker, case: Case) -> None:
    result = worker._measure(FP4_LINEAR, case, fp4_gemlite.make(case, "", "cuda"), timed=False, role="peer")
    assert result.outcome is Outcome.PASSED, (result.detail, result.error)


@pytest.mark.parametrize("case", cases()[::2], ids=lambda c: c.id)
def test_wrong_scales_are_seen(worker: Worker, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Control: a quarter of a step of the scale, which no rounding excuses."""
    monkeypatch.setattr(Layer, "forward", lambda self, x: 1.25 * (x.float() @ self.weight_NK.float().T).to(x.dtype))
    result = worker._measure(FP4_LINEAR, case, fp4_gemlite.make(case, "", "cuda"), timed=False, role="peer")
    assert result.outcome is Outcome.WRONG_VALUE


@pytest.mark.parametrize(
    ("rule", "values"),
    [
        *(("format_not_of_peer", {"fmt": fmt}) for fmt in FORMATS if fmt not in fp4_gemlite.GROUPS),
        ("needs_half", {"x": "fp32"}),
        ("gemlite_shape", {"n": 1000}),
        ("gemlite_shape", {"k": 1152}),
        ("too_small_to_tune", {"n": 128, "k": 256}),
    ],
)
def test_what_it_does_not_take_is_refused(rule: str, values: dict[str, Any]) -> None:
    asked: dict[str, Any] = {"fmt": "mxfp4", "x": "bf16", "m": 1, "n": 1024, "k": 1024, **values}
    with pytest.raises(Unsupported, match=rule):
        fp4_gemlite.make(FP4_LINEAR.case(**asked), "", "cuda")


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_probe_says_what_is_missing(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gemlite", None)
    found = gemlite.probe(device)
    assert not found.usable and ("--device cuda" if device == "cpu" else "vbench-kernels[gemlite]") in found.reason
