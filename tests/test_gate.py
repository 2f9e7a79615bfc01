"""The ahead-of-time gate: what it lets through, what it must not, and that one bad configuration costs no other."""

from __future__ import annotations

import json
import math
import os
import textwrap
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from tests.plugins import install
from vbench import gate, judge, machine_code, registry, runner
from vbench.backend import Configuration, Cubin
from vbench.cli import main
from vbench.errors import DataError
from vbench.machine_code import MachineCode
from vbench.plan import plan
from vbench.record import Outcome, Record
from vbench.spec import Suite, case_hash
from vbench.store import read_records


def _never() -> Cubin:
    raise AssertionError("not compiled here")


SOUND = Configuration("attention", "k", 90, "hgmma", {"d": 64}, _never)
CODE = MachineCode(
    128, 0, 0, 0, {"HGMMA.64x64x16.F32.BF16": 4, "FFMA": 9, "UTMALDG.2D": 1, "STL": 1}, {"HGMMA.64x64x16": 4}
)
CUBIN = Cubin(b"", 1024)


def test_sound_code_passes_and_its_figures_are_stored() -> None:
    judged = gate.judge(replace(SOUND, instructions=("UTMALDG",), bounds={"loop.HGMMA": (1, math.inf)}), CUBIN, CODE)
    assert (judged.outcome, judged.reason, judged.detail) == (Outcome.PASSED, "", "")
    assert judged.metrics["registers"] == 128 and judged.metrics["shared_bytes"] == 1024
    assert judged.metrics["loop.HGMMA"] == 4 and judged.metrics["shared_bytes_limit"] == 232448


@pytest.mark.parametrize(
    ("changes", "cubin", "code", "reason"),
    [
        ({}, CUBIN, replace(CODE, stack_bytes=8), "spills"),
        ({}, CUBIN, replace(CODE, local_bytes=8), "spills"),
        ({"spill_bytes_allowed": 7, "spill_reason": "x"}, CUBIN, replace(CODE, stack_bytes=8), "spills"),
        ({}, Cubin(b"", 232449), CODE, "shared_memory"),
        ({}, Cubin(b"", 232448), replace(CODE, shared_bytes=1), "shared_memory"),
        ({"arch": 80}, Cubin(b"", 166913), CODE, "shared_memory"),
        ({"unit": "hmma"}, CUBIN, CODE, "missing_unit"),
        ({"unit": "ffma"}, CUBIN, CODE, "wrong_unit"),
        ({"unit": "none"}, CUBIN, CODE, "wrong_unit"),
        ({"instructions": ("USETMAXREG",)}, CUBIN, CODE, "missing_instruction"),
        ({"instructions": ("UTMALD",)}, CUBIN, CODE, "missing_instruction"),
        ({"bounds": {"total.FFMA": (0, 8)}}, CUBIN, CODE, "bound"),
        ({"bounds": {"loop.FFMA": (1, math.inf)}}, CUBIN, CODE, "bound"),
        ({"arch": 75}, CUBIN, CODE, "unknown_architecture"),
    ],
)
def test_each_fault_has_its_code(changes: dict[str, Any], cubin: Cubin, code: MachineCode, reason: str) -> None:
    judged = gate.judge(replace(SOUND, **changes), cubin, code)
    assert (judged.outcome, judged.reason) == (Outcome.INVALID, reason), judged.detail


def test_all_faults_stand_in_the_detail() -> None:
    judged = gate.judge(replace(SOUND, unit="imma"), Cubin(b"", 1 << 20), replace(CODE, stack_bytes=8))
    assert judged.reason == "spills"
    assert all(f"{code}: " in judged.detail for code in ("spills", "shared_memory", "missing_unit"))


def test_an_allowance_is_shown_with_its_reason() -> None:
    allowed = replace(SOUND, spill_bytes_allowed=64, spill_reason="the epilogue (docs/tuning/x.md)")
    judged = gate.judge(allowed, CUBIN, replace(CODE, stack_bytes=40))
    assert (judged.outcome, judged.reason) == (Outcome.PASSED, "spill_allowed")
    assert "40 B" in judged.detail and "docs/tuning/x.md" in judged.detail
    assert judged.metrics["spill_bytes"] == 40 and judged.metrics["spill_bytes_allowed"] == 64
    assert gate.judge(allowed, CUBIN, CODE).reason == "", "an allowance that is not needed is not claimed"


