"""The limit on timed rows: never exceeded, whole cases, what claims rest on first, and said aloud."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Iterable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vbench import commands, registry, survey
from vbench.cli import main
from vbench.judge import case_params, may_rest_on
from vbench.plan import EFFORTS, Job, plan
from vbench.record import Measurement, Outcome, Record
from vbench.reference.ops.fp4 import FORMATS
from vbench.rows import MOST_ROWS, WORKER_START_S, Limited, estimate_s, within_limit
from vbench.spec import Suite


def job(case: int, backend: str, kind: Any = "time", op: str = "") -> Job:
    op = op or f"op{case % 3}"
    return Job(kind, "s", f"{op}[n={case}]", op, backend, "", "own", 1.0, "", "cuda")


def plans() -> st.SearchStrategy[list[Job]]:
    pairs = st.tuples(st.integers(0, 12), st.sampled_from("abcd"), st.sampled_from(("time", "check")))
    return st.lists(pairs, unique=True, max_size=60).map(lambda some: [job(*one) for one in some])


@given(plans(), st.integers(0, 30), st.sets(st.integers(0, 12)), st.sets(st.sampled_from("abcd")))
def test_whole_cases_within_the_limit_and_nothing_lost(
    jobs: list[Job], most: int, needed: set[int], refusing: set[str]
) -> None:
    first = {f"[n={n}]" for n in needed}
    found = within_limit(
        jobs, most, lambda j: j.backend not in refusing, lambda j: j.case[j.case.index("[") :] in first
    )
    assert len(found.rows) <= most
    assert list(found.jobs) == [j for j in jobs if j not in found.postponed], "the order of the plan"
    assert all(j.kind == "time" for j in found.postponed)
    assert not {j.case for j in found.rows} & {j.case for j in found.postponed}, "a ratio needs both sides"
    assert [j for j in found.jobs if j.kind == "time" and j.backend not in refusing] == list(found.rows)
    assert bool(found.message) == bool(found.postponed)
    # A case that nothing rests on never takes the room of one that something does.
    left = most - sum(1 for j in found.rows if j.case[j.case.index("[") :] in first)
    for case in {j.case for j in found.postponed if j.case[j.case.index("[") :] in first}:
        assert sum(j.case == case and j.backend not in refusing for j in found.postponed) > left


def test_of_a_case_what_something_rests_on_comes_before_its_other_kernels() -> None:
    jobs = [job(n, backend) for n in range(4) for backend in "abcd"]
    found = within_limit(jobs, 11, lambda _: True, lambda j: j.backend in "ab")
    assert {(j.case, j.backend) for j in jobs if j.backend in "ab"} <= {(j.case, j.backend) for j in found.rows}
    rest = [j for j in found.rows if j.backend in "cd"]
    assert len(rest) == 2 and len({j.case for j in rest}) == 1, "of the others one whole group fits"


def test_without_a_limit_everything_is_kept() -> None:
    jobs = [job(n, b) for n in range(50) for b in "abcdefgh"]
    found = within_limit(jobs, None, lambda _: True, lambda _: False)
    assert len(found.rows) == 400 and found.postponed == () and found.message == ""


def test_ops_take_turns() -> None:
    jobs = [job(n, "a", op="many") for n in range(10)] + [job(n, "a", op="few") for n in range(2)]
    found = within_limit(jobs, 4, lambda _: True, lambda _: False)
    assert [j.case for j in found.rows] == ["many[n=0]", "many[n=1]", "few[n=0]", "few[n=1]"]


def test_of_an_op_what_a_case_is_there_for_comes_before_the_rest() -> None:
    """The control is the same plan without the mark, of which the first case takes all the room."""
    jobs = [job(n, backend, op="o") for n in range(4) for backend in "abcd"]
    marked = [dataclasses.replace(j, first=j.backend in "ab") for j in jobs]
    found = within_limit(marked, 10, lambda _: True, lambda _: False)
    assert Counter(j.case for j in found.rows if j.backend in "ab") == dict.fromkeys((j.case for j in jobs), 2)
    rest = [j for j in found.rows if j.backend in "cd"]
    assert len(rest) == 2 and len({j.case for j in rest}) == 1
    control = within_limit(jobs, 10, lambda _: True, lambda _: False)
    assert len({j.case for j in control.rows}) == 2


def _refuses(question: survey.Question) -> bool:
    """Variants that name what they take; nothing else is refused."""
    op, case_id, variant = question
    if op == "fp4_linear" and variant.startswith("cublas_"):
        return f",x={variant.removeprefix('cublas_')}," not in case_id
    if op == "offload_pass" and variant == "double_buffer":
        return "mode=train" in case_id
    return op == "int8_linear" and variant != "" and ("act_quant=none" in case_id) != (variant == "eager_dequant")


def _only_timed(suite: Suite) -> Suite:
    """Without its checks, which cost draws and decide nothing of what is timed."""
    return dataclasses.replace(suite, checks=(), generated=(), regressions="")


def _planned(suites: list[str], effort: str, monkeypatch: pytest.MonkeyPatch) -> Limited:
    """The plan on a GPU, no kernel refusing anything else: the worst case."""

    def all_ok(infos: Any, device: str, questions: Any) -> dict[tuple[str, str, str, str], survey.Answer]:
        assert device == "cuda"
        return {
            (i.name, *q): survey.Answer("unsupported" if _refuses(q) else "ok") for i in infos for q in questions(i)
        }

    monkeypatch.setattr(survey, "ask_all", all_ok)
    timed = {name: _only_timed(suite) for name, suite in registry.suites().items()}
    monkeypatch.setattr(registry, "suites", lambda: timed)
    infos = registry.backends()
    recipe = {
        "suites": suites,
        "backends": [i.name for i in infos.values() if i.distribution == registry.OWN_DISTRIBUTION],
        "ops": list(registry.ops()), "effort": effort, "seed": 0, "claims": [], "device": "cuda",
    }  # fmt: skip
    return commands._plan(recipe, infos)[0]


#: What a standard run of one suite is there for: op, the axes of its grid, and who must be timed on every cell.
GRIDS: dict[str, list[tuple[str, dict[str, tuple[str, ...]], tuple[str, ...]]]] = {
    "attention": [
        (
            op,
            {
                "d": ("64", "128"),
                "causal": ("none", "bottom_right"),
                "sq": ("512", "1024", "2048", "4096", "8192", "16384"),
                "hk": ("16", "32"),
            },
            ("triton", "triton[gluon]", "torch_native[sdpa_cudnn]", *more),
        )
        for op, more in (
            ("attention", ("flash_attn_4",)),
            ("attention_backward", ("triton[gluon_deterministic]", "flash_attn_4[default]")),
        )
    ],
    "fp4": [
        (
            "fp4_linear",
            {
                "fmt": FORMATS,
                "x": ("bf16",),
                "m": ("1", "4", "16", "64", "256", "1024", "4096"),
                "n": ("4096", "14336"),
                "k": ("4096", "14336"),
            },
            ("triton", "torch_native[cublas_bf16]"),
        )
    ],
}
CELLS = {"attention": 24, "attention_backward": 24, "fp4_linear": 7 * 2 * len(FORMATS)}


@pytest.mark.parametrize("suite", GRIDS)
def test_a_standard_run_of_one_suite_times_the_whole_grid(suite: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control is the same suite without the marks: then the limit leaves cells out."""

    def timed(rows: Iterable[Job]) -> dict[tuple[str, str], set[tuple[str, ...]]]:
        found: dict[tuple[str, str], set[tuple[str, ...]]] = {}
        for j in rows:
            params = case_params(j.case)[1]
            for op, axes, kernels in GRIDS[suite]:
                who = f"{j.backend}[{j.variant}]" if j.variant else j.backend
                at = tuple(params.get(axis, "") for axis in axes)
                square = "n" not in axes or params["n"] != params["k"]
                if j.op == op and who in kernels and square and all(map(_in, at, axes.values())):
                    found.setdefault((op, who), set()).add(at)
        return found

    planned = _planned([suite], "standard", monkeypatch)
    assert len(planned.rows) <= 300
    wanted = {(op, who) for op, _, kernels in GRIDS[suite] for who in kernels}
    assert {key: len(cells) for key, cells in timed(planned.rows).items()} == {key: CELLS[key[0]] for key in wanted}
    bare = registry.suites()[suite]
    bare = dataclasses.replace(bare, benches=tuple(dataclasses.replace(b, first=(), later=()) for b in bare.benches))
    monkeypatch.setattr(registry, "suites", lambda: {suite: bare})
    control = timed(_planned([suite], "standard", monkeypatch).rows)
    assert any(len(control.get(key, ())) < CELLS[key[0]] for key in wanted)


