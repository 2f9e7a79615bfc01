"""The self-attack corpus: its size, that each oracle is needed, and that survivors and accusations are seen."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from vbench import attack, check, fence, integrity, registry, timing
from vbench.cli import main
from vbench.control import HONEST, Control, Corpus
from vbench.controls import conduct, gpu, planted, products, softmax, stack, table
from vbench.errors import UsageError
from vbench.record import Outcome, Record
from vbench.reference.ops import OPS
from vbench.worker import Result, Worker

CORPORA: Mapping[str, Corpus] = {c.CORPUS.name: c.CORPUS for c in (products, softmax, conduct, stack, planted, gpu)}
CONTROLS = {control.name: (name, control) for name, corpus in CORPORA.items() for control in corpus.controls}

#: For each oracle the control that survives without it; another test holds the list to be complete.
NEEDED = {
    "produces": "missing_lse",
    "precision": "declared_coarse",
    "plain_tensor": "lazy_tensor",
    "shape": "extra_dimension",
    "dtype": "wide_output",
    "stride": "transposed_view",
    "nonfinite": "nan_dq_rows",
    "value": "dropped_last_tile",
    "exact_grid": "ties_away_store",
    "poison": "uninitialised_rows",
    "red_zones": "write_past_end",
    "inputs_unchanged": "codes_made_canonical",
    "rerun": "right_once",
    "rerun_bitwise": "changing_order",
    "after_timing": "right_until_timed",
    "patched": "patched_comparison",
    "rebind": "replay_by_pointer",
    "battery": "zeros_under_lax_tolerance",
    "laws": "leaking_mask",
    "batch_invariance": "split_by_tokens",
}


@pytest.fixture(scope="module")
def workers() -> dict[str, Worker]:
    return {name: Worker(name, registry.OWN_DISTRIBUTION, "cpu") for name in CORPORA}


def outcomes(worker: Worker, control: Control, end: str, off: tuple[str, ...]) -> list[Result]:
    cases = control.twin_cases if end else control.cases
    request = {"kind": control.kind, "op": control.op, "variant": control.name + end, "role": "own"}
    return [worker.run(request | {"case": case.id, "thorough": True, "off": off}) for case in cases]


def test_the_corpus_is_large_and_runs_on_a_cpu() -> None:
    assert len(CONTROLS) == sum(len(corpus.controls) for corpus in CORPORA.values()) >= 60
    assert sum(control.needs == "cpu" for _, control in CONTROLS.values()) >= 45
    assert len({control.family for _, control in CONTROLS.values()}) >= 12


def test_an_error_of_twice_the_budget_is_planted_in_every_operation() -> None:
    assert {control.op for control in planted.CORPUS.controls} == {op.name for op in OPS}


def test_controls_name_oracles_and_exceptions_only_of_isolation() -> None:
    for _, control in CONTROLS.values():
        named = {control.oracle, *control.or_by}
        assert named <= {*check.ORACLES, "isolation"}, control.name
        assert not control.raises or "isolation" in named, control.name


def test_every_oracle_has_a_control() -> None:
    assert set(NEEDED) == set(check.ORACLES) == set(attack.FINDINGS)
    assert {oracle: CONTROLS[name][1].oracle for oracle, name in NEEDED.items()} == {o: o for o in NEEDED}


@pytest.mark.parametrize("oracle", check.ORACLES)
def test_each_oracle_is_needed(oracle: str, workers: dict[str, Worker]) -> None:
    """With all oracles the control is caught and its twin passes; without this one the control passes too."""
    corpus, control = CONTROLS[NEEDED[oracle]]
    worker = workers[corpus]
    caught = outcomes(worker, control, "", ())
    assert any(attack.as_named(control, record(control, "", r.outcome, r.reason)) for r in caught), caught
    assert [r.outcome for r in outcomes(worker, control, HONEST, ())] == [Outcome.PASSED] * len(control.twin_cases)
    blind = outcomes(worker, control, "", (oracle,))
    assert [(r.outcome, r.detail) for r in blind] == [(Outcome.PASSED, "")] * len(control.cases)


def test_a_clock_whose_samples_no_measurement_admits_is_a_patched_one(workers: dict[str, Worker]) -> None:
    corpus, control = CONTROLS["patched_timer"]
    (found,) = outcomes(workers[corpus], control, "", ())
    assert (found.outcome, found.reason) == (Outcome.INVALID, "patched") and "perf_counter" in found.detail


def record(control: Control, end: str, outcome: Outcome, reason: str = "") -> Record:
    variant = control.name + end
    return Record(control.cases[0].id, "corpus", "check", outcome, "run", variant=variant, reason=reason, role="own")


def told(pairs: list[tuple[str, Control]], records: list[Record]) -> tuple[dict[str, Any], str]:
    findings = attack.judge(pairs, records)
    body = attack.summary(findings)
    return body, "\n".join(attack.lines(findings, body))


def test_survivors_and_accused_twins_are_told_and_end_with_one() -> None:
    (one, two) = (CONTROLS[name][1] for name in ("swapped_nibbles", "illegal_access"))
    pairs = [("corpus", one), ("corpus", two)]
    good = [
        record(one, "", Outcome.WRONG_VALUE, "value"),
        record(one, HONEST, Outcome.PASSED),
        record(two, "", Outcome.CRASHED, "signal_11"),
        record(two, HONEST, Outcome.PASSED),
    ]
    body, _ = told(pairs, good)
    assert (body["controls"], body["caught"], body["twins_accused"], body["not_run"]) == (2, 2, 0, 0)
    assert attack.exit_code(body) == 0
    for spoiled, key, name in (
        (replace(good[0], outcome=Outcome.PASSED, reason=""), "survivors", "swapped_nibbles"),
        (replace(good[0], outcome=Outcome.UNSUPPORTED), "survivors", "swapped_nibbles"),
        (replace(good[1], outcome=Outcome.WRONG_VALUE), "accused", "swapped_nibbles"),
        # A twin that refuses its case proves nothing, so it is no twin.
        (replace(good[1], outcome=Outcome.UNSUPPORTED), "accused", "swapped_nibbles"),
    ):
        body, text = told(pairs, [spoiled, *(g for g in good if g.variant != spoiled.variant)])
        assert list(body[key]) == [name] and attack.exit_code(body) == 1
        assert any(name in line and ("SURVIVED" in line or "ACCUSED" in line) for line in text.splitlines())


@pytest.mark.parametrize(
    ("name", "outcome", "reason"),
    [
        # Caught by what another fault would be caught by.
        ("swapped_nibbles", Outcome.WRONG_SHAPE, "shape"),
        ("swapped_nibbles", Outcome.RUNTIME_ERROR, "AttributeError"),
        ("swapped_nibbles", Outcome.CRASHED, "exit_1"),
        ("nan_wildcard", Outcome.WRONG_VALUE, "value"),
        ("right_once", Outcome.WRONG_VALUE, "value"),
        # An exception, but not the one that its fault is.
        ("eloquent_bug", Outcome.RUNTIME_ERROR, "ModuleNotFoundError"),
        ("device_assert", Outcome.RUNTIME_ERROR, "ImportError"),
        ("illegal_access", Outcome.RUNTIME_ERROR, "RuntimeError"),
    ],
)
def test_what_another_oracle_ends_is_not_caught(name: str, outcome: Outcome, reason: str) -> None:
    control = CONTROLS[name][1]
    records = [record(control, "", outcome, reason), record(control, HONEST, Outcome.PASSED)]
    body, text = told([("corpus", control)], records)
    assert (body["caught"], body["survivors"], attack.exit_code(body)) == (0, [name], 1)
    assert f"but ended {outcome.value}({reason})" in text


def test_a_race_may_be_seen_late() -> None:
    control = CONTROLS["missing_barrier"][1]
    for outcome, reason in ((Outcome.WRONG_VALUE, "value"), (Outcome.NONDETERMINISTIC, "rerun_differs")):
        assert attack.as_named(control, record(control, "", outcome, reason))


def test_a_control_that_ends_as_its_twin_does_is_not_caught() -> None:
    control = CONTROLS["swapped_nibbles"][1]
    records = [record(control, end, Outcome.WRONG_VALUE, "value") for end in ("", HONEST)]
    body, _ = told([("corpus", control)], records)
    assert (body["caught"], body["survivors"], body["twins_accused"]) == (0, ["swapped_nibbles"], 1)


@pytest.mark.parametrize("name", ["swapped_nibbles", "eloquent_bug"])
def test_a_twin_that_dies_breaks_the_pair(name: str) -> None:
    """As where numba cannot be imported: the control dies of it too, and neither shows anything."""
    control = CONTROLS[name][1]
    for reason in ("AttributeError", "RuntimeError"):
        records = [record(control, end, Outcome.RUNTIME_ERROR, reason) for end in ("", HONEST)]
        body, text = told([("corpus", control)], records)
        counted = [body[key] for key in ("controls", "caught", "twins_accused", "not_run", "survivors")]
        assert counted == [0, 0, 0, 1, []] and list(body["broken"]) == [name]
        assert attack.exit_code(body) == 1 and "BROKEN" in text and reason in text


def test_what_cannot_run_here_is_counted_and_alone_is_no_success() -> None:
    control = CONTROLS["swapped_nibbles"][1]
    records = [record(control, end, Outcome.UNAVAILABLE, "needs_cuda") for end in ("", HONEST)]
    for given in (records, []):
        body = attack.summary(attack.judge([("corpus", control)], given))
        assert (body["controls"], body["not_run"]) == (0, 1) and attack.exit_code(body) == 3


def test_the_command_runs_workers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A sample, one that kills its worker among it; the whole corpus runs in .ci/run."""
    names = ("swapped_nibbles", "exits", "planted_svd")
    arguments = [a for name in names for a in ("--control", name)]
    assert main(["selftest", *arguments, "--device", "cpu", "--json", "--out", str(tmp_path)]) == 0
    body = json.loads(capsys.readouterr().out)
    assert (body["controls"], body["caught"], body["twins_accused"], body["survivors"]) == (3, 3, 0, [])


