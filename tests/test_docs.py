"""Documents are executed: each console block, each relative link, each generated number."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from vbench.cli import main

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "results").glob("*.md")])


def commands(text: str) -> list[str]:
    blocks = re.findall(r"```console\n(.*?)```", text, flags=re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if line.strip()]


def test_console_blocks_run_in_order(tmp_path: Path) -> None:
    lines = commands((ROOT / "README.md").read_text(encoding="utf-8"))
    assert lines and all(line.startswith("vbench ") for line in lines)
    (tmp_path / "README.md").write_text((ROOT / "README.md").read_text(encoding="utf-8"), encoding="utf-8")
    for line in lines:
        done = subprocess.run(
            [sys.executable, "-m", *line.split()],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
        )
        assert done.returncode == 0, (line, done.stdout[-800:], done.stderr[-800:])


def test_make_targets_named_in_the_readme_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"^make (\w+)", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: p.name)
def test_relative_links_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", path.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (path.parent / target).exists(), target


def test_numbers_in_the_readme_are_those_of_the_records(tmp_path: Path) -> None:
    readme = ROOT / "README.md"
    assert main(["claims", "check", str(readme)]) == 0
    text = readme.read_text(encoding="utf-8")
    start = text.index("<!-- vbench:table")
    digit = re.search(r"\d", text[text.index("-->", start) + 3 :])
    assert digit is not None
    at = text.index("-->", start) + 3 + digit.start()
    changed = text[:at] + str((int(text[at]) + 1) % 10) + text[at + 1 :]
    copy = tmp_path / "README.md"
    copy.write_text(changed, encoding="utf-8")
    assert main(["claims", "check", str(copy)]) == 1
    assert main(["claims", "update", str(copy)]) == 0
    assert copy.read_bytes() == readme.read_bytes()


SEED = ROOT.parent / "shared" / "seed" / "virtual-blackwell.md"


@pytest.mark.skipif(not SEED.is_file(), reason="the document under test is not in this repository")
def test_every_numeral_of_the_document_is_accounted_for(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["claims", "coverage", str(SEED)]) == 0, capsys.readouterr().out
    more = tmp_path / "more.md"
    more.write_text(SEED.read_text(encoding="utf-8") + "\n\n# More\n\nIt is 123.4 times faster.\n", encoding="utf-8")
    assert main(["claims", "coverage", str(more)]) == 1
    assert "123.4" in capsys.readouterr().out
