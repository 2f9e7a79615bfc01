"""``vbench gate --against`` in real processes on a CPU: the same kernels are not SLOWER, a sleep of 10 % more is.

Not collected by default: it starts two dozen processes (about two minutes). ``.ci/run`` runs it by name.
A sleep is the load, because it lasts as long on a busy machine; a long one, so that being late matters little.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.plugins import HONEST, install

CASE = "fp4_dequantize[fmt=nvfp4,y=bf16,dist=normal,n=16,k=32]"
SLEEPING = HONEST.replace("def launch():", "def launch():\n                time.sleep(SLEEP_S)").replace(
    "import torch\n", "import time\n    import torch\n    SLEEP_S = 0.100\n", 1
)


def git(folder: Path, *words: str) -> None:
    who = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
    subprocess.run(["git", *who, *words], cwd=folder, check=True, capture_output=True)


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A plug-in's repository, installed from its working tree."""
    top = tmp_path / "plugin"
    top.mkdir()
    install(top, monkeypatch, "honest", SLEEPING)
    git(top, "init", "-q")
    git(top, "add", "-A")
    git(top, "commit", "-qm", "first")
    return top


def against(top: Path, out: Path) -> tuple[int, dict[str, object]]:
    command = [sys.executable, "-m", "vbench", "gate", "--against", "HEAD", "--backend", "honest", "--case", CASE]
    command += ["--device", "cpu", "--pairs", "4", "--max-pairs", "4", "--out", str(out), "--format", "json"]
    done = subprocess.run(command, cwd=top, capture_output=True, text=True, check=False, timeout=600)
    assert done.stdout, done.stderr
    body: dict[str, object] = json.loads(done.stdout)
    return done.returncode, body


def word(body: dict[str, object]) -> str:
    cells = body["cells"]
    assert isinstance(cells, dict) and len(cells) == 1
    return str(next(iter(cells.values()))["word"])


def test_the_same_revision_is_not_slower_and_ten_percent_more_is(repository: Path, tmp_path: Path) -> None:
    code, body = against(repository, tmp_path / "same")
    assert (code, word(body)) in ((0, "SAME"), (0, "FASTER"), (3, "INCONCLUSIVE")), body
    module = repository / "plugin_honest.py"
    module.write_text(module.read_text(encoding="utf-8").replace("0.100", "0.110"), encoding="utf-8")
    code, body = against(repository, tmp_path / "slower")
    assert (code, word(body)) == (1, "SLOWER"), body
