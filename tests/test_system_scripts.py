"""The scripts of ``docs/tuning`` that a GPU is rented for: what they leave behind when they are cut off, on a CPU."""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from vbench import attack
from vbench.cli import parser


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small run fastest on one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


FOLDER = Path(__file__).resolve().parents[1] / "docs" / "tuning"


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def parts_of(out: Path) -> dict[str, dict[str, Any]]:
    return {row["part"]: row for row in json.loads((out / "systems.json").read_text(encoding="utf-8"))["parts"]}


def test_parts_fail_and_run_out_of_time_by_themselves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    systems = script("systems")
    look = f"import json; print(json.load(open({str(tmp_path / 'systems.json')!r}))['parts'][-1]['ended'])"
    made = {
        "fails": (["-c", "print('before'); raise SystemExit(7)"], 30.0),
        "hangs": (["-c", "import time; print('half', flush=True); time.sleep(600)"], 1.5),
        "looks": (["-c", look], 30.0),
    }
    monkeypatch.setattr(systems, "commands", lambda out, rehearse: made)
    assert systems.main(["--out", str(tmp_path)]) == 1
    rows = parts_of(tmp_path)
    assert {name: row["ended"] for name, row in rows.items()} == {
        "fails": "exit code 7",
        "hangs": "out of time",
        "looks": "exit code 0",
    }
    said = {name: (tmp_path / f"{name}.log").read_text(encoding="utf-8").strip() for name in made}
    # What was said before the end is kept, and a part finds itself on record while it runs.
    said["hangs"] = said["hangs"].partition("\n")[0]  # then where the interrupt met it
    assert said == {"fails": "before", "hangs": "half", "looks": "running"}
    assert systems.main(["--out", str(tmp_path), "looks"]) == 0


def test_no_part_begins_without_time_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    systems = script("systems")
    made = {"one": (["-c", ""], 30.0), "two": (["-c", ""], 30.0)}
    monkeypatch.setattr(systems, "commands", lambda out, rehearse: made)
    assert systems.main(["--out", str(tmp_path), "--limit-s", "1"]) == 1
    assert {row["ended"] for row in parts_of(tmp_path).values()} == {"left out: no time"}
    with pytest.raises(SystemExit) as refused:
        systems.main(["--out", str(tmp_path), "three"])
    assert refused.value.code == 2


def test_every_part_is_a_command_that_is_there(tmp_path: Path) -> None:
    """And they fit the default limit as the docstring says: whole models alone, the others together."""
    systems = script("systems")
    text = systems.__doc__ or ""
    expected = {line.split()[0]: int(line.split()[-2]) for line in text.splitlines() if line.rstrip().endswith(" s")}
    known = systems.commands(tmp_path)
    assert set(expected) == set(known)
    limits = {part: limit_s for part, (_, limit_s) in known.items()}
    assert max(limits["models"], sum(limits.values()) - limits["models"]) <= 580
    for part, (argv, limit_s) in known.items():
        assert limit_s > expected[part]
        files = [word for word in argv if word.endswith(".py")]
        assert all((systems.parts.ROOT / file).is_file() for file in files), files


def test_an_interrupted_part_may_store_what_it_has_and_leaves_nothing_running(tmp_path: Path) -> None:
    parts = script("parts")
    code = """
import subprocess, time
child = subprocess.Popen(["sleep", "600"])
print(child.pid, flush=True)
try:
    time.sleep(600)
except KeyboardInterrupt:
    print("stored")
"""
    said, ended = parts.run("sleeps", ["-c", code], 10.0, tmp_path)
    pid, stored = said.split()
    assert ended is None and stored == "stored"
    # Gone, or a corpse that nobody has collected yet.
    state = Path(f"/proc/{pid}/stat")
    assert not state.exists() or state.read_text(encoding="ascii").rpartition(")")[2].split()[0] == "Z"


def test_the_proofs_fit_their_limit_and_name_what_is_there(tmp_path: Path) -> None:
    proofs = script("proofs")
    text = proofs.__doc__ or ""
    expected = {line.split()[0]: float(line.split()[-2]) for line in text.splitlines() if line.endswith(" s")}
    for seed in (0, 7):
        known = proofs.commands(tmp_path, seed=seed)
        assert expected == {part: limit_s for part, (_, limit_s) in known.items()}
        assert sum(limit_s for part, (_, limit_s) in known.items() if part != "selftest") <= 520
        for part in ("masked", "search"):
            argv, limit_s = known[part]
            # A search ends itself first, so that its table is not lost.
            assert 0 < float(argv[argv.index("--limit-s") + 1]) < limit_s
            assert argv[argv.index("--seed") + 1] == str(seed) and argv[argv.index("--device") + 1] == "cuda"
    asked = set(proofs.commands(tmp_path)["controls"][0])
    needed = {c.name for _, c in attack.chosen([])[0] if c.needs == "cuda"}
    assert needed and needed <= asked


