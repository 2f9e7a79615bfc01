"""Factory of ``tier_fetch``: the decoder of the codec, reading its packed weight through mapped host memory.

Page-locked memory has one address for host and device under unified addressing (CUDA C++ programming guide, "Unified
Virtual Address Space"), so its address is the device's too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vbench.backend import Device, Kernel, Launch
from vbench.errors import Unsupported
from vbench.kernels.numba_cuda.codec import EXACT, blocks_of, dtype_of
from vbench.kernels.numba_cuda.formats import Format, format_of, require_simulable
from vbench.spec import TORCH_DTYPE_NAMES, Case, Numerics

ITEM_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}


@dataclass(frozen=True)
class FetchKernel:
    """A packed or raw weight in host memory -> weight [n, k] on the device; bitwise.

    Args:
        fmt: ``None`` for a raw weight.
    """

    fmt: Format | None
    dtype: str
    n: int
    k: int
    device: Device
    numerics: Numerics = EXACT
    produces: tuple[str, ...] = ("weight",)
    deterministic: bool = True
    graph_safe: bool = False

    def bind(self, inputs: Mapping[str, Any], out: Mapping[str, Any]) -> Launch:
        """Compiles; the launch is one kernel.

        Raises:
            Unsupported: a tensor of the wrong dtype, shape, place, layout or alignment, or pageable memory.
        """
        from vbench.kernels.numba_cuda import codec_kernels, fetch_kernels
        from vbench.kernels.numba_cuda.bits import PAIR_HELD_AS
        from vbench.kernels.numba_cuda.program import (
            Step,
            array,
            host_array,
            host_tensor,
            make_launch,
            require_process,
            tensor,
        )

        require_process(self.device)
        n, k, fmt, name = self.n, self.k, self.fmt, TORCH_DTYPE_NAMES[self.dtype]
        weight = tensor(out, "weight", name, (n, k), self.device, align=4)
        if fmt is None:
            source = host_tensor(inputs, "weight", name, (n, k), self.device, align=4)
            size = n * k * ITEM_BYTES[self.dtype]
            held = "uint32" if size % 4 == 0 else "uint16"
            count = size // (4 if held == "uint32" else 2)
            program = fetch_kernels.copy(held)
            grid = (min(blocks_of(count, program.threads), fetch_kernels.MAX_BLOCKS), 1)
            return make_launch([Step(program, grid, (host_array(source, held), array(weight, held), count))])
        codes = host_tensor(inputs, "codes", "uint8", (n, k // 2), self.device)
        align = 4 if fmt.scale_held == "float32" else 1
        scale = host_tensor(inputs, "scale", fmt.scale_torch, fmt.scale_shape(n, k), self.device, align)
        global_scale = host_tensor(inputs, "global_scale", "float32", (1,), self.device, align=4)
        arguments = (
            host_array(codes, "uint8"),
            host_array(scale, fmt.scale_held),
            host_array(global_scale, "float32"),
            array(weight, PAIR_HELD_AS[self.dtype]),
            k,
        )
        return make_launch([Step(codec_kernels.decode(fmt.name, self.dtype), (n, 1), arguments)])


def fetch(case: Case, variant: str, device: Device) -> Kernel:
    """KernelFactory of ``tier_fetch``.

    Raises:
        Unsupported: ``unknown_variant``, ``zero_size``, and as ``formats.format_of`` and ``require_simulable`` do.
    """
    if variant:
        raise Unsupported("unknown_variant", f"tier_fetch has no variant {variant!r}; leave it out")
    n, k = case.axis("n"), case.axis("k")
    fmt = None
    if case.text("fmt") != "raw":
        fmt = format_of(case)
    elif n * k == 0:
        raise Unsupported("zero_size", f"n={n}, k={k}: nothing to fetch")
    require_simulable(case, device)
    return FetchKernel(fmt, dtype_of(case, "y"), n, k, device)
