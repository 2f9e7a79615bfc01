"""Plots in documents: made from records like the tables, checked like them, and never a number where there is none."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.test_baseline import timed
from tests.test_documents import RATIO, drifts, fresh, ledger, linear, records, same
from vbench.cli import main
from vbench.documents import evidence, pictures
from vbench.errors import DataError
from vbench.pictures import Group, Mark, draw_lines, draw_rows
from vbench.record import Outcome, Record
from vbench.store import write_records

ROOT = Path(__file__).resolve().parent.parent
MOST_BYTES = 60_000
SVG = "{http://www.w3.org/2000/svg}"
LINES = f"<!-- vbench:plot plots/a.svg lines {RATIO} -->\n<!-- /vbench -->\n"
ROWS = LINES.replace("a.svg lines", "b.svg rows")
NAMED = f"<!-- vbench:plot c.svg rows {RATIO} | small: m=1 | large: m=4,16 -->\n<!-- /vbench -->\n"


def drawn(text: str, have: Sequence[Record] | None = None, current: object = None) -> dict[str, ElementTree.Element]:
    """Each picture, parsed: what is no XML fails here."""
    sources = (lambda r: "sha256:new" if r.sources else None) if current else same
    found = pictures(text, records() if have is None else have, current_sources=sources, where="README.md")
    return {path: ElementTree.fromstring(svg) for path, svg in found.items()}


def words(picture: ElementTree.Element) -> list[str]:
    return [t.text or "" for t in picture.iter(f"{SVG}text")]


def test_a_picture_shows_the_tables_values_and_says_them() -> None:
    found = drawn(LINES + ROWS + NAMED)
    assert list(found) == ["plots/a.svg", "plots/b.svg", "c.svg"]
    for picture in found.values():
        assert len(list(picture.iter(f"{SVG}circle"))) == 6
        assert "ratio" not in "".join(words(picture)) and picture.find(f"{SVG}title") is not None
    assert words(found["plots/b.svg"]).count("3.70x") == words(found["plots/b.svg"]).count("3.00x") == 3
    assert {"small", "large"} <= set(words(found["c.svg"]))
    once = fresh(LINES)
    alt = re.search(r"!\[(.*)\]\(plots/a\.svg\)", once)
    assert alt is not None and "nvfp4: 3.00x at m=1 to 3.00x at m=16" in alt.group(1)
    assert found["plots/a.svg"].findtext(f"{SVG}title") == alt.group(1)
    assert fresh(once) == once and drifts(once) == [] and drifts(LINES)


@pytest.mark.parametrize("text", [LINES, ROWS])
def test_what_has_no_number_is_a_gap_with_its_word(text: str) -> None:
    have = [r for r in records() if not (r.backend == "triton" and "fmt=nvfp4,m=4," in r.case)]
    old = [*have, linear("triton", 9e-6, "nvfp4", 4, sources="sha256:old")]
    wrong = [
        linear("torch_native[cublas_bf16]", 31.4e-6, "nvfp4", 4, outcome=Outcome.WRONG_VALUE),
        *(r for r in records() if not (r.backend == "torch_native" and "fmt=nvfp4,m=4," in r.case)),
    ]
    failed = [*have, linear("triton", 0, "nvfp4", 4, outcome=Outcome.UNSUPPORTED, reason="k_odd")]
    for some, word in ((have, "no record"), (old, "STALE"), (wrong, "WRONG_VALUE"), (failed, "UNSUPPORTED(k_odd)")):
        (picture,) = drawn(text, some, current=True).values()
        assert len(list(picture.iter(f"{SVG}circle"))) == 5 and word in words(picture)
        assert f"1 x {word}" in str(picture.findtext(f"{SVG}title"))
        if "lines" in text:
            across = [p.get("points", "").split() for p in picture.iter(f"{SVG}polyline") if p.get("class") == "line"]
            assert [len(points) for points in across] == [3], "no line is drawn across the gap"
    (nothing,) = drawn(text, [], current=True).values()
    assert list(nothing.iter(f"{SVG}circle")) == [] and "NOT_RUN" in words(nothing)
    every = [linear(w, 9e-6, "nvfp4", 4, sources="sha256:old") for w in ("triton", "torch_native[cublas_bf16]")]
    (stale,) = drawn(text, every, current=True).values()
    assert list(stale.iter(f"{SVG}circle")) == [] and "STALE" in words(stale)


ratios = st.floats(0.01, 100.0)


rows_of_cells = st.lists(st.tuples(ratios, st.floats(1.0, 3.0), st.booleans()), min_size=1, max_size=6)


def mark(number: int, value: float, width: float, there: bool) -> Mark:
    label, x = f"m={4**number}", 4.0**number
    if not there:
        return Mark(label, x, word="STALE")
    return Mark(label, x, value, value / width, value * width, text=f"{value:.2f}x")


@given(st.lists(rows_of_cells, min_size=1, max_size=5))
def test_everything_lies_inside_and_is_the_same_again(table: list[list[tuple[float, float, bool]]]) -> None:
    groups = [Group(f"g{i}", [mark(j, *cell) for j, cell in enumerate(row)]) for i, row in enumerate(table)]
    shown = sum(there for row in table for _, _, there in row)
    for svg in (draw_lines(groups, "m", "ratio", "alt"), draw_rows(groups, "ratio", "alt")):
        picture = ElementTree.fromstring(svg)
        width, height = float(picture.get("width", 0)), float(picture.get("height", 0))
        circles = list(picture.iter(f"{SVG}circle"))
        assert len(circles) == shown
        for name, x, y in ((c, "cx", "cy") for c in circles):
            assert 0 <= float(name.get(x, -1)) <= width and 0 <= float(name.get(y, -1)) <= height
        for line in picture.iter(f"{SVG}line"):
            assert all(0 <= float(line.get(f"x{i}", -1)) <= width for i in "12")
            assert all(0 <= float(line.get(f"y{i}", -1)) <= height for i in "12")
        assert all(0 <= float(t.get("y", -1)) <= height for t in picture.iter(f"{SVG}text"))
    assert draw_rows(groups, "ratio", "alt") == svg


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("/etc/a.svg lines " + RATIO, "no path of an .svg"),
        ("../a.svg lines " + RATIO, "no path of an .svg"),
        ("a.png lines " + RATIO, "no path of an .svg"),
        ("a.svg pie " + RATIO, "lines or rows, not 'pie'"),
        ("a.svg lines", "what it shows"),
        ("a.svg lines claims", "kind ratio, not 'claims'"),
        (f"a.svg rows {RATIO} | m=1", "NAME: key=value"),
        (f"a.svg rows {RATIO} | one: m=1 m=4", "given twice"),
        ("a.svg lines " + RATIO.replace("rows=fmt cols=m", "rows=m cols=fmt"), "use rows"),
    ],
)
def test_bad_plots(words: str, said: str) -> None:
    text = f"\n<!-- vbench:plot {words} -->\n<!-- /vbench -->\n"
    for act in (drifts, fresh, drawn):
        with pytest.raises(DataError, match=re.escape(said)) as caught:
            act(text)
        assert str(caught.value).startswith("README.md:2: ")


def test_a_plots_records_are_evidence() -> None:
    kept = evidence(NAMED, ledger(), records(), current_sources=same)
    assert {r.kind for r in kept} == {"time"} and len(kept) == 12


def test_the_command_writes_the_file_and_sees_it_change(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, document = tmp_path / "run.jsonl", tmp_path / "doc.md"
    write_records(run, [timed(b, v, m) for m in (1, 16) for b, v in (("triton", ""), ("torch_native", "cublas_bf16"))])
    document.write_text("a\n\n" + LINES, encoding="utf-8")
    command = [str(document), "--records", str(run)]
    assert main(["claims", "check", *command]) == 1
    assert main(["claims", "update", *command]) == 0
    picture = tmp_path / "plots" / "a.svg"
    assert f"{picture}: rewritten" in capsys.readouterr().out and picture.stat().st_size < MOST_BYTES
    assert main(["claims", "check", *command]) == 0
    whole = picture.read_text(encoding="utf-8")
    for spoil in (lambda: picture.write_text(whole.replace("1", "2"), encoding="utf-8"), picture.unlink):
        spoil()
        assert main(["claims", "check", *command]) == 1
        assert "plots/a.svg as generated" in capsys.readouterr().out
        assert main(["claims", "update", *command]) == 0
        assert picture.read_text(encoding="utf-8") == whole
    assert main(["claims", "update", *command]) == 0 and "unchanged" in capsys.readouterr().out.splitlines()[-1]


def test_committed_pictures_are_small_and_quiet() -> None:
    found = sorted((ROOT / "docs" / "plots").glob("*.svg"))
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert found
    for path in found:
        text = path.read_text(encoding="utf-8")
        assert path.stat().st_size < MOST_BYTES and f"(docs/plots/{path.name})" in readme, "each is shown"
        assert "http" not in text.replace('xmlns="http://www.w3.org/2000/svg"', "") and "<script" not in text
