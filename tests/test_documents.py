"""Numerals and coverage; spans: drift is seen to the digit, update restores byte for byte and touches nothing else."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vbench.claims import Ledger, load_ledger, parse_ledger
from vbench.documents import check, claim_line, coverage, number, numerals, quantity_text, update
from vbench.errors import DataError
from vbench.judge import judge
from vbench.record import Measurement, Outcome, Record

ROOT = Path(__file__).parents[1]
OURS = ROOT / "suites" / "virtual_blackwell" / "claims.toml"
SEED = ROOT.parent / "shared" / "seed" / "virtual-blackwell.md"

LEDGER = """
document = "d"
document_sha256 = "{sha}"
[[claim]]
id = "a.division"
section = "s"
says = "t"
hardware = "none"
figures = {figures}
  [claim.stated]
  check = "5.14 / 2 == 2.57"
  value = "5.14 / 2"
  reviewed = "SUPPORTED"
[[claim]]
id = "a.speed"
section = "s"
says = "t"
hardware = "rtx3070"
  [claim.restated]
  sentence = "at least 2x bf16 cuBLAS"
  metric = "ratio"
  quantity = "time.graph"
  kind = "time"
  backend = "triton"
  over = "torch_native[cublas_bf16]"
  select = {{op = "fp4_linear", m = [1, 16]}}
  reduce = "min over m of max over fmt"
  holds = ">= 2"
  hardware = "sm_90"
  reviewed = {{sm_90 = "SUPPORTED"}}
[[exclusion]]
section = "s"
reason = "a date"
figures = {excluded}
"""


def ledger(figures: str = '[{at = 0, text = ["7"]}]', excluded: str = '[{at = 0, text = ["2026"]}]') -> Ledger:
    return parse_ledger(LEDGER.format(sha="0" * 64, figures=figures, excluded=excluded), "t.toml")


def same(record: Record) -> str | None:
    return record.sources


def linear(who: str, seconds: float, fmt: str, m: int, **more: Any) -> Record:
    backend, _, variant = who.partition("[")
    outcome = more.pop("outcome", Outcome.PASSED)
    return Record(
        case=f"fp4_linear[fmt={fmt},m={m},n=64,k=64]",
        backend=backend,
        variant=variant.rstrip("]"),
        kind=more.pop("kind", "time"),
        outcome=outcome,
        run=more.pop("run", "r1"),
        role="own" if backend == "triton" else "peer",
        measurements=(Measurement("graph", (seconds,)),) if seconds else (),
        environment={"hardware": "sm_90"},
        **more,
    )


def records() -> list[Record]:
    found = [
        Record(
            case="a.division",
            backend="arithmetic",
            kind="arithmetic",
            outcome=Outcome.PASSED,
            run="r1",
            role="harness",
            metrics={"holds": 1.0, "value": 2.57},
        )
    ]
    for m in (1, 4, 16):
        for fmt, ratio in (("nvfp4", 3.0), ("absmax7_row", 3.7)):
            found.append(linear("torch_native[cublas_bf16]", 31.4e-6, fmt, m))
            found.append(linear("triton", 31.4e-6 / ratio, fmt, m))
    return found


def fresh(text: str, have: Sequence[Record] | None = None, current: Any = same) -> str:
    return update(text, ledger(), records() if have is None else have, current_sources=current, where="README.md")


def drifts(text: str, have: Sequence[Record] | None = None) -> list[Any]:
    return check(text, ledger(), records() if have is None else have, current_sources=same, where="README.md")


RATIO = "ratio quantity=time.graph backend=triton over=torch_native[cublas_bf16] op=fp4_linear rows=fmt cols=m"
VALUE = "value quantity=time.graph backend=triton op=fp4_linear rows=fmt cols=m hardware=sm_90"
DOCUMENT = f"""# Title 2.57

Before <!-- vbench:claim a.speed --><!-- /vbench --> after 1.5.

| a | b |
|---|---|
| <!-- vbench:claim a.division -->old<!-- /vbench --> | 3 |

<!-- vbench:table {RATIO} -->
<!-- /vbench -->

