"""Interpreter switches and Hypothesis profiles."""

from __future__ import annotations

import os

# Triton and numba decide at their first import, whichever test file brings it: before any of them.
os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("NUMBA_ENABLE_CUDASIM", "1")

from hypothesis import HealthCheck, settings  # the switches come first

settings.register_profile(
    "ci", derandomize=True, deadline=None, print_blob=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile("search", deadline=None, print_blob=True, max_examples=1000)
settings.load_profile("ci")
