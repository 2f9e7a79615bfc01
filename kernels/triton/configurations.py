"""All that the Triton backend compiles to, for the ahead-of-time gate (``vbench run --suite compile``)."""

from __future__ import annotations

from collections.abc import Iterator

from vbench.backend import Configuration
from vbench.kernels.triton import (
    attention_aot,
    attention_backward_aot,
    attention_backward_gluon_aot,
    attention_extended_aot,
    block_aot,
    linear_aot,
)


def configurations() -> Iterator[Configuration]:
    """One line a family of kernels."""
    yield from attention_aot.configurations()
    yield from attention_backward_aot.configurations()
    yield from attention_backward_gluon_aot.configurations()
    yield from attention_extended_aot.configurations()
    yield from linear_aot.configurations()
    yield from block_aot.configurations()