def _in(value: str, admitted: tuple[str, ...]) -> bool:
    return value in admitted


def test_suites_name_kernels_that_exist_and_full_times_them_all() -> None:
    infos = registry.backends()
    known = {i.name for i in infos.values()}
    known |= {f"{i.name}[{v}]" for i in infos.values() for variants in i.variants.values() for v in variants}
    ours = [infos[name] for name in ("torch_native", "triton", "as_written", "numba_cuda")]
    needs = [c.restated for book in commands.ledgers().values() for c in book.claims if c.restated is not None]
    needs = [r for r in needs if r.kind == "time"]
    later = 0
    for suite in registry.suites().values():
        for bench in suite.benches:
            assert {*bench.first, *bench.later} <= known
            assert not {*bench.first} & {*bench.later}
        keys = [
            {
                j.key
                for j in plan([_only_timed(suite)], ours, ops=registry.ops(), effort=effort, seed=0)
                if j.kind == "time"
            }
            for effort in EFFORTS
        ]
        assert keys[0] <= keys[1] <= keys[2]
        waiting = {b.case.id for b in suite.benches if b.effort != "full"} & {key[1] for key in keys[2] - keys[1]}
        later += len(waiting)
        for _, case, backend, variant in keys[2] - keys[1]:
            if case in waiting:
                assert not any(may_rest_on(r, backend, variant, case) for r in needs), (case, backend, variant)
    assert later, "something waits for effort full"


