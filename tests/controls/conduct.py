"""Kernels whose numbers may be right and whose conduct is not: they deceive, remember, overstep or die."""

from __future__ import annotations

import ctypes
import os
import threading
import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from vbench import timing
from vbench.control import Corpus
from vbench.controls.kit import BY_NAME, Register, Setting, finish, linear, weight32
from vbench.controls.lax import LAX_LINEAR
from vbench.reference.ops.fp4 import FP4_LINEAR

control = Register()

LINEAR: dict[str, int | str] = {"fmt": "nvfp4", "x": "bf16", "m": 8, "n": 32, "k": 128}

# -- stale and remembered ----------------------------------------------------------------------------------------------


@control(
    FP4_LINEAR,
    LINEAR,
    family="stale",
    oracle="poison",
    fault="nothing is written: the allocator may have handed out the reference's memory",
    imitates="ScalingIntelligence/KernelBench#82",
)
def stale_output(s: Setting) -> None:
    if not s.wrong:
        s.out["y"].copy_(linear(s))


@control(
    FP4_LINEAR,
    LINEAR,
    family="replay",
    oracle="rebind",
    fault="results are remembered by the address of x",
    imitates="gpu-mode/kernelbot#501",
)
def replay_by_pointer(s: Setting) -> Mapping[str, Any]:
    x = s.inputs["x"]
    key = x.data_ptr()
    if key not in s.memory or not s.wrong:
        s.memory[key] = linear(s)
    return {"y": s.memory[key]}


@control(
    FP4_LINEAR,
    LINEAR,
    family="replay",
    oracle="rebind",
    fault="the decoded weight is remembered by its shape",
)
def weight_by_shape(s: Setting) -> Mapping[str, Any]:
    key: Any = tuple(s.inputs["codes"].shape)
    if key not in s.memory or not s.wrong:
        s.memory[key] = weight32(s)
    return {"y": linear(s, s.memory[key])}


@control(
    FP4_LINEAR,
    LINEAR,
    family="replay",
    oracle="rerun",
    fault="right in the first launch only; later ones do half the work",
    declares={"deterministic": False},
)
def right_once(s: Setting) -> Mapping[str, Any]:
    y = linear(s)
    return {"y": y * 0.5 if s.wrong and s.calls > 1 else y}


@control(
    FP4_LINEAR,
    LINEAR,
    family="replay",
    oracle="after_timing",
    fault="right in warm-up only; timed launches do nothing",
    imitates="karpathy/llm.c#851",
    kind="time",
)
def right_until_timed(s: Setting) -> None:
    if not s.wrong or s.calls <= 4:
        s.out["y"].copy_(linear(s))
    else:
        s.out["y"].zero_()


@control(
    FP4_LINEAR,
    LINEAR,
    family="stale",
    oracle="rerun",
    fault="the accumulator is not cleared between launches",
)
def uncleared_accumulator(s: Setting) -> Mapping[str, Any]:
    y = linear(s)
    if s.wrong:
        y = s.memory["y"] = y + s.memory.get("y", torch.zeros((), dtype=y.dtype))
    return {"y": y}


@control(
    FP4_LINEAR,
    LINEAR,
    family="asynchronous",
    oracle="poison",
    fault="the work is left to a thread that nobody waits for",
)
def background_thread(s: Setting) -> None:
    y, out = linear(s), s.out["y"]

    def later() -> None:
        time.sleep(0.1)
        out.copy_(y)

    worker = threading.Thread(target=later, daemon=True)
    worker.start()
    if not s.wrong:
        worker.join()


# -- form of the output ------------------------------------------------------------------------------------------------


class Lazy(torch.Tensor):
    """A subclass; a real one would compute when it is compared."""


@control(
    FP4_LINEAR,
    LINEAR,
    family="form",
    oracle="plain_tensor",
    fault="the output is a lazy subclass that defers its work to the comparison",
    imitates="gpu-mode/reference-kernels#162",
    returns=True,
)
def lazy_tensor(s: Setting) -> Mapping[str, Any]:
    y = linear(s)
    return {"y": y.as_subclass(Lazy) if s.wrong else y}


@control(FP4_LINEAR, LINEAR, family="form", oracle="shape", fault="a dimension of size 1 too many", returns=True)
def extra_dimension(s: Setting) -> Mapping[str, Any]:
    y = linear(s)
    return {"y": y[None] if s.wrong else y}