def test_a_declaration_that_cannot_be_kept_is_refused() -> None:
    for changes in ({"spill_bytes_allowed": 8}, {"spill_reason": "why"}, {"parameters": {"a": "x,y=1"}}):
        with pytest.raises(DataError):
            replace(SOUND, **changes)
    with pytest.raises(KeyError, match="conversions"):
        gate.judge(replace(SOUND, bounds={"conversions": (0, 0)}), CUBIN, CODE)
    with pytest.raises(ValueError, match="two configurations"):
        gate.in_order([SOUND, replace(SOUND, bounds={"registers": (0, 1)})])


LISTING = """
	Function : first
        /*0000*/ HGMMA.64x8x16.F32.BF16 R24, R4, gdesc[UR4], R24 ;
        /*0010*/ STL [R1], R2 ;
        /*0020*/ @P0 BRA 0x0 ;
        /*0030*/ LDL R2, [R1] ;
        /*0040*/ EXIT ;
	Function : second
        /*0000*/ LDL.64 R2, [R1] ;
        /*0010*/ EXIT ;
"""  # fmt: skip
USAGE = "Function a:\n  REG:40 STACK:8 SHARED:0 LOCAL:0\nFunction b:\n  REG:24 STACK:0 SHARED:1028 LOCAL:16\n"


def test_a_listing_is_read_function_by_function() -> None:
    code = machine_code.parse(USAGE, LISTING, 90)
    assert (code.registers, code.stack_bytes, code.local_bytes, code.shared_bytes) == (40, 8, 16, 4)
    assert machine_code.parse(USAGE, LISTING, 80).shared_bytes == 1028, "nothing is reserved before 9.0"
    assert machine_code.count(code.total, "LDL") == 2 and machine_code.count(code.total, "LDL.64") == 1
    assert dict(code.loop) == {"HGMMA.64x8x16.F32.BF16": 1, "STL": 1, "BRA": 1}
    assert code.spill_bytes == 24
    framed = LISTING.replace("STL [R1], R2", "NOP").replace("LDL R2, [R1]", "NOP").replace("LDL.64 R2, [R1]", "NOP")
    assert machine_code.parse(USAGE, framed, 90).spill_bytes == 0, "a frame that nothing touches is no spill"
    # The way back from a barrier's spin loop is no loop.
    spin = LISTING.replace("@P0 BRA 0x0", "BRA 0x0").replace("STL [R1], R2", "@P1 BRA 0x30")
    assert not machine_code.parse(USAGE, spin, 90).loop
    with pytest.raises(DataError):
        machine_code.parse("", LISTING, 90)
    with pytest.raises(DataError):
        machine_code.read(b"no cubin", 90)


def test_our_backends_list_known_ops_and_architectures_within_the_limits() -> None:
    for name in ("triton", "numba_cuda"):
        info = registry.backends()[name]
        found = gate.listed(name, info.distribution, info.environment["compile"])
        assert {p.op for p in found} <= set(info.ops) and len(found) > 200
        assert {f"arch={arch}" for arch in (80, 90)} <= {part for p in found for part in p.case.split(",")}
        quick = {p.op for p in found if p.effort == "quick"}
        assert quick == {p.op for p in found}, "each op is in the sample"


def test_only_what_the_effort_includes_is_planned_and_no_backend_is_probed_in_vain() -> None:
    infos = registry.backends()
    listed = {"triton": [gate.Planned(f"compile[op=attention,n={e}]", "attention", e) for e in ("quick", "full")]}
    only = Suite("compile", "", compiles=True)
    jobs = plan([only], [infos["torch"], infos["triton"]], ops=["attention"], effort="quick", seed=0, compiled=listed)
    assert [j.case for j in jobs] == ["probe[triton,place=compile]", "compile[op=attention,n=quick]"]
    assert all(j.compiles for j in jobs)


