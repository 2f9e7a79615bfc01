"""``vbench backend check``: what it asks, and the verdict it gives."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from tests import plugins
from vbench import check, conformance, plan, registry, repro
from vbench.cli import main
from vbench.controls import softmax
from vbench.errors import UsageError
from vbench.plan import CONFORMANCE
from vbench.record import Outcome, Record
from vbench.reference import fp4, laws
from vbench.reference.ops.attention import ATTENTION, ATTENTION_BACKWARD
from vbench.reference.ops.attention_extended import ATTENTION_EXTENDED, ATTENTION_EXTENDED_BACKWARD
from vbench.reference.ops.fp4 import FP4_LINEAR, FP4_QUANTIZE
from vbench.reference.ops.int8 import INT8_LINEAR
from vbench.registry import BackendInfo
from vbench.spec import Case, Law, Numerics, Op, resolve
from vbench.worker import Worker

CASE = FP4_LINEAR.case(fmt="nvfp4", m=1, n=2, k=16)


def record(outcome: Outcome, reason: str = "") -> Record:
    return Record(CASE.id, "b", "check", outcome, "run", reason=reason, suite=CONFORMANCE, role="own")


def test_every_variant_of_every_case_is_asked_thoroughly() -> None:
    info = registry.backends()["torch"]
    probe, *jobs = conformance.jobs_of(info, list(registry.suites().values()), ["attention"], "quick", 0)
    assert probe.kind == "probe" and len(jobs) > 20
    assert all(job.thorough and not job.off and job.kind == "check" and job.op == "attention" for job in jobs)
    assert len({job.key for job in jobs}) == len(jobs)


def test_the_verdict() -> None:
    passed, refused = record(Outcome.PASSED), record(Outcome.UNSUPPORTED, "k_odd")
    assert conformance.verdict([passed, refused])[0] == 0
    assert conformance.verdict([refused])[0] == conformance.verdict([])[0] == 3
    code, body = conformance.verdict([passed, refused, record(Outcome.CRASHED, "signal_11")])
    assert code == 1 and body["violations"][0]["reason"] == "signal_11" and body["refusals"] == {"k_odd": 1}
    text = "\n".join(conformance.lines("b", None, code, body, "RUN"))
    assert f"vbench repro {CASE.hash} --run RUN --backend 'b'" in text and "does not conform" in text


def test_repro_asks_as_much_as_the_check_did() -> None:
    asked = {job.suite: job.thorough for job in repro.jobs_of([record(Outcome.WRONG_VALUE)])}
    assert asked == {CONFORMANCE: True}
    of_a_run = dataclasses.replace(record(Outcome.WRONG_VALUE), suite="attention")
    for reason, thorough in (("value", False), ("laws", True), ("rebound_inputs", True)):
        (job,) = repro.jobs_of([dataclasses.replace(of_a_run, reason=reason)])
        assert job.thorough == thorough


def test_a_run_tries_laws_on_a_part_of_the_drawn_cases() -> None:
    suite = registry.suites()["attention"]
    infos = [
        BackendInfo(role, "d", role=role, ops={"attention": "m:f", "attention_backward": "m:f"})
        for role in ("own", "peer", "subject")
    ]
    jobs = plan.plan([suite], infos, ops=registry.ops(), effort="standard", seed=0, timing=False)
    lawful = {(job.role, job.case) for job in jobs if job.kind == "check" and job.thorough}
    assert {role for role, _ in lawful} == {"own", "peer"}
    assert all(job.off == (("battery",) if job.thorough else ()) for job in jobs if job.kind == "check")
    cases = {case for _, case in lawful}
    assert not cases & {case.id for case in suite.checks}
    offered = [f"vbench.suites.strategies:{op}_cases" for op in infos[0].ops]
    drawn = sum(generated.count[1] for generated in suite.generated if generated.strategy in offered)
    assert drawn / plan.LAWFUL_ONE_IN / 2 < len(cases) <= drawn / plan.LAWFUL_ONE_IN + 2
    # What such a job asks is enough for a kernel that only a law catches.
    worker = Worker("controls_softmax", "vbench-kernels", "cpu")
    control = next(c for c in softmax.CORPUS.controls if c.name == "leaking_mask")
    (case,) = control.cases
    request = {"kind": "check", "op": case.op, "case": case.id, "variant": control.name, "role": "own"}
    assert worker.run(request).outcome is Outcome.PASSED
    broken = worker.run(request | {"thorough": True, "off": ["battery"]})
    assert broken.reason == "laws" and broken.metrics and "broken_law.causal_prefix" in broken.metrics


@pytest.mark.parametrize(("spoil", "code"), [("", 0), ('inputs["codes"] & 15, inputs["codes"] & 15', 1)])
def test_a_strangers_backend_gets_a_verdict(
    spoil: str, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The second one reads the low nibble twice."""
    right = 'inputs["codes"] & 15, inputs["codes"] >> 4'
    assert right in plugins.HONEST
    plugins.install(tmp_path, monkeypatch, "honest", plugins.HONEST.replace(right, spoil or right))
    arguments = ("--device", "cpu", "--json", "--out", str(tmp_path / "runs"))
    assert main(["backend", "check", "honest", *arguments]) == code
    body = json.loads(capsys.readouterr().out)
    assert body["exit"] == code and bool(body["violations"]) == bool(code)
    assert body["outcomes"].get("WRONG_VALUE" if code else "PASSED", 0) > 20
    with pytest.raises(UsageError, match="none of these operations"):
        conformance.check_command(
            "honest", ["attention"], device="cpu", effort="quick", seed=0, out=tmp_path, as_json=False
        )


