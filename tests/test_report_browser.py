"""The page of the committed H200 records in Chromium's engine: quiet, whole, and readable, without a screen.

The engine comes from pip (constraints.browser.txt): ``make browser-test``, which CI runs. Skipped elsewhere.
"""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from tests.test_html_report import H200, ROOT
from tests.test_roofline import MEASURED
from vbench.cli import main
from vbench.store import read_records, write_records

pytestmark = pytest.mark.skipif(
    find_spec("PySide6") is None, reason="no browser here: make browser-test installs one and runs this"
)

#: Widths of a window, px: a telephone's and a desk's.
WIDTHS = (400, 1280)
SCHEMES = ("light", "dark")
LEAST_CONTRAST = 4.5  # WCAG 2.2, success criterion 1.4.3, level AA: words
LEAST_GRAPHIC_CONTRAST = 3.0  # 1.4.11: what is drawn
LEAST_PX = 9.0


def browse(scheme: str, jobs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What ``tests.browser`` saw of each page."""
    asked = json.dumps([{"javascript": True, "width": WIDTHS[-1], "picture": "", **job} for job in jobs])
    command = [sys.executable, "-m", "tests.browser", scheme]
    done = subprocess.run(command, input=asked, capture_output=True, text=True, check=False, timeout=120, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    seen: list[dict[str, Any]] = json.loads(done.stdout)
    assert len(seen) == len(jobs)
    return seen


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The committed records' page, and one with measured ceilings beside them, so that a roofline is drawn."""
    folder = tmp_path_factory.mktemp("pages")
    both = folder / "both.jsonl"
    write_records(both, [*read_records(H200), *MEASURED])
    found = {}
    for name, run in (("committed", H200), ("ceilings", both)):
        found[name] = folder / f"{name}.html"
        assert main(["report", str(run), "-o", str(found[name])]) == 0
    return found


@pytest.mark.parametrize("scheme", SCHEMES)
def test_it_is_quiet_whole_and_readable(scheme: str, pages: dict[str, Path]) -> None:
    ways = [(page, javascript, width) for page in pages.values() for javascript in (True, False) for width in WIDTHS]
    seen_pages = browse(scheme, [{"page": str(p), "javascript": on, "width": width} for p, on, width in ways])
    records = len(read_records(H200))
    for (page, _, width), seen in zip(ways, seen_pages, strict=True):
        facts = seen["facts"]
        assert seen["asked"] == [page.as_uri()], "no request but the page itself"
        assert seen["said"] == [], "nothing on the console"
        assert facts["sections"] == ["claims", "roofline", "sweeps", "errors", "environment", "records"]
        text = page.read_text(encoding="utf-8")
        assert facts["plots"] == text.count("<svg") >= 5 and facts["points"] == text.count("<circle") > 100
        assert facts["tables"] == text.count("<table") >= 4
        assert facts["rows"] >= records and facts["dead"] == 0
        assert facts["dark"] == (scheme == "dark") and (facts["background"] < 0.1) == (scheme == "dark")
        assert facts["wide"] <= facts["room"] <= width, "no scrolling sideways"
        assert facts["faint"][0] >= LEAST_CONTRAST, facts["faint"]
        assert facts["pale"][0] >= LEAST_GRAPHIC_CONTRAST, facts["pale"]
        assert facts["small"][0] >= LEAST_PX, facts["small"]
        assert facts["cut"] == [], "no word of a plot is cut off"


BAD = """<!doctype html><html><body style="width: 3000px; background: #fff">
<img src="http://127.0.0.1:9/x.png"><p style="color: #ccc">faint</p><p style="font-size: 5px">small</p>
<a href="#nowhere">dead</a><svg viewBox="0 0 10 10" width="10" height="10"><text x="50" y="5">cut</text>
<circle r="3" fill="#ccc"/></svg><script>document.title = "ran"; console.error("oh")</script></body></html>"""


def test_control_each_fault_is_seen(tmp_path: Path) -> None:
    page = tmp_path / "bad.html"
    page.write_text(BAD, encoding="utf-8")
    on, off = browse("light", [{"page": str(page), "javascript": j, "width": 400} for j in (True, False)])
    assert [s["facts"]["title"] for s in (on, off)] == ["ran", ""], "scripts run, and are off where asked"
    assert on["said"] == ["oh (line 4)"] and off["said"] == []
    for seen in (on, off):
        facts = seen["facts"]
        assert "http://127.0.0.1:9/x.png" in seen["asked"]
        assert facts["wide"] > facts["room"] and facts["dead"] == 1 and facts["cut"] == ["cut"]
        assert facts["faint"][0] < LEAST_CONTRAST and facts["faint"][1] == "faint"
        assert facts["small"][0] < LEAST_PX and facts["small"][1] == "small"
        assert facts["pale"][0] < LEAST_GRAPHIC_CONTRAST
        assert facts["rows"] == facts["tables"] == 0


def test_control_a_page_that_is_not_there(tmp_path: Path) -> None:
    (seen,) = browse("light", [{"page": str(tmp_path / "none.html")}])
    assert seen["facts"] == {} or seen["facts"]["sections"] == []
