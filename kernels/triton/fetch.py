"""tier_fetch: one kernel reads the packed weight out of host memory, decodes it and writes it to device memory.

Page-locked memory has a device address of its own under unified addressing, and Triton's launcher asks the driver for
it (cuPointerGetAttribute, CU_POINTER_ATTRIBUTE_DEVICE_POINTER, in triton/backends/nvidia/driver.c), so a pinned CPU
tensor is an argument like any other. No staging buffer, no second launch: what crosses the link is the packed weight.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl

from vbench.backend import Device, Launch
from vbench.errors import Unsupported
from vbench.kernels.triton.codec import decode_launcher
from vbench.kernels.triton.packing import GROUPS, check_weight
from vbench.kernels.triton.probe import INTERPRETED, check_device
from vbench.spec import TORCH_DTYPE_NAMES, Case, Numerics

#: Words of 4 bytes a program of the raw copy moves: four loads of 16 bytes in flight for each of its threads.
COPY_WORDS = 4096
COPY_WARPS = 8


@triton.jit
def copy_kernel(source_ptr, target_ptr, count, BLOCK: tl.constexpr):
    """target[i] = source[i] for i < count, in words."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    ok = index < count
    tl.store(target_ptr + index, tl.load(source_ptr + index, mask=ok, other=0), mask=ok)


def words(t: Any) -> Any:
    """A contiguous tensor's memory as int32, or as int16 where its size is no multiple of 4 bytes."""
    flat = t.reshape(-1)
    wide = flat.numel() * flat.element_size() % 4 == 0 and flat.data_ptr() % 4 == 0
    return flat.view(torch.int32 if wide else torch.int16)


def check_host(tensors: Mapping[str, Any], device: Device) -> None:
    """Refuse what the kernel could not read where it lies.

    Raises:
        Unsupported: ``not_on_host``, ``not_pinned`` (device cuda), ``not_contiguous``.
    """
    for name, t in tensors.items():
        if t.device.type != "cpu":
            raise Unsupported("not_on_host", f"{name} is on {t.device}; this op fetches from host memory")
        if device == "cuda" and not t.is_pinned():
            raise Unsupported("not_pinned", f"{name} is pageable, which a GPU cannot read; call .pin_memory()")
        if not t.is_contiguous():
            raise Unsupported("not_contiguous", f"{name} must be contiguous; call .contiguous()")


class FetchKernel:
    """tier_fetch of one case. Exact, deterministic. Timed by wall clock: the link, not the launch, is the cost."""

    numerics = Numerics("fp32")
    produces = ("weight",)
    deterministic = True
    graph_safe = False

    def __init__(self, case: Case, device: Device) -> None:
        self.device: Device = device
        self.fmt, self.y = case.text("fmt"), case.text("y")
        self.n, self.k = case.axis("n"), case.axis("k")

    def bind(self, inputs: Mapping[str, Any], out: Mapping[str, Any]) -> Launch:
        """``weight`` (raw) or ``codes``, ``scale``, ``global_scale`` in host memory. Writes weight [n, k].

        Raises:
            Unsupported: ``check_host``'s, and ``weight_shape``, ``weight_dtype``, ``scale_not_finite_positive``.
        """
        target = out["weight"]
        if self.fmt != "raw":
            weight = {name: inputs[name] for name in ("codes", "scale", "global_scale")}
            check_host(weight, self.device)
            check_weight(self.fmt, weight, self.n, self.k)
            stored = target.view(torch.int16) if INTERPRETED and self.y == "bf16" else target
            return decode_launcher(self.fmt, self.y, weight, stored, self.n, self.k)
        source = inputs["weight"]
        check_host({"weight": source}, self.device)
        dtype = getattr(torch, TORCH_DTYPE_NAMES[self.y])
        if tuple(source.shape) != (self.n, self.k) or source.dtype != dtype:
            raise Unsupported(
                "weight_shape", f"weight is {source.dtype} {tuple(source.shape)}, the case says otherwise"
            )
        source, target = words(source), words(target)
        count = source.numel()
        block = min(COPY_WORDS, triton.next_power_of_2(count)) if INTERPRETED else COPY_WORDS

        def launch() -> None:
            copy_kernel[(triton.cdiv(count, block),)](source, target, count, BLOCK=block, num_warps=COPY_WARPS)

        return launch


def make(case: Case, variant: str, device: Device) -> FetchKernel:
    """Factory of tier_fetch.

    Raises:
        Unsupported: ``unknown_variant``, ``zero_size``, ``format``, ``k_odd``, ``k_not_multiple_of_block``,
            ``too_large``, and ``probe.check_device``'s.
    """
    if variant:
        raise Unsupported("unknown_variant", f"tier_fetch has no variant {variant!r}; leave it out")
    check_device(device)
    n, k, fmt = case.axis("n"), case.axis("k"), case.text("fmt")
    if n * k == 0:
        raise Unsupported("zero_size", f"n={n}, k={k}: nothing to fetch")
    if k >= 2**31 or n >= 2**31:
        raise Unsupported("too_large", f"n={n}, k={k}: each must fit 31 bits")
    if fmt != "raw":
        if fmt not in GROUPS:
            raise Unsupported("format", f"fmt={fmt}: these kernels know raw, {', '.join(GROUPS)}")
        if k % 2:
            raise Unsupported("k_odd", f"k={k}: two codes share a byte")
        if GROUPS[fmt] > 0 and k % GROUPS[fmt]:
            raise Unsupported("k_not_multiple_of_block", f"k={k} is no multiple of {GROUPS[fmt]}")
    return FetchKernel(case, device)
