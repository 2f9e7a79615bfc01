"""The attention levers: the order of tiles, the power of two by polynomial, and the tuner that times them on a rented
GPU, as far as all that runs without one."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vbench.kernels.triton.attention_tiles import Order, heads_per_group

SCRIPT = Path(__file__).resolve().parents[1] / "docs" / "tuning" / "tune_attention_levers.py"
PROCESSORS = 132
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton")


@pytest.fixture(scope="module")
def tuner() -> ModuleType:
    spec = importlib.util.spec_from_file_location("tune_attention_levers", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Its dataclasses look their annotations up there.
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    finally:
        del sys.modules[spec.name]
    return module


@given(tiles=st.integers(1, 10**6), processors=st.integers(1, 200), even=st.booleans())
def test_a_grid_needs_the_fewest_rounds(tiles: int, processors: int, even: bool) -> None:
    programs = Order(even_grid=even).programs(tiles, processors)
    assert 1 <= programs <= min(tiles, processors)
    rounds = -(-tiles // programs)
    assert rounds == -(-tiles // processors)
    if even and programs > 1:
        assert -(-tiles // (programs - 1)) > rounds


def worst_over_even(where: Any, rows: int, l2_bytes: int, even: bool) -> float:
    """Steps of the busiest program over an even share, of the walk that ``attention_gluon._locate`` and
    ``_tile_number`` describe; a tile's own work counted as one step."""
    heads, row_blocks = where.b * where.hq, -(-where.s // rows)
    group_heads = heads_per_group(heads, where.hq // where.hk, where.s, where.d, 2, l2_bytes)
    groups, tiles = -(-heads // group_heads), heads * row_blocks
    programs = Order(l2_bytes, even).programs(tiles, PROCESSORS)
    steps = [0] * programs
    for tile in range(tiles):
        group, inside = divmod(tile, group_heads * row_blocks)
        rank = inside // min(group_heads, heads - group * group_heads)
        row_block = rank if (groups - group) % 2 == 0 else row_blocks - 1 - rank
        keys = where.s if where.causal == "none" else min((row_block + 1) * rows, where.s)
        turn, program = divmod(tile, programs)
        steps[program if turn % 2 == 0 else programs - 1 - program] += -(-keys // 128) + 1
    return max(steps) * PROCESSORS / sum(steps)


@needs_triton
def test_every_order_is_even(tuner: ModuleType) -> None:
    """Control: heads one by one under a causal mask, which no candidate does."""
    for where in tuner.CELLS:
        for candidate in tuner.candidates(where):
            if candidate.kind == "gluon":
                rows = 64 * candidate.tile[2]
                assert worst_over_even(where, rows, candidate.l2_mib << 20, candidate.even) < 1.04, candidate.name
    assert worst_over_even(tuner.cell(128, "top_left", 512), 128, 0, True) > 1.4


@needs_triton
def test_candidates_start_with_the_table_and_are_told_apart(tuner: ModuleType) -> None:
    assert len(set(tuner.CELLS)) == len(tuner.CELLS)
    for where in tuner.CELLS:
        found = tuner.candidates(where)
        assert found[0] == tuner.table_candidate(where)
        assert len({candidate.name for candidate in found}) == len(found) > 3
        plain = [candidate for candidate in found if candidate.kind == "plain"]
        assert bool(plain) == (where.d == 128 and where.s <= 1024)
        assert not plain or tuner.plain_table(where) in plain


def exp2_by_fma(x: torch.Tensor) -> torch.Tensor:
    """``attention_gluon._exp2_by_fma`` line by line, float32; each multiply-add is rounded once."""
    from vbench.kernels.triton import attention_gluon as kernel

    def multiply_add(a: torch.Tensor, b: torch.Tensor, c: float) -> torch.Tensor:
        return (a.double() * b.double() + c).float()

    rounder = float(kernel.ROUNDER.value)
    powers = [float(getattr(kernel, f"POWER_{i}").value) for i in range(6)]
    x = x.clamp(min=-125.0)
    shifted = x + rounder
    rest = x - (shifted - rounder)
    power = torch.full_like(x, powers[5])
    for coefficient in reversed(powers[:5]):
        power = multiply_add(power, rest, coefficient)
    return (power.view(torch.int32) + (shifted.view(torch.int32) << 23)).view(torch.float32)


@needs_triton
def test_power_by_polynomial_is_as_good_as_the_unit() -> None:
    """ex2.approx.f32 is off by 2^-22 at most (PTX ISA, ex2); control: two coefficients fewer are not."""
    x = torch.cat((torch.linspace(-124.9, 8.0, 200_001), torch.arange(-250, 17) / 2.0, torch.tensor([0.0])))
    want = torch.exp2(x.double())
    error = ((exp2_by_fma(x).double() - want) / want).abs()
    assert float(error[x >= -124].max()) < 2.0**-22
    assert float(exp2_by_fma(torch.tensor([-1e30])).item()) < 2.0**-124
    rest = torch.linspace(-0.5, 0.5, 1001, dtype=torch.float64)
    short = 1 + 0.6931469 * rest + 0.2402212 * rest**2 + 0.0555071 * rest**3
    assert float((short / torch.exp2(rest) - 1).abs().max()) > 2.0**-13


def sample(names: Sequence[str], factors: Sequence[float]) -> dict[str, list[float]]:
    return {name: [factor * (1e-3 + 1e-6 * i) for i in range(15)] for name, factor in zip(names, factors, strict=True)}


@needs_triton
def test_table_shows_what_the_tables_say_and_the_best(tuner: ModuleType) -> None:
    where = tuner.CELLS[1]
    found = [candidate.name for candidate in tuner.candidates(where)]
    factors = [1.0, *(1.25 if i == 2 else 2.0 for i in range(len(found)))]
    row = {"cell": {name: getattr(where, name) for name in ("d", "causal", "s", "hq", "hk")}}
    gluon, plain = tuner.shown(row | {"samples_s": sample(["cudnn", *found], factors)})
    assert gluon.startswith("D128 S512 full") and "cudnn   68 " in gluon
    assert "table 0.500 [0.500, 0.500]" in gluon and f"{found[2][6:]} 0.800 [0.800, 0.800]" in gluon
    assert "| plain | table 0.500" in plain
    assert gluon.count("[") == plain.count("[") == 3


@needs_triton
def test_a_run_leaves_out_what_fails_and_keeps_what_it_has(
    tuner: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Compiler, checks and clock replaced: one machine code refused, one candidate wrong, time up after a cell."""
    chosen = [where for where in tuner.CELLS if "S512" in where.name]
    first = tuner.candidates(chosen[0])
    ruled_out, wrong = tuner.code_key(first[-1], chosen[0]), f"{first[1].name}:D{chosen[0].d}"
    monkeypatch.setattr(
        tuner,
        "compile_all",
        lambda pairs: {
            key: {"refused": "spills" if key == ruled_out else ""} for key in {tuner.code_key(c, w) for c, w in pairs}
        },
    )
    monkeypatch.setattr(
        tuner,
        "check_all",
        lambda jobs, processes, seconds: {
            name: {"worst": 2.0 if name == wrong else 0.5, "same": True, "batch_invariant": True} for name in jobs
        },
    )
    timed: list[list[str]] = []

    def time_cell(where: Any, found: Sequence[Any], rounds: int) -> dict[str, list[float]]:
        timed.append([candidate.name for candidate in found])
        monkeypatch.setattr(tuner, "time", SimpleNamespace(monotonic=lambda: 1e12))
        return sample(["cudnn", *timed[-1]], [1.0] * (len(found) + 1))

    monkeypatch.setattr(tuner, "time_cell", time_cell)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "none")
    assert tuner.main(["--out", str(tmp_path), "--only", "S512"]) == 0
    (names,) = timed
    assert set(names) == {candidate.name for candidate in first} - {
        first[1].name,
        *(c.name for c in first if tuner.code_key(c, chosen[0]) == ruled_out),
    }
    report = json.loads((tmp_path / "levers.json").read_text(encoding="utf-8"))
    assert [row["cell"]["s"] for row in report["timed"]] == [512] and set(report["compiled"]) > {ruled_out}
    said = capsys.readouterr().out
    assert f"REFUSED {ruled_out} spills" in said and f"FAILED {wrong} 2.0" in said
    assert f"out of time before {chosen[1].name}" in said
    assert said.splitlines()[-1].startswith(chosen[0].name)


def test_interval_of_a_median(tuner: ModuleType) -> None:
    """Ranks of the sign test's interval: 4 and 12 of 15 (Conover, Practical Nonparametric Statistics, table A3)."""
    assert tuner.median_interval([float(i) for i in range(1, 16)]) == (8.0, 4.0, 12.0)
    assert tuner.median_interval([3.0, 1.0, 2.0]) == (2.0, 1.0, 3.0)


def test_what_is_refused(tuner: ModuleType) -> None:
    sound = {"spill_bytes": 40, "spill_bytes_allowed": 64, "products": 24, "waits": 2}
    assert tuner.refused(sound) == ""
    assert "local memory" in tuner.refused(sound | {"spill_bytes": 72})
    assert "one by one" in tuner.refused(sound | {"waits": 24})
    assert "no warp-group product" in tuner.refused(sound | {"products": 0, "waits": 0})
    fine = {"worst": 0.5, "same": True, "batch_invariant": True}
    assert tuner.passed(fine)
    for worse in ({"worst": 1.1}, {"same": False}, {"batch_invariant": False}):
        assert not tuner.passed(fine | worse)


@needs_triton
def test_a_child_that_dies_fails_its_jobs(tuner: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU every check dies; each is then on record as failed, and none is lost."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    where = tuner.CELLS[1]
    jobs = {candidate.name: (candidate, where.d) for candidate in tuner.candidates(where)[:2]}
    rows = tuner.check_all(jobs, 1, 100.0)
    assert set(rows) == set(jobs)
    assert not any(tuner.passed(row) for row in rows.values()) and all(row["error"] for row in rows.values())


def test_unknown_cell_is_a_user_error(tuner: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as refused:
        tuner.main(["--only", "D96"])
    assert refused.value.code == 2 and "D64 S512 full" in capsys.readouterr().err


COMPILED = """
    import importlib.util, json, sys

    spec = importlib.util.spec_from_file_location("levers", sys.argv[1])
    levers = importlib.util.module_from_spec(spec)
    sys.modules["levers"] = levers
    spec.loader.exec_module(levers)
    table = [128, 4, 2, 240, 0]
    rows = [levers.compiled_figures("gluon", (*table, *rest), 64, False) for rest in ((0, 0), (2, 0), (0, 1))]
    rows.append(levers.compiled_figures("plain", (128, 32, 8, 3), 128, False))
    print(json.dumps([row | {"refused": levers.refused(row)} for row in rows]))
"""


@needs_triton
def test_levers_compile_to_what_they_promise() -> None:
    """Two of eight groups by polynomial are 16 exponentials a thread fewer in each consumer's unmasked loop, and
    neither lever costs a wait, a register that spills or a product."""
    command = [sys.executable, "-c", textwrap.dedent(COMPILED), str(SCRIPT)]
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    table, polynomial, keeping, plain = json.loads(done.stdout.splitlines()[-1])
    assert table["exponentials"] - polynomial["exponentials"] == 2 * 16
    assert keeping["exponentials"] == table["exponentials"]
    for row in (polynomial, keeping):
        assert {name: row[name] for name in ("products", "waits", "spill_bytes")} == {
            name: table[name] for name in ("products", "waits", "spill_bytes")
        }
    assert not any(row["refused"] for row in (table, polynomial, keeping, plain))


def test_graphs_are_replayed_in_turn_and_one_that_dies_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a clock that each replay moves on by its graph's milliseconds."""
    spec = importlib.util.spec_from_file_location("tune_attention", SCRIPT.with_name("tune_attention.py"))
    assert spec is not None and spec.loader is not None
    tune = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tune)
    now_ms, order = [0.0], []
    cost_ms = {"slow": 6.0, "fast": 2.0}

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.at_ms = now_ms[0]

        def synchronize(self) -> None:
            pass

        def elapsed_time(self, other: Event) -> float:
            return other.at_ms - self.at_ms

    class Graph:
        def __init__(self, name: str) -> None:
            self.name = name

        def replay(self) -> None:
            order.append(self.name)
            now_ms[0] += cost_ms[self.name]

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    graphs = {name: Graph(name) for name in cost_ms}
    samples = tune.replay_in_turn(graphs, rounds=2, repeats=2)
    assert samples == {"slow": pytest.approx([3e-3] * 2), "fast": pytest.approx([1e-3] * 2)}
    assert order == ["slow", "fast"] * 3

    def dies() -> None:
        raise RuntimeError("an illegal memory access")

    monkeypatch.setattr(torch.cuda, "synchronize", dies)
    with pytest.raises(SystemExit, match="slow died: an illegal"):
        tune.replay_in_turn(graphs, rounds=2, repeats=2)
