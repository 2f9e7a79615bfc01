"""The ledger's schema: what it must refuse, naming file, line and key; and the ledger of this repository."""

from __future__ import annotations

import copy
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vbench.claims import (
    REDUCERS,
    UNSAID,
    Ledger,
    Reduction,
    arithmetic_metrics,
    load_ledger,
    parse_holds,
    parse_ledger,
    parse_reduce,
    stated_digest,
)
from vbench.errors import DataError
from vbench.reference.ops import OPS

LEDGER = Path(__file__).parents[1] / "suites" / "virtual_blackwell" / "claims.toml"
OP_PARAMS = {op.name: tuple(p.name for p in op.params) for op in OPS}

GOOD = """
document = "A document"
document_sha256 = "{sha}"

[[claim]]
id = "a.division"
section = "Table"
says = "six over two is three"
hardware = "none"
figures = [{{at = 1, text = ["6", "2", "3"]}}]
  [claim.stated]
  check = "six / 2 == 3"
  value = "six / 2"
  facts = {{six = {{value = 6, source = "counted"}}}}
  reviewed = "SUPPORTED"

[[claim]]
id = "a.speed"
section = "Table"
says = "twice as fast"
hardware = "rtx3070"
  [claim.restated]
  sentence = "twice as fast as bf16 cuBLAS"
  metric = "ratio"
  quantity = "time.graph"
  kind = "time"
  backend = "triton"
  over = "torch_native[cublas_bf16]"
  select = {{op = "fp4_linear", n = 64, m = [1, 4]}}
  reduce = "min over m of max over fmt"
  holds = ">= 2"
  hardware = "sm_90"
  reviewed = {{sm_90 = "SUPPORTED"}}

[[exclusion]]
section = "Dates"
reason = "a date"
figures = [{{at = 1, text = ["2026"]}}]
""".format(sha="0" * 64)


def read(text: str) -> Ledger:
    return parse_ledger(text, "claims.toml", ops=OP_PARAMS)


def test_reads_every_field() -> None:
    ledger = read(GOOD)
    division, speed = ledger.claims
    assert division.line == 5 and speed.line == 17 and ledger.exclusions[0].line == 35
    assert division.stated is not None and division.stated.facts["six"].source == "counted"
    assert division.figures[0].text == ("6", "2", "3")
    assert speed.restated is not None
    assert speed.restated.select == {"n": ("64",), "m": ("1", "4")}
    assert speed.restated.reduce == (Reduction("max", "fmt"), Reduction("min", "m"))
    assert str(speed.restated.holds) == ">= 2"
    assert ledger.arithmetic_ids == ("a.division",)
    assert arithmetic_metrics(division) == {"holds": 1.0, "value": 3.0}
    with pytest.raises(DataError, match=r"a\.speed has no stated part"):
        arithmetic_metrics(speed)