@control(
    FP4_LINEAR,
    LINEAR | {"bias": 1},
    family="form",
    oracle="dtype",
    fault="the output is fp32, not rounded to bf16",
    returns=True,
)
def wide_output(s: Setting) -> Mapping[str, Any]:
    sums = s.inputs["x"].float() @ weight32(s).T
    return {"y": sums + s.inputs["bias"].float() if s.wrong else finish(s, sums)}


@control(FP4_LINEAR, LINEAR, family="form", oracle="stride", fault="the output is a transposed view", returns=True)
def transposed_view(s: Setting) -> Mapping[str, Any]:
    y = linear(s)
    return {"y": y.T.contiguous().T if s.wrong else y}


@control(
    BY_NAME["attention"],
    {"hq": 2, "hk": 1, "sq": 8, "sk": 8, "d": 16},
    family="form",
    oracle="produces",
    fault="lse is not given, and not declared",
    declares_wrongly={"produces": ("out",)},
)
def missing_lse(s: Setting) -> Mapping[str, Any]:
    from vbench.controls.softmax import honest

    right = honest(s)
    return {"out": right["out"]} if s.wrong else right


@control(
    FP4_LINEAR,
    LINEAR,
    family="form",
    oracle="nonfinite",
    fault="one element is NaN, which every comparison by < or > lets through",
)
def nan_wildcard(s: Setting) -> Mapping[str, Any]:
    y = linear(s)
    if s.wrong:
        y[3, 5] = torch.nan
    return {"y": y}


@control(FP4_LINEAR, LINEAR, family="form", oracle="nonfinite", fault="one element is infinite")
def infinite_element(s: Setting) -> Mapping[str, Any]:
    y = linear(s)
    if s.wrong:
        y[0, 0] = torch.inf
    return {"y": y}


# -- deception ---------------------------------------------------------------------------------------------------------


@control(
    LAX_LINEAR,
    {"lax": 1, "m": 8, "n": 32, "k": 128},
    twin_cases=({"lax": 0, "m": 8, "n": 32, "k": 128},),
    family="constant",
    oracle="battery",
    fault="zeros, under a tolerance as wide as the output",
    imitates="ScalingIntelligence/KernelBench#165",
)
def zeros_under_lax_tolerance(s: Setting) -> Mapping[str, Any]:
    x, w = s.inputs["x"], s.inputs["w"]
    return {"y": torch.zeros(len(x), len(w)) if s.wrong else x @ w.T}


@control(FP4_LINEAR, LINEAR, family="constant", oracle="value", fault="the right mean everywhere")
def constant_output(s: Setting) -> Mapping[str, Any]:
    y = linear(s)
    return {"y": y.float().mean().to(y.dtype).expand_as(y) if s.wrong else y}


@control(
    FP4_LINEAR,
    LINEAR,
    family="deception",
    oracle="patched",
    fault="the clock is replaced by one that stands still",
    imitates="gpu-mode/reference-kernels#162",
    kind="time",
)
def patched_timer(s: Setting) -> None:
    s.out["y"].copy_(linear(s))
    if s.wrong:
        started = time.monotonic_ns()
        vars(timing)["perf_counter"] = lambda: (time.monotonic_ns() - started) * 1e-15


@control(
    FP4_LINEAR,
    LINEAR,
    family="deception",
    oracle="patched",
    fault="torch.isfinite is replaced by one that finds everything finite",
)
def patched_comparison(s: Setting) -> Mapping[str, Any]:
    y = linear(s)
    if s.wrong:
        vars(torch)["isfinite"] = lambda t: torch.ones_like(t, dtype=torch.bool)
    return {"y": y}


# -- inputs ------------------------------------------------------------------------------------------------------------


@control(
    FP4_LINEAR,
    LINEAR,
    family="mutation",
    oracle="inputs_unchanged",
    fault="x serves as scratch once its last value was read",
    imitates="ScalingIntelligence/KernelBench#82",
)
def scratch_in_input(s: Setting) -> Mapping[str, Any]:
    x = s.inputs["x"]
    y = linear(s)
    scratch = x if s.wrong else x.clone()
    scratch[:, 0] = 0.0
    return {"y": y}