LAWS = {
    "fp4_linear": laws.linear_laws,
    "fp4_quantize": laws.quantize_laws,
    "attention": laws.attention_laws,
    "attention_backward": laws.backward_laws,
    "attention_extended": laws.extended_laws,
    "attention_extended_backward": laws.extended_backward_laws,
    "int8_linear": laws.int8_laws,
}
LAWFUL: tuple[tuple[Op, Case], ...] = (
    (FP4_LINEAR, FP4_LINEAR.case(fmt="mxfp4", x="fp16", m=4, n=8, k=64)),
    (FP4_LINEAR, FP4_LINEAR.case(fmt="nf4", x="bf16", act="relu", m=3, n=8, k=64)),
    (FP4_LINEAR, FP4_LINEAR.case(fmt="nf4", x="fp32", m=3, n=8, k=64)),
    (FP4_QUANTIZE, FP4_QUANTIZE.case(fmt="absmax7_g128", w="fp32", dist="grid", n=4, k=256)),
    (FP4_QUANTIZE, FP4_QUANTIZE.case(fmt="nvfp4", w="bf16", n=4, k=64)),
    (ATTENTION, ATTENTION.case(b=2, hq=4, hk=2, sq=8, sk=12, d=16, causal="bottom_right", layout="padded")),
    (ATTENTION_BACKWARD, ATTENTION_BACKWARD.case(b=2, hq=4, hk=2, sq=8, sk=12, d=16, dlse=1, layout="padded")),
    (ATTENTION_BACKWARD, ATTENTION_BACKWARD.case(dtype="fp32", b=2, hq=2, hk=2, sq=9, sk=7, d=8, causal="top_left")),
    (ATTENTION_EXTENDED, ATTENTION_EXTENDED.case(mask="normal", sinks=1, packed=3, hq=2, hk=1, sq=9, sk=12, d=16)),
    (ATTENTION_EXTENDED_BACKWARD, ATTENTION_EXTENDED_BACKWARD.case(packed=3, alibi=1, hq=2, hk=1, sq=9, sk=12, d=16)),
    (INT8_LINEAR, INT8_LINEAR.case(x="bf16", act_quant="row127", m=4, n=8, k=24)),
)