def test_an_unknown_control_is_refused() -> None:
    with pytest.raises(UsageError, match="did you mean 'swapped_nibbles'"):
        attack.chosen(["swaped_nibbles"])


def test_an_installation_without_controls_is_no_success(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "corpora", dict)
    with pytest.raises(UsageError, match="install it again"):
        attack.chosen([])


# -- the document ------------------------------------------------------------------------------------------------------

DOCUMENT = (Path(__file__).parent.parent / "docs" / "controls.md").read_text(encoding="utf-8")


def rows_by_k() -> list[list[str]]:
    body = DOCUMENT.partition("|---|")[2].partition("## All")[0]
    return [line.strip("| ").split(" | ") for line in body.splitlines() if line.startswith("| ")]


def test_the_document_lists_the_corpus() -> None:
    """Figures differ in their last digits from machine to machine; the list and the shape must not."""
    generated = table.document_list()
    assert DOCUMENT.endswith("\n".join([*generated, ""])) and len(generated) > len(CONTROLS)
    by_k = {c.name for corpus in table.CORPORA for c in corpus.controls if table.over_k(c)}
    assert {row[0] for row in rows_by_k()} == by_k


def test_the_documents_twins_use_their_budgets_and_what_is_planted_exceeds_it() -> None:
    """A twin below a twentieth would mean a budget that hides faults twenty times as large as honest errors."""
    for name, _, *cells in rows_by_k():
        assert len(cells) == len(table.K)
        for cell in cells:
            twin, _, wrong = cell.partition(", grid")[0].partition(" / ")
            assert 0.05 <= float(twin) <= 1, name
            assert "planted" not in name or float(wrong) > 1.5, name


