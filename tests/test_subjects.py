"""The oracle's own backend, the document's code as written, and the peers, each against the budgets of the oracle."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from vbench.backend import DeclaredBackend, Device, Kernel
from vbench.errors import Unsupported
from vbench.kernels.as_written import attention as written_attention
from vbench.kernels.as_written.backend import BACKEND as AS_WRITTEN
from vbench.kernels.peers import dense_linear, sdpa
from vbench.kernels.peers.torch_native import BACKEND as TORCH_NATIVE
from vbench.reference.backend import BACKEND as TORCH
from vbench.reference.ops import OPS
from vbench.reference.ops.attention import ATTENTION, ATTENTION_BACKWARD
from vbench.reference.ops.fp4 import FORMATS, FP4_DEQUANTIZE, FP4_LINEAR, FP4_QUANTIZE
from vbench.spec import Case, Expected, Numerics, Op, resolve
from vbench.suites import strategies
from vbench.suites.attention import SUITE as ATTENTION_SUITE
from vbench.suites.fp4 import SUITE as FP4_SUITE

OPS_BY_NAME = {op.name: op for op in OPS}
FLOAT64 = Numerics(accumulate="fp64", probabilities="fp64")

STRATEGIES = {
    "fp4_quantize": strategies.fp4_quantize_cases(),
    "fp4_dequantize": strategies.fp4_dequantize_cases(),
    "fp4_linear": strategies.fp4_linear_cases(),
    "attention": strategies.attention_cases(),
    "attention_backward": strategies.attention_backward_cases(),
    "tier_stack": strategies.tier_cases(),
}


def meaningful(case: Case) -> bool:
    return OPS_BY_NAME[case.op].reject(case) is None


def make(backend: DeclaredBackend, case: Case, variant: str = "", device: Device = "cpu") -> Kernel:
    kernel: Kernel = resolve(backend.ops[case.op])(case, variant, device)
    return kernel


def poisoned(want: Mapping[str, Expected]) -> dict[str, Tensor]:
    out: dict[str, Tensor] = {}
    for name, expected in want.items():
        poison = torch.full(expected.shape, 113.0 if expected.dtype.is_floating_point else 113)
        out[name] = poison.to(expected.dtype)
    return out


def oracle_of(case: Case, inputs: dict[str, Any], numerics: Numerics) -> dict[str, Expected]:
    found: dict[str, Expected] = resolve(OPS_BY_NAME[case.op].oracle)(case, inputs, numerics, None)
    return found


def run(kernel: Kernel, case: Case) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Inputs and the outputs the kernel produced; asserts that it left the inputs alone and gave what it declares."""
    op: Op = OPS_BY_NAME[case.op]
    inputs: dict[str, Any] = resolve(op.inputs)(case, "cpu")
    before = {name: t.clone() for name, t in inputs.items() if isinstance(t, Tensor)}
    out = poisoned(oracle_of(case, inputs, kernel.numerics))
    returned = kernel.bind(inputs, out)()
    got = dict(out if returned is None else returned)
    for name, t in before.items():
        assert same_bits(inputs[name], t), f"{name} was changed"
    assert set(kernel.produces) <= set(got)
    return inputs, {name: got[name] for name in kernel.produces}


def same_bits(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8)) if a.dim() else a.equal(b)


def worst_over_budget(want: Expected, got: Tensor) -> float:
    """Largest |error| / budget; ``inf`` for a wrong shape or dtype, for NaN where none is due, and for any difference
    without budget."""
    if tuple(got.shape) != want.shape or got.dtype != want.dtype:
        return float("inf")
    if want.budget is None:
        # A signed zero apart counts for packed bytes only.
        if not got.dtype.is_floating_point:
            return 0.0 if got.equal(want.value) else float("inf")
        mine, right = got.double(), want.value.double()
        return 0.0 if bool(((mine == right) | (mine.isnan() & right.isnan())).all()) else float("inf")
    error = (got.double() - want.value).abs()
    error = torch.where(got.double() == want.value, 0.0, error)  # -inf equals -inf
    ratio = torch.where(error == 0, 0.0, error / want.budget)
    return float("inf") if bool(ratio.isnan().any()) else float(ratio.amax()) if ratio.numel() else 0.0


