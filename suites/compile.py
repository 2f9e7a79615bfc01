"""Suite ``compile``: every configuration that a backend declares, compiled ahead of time for each architecture.

It has no cases of its own: the backends' ``configurations`` are its jobs. No GPU is needed.
"""

from __future__ import annotations

from vbench.spec import Suite

SUITE = Suite(
    name="compile",
    summary="ahead of time, no GPU: each kernel compiles, spills nothing, fits shared memory, uses its declared unit",
    compiles=True,
)
