"""``show`` in every format, ``repro`` and ``doctor``: what they print, what they exit with, and what must trip them."""

from __future__ import annotations

import csv
import io
import json
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from tests import plugins
from vbench import doctor, registry, repro
from vbench.cli import main
from vbench.errors import UsageError
from vbench.plan import BATTERY
from vbench.record import Measurement, Outcome, Record
from vbench.reference.ops.fp4 import FP4_LINEAR
from vbench.registry import BackendInfo
from vbench.report import last_screen
from vbench.spec import case_hash
from vbench.store import write_records

ROOT = Path(__file__).resolve().parent.parent
CASE = FP4_LINEAR.case(fmt="nvfp4", x="fp32", m=3, n=6, k=32).id
OTHER = FP4_LINEAR.case(fmt="nvfp4", x="fp32", m=4, n=6, k=32).id


def record(**changes: Any) -> Record:
    base = {"case": CASE, "backend": "torch", "kind": "check", "outcome": Outcome.PASSED, "run": "r", "suite": "fp4"}
    return Record(**{**base, **changes})


RECORDS = [
    record(first_launch_s=0.5, steady_launch_s=0.25),
    record(backend="faulty", variant="zeros", outcome=Outcome.WRONG_VALUE, reason="value"),
    record(backend="faulty", variant="refuses", outcome=Outcome.UNSUPPORTED, reason="because"),
    record(kind="time", case=OTHER, measurements=(Measurement("wall", (1e-3, 2e-3, 3e-3)),)),
]


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    write_records(tmp_path / "run.jsonl", RECORDS)
    return tmp_path / "run.jsonl"


# show


def show(capsys: pytest.CaptureFixture[str], path: Path, *options: str) -> str:
    assert main(["show", str(path), *options]) == 0
    return capsys.readouterr().out


