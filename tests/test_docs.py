"""Documents are executed: each console block, each relative link, each generated number."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from vbench.cli import main, parser
from vbench.kernels.virtual.cli import parser as virtual_parser

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "results").glob("*.md")])


def commands(text: str) -> list[str]:
    blocks = re.findall(r"```console\n(.*?)```", text, flags=re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if line.strip()]


def test_console_blocks_run_in_order(tmp_path: Path) -> None:
    lines = commands((ROOT / "README.md").read_text(encoding="utf-8"))
    assert lines and all(line.startswith("vbench ") for line in lines)
    (tmp_path / "README.md").write_text((ROOT / "README.md").read_text(encoding="utf-8"), encoding="utf-8")
    shutil.copytree(ROOT / "docs" / "plots", tmp_path / "docs" / "plots")
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


def vouched(line: str) -> bool:
    """Whether a line of a shell block is known to work: a make target that exists, set-up, a command that parses."""
    words = shlex.split(line, comments=True)
    if words[:1] == ["make"]:
        makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
        return all(re.search(rf"^{t}:", makefile, flags=re.MULTILINE) for t in words[1:] if "=" not in t)
    parsers = {"vbench": parser, ".venv/bin/vbench": parser, "virtual-blackwell": virtual_parser}
    if words and words[0] in parsers:
        try:
            parsers[words[0]]().parse_args(words[1:])
        except SystemExit:
            return False
        return True
    # What the Makefile's own set-up does, by hand.
    return words in (
        ["python3", "-m", "venv", ".venv"],
        shlex.split(".venv/bin/pip install -c constraints.txt -e '.[dev]'"),
    )


def test_a_command_that_cannot_work_is_seen() -> None:
    assert vouched("make run  # a comment") and vouched("vbench show --failed")
    bad = (
        "make coffee",
        "vbench brew",
        "vbench run --fast",
        "virtual-blackwell estimate",
        "vbench show A B",
        "rm -rf build",
    )
    assert not any(map(vouched, bad))


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: p.name)
def test_every_command_in_a_document_is_executed_or_vouched_for(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = path.read_text(encoding="utf-8")
    for language, body in re.findall(r"^```(\w*)\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE):
        assert language in ("console", "sh", "toml", "python"), (
            f"a block of {language!r} is neither executed nor vouched for"
        )
        if language == "console":
            assert path.name == "README.md", "executed below for the README only"
        elif language == "python":
            exec(compile(body, path.name, "exec"), {})
        elif language == "sh":
            assert [line for line in body.splitlines() if line.strip() and not vouched(line)] == []
    prose = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    inline = [" ".join(code.split()) for code in re.findall(r"`((?:vbench|make|virtual-blackwell) [^`]+)`", prose)]
    if path.name == "CHANGELOG.md":
        return  # history may name what is gone
    # Placeholders in capitals stand for an argument; brackets and dots for more.
    assert [c for c in inline if "..." not in c and "[" not in c and not vouched(c)] == [], capsys.readouterr().err


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
