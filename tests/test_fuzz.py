"""``vbench fuzz``: a kernel that dies, hangs or errs on a few shapes is found, shrunk and kept; all else is counted."""

from __future__ import annotations

import itertools
import json
import math
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests import plugins
from vbench import documents, fuzz, fuzz_command, plan, registry, regressions, tallies
from vbench.claims import load_ledger
from vbench.cli import main
from vbench.errors import DataError, UsageError
from vbench.fuzz import Found, Fuzz, Pool, Target, Task
from vbench.record import BROKEN_LAW, ErrorStats, Outcome, Record
from vbench.reference.ops.fp4 import FP4_DEQUANTIZE
from vbench.spec import Case, Frame, case_hash, size_class
from vbench.store import RunStore, read_records
from vbench.suites.attention import SUITE as ATTENTION_SUITE
from vbench.suites.fp4 import SUITE as FP4_SUITE

#: Right but for one shape in sixteen, where it is what its variant says.
DEADLY = """
    import os, signal, time
    from vbench.backend import Availability, DeclaredBackend
    from vbench.spec import Numerics, resolve
    from vbench.reference.ops.fp4 import FP4_DEQUANTIZE as OP

    BACKEND = DeclaredBackend(
        name="deadly", role="own", summary="dies on a few shapes", ops={"fp4_dequantize": "plugin_deadly:make"},
        variants={"fp4_dequantize": ("aborts", "segfaults", "hangs", "errs")}, probe_function="plugin_deadly:probe",
    )

    def probe(device):
        return Availability(usable=True)

    class Kernel:
        numerics = Numerics("fp32")
        produces = ("weight",)
        deterministic = True

        def __init__(self, case, variant):
            self.case, self.variant = case, variant

        def bind(self, inputs, out):
            right = resolve(OP.oracle)(self.case, inputs, self.numerics, None)["weight"].value

            def launch():
                n, k = self.case.axis("n"), self.case.axis("k")
                out["weight"].copy_(right)
                if n % 16 != 13:
                    return
                if self.variant == "aborts":
                    os.abort()
                elif self.variant == "segfaults":
                    os.kill(os.getpid(), signal.SIGSEGV)
                elif self.variant == "hangs" and k > 2:
                    time.sleep(3600)
                elif self.variant == "errs":
                    out["weight"][12, 0] += 1
            return launch

    def make(case, variant, device):
        return Kernel(case, variant)
"""

TARGET = Target("fp4", FP4_DEQUANTIZE, FP4_SUITE.generated[1], 1)


@pytest.fixture
def deadly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    plugins.install(tmp_path, monkeypatch, "deadly", DEADLY)
    yield tmp_path


def search(folder: Path, variants: tuple[str, ...], cases: list[Case], deadline_s: float = 60.0) -> Fuzz:
    """One round of these cases with two workers."""
    import dataclasses

    info = dataclasses.replace(registry.backends()["deadly"], variants={"fp4_dequantize": variants})
    store = RunStore(folder / "run", {})
    pool = Pool(info, "cpu", folder, 2)
    run = Fuzz("run", info, "cpu", store, pool, {"hardware": "cpu"}, 60.0, deadline_s)
    try:
        run.replay(TARGET, cases)
    finally:
        pool.close()
        store.close()
    assert [r.id for r in read_records(store.path)] == [r.id for r in run.records]
    return run


def shapes(*sizes: tuple[int, int]) -> list[Case]:
    return [FP4_DEQUANTIZE.case(fmt="nvfp4", y="fp16", dist="uniform", n=n, k=k, seed=3) for n, k in sizes]


