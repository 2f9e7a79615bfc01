"""Bad input, through the command line: the input named, the rule, what to do; nothing lost, nothing half done."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.test_regression import H200, baseline_of, run_of, timed
from vbench.cli import main
from vbench.store import read_records, write_records

Capture = pytest.CaptureFixture[str]


class Place:
    """A run, a reviewed baseline and a document, and what a command says of them."""

    def __init__(self, folder: Path, capsys: Capture) -> None:
        self.folder, self.capsys = folder, capsys
        self.run, self.baseline = folder / "run.jsonl", folder / "baseline"
        self.document, self.page = folder / "doc.md", folder / "page.html"
        write_records(self.run, run_of())
        write_records(self.baseline / "fp4.jsonl", baseline_of())

    def say(self, *words: str) -> tuple[int, str, str]:
        self.capsys.readouterr()
        code = main([*words])
        said = self.capsys.readouterr()
        return code, said.out, said.err

    #: Every command that reads a run.
    def readers(self) -> dict[str, list[str]]:
        run, baseline = str(self.run), str(self.baseline)
        return {
            "gate": ["gate", run, "--baseline", baseline],
            "show": ["show", run],
            "report": ["report", run, "-o", str(self.page)],
            "update": ["baseline", "update", run, "--baseline", str(self.folder / "new")],
            "join": ["selftest", "--aa", "--pairs", "0", "--join", run],
            "floors": ["ab", "torch", "torch@x=1", "--floors", run, "--out", str(self.folder)],
        }


@pytest.fixture
def place(tmp_path: Path, capsys: Capture) -> Place:
    return Place(tmp_path, capsys)


@pytest.mark.parametrize("where", ["in the middle", "at the end"])
@pytest.mark.parametrize(
    ("name", "code"), [("gate", 0), ("show", 0), ("report", 0), ("update", 0), ("join", 3), ("floors", 2)]
)
def test_a_half_written_line_is_named_and_the_rest_is_kept(place: Place, name: str, code: int, where: str) -> None:
    lines = place.run.read_text(encoding="utf-8").splitlines(keepends=True)
    torn = 2 if where == "in the middle" else 3
    lines[torn - 1] = lines[torn - 1][:300] + ("\n" if where == "in the middle" else "")
    place.run.write_text("".join(lines), encoding="utf-8")
    found, _, err = place.say(*place.readers()[name])
    assert found == code, err
    assert f"{place.run}:{torn}: not whole JSON" in err and "the rest is kept" in err


def test_a_torn_baseline_is_refused_and_says_what_to_do(place: Place) -> None:
    file = place.baseline / "fp4.jsonl"
    file.write_text(file.read_text(encoding="utf-8")[:-200], encoding="utf-8")
    code, _, err = place.say("gate", str(place.run), "--baseline", str(place.baseline))
    assert code == 2 and f"{file}:15: not JSON" in err and "remove this line to keep the rest" in err


def test_a_run_that_was_cut_off_can_be_resumed_and_other_files_cannot(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    write_records(path, run_of())
    path.write_text(path.read_text(encoding="utf-8")[:-9], encoding="utf-8")
    with pytest.raises(Exception, match="remove this line"):
        read_records(tmp_path)
    (tmp_path / "run.json").write_text("{}", encoding="utf-8")
    with pytest.raises(Exception, match="vbench run --resume"):
        read_records(tmp_path)


def test_another_gpus_baseline(place: Place) -> None:
    other = {**H200, "gpu": "NVIDIA A100"}
    write_records(place.baseline / "fp4.jsonl", [timed("then", 1, environment=other)])
    code, out, _ = place.say("gate", str(place.run), "--baseline", str(place.baseline))
    assert code == 3 and "gpu: NVIDIA A100 in the baseline, NVIDIA H200 in the run" in out
    before = (place.baseline / "fp4.jsonl").read_bytes()
    update = ["baseline", "update", str(place.run), "--baseline", str(place.baseline)]
    for more in ([], ["--write"]):
        code, _, err = place.say(*update, *more)
        assert code == 2 and "gpu: NVIDIA A100 in the baseline" in err and "nothing is written" in err
    assert (place.baseline / "fp4.jsonl").read_bytes() == before
    write_records(place.baseline / "fp4.jsonl", [timed("then", 1, environment={**H200, "driver": "570.1"})])
    code, out, _ = place.say(*update, "--write")
    assert code == 0 and "driver: 570.1" in out, "control: a new driver is shown, and may be written"


@pytest.mark.parametrize("name", ["gate", "show", "report", "update", "join", "floors"])
def test_two_records_with_one_id(place: Place, name: str) -> None:
    text = place.run.read_text(encoding="utf-8")
    place.run.write_text(text + text.splitlines()[0] + "\n", encoding="utf-8")
    code, _, err = place.say(*place.readers()[name])
    assert code == 2 and f"{place.run}:4: id " in err
    assert f"first: {place.run}:1" in err and "remove one" in err


def test_one_run_given_twice(place: Place) -> None:
    run = str(place.run)
    code, _, err = place.say("baseline", "update", run, run, "--baseline", str(place.baseline))
    assert code == 2 and "name it once" in err


@pytest.mark.parametrize("shape", ["file", "run", "folder"])
@pytest.mark.parametrize(
    ("name", "code"), [("gate", 3), ("show", 0), ("report", 3), ("update", 3), ("join", 3), ("floors", 2)]
)
def test_an_empty_run_judges_nothing(place: Place, name: str, code: int, shape: str) -> None:
    place.run.unlink()
    if shape == "file":
        place.run.write_text("", encoding="utf-8")
    else:
        place.run.mkdir()
        if shape == "run":
            (place.run / "records.jsonl").write_text("", encoding="utf-8")
    found, out, err = place.say(*place.readers()[name])
    assert found == code, (out, err)
    words = {"show": "no records", "report": "nothing to report", "floors": "no cell"}.get(name, "nothing judged")
    assert words in out + err
    assert not place.page.exists() and not (place.folder / "new").exists()


def test_an_empty_baseline_judges_nothing(place: Place) -> None:
    (place.baseline / "fp4.jsonl").write_text("", encoding="utf-8")
    code, out, _ = place.say("gate", str(place.run), "--baseline", str(place.baseline))
    assert code == 3 and f"nothing judged: the baseline {place.baseline} has no record" in out


def test_no_records_take_no_number_out_of_a_document(place: Place) -> None:
    text = "<!-- vbench:claim fp4.speedup -->2.9x<!-- /vbench -->\n"
    place.document.write_text(text, encoding="utf-8")
    empty = place.folder / "empty.jsonl"
    empty.write_text("", encoding="utf-8")
    for verb in ("check", "update"):
        code, out, _ = place.say("claims", verb, str(place.document), "--records", str(empty))
        assert code == 3 and f"nothing judged: {empty} has no record" in out
        code, out, _ = place.say("claims", verb, str(place.document), "--records", str(empty), "--json")
        assert code == 3 and json.loads(out)["exit"] == 3
    assert place.document.read_text(encoding="utf-8") == text


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "a\n<!-- vbench:claim fp4.speedupp -->x<!-- /vbench -->\n",
            ":2: no claim 'fp4.speedupp' in .*did you mean 'fp4.speedup'.*vbench claims list",
        ),
        ("<!-- vbench:claim zzzz -->x<!-- /vbench -->\n", ":1: no claim 'zzzz' in .*; vbench claims list"),
        ("a\n\n<!-- vbench:claim fp4.speedup -->x\n", ":3: span vbench:claim fp4.speedup is never closed; .*/vbench"),
        ("<!-- vbench:table claims -->\n\nx\n", ":1: span vbench:table claims is never closed; .*/vbench"),
    ],
)
@pytest.mark.parametrize("verb", ["check", "update", "baseline"])
def test_marks_that_mean_nothing(place: Place, text: str, said: str, verb: str) -> None:
    place.document.write_text(text, encoding="utf-8")
    document, run = str(place.document), str(place.run)
    command = ["claims", verb, document]
    if verb == "baseline":
        command = ["baseline", "update", run, "--baseline", str(place.folder / "new"), "--document", document]
    code, _, err = place.say(*command)
    assert code == 2 and re.search(re.escape(document) + said, err), err
    assert place.document.read_text(encoding="utf-8") == text and not (place.folder / "new").exists()


def not_utf8(path: Path) -> None:
    path.write_bytes(b"\xff\xfe")


@pytest.mark.parametrize(
    ("make", "said"), [(lambda path: None, "No such file"), (not_utf8, "not UTF-8 text"), (Path.mkdir, "directory")]
)
def test_a_document_that_cannot_be_read(place: Place, make: Callable[[Path], None], said: str) -> None:
    make(place.document)
    document = str(place.document)
    update = ["baseline", "update", str(place.run), "--baseline", str(place.folder / "new"), "--document", document]
    for command in (["claims", "check", document], ["claims", "coverage", document], update):
        code, _, err = place.say(*command)
        assert code == 2 and f"{document}: " in err and said in err


@pytest.mark.parametrize(
    "words",
    [
        ["baseline", "measure", "--case", "fp4_linear[fmt=zz]"],
        ["selftest", "--aa", "--case", "fp4_linear[fmt=zz]"],
        ["selftest", "--aa", "--pairs", "-1"],
        ["selftest", "--aa", "--cases", "0"],
    ],
)
def test_cases_and_numbers_that_mean_nothing(place: Place, words: list[str]) -> None:
    code, _, err = place.say(*words, "--device", "cpu", "--out", str(place.folder / "runs"))
    assert code == 2 and any(word in err for word in words[2:]), err
    assert not (place.folder / "runs").exists()


@pytest.mark.parametrize("value", ["0", "-3", "nan", "inf", "soon"])
@pytest.mark.parametrize(
    "command", [["baseline", "measure"], ["selftest", "--aa"], ["ab", "torch", "torch"], ["gate", "--against", "x"]]
)
def test_a_time_limit_is_a_time(place: Place, command: list[str], value: str) -> None:
    with pytest.raises(SystemExit) as ended:
        place.say(*command, "--limit-s", value)
    assert ended.value.code == 2 and "--limit-s" in place.capsys.readouterr().err
