"""Verdicts from synthetic records, and the exit code. Each rule has a control that turns the verdict."""

from __future__ import annotations

import hashlib
import math
import random
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from vbench import student
from vbench.claims import Ledger, arithmetic_metrics, load_ledger, parse_ledger
from vbench.errors import DataError
from vbench.judge import SINGLE_PROCESS_MARGIN, ClaimVerdict, Finding, case_params, exit_code, judge, may_rest_on
from vbench.record import ErrorStats, Kind, Measurement, Outcome, Record

OURS = Path(__file__).parents[1] / "suites" / "virtual_blackwell" / "claims.toml"


def same(record: Record) -> str | None:
    """No source has changed."""
    return record.sources


def unknown(record: Record) -> str | None:
    return None


def linear_case(fmt: str = "nvfp4", m: int = 1, n: int = 64) -> str:
    return f"fp4_linear[fmt={fmt},x=bf16,m={m},n={n},k=64]"


def timed(
    who: str,
    seconds: float | Sequence[float],
    *,
    case: str = "",
    run: str = "r1",
    role: str = "",
    outcome: Outcome = Outcome.PASSED,
    hardware: str = "sm_90",
    quantity: Any = "graph",
    **more: Any,
) -> Record:
    backend, _, variant = who.partition("[")
    samples = (seconds,) if isinstance(seconds, int | float) else tuple(seconds)
    return Record(
        case=case or linear_case(),
        backend=backend,
        variant=variant.rstrip("]"),
        kind="time",
        outcome=outcome,
        run=run,
        role=role or ("own" if backend == "triton" else "peer"),
        measurements=(Measurement(quantity, samples),) if samples else (),
        environment={"hardware": hardware},
        **more,
    )


def checked(
    who: str,
    metrics: Mapping[str, float] | None = None,
    *,
    case: str = "fp4_quantize[fmt=nvfp4,n=4,k=16]",
    outcome: Outcome = Outcome.PASSED,
    role: str = "own",
    hardware: str = "cpu",
    kind: Kind = "check",
    **more: Any,
) -> Record:
    backend, _, variant = who.partition("[")
    return Record(
        case=case,
        backend=backend,
        variant=variant.rstrip("]"),
        kind=kind,
        outcome=outcome,
        run=more.pop("run", "r1"),
        role=role,
        metrics=metrics or {},
        environment={"hardware": hardware} if hardware else {},
        **more,
    )


def ledger(
    *,
    metric: str = "ratio",
    quantity: str = "time.graph",
    kind: str = "time",
    backend: str = "triton",
    over: str = "torch_native[cublas_bf16]",
    select: str = 'op = "fp4_linear", n = 64, m = [1, 4]',
    reduce: str = "min over m of max over fmt",
    holds: str = ">= 2",
    hardware: str = "sm_90",
    reviewed: str = 'sm_90 = "SUPPORTED"',
    claim_hardware: str = "rtx3070",
    stated: str = "",
    over_select: str = "",
) -> Ledger:
    over_line = f'over = "{over}"\n  {over_select}' if metric == "ratio" else ""
    quantity_line = "" if metric == "fraction_passed" else f'quantity = "{quantity}"'
    return parse_ledger(
        f"""
document = "d"
document_sha256 = "{"0" * 64}"
[[claim]]
id = "a.b"
section = "s"
says = "t"
hardware = "{claim_hardware}"
{stated}
  [claim.restated]
  sentence = "bf16"
  metric = "{metric}"
  {quantity_line}
  kind = "{kind}"
  backend = "{backend}"
  {over_line}
  select = {{{select}}}
  reduce = "{reduce}"
  holds = "{holds}"
  hardware = "{hardware}"
  reviewed = {{{reviewed}}}
""",
        "t.toml",
    )


def one(book: Ledger, records: Sequence[Record], current: Any = same) -> ClaimVerdict:
    (verdict,) = judge(book, records, current_sources=current)
    return verdict


def restated(book: Ledger, records: Sequence[Record], current: Any = same) -> Finding:
    found = one(book, records, current).restated
    assert found is not None
    return found


