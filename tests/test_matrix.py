"""The conformance matrix: generated, without a hole, and the document's copy is the same."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import plugins
from vbench import registry, survey
from vbench.cli import main
from vbench.reference.ops.fp4 import FP4_DEQUANTIZE, FP4_LINEAR
from vbench.spec import Suite

DOCS = Path(__file__).resolve().parent.parent / "docs"


@pytest.fixture(scope="module")
def tables() -> list[survey.Table]:
    ours = [info for info in registry.backends().values() if info.distribution == registry.OWN_DISTRIBUTION]
    return survey.matrix(registry.ops(), list(registry.suites().values()), ours, "cpu")


def test_no_cell_is_a_hole(tables: list[survey.Table]) -> None:
    cells = survey.to_dict(tables)
    assert [cell for cell in cells if cell["answer"] not in ("ok", "unsupported", "unavailable")] == []
    assert all(cell["code"] for cell in cells if cell["answer"] == "unsupported")
    assert {(c["op"], c["kernel"].partition("[")[0]) for c in cells} == {
        (op, info.name) for op in registry.ops() for info in registry.backends().values()
    }
    # A peer that is not installed says so; ours must be here.
    absent = {cell["kernel"].partition("[")[0] for cell in cells if cell["answer"] == "unavailable"}
    assert absent <= {"accelerate", "bitsandbytes", "deepspeed", "flash_attn_3", "flash_attn_4", "gemlite", "torchao"}


def test_the_documents_copy_is_generated(tables: list[survey.Table]) -> None:
    written = (DOCS / "matrix.md").read_text(encoding="utf-8")
    assert written[written.index("## ") :] == survey.to_markdown(tables), "run: make matrix"


def test_a_combination_that_no_suite_has_is_marked_and_an_op_without_a_case_is_a_hole() -> None:
    only = Suite("one", "", checks=(FP4_LINEAR.case(fmt="nvfp4", x="bf16", m=1, n=1, k=16),))
    found = survey.representatives(FP4_LINEAR, [only])
    assert found["nvfp4", "bf16"] == (only.checks[0], True)
    assert found["nvfp4", "fp32"] == (FP4_LINEAR.case(fmt="nvfp4", x="fp32", m=1, n=1, k=16), False)
    (table,) = survey.matrix({FP4_LINEAR.name: FP4_LINEAR}, [only], [registry.backends()["torch"]], "cpu")
    assert table.rows["nvfp4", "bf16"] == (survey.Answer("ok"),)
    assert table.rows["nvfp4", "fp32"] == (survey.Answer("ok", "no_fixed_case"),)
    assert "| ok* |" in survey.to_markdown([table])
    (table,) = survey.matrix({FP4_LINEAR.name: FP4_LINEAR}, [Suite("none", "")], [registry.backends()["torch"]], "cpu")
    assert table.rows["nvfp4", "fp32"] == (survey.Answer("hole", "no_case"),)
    assert "HOLE no_case" in survey.to_markdown([table])


def test_an_untyped_refusal_and_a_crash_are_holes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code = """
        import os
        from vbench.backend import Availability, DeclaredBackend
        from vbench.errors import Unsupported
        BACKEND = DeclaredBackend(
            name="NAME", role="own", summary="", ops={"fp4_dequantize": "plugin_NAME:make"},
            variants={"fp4_dequantize": ("typed", "text")}, probe_function="plugin_NAME:probe",
        )
        def probe(device):
            print("noise")
            return Availability(True)
        def make(case, variant, device):
            if variant == "typed":
                raise Unsupported("because", "it says so")
            ACT
    """
    acts = {"vague": 'raise ValueError("Unsupported")', "dead": "os._exit(4)"}
    for name, act in acts.items():
        plugins.install(tmp_path, monkeypatch, name, code.replace("NAME", name).replace("ACT", act))
    case = FP4_DEQUANTIZE.case(fmt="nvfp4", n=1, k=16)
    answers = {}
    for name in acts:
        info = registry.backends()[name]
        questions = [(case.op, case.id, variant) for variant in ("typed", "text")]
        answers[name] = survey.ask(info, "cpu", questions)
    assert answers["vague"] == [
        survey.Answer("unsupported", "because", "it says so"),
        survey.Answer("hole", "ValueError"),
    ]
    assert answers["dead"] == [survey.Answer("hole", "exit_4")] * 2
    # Ours are asked above, and take their time.
    theirs = {name: registry.backends()[name] for name in acts}
    monkeypatch.setattr(registry, "backends", lambda: theirs)
    assert main(["list", "--matrix", "--device", "cpu"]) == 1
    assert "cells are holes" in capsys.readouterr().err
