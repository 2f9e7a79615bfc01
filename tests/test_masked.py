"""``attention_masked_backward``: the oracle against autograd in float64, its one great law, and controls."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from vbench import check
from vbench.errors import Unsupported
from vbench.kernels.peers import sdpa_masked
from vbench.plan import BATTERY
from vbench.record import Outcome
from vbench.reference import masked
from vbench.reference.ops.masked import MASKED_BACKWARD, MASKS
from vbench.reference.ops.types import DTYPES
from vbench.spec import Case, Numerics
from vbench.worker import Worker

SIZES = {"b": 2, "h": 2, "sq": 17, "sk": 24, "d": 16}


def differentiated(inputs: dict[str, Any]) -> dict[str, torch.Tensor]:
    """By torch's autograd through SDPA's maths, in float64."""
    q, k, v = (inputs[name].double().requires_grad_() for name in ("q", "k", "v"))
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=inputs["mask"].double())
    found = torch.autograd.grad(out, (q, k, v), inputs["dout"].double())
    return dict(zip(("dq", "dk", "dv"), found, strict=True))


@pytest.mark.parametrize("mask", MASKS)
def test_the_oracle_is_autograds(mask: str) -> None:
    case = MASKED_BACKWARD.case(mask=mask, **SIZES)
    inputs = masked.masked_inputs(case, "cpu")
    expected = masked.masked_oracle(case, inputs, Numerics("fp32"), None)
    for name, want in differentiated(inputs).items():
        assert torch.allclose(expected[name].value, want, rtol=1e-10, atol=1e-12), name


def test_a_shift_changes_no_gradient_and_a_random_mask_does() -> None:
    case = MASKED_BACKWARD.case(mask="zeros", **SIZES)
    inputs = masked.masked_inputs(case, "cpu")
    plain = masked.masked_float64(inputs)
    shifted = masked.masked_float64({**inputs, "mask": inputs["mask"] - 100.0})
    assert all(torch.allclose(plain[n], shifted[n], rtol=1e-9, atol=1e-12) for n in plain)
    other = masked.masked_float64({**inputs, "mask": torch.randn(17, 24)})
    assert not any(torch.allclose(plain[n], other[n], rtol=0.1) for n in plain)


@pytest.fixture(scope="module")
def worker() -> Worker:
    return Worker(BATTERY, "vbench-kernels", "cpu")


@pytest.mark.parametrize("variant", ["sdpa_math", "sdpa_flash"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mask", MASKS)
def test_torchs_backends_pass_on_a_cpu(worker: Worker, mask: str, dtype: str, variant: str) -> None:
    case = MASKED_BACKWARD.case(mask=mask, dtype=dtype, **SIZES)
    result = worker._measure(MASKED_BACKWARD, case, sdpa_masked.make(case, variant, "cpu"), timed=False, role="peer")
    assert result.outcome is Outcome.PASSED, result.detail


def judged(case: Case, spoil: Any) -> check.Judgement:
    inputs = masked.masked_inputs(case, "cpu")
    expected = masked.masked_oracle(case, inputs, Numerics("tensor_core", probabilities="bf16"), None)
    outputs = {name: want.value.to(want.dtype) for name, want in expected.items()}
    spoil(inputs, outputs)
    return check.judge_outputs(outputs, expected, tuple(expected))


def test_faults_are_caught() -> None:
    """Of the kind that was met: NaN in dq alone; and a mask that is ignored, or not for one key."""

    def nothing(inputs: Any, outputs: Any) -> None:
        pass

    def nan_rows(inputs: Any, outputs: Any) -> None:
        outputs["dq"][:, :, 5] = torch.nan

    def ignored(inputs: Any, outputs: Any) -> None:
        found = masked.masked_float64({**inputs, "mask": torch.zeros_like(inputs["mask"])})
        outputs |= {name: t.bfloat16() for name, t in found.items()}

    case = MASKED_BACKWARD.case(mask="random", h=1, sq=24, sk=24, d=16)
    assert judged(case, nothing).outcome is Outcome.PASSED
    assert judged(case, nan_rows).outcome is Outcome.NONFINITE
    assert judged(case, ignored).outcome is Outcome.WRONG_VALUE


def test_what_takes_no_mask_refuses() -> None:
    case = MASKED_BACKWARD.case(**SIZES)
    for variant, rule in (("sdpa_cudnn", "needs_cuda"), ("sdpa_other", "unknown_variant")):
        with pytest.raises(Unsupported) as refused:
            sdpa_masked.make(case, variant, "cpu")
        assert refused.value.rule == rule
    with pytest.raises(Unsupported) as refused:
        sdpa_masked.make(case, "sdpa_flash", "cuda")
    assert refused.value.rule == "no_mask"