def judge(kernel: Kernel, case: Case, numerics: Numerics | None = None) -> dict[str, float]:
    """Output -> worst error over budget, by the kernel's declared numerics or by others."""
    inputs, got = run(kernel, case)
    want = oracle_of(case, inputs, kernel.numerics if numerics is None else numerics)
    return {name: worst_over_budget(want[name], t) for name, t in got.items()}


# The oracle as a backend


@pytest.mark.parametrize("name", STRATEGIES)
@settings(max_examples=60)
@given(data=st.data())
def test_torch_backend_passes_every_op_within_the_float64_budget(name: str, data: st.DataObject) -> None:
    case = data.draw(STRATEGIES[name])
    assume(meaningful(case))
    kernel = make(TORCH, case)
    assert kernel.numerics == FLOAT64
    assert kernel.produces == tuple(output.name for output in OPS_BY_NAME[name].outputs)
    assert max(judge(kernel, case).values()) <= 1


@settings(max_examples=60)
@given(STRATEGIES["attention"])
def test_torch_attention_is_the_oracle_rounded_once(case: Case) -> None:
    assume(meaningful(case))
    inputs, got = run(make(TORCH, case), case)
    want = oracle_of(case, inputs, FLOAT64)["out"].value
    spacing = {"bf16": 2.0**-8, "fp16": 2.0**-11, "fp32": 2.0**-24}[case.text("dtype")]
    # 2^-40: the two float64 sums may differ before they are rounded.
    assert bool(
        ((got["out"].double() - want).abs() <= want.abs() * spacing + 2.0**-25 * (spacing > 2.0**-12) + 2.0**-40).all()
    )


@settings(max_examples=60)
@given(STRATEGIES["fp4_linear"])
def test_torch_linear_is_the_oracle_rounded_once(case: Case) -> None:
    assume(meaningful(case))
    inputs, got = run(make(TORCH, case), case)
    want = oracle_of(case, inputs, FLOAT64)["y"].value
    assert same_bits(got["y"], want.to(got["y"].dtype))


def test_the_comparison_above_notices_one_rounding_too_many() -> None:
    """Control: an own result that went through bfloat16 fails where float32 is due."""
    case = FP4_LINEAR.case(fmt="nvfp4", x="fp32", m=2, n=8, k=32)
    inputs, got = run(make(TORCH, case), case)
    want = oracle_of(case, inputs, FLOAT64)["y"]
    assert worst_over_budget(want, got["y"]) <= 1
    assert worst_over_budget(want, got["y"].bfloat16().float()) > 1
    assert worst_over_budget(want, torch.full_like(got["y"], torch.nan)) == float("inf")
    assert worst_over_budget(want, got["y"].double()) == float("inf")


@pytest.mark.parametrize("op", [ATTENTION, ATTENTION_BACKWARD], ids=lambda op: op.name)
def test_long_sequences_in_slices_give_the_same(monkeypatch: pytest.MonkeyPatch, op: Op) -> None:
    case = op.case(dtype="fp32", causal="bottom_right", hq=2, hk=1, sq=23, sk=17, d=8)
    _, whole = run(make(TORCH, case), case)
    monkeypatch.setattr("vbench.reference.attention.SCORE_ELEMENTS", 5 * 17)
    assert max(judge(make(TORCH, case), case).values()) <= 1
    _, sliced = run(make(TORCH, case), case)
    for name, t in whole.items():
        torch.testing.assert_close(sliced[name], t, rtol=2.0**-22, atol=2.0**-30)


def test_torch_refuses_a_weight_with_nan_before_any_launch() -> None:
    kernel = make(TORCH, FP4_QUANTIZE.case(fmt="nvfp4", n=2, k=16))
    with pytest.raises(Unsupported) as caught:
        kernel.bind({"w": torch.tensor([[torch.nan] * 16])}, {})
    assert caught.value.rule == "nonfinite_weight"


# The document as written

ABSMAX7 = ("absmax7_tensor", "absmax7_row", "absmax7_g128")


def in_document(case: Case, **fixed: str) -> Case:
    """The case with these values, and in a format of the document: a tensor's or a row's scale fits every shape."""
    fmt = case.text("fmt")
    values = {**dict(case.params), "fmt": fmt if fmt in ABSMAX7 else ABSMAX7[case.axis("n") % 2], **fixed}
    return OPS_BY_NAME[case.op].case(seed=case.seed, **values)