def grid(ratio: float, *, runs: Sequence[float] = (1.0,)) -> list[Record]:
    """Ours and cuBLAS at m 1 and 4 in two formats; nvfp4 is ``ratio`` times as fast, the other half of that.

    ``runs``: one factor on the ratio for each process run.
    """
    records = []
    for number, factor in enumerate(runs):
        run = f"r{number}"
        for m in (1, 4):
            for fmt, part in (("nvfp4", 1.0), ("absmax7_row", 0.5)):
                case = linear_case(fmt, m)
                records.append(timed("torch_native[cublas_bf16]", 1e-5, case=case, run=run))
                records.append(timed("triton", 1e-5 / (ratio * part * factor), case=case, run=run))
    return records


# -- ratios of times ---------------------------------------------------------------------------------------------------


@given(st.floats(0.5, 10), st.floats(0.5, 10))
def test_one_process_decides_only_outside_its_margin(ratio: float, threshold: float) -> None:
    found = restated(ledger(holds=f">= {threshold!r}"), grid(ratio))
    assert found.value == pytest.approx(ratio)
    assert found.low == pytest.approx(ratio * (1 - SINGLE_PROCESS_MARGIN))
    assert found.high == pytest.approx(ratio * (1 + SINGLE_PROCESS_MARGIN))
    assume(abs(ratio * 0.9 / threshold - 1) > 1e-6 and abs(ratio * 1.1 / threshold - 1) > 1e-6)
    if ratio * 0.9 > threshold:
        assert found.label == "SUPPORTED"
    elif ratio * 1.1 < threshold:
        assert found.label == "REFUTED"
    else:
        assert found.label == "INCONCLUSIVE(single_process)"


def test_runs_give_an_interval() -> None:
    noise = [1.0, 1.01, 0.99, 1.005, 0.995]
    assert restated(ledger(holds=">= 2"), grid(2.05)).label == "INCONCLUSIVE(single_process)"
    assert restated(ledger(holds=">= 2"), grid(2.05, runs=noise)).label == "SUPPORTED"
    assert restated(ledger(holds=">= 2.1"), grid(2.05, runs=noise)).label == "REFUTED"
    found = restated(ledger(holds=">= 2"), grid(2.0, runs=noise))
    assert found.label == "INCONCLUSIVE(interval)"
    assert found.value == pytest.approx(2.0)  # the median of the runs
    # Four cells share the error probability, so the interval is wider than one cell's at 99 %.
    one_cell = student.log_interval([2 * f for f in noise], 0.99)
    shared = student.log_interval([2 * f for f in noise], 1 - 0.01 / 4)
    assert (found.low, found.high) == pytest.approx(shared[1:])
    assert shared[1] < one_cell[1] < one_cell[2] < shared[2]


def test_a_run_counts_only_with_both_sides() -> None:
    select = 'op = "fp4_linear", n = 64, m = 1'
    book = ledger(select=select, reduce="max")
    apart = [timed("triton", 1e-6, run="r1"), timed("torch_native[cublas_bf16]", 1e-5, run="r2")]
    found = restated(book, apart)
    assert found.label == "INCONCLUSIVE(no_common_cell)"
    assert "never in one process run" in found.missing[0]
    together = [timed("triton", 1e-6, run="r2"), *apart]
    assert restated(book, together).word == "SUPPORTED"


def test_reduce_order_matters() -> None:
    times = {("a", 1): 4.0, ("b", 1): 1.0, ("a", 4): 2.0, ("b", 4): 3.0}
    records = []
    for (fmt, m), ratio in times.items():
        case = linear_case(fmt, m)
        records += [timed("torch_native[cublas_bf16]", 1e-5, case=case), timed("triton", 1e-5 / ratio, case=case)]
    values = {
        "min over m of max over fmt": 3.0,
        "max over fmt of min over m": 2.0,
        "max": 4.0,
        "min": 1.0,
        "median": 2.5,
        "mean": 2.5,
    }
    for reduce, value in values.items():
        assert restated(ledger(reduce=reduce), records).value == pytest.approx(value), reduce
    found = restated(ledger(reduce="min over m"), records)
    assert found.label == "INCONCLUSIVE(ambiguous_reduce)" and "fmt" in found.note


