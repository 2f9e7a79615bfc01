"""Extended attention: the oracle against autograd, Triton (interpreted) and SDPA against the oracle, refusals.

What needs Triton runs in a child process. What the compiler makes of the kernels is judged by the ahead-of-time gate.
"""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch

from vbench import check
from vbench.errors import Unsupported
from vbench.kernels.peers import sdpa_extended
from vbench.kernels.triton import attention_extended as kernels
from vbench.reference import attention_extended as meaning
from vbench.reference.ops.attention import ATTENTION
from vbench.reference.ops.attention_extended import (
    ATTENTION_EXTENDED,
    ATTENTION_EXTENDED_BACKWARD,
    OPS,
    sequence_bounds,
)
from vbench.spec import Case, Expected, Numerics, Op, resolve
from vbench.suites.attention import EXTENDED, SHIFTED_LENGTHS

FORWARD, BACKWARD = ATTENTION_EXTENDED, ATTENTION_EXTENDED_BACKWARD
GRADIENTS = ("dq", "dk", "dv", "dsink")
SHAPE = {"hq": 2, "hk": 1, "sq": 19, "sk": 40, "d": 16}


def case_of(op: Op, **values: int | str) -> Case:
    merged: dict[str, Any] = {**SHAPE, **values}
    return op.case(**merged)


def op_named(case_id: str) -> Op:
    return next(op for op in OPS if case_id.startswith(op.name + "["))


# --- in the interpreting child ---------------------------------------------------------------------------------------


def run(case_id: str, fault: str = "", *, peer: str = "") -> float:
    """Worst error over budget of the Triton kernels, or of a ``peer``; the inputs must be unchanged.

    ``fault``: an input that the kernel is given changed, so that it works for another case than the oracle.
    """
    op = op_named(case_id)
    case = op.parse(case_id)
    inputs = resolve(op.inputs)(case, "cpu")
    module = sdpa_extended if peer else kernels
    kernel = (module.make if op is FORWARD else module.make_backward)(case, peer, "cpu")
    expected = resolve(op.oracle)(case, inputs, kernel.numerics, None)
    out = check.poisoned(expected, "cpu")
    given = dict(inputs)
    if fault == "cu_k":
        given["cu_k"] = inputs["cu_k"].clone()
        given["cu_k"][1:-1] = inputs["cu_k"][1:-1] - 1
    elif fault:
        given[fault] = torch.zeros_like(inputs[fault])
    before = {name: t.clone() for name, t in given.items()}
    with torch.no_grad():
        found = kernel.bind(given, out)()
    assert all(check.same_bits(given[name], before[name]) for name in given), "an input was changed"
    error = check.judge_outputs(found or out, expected, kernel.produces).error
    return float("inf") if error is None else error.worst_over_budget


# --- the oracle ------------------------------------------------------------------------------------------------------


def dense(case: Case, inputs: dict[str, Any], q: Any, k: Any, v: Any, sink: Any) -> tuple[Any, Any]:
    """An independent formula: one softmax over keys and sink, for whole batches, differentiable."""
    group = case.axis("hq") // case.axis("hk")
    sq, sk, causal, window = case.axis("sq"), case.axis("sk"), case.text("causal"), case.axis("window")
    z = torch.einsum("bhid,bhjd->bhij", q, k.repeat_interleave(group, 1)) / case.axis("d") ** 0.5
    if case.axis("softcap"):
        z = torch.tanh(z / case.axis("softcap")) * case.axis("softcap")
    of_q, of_k = ([0, sq], [0, sk])
    if case.axis("packed"):
        of_q, of_k = inputs["cu_q"].tolist(), inputs["cu_k"].tolist()
    for i, j in product(range(sq), range(sk)):
        s = max(n for n in range(len(of_q) - 1) if of_q[n] <= i)
        # Of several sequences that begin here, all but the last are empty.
        t = max(n for n in range(len(of_k) - 1) if of_k[n] <= j)
        shift = (of_k[s + 1] - of_k[s]) - (of_q[s + 1] - of_q[s]) if causal == "bottom_right" else 0
        apart = (j - of_k[s]) - (i - of_q[s]) - shift
        if s != t or (causal != "none" and apart > 0) or (window and abs(apart) >= window):
            z[:, :, i, j] = -torch.inf
        elif "slopes" in inputs:
            z[:, :, i, j] = z[:, :, i, j] - inputs["slopes"].double() * abs(apart)
    if "mask" in inputs:
        z = z + inputs["mask"].double()
    z = torch.cat((z, sink[None, :, None, None].expand(*z.shape[:3], 1)), dim=3)
    lse = torch.logsumexp(z, dim=3)
    weights = torch.where(
        lse[..., None] > -torch.inf, torch.exp(z - torch.where(lse > -torch.inf, lse, 0.0)[..., None]), 0.0
    )
    return weights[..., :-1] @ v.repeat_interleave(group, 1), lse


