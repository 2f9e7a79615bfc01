"""The systems' targets are judged as their records say: each state, on both sides of each limit."""

from __future__ import annotations

import copy
import importlib.util
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from vbench.record import Record
from vbench.store import read_records

ROOT = Path(__file__).resolve().parents[1]
GIB = 1 << 30


@pytest.fixture(scope="module")
def targets() -> Iterator[ModuleType]:
    name = "vbench_targets_script"
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / "tuning" / "targets.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look themselves up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[name]


def good() -> dict[str, Any]:
    """What the scripts write where every target is met."""
    row = {"options": "", "exit_code": 0, "losses": [5.5], "peak_bytes": 10**10}
    tiered = {"name": "s 8GB", **row, "options": "--budget 8GB", "peak_bytes": 7 * 10**9}
    bare = {"name": "large bare free", **row}
    cluster = {"name": "cluster free", **row, "peak_bytes": 10**9}
    return {
        "tier_codec": {
            "gpu": "G",
            "raw": {"equal": True, "tokens_16": {"median_s": 3.0}, "tokens_1024": {"median_s": 3.0}},
            "nvfp4": {"equal": True, "tokens_16": {"median_s": 1.0}, "tokens_1024": {"median_s": 2.0}},
        },
        "estimator": {"summary": {"gpu": "G"}, "rows": [{"error": (-1) ** i * 0.04} for i in range(40)]},
        "scenarios": {"gpu": "G", "left_out": [], "rows": [{"name": "s free", **row}, tiered, bare, cluster]},
        "tier_54gb": {
            "gpu_name": "G", "verdict": "EQUAL", "gpu": "8GiB", "peak_bytes": 8 * GIB, "weight_bytes": 53_955_526_656,
            "different": [],
        },
    }  # fmt: skip


def states(targets: ModuleType, scripts: Any, records: list[Record], stale: frozenset[str] = frozenset()) -> list[str]:
    return [one.word for one in targets.judge(targets.Evidence("h200", scripts, records, stale))]


def put(root: Path, scripts: dict[str, Any]) -> None:
    folder = root / "results" / "systems" / "h200"
    folder.mkdir(parents=True, exist_ok=True)
    (root / "docs").mkdir(exist_ok=True)
    for name, body in scripts.items():
        (folder / f"{name}.json").write_text(json.dumps(body), encoding="utf-8")


def passes() -> list[Record]:
    return [r for r in read_records(ROOT / "results" / "baselines" / "h200" / "tier.jsonl") if r.kind == "time"]


def slower(record: Record, factor: float) -> Record:
    measured = record.measurements[0]
    return replace(record, measurements=(replace(measured, samples_s=tuple(factor * s for s in measured.samples_s)),))


def pairs(ratios: list[float]) -> list[Record]:
    """Sides A and B of as many pairs, B so many times as slow."""
    base = next(r for r in passes() if r.backend == "tiers")
    measured = replace(base.measurements[0], samples_s=(1.0, 1.0), blocks=(1, 1), clock_hz=())
    out: list[Record] = []
    for number, ratio in enumerate(ratios):
        for side, backend, variant, factor in (("A", "torch_native", "all_resident", 1.0), ("B", "tiers", "", ratio)):
            one = replace(
                base, kind="pair", pair=number, side=side, backend=backend, variant=variant,
                measurements=(measured,),
            )  # fmt: skip
            out.append(slower(one, factor))
    return out


def test_nothing_on_record_and_a_rehearsal_are_not_run(targets: ModuleType, tmp_path: Path) -> None:
    assert set(states(targets, {}, [])) == {"NOT_RUN"}
    scripts = good()
    for name, body in scripts.items():
        body.get("summary", body)["gpu_name" if name == "tier_54gb" else "gpu"] = "none"
    put(tmp_path, scripts)
    assert not targets.read("h200", tmp_path).scripts
    put(tmp_path, good())
    assert set(targets.read("h200", tmp_path).scripts) == set(targets.SCRIPTS)


def test_all_targets_can_be_met(targets: ModuleType) -> None:
    records = [*passes(), *pairs([1.001, 0.999, 1.0, 1.002, 0.998])]
    assert set(states(targets, good(), records)) == {"MET"}
    everything = frozenset(r.id for r in records)
    assert states(targets, good(), records, everything).count("STALE") == 2