def test_a_baseline_may_run_another_dtype() -> None:
    select = 'op = "fp4_linear", x = "bf16", n = 64, m = [1, 4]'
    book = ledger(select=select, over_select='over_select = {x = "fp32"}', reduce="min over m")
    records = []
    for m, ratio in ((1, 5.0), (4, 3.0)):
        mine, base = linear_case(m=m), linear_case(m=m).replace("x=bf16", "x=fp32")
        records += [timed("triton", 1e-5, case=mine), timed("torch_native[cublas_bf16]", 1e-5 * ratio, case=base)]
    found = restated(book, records)
    assert found.word == "SUPPORTED" and found.value == pytest.approx(3.0)
    # control: without it there is no float32 baseline to be found
    assert restated(ledger(select=select, reduce="min over m"), records).word == "NOT_RUN"
    with pytest.raises(DataError, match="exactly one value"):
        ledger(select=select, over_select="over_select = {m = 1}")
    with pytest.raises(DataError, match="backend itself"):
        ledger(over="triton")


def test_a_quiet_parameter_that_is_left_out_is_selected_as_such() -> None:
    """Cases with it, whose ids are longer, are no cells of a claim without it, nor the other way round."""
    select = 'op = "fp4_linear", fmt = "nvfp4", x = "bf16", n = 64, m = [1, 4], loud = "unsaid"'
    plain = {m: linear_case(m=m) for m in (1, 4)}
    loud = {m: case.replace("]", ",loud=on]") for m, case in plain.items()}
    records = [timed("triton", 1e-5, case=case) for case in plain.values()]
    records += [timed("triton", 1e-6, case=case) for case in loud.values()]
    records += [timed("torch_native[cublas_bf16]", 1e-5 * ratio, case=plain[m]) for m, ratio in ((1, 5.0), (4, 3.0))]
    found = restated(ledger(select=select, reduce="min over m"), records)
    assert found.word == "SUPPORTED" and found.value == pytest.approx(3.0)
    # The kernel with it against the baseline without.
    book = ledger(
        select=select.replace("unsaid", "on"), over_select='over_select = {loud = "unsaid"}', reduce="min over m"
    )
    assert restated(book, records).value == pytest.approx(30.0)
    # control: where select does not say, both are read
    careless = ledger(select=select.replace(', loud = "unsaid"', ""), reduce="min over m")
    assert restated(careless, records).word == "INCONCLUSIVE"


def int8_case(m: int, quant: str = "row127") -> str:
    return f"int8_linear[x=bf16,act_quant={quant},m={m},n=64,k=64]"


def test_a_baseline_may_run_another_operation() -> None:
    select = 'op = "fp4_linear", fmt = "nvfp4", x = "bf16", n = 64, m = [1, 4]'
    other = 'over_select = {op = "int8_linear", act_quant = "row127"}'
    book = ledger(over="torch_native[int_mm]", select=select, over_select=other, reduce="min over m")
    mine = {m: linear_case("nvfp4", m) for m in (1, 4)}
    records = [timed("triton", 1e-5, case=case) for case in mine.values()]
    records += [timed("torch_native[int_mm]", 1e-5 * ratio, case=int8_case(m)) for m, ratio in ((1, 5.0), (4, 3.0))]
    # Neither another rounding of x nor the same variant's time on another operation counts.
    records += [timed("torch_native[int_mm]", 1e-6, case=int8_case(m, "row127h")) for m in (1, 4)]
    records += [timed("torch_native[int_mm]", 1e-6, case=case) for case in mine.values()]
    found = restated(book, records)
    assert found.word == "SUPPORTED" and found.value == pytest.approx(3.0)
    read = book.claims[0].restated
    assert read is not None
    assert may_rest_on(read, "torch_native", "int_mm", int8_case(1)) and may_rest_on(read, "triton", "", mine[1])
    assert not may_rest_on(read, "torch_native", "int_mm", int8_case(1, "row127h"))
    assert not may_rest_on(read, "torch_native", "int_mm", mine[1]) and not may_rest_on(
        read, "triton", "", int8_case(1)
    )
    # control: a size that only one side has is missed, not made up
    found = restated(book, [r for r in records if "m=4" not in r.case or r.backend == "triton"])
    assert found.label == "INCONCLUSIVE(missing_cells)"