@settings(max_examples=40)
@given(STRATEGIES["fp4_quantize"])
def test_written_codec_equals_the_exact_encoder_on_float32_weights(case: Case) -> None:
    case = in_document(case, w="fp32")
    assume(meaningful(case) and case.text("dist") != "zeros")
    assert set(judge(make(AS_WRITTEN, case), case).values()) == {0.0}


def test_written_codec_differs_on_bfloat16_weights_since_its_scale_is_bfloat16() -> None:
    case = FP4_QUANTIZE.case(fmt="absmax7_tensor", w="bf16", n=16, k=64)
    inputs, got = run(make(AS_WRITTEN, case), case)
    assert bool((got["scale"] == got["scale"].bfloat16().float()).all())
    want = oracle_of(case, inputs, Numerics())
    assert worst_over_budget(want["scale"], got["scale"]) == float("inf")
    assert float((got["scale"] - want["scale"].value).abs() / want["scale"].value) < 2.0**-8


def test_written_codec_divides_zero_by_zero_on_a_zero_weight() -> None:
    case = FP4_QUANTIZE.case(fmt="absmax7_tensor", w="fp32", dist="zeros", n=4, k=8)
    inputs, got = run(make(AS_WRITTEN, case), case)
    assert float(got["scale"]) == 0.0
    assert worst_over_budget(oracle_of(case, inputs, Numerics())["scale"], got["scale"]) == float("inf")


@settings(max_examples=80)
@given(STRATEGIES["fp4_dequantize"])
def test_written_decoder_is_exact(case: Case) -> None:
    case = in_document(case)
    assume(meaningful(case))
    assert judge(make(AS_WRITTEN, case), case)["weight"] == 0.0


@settings(max_examples=40)
@given(STRATEGIES["fp4_linear"])
def test_written_linear_is_right_in_float32(case: Case) -> None:
    case = in_document(case, x="fp32")
    assume(meaningful(case))
    assert judge(make(AS_WRITTEN, case), case)["y"] <= 1


def test_written_linear_rounds_its_weight_where_a_fused_kernel_need_not() -> None:
    """In bfloat16 it is within the budget it declares and outside that of a kernel with exact operands."""
    case = FP4_LINEAR.case(fmt="absmax7_row", x="bf16", m=8, n=64, k=2)
    kernel = make(AS_WRITTEN, case)
    assert judge(kernel, case)["y"] <= 1
    assert judge(kernel, case, Numerics("fp32"))["y"] > 1


@settings(max_examples=60)
@given(STRATEGIES["attention"])
def test_written_float32_attention_is_within_the_float32_budget(case: Case) -> None:
    # The document has neither causal masks nor grouped heads, windows nor capped scores.
    values = dict(case.params) | {"causal": "none", "hq": case.axis("hk"), "window": 0, "softcap": 0}
    case = ATTENTION.case(seed=case.seed, **values)
    assume(meaningful(case))
    kernel = make(AS_WRITTEN, case, "float32")
    assert kernel.numerics == Numerics("fp32", probabilities="fp32")
    assert judge(kernel, case)["out"] <= 1


LONG = ATTENTION.case(dtype="fp16", causal="none", hq=2, hk=2, sq=64, sk=200, d=64)


def test_written_low_precision_attention_is_not() -> None:
    """Its sums in float16 break the budget of float32 sums, and its error is far above the float32 variant's."""
    low, high = make(AS_WRITTEN, LONG, "low_precision"), make(AS_WRITTEN, LONG, "float32")
    assert judge(high, LONG)["out"] <= 1
    assert judge(low, LONG, high.numerics)["out"] > 1
    assert judge(low, LONG)["out"] <= 1, "it is what it declares: sums in float16"
    inputs, got_low = run(low, LONG)
    _, got_high = run(high, LONG)
    want = oracle_of(LONG, inputs, high.numerics)["out"].value
    error_low, error_high = ((got["out"].double() - want).norm() for got in (got_low, got_high))
    assert float(error_low) > 2 * float(error_high)