def test_deaths_and_errors_are_shrunk_and_every_other_case_counts(deadly: Path) -> None:
    cases = shapes(*((n, 32) for n in range(40, 50)))
    run = search(deadly, ("aborts", "errs"), cases)
    rounds = {r.variant: r.metrics for r in run.records if r.kind == "fuzz"}
    for metrics in rounds.values():
        counts = {name: metrics[name] for name in ("cases", "passed", "refused", "failed")}
        assert counts == {"cases": 10, "passed": 9, "refused": 0, "failed": 1}
    found = {r.variant: r for r in run.shrunk}
    assert found["aborts"].outcome is Outcome.CRASHED and found["aborts"].reason == "signal_6"
    assert found["errs"].outcome is Outcome.WRONG_VALUE
    for record in found.values():
        # The least that fails: thirteen rows of the smallest block, everything else plain.
        assert record.case == "fp4_dequantize[fmt=absmax7_tensor,y=bf16,dist=normal,n=13,k=2]"
        assert "no step smaller fails" in record.detail and "n=45" in record.detail
    originals = {r.case for r in run.records if r.kind == "check"} - {r.case for r in run.shrunk}
    assert originals == {cases[5].id}


def test_a_hang_is_shrunk_within_its_limits(deadly: Path) -> None:
    cases = [FP4_DEQUANTIZE.case(fmt="absmax7_tensor", n=n, k=6) for n in (12, 13, 14)]
    run = search(deadly, ("hangs",), cases, deadline_s=4.0)
    (record,) = run.shrunk
    assert (record.outcome, record.reason) == (Outcome.TIMEOUT, "deadline")
    assert record.case == FP4_DEQUANTIZE.case(fmt="absmax7_tensor", n=13, k=4).id
    (metrics,) = [r.metrics for r in run.records if r.kind == "fuzz"]
    assert (metrics["passed"], metrics["failed"]) == (2, 1)