def test_missing_operations_and_ambiguous_pairs_are_refused_on_load() -> None:
    known = {"fp4_linear": ("fmt", "x", "n", "m"), "int8_linear": ("x", "act_quant", "n", "m")}

    def load(select: str, over_select: str) -> None:
        text = LEDGER_TEXT.format(select=select, over_select=over_select)
        parse_ledger(text, "t.toml", ops=known)

    load('op = "fp4_linear", fmt = "nvfp4", m = [1, 4]', 'op = "int8_linear", act_quant = "none"')
    for select, over_select, rule in (
        ('op = "fp4_linear", m = 1', 'op = "int9_linear"', "no known operation"),
        ('op = "fp4_linear", m = 1', 'op = "int8_linear", act = "none"', "no parameter 'act'"),
        ('op = "fp4_linear", fmt = ["nvfp4", "nf4"], m = 1', 'op = "int8_linear"', "exactly one value"),
    ):
        with pytest.raises(DataError, match=rule):
            load(select, over_select)


LEDGER_TEXT = """
document = "d"
document_sha256 = "0000000000000000000000000000000000000000000000000000000000000000"
[[claim]]
id = "a.b"
section = "s"
says = "t"
hardware = "rtx3070"
  [claim.restated]
  sentence = "bf16"
  metric = "ratio"
  quantity = "time.graph"
  kind = "time"
  backend = "triton"
  over = "torch_native[int_mm]"
  select = {{{select}}}
  over_select = {{{over_select}}}
  holds = ">= 1"
  hardware = "sm_90"
  reviewed = {{sm_90 = "NOT_RUN"}}
"""


def test_missing_cells_keep_it_open() -> None:
    records = grid(5)
    assert restated(ledger(), records).word == "SUPPORTED"
    no_m4 = [r for r in records if "m=4" not in r.case]
    found = restated(ledger(), no_m4)
    assert found.label == "INCONCLUSIVE(missing_cells)" and any("m=4" in cell for cell in found.missing)
    one_side = [r for r in records if not (r.backend == "torch_native" and "m=4" in r.case and "nvfp4" in r.case)]
    found = restated(ledger(), one_side)
    assert found.label == "INCONCLUSIVE(missing_cells)" and "torch_native" in found.missing[0]
    wrong = [r for r in records if not (r.backend == "triton" and "m=4" in r.case)]
    wrong.append(timed("triton", (), case=linear_case("nvfp4", 4), outcome=Outcome.WRONG_VALUE, reason="over_budget"))
    found = restated(ledger(), wrong)
    assert found.label == "INCONCLUSIVE(missing_cells)"
    assert any("WRONG_VALUE(over_budget)" in cell for cell in found.missing)


def test_a_wrong_peer_is_still_timed_and_a_wrong_own_is_not() -> None:
    book = ledger(select='op = "fp4_linear", n = 64, m = 1', reduce="max")
    peer = timed("torch_native[cublas_bf16]", 1e-5, outcome=Outcome.WRONG_VALUE)
    assert restated(book, [timed("triton", 1e-6), peer]).word == "SUPPORTED"
    own = timed("triton", (), outcome=Outcome.WRONG_VALUE)
    assert restated(book, [own, peer]).label == "INCONCLUSIVE(no_valid_records)"


def test_not_run_says_why() -> None:
    book = ledger()
    assert restated(book, []).label == "NOT_RUN(no_records)"
    absent = [
        timed("triton", (), outcome=Outcome.UNAVAILABLE, reason="needs_cuda", hardware=hardware, case=linear_case(m=m))
        for hardware, m in (("cpu", 1), ("", 4))
    ]
    assert restated(book, absent).label == "NOT_RUN(needs_cuda)"
    assert restated(book, [replace_hardware(r, "cpu") for r in grid(5)]).label == "NOT_RUN(needs_sm_90)"
    other = [
        timed("triton", 1e-6, case=linear_case(n=128)),
        timed("torch_native[cublas_bf16]", 1, case=linear_case(n=128)),
    ]
    assert restated(book, other).label == "NOT_RUN(no_records)"
    refused = [
        timed("triton", (), outcome=Outcome.UNSUPPORTED, reason="k_odd"),
        timed("torch_native[cublas_bf16]", 1e-5),
    ]
    assert restated(book, refused).label == "NOT_RUN(k_odd)"


