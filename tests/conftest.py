"""Interpreter switches and Hypothesis profiles."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

# Triton and numba decide at their first import, whichever test file brings it: before any of them.
os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("NUMBA_ENABLE_CUDASIM", "1")
# Test files run side by side, and threads of OpenMP that wait for each other on a busy core burn it meanwhile: the
# tests of whole models took nine times the CPU's time with two threads a process.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest  # the switches come first
from hypothesis import HealthCheck, settings

settings.register_profile(
    "ci", derandomize=True, deadline=None, print_blob=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile("search", deadline=None, print_blob=True, max_examples=1000)
settings.load_profile("ci")


@pytest.fixture(scope="session")
def interpreter() -> Iterator[ProcessPoolExecutor]:
    """One child process with the interpreter on."""
    before = os.environ.get("TRITON_INTERPRET")
    os.environ["TRITON_INTERPRET"] = "1"
    pool = ProcessPoolExecutor(1, mp_context=get_context("spawn"))
    pool.submit(os.getpid).result(timeout=60)  # the child is up and has copied the environment
    if before is None:
        del os.environ["TRITON_INTERPRET"]
    else:
        os.environ["TRITON_INTERPRET"] = before
    yield pool
    pool.shutdown()