@pytest.mark.parametrize(
    ("old", "new", "line", "words"),
    [
        ('reviewed = "SUPPORTED"\n\n', "\n", 5, ["a.division", "'reviewed'", "missing"]),
        ('id = "a.speed"', 'id = "a.division"', 17, ["'id'", "used twice", "line 5"]),
        ('id = "a.speed"', 'id = "Speed"', 17, ["'id'", "dotted"]),
        ('says = "twice as fast"', "", 17, ["a.speed", "'says'", "missing"]),
        ('says = "twice as fast"', 'says = "twice"\nsayz = "x"', 17, ["a.speed", "'sayz'", "unknown"]),
        ('hardware = "rtx3070"', 'hardware = "rtx9999"', 17, ["'hardware'", "rtx9999"]),
        ('metric = "ratio"', 'metric = "rate"', 17, ["'metric'", "'rate'"]),
        ('quantity = "time.graph"', 'quantity = "time.graf"', 17, ["'quantity'", "time.graf"]),
        ('kind = "time"', 'kind = "check"', 17, ["'kind'", "time only"]),
        ('kind = "time"', 'kind = "bench"', 17, ["'kind'", "bench"]),
        ('op = "fp4_linear"', 'op = "fp4_linaer"', 17, ["'op'", "fp4_linaer"]),
        ("n = 64,", "q = 64,", 17, ["'q'", "no such parameter"]),
        ("m = [1, 4]", "m = []", 17, ["'m'", "not empty"]),
        ("m = [1, 4]", "m = [1, 1]", 17, ["'m'", "twice"]),
        ("m = [1, 4]", "m = [true]", 17, ["'m'"]),
        ("min over m of max over fmt", "min over m by fmt", 17, ["'reduce'", "min over m by fmt"]),
        ("min over m of max over fmt", "best over m", 17, ["'reduce'", "best over m"]),
        ("min over m of max over fmt", "min over m of max", 17, ["'reduce'", "leftmost"]),
        ("min over m of max over fmt", "min over m of max over m", 17, ["'reduce'", "twice"]),
        ("min over m of max over fmt", "min over dtype", 17, ["'reduce'", "dtype"]),
        ('holds = ">= 2"', 'holds = "about 2"', 17, ["'holds'", "about 2"]),
        ('holds = ">= 2"', 'holds = "within 0% of 2"', 17, ["'holds'"]),
        ('over = "torch_native[cublas_bf16]"', "", 17, ["'over'", "missing"]),
        ('over = "torch_native[cublas_bf16]"', 'over = "torch_native[cublas"', 17, ["'over'"]),
        ('hardware = "sm_90"', 'hardware = "h200"', 17, ["'hardware'", "h200"]),
        ('reviewed = {sm_90 = "SUPPORTED"}', "", 17, ["'reviewed'", "missing"]),
        ('reviewed = {sm_90 = "SUPPORTED"}', 'reviewed = {sm_90 = "TRUE"}', 17, ["'reviewed'", "TRUE"]),
        ('reviewed = {sm_90 = "SUPPORTED"}', 'reviewed = {cpu = "NOT_RUN"}', 17, ["'reviewed'", "sm_90"]),
        ('reviewed = {sm_90 = "SUPPORTED"}', 'reviewed = {sm_90 = "NOT_RUN", cpu = "REFUTED"}', 17, ["'reviewed'"]),
        ("six / 2 == 3", "six / 2", 5, ["'check'", "comparison"]),
        ("six / 2 == 3", "seven / 2 == 3", 5, ["'check'", "seven"]),
        ("six / 2 == 3", "six / 0 == 3", 5, ["'check'", "division by zero"]),
        ('value = "six / 2"', 'value = "six > 2"', 5, ["'value'", "number"]),
        ('source = "counted"', 'source = ""', 5, ["facts.six", "'source'"]),
        ("value = 6,", "value = inf,", 5, ["facts.six", "'value'"]),
        ('hardware = "none"', 'hardware = "rtx3070"', 5, ["'reviewed'", "cannot support a measurement"]),
        ('reviewed = "SUPPORTED"\n\n', 'reviewed = "NOT_RUN"\n\n', 5, ["'reviewed'"]),
        ("at = 1, text = ", "at = -1, text = ", 5, ["figures", "'at'"]),
        ('text = ["6", "2", "3"]', 'text = ["6", "6"]', 5, ["figures", "twice"]),
        ('text = ["6", "2", "3"]', "text = [6]", 5, ["figures", "'text'"]),
        ('reason = "a date"', "", 35, ["'reason'", "missing"]),
        ("0" * 64, "12", 0, ["document_sha256"]),
        ('[[claim]]\nid = "a.speed"', '[[claim]\nid = "a.speed"', 17, ["not TOML"]),
        ("[[exclusion]]", "[[excluded]]", 0, ["'excluded'", "unknown"]),
    ],
)
def test_malformed_ledgers(old: str, new: str, line: int, words: list[str]) -> None:
    assert GOOD.count(old) >= 1
    text = GOOD.replace(old, new, 1)
    with pytest.raises(DataError) as caught:
        read(text)
    message = str(caught.value)
    assert message.startswith(f"claims.toml:{line}:" if line else "claims.toml:"), message
    for word in words:
        assert word in message, message


def test_unused_fact_is_refused_and_a_used_one_is_not() -> None:
    read(GOOD.replace("six / 2 == 3", "6 / 2 == 3"))  # still used in value
    with pytest.raises(DataError, match=r"claim a\.division: stated: key 'facts': six is used in no expression"):
        read(GOOD.replace("six / 2", "6 / 2"))


@given(st.data())
def test_each_key_matters(data: st.DataObject) -> None:
    """Dropping any one key is an error or changes what is read: none is ignored."""
    tree = tomllib.loads(GOOD)
    paths: list[tuple[Any, ...]] = []

    def walk(node: Any, path: tuple[Any, ...]) -> None:
        if isinstance(node, dict):
            for key, value in node.items():
                paths.append((*path, key))
                walk(value, (*path, key))
        elif isinstance(node, list):
            for i, value in enumerate(node):
                walk(value, (*path, i))

    walk(tree, ())
    path = data.draw(st.sampled_from(paths))
    broken = copy.deepcopy(tree)
    node: Any = broken
    for step in path[:-1]:
        node = node[step]
    before = read(_to_toml(tree))
    del node[path[-1]]
    try:
        after = read(_to_toml(broken))
    except DataError:
        return
    assert after != before


def _to_toml(tree: dict[str, Any]) -> str:
    """Inline TOML of the test's own trees: texts, whole numbers, lists, tables."""

    def inline(value: Any) -> str:
        if isinstance(value, dict):
            return "{" + ", ".join(f"{k} = {inline(v)}" for k, v in value.items()) + "}"
        if isinstance(value, list):
            return "[" + ", ".join(map(inline, value)) + "]"
        return f'"{value}"' if isinstance(value, str) else str(value)

    return "\n".join(f"{key} = {inline(value)}" for key, value in tree.items())