@pytest.mark.parametrize("features", EXTENDED, ids=str)
def test_the_oracle_is_the_dense_formula_and_its_derivative(features: dict[str, int | str]) -> None:
    case = case_of(BACKWARD, dtype="fp32", dlse=1, **{**features, "sq": 11, "sk": 13, "d": 6})
    inputs = meaning.extended_backward_inputs(case, "cpu")
    leaves = [inputs[name].double().requires_grad_() for name in "qkv"]
    sink = inputs.get("sink", torch.full((2,), -torch.inf)).double().requires_grad_()
    out, lse = dense(case, inputs, leaves[0], leaves[1], leaves[2], sink)
    torch.testing.assert_close(
        meaning.extended_float64(case, inputs), (out.detach(), lse.detach()), rtol=1e-12, atol=1e-12
    )
    exact = {**inputs, "out": out.detach(), "lse": lse.detach()}
    dlse = torch.where(lse.detach() > -torch.inf, inputs["dlse"].double(), 0.0)
    loss = (out * inputs["dout"].double()).sum() + (torch.where(lse > -torch.inf, lse, 0.0) * dlse).sum()
    wanted = torch.autograd.grad(loss, [*leaves, sink])
    found = meaning.extended_backward_float64(case, exact)
    for name, want in zip(GRADIENTS, wanted, strict=True):
        if not torch.isnan(want).any():  # autograd has 0 * inf in rows that see nothing; those of the oracle are 0
            torch.testing.assert_close(found[name], want, rtol=1e-9, atol=1e-9, msg=name)
        assert torch.isfinite(found[name]).all()


def test_without_features_it_is_plain_attention() -> None:
    plain = ATTENTION.case(causal="bottom_right", b=2, **SHAPE)
    inputs = resolve(ATTENTION.inputs)(plain, "cpu")
    numerics = Numerics("tensor_core", probabilities="bf16")
    want = resolve(ATTENTION.oracle)(plain, inputs, numerics, None)
    got = meaning.extended_oracle(case_of(FORWARD, causal="bottom_right", b=2), inputs, numerics, None)
    for name in ("out", "lse"):
        torch.testing.assert_close(got[name].value, want[name].value, rtol=1e-12, atol=1e-12)
        # The budgets differ by what a bias adds to each score, and by one more term of the sum.
        assert ((got[name].budget / want[name].budget)[want[name].budget > 0] < 1.1).all()


def test_packed_sequences_are_those_sequences_alone() -> None:
    case = case_of(FORWARD, packed=3, causal="bottom_right", alibi=1, sq=40)
    inputs = meaning.extended_inputs(case, "cpu")
    out, lse = meaning.extended_float64(case, inputs)
    of_q, of_k = sequence_bounds(case, "q"), sequence_bounds(case, "k")
    for i in range(3):
        rows, keys = slice(of_q[i], of_q[i + 1]), slice(of_k[i], of_k[i + 1])
        if of_q[i] == of_q[i + 1] or of_k[i] == of_k[i + 1]:
            continue
        alone = case_of(FORWARD, causal="bottom_right", alibi=1, sq=of_q[i + 1] - of_q[i], sk=of_k[i + 1] - of_k[i])
        given = {"q": inputs["q"][:, :, rows], "slopes": inputs["slopes"]}
        given |= {name: inputs[name][:, :, keys] for name in ("k", "v")}
        want_out, want_lse = meaning.extended_float64(alone, given)
        torch.testing.assert_close(out[:, :, rows], want_out, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(lse[:, :, rows], want_lse, rtol=1e-12, atol=1e-12)


# --- kernels ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_triton_is_within_budget(interpreter: ProcessPoolExecutor, op: Op, dtype: str) -> None:
    # Every feature alone in one dtype; all of them at once in each. The suite has the rest.
    chosen = EXTENDED if dtype == "bf16" else EXTENDED[-2:]
    shapes: list[dict[str, int | str]] = [{"dtype": dtype, **features, "b": 1} for features in chosen]
    cases = [case_of(op, **shape) for shape in shapes]
    assert all(worst <= 1.0 for worst in interpreter.map(run, [case.id for case in cases]))


FAULTS: tuple[tuple[str, dict[str, int | str]], ...] = (
    ("slopes", {"alibi": 1}),
    ("sink", {"sinks": 1}),
    ("mask", {"mask": "normal"}),
    ("mask", {"mask": "shifted"}),
    ("cu_k", {"packed": 3, "sq": 40}),
)


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
@pytest.mark.parametrize(("fault", "features"), FAULTS, ids=lambda v: str(v))
def test_ignoring_a_feature_is_over_budget(
    interpreter: ProcessPoolExecutor, op: Op, fault: str, features: dict[str, int | str]
) -> None:
    # That the kernels are within budget when they do not is the test above.
    assert interpreter.submit(run, case_of(op, **features).id, fault).result() > 1.0


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
@pytest.mark.parametrize("peer", ["sdpa_math", "sdpa_flash"])
@pytest.mark.parametrize("causal", ["none", "top_left", "bottom_right"])
def test_sdpa_takes_masks_on_the_cpu(op: Op, peer: str, causal: str) -> None:
    for features in ({"mask": "normal", "maskdims": "bqk", "b": 2}, {"mask": "shifted"}):
        assert run(case_of(op, causal=causal, **features).id, peer=peer) <= 1.0
    assert run(case_of(op, causal=causal, alibi=1, dtype="fp32").id, peer=peer) <= 1.0


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "features", "variant"),
    [
        ("no_sinks", {"sinks": 1}, "sdpa_math"),
        ("no_packed_sequences", {"packed": 2}, "sdpa_math"),
        ("parameter_not_taken", {"window": 3}, "sdpa_math"),
        ("parameter_not_taken", {"softcap": 3}, "sdpa_flash"),
        ("peer_documents_nothing", {"mask": "blocked"}, "sdpa_math"),
        ("bias_rounded", {"alibi": 1}, "sdpa_flash"),
        ("needs_cuda", {"alibi": 1}, "sdpa_cudnn"),
        ("unknown_variant", {"alibi": 1}, "gluon"),
    ],
)
def test_peers_refuse_what_they_do_not_offer(rule: str, features: dict[str, int | str], variant: str) -> None:
    for op, make in ((FORWARD, sdpa_extended.make), (BACKWARD, sdpa_extended.make_backward)):
        with pytest.raises(Unsupported) as caught:
            make(case_of(op, **features), variant, "cpu")
        assert caught.value.rule == rule