<!-- vbench:table {VALUE} -->
<!-- /vbench -->
<!-- vbench:table outcomes hardware=sm_90 -->
<!-- /vbench -->
<!-- vbench:table claims -->
<!-- /vbench -->

```
<!-- vbench:claim no.such --> in code
```
and `<!-- vbench:claim ID -->` in a line."""


# -- numerals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("2.57× and -1.3% (-1.3%) 100%", ["2.57", "-1.3", "-1.3", "100"]),
        ("3-10× and 50-75%, 2026-01-20", ["3", "10", "50", "75", "2026", "01", "20"]),
        ("8GB, 163M, 12.79GB, 4,500+ lines, v1.0", ["8", "163", "12.79", "4,500"]),
        ("FP4 INT8 float32 V2 test_x2.py GPT-2 RTX 3070 Level 0 Level 2/3 LLaMA-7B FP8E4M3", []),
        ("RTX 3070 8GB: RTX 30700 and GPT-25", ["8", "30700", "25"]),
        ("x2.57 speed, 2x, a x 3", ["2.57", "2", "3"]),
        ("| 1 | `7` |\n```\nscale / 7, -7\n```", ["1", "7", "7", "-7"]),
        ("5分钟 场景1 显存8→54", ["5", "1", "8", "54"]),
        ("1e-3 2.5E6 0xff 2.11.0 O(1) O(N²)", ["1e-3", "2.5E6", "0xff", "2.11.0", "1"]),
        ("５２．１ and −3", ["52", "1", "-3"]),
        ("1,2 and 1,234 and 12,34", ["1", "2", "1,234", "12", "34"]),
        ("7 - 3 and 7-3 and (7)-3 and =-3", ["7", "3", "7", "3", "7", "3", "-3"]),
        ("one two\nthree", []),
    ],
)
def test_what_is_a_numeral(text: str, found: list[str]) -> None:
    assert [n.text for n in numerals(text)] == found


NAME_TOKENS = ["FP4", "INT8", "test_x2.py", "RTX 3070", "GPT-2", "Level 0", "word", "字", "float32", "|", "->", "“"]
NUMBER_TOKENS = ["2.57", "-1.3", "100", "4,500", "0.0000", "1e-3"]
SUFFIXES = ["", "%", "×", "GB", "M", "ms", "字", ")", "+", "."]


@given(
    st.lists(
        st.one_of(st.sampled_from(NAME_TOKENS), st.tuples(st.sampled_from(NUMBER_TOKENS), st.sampled_from(SUFFIXES)))
    )
)
def test_numbers_among_words(parts: list[str | tuple[str, str]]) -> None:
    # A number that ends a sentence before another digit would join it, so parts are kept apart by a blank.
    text = " ".join(part if isinstance(part, str) else "".join(part) for part in parts)
    assert [n.text for n in numerals(text)] == [part[0] for part in parts if not isinstance(part, str)]


@given(st.text(alphabet="0123456789.,-x %ab#\n`(", max_size=60))
def test_positions_and_no_digit_lost(text: str) -> None:
    found = numerals(text)
    lines = text.split("\n")
    for n in found:
        assert lines[n.line - 1][n.column - 1 :].startswith(n.text)
    covered = sum(len(re.findall("[0-9]", n.text)) for n in found)
    glued = sum(
        len(re.findall("[0-9]", m)) for m in re.findall(r"(?!(?<![A-Za-z_])x[0-9])[A-Za-z_]+[0-9]+(?:\.[0-9]+)*", text)
    )
    assert covered + glued >= len(re.findall("[0-9]", text))


def test_headings_and_occurrences() -> None:
    text = "1\n# a 1\n1 1\n```\n# no heading 1\n```\n~~~\n## 1\n```\n~~~\n## b\n1\n####### seven 1"
    assert [(n.text, n.line, n.heading, n.nth) for n in numerals(text)] == [
        ("1", 1, 0, 1),
        ("1", 2, 1, 1),
        ("1", 3, 1, 2),
        ("1", 3, 1, 3),
        ("1", 5, 1, 4),
        ("1", 8, 1, 5),
        ("1", 12, 2, 1),
        ("1", 13, 2, 2),
    ]


def test_coverage_both_ways() -> None:
    assert coverage("7 on 2026", ledger()) == []
    (gap,) = coverage("7 on 2026 and 9", ledger())
    assert str(gap).startswith("1:15: 9 ") and gap.line == 1
    (gap,) = coverage("7 on 2026, again 7", ledger())  # a second occurrence is a second figure
    assert "occurrence 2" in str(gap)
    (gap,) = coverage("7", ledger())
    assert str(gap).startswith("t.toml:") and "exclusion" in str(gap) and "2026" in str(gap)
    (gap,) = coverage(
        "7\n# h\n2026", ledger(excluded='[{at = 1, text = ["2026"], nth = 2}, {at = 1, text = ["2026"]}]')
    )
    assert "occurrence 2 of 2026 after heading 1" in str(gap)
    # What we generate ourselves is accounted for by records.
    assert coverage("7 2026 <!-- vbench:claim a.speed -->3.7x<!-- /vbench -->", ledger()) == []


@pytest.mark.skipif(not SEED.exists(), reason="the document under test is not part of this repository")
def test_our_ledger_accounts_for_the_whole_document() -> None:
    text, ours = SEED.read_text(encoding="utf-8"), load_ledger(OURS)
    assert hashlib.sha256(text.encode()).hexdigest() == ours.document_sha256
    assert coverage(text, ours) == []
    assert len(numerals(text)) > 150
    # Controls: one more numeral anywhere is seen, and so is one fewer.
    lines = text.split("\n")
    for at in range(0, len(lines), 40):
        more = "\n".join([*lines[:at], "123456", *lines[at:]])
        assert ["123456" in str(g) for g in coverage(more, ours)] == [True]
    assert any("61.98" in str(g) for g in coverage(text.replace("61.98", "62.98"), ours))
    # Another version of the text, with the same figures, is accounted for as well.
    assert coverage(text.replace("优化", "改进"), ours) == []


# -- spans -------------------------------------------------------------------------------------------------------------


def test_update_fills_and_is_stable() -> None:
    once = fresh(DOCUMENT)
    assert drifts(DOCUMENT) and drifts(once) == []
    assert fresh(once) == once
    assert '**SUPPORTED** on sm_90: 3.70x (holds ">= 2"; 8 records, evidence ' in once
    assert "as stated **NOT_RUN** (needs_rtx3070)" in once
    assert "as stated **SUPPORTED**: 2.57 (1 record, evidence " in once
    assert "| fmt | m=1 | m=4 | m=16 |\n|---|---|---|---|\n| absmax7_row | 3.70x | 3.70x | 3.70x |" in once
    assert "| nvfp4 | 10.5 us | 10.5 us | 10.5 us |" in once
    assert "| triton | 6 PASSED |" in once
    assert "| a.speed | NOT_RUN(needs_rtx3070) | SUPPORTED on sm_90: 3.70x (holds >= 2) |" in once


def _outside(text: str) -> str:
    return re.sub(
        r"(<!-- vbench:(?:claim|table) (?!no\.such|ID)[^>]*-->).*?(<!-- /vbench -->)", r"\1\2", text, flags=re.S
    )


def test_nothing_outside_changes() -> None:
    assert _outside(fresh(DOCUMENT)) == _outside(DOCUMENT)
    crlf = DOCUMENT.replace("\n", "\r\n")
    assert _outside(fresh(crlf)).replace("\r\n", "\n") == _outside(DOCUMENT)
    assert fresh(fresh(crlf)) == fresh(crlf)


plain = st.text(alphabet="ab 1.#|\n-<>!", max_size=30).filter(lambda t: "<!" not in t and not t.endswith("<"))


@given(st.lists(st.tuples(plain, plain.map(lambda t: t.replace("\n", " "))), max_size=4), plain)
def test_stable_on_any_text(parts: list[tuple[str, str]], tail: str) -> None:
    mark = "<!-- vbench:claim a.speed -->"
    text = "".join(f"{before}{mark}{inside}<!-- /vbench -->" for before, inside in parts) + tail
    once = fresh(text)
    assert fresh(once) == once and drifts(once) == []
    pieces = re.split(r"<!-- vbench:claim a\.speed -->.*?<!-- /vbench -->", once, flags=re.S)
    assert pieces == [before for before, _ in parts] + [tail]


def test_one_changed_digit_is_seen_and_restored() -> None:
    once = fresh(DOCUMENT)
    spans = [m.span(1) for m in re.finditer(r"<!-- vbench:[^>]*-->((?:(?!<!--).)*)<!-- /vbench -->", once, flags=re.S)]
    digits = [i for start, end in spans for i in range(start, end) if once[i].isdigit()]
    assert len(digits) > 40
    for i in digits:
        broken = once[:i] + str((int(once[i]) + 1) % 10) + once[i + 1 :]
        (drift,) = drifts(broken)
        assert str(drift).startswith("README.md:")
        assert fresh(broken) == once
    outside = once.replace("after 1.5", "after 1.6")
    assert drifts(outside) == []  # a digit of the author's own is the author's


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("\n<!-- vbench:claim no.such --><!-- /vbench -->", 2, "no claim 'no.such'"),
        ("a\nb <!-- vbench:claim a.speed -->", 2, "never closed"),
        ("<!-- /vbench -->", 1, "closes no span"),
        ("<!-- vbench:claim a.speed -->\n<!-- vbench:claim a.speed --><!-- /vbench -->", 2, "do not nest"),
        ("<!-- vbench:clam a.speed --><!-- /vbench -->", 1, "expected"),
        ("<!-- vbench:claim --><!-- /vbench -->", 1, "expected"),
        ("<!-- vbench:claim a.speed --><!-- /vbench x -->", 1, "closes with"),
        ("a <!-- vbench:table claims -->\n<!-- /vbench -->", 1, "lines of their own"),
        ("<!-- vbench:table claims -->\n<!-- /vbench --> b", 1, "lines of their own"),
        ("<!-- vbench:table claimed -->\n<!-- /vbench -->", 1, "'claimed' is not one of"),
        ("<!-- vbench:table claims only=TRUE -->\n<!-- /vbench -->", 1, "only=TRUE"),
        ("<!-- vbench:table claims colour=red -->\n<!-- /vbench -->", 1, "knows no colour="),
        ("<!-- vbench:table outcomes sm_90 -->\n<!-- /vbench -->", 1, "not key=value"),
        ("<!-- vbench:table outcomes hardware=h200 -->\n<!-- /vbench -->", 1, "hardware=h200"),
        ("<!-- vbench:table outcomes kind=time kind=time -->\n<!-- /vbench -->", 1, "given twice"),
        ("<!-- vbench:table ratio rows=fmt -->\n<!-- /vbench -->", 1, "needs quantity="),
        (f"<!-- vbench:table {RATIO} q=1 -->\n<!-- /vbench -->", 1, "no parameter 'q'"),
        (f"<!-- vbench:table {RATIO.replace('cols=m', 'cols=n')} -->\n<!-- /vbench -->", 1, "3 cases; fix more"),
    ],
)
def test_bad_spans(text: str, line: int, words: str) -> None:
    for act in (drifts, fresh):
        with pytest.raises(DataError) as caught:
            act(text)
        assert str(caught.value).startswith(f"README.md:{line}:") and words in str(caught.value), str(caught.value)


def test_table_cells_say_what_is_missing() -> None:
    text = f"<!-- vbench:table {RATIO} m=1,16 -->\n<!-- /vbench -->"
    assert "m=4" not in fresh(text)
    assert "NOT_RUN (no_records)" in fresh(text, [])
    have = [r for r in records() if not (r.backend == "triton" and "fmt=nvfp4,m=1," in r.case)]
    assert "| nvfp4 | no record | 3.00x |" in fresh(text, have)
    failed = linear("triton", 0, "nvfp4", 1, outcome=Outcome.UNSUPPORTED, reason="k_odd")
    assert "| nvfp4 | UNSUPPORTED(k_odd) | 3.00x |" in fresh(text, [*have, failed])
    wrong = [
        linear("torch_native[cublas_bf16]", 31.4e-6, "nvfp4", 1, outcome=Outcome.WRONG_VALUE),
        *(r for r in records() if not (r.backend == "torch_native" and "fmt=nvfp4,m=1," in r.case)),
    ]
    assert "| nvfp4 | 3.00x (WRONG_VALUE) | 3.00x |" in fresh(text, wrong)
    old = [linear("triton", 1e-6, "nvfp4", 1, sources="sha256:old"), *have]
    assert "| nvfp4 | STALE | 3.00x |" in fresh(text, old, lambda r: "sha256:new" if r.sources else None)
    apart = [linear("triton", 1e-6, "nvfp4", 1, run="r2"), *have]
    assert "| nvfp4 | no common run | 3.00x |" in fresh(text, apart)


def test_a_stale_claim_prints_as_stale() -> None:
    text = "<!-- vbench:claim a.speed --><!-- /vbench -->"
    assert "**STALE** (sources_changed) on sm_90: 3.70x" in fresh(text, None, lambda r: "sha256:new")


def test_claims_table_filters() -> None:
    every = fresh("<!-- vbench:table claims -->\n<!-- /vbench -->")
    assert "a.speed" in every and "a.division" in every
    refuted = fresh("<!-- vbench:table claims only=REFUTED -->\n<!-- /vbench -->")
    assert "no claim" in refuted
    some = fresh("<!-- vbench:table claims only=NOT_RUN prefix=a.s -->\n<!-- /vbench -->")
    assert "a.speed" in some and "a.division" not in some


def test_claim_lines_fit_a_table_cell() -> None:
    book = load_ledger(OURS)
    for verdict in judge(book, [], current_sources=same):
        line = claim_line(verdict)
        assert "|" not in line and "\n" not in line and "as stated **NOT_RUN**" in line


# -- numbers in print --------------------------------------------------------------------------------------------------


@given(st.floats(1e-4, 9.9e5), st.sampled_from([1, -1]))
def test_three_significant_digits(value: float, sign: int) -> None:
    text = number(sign * value)
    assert "e" not in text
    assert abs(float(text) - sign * value) <= 0.5000001 * 10.0 ** (int(f"{value:.2e}".partition("e")[2]) - 2)
    assert number(float(text)) == text
    digits = text.lstrip("-").replace(".", "").lstrip("0")
    assert len(digits.rstrip("0")) <= 3


def test_numbers_and_units() -> None:
    assert [number(v) for v in (2.9, 0.0, 999.6, 12345.0, 0.00012345, 1e-7, 3.2e9)] == [
        "2.90",
        "0",
        "1000",
        "12300",
        "0.000123",
        "1.00e-7",
        "3.20e9",
    ]
    assert number(float("nan")) == "nan" and number(float("inf")) == "inf"
    assert quantity_text(31.4e-6, "s") == "31.4 us" and quantity_text(2.5, "s") == "2.50 s"
    assert quantity_text(20.1e9, "B") == "20.1 GB" and quantity_text(17, "B") == "17.0 B"
    assert quantity_text(2.9, "x") == "2.90x" and quantity_text(0.887, "") == "0.887"


def test_a_number_that_no_record_has_is_named_in_a_marked_table() -> None:
    once = fresh(DOCUMENT)
    row = "| absmax7_row | 3.70x | 3.70x | 3.70x |"
    added = once.replace(row, row + "\n| by_hand | 42.5x | 3.70x | |")
    (drift,) = drifts(added)
    assert drift.reason == "unregistered" and "42.5" in drift.unregistered and "numbers of no record" in str(drift)
    # control: a row left out adds no number
    (drift,) = drifts(once.replace(row + "\n", ""))
    assert (drift.reason, drift.unregistered) == ("drift", ())


def test_stale_evidence_that_is_not_marked_is_named() -> None:
    once = fresh(DOCUMENT)

    def moved(record: Record) -> str:
        return "sha256:other"

    found = check(once, ledger(), records(), current_sources=moved, where="README.md")
    assert {d.reason for d in found} >= {"stale"}
    assert any("not marked STALE" in str(d) for d in found)
    marked = update(once, ledger(), records(), current_sources=moved, where="README.md")
    assert check(marked, ledger(), records(), current_sources=moved) == [], "printed as STALE it is no error"
