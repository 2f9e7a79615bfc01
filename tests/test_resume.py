"""A run that forgets nothing: killed at any point and resumed, it leaves the records of an unbroken one, each once.

The kill is a real SIGKILL of the real command. Most runs here answer from a worker that costs nothing, since what is
tested is the journal; one test uses real workers.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests import plugins
from vbench import runner, sources, store
from vbench.cli import main
from vbench.errors import DataError
from vbench.plan import Job
from vbench.record import Kind, Outcome, Record
from vbench.runner import Failure, no_arithmetic
from vbench.store import RECORDS, RUN_FILE, STARTED, RunStore, cut_torn_line, read_records, start_counts

#: ``python -c DRIVER POINT N LOG ARGUMENTS``: vbench with instant workers, dying by SIGKILL at the N-th POINT.
DRIVER = textwrap.dedent("""
    import json, os, signal, sys, threading
    from vbench import runner, store
    from vbench.cli import main
    from vbench.record import Outcome

    die_at = json.loads(os.environ.get("DIE_AT", "null"))
    if os.environ.get("ONE_AT_A_TIME"):
        os.cpu_count = lambda: 1
    point, count, log = sys.argv[1], int(sys.argv[2]), sys.argv[3]
    seen = {"append": 0, "started": 0, "ask": 0}
    one_writer = threading.Lock()
    honest_write = store.RunStore._write

    def die():
        os.kill(os.getpid(), signal.SIGKILL)

    def write(self, fd, line, path):
        what = "append" if fd == self._fd else "started"
        data = (line + "\\n").encode()
        with one_writer:
            seen[what] += 1
            if seen[what] == count and point in (f"torn_{what}", f"unterminated_{what}"):
                os.write(fd, data[: len(data) // 2] if point.startswith("torn") else data[:-1])
                die()
            honest_write(self, fd, line, path)
            if seen[what] == count and point == f"after_{what}":
                die()

    class Worker:
        def __init__(self, info, device, log, threads):
            self.name = info.name if info else "trivial_kernels"

        def ask(self, request, deadline_s):
            seen["ask"] += 1
            with open(log, "a") as file:
                file.write(json.dumps({**request, "backend": self.name}) + "\\n")
            job = [request["kind"], request.get("case", ""), self.name]
            if (point == "in_flight" and seen["ask"] == count) or job == die_at:
                die()
            if request["kind"] == "check" and len(request["case"]) % 7 == 0:
                return runner.Failure(Outcome.TIMEOUT, "deadline", "killed")
            return {"outcome": "PASSED", "reason": "native" if request["kind"] == "probe" else "", "detail": "",
                    "error": None, "measurements": [], "metrics": None, "prepare_s": None, "peak_bytes": None,
                    "numerics": None, "sources": "", "elapsed_s": 0.0,
                    "environment": {"hardware": "cpu"} if request["kind"] == "probe" else None}

        def kill(self):
            pass

        close = end = kill

    store.RunStore._write = write
    runner.WorkerProcess = Worker
    sys.exit(main(sys.argv[4:]))
""")

PLAN = [
    "run",
    "--suite",
    "fp4",
    "--backend",
    "torch",
    "--backend",
    "as_written",
    "--op",
    "fp4_dequantize",
    "--device",
    "cpu",
]

KILLS = [
    ("after_append", 1),
    ("after_append", 70),
    ("after_started", 1),
    ("after_started", 9),
    ("in_flight", 2),
    ("in_flight", 12),
    ("torn_append", 72),
    ("unterminated_append", 75),
    ("torn_started", 4),
    ("unterminated_started", 8),
]


def drive(point: str, count: int, log: Path, arguments: Sequence[str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", DRIVER, point, str(count), str(log), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)


def content(records: Sequence[Record]) -> Counter[tuple[str, ...]]:
    return Counter((r.kind, r.case, r.backend, r.variant, r.outcome.value, r.reason) for r in records)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Counter[tuple[str, ...]]:
    folder = tmp_path_factory.mktemp("unbroken")
    done = drive("never", 0, folder / "log", [*PLAN, "--out", str(folder / "out")])
    assert done.returncode in (0, 1), done.stderr
    records = content(read_records(store_of(folder / "out")))
    assert set(records.values()) == {1}
    assert {outcome for *_, outcome, _ in records} == {"PASSED", "TIMEOUT"}
    return records


def store_of(out: Path) -> Path:
    (folder,) = out.iterdir()
    return folder


def asked(log: Path) -> set[tuple[str, str, str]]:
    """(kind, case, backend) of every job that a worker was asked for."""
    lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()] if log.exists() else []
    return {(r["kind"], r.get("case", ""), r["backend"]) for r in lines}


@pytest.mark.parametrize(("point", "count"), KILLS)
def test_killed_and_resumed_equals_unbroken(
    tmp_path: Path, unbroken: Counter[tuple[str, ...]], point: str, count: int
) -> None:
    out = tmp_path / "out"
    killed = drive(point, count, tmp_path / "log", [*PLAN, "--out", str(out)])
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    folder = store_of(out)
    raw = (folder / RECORDS).read_bytes()
    whole = raw.count(b"\n")
    if point in ("torn_append", "unterminated_append"):
        assert not raw.endswith(b"\n")
        if point == "torn_append":
            with pytest.raises(DataError, match="--resume"):
                read_records(folder)
    # control: what the kill left is not yet the whole
    assert whole < sum(unbroken.values())
    done = drive("never", 0, tmp_path / "log2", ["run", "--resume", folder.name, "--out", str(out)])
    assert done.returncode in (0, 1), done.stderr
    assert f"{whole} of {sum(unbroken.values())} records kept" in done.stderr
    assert store_of(out) == folder
    assert content(read_records(folder)) == unbroken
    after = (folder / RECORDS).read_bytes()
    assert after.endswith(b"\n") and after[: raw.rfind(b"\n") + 1] == raw[: raw.rfind(b"\n") + 1]
    # What ended before the kill, be it in a TIMEOUT, is not paid for again; the rest was asked for.
    kept = {(r.kind, r.case, r.backend) for r in read_records(folder)[:whole]}
    assert not kept & asked(tmp_path / "log2")
    assert asked(tmp_path / "log2") - {("probe", "", "torch"), ("probe", "", "as_written")}


def test_a_resumed_hang_is_not_run_again_and_a_finished_run_runs_nothing(tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert drive("never", 0, tmp_path / "log", [*PLAN, "--out", str(out)]).returncode in (0, 1)
    hangs = [r for r in read_records(store_of(out)) if r.outcome is Outcome.TIMEOUT]
    assert hangs
    done = drive("never", 0, tmp_path / "log2", ["run", "--resume", "latest", "--out", str(out)])
    assert done.returncode in (0, 1), done.stderr
    assert asked(tmp_path / "log2") == set()


def test_in_flight_when_killed_gets_one_more_try_then_a_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control is the second try: it is asked for; the third is not."""
    monkeypatch.setenv("ONE_AT_A_TIME", "1")
    out = tmp_path / "out"
    plan = ["run", "--suite", "fp4", "--backend", "torch", *PLAN[7:], "--out", str(out)]
    assert drive("in_flight", 9, tmp_path / "log1", plan).returncode == -signal.SIGKILL
    folder = store_of(out)
    answered = {key_of(r) for r in read_records(folder)}
    (flying,) = [key for key in start_counts(folder) if key not in answered]
    job = (flying[0], flying[1], flying[2])
    again = ["run", "--resume", "latest", "--out", str(out)]
    monkeypatch.setenv("DIE_AT", json.dumps(job))
    assert drive("never", 0, tmp_path / "log2", again).returncode == -signal.SIGKILL
    assert start_counts(folder)[flying] == 2
    done = drive("never", 0, tmp_path / "log3", again)
    assert done.returncode == 1, done.stderr
    assert job not in asked(tmp_path / "log3")
    (last,) = [r for r in read_records(folder) if key_of(r) == flying]
    assert (last.outcome, last.reason) == (Outcome.CRASHED, "in_flight_when_killed")


def key_of(record: Record) -> tuple[str, str, str, str]:
    return record.kind, record.case, record.backend, record.variant


def test_real_workers_killed_and_resumed(tmp_path: Path) -> None:
    plan = ["run", "--suite", "fp4", "--backend", "torch", "--op", "fp4_dequantize", "--device", "cpu", "--out"]
    command = [sys.executable, "-m", "vbench"]
    whole = subprocess.run(
        [*command, *plan, str(tmp_path / "whole")], capture_output=True, text=True, check=False, timeout=120
    )
    assert whole.returncode == 0, whole.stderr
    out = tmp_path / "out"
    process = subprocess.Popen([*command, *plan, str(out)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    limit = time.monotonic() + 90
    while time.monotonic() < limit:
        files = list(out.glob(f"*/{RECORDS}"))
        if files and files[0].read_text().count('"kind": "check"') >= 2:
            break
        time.sleep(0.01)
    process.kill()
    process.wait()
    before = len((store_of(out) / RECORDS).read_bytes().splitlines())
    done = subprocess.run(
        [*command, "run", "--resume", store_of(out).name, "--out", str(out)],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    found = read_records(store_of(out))
    assert len(found) > before
    assert content(found) == content(read_records(store_of(tmp_path / "whole")))


# refusals


class InstantWorker:
    """Answers PASSED without a process; ``environment`` is what its probe says of the machine."""

    environment: dict[str, Any] = {"hardware": "cpu"}  # noqa: RUF012  # replaced by tests through monkeypatch

    def __init__(self, *_: object) -> None:
        pass

    def ask(self, request: dict[str, Any], deadline_s: float) -> dict[str, Any] | Failure:
        probe = request["kind"] == "probe"
        body: dict[str, Any] = dict.fromkeys(("error", "metrics", "prepare_s", "peak_bytes", "numerics", "environment"))
        body |= {"outcome": "PASSED", "reason": "native" if probe else "", "detail": "", "measurements": []}
        body |= {"sources": "", "elapsed_s": 0.0, "environment": self.environment if probe else None}
        return body

    def kill(self) -> None:
        pass

    close = end = kill


LIGHT = """
    from vbench.backend import DeclaredBackend

    ops = {"fp4_dequantize": "plugin_honest:make"}
    BACKEND = DeclaredBackend(name="honest", role="own", summary="never loaded here", ops=ops)
"""


@pytest.fixture
def unfinished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run with a stranger's backend, all but the last three of its check records."""
    monkeypatch.setattr(runner, "WorkerProcess", InstantWorker)
    plugins.install(tmp_path, monkeypatch, "honest", LIGHT)
    arguments = ["run", "--suite", "fp4", "--backend", "honest", "--op", "fp4_dequantize", "--device", "cpu", "--out"]
    assert main([*arguments, str(tmp_path / "out")]) == 0
    folder = store_of(tmp_path / "out")
    lines = (folder / RECORDS).read_bytes().splitlines(keepends=True)
    checks = [line for line in lines if json.loads(line)["kind"] == "check"]
    (folder / RECORDS).write_bytes(b"".join(line for line in lines if line not in checks[-3:]))
    return folder


def resume(folder: Path) -> int:
    sources.digest.cache_clear()
    return main(["run", "--resume", str(folder), "--out", str(folder.parent)])


def test_the_unfinished_run_can_be_resumed(unfinished: Path) -> None:
    """The control of the refusals below."""
    before = len(read_records(unfinished))
    assert resume(unfinished) == 0
    assert len(read_records(unfinished)) == before + 3


def edit(folder: Path, change: dict[str, Any]) -> None:
    path = folder / RUN_FILE
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **change}), encoding="utf-8")


def test_changed_sources_are_named(unfinished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plugin = unfinished.parent.parent / "plugin_honest.py"
    plugin.write_text(plugin.read_text(encoding="utf-8") + "\n# other arithmetic\n", encoding="utf-8")
    before = (unfinished / RECORDS).read_bytes()
    assert resume(unfinished) == 2
    assert "sources: honest: fp4_dequantize changed" in capsys.readouterr().err
    assert (unfinished / RECORDS).read_bytes() == before


def test_changed_harness_is_named(
    unfinished: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vbench.resume.harness_digest", lambda: "sha256:other")
    assert resume(unfinished) == 2
    assert "sources: harness changed" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"seed": 1}, "plan: fp4 changed"),
        ({"effort": "standard"}, "plan: fp4 changed"),
        ({"backends": ["honest", "torch"]}, "sources: torch: fp4_dequantize is new"),
        ({"backends": ["nobody"]}, "unknown backend 'nobody'"),
        ({"claims": ["no.such.claim"]}, "claim no.such.claim is in no ledger"),
        ({"pins": None}, "says nothing of plan and sources"),
        ({"run": "other"}, "none of this run's plan"),
    ],
)
def test_a_changed_plan_is_named(
    unfinished: Path, capsys: pytest.CaptureFixture[str], change: dict[str, Any], words: str
) -> None:
    edit(unfinished, change)
    assert resume(unfinished) == 2
    assert words in capsys.readouterr().err