# -- red zones and tampering -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.uint8, torch.float8_e4m3fn])
def test_a_fenced_tensor_is_the_same_tensor(dtype: torch.dtype) -> None:
    raw = torch.arange(4 * 24, dtype=torch.uint8).view(4, 24)
    wide = raw.view(dtype) if dtype.itemsize == 1 else raw.to(dtype)
    for t in (wide, wide.T, wide[1:, 3:11], wide[:, ::3], wide[:1].expand(5, 24)):
        made = fence.fence(t, fence.INPUT_FILL)
        assert check.same_bits(made.tensor, t) and made.tensor.stride() == t.stride()
        assert made.tensor.data_ptr() % fence.LINE_BYTES == t.data_ptr() % fence.LINE_BYTES
        assert made.breach() == ""


def test_gaps_between_rows_are_kept_and_a_write_on_either_side_is_told() -> None:
    rows = torch.full((3, 8), torch.nan)
    t = rows[:, :5].copy_(torch.ones(3, 5))
    made = fence.fence(t, fence.OUTPUT_FILL)
    assert bool(made.tensor.as_strided((1,), (1,), made.tensor.storage_offset() + 5).isnan())
    end = made.tensor.as_strided((1,), (1,), made.tensor.storage_offset() + 2 * 8 + 5)
    end.fill_(1.0)
    assert "after" in made.breach()
    before = fence.fence(t, fence.OUTPUT_FILL)
    before.tensor.as_strided((1,), (1,), before.tensor.storage_offset() - 1).zero_()
    assert "before" in before.breach() and fence.first_breach({"output": [before]}).startswith("output: ")


def test_a_patched_clock_is_named_and_put_back() -> None:
    captured, clock = integrity.capture(), vars(timing)["perf_counter"]
    assert captured.altered() == []
    vars(timing)["perf_counter"] = lambda: 0.0
    assert captured.altered() == ["vbench.timing.perf_counter"]
    assert vars(timing)["perf_counter"] is clock and captured.altered() == []
