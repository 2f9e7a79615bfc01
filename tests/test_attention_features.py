"""docs/attention.md is generated, the tests it names exist, and FlashAttention's wheels survive the journey."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent


def script(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(f"tuning_{name}", ROOT / "docs" / "tuning" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


features = script("attention_features")
wheels = script("flash4_wheels")


def test_the_documents_copy_is_generated() -> None:
    written = (ROOT / "docs" / "attention.md").read_text(encoding="utf-8")
    assert written[written.index("## Generated") :] == "## Generated\n\n" + features.to_markdown(), "run: make features"


def test_ours_takes_every_feature() -> None:
    # What the last column's tests prove of the plain kernels must be what they are asked for.
    plain = features.COLUMNS[0]
    with features.hopper():
        assert [row.title for row in features.FEATURES if features.cell(plain, row) != "yes"] == []
        assert features.declared(plain) == ("yes", "yes", "yes")


def test_a_kernel_that_takes_less_is_seen() -> None:
    flash = next(column for column in features.COLUMNS if column.title == "FA3")
    row = next(row for row in features.FEATURES if row.title == "sinks")
    with features.hopper():
        assert features.cell(flash, row) == "`no_sinks`"


def test_the_named_tests_are_collected() -> None:
    named = {test for row in (*features.FEATURES, features.LSE_GRADIENT) for test in row.proof}
    named |= {*features.LSE_OUT, *features.DETERMINISTIC}
    files = sorted({test.partition("::")[0] for test in named})
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", *files]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stdout[-2000:]
    collected = set(done.stdout.splitlines())
    collected |= {line.partition("[")[0] for line in collected}
    assert named <= collected
    assert "tests/test_triton_attention.py::test_nothing" not in collected


def packed(folder: Path) -> list[Path]:
    """As many wheels as there are, the first the largest."""
    folder.mkdir()
    made = []
    for at in range(len(wheels.WHEELS)):
        path = folder / f"part{at}-1-py3-none-any.whl"
        with zipfile.ZipFile(path, "w") as wheel:
            wheel.writestr(f"part{at}/__init__.py", "x" * (5000 if at == 0 else 10))
        made.append(path)
    return made


def test_wheels_are_cut_joined_and_checked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wheels.deal(packed(tmp_path / "wheels"), tmp_path)
    sizes = [sum(f.stat().st_size for f in (tmp_path / name).glob("*.whl*")) for name in wheels.FOLDERS]
    assert all(size > 2000 for size in sizes)
    assert len(json.loads((tmp_path / "second" / "wheels.json").read_text(encoding="utf-8"))) == len(wheels.WHEELS)
    wheels.install(tmp_path)
    assert capsys.readouterr().out.splitlines()[-1].startswith(f"PYTHONPATH={tmp_path / 'site'}:")
    assert (tmp_path / "site" / "part0" / "__init__.py").read_text(encoding="utf-8") == "x" * 5000
    assert (tmp_path / "site" / "part7" / "__init__.py").is_file()
    half = next((tmp_path / "second").glob("*.1"))
    half.write_bytes(half.read_bytes()[:-1])
    with pytest.raises(SystemExit, match="are not the wheel"):
        wheels.install(tmp_path)


def test_a_folder_over_the_limit_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wheels, "LIMIT_BYTES", 1000)
    with pytest.raises(SystemExit, match="cut it in three"):
        wheels.deal(packed(tmp_path / "wheels"), tmp_path)
