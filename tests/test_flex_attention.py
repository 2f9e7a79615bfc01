"""FlexAttention as a peer: compiled on the CPU, and its rules for CUDA through a dense stand-in, against the oracle."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vbench import check
from vbench.errors import Unsupported
from vbench.kernels.peers import flex
from vbench.kernels.peers.flex_attention import BACKEND, OPTIONS, probe
from vbench.record import Outcome
from vbench.reference.ops.attention import ATTENTION, ATTENTION_BACKWARD
from vbench.reference.ops.attention_extended import ATTENTION_EXTENDED, ATTENTION_EXTENDED_BACKWARD
from vbench.spec import Case, Op, resolve
from vbench.suites.attention import SUITE

OPS = {op.name: op for op in (ATTENTION, ATTENTION_BACKWARD, ATTENTION_EXTENDED, ATTENTION_EXTENDED_BACKWARD)}
SHAPE = {"dtype": "fp32", "hq": 4, "hk": 2, "sq": 40, "sk": 57, "d": 16}

FEATURES: tuple[dict[str, int | str], ...] = (
    {"causal": "none"},
    {"causal": "top_left", "layout": "bshd", "b": 2},
    {"causal": "bottom_right", "b": 2},
    # Rows with nothing to attend to.
    {"causal": "bottom_right", "sq": 57, "sk": 40},
    {"causal": "none", "window": 9},
    {"causal": "bottom_right", "window": 5, "softcap": 2},
    {"causal": "top_left", "softcap": 30, "dist": "large_logits"},
)
EXTENDED_FEATURES: tuple[dict[str, int | str], ...] = (
    {"alibi": 1, "b": 2, "causal": "bottom_right"},
    {"mask": "blocked", "maskdims": "hqk", "causal": "none"},
    {"packed": 4, "causal": "bottom_right", "window": 7},
    {"packed": 3, "alibi": 1, "mask": "normal", "softcap": 2, "causal": "top_left"},
)


def case_of(op: Op, features: dict[str, int | str]) -> Case:
    merged: dict[str, Any] = {**SHAPE, **features}
    return op.case(**merged)


def judged(case: Case, kernel: Any, fault: str = "") -> check.Judgement:
    """``fault``: an input the kernel is given zeroed, so that it works for another case than the oracle."""
    op = OPS[case.op]
    inputs = resolve(op.inputs)(case, "cpu")
    expected = resolve(op.oracle)(case, inputs, kernel.numerics, None)
    out = check.poisoned(expected, "cpu")
    given = {**inputs, **({fault: torch.zeros_like(inputs[fault])} if fault else {})}
    before = {name: t.clone() for name, t in given.items()}
    found = kernel.bind(given, out)()
    assert all(check.same_bits(given[name], before[name]) for name in given), "an input was changed"
    return check.judge_outputs(found, expected, kernel.produces)


def dense(q: Any, k: Any, v: Any, score: Any, block_mask: Any, grouped: bool, options: Any, aux: Any) -> Any:
    """What ``flex_attention`` means, in float32 and differentiable, with the interface of ``flex._attend``."""
    assert grouped == (q.shape[1] != k.shape[1])
    group = q.shape[1] // k.shape[1]
    b, h, sq, d = q.shape
    grid = torch.meshgrid(*(torch.arange(n) for n in (b, h, sq, k.shape[2])), indexing="ij")
    z = q.float() @ k.float().repeat_interleave(group, 1).mT / d**0.5
    z = z if score is None else score(z, *grid)
    if block_mask is not None:
        z = z.masked_fill(~block_mask.mask_mod(*grid), -torch.inf)
    empty = (z == -torch.inf).all(3)
    z = z.masked_fill(empty[..., None], 0.0)
    lse = torch.logsumexp(z, 3)
    weights = torch.exp(z - lse[..., None]).masked_fill(empty[..., None], 0.0)
    out = (weights @ v.float().repeat_interleave(group, 1)).to(q.dtype)
    return out, None if aux is None else SimpleNamespace(lse=lse.masked_fill(empty, -torch.inf))


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(flex, "compiled", lambda mode: dense)
    monkeypatch.setattr(flex, "MIN_PAIRS", 0)
    yield


@pytest.mark.parametrize("backward", (False, True), ids=("forward", "backward"))
@pytest.mark.parametrize("features", FEATURES + EXTENDED_FEATURES, ids=str)
def test_the_rules_mean_what_the_oracle_means(stand_in: None, features: dict[str, int | str], backward: bool) -> None:
    extended = features in EXTENDED_FEATURES
    if backward:
        op = ATTENTION_EXTENDED_BACKWARD if extended else ATTENTION_BACKWARD
        case = case_of(op, {**features, "dlse": 1})
        kernel = flex.make_backward(case, "default", "cuda")
    else:
        case = case_of(ATTENTION_EXTENDED if extended else ATTENTION, features)
        kernel = flex.make(case, "default", "cuda")
        assert kernel.produces == ("out", "lse")
    found = judged(case, kernel)
    assert found.outcome is Outcome.PASSED, found


def test_a_rule_left_out_is_found(stand_in: None) -> None:
    case = case_of(ATTENTION_EXTENDED, {"packed": 3, "alibi": 1, "causal": "bottom_right"})
    # With every bound of the keys 0, no query finds a key.
    for fault, outcome in (("slopes", Outcome.WRONG_VALUE), ("cu_k", Outcome.NONFINITE)):
        assert judged(case, flex.make(case, "default", "cuda"), fault).outcome is outcome


# Inductor itself calls what torch calls deprecated.
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_compiled_on_the_cpu() -> None:
    # Grouped heads, rows with nothing to attend to, capped scores; one case, for a compilation takes seconds.
    case = case_of(ATTENTION, {"dtype": "bf16", "causal": "bottom_right", "sq": 57, "sk": 40, "softcap": 2})
    kernel = flex.make(case, "default", "cpu")
    assert kernel.produces == ("out",)
    found = judged(case, kernel)
    assert found.outcome is Outcome.PASSED, found


def rule_of(op: Op, variant: str = "default", device: Any = "cuda", **features: int | str) -> str:
    make = flex.make_backward if op.name.endswith("backward") else flex.make
    with pytest.raises(Unsupported) as refused:
        make(case_of(op, features), variant, device)
    return refused.value.rule


def test_what_is_refused() -> None:
    assert rule_of(ATTENTION_EXTENDED, sinks=1) == "no_sinks"
    assert rule_of(ATTENTION, d=8, sq=400) == "head_dim_below_16"
    assert rule_of(ATTENTION, sq=4, sk=4) == "too_small_to_compile"
    assert rule_of(ATTENTION, "tma", "cpu") == "needs_cuda"
    assert rule_of(ATTENTION, "best") == "unknown_variant"
    assert rule_of(ATTENTION_BACKWARD, device="cpu") == "no_backward_on_cpu"
    assert rule_of(ATTENTION, "max_autotune") == "not_autotuned"
    cell = ATTENTION.case(causal="bottom_right", b=4, hq=16, hk=16, sq=4096, sk=4096, d=128)
    for variant in OPTIONS:
        assert isinstance(flex.make(cell, variant, "cuda"), flex.Flex)
    assert rule_of(ATTENTION, b=1, hq=16, hk=16, sq=16384, sk=16384, d=128) == "shown_with_tma"
    autotuned = [bench for bench in SUITE.benches if bench.case.op == "attention" and flex._autotuned(bench.case)]
    assert len(autotuned) == 4


def test_tma_is_refused_where_torch_would_go_without_in_silence(stand_in: None) -> None:
    some: tuple[tuple[dict[str, int | str], bool], ...] = (
        ({"layout": "padded"}, True),
        ({"d": 20, "dtype": "bf16"}, False),
    )
    for features, taken in some:
        case = case_of(ATTENTION, features)
        kernel = flex.make(case, "tma", "cuda")
        inputs = resolve(ATTENTION.inputs)(case, "cpu")
        if taken:
            kernel.bind(inputs, {})
            continue
        with pytest.raises(Unsupported, match="no_tma_layout"):
            kernel.bind(inputs, {})


def test_the_probe_records_what_each_variant_asks_for() -> None:
    versions = probe("cpu").versions
    assert {f"flex_attention[{variant}]" for variant in OPTIONS} <= set(versions)
    assert versions["flex_attention[tma]"] == "USE_TMA=True"
    assert {variant for some in BACKEND.variants.values() for variant in some} == set(OPTIONS)
