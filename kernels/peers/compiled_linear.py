"""Peer of ``fp4_linear``: ``torch.compile`` of decode, linear and activation, with its default options.

Inductor fuses the decode into one kernel that writes the weight in x's dtype, and leaves the product to cuBLAS, so that
the roundings are those of ``eager_dequant``. Compiled once a process for each format, dtype, activation, weight shape,
and m = 1 or m > 1 (the token count is marked dynamic; PyTorch documents that a size of 1 is always specialised).
"""

from __future__ import annotations

import functools
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vbench.backend import Device, Launch
from vbench.errors import Unsupported
from vbench.spec import Case, Numerics

#: Weights below this are not worth a compilation of seconds, and nobody times them.
MIN_WEIGHTS = 1 << 20
#: Distinct shapes a process may compile; beyond its default of 8 torch would refuse.
RECOMPILE_LIMIT = 256

Forward = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor | None], Tensor]


@functools.cache
def compiled(forward: Callable[[str, str, torch.dtype], Forward], fmt: str, act: str, dtype: torch.dtype) -> Forward:
    """``forward(fmt, act, dtype)`` compiled; the same object for the same arguments, so that it compiles once."""
    import torch._dynamo

    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, RECOMPILE_LIMIT)
    result: Forward = torch.compile(forward(fmt, act, dtype), fullgraph=True)
    return result


@dataclass(slots=True)
class CompiledLinear:
    """``run(x, codes, scale, global_scale, bias)``; the first launch of a shape compiles."""

    run: Forward
    numerics: Numerics
    produces: tuple[str, ...] = ("y",)
    deterministic: bool = True

    def bind(self, inputs: Mapping[str, Any], out: Mapping[str, Any]) -> Launch:
        """See ``vbench.backend.Kernel.bind``."""
        import torch._dynamo

        x = inputs["x"]
        if x.shape[0] > 1:
            torch._dynamo.mark_dynamic(x, 0)
        operands = (x, inputs["codes"], inputs["scale"], inputs["global_scale"], inputs.get("bias"))
        return lambda: {"y": self.run(*operands)}


def check(case: Case, device: Device) -> None:
    """Refuse before anything is compiled.

    Raises:
        Unsupported: ``needs_cuda``; ``too_small_to_compile``; ``needs_compiler``: Inductor's kernels need a C compiler.
    """
    if device != "cuda":
        raise Unsupported("needs_cuda", "compiling each check case for a CPU takes minutes; compared on CUDA only")
    weights = case.axis("n") * case.axis("k")
    if weights < MIN_WEIGHTS:
        raise Unsupported("too_small_to_compile", f"{weights} weights; a compilation pays from {MIN_WEIGHTS}")
    if not any(map(shutil.which, filter(None, (os.environ.get("CC"), "gcc", "clang", "cc")))):
        raise Unsupported("needs_compiler", "torch.compile needs a C compiler; install gcc or set CC")
