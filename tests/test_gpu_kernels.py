"""The GPU controls' kernels in numba's simulator, and what the sanitizer's exit codes mean. On a GPU: sanitize.py."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from vbench.controls import gpu, gpu_kernels, sanitize

M, N, K = 3, 8, 80
TILE = 32


def product() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    random = np.random.default_rng(1)
    x, w = (random.standard_normal((rows, K)).astype(np.float32) for rows in (M, N))
    return x, w, np.full((M, N), np.nan, np.float32)


def close(y: np.ndarray, x: np.ndarray, w: np.ndarray) -> bool:
    return bool(np.allclose(y, x.astype(np.float64) @ w.T, rtol=1e-4, atol=1e-4))


@pytest.mark.parametrize("barrier", [True, False])
def test_without_a_barrier_a_buffer_is_read_before_it_is_filled(barrier: bool) -> None:
    x, w, y = product()
    gpu_kernels.staged(TILE, barrier)[M, TILE](x, w, y)
    assert close(y, x, w) == barrier


@pytest.mark.parametrize("guarded", [True, False])
def test_without_a_guard_x_is_read_past_its_end(guarded: bool) -> None:
    x, w, y = product()
    launch = gpu_kernels.prefetching(guarded)[1, TILE]
    if guarded:
        launch(x.reshape(-1), w, y)
        assert close(y, x, w)
    else:
        with pytest.raises(IndexError):
            launch(x.reshape(-1), w, y)


def test_split_sums_are_the_product() -> None:
    """The simulator runs one block after the other, so that the lost additions are for a GPU to show."""
    x, w, y = product()
    y[:] = 0
    gpu_kernels.split(True)[(M, gpu_kernels.PARTS), TILE](x, w, y)
    assert close(y, x, w)


#: Takes away what newer numpy lacks and runs what numba-cuda imports when it first compiles.
WITHOUT_ROW_STACK = """
import sys, numpy
vars(numpy).pop("row_stack", None)
for module in sys.argv[1:]:
    __import__(module)
"""


@pytest.mark.parametrize("ours", [True, False])
def test_the_kernels_import_where_numpy_has_no_row_stack(ours: bool) -> None:
    """numba-cuda's own import fails there (the control); by way of what the sanitizer launches it does not."""
    modules = ["vbench.controls.gpu_kernels"] * ours + ["numba.cuda.np.arrayobj"]
    environment = {**os.environ, "NUMBA_ENABLE_CUDASIM": "0"}
    command = [sys.executable, "-c", WITHOUT_ROW_STACK, *modules]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert (done.returncode == 0) == ours, done.stderr
    assert ours or "row_stack" in done.stderr


def test_each_sanitized_control_has_a_twin_and_is_one_of_the_corpus() -> None:
    names = [name for names in sanitize.TOOLS.values() for name in names]
    assert {n + end for n in names for end in ("", "+honest")} == set(gpu_kernels.CHECKED)
    assert set(names) <= {c.name for c in gpu.CORPUS.controls}


def report(name: str, code: int, text: str = "") -> sanitize.Report:
    return sanitize.read("memcheck", name, code, text)


def test_the_verdict_of_the_sanitizer() -> None:
    wrong, twin = report("read_past_x", sanitize.REPORTED), report("read_past_x+honest", 0)
    assert sanitize.verdict([wrong, twin]) == 0
    assert sanitize.verdict([report("read_past_x", 0), twin]) == 1
    assert sanitize.verdict([wrong, report("read_past_x+honest", sanitize.REPORTED)]) == 1
    # Neither clean nor reported: nothing was judged.
    for code, text in ((1, ""), (0, "========= Device not supported."), (sanitize.REPORTED, "Device not supported")):
        assert sanitize.verdict([report("read_past_x", code, text), twin]) == 3
    assert sanitize.verdict([]) == 3


def test_without_a_sanitizer_nothing_is_judged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sanitize, "TOOLKIT", str(tmp_path))
    assert sanitize.main() == 3


@pytest.mark.parametrize("on_the_path", [True, False])
def test_a_program_that_is_no_sanitizer_is_no_result(
    on_the_path: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that ends with a code of its own, on the path or where the toolkit puts it; each run leaves its arguments."""
    asked = tmp_path / "asked"
    folders = {True: tmp_path / "path", False: tmp_path / "toolkit"}
    for folder in folders.values():
        folder.mkdir()
    program = folders[on_the_path] / "compute-sanitizer"
    program.write_text(f'#!/bin/sh\necho "$*" >> {asked}\nexit 1\n', encoding="utf-8")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(folders[True]))
    monkeypatch.setattr(sanitize, "TOOLKIT", str(folders[False]))
    assert sanitize.main() == 3
    lines = asked.read_text(encoding="utf-8").splitlines()
    assert len(lines) == 4 and all(sys.executable in line for line in lines)


def test_a_run_past_its_time_is_killed_with_what_it_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "compute-sanitizer"
    program.write_text(f"#!/bin/sh\nsleep 600 &\necho $! > {tmp_path / 'child'}\nwait\n", encoding="utf-8")
    program.chmod(0o755)
    monkeypatch.setattr(sanitize, "DEADLINE_S", 2.0)
    one = sanitize.run(str(program), "memcheck", "read_past_x")
    assert not one.ran and "longer than" in one.text
    state = Path(f"/proc/{(tmp_path / 'child').read_text(encoding='ascii').strip()}/stat")
    assert not state.exists() or state.read_text(encoding="ascii").rpartition(")")[2].split()[0] == "Z"