def spoil(outputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {n: t ^ 1 if t.dtype == torch.uint8 else (t.float() * 1.5).to(t.dtype) for n, t in outputs.items()}


def judged(op: Op, law: Law, numerics: Numerics, outputs: dict[str, torch.Tensor]) -> Outcome:
    expected = resolve(op.oracle)(law.case, law.inputs, numerics, None)
    return check.judge_outputs(outputs, expected, tuple(expected)).outcome


@pytest.mark.parametrize(("op", "case"), LAWFUL, ids=lambda v: v.id if isinstance(v, Case) else "")
def test_the_oracle_keeps_every_law_and_breaks_it_when_spoiled(op: Op, case: Case) -> None:
    """Spoiled: the second run's outputs in the middle of their range, where no law looks away."""
    inputs = resolve(op.inputs)(case, "cpu")
    backend = resolve("vbench.reference.backend:BACKEND")

    numerics = resolve(backend.ops[op.name])(case, "", "cpu").numerics

    def outputs(of: Case, given: dict[str, object]) -> dict[str, torch.Tensor]:
        kernel = resolve(backend.ops[op.name])(of, "", "cpu")
        out = check.poisoned(resolve(op.oracle)(of, given, kernel.numerics, None), "cpu")
        kernel.bind(given, out)()
        return out

    first = outputs(case, inputs)
    found = list(LAWS[op.name](case, inputs))
    assert found
    for law in found:
        if law.declared == "batch_invariant" or (law.numerics is not None and not law.numerics(numerics)):
            continue  # the oracle does not declare it, or rounds nothing that would excuse it
        second = outputs(law.case, law.inputs)
        if law.broken is None:
            within, wide = (judged(op, law, numerics, given) for given in (second, spoil(second)))
            assert within is Outcome.PASSED and wide is not Outcome.PASSED, law.name
            continue
        assert law.broken(first, second) == "", law.name
        assert law.broken(first, spoil(second)) != "", law.name


@pytest.mark.parametrize("x", ["fp16", "bf16"])
def test_what_a_kernel_declares_to_round_decides_which_law_of_one_column_holds(x: str) -> None:
    """nf4's table rounded to x's dtype before its scale, as tensor cores want it: no decoded column bit for bit, and
    within the budget of a kernel that says so; beyond that of one that does not."""
    case = FP4_LINEAR.case(fmt="nf4", x=x, m=8, n=59, k=64, dist="student5")
    inputs = resolve(FP4_LINEAR.inputs)(case, "cpu")
    bitwise, budgeted = (law for law in laws.linear_laws(case, inputs) if law.name.startswith("one_hot"))
    assert (bitwise.name, budgeted.name) == ("one_hot", "one_hot_budget") and bitwise.broken is not None

    @dataclasses.dataclass
    class Kernel:
        numerics: Numerics

    # As triton multiplies nf4; as a library that decodes first; as most; and operands in TF32.
    for numerics, exact in (
        (Numerics("tensor_core", (x,)), False),
        (Numerics("fp32", ("fp32", x)), False),
        (Numerics("tensor_core"), True),
        (Numerics("fp32", ("fp32",)), True),
        (Numerics("tf32"), False),
    ):
        assert (bitwise.binds(Kernel(numerics)), budgeted.binds(Kernel(numerics))) == (exact, not exact)

    dtype = inputs["x"].dtype
    table = torch.tensor(fp4.NF4_TABLE).to(dtype).float()
    w = table[fp4.unpack(inputs["codes"]).long()] * inputs["scale"].repeat_interleave(64, dim=1)
    rounded = {"y": (budgeted.inputs["x"].float() @ w.T).to(dtype)}
    assert "not the decoded column" in bitwise.broken(rounded, rounded)
    assert judged(FP4_LINEAR, budgeted, Numerics("tensor_core", (x,)), rounded) is Outcome.PASSED
    assert judged(FP4_LINEAR, budgeted, Numerics("tensor_core"), rounded) is Outcome.WRONG_VALUE
    # In float32 the order of scales may show, so only the budget holds.
    wide = FP4_LINEAR.case(fmt="nf4", x="fp32", m=8, n=59, k=64)
    names = [law.name for law in laws.linear_laws(wide, resolve(FP4_LINEAR.inputs)(wide, "cpu"))]
    assert "one_hot_budget" in names and "one_hot" not in names


def test_laws_of_an_operation_without_any() -> None:
    assert list(registry.laws_of("svd")(CASE, {})) == []