def test_written_attention_in_blocks_equals_one_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """200 keys are four blocks of 64 with a short last one."""
    _, blocks = run(make(AS_WRITTEN, LONG, "float32"), LONG)
    monkeypatch.setattr(written_attention, "BLOCK_SIZE", 200)
    _, whole = run(make(AS_WRITTEN, LONG, "float32"), LONG)
    torch.testing.assert_close(blocks["out"], whole["out"], rtol=2.0**-10, atol=2.0**-20)


LARGE = ATTENTION.case(dtype="fp16", causal="none", dist="large_logits", hq=2, hk=2, sq=64, sk=96, d=64)


@pytest.mark.parametrize("variant", ["scalar_max_low", "scalar_max_float32"])
def test_written_scalar_maximum_works_on_small_logits_and_breaks_on_large_ones(variant: str) -> None:
    """A row whose maximum lies 104 below the block's underflows in float32: l = 0 and the output is 0/0."""
    small = make(AS_WRITTEN, LONG, variant)
    assert judge(small, LONG)["out"] <= 1
    _, got = run(make(AS_WRITTEN, LARGE, variant), LARGE)
    share = float(got["out"].isnan().any(dim=-1).double().mean())
    assert share > 0.25, "rows that come out NaN"


def test_written_row_maximum_does_not_break_there() -> None:
    kernel = make(AS_WRITTEN, LARGE, "float32")
    assert judge(kernel, LARGE)["out"] <= 1


@pytest.mark.parametrize(
    ("case", "variant", "rule"),
    [
        (FP4_QUANTIZE.case(fmt="nvfp4", n=2, k=16), "", "not_in_document"),
        (FP4_QUANTIZE.case(fmt="mxfp4_ceil", n=2, k=32), "", "not_in_document"),
        (FP4_DEQUANTIZE.case(fmt="mxfp4", n=2, k=32), "", "not_in_document"),
        (FP4_LINEAR.case(fmt="nf4", m=1, n=2, k=64), "", "not_in_document"),
        (FP4_LINEAR.case(fmt="nvfp4", m=1, n=2, k=16), "", "not_in_document"),
        (ATTENTION.case(causal="top_left", hq=1, hk=1, sq=2, sk=2, d=2), "float32", "not_in_document"),
        (ATTENTION.case(hq=2, hk=1, sq=2, sk=2, d=2), "low_precision", "not_in_document"),
        (ATTENTION.case(hq=1, hk=1, sq=2, sk=2, d=2), "", "unknown_variant"),
        (FP4_QUANTIZE.case(fmt="absmax7_row", n=2, k=16), "fast", "unknown_variant"),
    ],
)
def test_what_the_document_lacks_is_refused(case: Case, variant: str, rule: str) -> None:
    with pytest.raises(Unsupported) as caught:
        make(AS_WRITTEN, case, variant)
    assert caught.value.rule == rule


# Peers


@pytest.mark.parametrize("variant", [v for v in TORCH_NATIVE.variants["fp4_linear"] if v != "torch_compile"])
@settings(max_examples=80)
@given(case=STRATEGIES["fp4_linear"])
def test_peer_linears_are_within_their_declared_budget(variant: str, case: Case) -> None:
    assume(meaningful(case))
    dtype = {"cublas_bf16": "bf16", "cublas_fp16": "fp16", "cublas_fp32": "fp32"}.get(variant, case.text("x"))
    case = FP4_LINEAR.case(seed=case.seed, **{**dict(case.params), "x": dtype})
    # F.linear's result is stored before gelu or silu reads it: with a bias that rounding is relative to x W + b, for
    # which numerics have no word.
    assume(not (case.axis("bias") and case.text("act") in ("gelu", "silu") and dtype != "fp32"))
    # Sums of grid values may exceed float16's range, for which the budgeted comparison has no infinity.
    assume(not (case.text("dist") == "grid" and dtype == "fp16" and case.text("act") in ("gelu", "silu")))
    assert judge(make(TORCH_NATIVE, case, variant), case)["y"] <= 1


@pytest.mark.parametrize("fmt", FORMATS)
def test_the_weight_a_peer_decodes_is_the_reference_s_bitwise(fmt: str) -> None:
    """Scale bytes at the ends of mxfp4's range included, where its view as torch's E8M0 type is the second opinion."""
    case = FP4_DEQUANTIZE.case(fmt=fmt, y="fp32", dist="grid", n=8, k=128)
    inputs: dict[str, Any] = resolve(FP4_DEQUANTIZE.inputs)(case, "cpu")
    scale = inputs["scale"].view(torch.float8_e8m0fnu) if fmt == "mxfp4" else inputs["scale"]
    table = torch.tensor(dense_linear.TABLES[fmt])
    got = dense_linear.decode(table, inputs["codes"], scale, inputs["global_scale"], torch.float32)
    assert worst_over_budget(oracle_of(case, inputs, Numerics())["weight"], got) == 0.0