def replace_hardware(record: Record, hardware: str) -> Record:
    import dataclasses

    return dataclasses.replace(record, environment={"hardware": hardware})


# -- exact figures -----------------------------------------------------------------------------------------------------


def value_ledger(**more: Any) -> Ledger:
    settings: dict[str, Any] = {
        "metric": "value",
        "quantity": "metrics.cosine",
        "kind": "check",
        "backend": "torch",
        "select": 'op = "fp4_quantize", n = 4',
        "reduce": "min",
        "hardware": "any",
        "reviewed": 'cpu = "SUPPORTED"',
    }
    return ledger(**{**settings, **more})


@given(st.floats(-10, 10), st.floats(-10, 10), st.sampled_from([">=", ">", "<=", "<", "=="]))
def test_exact_figures_have_no_margin(value: float, threshold: float, comparator: str) -> None:
    found = restated(value_ledger(holds=f"{comparator} {threshold!r}"), [checked("torch", {"cosine": value})])
    truth = {
        ">=": value >= threshold,
        ">": value > threshold,
        "<=": value <= threshold,
        "<": value < threshold,
        "==": value == threshold,
    }[comparator]
    assert found.word == ("SUPPORTED" if truth else "REFUTED")
    assert found.low == found.high == found.value


@pytest.mark.parametrize(
    ("value", "word"), [(0.99, "SUPPORTED"), (1.01, "SUPPORTED"), (0.97, "REFUTED"), (1.03, "REFUTED")]
)
def test_within(value: float, word: str) -> None:
    assert restated(value_ledger(holds="within 2% of 1"), [checked("torch", {"cosine": value})]).word == word


def test_not_a_number_satisfies_nothing() -> None:
    for holds in (">= 0", "<= 0", "within 5% of 1"):
        found = restated(value_ledger(holds=holds), [checked("torch", {"cosine": math.nan})])
        assert found.word == "REFUTED" and found.value is not None and math.isnan(found.value)
    many = [checked("torch", {"cosine": v}, case=f"fp4_quantize[n=4,k={i}]") for i, v in enumerate((1.0, math.nan))]
    assert restated(value_ledger(holds=">= 0"), many).word == "REFUTED"
    assert restated(value_ledger(holds=">= 0", reduce="max"), list(reversed(many))).word == "REFUTED"


def test_metrics_of_subjects_count_whatever_their_outcome() -> None:
    book = value_ledger(backend="as_written", holds="<= 0.5")
    subject, own_record = (
        checked("as_written", {"cosine": 0.4}, role=role, outcome=Outcome.WRONG_VALUE) for role in ("subject", "own")
    )
    assert restated(book, [subject]).word == "SUPPORTED"
    own = restated(book, [own_record])
    assert own.label == "INCONCLUSIVE(no_valid_records)"


def test_error_bytes_and_ratio_of_metrics() -> None:
    stats = ErrorStats("y", 4, 0, 0.25, None, 0.75)
    record = checked("torch", {"cosine": 3.0}, error=stats, peak_bytes=4096)
    for quantity, value in (("error.worst_over_budget", 0.25), ("error.correctly_rounded", 0.75), ("peak_bytes", 4096)):
        found = restated(value_ledger(quantity=quantity, holds=f"== {value}"), [record])
        assert found.word == "SUPPORTED" and found.value == value
    book = value_ledger(metric="ratio", over="peer", holds="== 1.5")
    found = restated(book, [record, checked("peer", {"cosine": 2.0}, role="peer")])
    assert found.word == "SUPPORTED" and found.unit == "x"
    assert restated(book, [record, checked("peer", {"cosine": 0.0}, role="peer")]).word == "REFUTED"


def test_fraction_passed() -> None:
    book = value_ledger(metric="fraction_passed", reduce="", holds=">= 1", select='op = "fp4_quantize", n = [4, 8]')
    cases = [f"fp4_quantize[n={n},k={k}]" for n in (4, 8) for k in (1, 2)]
    good = [checked("torch", case=case) for case in cases]
    assert restated(book, good).word == "SUPPORTED"
    bad = [*good[:3], checked("torch", case=cases[3], outcome=Outcome.NONFINITE, role="subject")]
    found = restated(book, bad)
    assert found.word == "REFUTED" and found.value == 0.75
    crashed = [*good[:3], checked("torch", case=cases[3], outcome=Outcome.CRASHED, hardware="")]
    assert restated(book, crashed).value == 0.75  # died before the environment was known
    assert restated(book, good[:2]).label == "INCONCLUSIVE(missing_cells)"