KERNELS = """
    import os
    from functools import partial
    import triton
    import triton.language as tl
    from vbench.backend import Availability, Configuration, Cubin
    from vbench.kernels.triton.aot import compile_kernel, cubin

    @triton.jit
    def product(a_ptr, b_ptr, c_ptr, k, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr):
        row, column, inner = tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, BK)
        total = tl.zeros((BM, BN), tl.float32)
        for start in range(0, k, BK):
            a = tl.load(a_ptr + row[:, None] * k + (start + inner)[None, :])
            b = tl.load(b_ptr + (start + inner)[:, None] * BN + column[None, :])
            total = tl.dot(a, b, total, input_precision=PRECISION)
        tl.store(c_ptr + row[:, None] * BN + column[None, :], total)

    @triton.jit
    def broken(a_ptr, N: tl.constexpr):
        tl.store(a_ptr + tl.arange(0, N), no_such_name)

    def build(dtype, bm, bn, bk, precision, options):
        types = dict.fromkeys(("a_ptr", "b_ptr"), f"*{dtype}") | {"c_ptr": "*fp32"}
        constants = {"BM": bm, "BN": bn, "BK": bk, "PRECISION": precision}
        return cubin(compile_kernel(product, 90, types=types, constants=constants, divisible=("k",), **options))

    def case(name, unit, dtype="bf16", bm=64, bn=64, bk=32, precision="tf32", warps=4, stages=2, maxnreg=None, **rest):
        options = {"num_warps": warps, "num_stages": stages} | ({"maxnreg": maxnreg} if maxnreg else {})
        make = rest.pop("make", None) or partial(build, dtype, bm, bn, bk, precision, options)
        return Configuration("attention", name, 90, unit, {"dtype": dtype}, make, effort="quick", **rest)

    def probe(device):
        return Availability(device == "compile", "compiler")

    def configurations():
        yield case("sound", "hgmma")
        yield case("spilling", "ffma", dtype="fp32", precision="ieee", maxnreg=32)
        yield case("crashing", "hgmma", make=partial(os._exit, 3))
        yield case("spilling_allowed", "ffma", dtype="fp32", precision="ieee", maxnreg=32,
                   spill_bytes_allowed=1 << 16, spill_reason="on purpose")
        yield case("too_much_shared", "hgmma", bm=128, bn=128, bk=128, warps=8, stages=6)
        yield case("no_unit", "hgmma", dtype="fp32", precision="ieee")
        yield case("tf32", "ffma", dtype="fp32", precision="tf32")
        yield case("no_copy_engine", "hgmma", instructions=("UTMALDG",))
        yield case("not_compiling", "none",
                   make=lambda: cubin(compile_kernel(broken, 90, types={"a_ptr": "*fp32"}, constants={"N": 32})))
        yield case("sound_again", "ffma", dtype="fp32", precision="ieee", bm=16, bn=16)
"""
BACKEND = """
    from vbench.backend import DeclaredBackend
    BACKEND = DeclaredBackend(
        name="@NAME@", role="own", summary="controls of the ahead-of-time gate", ops={},
        probe_function="@NAME@_code:probe", configurations="@NAME@_code:configurations",
        environment={"compile": {"TRITON_INTERPRET": "0", "NUMBA_ENABLE_CUDASIM": "0"}},
    )
"""


def run_controls(name: str, code: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Record]:
    """Kernel name (or kind probe) -> record of a backend with these configurations."""
    (folder / f"{name}_code.py").write_text(textwrap.dedent(code), encoding="utf-8")
    install(folder, monkeypatch, name, BACKEND.replace("@NAME@", name))
    exit_code = main(["run", "--suite", "compile", "--backend", name, "--json", "--out", str(folder / "runs")])
    assert exit_code == 1, "a failing configuration of an own backend fails the run"
    records = [r for r in read_records(next((folder / "runs").iterdir())) if r.backend == name]
    return {r.case.partition("kernel=")[2].partition(",")[0] or r.kind: r for r in records}


@pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton to compile")
def test_controls_trip_the_gate_and_cost_only_themselves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(runner, "COMPILATIONS_A_WORKER", 4)  # two workers share the queue
    found = run_controls("bad_code", KERNELS, tmp_path, monkeypatch)
    assert len(list((tmp_path / "runs").rglob("bad_code.compile*.log"))) == min(2, os.cpu_count() or 1)
    body = json.loads(capsys.readouterr().out)
    assert body["outcomes"]["INVALID"] == 5 and body["exit"] == 1
    fared = {name: (r.outcome.value, r.reason) for name, r in found.items()}
    assert fared == {
        "probe": ("PASSED", "compiler"),
        "sound": ("PASSED", ""),
        "spilling": ("INVALID", "spills"),
        "crashing": ("CRASHED", "exit_3"),
        "spilling_allowed": ("PASSED", "spill_allowed"),
        "too_much_shared": ("INVALID", "shared_memory"),
        "no_unit": ("INVALID", "missing_unit"),
        "tf32": ("INVALID", "wrong_unit"),
        "no_copy_engine": ("INVALID", "missing_instruction"),
        "not_compiling": ("COMPILE_ERROR", "CompilationError"),
        "sound_again": ("PASSED", ""),
    }
    assert "on purpose" in found["spilling_allowed"].detail
    assert all(r.environment["triton"] and r.environment["ptxas"] for r in found.values())
    assert found["sound"].sources.startswith("sha256:") and found["sound"].prepare_s
    # Unfinished, it goes on where it stopped; one configuration can be compiled again by its hash.
    records = next((tmp_path / "runs").iterdir()) / "records.jsonl"
    whole = records.read_text(encoding="utf-8").splitlines(keepends=True)
    records.write_text("".join(line for line in whole if "sound_again" not in line), encoding="utf-8")
    assert main(["run", "--resume", "latest", "--json", "--out", str(tmp_path / "runs")]) == 1
    again = {r.case: r for r in read_records(records)}
    assert len(again) == len(whole) and again[found["sound_again"].case].outcome is Outcome.PASSED
    capsys.readouterr()
    out = ["--out", str(tmp_path / "runs")]
    assert main(["repro", case_hash(found["sound"].case), *out]) == 0
    assert main(["repro", case_hash(found["no_unit"].case), *out]) == 1
    assert "no HGMMA in the code" in capsys.readouterr().out
    assert main(["show", *out]) == 0
    assert "configurations" in capsys.readouterr().out


NUMBA = """
    from vbench.backend import Availability, Configuration
    from vbench.kernels.numba_cuda import codec_kernels
    from vbench.kernels.numba_cuda.configurations import compile_function, configuration
    from numba import cuda, float32

    def dynamic_local_array(x, y, k):
        local = cuda.local.array(64, float32)
        for i in range(64):
            local[(i * k) % 64] = x[i]
        y[0] = local[k]

    def probe(device):
        return Availability(device == "compile", "compiler")

    def configurations():
        row = codec_kernels.encode_row("fp32")
        divides = {"ieee_divisions": (1, 99), "approximate_divisions": (0, 0), "flushed_operations": (0, 0)}
        for name, fast in (("exact_division", False), ("fast_division", True)):
            yield Configuration("fp4_quantize", name, 90, "none", {},
                                lambda fast=fast: compile_function(row.function, row.signature, 90, fast),
                                bounds=divides, effort="quick")
        signature = "void(float32[::1], float32[::1], int64)"
        yield Configuration("fp4_quantize", "local_array", 90, "none", {},
                            lambda: compile_function(dynamic_local_array, signature, 90), effort="quick")
"""


@pytest.mark.skipif(find_spec("cuda.core") is None, reason="needs numba-cuda[cu13] to compile")
def test_numba_controls_trip_the_gate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = run_controls("bad_numba", NUMBA, tmp_path, monkeypatch)
    assert found["exact_division"].outcome is Outcome.PASSED
    assert (found["fast_division"].reason, found["local_array"].reason) == ("bound", "spills")
    assert "approximate_divisions" in found["fast_division"].detail and "flushed" in found["fast_division"].detail


def test_a_backend_whose_list_cannot_be_made_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = """
        from vbench.backend import Availability
        def probe(device):
            return Availability(True, "compiler")
        def configurations():
            raise RuntimeError("no table")
    """
    found = run_controls("bad_list", code, tmp_path, monkeypatch)
    assert {(r.case, r.outcome, r.reason) for r in found.values() if r.kind == "compile"} == {
        (gate.UNLISTED, Outcome.RUNTIME_ERROR, "RuntimeError")
    }


def test_a_run_that_could_compile_nothing_is_no_success() -> None:
    case = "compile[op=attention,kernel=k,arch=90,unit=hgmma]"
    missing = Record(case, "triton", "compile", Outcome.UNAVAILABLE, "r", reason="not_usable")
    assert judge.exit_code([missing], [], strict=False)[0] == 3
    assert judge.exit_code([missing, replace(missing, backend="b", outcome=Outcome.PASSED)], [], strict=False)[0] == 0