@pytest.mark.parametrize("effort", EFFORTS[:2])
def test_a_run_of_everything_on_a_gpu_stays_within_300_rows_and_keeps_what_claims_rest_on(
    effort: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The worst case: no kernel refuses anything, but for variants that name what they take."""

    suites = [name for name, suite in registry.suites().items() if not suite.compiles]
    planned = _planned(suites, effort, monkeypatch)
    assert MOST_ROWS[effort] == 300 and 50 < len(planned.rows) <= 300  # type: ignore[index]
    needs = [c.restated for book in commands.ledgers().values() for c in book.claims if c.restated is not None]

    def needed(j: Job) -> bool:
        return any(may_rest_on(r, j.backend, j.variant, j.case) for r in needs if r.kind == "time")

    assert not [j.case for j in planned.postponed if needed(j)]
    assert any(map(needed, planned.rows))
    if effort == "standard":
        assert "--effort full" in planned.message


def test_dry_run_says_how_much_there_is_and_leaves_nothing(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ["run", "--suite", "tier", "--backend", "tiers", "--device", "cpu", "--dry-run"]
    assert main([*arguments, "--json"]) == 0
    body = json.loads(capsys.readouterr().out)
    assert body["timed_rows"] == body["jobs"]["time"] == 4 and body["postponed"] == 0
    assert main([*arguments, "--no-time", "--json"]) == 0
    untimed = json.loads(capsys.readouterr().out)
    assert untimed["timed_rows"] == 0 and untimed["jobs"] == {k: n for k, n in body["jobs"].items() if k != "time"}
    assert main(["run", "--resume", "latest", "--no-time"]) == 2
    assert main(arguments) == 0
    assert "timed here: 4 rows" in capsys.readouterr().out
    assert main(["run", "--resume", "latest", "--dry-run"]) == 2
    assert list(tmp_path.iterdir()) == []


def test_the_estimate_is_the_mean_of_what_was_seen() -> None:
    def seen(backend: str, op: str, elapsed_s: float) -> Record:
        timed = (Measurement("wall", (1.0,)),)
        return Record(f"{op}[n=1]", backend, "time", Outcome.PASSED, "r", elapsed_s=elapsed_s, measurements=timed)

    records = [seen("a", "op0", 1.0), seen("a", "op0", 3.0), seen("b", "op1", 8.0)]
    rows = [job(0, "a"), job(3, "a"), job(1, "b"), job(2, "c")]
    assert estimate_s(rows, records) == pytest.approx(2 + 2 + 8 + 4 + 3 * WORKER_START_S)
    assert estimate_s(rows, []) is None