def test_seeds_other_than_zero_need_to_be_asked_for() -> None:
    drawn = checked("torch", {"cosine": 0.0}, case="fp4_quantize[fmt=nvfp4,n=4,k=16,seed=7]")
    fixed = checked("torch", {"cosine": 1.0})
    assert restated(value_ledger(holds="== 1"), [drawn, fixed]).word == "SUPPORTED"
    asked = value_ledger(holds="== 1", select='op = "fp4_quantize", n = 4, seed = [0, 7]')
    assert restated(asked, [drawn, fixed]).word == "REFUTED"
    assert case_params(drawn.case) == ("fp4_quantize", {"seed": "7", "fmt": "nvfp4", "n": "4", "k": "16"})


def test_any_hardware_judges_each_class() -> None:
    book = value_ledger(holds="== 1", reviewed='cpu = "SUPPORTED", sm_90 = "REFUTED"')
    cpu, gpu = checked("torch", {"cosine": 1.0}), checked("torch", {"cosine": 1.0}, hardware="sm_90", run="r2")
    assert restated(book, []).label == "NOT_RUN(no_records)"
    assert restated(book, [cpu]).hardware == "cpu"
    both = one(book, [cpu, gpu])
    assert both.restated is not None and both.restated.word == "SUPPORTED" and both.restated.hardware == "cpu+sm_90"
    code, reasons = exit_code([cpu, gpu], [both], strict=False)
    assert code == 1 and "sm_90" in reasons[0] and "cpu" not in reasons[0]
    worse = checked("torch", {"cosine": 0.5}, hardware="sm_90", run="r2")
    assert restated(book, [cpu, worse]).label == "INCONCLUSIVE(classes_disagree)"
    assert exit_code([cpu, worse], [one(book, [cpu, worse])], strict=False)[0] == 0


def test_stale_only_where_sources_are_known_to_differ() -> None:
    book = value_ledger(holds="== 1")
    record = checked("torch", {"cosine": 1.0}, sources="sha256:a")
    assert restated(book, [record], same).word == "SUPPORTED"
    assert restated(book, [record], unknown).word == "SUPPORTED"
    stale = restated(book, [record], lambda r: "sha256:b")
    assert stale.label == "STALE(sources_changed)" and "SUPPORTED" in stale.note and stale.value == 1.0
    # Sources of a record the verdict does not rest on do not matter.
    beside = checked("torch", {"cosine": 0.0}, case="fp4_quantize[n=9,k=16]", sources="sha256:x")
    assert restated(book, [record, beside], lambda r: "sha256:a").word == "SUPPORTED"


def test_evidence_is_what_it_rests_on() -> None:
    records = grid(5)
    found = restated(ledger(), records)
    ids = sorted(r.id for r in records)
    assert list(found.rests_on) == ids
    assert found.digest == hashlib.sha256("\n".join(ids).encode()).hexdigest()
    shuffled = list(records)
    random.Random(0).shuffle(shuffled)
    assert restated(ledger(), shuffled) == found
    extra = timed("triton", 1e-6, case=linear_case(n=128))
    assert restated(ledger(), [*records, extra]).digest == found.digest
    assert found.to_dict()["evidence"] == found.digest


# -- as stated ---------------------------------------------------------------------------------------------------------

STATED = '[claim.stated]\ncheck = "{check}"\nvalue = "2 + 2"\nreviewed = "{reviewed}"'


def stated_ledger(check: str, reviewed: str, hardware: str = "none") -> Ledger:
    return ledger(stated=STATED.format(check=check, reviewed=reviewed), claim_hardware=hardware)


def arithmetic_record(book: Ledger, **more: Any) -> Record:
    (claim,) = book.claims
    return checked("arithmetic", arithmetic_metrics(claim), case=claim.id, role="harness", kind="arithmetic", **more)


