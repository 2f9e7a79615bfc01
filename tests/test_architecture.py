"""The import arrows of docs/design.md, read from the sources; and that the reader can see a forbidden one."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CONTRACT = {"vbench.spec", "vbench.record", "vbench.errors", "vbench.backend", "vbench.control"}
TAMPERED = {"vbench.check", "vbench.timing"}
HEAVY = {"torch", "triton", "numba", "numpy", "pandas", "tabulate", "rich", "hypothesis", "matplotlib"}
SIBLINGS = ("vbench.kernels", "vbench.reference", "vbench.suites", "vbench.results", "vbench.controls")


def imports(path: Path, *, top_level_only: bool) -> Iterator[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    skipped: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and top_level_only:
            skipped |= {id(inner) for inner in ast.walk(node)}
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            skipped |= {id(inner) for inner in ast.walk(node)}
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def violations(area: str, path: Path) -> list[str]:
    """Forbidden imports of one file. ``area``: contract, harness, reference, suites or a backend's folder name."""
    bad = []
    everywhere = set(imports(path, top_level_only=False))
    at_top = set(imports(path, top_level_only=True))

    def outside(names: set[str], allowed: set[str]) -> set[str]:
        mine = {n for n in names if n == "vbench" or n.startswith("vbench.")}
        return {n for n in mine if not any(n == a or n.startswith(a + ".") or a.startswith(n + ".") for a in allowed)}

    if area == "contract":
        standard = {n for n in everywhere if n.split(".")[0] in sys.stdlib_module_names or n.startswith("vbench.")}
        bad += sorted(everywhere - standard)
        bad += sorted(outside(everywhere, CONTRACT))
    elif area == "harness":
        bad += sorted(n for n in everywhere if n.startswith(SIBLINGS))
        bad += sorted(n for n in at_top if n.split(".")[0] in HEAVY)
    elif area == "reference":
        bad += sorted(outside(everywhere, CONTRACT | {"vbench.reference"}))
    elif area == "suites":
        bad += sorted(outside(everywhere, CONTRACT | {"vbench.suites", "vbench.reference.ops"}))
        bad += sorted(n for n in everywhere if n.split(".")[0] in HEAVY - {"hypothesis"})
    elif area == "controls":
        # Its kernels attack the comparison and the clock, so those two may be imported to be tampered with.
        # numba.cuda is imported in one place, which makes up for what newer numpy lacks; no kernel comes with it.
        allowed = CONTRACT | {"vbench.controls", "vbench.reference", "vbench.kernels.numba_cuda.dialect", *TAMPERED}
        bad += sorted(outside(everywhere, allowed))
    elif area == "virtual":
        bad += sorted(outside(everywhere, CONTRACT | {"vbench.kernels"}))
    elif area == "fp4_linear":
        bad += sorted(outside(everywhere, CONTRACT | {"vbench.kernels.fp4_linear", "vbench.kernels.triton"}))
    else:
        bad += sorted(outside(everywhere, CONTRACT | {f"vbench.kernels.{area}"}))
    return bad


def areas() -> list[tuple[str, Path]]:
    found = []
    for path in sorted((ROOT / "vbench").glob("*.py")):
        found.append(("contract" if f"vbench.{path.stem}" in CONTRACT else "harness", path))
    found += [("reference", p) for p in sorted((ROOT / "reference").rglob("*.py"))]
    found += [("suites", p) for p in sorted((ROOT / "suites").rglob("*.py"))]
    found += [("controls", p) for p in sorted((ROOT / "tests" / "controls").rglob("*.py"))]
    for folder in sorted(p for p in (ROOT / "kernels").iterdir() if p.is_dir()):
        found += [(folder.name, p) for p in sorted(folder.rglob("*.py"))]
    return found


@pytest.mark.parametrize(("area", "path"), areas(), ids=lambda v: v.name if isinstance(v, Path) else v)
def test_arrows(area: str, path: Path) -> None:
    assert violations(area, path) == []


@pytest.mark.parametrize(
    ("area", "code"),
    [
        ("contract", "import torch"),
        ("contract", "from vbench.check import poison"),
        ("harness", "import torch"),
        ("harness", "def f() -> None:\n    from vbench.reference import fp4"),
        ("reference", "from vbench.kernels.triton import linear"),
        ("reference", "import vbench.check"),
        ("suites", "from vbench.reference.fp4 import quantize"),
        ("suites", "import torch"),
        ("triton", "from vbench.reference.fp4 import quantize"),
        ("triton", "from vbench.kernels.tiers import stack"),
        ("triton", "import vbench.runner"),
        ("controls", "import vbench.worker"),
        ("controls", "from vbench.kernels.triton import linear"),
        ("controls", "from vbench.kernels.numba_cuda import linear"),
        ("virtual", "import vbench.runner"),
        ("virtual", "from vbench.reference import fp4"),
        ("tiers", "from vbench.kernels.virtual import shapes"),
        ("triton", "from vbench.kernels.fp4_linear import FP4Linear"),
        ("fp4_linear", "from vbench.kernels.peers import dense_linear"),
        ("fp4_linear", "from vbench.reference import fp4"),
    ],
)
def test_a_forbidden_arrow_is_seen(tmp_path: Path, area: str, code: str) -> None:
    path = tmp_path / "module.py"
    path.write_text(code, encoding="utf-8")
    assert violations(area, path) != []


def test_siblings_are_links_so_that_they_import_as_subpackages() -> None:
    targets = {name: Path("..") / name for name in ("kernels", "reference", "suites", "results")}
    for name, target in (targets | {"controls": Path("..") / "tests" / "controls"}).items():
        link = ROOT / "vbench" / name
        assert link.is_symlink() and link.readlink() == target


OWN = ("triton", "numba_cuda", "tiers", "fp4_linear", "virtual")


def tuners(text: str) -> list[str]:
    """Names of what chooses by timing at run time, Triton's autotuner under any name."""
    names: list[str] = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Attribute):
            names.append(node.attr)
        elif isinstance(node, ast.Name):
            names.append(node.id)
        elif isinstance(node, ast.ImportFrom):
            names += [alias.name for alias in node.names]
    return [name for name in names if name.lower() in ("autotune", "autotuner")]


@pytest.mark.parametrize("folder", OWN)
def test_nothing_of_ours_is_chosen_by_timing_at_run_time(folder: str) -> None:
    """A choice is a table's row or an option: frozen by the sources' digest, and the same in every process."""
    files = sorted((ROOT / "kernels" / folder).glob("*.py"))
    assert files and {path.name: found for path in files if (found := tuners(path.read_text(encoding="utf-8")))} == {}


@pytest.mark.parametrize("text", ["@triton.autotune(configs, key)\ndef f(): ...", "from triton import autotune as a"])
def test_control_an_autotuner_is_seen(text: str) -> None:
    assert tuners(text) == ["autotune"]