def test_another_machine_is_named(
    unfinished: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(InstantWorker, "environment", {"hardware": "cpu", "gpu": "another"})
    assert resume(unfinished) == 2
    assert "gpu was None, is 'another'" in capsys.readouterr().err
    monkeypatch.setattr(InstantWorker, "environment", {"hardware": "cpu"})
    body = json.loads((unfinished / RUN_FILE).read_text(encoding="utf-8"))
    body["pins"]["machine"]["torch"] = "0.1"
    edit(unfinished, body)
    assert resume(unfinished) == 2
    assert "machine: torch was 0.1, is" in capsys.readouterr().err


def test_options_that_would_change_the_plan_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "--resume", "latest", "--effort", "quick", "--seed", "0"]) == 2
    assert "leave out --effort, --seed" in capsys.readouterr().err


def test_a_run_that_is_going_on_is_not_resumed(unfinished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    going_on = RunStore(unfinished, {}, resume=True)
    assert resume(unfinished) == 2
    assert "another process" in capsys.readouterr().err
    going_on.close()
    assert resume(unfinished) == 0


def test_an_interrupt_blames_no_job(unfinished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C twice on the same job does not cost it its tries; the control is the same with a kill (above)."""

    def interrupted(*_: object) -> dict[str, Any]:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(InstantWorker, "ask", interrupted)
        patch.setattr(runner.Run, "_same_machine", lambda *_: None)
        for _ in range(3):
            assert resume(unfinished) == 130
    counts = start_counts(unfinished)
    records = {(r.kind, r.case, r.backend, r.variant) for r in read_records(unfinished)}
    assert {count for key, count in counts.items() if key not in records} <= {0, 1}
    text = (unfinished / STARTED).read_text(encoding="utf-8")
    assert text.count("withdrawn") >= 3
    assert resume(unfinished) == 0
    assert all(r.reason != "in_flight_when_killed" for r in read_records(unfinished))


@pytest.mark.parametrize("kind", ["check", "time"])
def test_jobs_are_withdrawn_before_anyone_waits_for_a_worker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: Kind
) -> None:
    """A worker that takes long to die, and a harness that is killed meanwhile: the journal is already right.

    Checks run in threads, timed jobs in the main one. The control is a run that nobody ends: nothing is withdrawn.
    """
    folder = tmp_path / "run"
    at_end: dict[str, str] = {}

    class SlowToDie(InstantWorker):
        def _note(self, what: str) -> None:
            at_end.setdefault(what, (folder / STARTED).read_text(encoding="utf-8"))

        def end(self) -> None:
            self._note("end")

        def close(self) -> None:
            self._note("close")

        kill = close

    class Interrupted(SlowToDie):
        def ask(self, request: dict[str, Any], deadline_s: float) -> dict[str, Any] | Failure:
            raise KeyboardInterrupt

    def run(worker: type[InstantWorker]) -> None:
        at_end.clear()
        monkeypatch.setattr(runner, "WorkerProcess", worker)
        job = Job(kind, "s", "c", "o", "b", "", "own", 1.0)
        with contextlib.closing(RunStore(folder, {}, resume=folder.exists())) as journal:
            starts = start_counts(folder)
            runner.Run("r", [job], {}, "cuda", journal, no_arithmetic, 2, lambda record: None, starts=starts).execute()

    for _ in range(runner.MOST_STARTS + 1):
        with pytest.raises(KeyboardInterrupt):
            run(Interrupted)
        assert set(at_end) == {"end", "close"}
        for text in at_end.values():
            assert text.count("withdrawn") == text.count("started") > 0
    run(SlowToDie)
    assert set(at_end) == {"close"}
    text = at_end["close"]
    assert text.count("started") == text.count("withdrawn") + 1


def test_an_ended_worker_starts_no_more(tmp_path: Path) -> None:
    """The control is ``kill``, after which the next request starts a new one."""
    worker = runner.WorkerProcess(None, "cpu", tmp_path / "log", 1)
    worker.begin()
    worker.kill()
    worker.begin()
    assert worker._process is not None
    worker.end()
    worker.close()
    answer = worker.ask({"kind": "probe"}, 1.0)
    assert isinstance(answer, Failure) and answer.reason == "ended"


# the store


@pytest.mark.parametrize(
    ("text", "left"),
    [
        (b"", b""),
        (b"a\nb\n", b"a\nb\n"),
        (b"a\nb", b"a\n"),
        (b"ab", b""),
        (b"a\n" + b"x" * 200_000, b"a\n"),
        (b"y" * 70_000 + b"\n" + b"x" * 65_536, b"y" * 70_000 + b"\n"),
    ],
)
def test_a_torn_line_is_cut_and_whole_ones_stay(tmp_path: Path, text: bytes, left: bytes) -> None:
    path = tmp_path / "file"
    path.write_bytes(text)
    fd = os.open(path, os.O_RDWR)
    assert cut_torn_line(fd) == len(text) - len(left)
    os.close(fd)
    assert path.read_bytes() == left


def test_half_a_write_is_taken_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = Record("c", "b", "check", Outcome.PASSED, "r")
    one = RunStore(tmp_path / "run", {})
    one.append(record)
    whole = one.path.read_bytes()
    honest = os.write
    calls = 0

    def half_then_full(fd: int, data: bytes) -> int:
        nonlocal calls
        calls += 1
        if calls > 1:
            raise OSError(28, "No space left on device")
        return honest(fd, data[:10])

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", half_then_full)
        with pytest.raises(DataError, match="No space left"):
            one.append(Record("d", "b", "check", Outcome.PASSED, "r"))
    with pytest.raises(DataError, match="earlier write failed"):
        one.append(Record("e", "b", "check", Outcome.PASSED, "r"))
    one.close()
    assert one.path.read_bytes() == whole


@pytest.mark.parametrize("line", ["{}", "[]", '{"started": ["a"]}', '{"begun": ["a", "b", "c", "d"]}', "no json"])
def test_a_bad_journal_line_is_named(tmp_path: Path, line: str) -> None:
    (tmp_path / STARTED).write_text('{"started": ["check", "c", "b", ""]}\n' + line + "\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"started\.jsonl:2"):
        start_counts(tmp_path)


def test_without_the_cut_a_torn_line_is_refused(
    unfinished: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The control of every resume above: it is the cut that makes the file whole."""
    with (unfinished / RECORDS).open("ab") as file:
        file.write(b'{"schema": 1, "id"')
    with monkeypatch.context() as patch:
        patch.setattr(store, "cut_torn_line", lambda fd: 0)
        assert resume(unfinished) == 2
    assert "not JSON" in capsys.readouterr().err
    assert resume(unfinished) == 0
    assert "18 bytes of a torn line cut off" in capsys.readouterr().err