def test_arithmetic_decides_what_names_no_hardware() -> None:
    for check, word in (("2 + 2 == 4", "SUPPORTED"), ("2 + 2 == 5", "REFUTED")):
        book = stated_ledger(check, word)
        record = arithmetic_record(book)
        found = one(book, [record]).stated
        assert (found.label, found.value, found.rests_on) == (word, 4.0, (record.id,))
        assert one(book, []).stated.label == "NOT_RUN(no_records)"
        assert one(book, [record], lambda r: "sha256:other").stated.word == "STALE"


def test_arithmetic_refutes_a_measurement_but_never_supports_one() -> None:
    book = stated_ledger("2 + 2 == 4", "NOT_RUN", "rtx3070")
    assert one(book, [arithmetic_record(book)]).stated.label == "NOT_RUN(needs_rtx3070)"
    book = stated_ledger("2 + 2 == 5", "REFUTED", "rtx3070")
    assert one(book, [arithmetic_record(book)]).stated.label == "REFUTED"


def test_the_named_card_decides_as_stated() -> None:
    import dataclasses

    book = ledger(claim_hardware="rtx3070")
    assert one(book, grid(5)).stated.label == "NOT_RUN(needs_rtx3070)"
    env = {"hardware": "sm_86", "gpu": "NVIDIA GeForce RTX 3070"}
    there = [dataclasses.replace(r, environment=env, run="r9") for r in grid(5)]
    verdict = one(book, there)
    assert verdict.stated.label == "SUPPORTED" and verdict.stated.hardware == "rtx3070"
    assert verdict.restated is not None and verdict.restated.label == "NOT_RUN(needs_sm_90)"


# -- exit code ---------------------------------------------------------------------------------------------------------


def test_a_wrong_reviewed_verdict_is_exit_1() -> None:
    records = grid(5)
    for reviewed, code in (("SUPPORTED", 0), ("REFUTED", 1), ("NOT_RUN", 0)):
        verdict = one(ledger(reviewed=f'sm_90 = "{reviewed}"'), records)
        got, reasons = exit_code(records, [verdict], strict=False)
        assert got == code, reasons
        assert bool(reasons) == (reviewed != "SUPPORTED")
        assert code == 1 or all(r.startswith("note:") for r in reasons)
    arithmetic = stated_ledger("2 + 2 == 5", "SUPPORTED")
    record = arithmetic_record(arithmetic)
    code, reasons = exit_code([record], [one(arithmetic, [record])], strict=False)
    assert code == 1 and "a.b" in reasons[0] and "reviewed as SUPPORTED" in reasons[0]


def test_open_verdicts_contradict_nothing() -> None:
    for ratio in (1.95, 2.05):
        verdict = one(ledger(reviewed='sm_90 = "REFUTED"'), grid(ratio))
        assert exit_code(grid(ratio), [verdict], strict=False)[0] == 0


@pytest.mark.parametrize("outcome", list(Outcome))
@pytest.mark.parametrize("role", ["own", "peer", "subject", "harness"])
@pytest.mark.parametrize("suite", ["fp4", "model"])
def test_outcomes_and_roles(outcome: Outcome, role: str, suite: str) -> None:
    passed = checked("torch", {"cosine": 1.0})
    record = checked("other", outcome=outcome, role=role, suite=suite)
    excused = outcome in (Outcome.PASSED, Outcome.UNSUPPORTED, Outcome.UNAVAILABLE)
    excused = excused or (outcome is Outcome.OUT_OF_MEMORY and suite == "model")
    code, reasons = exit_code([passed, record], [], strict=False)
    assert code == (0 if excused or role in ("peer", "subject") else 1)
    assert code == 0 or outcome.value in reasons[0]


def test_nothing_judged_is_3() -> None:
    assert exit_code([], [], strict=False)[0] == 3
    absent = checked("torch", outcome=Outcome.UNAVAILABLE, reason="needs_cuda")
    verdict = one(value_ledger(), [absent])
    assert exit_code([absent], [verdict], strict=False)[0] == 3
    assert exit_code([checked("torch")], [], strict=False)[0] == 0
    # A probe alone judges nothing; decided arithmetic does.
    assert exit_code([checked("torch", case="probe[torch]", kind="probe")], [], strict=False)[0] == 3
    book = stated_ledger("2 + 2 == 4", "SUPPORTED")
    record = arithmetic_record(book)
    assert exit_code([record], [one(book, [record])], strict=False)[0] == 0