@pytest.mark.parametrize("variant", ["sdpa_math", "sdpa_flash"])
@settings(max_examples=80)
@given(case=STRATEGIES["attention"])
def test_peer_attentions_are_within_their_declared_budget(variant: str, case: Case) -> None:
    """Both alignments, grouped heads and rows with nothing to attend to included; SDPA has no windows and no caps."""
    case = ATTENTION.case(seed=case.seed, **(dict(case.params) | {"window": 0, "softcap": 0}))
    assume(meaningful(case))
    assert judge(make(TORCH_NATIVE, case, variant), case)["out"] <= 1


@pytest.mark.parametrize("variant", ["sdpa_math", "sdpa_flash"])
@settings(max_examples=40)
@given(case=STRATEGIES["attention_backward"])
def test_peer_backwards_are_within_their_declared_budget(variant: str, case: Case) -> None:
    case = ATTENTION_BACKWARD.case(seed=case.seed, **(dict(case.params) | {"window": 0, "softcap": 0}))
    assume(meaningful(case))
    try:
        kernel = make(TORCH_NATIVE, case, variant)
    except Unsupported as refusal:
        assert refusal.rule in (
            "no_lse_gradient",
            "alignment_not_offered",
            "peer_documents_nothing",
            "parameter_not_taken",
        )
        return
    assert max(judge(kernel, case).values()) <= 1


def test_a_peer_that_reads_the_given_out_is_not_what_is_timed() -> None:
    """sdpa_flash goes by its own forward, as its numerics say: a wrong ``out`` among the inputs changes nothing."""
    case = ATTENTION_BACKWARD.case(dtype="bf16", hq=1, hk=1, sq=8, sk=8, d=8)
    inputs: dict[str, Any] = resolve(ATTENTION_BACKWARD.inputs)(case, "cpu")
    kernel = make(TORCH_NATIVE, case, "sdpa_flash")
    assert kernel.numerics.own_forward
    right, other = (kernel.bind(some, {})() for some in (inputs, inputs | {"out": inputs["out"] * 2}))
    assert right is not None and other is not None and all(torch.equal(right[name], other[name]) for name in right)


def test_a_peer_with_the_wrong_alignment_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    case = ATTENTION.case(dtype="fp32", causal="bottom_right", hq=1, hk=1, sq=4, sk=9, d=8)
    assert judge(make(TORCH_NATIVE, case, "sdpa_math"), case)["out"] <= 1
    monkeypatch.setattr(
        sdpa, "lower_right_mask", lambda sq, sk, device: torch.ones(sq, sk, dtype=torch.bool, device=device).tril()
    )
    assert judge(make(TORCH_NATIVE, case, "sdpa_math"), case)["out"] > 1


def test_a_peer_that_ignores_the_global_scale_would_be_noticed() -> None:
    case = FP4_LINEAR.case(fmt="nvfp4", x="fp32", m=2, n=8, k=32)
    kernel = make(TORCH_NATIVE, case, "eager_dequant")
    inputs: dict[str, Any] = resolve(FP4_LINEAR.inputs)(case, "cpu")
    want = oracle_of(case, inputs, kernel.numerics)["y"]
    wrong = kernel.bind({**inputs, "global_scale": torch.ones(1)}, {})()
    assert wrong is not None
    assert worst_over_budget(want, wrong["y"]) > 1