@pytest.mark.parametrize("variant", ["gluon", "gluon_deterministic"])
def test_gluon_has_none_of_the_features(variant: str) -> None:
    with pytest.raises(Unsupported, match="unknown_variant"):
        kernels.make(case_of(FORWARD, sinks=1), variant, "cpu")


BAD_INPUTS: tuple[tuple[str, dict[str, int | str], str, Any], ...] = (
    ("wrong_shape", {"mask": "normal"}, "mask", lambda t: t[..., :-1]),
    ("wrong_shape", {"mask": "normal", "maskdims": "hqk"}, "mask", lambda t: t[:, :1]),
    ("wrong_dtype", {"mask": "normal"}, "mask", lambda t: t.float()),
    ("wrong_device", {"mask": "normal"}, "mask", lambda t: t.to("meta")),
    ("wrong_shape", {"alibi": 1}, "slopes", lambda t: t[:1]),
    ("wrong_dtype", {"alibi": 1}, "slopes", lambda t: t.double()),
    ("wrong_shape", {"sinks": 1}, "sink", lambda t: t[None]),
    ("not_contiguous", {"sinks": 1}, "sink", lambda t: t[:1].expand(2)),
    ("wrong_dtype", {"packed": 3}, "cu_q", lambda t: t.long()),
    ("wrong_shape", {"packed": 3}, "cu_k", lambda t: t[:-1]),
    ("sequence_bounds", {"packed": 3}, "cu_q", lambda t: t + 1),
    ("sequence_bounds", {"packed": 3}, "cu_k", lambda t: t.flip(0)),
    ("wrong_shape", {"alibi": 1}, "k", lambda t: t[:, :, 1:]),
    ("wrong_dtype", {"alibi": 1}, "v", lambda t: t.float()),
)


