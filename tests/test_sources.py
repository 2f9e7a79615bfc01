"""Source digests follow imports inside one body of source and nothing else."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from vbench import sources


def write(folder: Path, **modules: str) -> None:
    package = folder / "body"
    package.mkdir(exist_ok=True)
    (package / "__init__.py").touch()
    for name, code in modules.items():
        (package / f"{name}.py").write_text(code, encoding="utf-8")


def test_closure_follows_own_imports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    write(tmp_path, a="from body import b\nimport json", b="import body.c", c="x = 1", d="y = 1")
    assert set(sources.closure(["body.a"])) == {"body", "body.a", "body.b", "body.c"}
    first = sources.digest.__wrapped__(("body.a",))
    write(tmp_path, d="y = 2")
    assert sources.digest.__wrapped__(("body.a",)) == first
    write(tmp_path, c="x = 2")
    assert sources.digest.__wrapped__(("body.a",)) != first


def test_a_kernel_edit_leaves_other_backends_alone() -> None:
    found = sources.closure(["vbench.reference.linear"])
    assert "vbench.reference.fp4" in found and "vbench.reference.budget" in found
    assert not any(m.startswith(("vbench.kernels", "vbench.spec", "vbench.suites")) for m in found)


def test_no_source_gives_no_digest() -> None:
    assert sources.digest(("no.such.module",)) == ""


def test_digests_import_nothing() -> None:
    """A name that is imported from a module may itself be a module; asking must not import its parent (and torch)."""
    code = (
        "import sys\nfrom vbench import registry, sources\n{first}ops = registry.ops()\n"
        "for info in registry.backends().values():\n"
        "    for op, factory in info.ops.items():\n"
        "        assert sources.job_digest(factory, ops[op].oracle, ops[op].inputs)\n"
        "print('torch' in sys.modules)\n"
    )
    for first, seen in (("", "False"), ("import torch\n", "True")):
        command = [sys.executable, "-c", code.format(first=first)]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
        assert done.stdout.strip() == seen