def test_the_proofs_rehearse_on_a_cpu(tmp_path: Path) -> None:
    proofs = script("proofs")
    rehearsal = ["--rehearse", "--out", str(tmp_path), "masked", "sanitize"]
    ended = subprocess.run(
        [sys.executable, str(proofs.__file__), *rehearsal], capture_output=True, text=True, check=False, timeout=120
    )
    rows = json.loads((tmp_path / "proofs.json").read_text(encoding="utf-8"))["parts"]
    assert {row["part"]: row["exit_code"] for row in rows} == {"masked": 0, "sanitize": 3}, ended.stdout
    # The sanitizer that is not here is no success.
    assert ended.returncode == 1
    (table,) = (tmp_path / "runs").glob("*/search.json")
    body = json.loads(table.read_text(encoding="utf-8"))
    assert body["passed"] >= 4 and body["violations"] == [] and "compute-sanitizer" in ended.stdout


@pytest.mark.parametrize("rehearse", [False, True])
def test_every_part_is_a_command_that_parses(rehearse: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same options, whether all is small or not; a script's parser is asked by letting nothing come after it."""
    systems = script("systems")
    known, other = (systems.commands(tmp_path, mode) for mode in (rehearse, not rehearse))
    assert set(known) == set(other)

    class Parsed(Exception):
        pass

    def parse(self: argparse.ArgumentParser, args: Any = None, namespace: Any = None) -> Any:
        right(self, args, namespace)
        raise Parsed

    right = argparse.ArgumentParser.parse_args
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse)
    for argv, _ in known.values():
        if argv[:2] == ["-m", "vbench"]:
            with pytest.raises(Parsed):
                parser().parse_args(argv[2:])
        elif argv[0] != "-m":
            with pytest.raises(Parsed):
                script(Path(argv[0]).stem).main(argv[1:])
    with pytest.raises(SystemExit):
        script("scenarios").main(["--no-such-option"])


def test_a_part_without_its_packages_is_left_out_and_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    systems = script("systems")
    monkeypatch.setattr(systems, "NEEDED", {"codec": ("no-such-package", "pytest")})
    assert systems.main(["--out", str(tmp_path), "--rehearse", "codec"]) == 1
    assert parts_of(tmp_path)["codec"]["ended"] == "left out: no no-such-package"


def test_the_estimators_points_can_all_be_stepped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU, one point of each kind; and a point that was not stepped is missed."""
    estimator = script("estimator")
    kinds = {}
    for shape, work, optimizer in estimator.points():
        kinds[shape.family, work.dtype, work.attention, work.checkpointing, work.dropout, optimizer] = (
            shape, work, optimizer,
        )  # fmt: skip
    monkeypatch.setattr(estimator, "points", lambda: iter(kinds.values()))
    monkeypatch.setattr(estimator, "LEAST_POINTS", len(kinds))
    argv = ["--out", str(tmp_path), "--device", "cpu"]
    assert estimator.main(argv) == 0
    kept = json.loads((tmp_path / "estimator.json").read_text(encoding="utf-8"))
    assert len(kept["rows"]) == len(kinds) > 10 and kept["summary"]["points"] == 0
    assert estimator.main([*argv, "--limit-s", "-1"]) == 1


def test_scenarios_rehearse_with_and_without_tiers(tmp_path: Path) -> None:
    """Two scenarios and their tiered twins, tiny on a CPU; one of them trains on FP4 codes."""
    scenarios = script("scenarios")
    wanted = ("student free", "student 4.5GB, tiered", "cluster free", "cluster 3.5GB, tiered")
    rows = tuple(row for row in scenarios.ROWS if row[0] in wanted)
    assert scenarios.main(["--out", str(tmp_path), "--rehearse"], rows) == 0
    kept = json.loads((tmp_path / "scenarios.json").read_text(encoding="utf-8"))["rows"]
    assert [row["exit_code"] for row in kept] == [0, 0, 0, 0]
    for row in (kept[1], kept[3]):
        assert any(line.startswith("tiers: ") for line in row["plan"]) and row["same_losses"]
    assert kept[1]["fp4"] is None and kept[3]["fp4"]["codes_bytes"] > 0


def test_scenarios_are_on_disk_row_by_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second row dies as no training does: the first is there, and the third was never begun."""
    scenarios = script("scenarios")

    def run(name: str, options: list[str], folder: Path, data: Path) -> dict[str, Any]:
        if name == "dies":
            raise KeyboardInterrupt
        assert data.stat().st_size > 0
        row = {"name": name, "options": "", "exit_code": 0, "said": [], "plan": [], "losses": [5.5, 5.25]}
        return {**row, "tokens_s": 10.0, "peak_bytes": 10**9, "seconds": 1.0}

    monkeypatch.setattr(scenarios, "run", run)
    rows: tuple[tuple[str, list[str]], ...] = (("a free", []), ("dies", []), ("c free", []))
    with pytest.raises(KeyboardInterrupt):
        scenarios.main(["--out", str(tmp_path)], rows)
    kept = json.loads((tmp_path / "scenarios.json").read_text(encoding="utf-8"))
    assert [row["name"] for row in kept["rows"]] == ["a free"] and not kept["left_out"]
    assert scenarios.main(["--out", str(tmp_path), "--limit-s", "-1"], rows) == 0
    assert json.loads((tmp_path / "scenarios.json").read_text(encoding="utf-8"))["left_out"] == [
        "a free",
        "dies",
        "c free",
    ]


