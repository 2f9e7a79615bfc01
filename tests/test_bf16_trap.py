"""Triton's interpreter holds bfloat16 as its bits and computes with those: silently, in every version known to us.

Our kernels widen what they load and round by hand where they are interpreted. The guard is the ordinary check on bf16
cases; here it must trip for a kernel that does not, ours with that emulation taken out among them.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping
from typing import Any

import pytest
import torch
import triton
import triton.language as tl

from vbench import registry
from vbench.backend import Kernel, Launch
from vbench.kernels.triton import attention, attention_backward, codec, linear
from vbench.kernels.triton.attention_forward import _as_storage
from vbench.plan import BATTERY
from vbench.record import Outcome
from vbench.reference.ops.attention import ATTENTION, ATTENTION_BACKWARD
from vbench.reference.ops.fetch import TIER_FETCH
from vbench.reference.ops.fp4 import FP4_DEQUANTIZE, FP4_LINEAR, FP4_QUANTIZE
from vbench.spec import Case, Numerics, Op, resolve
from vbench.worker import Result, Worker

OPS: dict[str, Op] = {
    op.name: op for op in (ATTENTION, ATTENTION_BACKWARD, FP4_DEQUANTIZE, FP4_LINEAR, FP4_QUANTIZE, TIER_FETCH)
}


@pytest.fixture(scope="module")
def worker() -> Worker:
    return Worker(BATTERY, "vbench-kernels", "cpu")


def checked(worker: Worker, case: Case, kernel: Kernel) -> Result:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # numpy's, of overflow inside the garbage
        return worker._measure(OPS[case.op], case, kernel, timed=False, role="own")


@triton.jit
def _add_halves(x_ptr, y_ptr, count, WIDEN: tl.constexpr, BLOCK: tl.constexpr):
    """y[i] = x[i] + x[i + count]: in bf16 as loaded, or widened and stored as the bits of a rounded float32."""
    at = tl.arange(0, BLOCK)
    a = tl.load(x_ptr + at, mask=at < count)
    b = tl.load(x_ptr + count + at, mask=at < count)
    if WIDEN:
        bits = (a.to(tl.float32) + b.to(tl.float32)).to(tl.uint32, bitcast=True)
        tl.store(y_ptr + at, ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).to(tl.int16), mask=at < count)
    else:
        tl.store(y_ptr + at, a + b, mask=at < count)


@pytest.mark.parametrize("widened", [False, True])
def test_the_trap_is_there_and_widening_leads_around_it(widened: bool) -> None:
    """Where this fails because the first sum is right, the interpreter was repaired, and the emulation can go."""
    x = torch.randn(64, generator=torch.Generator().manual_seed(0)).bfloat16()
    y = torch.full((32,), torch.nan, dtype=torch.bfloat16)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _add_halves[(1,)](x, y.view(torch.int16) if widened else y, 32, WIDEN=widened, BLOCK=32)
    right = x[:32] + x[32:]
    assert torch.equal(y, right) == widened
    if not widened:
        # Not a rounding or two: nothing like the sum.
        assert not torch.allclose(y.float(), right.float(), rtol=0.1, equal_nan=False)


@triton.jit
def _cast(x_ptr, y_ptr, EMULATE: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(y_ptr + at, _as_storage(tl.load(x_ptr + at), tl.bfloat16, EMULATE))


@pytest.mark.parametrize("emulated", [False, True])
def test_the_interpreters_cast_to_bf16_truncates_and_mangles_subnormal_numbers(emulated: bool) -> None:
    x = torch.tensor([1.5 + 2.0**-8 + 2.0**-9, 1.42e-39, 4.45e-39, -6.57e-39, 1.1e-38, -3e-45, 0.0, -0.0])
    y = torch.zeros(8, dtype=torch.bfloat16)
    _cast[(1,)](x, y, EMULATE=emulated, BLOCK=8)
    assert torch.equal(y, x.bfloat16()) == emulated
    # Not a rounding: the first subnormal number comes out seven times as large.
    assert emulated or float(y[1]) > 4 * 1.42e-39


class Product:
    """An fp4_linear of up to 16 x 32 weights, decoded beforehand and multiplied in bf16 as loaded, or widened."""

    numerics = Numerics("tensor_core", ("bf16",))
    produces = ("y",)
    deterministic = True

    def __init__(self, case: Case, widen: bool) -> None:
        self.case, self.widen = case, widen

    def bind(self, inputs: Mapping[str, Any], out: Mapping[str, Any]) -> Launch:
        from vbench.reference.fp4 import dequantize

        w = dequantize(self.case.text("fmt"), dict(inputs), torch.bfloat16)
        m, n, k = (self.case.axis(name) for name in ("m", "n", "k"))
        stored = out["y"].view(torch.int16) if self.widen else out["y"]

        def launch() -> None:
            _product[(m,)](inputs["x"], w, stored, n, k, WIDEN=self.widen, N=16, K=32)

        return launch


@triton.jit
def _product(x_ptr, w_ptr, y_ptr, n, k, WIDEN: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    row, columns, rows = tl.program_id(0), tl.arange(0, K), tl.arange(0, N)
    x = tl.load(x_ptr + row * k + columns, mask=columns < k, other=0.0)
    w = tl.load(
        w_ptr + rows[:, None] * k + columns[None, :], mask=(rows[:, None] < n) & (columns[None, :] < k), other=0.0
    )
    if WIDEN:
        sums = tl.sum(x.to(tl.float32)[None, :] * w.to(tl.float32), axis=1)
        bits = sums.to(tl.uint32, bitcast=True)
        tl.store(y_ptr + row * n + rows, ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).to(tl.int16), mask=rows < n)
    else:
        tl.store(y_ptr + row * n + rows, tl.sum(x[None, :] * w, axis=1), mask=rows < n)


@pytest.mark.parametrize("widened", [False, True])
def test_the_check_catches_a_kernel_that_computes_in_bf16_as_loaded(worker: Worker, widened: bool) -> None:
    case = FP4_LINEAR.case(fmt="nvfp4", x="bf16", m=4, n=16, k=32)
    result = checked(worker, case, Product(case, widened))
    assert (result.outcome is Outcome.PASSED) == widened, result.detail
    assert widened or result.outcome in (Outcome.WRONG_VALUE, Outcome.NONFINITE)


ATTENTION_CASE = ATTENTION.case(dtype="bf16", hq=2, hk=1, sq=33, sk=40, d=16, causal="bottom_right")
BACKWARD_CASE = ATTENTION_BACKWARD.case(dtype="bf16", hq=2, hk=1, sq=33, sk=40, d=16, causal="bottom_right")
#: Kernels whose only bf16 arithmetic is the store, which truncates: exact operations, so that one such bit shows.
STORED = [FP4_DEQUANTIZE.case(fmt="nvfp4", y="bf16", n=5, k=64), TIER_FETCH.case(fmt="nvfp4", y="bf16", n=5, k=64)]


def ours(case: Case) -> Kernel:
    kernel: Kernel = resolve(registry.backends()["triton"].ops[case.op])(case, "", "cpu")
    return kernel


@pytest.mark.parametrize("case", STORED, ids=lambda c: c.op)
def test_a_truncating_store_is_caught(worker: Worker, monkeypatch: pytest.MonkeyPatch, case: Case) -> None:
    assert checked(worker, case, ours(case)).outcome is Outcome.PASSED
    monkeypatch.setattr(codec, "INTERPRETED", False)
    assert checked(worker, case, ours(case)).outcome is Outcome.WRONG_VALUE


def test_the_linear_layer_without_its_emulation_fails_aloud(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    case = FP4_LINEAR.case(fmt="nvfp4", x="bf16", m=3, n=9, k=64)
    assert checked(worker, case, ours(case)).outcome is Outcome.PASSED
    monkeypatch.setattr(linear, "INTERPRETED", False)
    with pytest.raises(triton.runtime.errors.InterpreterError):
        checked(worker, case, ours(case))


@pytest.mark.parametrize("case", [ATTENTION_CASE, BACKWARD_CASE], ids=lambda c: c.op)
def test_attention_without_its_emulation_is_caught(worker: Worker, case: Case) -> None:
    kernel: Any = ours(case)
    assert isinstance(kernel, attention.PlainForward | attention_backward.PlainBackward)
    assert checked(worker, case, kernel).outcome is Outcome.PASSED
    naive = dataclasses.replace(kernel, interpreted=False, copy_engine=False)
    assert checked(worker, case, naive).outcome in (Outcome.WRONG_VALUE, Outcome.NONFINITE)


def test_every_op_of_the_triton_backend_meets_the_guard() -> None:
    """Each op with a dtype has a fixed bf16 case in a suite; drawn cases could miss it."""
    fixed = [case for suite in registry.suites().values() for case in suite.checks]
    ops = registry.ops()
    guarded = 0
    for name in registry.backends()["triton"].ops:
        dtypes = [p.name for p in ops[name].params if "bf16" in p.choices]
        if not dtypes:
            continue
        guarded += 1
        cases = [
            c for c in fixed if c.op == name and any(c[p] == "bf16" for p in dtypes) and ops[name].reject(c) is None
        ]
        assert cases, name
    assert guarded >= len(OPS)