def test_strict_wants_everything_decided() -> None:
    book = stated_ledger("2 + 2 == 4", "SUPPORTED")
    records = [arithmetic_record(book), *grid(5)]
    verdict = one(book, records)
    assert verdict.stated.decided and verdict.restated is not None and verdict.restated.decided
    assert exit_code(records, [verdict], strict=True)[0] == 0
    open_verdict = one(book, [arithmetic_record(book), *grid(2.05)])
    code, reasons = exit_code(records, [open_verdict], strict=True)
    assert code == 3 and "INCONCLUSIVE(single_process)" in reasons[0]
    gone = checked("torch", outcome=Outcome.UNAVAILABLE, reason="needs_cuda")
    assert exit_code([*records, gone], [verdict], strict=True)[0] == 3
    assert exit_code([*records, gone], [verdict], strict=False)[0] == 0
    stale = one(book, records, lambda r: "sha256:other")
    assert exit_code(records, [stale], strict=True)[0] == 3
    failed = checked("torch", outcome=Outcome.CRASHED)
    assert exit_code([*records, failed], [open_verdict], strict=True)[0] == 1


# -- Student's t -------------------------------------------------------------------------------------------------------


def test_quantiles_against_closed_forms_and_tables() -> None:
    for level in (0.5, 0.9, 0.99, 0.9999):
        p = (1 + level) / 2
        assert student.quantile(level, 1) == pytest.approx(math.tan(math.pi * (p - 0.5)), rel=1e-9)
        assert student.quantile(level, 2) == pytest.approx((2 * p - 1) * math.sqrt(2 / (4 * p * (1 - p))), rel=1e-9)
        normal = statistics.NormalDist().inv_cdf(p)
        assert student.quantile(level, 100_000) == pytest.approx(normal, rel=1e-3)
    table = {3: 5.8409, 4: 4.6041, 5: 4.0321, 9: 3.2498, 10: 3.1693, 20: 2.8453, 30: 2.7500}  # two-sided 99 %
    for df, value in table.items():
        assert student.quantile(0.99, df) == pytest.approx(value, abs=5e-5)
    for bad in ((0.0, 3), (1.0, 3), (0.9, 0)):
        with pytest.raises(ValueError, match="quantile"):
            student.quantile(*bad)


def test_the_interval_covers_as_it_says() -> None:
    """5 runs with 3 % noise, 3000 times, seed 0: the 99 % interval misses 0.7 to 1.4 %; at 90 % it misses 8 to 12 %."""
    draw = random.Random(0)
    misses = {0.99: 0, 0.9: 0}
    for _ in range(3000):
        values = [2.0 * math.exp(draw.gauss(0, 0.03)) for _ in range(5)]
        for level in misses:
            _, low, high = student.log_interval(values, level)
            misses[level] += not low <= 2.0 <= high
    assert 0.007 <= misses[0.99] / 3000 <= 0.014
    assert 0.08 <= misses[0.9] / 3000 <= 0.12


@given(st.lists(st.floats(1e-9, 1e3), min_size=2, max_size=6))
def test_the_interval_holds_the_median(values: list[float]) -> None:
    median, low, high = student.log_interval(values, 0.99)
    assert 0 < low <= median <= high and median == statistics.median(values)


# -- our own ledger ----------------------------------------------------------------------------------------------------


def test_arithmetic_alone_decides_fifteen_of_our_claims() -> None:
    book = load_ledger(OURS)
    records = [
        checked("arithmetic", arithmetic_metrics(c), case=c.id, role="harness", kind="arithmetic")
        for c in book.claims
        if c.stated is not None
    ]
    verdicts = judge(book, records, current_sources=unknown)
    assert len(verdicts) == len(book.claims)
    assert sum(v.stated.decided for v in verdicts) >= 15
    assert {v.stated.word for v in verdicts} == {"SUPPORTED", "REFUTED", "NOT_RUN"}
    code, reasons = exit_code(records, verdicts, strict=False)
    assert (code, reasons) == (0, [])
