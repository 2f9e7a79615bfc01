"""The torch operator over the Triton attention: gradients within budget, torch.compile, refusals."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace

import pytest

from vbench import check
from vbench.reference.attention_backward import backward_inputs, backward_oracle
from vbench.reference.ops.attention import ATTENTION_BACKWARD
from vbench.spec import Case, Numerics

GRADIENTS = ("dq", "dk", "dv")


def gradients_over_budget(case_id: str, fault: str = "") -> float:
    """Gradients of <out, dout> + <lse, dlse> through the operator, over the oracle's budget."""
    import torch

    from vbench.kernels.triton.attention_autograd import attention

    case = ATTENTION_BACKWARD.parse(case_id)
    inputs = backward_inputs(case, "cpu")
    leaves = [inputs[name].clone().requires_grad_() for name in "qkv"]
    rule = {"causal": case.text("causal"), "window": case.axis("window"), "softcap": case.axis("softcap")}
    out, lse = attention(*leaves, **rule)  # type: ignore[arg-type]
    loss = (out * inputs["dout"]).sum(dtype=torch.float32)
    if "dlse" in inputs and fault != "lse detached":
        loss = loss + (lse * inputs["dlse"]).sum()
    found = dict(zip(GRADIENTS, torch.autograd.grad(loss, leaves), strict=True))
    dtype = case.text("dtype")
    numerics = Numerics("fp32" if dtype == "fp32" else "tensor_core", (), dtype, own_forward=True)
    error = check.judge_outputs(found, backward_oracle(case, inputs, numerics, None), GRADIENTS).error
    assert error is not None
    return error.worst_over_budget


def operator_is_sound(name: str) -> bool:
    import torch

    from vbench.errors import Unsupported
    from vbench.kernels.triton import attention_autograd
    from vbench.kernels.triton.attention_autograd import attention

    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, h, s, 8, generator=generator, requires_grad=True) for h, s in ((2, 9), (1, 12), (1, 12)))

    def loss(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out, lse = attention(q, k, v, causal="bottom_right", window=7)
        # A sum's gradient is one element expanded to the whole shape: stride 0.
        return out.sum() + lse.square().sum()

    if name == "opcheck":
        results = torch.library.opcheck(attention_autograd.attention_op, (q, k, v, "bottom_right", 7, 0, ""))
        return set(results.values()) == {"SUCCESS"}
    if name == "compiled":
        compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
        eager = torch.autograd.grad(loss(q, k, v), (q, k, v))
        traced = torch.autograd.grad(compiled(q, k, v), (q, k, v))
        return all(torch.equal(a, b) for a, b in zip(eager, traced, strict=True)) and bool(eager[0].any())
    if name == "lse alone":
        _, lse = attention(q, k, v)
        (found,) = torch.autograd.grad(lse.sum(), (v,), allow_unused=True)
        return found is not None and not bool(found.any())
    calls: tuple[Callable[[], object], ...] = (
        lambda: attention(q, k, v, causal="left"),
        lambda: attention(q.double(), k.double(), v.double()),
        lambda: attention(q[0], k, v),
        lambda: attention(q, k, v[:, :, :5]),
        lambda: attention(q, k, v, window=7, variant="gluon"),
    )
    rules = []
    for call in calls:
        with pytest.raises(Unsupported) as caught:
            call()
        rules.append(caught.value.rule)
    return rules == ["mask", "dtype", "wrong_shape", "wrong_shape", "parameter_not_taken"]


CASE = ATTENTION_BACKWARD.case(dtype="fp16", causal="bottom_right", dlse=1, hq=2, hk=1, sq=20, sk=33, d=16)


@pytest.mark.parametrize(
    "case",
    [
        CASE,
        replace(CASE, seed=1),
        ATTENTION_BACKWARD.case(dtype="bf16", causal="bottom_right", window=9, hq=2, hk=2, sq=33, sk=17, d=8),
        ATTENTION_BACKWARD.case(dtype="fp32", softcap=3, dlse=1, layout="bshd", hq=2, hk=1, sq=9, sk=20, d=12),
    ],
    ids=lambda case: case.hash,
)
def test_gradients_are_within_budget(interpreter: ProcessPoolExecutor, case: Case) -> None:
    assert interpreter.submit(gradients_over_budget, case.id).result(timeout=120) <= 1


def test_control_is_caught(interpreter: ProcessPoolExecutor) -> None:
    assert interpreter.submit(gradients_over_budget, CASE.id, "lse detached").result(timeout=120) > 1


@pytest.mark.parametrize("name", ["opcheck", "compiled", "lse alone", "refusals"])
def test_operator(interpreter: ProcessPoolExecutor, name: str) -> None:
    assert interpreter.submit(operator_is_sound, name).result(timeout=240)