@pytest.mark.parametrize(("rule", "features", "name", "spoil"), BAD_INPUTS)
@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_inputs_of_another_form_are_refused_before_a_launch(
    monkeypatch: pytest.MonkeyPatch, op: Op, rule: str, features: dict[str, int | str], name: str, spoil: Any
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    case = case_of(op, **features)
    inputs = resolve(op.inputs)(case, "cpu")
    kernel = (kernels.make if op is FORWARD else kernels.make_backward)(case, "", "cpu")
    out = check.poisoned(resolve(op.oracle)(case, inputs, kernel.numerics, None), "cpu")
    with pytest.raises(Unsupported) as caught:
        kernel.bind({**inputs, name: spoil(inputs[name])}, out)
    assert caught.value.rule == rule
    missing = {key: t for key, t in inputs.items() if key != name}
    if name not in ("k", "v"):
        with pytest.raises(Unsupported, match="missing_input"):
            kernel.bind(missing, out)


def test_cases_without_a_meaning_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    bad: tuple[tuple[str, dict[str, int | str]], ...] = (
        ("zero_size", {"sq": 0}),
        ("zero_size", {"sk": 0}),
        ("zero_size", {"d": 0}),
        ("heads_not_multiple", {"hq": 3, "hk": 2}),
        ("packed_batch", {"b": 2, "packed": 2}),
    )
    for rule, values in bad:
        case = case_of(FORWARD, **values)
        rejected = FORWARD.reject(case)
        assert rejected is not None and rejected[0] == rule
    large: tuple[tuple[str, dict[str, int | str]], ...] = (
        ("head_dim_above_256", {"d": 257}),
        ("too_long", {"sq": 1 << 29}),
    )
    for rule, values in (*bad, *large):
        with pytest.raises(Unsupported, match=rule):
            kernels.make(case_of(FORWARD, **values), "", "cpu")


# --- where a fused backward went wrong --------------------------------------------------------------------------------


def test_shifted_masks_reach_the_lse_at_which_cudnn_failed(interpreter: ProcessPoolExecutor) -> None:
    """pytorch/pytorch#196678: length 64 over a multiple of 128, lse below -88.7; ours and SDPA's maths are right."""
    assert any(length % 128 == 64 for length in SHIFTED_LENGTHS)
    for length in SHIFTED_LENGTHS:
        case = BACKWARD.case(mask="shifted", hq=1, hk=1, sq=length, sk=length, d=64)
        assert (meaning.extended_backward_inputs(case, "cpu")["lse"] < -88.73).all()
        assert run(case.id, peer="sdpa_math") <= 1.0
    assert interpreter.submit(run, BACKWARD.case(mask="shifted", hq=1, hk=1, sq=192, sk=192, d=64).id).result() <= 1.0


@pytest.mark.parametrize(("sizes", "excused"), [((1, 1, 1), True), ((1, 5, 8), False), ((3, 5, 8), False)])
def test_only_what_zeros_or_a_mean_may_answer_is_degenerate(sizes: tuple[int, int, int], excused: bool) -> None:
    sq, sk, d = sizes
    rest: dict[str, Any] = {"dtype": "fp32", "b": 1, "hq": 1, "hk": 1, "sq": sq, "sk": sk, "d": d, "sinks": 1}
    for op in (ATTENTION_EXTENDED, ATTENTION_EXTENDED_BACKWARD):
        case = op.case(**rest)
        inputs = resolve(op.inputs)(case, "cpu")
        expected = resolve(op.oracle)(case, inputs, Numerics("fp32"), None)
        outputs = {name: want.degenerate for name, want in expected.items()}
        assert any(outputs.values()) is excused, outputs


#: Found by a search on an H200: one key beside a sink, and masks that leave the sink all the weight.
DEGENERATE = (
    "attention_extended[dtype=bf16,causal=none,dist=grid,b=1,hq=1,hk=1,sq=1,sk=1,d=2,alibi=0,sinks=1,mask=none,"
    "packed=1,seed=7]",
    "attention_extended[dtype=fp16,causal=none,dist=large_logits,window=20,b=1,hq=1,hk=1,sq=36,sk=1,d=6,alibi=0,"
    "sinks=1,mask=normal,maskdims=bhqk,packed=5,seed=7]",
    "attention_extended[dtype=fp16,causal=none,dist=large_logits,window=20,b=1,hq=1,hk=1,sq=1,sk=1,d=6,alibi=1,"
    "sinks=1,mask=normal,packed=5,seed=2]",
    "attention_extended_backward[dtype=fp16,causal=top_left,dist=large_logits,layout=bshd,window=20,b=1,hq=1,hk=1,"
    "sq=18,sk=1,d=14,dlse=0,alibi=0,sinks=1,mask=blocked,maskdims=bqk,packed=2,seed=4]",
)


@pytest.mark.parametrize("text", DEGENERATE)
def test_a_case_that_a_trivial_kernel_answers_is_excused_by_its_own_answer(text: str) -> None:
    """And by nothing else: with more keys, under a budget that lets everything through, each is accused."""
    op = op_named(text)
    case = op.parse(text)
    widest = Numerics("tensor_core", (case.text("dtype"),), case.text("dtype"))

    def of(one: Case) -> tuple[dict[str, Any], dict[str, Expected]]:
        inputs = resolve(op.inputs)(one, "cpu")
        return inputs, resolve(op.oracle)(one, inputs, widest, None)

    inputs, want = of(case)
    _, previous = of(replace(case, seed=case.seed + 1))
    survivors, excused = check.trivial_survivors(inputs, want, previous)
    assert survivors == [] and "mean" in excused

    values = {**dict(case.params), "sk": 5, "dist": "normal", "packed": 0}
    inputs, want = of(replace(case, params=tuple(values.items())))
    lax = {n: replace(w, budget=torch.full_like(w.value, 1e9)) for n, w in want.items()}
    survivors, excused = check.trivial_survivors(inputs, lax, lax)
    assert set(survivors) == set(check.TRIVIAL_KERNELS) and not excused