def test_a_tiered_row_must_begin_with_its_twins_loss() -> None:
    scenarios = script("scenarios")
    free = {"name": "s free", "options": "", "exit_code": 0, "losses": [5.5, 5.25]}
    for losses, wrong in (([5.5, 5.24], False), ([5.4, 5.25], True)):
        row = {"name": "s 8GB", "options": "", "exit_code": 0, "losses": losses}
        assert scenarios.wrong(row, [free, row]) is wrong
        assert row["same_losses"] is False
    refused = {"name": "s 8GB", "options": "", "exit_code": 2}
    assert scenarios.wrong(refused, [free, refused])


def test_the_codecs_script_finds_equal_passes_and_flushes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    codec = script("tier_codec")
    small = ["--device", "cpu", "--layers", "5", "--width", "128", "--gpu", "100KiB", "--tokens", "3", "5"]
    assert codec.main([*small, "--out", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "tier_codec.json").read_text(encoding="utf-8"))
    moved = [report[name]["tokens_3"]["stats"]["to_device_bytes"] for name in ("raw", "nvfp4")]
    assert 0 < moved[1] < moved[0] and report["raw"]["equal"] and report["nvfp4"]["equal"]
    right = codec.oracle
    monkeypatch.setattr(codec, "oracle", lambda weights, x: right(weights, x) + 1)
    assert codec.main([*small, "--out", str(tmp_path)]) == 1


def test_free_host_memory_counts_what_the_group_can_give_up(tmp_path: Path) -> None:
    large = script("tier_54gb")
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal: 200 kB\nMemAvailable:     150 kB\n", encoding="ascii")
    assert large.host_free_bytes(meminfo, tmp_path) == 150 * 1024
    for name, text in (("memory.max", "100000"), ("memory.current", "90000"), ("memory.stat", "anon 1\nfile 5")):
        (tmp_path / name).write_text(text + "\n", encoding="ascii")
    assert large.host_free_bytes(meminfo, tmp_path) == 10000
    (tmp_path / "memory.stat").write_text("anon 1\ninactive_file 40000\nactive_file 7\n", encoding="ascii")
    assert large.host_free_bytes(meminfo, tmp_path) == 50000
    (tmp_path / "memory.max").write_text("max\n", encoding="ascii")
    assert large.host_free_bytes(meminfo, tmp_path) == 150 * 1024
    assert large.host_free_bytes(tmp_path / "none", tmp_path / "none") == sys.maxsize


def test_the_rates_commands_parse_and_fit_a_call(tmp_path: Path) -> None:
    rates = script("rates")
    for rehearse in (False, True):
        made = rates.commands(tmp_path, tmp_path, rehearse)
        assert list(made) == ["roofline", "rates", "baseline"]
        for argv, _ in made.values():
            assert argv[:2] == ["-m", "vbench"]
            given = parser().parse_args(argv[2:])
            assert given.out == tmp_path / "runs" and given.device == ("cpu" if rehearse else "cuda")
    assert sum(limit_s for _, limit_s in rates.commands(tmp_path, tmp_path).values()) <= 560.0
    given = parser().parse_args(rates.commands(tmp_path, tmp_path)["rates"][0][2:])
    assert 2 * given.cases >= 200 and given.pairs == 10 and given.resume == [str(tmp_path / "runs")]
    with pytest.raises(SystemExit) as ended:
        rates.main(["--out", str(tmp_path), "nothing"])
    assert ended.value.code == 2