def test_csv_has_a_row_a_record(stored: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = list(csv.DictReader(io.StringIO(show(capsys, stored, "--format", "csv"))))
    assert [(r["case"], r["outcome"]) for r in rows] == [(r.case, r.outcome.value) for r in RECORDS]
    assert float(rows[0]["compile_s"]) == 0.25 and float(rows[3]["wall_s"]) == 2e-3
    assert rows[1]["wall_s"] == "" and rows[1]["compile_s"] == "", "what was not measured is empty, not zero"
    failed = list(csv.DictReader(io.StringIO(show(capsys, stored, "--format", "csv", "--failed"))))
    assert [r["backend"] for r in failed] == ["faulty[zeros]"]


def test_json_is_the_records_and_has_an_alias(stored: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = show(capsys, stored, "--format", "json")
    assert [Record.from_json(json.dumps(body), "x:1") for body in json.loads(text)] == RECORDS
    assert show(capsys, stored, "--json") == text


def test_markdown_and_table_hold_the_same_cells(stored: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table, markdown = show(capsys, stored), show(capsys, stored, "--format", "markdown")
    for text in (table, markdown):
        assert "faulty[zeros]" in text and "1 WRONG_VALUE" in text and "2 ms" in text
    lines = [line for line in markdown.splitlines() if line]
    assert all(line.startswith("|") and line.endswith("|") for line in lines)
    assert not any(line.startswith("|") for line in table.splitlines())
    one = show(capsys, stored, "--format", "markdown", "--case", case_hash(CASE))
    assert one.count("|\n") >= 5 and OTHER not in one


def test_no_record_is_still_readable_in_every_format(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_records(tmp_path / "run.jsonl", [RECORDS[0]])
    assert json.loads(show(capsys, tmp_path / "run.jsonl", "--failed", "--json")) == []
    assert list(csv.DictReader(io.StringIO(show(capsys, tmp_path / "run.jsonl", "--failed", "--format", "csv")))) == []
    assert "no records" in show(capsys, tmp_path / "run.jsonl", "--failed")


# repro


@pytest.fixture
def faulty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "plugin"
    folder.mkdir()
    plugins.install(folder, monkeypatch, "faulty", plugins.FAULTY)


@pytest.mark.parametrize(
    ("backend", "code", "words"),
    [
        ("torch", 0, ["PASSED", "error/budget"]),
        ("faulty[zeros]", 1, ["WRONG_VALUE", "wrong elements", "18 of 18", "elements wrong, worst at"]),
        ("faulty[refuses]", 3, ["UNSUPPORTED", "this kernel takes nothing"]),
    ],
)
def test_repro_exits_by_what_happens_now(
    stored: Path, faulty: None, capsys: pytest.CaptureFixture[str], backend: str, code: int, words: list[str]
) -> None:
    assert main(["repro", case_hash(CASE), "--run", str(stored), "--backend", backend]) == code
    out = capsys.readouterr().out
    assert all(word in out for word in [CASE, backend, "recorded", *words]), out


def test_repro_runs_again_and_believes_no_record(
    tmp_path: Path, faulty: None, capsys: pytest.CaptureFixture[str]
) -> None:
    """What was recorded as PASSED fails now, and the other way round."""
    path = tmp_path / "lies.jsonl"
    lies = [
        record(outcome=Outcome.CRASHED, reason="signal_11"),
        record(backend="faulty", variant="segfault"),
    ]
    write_records(path, lies)
    assert main(["repro", case_hash(CASE), "--run", str(path), "--json"]) == 1
    body = json.loads(capsys.readouterr().out)
    assert body["exit"] == 1
    assert [p["recorded"]["outcome"] for p in body["pairs"]] == ["CRASHED", "PASSED"]
    assert [(p["now"]["outcome"], p["now"]["reason"]) for p in body["pairs"]] == [
        ("PASSED", ""),
        ("CRASHED", "signal_11"),
    ]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["0123456789"], "no checked or timed case with hash '0123456789'"),
        ([case_hash(CASE), "--backend", "nobody"], "no record of backend 'nobody' for this case (there are: faulty"),
        ([case_hash(CASE), "--backend", "faulty"], "backend 'faulty' of this run is not installed here"),
    ],
)
def test_repro_refuses_what_is_not_there(
    stored: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    assert main(["repro", *arguments, "--run", str(stored)]) == 2
    assert words in capsys.readouterr().err


def test_repro_prefers_a_check_and_takes_the_battery() -> None:
    records = [
        record(),
        record(kind="time"),
        record(kind="time", backend="peer"),
        record(kind="battery", backend=BATTERY),
    ]
    assert [(r.backend, r.kind) for r in repro.select(records, case_hash(CASE), ())] == [
        ("torch", "check"),
        ("peer", "time"),
        (BATTERY, "battery"),
    ]
    with pytest.raises(UsageError):
        repro.select(records, case_hash(OTHER), ())


def test_the_last_screen_offers_the_repro_of_a_failure() -> None:
    def screen(records: list[Record]) -> str:
        where: dict[str, Any] = {"where": "w", "elapsed_s": 1.0, "device": "cpu", "verdicts": (), "reasons": ()}
        return last_screen(run_id="r", records=records, code=1, **where).splitlines()[-1]

    assert screen(RECORDS[:2]).endswith(f"vbench repro {case_hash(CASE)} --run r")
    assert screen(RECORDS[:1]).endswith("vbench show r")


# doctor


def test_extras_are_those_of_the_project() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for extra, names in doctor.EXTRAS.items():
        wanted = {w.partition(">")[0].partition("[")[0] for w in project["optional-dependencies"][extra]}
        assert set(names) == wanted
    assert {w.partition(">")[0] for w in project["dependencies"]} == set(doctor.REQUIRED)


def test_a_missing_package_has_its_line(monkeypatch: pytest.MonkeyPatch) -> None:
    there = {p.name: p for p in doctor.packages()}
    assert there["torch"].version and there["torch"].install == ""
    honest = doctor.version_of
    monkeypatch.setattr(doctor, "version_of", lambda name: "" if name in ("triton", "torch") else honest(name))
    gone = {p.name: p.install for p in doctor.packages() if not p.version}
    assert gone["triton"] == "pip install 'vbench-kernels[triton]'"
    assert gone["torch"] == "pip install vbench-kernels"


def test_the_foreign_distribution_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not [p for p in doctor.installation_problems("cpu", tmp_path) if "unrelated" in p], "the control"
    info = tmp_path / "vbench-0.1.5.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: vbench\nVersion: 0.1.5\n", encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    (found,) = doctor.installation_problems("cpu", tmp_path)
    assert "vbench 0.1.5" in found and "pip uninstall -y vbench vbench-kernels && pip install vbench-kernels" in found


def test_a_gpu_that_torch_cannot_use_is_a_problem(tmp_path: Path) -> None:
    (tmp_path / "nvidia0").touch()
    (found,) = doctor.installation_problems("cpu", tmp_path)
    assert "cannot use it" in found and "pip install" in found
    assert doctor.installation_problems("cuda", tmp_path) == []


def test_a_probe_that_ends_its_process_is_one_line_and_the_rest_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = plugins.FAULTY.replace("return Availability(usable=True)", "os._exit(7)")
    plugins.install(tmp_path, monkeypatch, "faulty", code)
    infos = registry.backends()
    broken = BackendInfo("broken", "x", problem="import_error", detail="no such module")
    found = doctor.examine([infos["faulty"], broken, infos["torch"]], "cpu")
    states = {b.backend: (b.usable, b.state) for b in found.backends}
    assert states == {"faulty": (False, "exit_7"), "broken": (False, "import_error"), "torch": (True, "native")}
    assert found.code == 0
    text = doctor.to_text(found)
    assert "not usable: exit_7" in text and "no such module" in text
    # control: with no usable backend of ours, or a problem, it is not fine
    found.backends = [b for b in found.backends if b.backend != "torch"]
    assert found.code == 3


def test_an_unusable_backend_of_ours_gets_the_line_of_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    info = registry.backends()["numba_cuda"]
    assert doctor._extra_of(info) == ""
    monkeypatch.setattr(doctor, "version_of", lambda name: "")
    assert doctor._extra_of(info) == "pip install 'vbench-kernels[numba]'"


def test_doctor_imports_nothing_heavy_and_reports_every_backend() -> None:
    code = (
        "import sys\nfrom vbench.cli import main\ncode = main(['doctor', '--json'])\n"
        "print(sorted({'torch', 'triton', 'numba', 'pandas', 'numpy'} & set(sys.modules)), file=sys.stderr)\n"
        "sys.exit(code)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)
    assert done.stderr.strip() == "[]" and done.returncode == 0, done.stderr
    body = json.loads(done.stdout)
    assert {b["backend"] for b in body["backends"]} == set(registry.backends())
    assert body["exit"] == 0 and body["problems"] == []
