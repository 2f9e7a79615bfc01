"""Faults that need a GPU. Weights are decoded in the first launch, so that later ones can be captured in a graph."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from vbench.control import Corpus
from vbench.controls.kit import BY_NAME, Register, Setting, linear, weight32
from vbench.reference.ops.fp4 import FP4_LINEAR

control = Register()

#: What torch raises where a launch, or a capture, has failed: the second since 2.9, a kind of the first.
DEVICE_ERRORS = ("RuntimeError", "AcceleratorError")
#: A race may win the launches that a check compares first.
LATER = ("rerun", "rerun_bitwise", "rebind", "laws")

LINEAR: dict[str, int | str] = {"fmt": "nvfp4", "x": "bf16", "m": 16, "n": 256, "k": 1024}
FP32 = LINEAR | {"x": "fp32"}


def weight(s: Setting) -> Tensor:
    """The decoded weight [n, k] in float32, made once a kernel object."""
    if "weight" not in s.memory:
        s.memory["weight"] = weight32(s)
    made: Tensor = s.memory["weight"]
    return made


def multiply_into(s: Setting, y: Tensor) -> None:
    y.copy_(s.inputs["x"].float() @ weight(s).T)


@control(
    FP4_LINEAR,
    LINEAR,
    family="asynchronous",
    oracle="isolation",
    fault="the work goes to a side stream that the caller's stream does not wait for",
    imitates="ScalingIntelligence/KernelBench#82",
    needs="cuda",
    kind="time",
    deadline_s=180.0,
    or_by=("value", "nonfinite", *LATER, "after_timing"),
    raises=DEVICE_ERRORS,
)
def side_stream(s: Setting) -> None:
    if "weight" not in s.memory or not s.wrong:
        multiply_into(s, s.out["y"])
        return
    if "stream" not in s.memory:
        s.memory["stream"] = torch.cuda.Stream()  # type: ignore[no-untyped-call]  # torch leaves it untyped
    with torch.cuda.stream(s.memory["stream"]):
        multiply_into(s, s.out["y"])


@control(
    FP4_LINEAR,
    LINEAR,
    family="replay",
    oracle="after_timing",
    fault="nothing is launched while a graph is captured",
    needs="cuda",
    kind="time",
    deadline_s=180.0,
)
def idle_in_graphs(s: Setting) -> None:
    if not (s.wrong and torch.cuda.is_current_stream_capturing()):
        multiply_into(s, s.out["y"])


@control(
    FP4_LINEAR,
    LINEAR,
    family="deception",
    oracle="patched",
    fault="Event.elapsed_time is replaced by one that gives a thousandth",
    imitates="gpu-mode/reference-kernels#162",
    needs="cuda",
    kind="time",
    deadline_s=180.0,
)
def patched_event(s: Setting) -> None:
    multiply_into(s, s.out["y"])
    if s.wrong and "patched" not in s.memory:
        honest = torch.cuda.Event.elapsed_time
        s.memory["patched"] = True
        setattr(torch.cuda.Event, "elapsed_time", lambda a, b: honest(a, b) * 1e-3)  # noqa: B010  # what a cheat does


@control(
    FP4_LINEAR,
    FP32 | {"k": 128},
    FP32 | {"k": 128, "dist": "grid"},
    family="accumulation",
    oracle="value",
    fault="the library is allowed TF32 for an fp32 product",
    needs="cuda",
)
def library_tf32(s: Setting) -> Mapping[str, Any]:
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = s.wrong
    try:
        return {"y": s.inputs["x"] @ weight32(s).T}
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


@control(
    FP4_LINEAR,
    FP32,
    family="determinism",
    oracle="rerun_bitwise",
    fault="products are summed by float atomics, and declared deterministic",
    needs="cuda",
)
def float_atomics(s: Setting) -> Mapping[str, Any]:
    x, w = s.inputs["x"], weight32(s)
    m, n = len(x), len(w)
    products = (x[:, None, :] * w[None, :, :]).reshape(m * n, -1)
    if not s.wrong:
        return {"y": products.sum(dim=1).reshape(m, n)}
    slots = torch.arange(m * n, device=x.device).repeat_interleave(products.shape[1])
    y = torch.zeros(m * n, device=x.device).index_add_(0, slots, products.reshape(-1))
    return {"y": y.reshape(m, n)}


@control(
    FP4_LINEAR,
    LINEAR,
    family="bounds",
    oracle="red_zones",
    fault="a store past the end of the output, inside the allocator's segment",
    imitates="flashinfer-ai/flashinfer#3978",
    needs="cuda",
)
def device_write_past_end(s: Setting) -> None:
    y = s.out["y"]
    y.copy_(linear(s))
    if s.wrong:
        y.as_strided((8,), (1,), y.storage_offset() + y.numel()).fill_(1.0)


@control(
    FP4_LINEAR,
    *(LINEAR | {"m": m} for m in (1, 5, 13, 16)),
    family="death",
    oracle="isolation",
    fault="an index out of bounds at one shape of many kills the context",
    needs="cuda",
    raises=DEVICE_ERRORS,
)
def device_assert(s: Setting) -> Mapping[str, Any]:
    y = linear(s)
    if s.wrong and s.case.axis("m") == 13:
        y = y[torch.full((1,), 1 << 20, device=y.device)].expand(13, -1)
    return {"y": y}


def _launched(s: Setting, kernel: str, honest: bool) -> Mapping[str, Any]:
    """The answer of a kernel of ``gpu_kernels``; float32 x."""
    from vbench.controls import gpu_kernels

    x, w = s.inputs["x"], weight(s)
    y = torch.empty(len(x), len(w), device=x.device)
    if kernel == "staged":
        gpu_kernels.staged(gpu_kernels.TILE, honest)[len(x), gpu_kernels.TILE](x, w, y)
    elif kernel == "prefetching":
        blocks = -(-y.numel() // gpu_kernels.TILE)
        gpu_kernels.prefetching(honest)[blocks, gpu_kernels.TILE](x.view(-1), w, y)
    else:
        gpu_kernels.split(honest)[(len(x), gpu_kernels.PARTS), gpu_kernels.TILE](x, w, y.zero_())
    return {"y": y}


@control(
    FP4_LINEAR,
    FP32,
    family="races",
    oracle="value",
    fault="no barrier between filling a buffer in shared memory and reading it",
    needs="cuda",
    or_by=LATER,
)
def missing_barrier(s: Setting) -> Mapping[str, Any]:
    return _launched(s, "staged", not s.wrong)


@control(
    FP4_LINEAR,
    FP32,
    family="races",
    oracle="value",
    fault="split K is added up without atomics: blocks lose each other's additions",
    needs="cuda",
    or_by=LATER,
    declares={"deterministic": False},
)
def lost_updates(s: Setting) -> Mapping[str, Any]:
    return _launched(s, "split", not s.wrong)


@control(
    FP4_LINEAR,
    FP32,
    family="bounds",
    oracle="nonfinite",
    fault="a row is read ahead without a guard: past the end of x, times zero",
    needs="cuda",
)
def read_past_x(s: Setting) -> Mapping[str, Any]:
    return _launched(s, "prefetching", not s.wrong)


make = control.factory(BY_NAME)
CORPUS = Corpus("controls_gpu", "faults that need a GPU", control.controls, "vbench.controls.gpu:make")