names = st.from_regex(r"[a-z]{1,6}", fullmatch=True).filter(lambda n: n not in ("of", "over"))


@given(st.lists(st.tuples(st.sampled_from(REDUCERS), names), min_size=1, max_size=4, unique_by=lambda t: t[1]))
def test_reduce_reads_right_to_left(steps: list[tuple[str, str]]) -> None:
    text = " of ".join(f"{how} over {name}" for how, name in steps)
    assert [(s.how, s.over) for s in parse_reduce(text)] == list(reversed(steps))
    bare = parse_reduce(f"median of {text}")
    assert bare[-1] == Reduction("median", None) and bare[:-1] == parse_reduce(text)


@given(st.sampled_from([">=", "<=", "==", ">", "<"]), st.floats(-1e6, 1e6, allow_nan=False))
def test_holds_round_trips(comparator: str, threshold: float) -> None:
    holds = parse_holds(f"{comparator} {threshold!r}")
    assert (holds.comparator, holds.threshold) == (comparator, threshold)
    within = parse_holds(f"within 2.5% of {threshold!r}")
    assert (within.comparator, within.threshold, within.tolerance) == ("within", threshold, 0.025)


def test_stated_digest_follows_check_and_facts() -> None:
    first = stated_digest(read(GOOD).claims[0])
    assert first == stated_digest(read(GOOD.replace("Table", "Chart")).claims[0])
    assert first != stated_digest(read(GOOD.replace("six / 2 == 3", "six / 2 == 3.0")).claims[0])
    assert first != stated_digest(read(GOOD.replace("counted", "guessed")).claims[0])


def test_unreadable_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        load_ledger(tmp_path / "none.toml")
    (tmp_path / "bad.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="cannot be read"):
        load_ledger(tmp_path / "bad.toml")


# -- the ledger of this repository -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ours() -> Ledger:
    return load_ledger(LEDGER, ops=OP_PARAMS)


def test_our_ledger_is_whole(ours: Ledger) -> None:
    assert len(ours.claims) >= 60
    assert len(ours.arithmetic_ids) >= 15
    assert all(c.line for c in ours.claims)
    for claim in ours.claims:
        assert claim.stated or claim.restated or claim.open, f"{claim.id}: nothing decides it and no word says why"
        if claim.restated is not None:
            assert "cublas" not in claim.restated.over or any(
                dtype in claim.restated.sentence for dtype in ("bf16", "fp16", "fp32")
            ), f"{claim.id} names no baseline dtype"


def test_our_arithmetic_gives_the_reviewed_verdicts(ours: Ledger) -> None:
    for claim in ours.claims:
        if claim.stated is None:
            continue
        holds = arithmetic_metrics(claim)["holds"] == 1.0
        word = "REFUTED" if not holds else "SUPPORTED" if claim.hardware == "none" else "NOT_RUN"
        assert word == claim.stated.reviewed, claim.id
        if word == "REFUTED":
            assert claim.stated.note or claim.stated.facts, f"{claim.id}: a refutation says why"


def test_our_selects_meet_planned_cases(ours: Ledger) -> None:
    """Each restated claim asks for cases that the suites plan, in the kind it reads: none is out of reach."""
    import importlib
    import itertools

    names = ("fp4", "attention", "tier", "model", "rivals")
    suites = [importlib.import_module(f"vbench.suites.{name}").SUITE for name in names]
    planned = {
        "check": [c for s in suites for c in s.checks],
        "time": [b.case for s in suites for b in s.benches],
    }
    for claim in ours.claims:
        restated = claim.restated
        if restated is None:
            continue
        cases = [
            {k: UNSAID if k in case.unsaid else str(v) for k, v in case.params}
            for case in planned[restated.kind]
            if case.op == restated.op and case.seed == 0
        ]
        for values in itertools.product(*restated.select.values()):
            wanted = dict(zip(restated.select, values, strict=True))
            assert any(all(case.get(k) == v for k, v in wanted.items()) for case in cases), (claim.id, wanted)
            if restated.over:
                base = [c for c in planned[restated.kind] if c.op == restated.over_op and c.seed == 0]
                wanted |= restated.over_select
                asked = [
                    {k: v for k, v in wanted.items() if k in dict(c.params) or k in restated.over_select} for c in base
                ]
                met_by = any(
                    all((UNSAID if k in c.unsaid else str(c[k])) == v for k, v in a.items())
                    for c, a in zip(base, asked, strict=True)
                )
                assert met_by, (claim.id, "over", wanted)
        met = [c for c in cases if all(c.get(k) in v for k, v in restated.select.items())]
        gone = {step.over for step in restated.reduce}
        if restated.metric != "fraction_passed" and None not in gone:
            left = {tuple(v for k, v in c.items() if k not in gone) for c in met}
            assert len(left) == 1, f"{claim.id}: reduce leaves {len(left)} values"