def test_the_command_finds_shrinks_keeps_reproduces_and_replays(
    deadly: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(fuzz.ROUND, "cpu", 60)
    kept, out = deadly / "kept.jsonl", deadly / "out"
    options = ["fuzz", "--backend", "deadly", "--suite", "fp4", "--device", "cpu", "--out", str(out)]
    options += ["--regressions", str(kept), "--json"]
    real = registry.backends

    def only(variant: str) -> None:
        import dataclasses

        def listed() -> dict[str, registry.BackendInfo]:
            return {n: dataclasses.replace(i, variants={"fp4_dequantize": (variant,)}) for n, i in real().items()}

        monkeypatch.setattr(registry, "backends", listed)

    only("segfaults")
    assert main([*options, "--cases", "40", "--seed", "7"]) == 1
    body = json.loads(capsys.readouterr().out)
    assert body["failed"] >= 1 and body["passed"] + body["refused"] + body["failed"] == body["cases"]
    (line,) = regressions.load(kept)
    assert (line.backend, line.outcome, line.reason) == ("deadly[segfaults]", "CRASHED", "signal_11")
    assert body["regressions_added"] == [line.case]
    assert FP4_DEQUANTIZE.parse(line.case).axis("n") == 13
    # What was printed reproduces it in a fresh process.
    arguments = [
        "repro",
        case_hash(line.case),
        "--run",
        body["run"],
        "--out",
        str(out),
        "--backend",
        "deadly[segfaults]",
    ]
    assert main(arguments) == 1
    assert "CRASHED" in capsys.readouterr().out
    # A later run tries it first, though it draws other cases; and it is not kept twice.
    assert main([*options, "--cases", "1", "--seed", "5"]) == 1
    body = json.loads(capsys.readouterr().out)
    assert line.case in {v["case"] for v in body["violations"]} and body["cases"] == 1
    assert len(regressions.load(kept)) == 1
    # The control: where nothing dies, nothing is found.
    only("honest")
    assert main([*options, "--cases", "20"]) == 0
    body = json.loads(capsys.readouterr().out)
    assert body["violations"] == [] and body["passed"] >= 20


def test_a_given_case_is_shrunk_for_one_kernel_and_nothing_is_drawn(
    deadly: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    case = FP4_DEQUANTIZE.case(fmt="nvfp4", n=45, k=16)
    options = ["--suite", "fp4", "--device", "cpu", "--out", str(deadly / "out"), "--case", case.id, "--json"]
    assert main(["fuzz", "--backend", "deadly[errs]", *options]) == 1
    body = json.loads(capsys.readouterr().out)
    assert body["cases"] == 1 and {v["who"] for v in body["violations"]} == {"deadly[errs]"}
    small = FP4_DEQUANTIZE.case(fmt="absmax7_tensor", n=13, k=2).id
    assert {v["case"] for v in body["violations"]} == {case.id, small}
    # A stranger's failures go into no file of ours.
    assert body["regressions_added"] == []
    # What there is not is named.
    assert main(["fuzz", "--backend", "deadly[sleeps]", *options]) == 2
    assert main(["fuzz", "--backend", "deadly", *options[:-2], "fp4_dequantize[n=1,shape=2]"]) == 2
    assert "'sleeps'" in capsys.readouterr().err


def test_a_limit_begins_nothing_more_and_says_so(deadly: Path) -> None:
    info = registry.backends()["deadly"]
    pool = Pool(info, "cpu", deadly, 1)
    pool.until = 0.0
    tasks = [Task(case, "errs", 0, 9.0) for case in shapes((4, 16), (5, 16))]
    answers = pool.start(tasks)()
    pool.close()
    found = [Found.of(t, a) for t, a in zip(tasks, answers, strict=True)]
    assert {(f.outcome, f.reason) for f in found} == {(Outcome.UNAVAILABLE, "time_limit")}
    assert fuzz.round_metrics(found, 1.0)["cases"] == 0


def test_a_limit_cuts_off_what_is_under_way_and_blames_no_kernel(deadly: Path) -> None:
    """A case that hangs, or still compiles, when time is up: the search ends then, not at the case's own deadline."""
    info = registry.backends()["deadly"]
    pool = Pool(info, "cpu", deadly, 1)
    assert isinstance(pool.probe(), dict)
    began = time.monotonic()
    pool.until = began + 3.0
    case = FP4_DEQUANTIZE.case(fmt="absmax7_tensor", n=13, k=6)
    task = Task(case, "hangs", 0, 600.0)
    (answer,) = pool.start([task])()
    pool.close()
    got = Found.of(task, answer)
    assert (got.outcome, got.reason) == (Outcome.UNAVAILABLE, "time_limit") and not got.failed
    assert "under way" in got.detail and time.monotonic() - began < 120


def test_rounds_double_up_to_their_size() -> None:
    for device, most in fuzz.ROUND.items():
        sizes = [fuzz.cases_of_round(device, number) for number in range(40)]
        assert sizes[0] == fuzz.FIRST_ROUND and sizes[-1] == most
        assert all(b == min(most, 2 * a) for a, b in itertools.pairwise(sizes))


# -- parts -------------------------------------------------------------------------------------------------------------


def found(outcome: Outcome, ratio: float | None = None, reason: str = "", **fields: Any) -> Found:
    error = None if ratio is None else ErrorStats("weight", 4, 0, ratio, None, 1.0)
    return Found(Task(shapes((4, 16))[0], "", 0, 1.0), outcome, reason, "", {"error": error, **fields})


def test_metrics_count_everything_and_the_distribution_holds_what_passed() -> None:
    some = [found(Outcome.PASSED, r) for r in (0.0, 0.05, 0.051, 0.96, 1.0)]
    some += [found(Outcome.WRONG_VALUE, 7.0), found(Outcome.UNSUPPORTED), found(Outcome.CRASHED)]
    some.append(found(Outcome.PASSED, first_launch_s=3.0, steady_launch_s=1.0, elapsed_s=5.0))
    metrics = fuzz.round_metrics(some, 9.0)
    assert [metrics[n] for n in ("cases", "passed", "refused", "failed")] == [9, 6, 1, 2]
    assert {n: metrics[n] for n in metrics if n == "exact" or n.startswith("to_")} == {
        "exact": 1, "to_0.05": 1, "to_0.10": 1, "to_1.00": 2,
    }  # fmt: skip
    assert (metrics["worst"], metrics["compile_s"], metrics["worker_s"]) == (1.0, 2.0, 5.0)
    assert fuzz.distribution([]) == {}


@given(st.lists(st.floats(0, 1), min_size=1, max_size=60), st.integers(1, 59), st.sampled_from((0.5, 0.9, 0.99)))
def test_quantiles_of_rounds_together_are_those_of_all_cases_to_within_a_bin(
    ratios: list[float], cut: int, part: float
) -> None:
    rounds = [
        Record(f"fuzz[op=x,round={i}]", "b", "fuzz", Outcome.PASSED, "run", metrics=fuzz.distribution(some))
        for i, some in enumerate((ratios[:cut], ratios[cut:]))
    ]
    (tally,) = tallies.tallies(rounds).values()
    true = sorted(ratios)[math.ceil(part * len(ratios)) - 1]
    end = tally.at_most(part)
    assert end is not None and end - tallies.BIN - 1e-9 <= true <= end + 1e-9
    assert tally.worst == max(ratios) and sum(tally.bins.values()) == len(ratios)


def test_each_law_is_a_kind_of_failure_of_its_own() -> None:
    """So that shrinking one does not end at another, and ten of one do not hide the other."""
    one, other = (replace(found(Outcome.WRONG_VALUE), fields={"metrics": {f"{BROKEN_LAW}{n}": 1.0}}) for n in "ab")
    assert one.what == replace(one, detail="x").what != other.what


def test_a_document_shows_the_search_and_rests_on_its_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "<!-- vbench:table search backend=b hardware=cpu -->\n<!-- /vbench -->\n"
    ledger = load_ledger(next(iter(registry.ledger_paths().values())))

    def a_round(number: int, digest: str) -> Record:
        metrics = fuzz.round_metrics([found(Outcome.PASSED, 0.31), found(Outcome.UNSUPPORTED)], 1.0)
        case, where = f"fuzz[op=x,round={number}]", {"hardware": "cpu"}
        return Record(case, "b", "fuzz", Outcome.PASSED, "run", metrics=metrics, environment=where, sources=digest)

    refused = fuzz.round_metrics([found(Outcome.UNSUPPORTED)] * 3, 1.0)
    records = [a_round(0, "now"), a_round(1, "now"), a_round(2, "then")]
    # Whatever was refused as a whole rests on no sources.
    records.append(replace(a_round(3, ""), metrics=refused))
    shown = documents.update(text, ledger, records, current_sources=lambda r: "now", where="d")
    assert "| x | b | 7 | 2 | 5 | 0 | 0 | 0.35 | 0.35 | 0.35 | 0.310 |" in shown
    assert "STALE: 1 rounds" in shown
    assert documents.evidence(text, ledger, records, current_sources=lambda r: "now") == records
    assert "no_records" in documents.update(text, ledger, [], current_sources=lambda r: None, where="d")


@pytest.mark.parametrize("suite", [FP4_SUITE, ATTENTION_SUITE], ids=lambda s: s.name)
def test_cases_on_a_gpu_keep_to_few_frames(suite: Any) -> None:
    """So does the time to compile: a fixed number of kernels however many cases are drawn."""
    ops = registry.ops()
    targets = fuzz.targets_of([suite], ops, list(ops), "cuda", 16, 0)
    assert {t.generated for t in targets} == {*suite.generated, *suite.searched}
    for target in targets:
        if not target.generated.frame:
            assert target.frames == ()
            continue
        assert 1 <= len(target.frames) <= 16
        names = target.generated.frame
        cases = [c for c in target.cases(0, 0, 120) if target.op.reject(c) is None]
        fixed = {frame.fixed for frame in target.frames}
        inside = [c for c in cases if Frame.of(target.op, c, names) in set(target.frames)]
        # A size that had to grow for the answer to mean something may leave its class.
        assert len(inside) >= 0.8 * len(cases)
        assert sum(tuple((n, c[n]) for n in names) in fixed for c in cases) >= 0.9 * len(cases)
        assert len({c.id for c in cases}) > 2 * len(fixed)
        # control: without frames the same number of draws needs more compilations
        free = Target(suite.name, target.op, target.generated, target.number).cases(0, 0, 120)
        assert len({tuple(c[n] for n in names) for c in free}) > len({tuple(c[n] for n in names) for c in cases})


def test_rounds_are_the_same_for_the_same_seed_and_differ_between_rounds() -> None:
    assert TARGET.cases(1, 2, 20) == TARGET.cases(1, 2, 20)
    assert len({tuple(c.id for c in TARGET.cases(s, r, 20)) for s in (1, 2) for r in (0, 1)}) == 4


def test_large_cases_are_not_for_an_interpreter() -> None:
    ops = registry.ops()
    small = fuzz.targets_of([ATTENTION_SUITE], ops, list(ops), "cpu", 0, 0)
    assert {t.generated for t in small} == set(ATTENTION_SUITE.generated)


def test_size_classes() -> None:
    assert [size_class(v) for v in (0, 1, 16, 48, 2, 17)] == ["zero", "one", "sixteens", "sixteens", "other", "other"]


def test_a_resumed_search_does_the_rounds_that_are_missing() -> None:
    def record(number: str) -> Record:
        return Record(f"fuzz[op=x,{number}]", "b", "fuzz", Outcome.PASSED, "run")

    done = [record("seed=0,round=0"), record("seed=0,round=2"), record("regressions")]
    assert list(itertools.islice(fuzz_command._untried(done), 3)) == [1, 3, 4]


def test_resume_refuses_what_is_no_search(tmp_path: Path) -> None:
    RunStore(tmp_path / "other", {"command": "run"}).close()
    assert main(["fuzz", "--resume", "other", "--out", str(tmp_path)]) == 2
    assert main(["fuzz", "--out", str(tmp_path)]) == 2
    assert main(["fuzz", "--backend", "triton", "--cases", "0", "--out", str(tmp_path)]) == 2


# -- regressions -------------------------------------------------------------------------------------------------------


def test_regressions_come_before_the_fixed_cases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import dataclasses

    case = FP4_DEQUANTIZE.case(fmt="nf4", n=3, k=64)
    record = Record(case.id, "b", "check", Outcome.CRASHED, "run", reason="signal_6")
    path = tmp_path / "kept.jsonl"
    assert [one.case for one in regressions.add(path, "fp4", [record, record])] == [case.id]
    assert regressions.add(path, "fp4", [record]) == []
    monkeypatch.setattr(regressions, "data_file", lambda _: path)
    cases = plan.check_cases(dataclasses.replace(FP4_SUITE, regressions="any:file"), "quick", 0)
    assert cases[0] == case and cases[1] == FP4_SUITE.checks[0]
    other = dataclasses.replace(ATTENTION_SUITE, regressions="any:file")
    assert regressions.cases_of(other) == () and regressions.cases_of(dataclasses.replace(other, regressions="")) == ()


@pytest.mark.parametrize(
    ("line", "rule"),
    [
        ("{", "no regression"),
        ('{"suite": "fp4"}', "no regression"),
        ('{"suite": "fp4", "case": "c", "backend": "b", "outcome": "BAD", "reason": "", "found": ""}', "no regression"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, rule: str) -> None:
    path = tmp_path / "kept.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(DataError, match=rf"kept\.jsonl:1: {rule}"):
        regressions.load(path)


def test_a_case_that_is_none_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "kept.jsonl"
    monkeypatch.setattr(regressions, "data_file", lambda _: path)
    for case in ("fp4_dequantize[n=x]", "nothing[n=1]"):
        path.write_text(
            json.dumps({"suite": "fp4", "case": case, "backend": "b", "outcome": "PASSED", "reason": "", "found": ""})
            + "\n"
        )
        with pytest.raises(DataError, match=r"kept\.jsonl"):
            regressions.cases_of(FP4_SUITE)


def test_the_committed_regressions_are_cases_of_their_suites() -> None:
    for suite in registry.suites().values():
        for case in regressions.cases_of(suite):
            assert registry.ops()[case.op].reject(case) is None


def test_an_unknown_backend_is_an_error_of_usage() -> None:
    with pytest.raises(UsageError, match="did you mean 'triton'"):
        registry.choose("backend", ["tritn"], registry.backends())