def change(path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def apply(scripts: dict[str, Any]) -> None:
        *where, last = [int(part) if part.isdigit() else part for part in path.split("/")]
        at: Any = scripts
        for part in where:
            at = at[part]
        if value is None:
            del at[last]
        else:
            at[last] = value

    return apply


@pytest.mark.parametrize(
    "path,value,index,word",
    [
        ("tier_codec/nvfp4/tokens_16/median_s", 1.21, 1, "MISSED"),
        ("tier_codec/nvfp4/equal", False, 1, "MISSED"),
        ("tier_codec/nvfp4", None, 1, "INCONCLUSIVE"),
        ("tier_54gb/peak_bytes", 8 * GIB + 1, 3, "MISSED"),
        ("scenarios/rows/1/peak_bytes", 8 * 10**9 + 1, 4, "MISSED"),
        ("estimator/rows", [{"error": 0.051}] * 40, 5, "MISSED"),
        ("estimator/rows", [{"error": 0.0}] * 39, 5, "INCONCLUSIVE"),
        ("estimator/rows/3/error", -0.151, 6, "MISSED"),
        ("tier_54gb/different", ["y"], 7, "MISSED"),
        ("tier_54gb/different", None, 7, "INCONCLUSIVE"),
        ("tier_54gb/weight_bytes", 10**9, 7, "INCONCLUSIVE"),
        ("scenarios/rows/1/losses", [5.6], 8, "MISSED"),
        ("scenarios/rows/1/exit_code", 1, 8, "MISSED"),
        ("scenarios/left_out", ["c"], 8, "INCONCLUSIVE"),
        ("scenarios/rows/3/peak_bytes", 10**9 + 1, 9, "MISSED"),
        ("scenarios/rows/2/name", "other free", 9, "NOT_RUN"),
    ],
)
def test_each_figure_counts(targets: ModuleType, path: str, value: Any, index: int, word: str) -> None:
    scripts = copy.deepcopy(good())
    change(path, value)(scripts)
    assert states(targets, scripts, [])[index] == word


def test_the_bound_is_the_longer_of_transfer_and_compute(targets: ModuleType) -> None:
    have = passes()
    assert states(targets, {}, have)[0] == "MET"
    late = [slower(r, 1.2) if r.backend == "tiers" and "tokens=32768" in r.case else r for r in have]
    assert states(targets, {}, late)[0] == "MISSED"
    # The same pass is within the bound of a slower product.
    both = [slower(r, 1.2) if "tokens=32768" in r.case else r for r in have]
    assert states(targets, {}, both)[0] == "MET"
    assert states(targets, {}, [r for r in have if "tokens=16," not in r.case])[0] == "INCONCLUSIVE"


@pytest.mark.parametrize(
    "ratios,word",
    [
        ([1.02, 1.021, 1.019], "MISSED"),
        ([0.98, 0.981, 0.979], "MISSED"),
        ([0.9, 1.1], "INCONCLUSIVE"),
        ([1.0], "INCONCLUSIVE"),
    ],
)
def test_overhead_is_decided_by_its_interval(targets: ModuleType, ratios: list[float], word: str) -> None:
    assert states(targets, {}, pairs(ratios))[2] == word
    other = [replace(r, variant="double_buffer") if r.side == "A" else r for r in pairs(ratios)]
    assert states(targets, {}, other)[2] == "NOT_RUN"


def test_the_document_is_written_checked_and_bad_files_are_named(
    targets: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    put(tmp_path, good())
    assert targets.main(["--check"], tmp_path) == 1
    assert targets.main(["--write"], tmp_path) == 0 and targets.main(["--check"], tmp_path) == 0
    text = (tmp_path / "docs" / "systems.md").read_text(encoding="utf-8")
    assert text.count("| MET |") == 8 and text.count("| NOT_RUN |") == 2
    (tmp_path / "results" / "systems" / "h200" / "estimator.json").write_text("{", encoding="utf-8")
    capsys.readouterr()
    assert targets.main(["--check"], tmp_path) == 2
    assert "estimator.json: not JSON" in capsys.readouterr().err