@pytest.mark.parametrize(
    ("case", "variant", "device", "rule"),
    [
        (FP4_LINEAR.case(fmt="nvfp4", x="fp16", m=1, n=2, k=16), "cublas_bf16", "cpu", "dtype_not_of_variant"),
        (FP4_LINEAR.case(fmt="nvfp4", m=1, n=2, k=16), "cublas", "cpu", "unknown_variant"),
        (ATTENTION.case(hq=1, hk=1, sq=2, sk=2, d=2), "sdpa_cudnn", "cpu", "needs_cuda"),
        (ATTENTION.case(hq=1, hk=1, sq=2, sk=2, d=2), "sdpa_efficient", "cpu", "needs_cuda"),
        (ATTENTION.case(hq=1, hk=1, sq=2, sk=2, d=2), "flash", "cpu", "unknown_variant"),
        (
            ATTENTION.case(causal="bottom_right", hq=1, hk=1, sq=3, sk=2, d=2),
            "sdpa_flash",
            "cuda",
            "peer_documents_nan",
        ),
        (ATTENTION_BACKWARD.case(hq=1, hk=1, sq=2, sk=2, d=2, dlse=1), "sdpa_math", "cpu", "no_lse_gradient"),
        (
            ATTENTION_BACKWARD.case(causal="top_left", hq=1, hk=1, sq=2, sk=3, d=8),
            "sdpa_flash",
            "cuda",
            "alignment_not_offered",
        ),
        (ATTENTION_BACKWARD.case(hq=1, hk=1, sq=2, sk=2, d=2), "sdpa_cudnn", "cuda", "head_dim_not_multiple_of_8"),
    ],
)
def test_what_a_peer_lacks_is_refused(case: Case, variant: str, device: Device, rule: str) -> None:
    with pytest.raises(Unsupported) as caught:
        make(TORCH_NATIVE, case, variant, device)
    assert caught.value.rule == rule


def test_peer_weights_are_decoded_outside_the_launch_only_where_the_variant_says_so() -> None:
    """Changing the packed weight after ``bind`` reaches eager_dequant and not cublas_*."""
    case = FP4_LINEAR.case(fmt="absmax7_row", x="fp32", m=1, n=4, k=8)
    moved: dict[str, bool] = {}
    for variant in ("cublas_fp32", "eager_dequant"):
        inputs: dict[str, Any] = resolve(FP4_LINEAR.inputs)(case, "cpu")
        launch = make(TORCH_NATIVE, case, variant).bind(inputs, {})
        before = launch()
        inputs["scale"].mul_(2)
        after = launch()
        assert before is not None and after is not None
        moved[variant] = not torch.equal(before["y"], after["y"])
    assert moved == {"cublas_fp32": False, "eager_dequant": True}


# All of them


@pytest.mark.parametrize("backend", [TORCH, AS_WRITTEN, TORCH_NATIVE], ids=lambda backend: backend.name)
def test_backends_are_usable_on_the_cpu_and_honest_about_cuda(backend: DeclaredBackend) -> None:
    available = backend.probe("cpu")
    assert available.usable and available.mode == "native" and "torch" in available.versions
    on_cuda = backend.probe("cuda")
    assert on_cuda.usable == torch.cuda.is_available()
    assert on_cuda.usable or on_cuda.reason


def test_importing_the_backends_needs_no_torch() -> None:
    code = (
        "import sys\n"
        "from vbench.kernels.as_written.backend import BACKEND as a\n"
        "from vbench.kernels.peers.torch_native import BACKEND as b\n"
        "from vbench.reference.backend import BACKEND as c\n"
        "assert [x.role for x in (a, b, c)] == ['subject', 'peer', 'own']\n"
        "print('torch' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def small(case: Case) -> bool:
    return meaningful(case) and "n=512" not in case.id and "sq=256" not in case.id


@pytest.mark.parametrize("variant", ["sdpa_math", "sdpa_flash"])
def test_peers_pass_the_fixed_attention_cases(variant: str) -> None:
    over: dict[str, float] = {}
    refused = 0
    for case in filter(small, ATTENTION_SUITE.checks):
        try:
            kernel = make(TORCH_NATIVE, case, variant)
        except Unsupported:
            # The other ops have features that these have not.
            refused += case.op in ("attention", "attention_backward")
            continue
        worst = max(judge(kernel, case).values())
        if worst > 1:
            over[case.id] = worst
    assert over == {} and refused < 60


def test_torch_backend_passes_the_fixed_cases() -> None:
    cases = [case for suite in (FP4_SUITE, ATTENTION_SUITE) for case in suite.checks if small(case)]
    cases = [case for case in cases if case.op in TORCH.ops]
    over = {case.id: worst for case in cases for worst in judge(make(TORCH, case), case).values() if worst > 1}
    assert over == {} and len(cases) > 150
