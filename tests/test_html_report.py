"""The page of a run: complete, one file, nothing in it to fetch (``test_report_browser.py`` asks a browser)."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.test_roofline import MEASURED
from vbench.cli import main
from vbench.plots import BOTTOM, LEFT, RIGHT, TOP, Limit, Point, Series, build, log_ticks
from vbench.record import ErrorStats, Outcome, Record
from vbench.store import read_records, write_records

ROOT = Path(__file__).resolve().parent.parent
H200 = ROOT / "results" / "baselines" / "h200"
#: The page must stay small enough to be sent by mail.
MOST_BYTES = 2 << 20


class Page(HTMLParser):
    """What a page refers to, and what it can be referred to by."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.links: list[str] = []
        self.outside: list[str] = []
        self.tags: list[str] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value or "")
            if name in ("href", "src", "action", "data", "poster", "srcset"):
                target = self.links if (value or "").startswith("#") else self.outside
                target.append(value or "")


def report(run: Path, folder: Path) -> str:
    page = folder / "page.html"
    assert main(["report", str(run), "-o", str(page)]) == 0
    return page.read_text(encoding="utf-8")


def test_the_committed_records_make_one_whole_page(tmp_path: Path) -> None:
    text = report(H200, tmp_path)
    page = Page(text)
    records = read_records(H200)
    assert len(text.encode()) < MOST_BYTES
    assert {f"r-{r.id}" for r in records} <= set(page.ids) and len(page.ids) == len(set(page.ids))
    assert page.links and {link[1:] for link in page.links} <= set(page.ids), "every number leads to its record"
    assert [o for o in page.outside if not o.startswith("data:")] == [], "nothing is fetched"
    assert "script" not in page.tags and "url(" not in text and "@import" not in text
    assert "default-src 'none'" in text
    assert text.count("<svg") >= 5 and "nan" not in re.sub(r"<[^>]*>", "", text).lower().split()
    assert "NVIDIA H200" in text and "fp4.speedup" in text


def test_ceilings_make_a_roofline(tmp_path: Path) -> None:
    run = tmp_path / "run.jsonl"
    write_records(run, [*read_records(H200), *MEASURED])
    section = report(run, tmp_path).split('<section id="roofline">')[1].split("</section>")[0]
    assert "<svg" in section and ">bf16</text>" in section and "<circle" in section


def test_decided_claims_come_first_and_are_counted(tmp_path: Path) -> None:
    text = report(H200, tmp_path)
    section = text.split('<section id="claims">')[1].split("</section>")[0]
    before, after = section.split("claims that this run does not decide")
    words = re.compile(r'class="(REFUTED|SUPPORTED)"')
    assert words.search(before) and not words.search(after)
    head = re.search(r"(\d+) claims, (\d+) REFUTED, (\d+) SUPPORTED, (\d+) not decided here", text)
    assert head is not None
    claims, refuted, supported, undecided_number = map(int, head.groups())
    rows = [part.count("<tr><td>") for part in (before, after)]
    assert rows == [claims - undecided_number, undecided_number]
    assert rows[0] <= refuted + supported, "a claim may have two verdicts"


def test_text_of_records_is_escaped(tmp_path: Path) -> None:
    bad = Record(
        "op[a=<script>alert(1)</script>]",
        "b",
        "check",
        Outcome.WRONG_VALUE,
        "r",
        reason="<b>",
        error=ErrorStats("y", 1, 1, float("inf"), None, 0.0),
        environment={"gpu": "<img src=x>"},
    )
    run = tmp_path / "run.jsonl"
    write_records(run, [bad])
    page = Page(report(run, tmp_path))
    assert not {"script", "img", "b"} & set(page.tags)


def test_bad_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    empty = tmp_path / "empty.jsonl"
    empty.write_text("", encoding="utf-8")
    assert main(["report", str(empty), "-o", str(tmp_path / "x.html")]) == 3
    assert not (tmp_path / "x.html").exists()
    assert main(["report", "no-such-run"]) == 2
    assert main(["report", str(H200), "-o", str(tmp_path / "none" / "x.html")]) == 2
    assert "choose another file" in capsys.readouterr().err


values = st.floats(1e-9, 1e9)


@given(st.lists(st.tuples(values, values), min_size=1, max_size=20), st.booleans())
def test_every_point_lies_inside_its_plot(points: list[tuple[float, float]], joined: bool) -> None:
    made = [Point(x, y, "r", "t", y / 1.5, y * 1.5) for x, y in points]
    limit = Limit("l", [(min(x for x, _ in points), 1.0), (max(x for x, _ in points), 1.0)])
    plot = build("t", "x", "y", [Series("s", made, joined)], limits=[limit], colour=lambda name: 0)
    (series,) = plot.series
    for p in series["points"]:
        assert LEFT <= p["x"] <= RIGHT
        assert TOP <= p["high"] <= p["y"] <= p["low"] <= BOTTOM, "larger is higher up"
    assert len(series["points"]) == len(points)
    order = [p["x"] for p in series["points"]]
    assert order == sorted(order)


@given(st.floats(1e-9, 1e9), st.floats(1.3, 1e9))
def test_axes_have_ticks(low: float, factor: float) -> None:
    ticks = log_ticks(low, low * factor)
    assert ticks == sorted(ticks) and all(low * 0.99 <= t <= low * factor * 1.01 for t in ticks)
    assert len(ticks) <= 14
    assert ticks or factor < 1.7