@control(
    FP4_LINEAR,
    LINEAR,
    family="mutation",
    oracle="inputs_unchanged",
    fault="zero codes of either sign are made one in place: the values stay what they were",
)
def codes_made_canonical(s: Setting) -> Mapping[str, Any]:
    codes = s.inputs["codes"] if s.wrong else s.inputs["codes"].clone()
    codes.copy_(torch.where(codes & 15 == 8, codes & 0xF0, codes))
    return {"y": linear(s)}


# -- determinism -------------------------------------------------------------------------------------------------------


def _last_bit(y: Tensor) -> Tensor:
    """bf16 with its last bit flipped in the first row."""
    raw = y.contiguous().view(torch.int16).clone()
    raw[0] ^= 1
    return raw.view(torch.bfloat16)


@control(
    FP4_LINEAR,
    LINEAR | {"x": "fp32"},
    family="determinism",
    oracle="rerun_bitwise",
    fault="split K is summed in an order that changes from launch to launch, and declared deterministic",
)
def changing_order(s: Setting) -> Mapping[str, Any]:
    x, w = s.inputs["x"], weight32(s)
    parts = [x[:, k : k + 16] @ w[:, k : k + 16].T for k in range(0, x.shape[1], 16)]
    if s.wrong and s.calls % 2 == 0:
        parts.reverse()
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return {"y": total}


@control(
    FP4_LINEAR,
    LINEAR | {"x": "fp32"},
    family="determinism",
    oracle="batch_invariance",
    fault="K is split by the number of tokens, and batch invariance declared",
    declares={"batch_invariant": True},
)
def split_by_tokens(s: Setting) -> Mapping[str, Any]:
    x, w = s.inputs["x"].float(), weight32(s)
    step = 128 // (len(x) if s.wrong else 4)
    total = torch.zeros(len(x), len(w))
    for k in range(0, x.shape[1], step):
        # One row at a time: what torch does for many rows depends on how many they are.
        total = total + torch.stack([(row[k : k + step] * w[:, k : k + step]).sum(-1) for row in x])
    return {"y": total}


# -- faults ------------------------------------------------------------------------------------------------------------


@control(
    FP4_LINEAR,
    *({**LINEAR, "m": m} for m in (1, 2, 3, 5, 7, 8, 13, 16, 17)),
    family="death",
    oracle="isolation",
    fault="an illegal access at one shape of many",
)
def illegal_access(s: Setting) -> Mapping[str, Any]:
    if s.wrong and s.case.axis("m") == 13:
        ctypes.string_at(0)
    return {"y": linear(s)}


@control(FP4_LINEAR, LINEAR, family="death", oracle="isolation", fault="it never ends", deadline_s=10.0)
def endless(s: Setting) -> Mapping[str, Any]:
    while s.wrong:
        time.sleep(0.1)
    return {"y": linear(s)}


@control(FP4_LINEAR, LINEAR, family="death", oracle="isolation", fault="it ends the process with success")
def exits(s: Setting) -> Mapping[str, Any]:
    if s.wrong:
        os._exit(0)
    return {"y": linear(s)}


@control(
    FP4_LINEAR,
    LINEAR,
    family="death",
    oracle="isolation",
    fault="a bug whose message says 'unsupported', to be skipped by whoever reads messages",
    raises=("RuntimeError",),
)
def eloquent_bug(s: Setting) -> Mapping[str, Any]:
    if s.wrong:
        raise RuntimeError("unsupported: invalid configuration, skipping")
    return {"y": linear(s)}


@control(
    FP4_LINEAR,
    LINEAR,
    family="death",
    oracle="isolation",
    fault="a forged answer is printed and the process ended",
)
def forged_answer(s: Setting) -> Mapping[str, Any]:
    if s.wrong:
        os.write(1, b'{"outcome": "PASSED", "reason": "", "detail": ""}\n')
        os._exit(0)
    return {"y": linear(s)}


make = control.factory({**BY_NAME, LAX_LINEAR.name: LAX_LINEAR})
CORPUS = Corpus(
    "controls_conduct",
    "kernels that deceive, remember, overstep or die",
    control.controls,
    "vbench.controls.conduct:make",
    (LAX_LINEAR,),
)
