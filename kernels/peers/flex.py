"""Peers of the attention ops: FlexAttention, compiled for each case in ``bind``'s first launch.

``fullgraph``: a case that torch cannot compile is an error, never the unfused formula. On a CPU torch compiles the
forward alone, and without the log-sum-exp ("only supports inference and return_lse is not supported yet",
torch/_inductor/kernel/flex/flex_cpu.py of torch 2.13). The backward goes through autograd on a graph kept from
``bind``: torch has no operator of its own that could be called.
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
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, create_block_mask, flex_attention

from vbench.backend import Device, Kernel, Launch, refuse_beyond
from vbench.errors import Unsupported
from vbench.kernels.peers.flex_attention import OPTIONS
from vbench.kernels.peers.flex_rules import rules
from vbench.spec import Case, Numerics

PARAMETERS = (
    *("dtype", "causal", "dist", "layout", "dlse", "window", "softcap", "b", "hq", "hk", "sq", "sk", "d"),
    *("alibi", "sinks", "mask", "maskdims", "packed"),
)
#: Each shape is a compilation of seconds: query-key pairs of all heads below which a case is not worth one.
MIN_PAIRS = 1 << 13
#: Distinct cases a process may compile; beyond its default of 8 torch would refuse.
RECOMPILE_LIMIT = 1024
#: Where max-autotune is tried (it times some ten tiles a case): the papers' sweep at this length, four cells.
AUTOTUNED_LENGTH, AUTOTUNED_HIDDEN, AUTOTUNED_TOKENS = 4096, 2048, 16384
#: Cases with more pairs are timed, and each variant of one is compiled: there ``default`` stands beside ``tma`` at
#: ``AUTOTUNED_LENGTH`` alone, so that a run does not compile for minutes what nobody who wants speed asks for.
MAX_PAIRS_OF_DEFAULT = 1 << 26
#: tl.dot's least inner size; torch/_inductor/kernel/flex/flex_attention.py refuses less.
MIN_HEAD_DIM = 16
#: What a tensor descriptor asks of addresses and strides (CUDA driver API, cuTensorMapEncodeTiled).
TMA_BYTES = 16

Attend = Callable[..., tuple[Tensor, Any]]


def _attend(
    q: Tensor, k: Tensor, v: Tensor, score: Any, block_mask: Any, grouped: bool, options: Any, aux: Any
) -> tuple[Tensor, Any]:
    found = flex_attention(
        q, k, v, score_mod=score, block_mask=block_mask, enable_gqa=grouped, kernel_options=options, return_aux=aux
    )
    return found if aux is not None else (found, None)


@functools.cache
def compiled(mode: str | None) -> Attend:
    """``_attend`` under ``torch.compile``; the same object for the same mode."""
    import torch._dynamo
    import torch._functorch.config

    for name in ("recompile_limit", "accumulated_recompile_limit"):
        setattr(torch._dynamo.config, name, max(getattr(torch._dynamo.config, name), RECOMPILE_LIMIT))
    # The graph of a backward is kept and launched again, so that its saved tensors may not be overwritten.
    torch._functorch.config.donated_buffer = False
    result: Attend = torch.compile(_attend, fullgraph=True, dynamic=False, mode=mode)
    return result


@dataclass(slots=True)
class _Call:
    """The forward. ``variant``: a key of ``OPTIONS``."""

    case: Case
    variant: str
    device: Device
    numerics: Numerics

    def prepare(self, inputs: Mapping[str, Any], leaves: tuple[Tensor, Tensor, Tensor], lse: bool) -> Any:
        """A function that gives (out, lse or None).

        Raises:
            Unsupported: ``needs_sm_90``, ``no_tma_layout``: torch would quietly go without TMA.
        """
        q, k, v = leaves
        if OPTIONS[self.variant].get("USE_TMA"):
            if q.is_cuda and torch.cuda.get_device_capability(q.device) < (9, 0):
                raise Unsupported("needs_sm_90", "tma needs compute capability 9.0 or later; take default")
            for name, t in zip("qkv", leaves, strict=True):
                if t.data_ptr() % TMA_BYTES or any(n * t.itemsize % TMA_BYTES for n in (t.shape[3], *t.stride()[:-1])):
                    detail = f"{name}, d={t.shape[3]}, strides {t.stride()}: TMA takes multiples of {TMA_BYTES} bytes"
                    raise Unsupported("no_tma_layout", detail)
        if self.device == "cuda":
            torch.set_float32_matmul_precision("highest")
        rule = rules(self.case, inputs)
        block_mask: BlockMask | None = None
        if rule.seen is not None:
            # The same for every batch element and head.
            block_mask = create_block_mask(rule.seen, None, None, q.shape[2], k.shape[2], device=q.device)
        attend = compiled("max-autotune-no-cudagraphs" if self.variant == "max_autotune" else None)
        options = dict(OPTIONS[self.variant]) or None
        aux = AuxRequest(lse=True) if lse else None
        grouped = q.shape[1] != k.shape[1]
        return lambda: attend(q, k, v, rule.score, block_mask, grouped, options, aux)


@dataclass(slots=True)
class Flex(_Call):
    """``attention`` and ``attention_extended``."""

    produces: tuple[str, ...]
    deterministic: bool = True

    def bind(self, inputs: Mapping[str, Any], out: Mapping[str, Any]) -> Launch:
        """See ``_Call.prepare``; the first launch compiles."""
        forward = self.prepare(inputs, (inputs["q"], inputs["k"], inputs["v"]), "lse" in self.produces)

        def launch() -> Mapping[str, Tensor]:
            with torch.no_grad():
                result, aux = forward()
            return {"out": result} if aux is None else {"out": result, "lse": aux.lse}

        return launch


@dataclass(slots=True)
class FlexBackward(_Call):
    """``attention_backward`` and ``attention_extended_backward`` by autograd."""

    produces: tuple[str, ...] = ("dq", "dk", "dv")
    # Each gradient has one writer (torch/_inductor/kernel/flex/templates/flex_backwards.py.jinja); atomics serve
    # gradients of captured tensors, which are not wanted here.
    deterministic: bool = True
    # The engine launches on the stream the forward ran on, which is not the one being captured.
    graph_safe: bool = False

    def bind(self, inputs: Mapping[str, Any], out: Mapping[str, Any]) -> Launch:
        """Run the forward, and bind the gradients of its outputs. See ``_Call.prepare``."""
        q, k, v = (inputs[name].detach().requires_grad_() for name in "qkv")
        dlse = inputs.get("dlse")
        with torch.enable_grad():
            result, aux = self.prepare(inputs, (q, k, v), dlse is not None)()
        results, given = ((result,), (inputs["dout"],)) if aux is None else ((result, aux.lse), (inputs["dout"], dlse))

        def launch() -> Mapping[str, Tensor]:
            found = torch.autograd.grad(results, (q, k, v), given, retain_graph=True)
            return dict(zip(("dq", "dk", "dv"), found, strict=True))

        return launch


def _autotuned(case: Case) -> bool:
    """Whether this is one of the cells of max-autotune."""
    b, hq, hk, sq, sk, d = (case.axis(name) for name in ("b", "hq", "hk", "sq", "sk", "d"))
    papers = hq == hk and hq * d == AUTOTUNED_HIDDEN and b * sq == AUTOTUNED_TOKENS
    return papers and sq == sk == AUTOTUNED_LENGTH and d in (64, 128)


def _check(case: Case, variant: str, device: Device) -> None:
    refuse_beyond(case, PARAMETERS)
    if variant not in OPTIONS:
        raise Unsupported("unknown_variant", f"{variant!r} is not one of {', '.join(OPTIONS)}")
    if variant != "default" and device == "cpu":
        raise Unsupported("needs_cuda", f"{variant} is for the kernels of CUDA devices; take default")
    if variant == "max_autotune" and not _autotuned(case):
        detail = f"max-autotune is tried at {AUTOTUNED_TOKENS} tokens, length {AUTOTUNED_LENGTH}; take default or tma"
        raise Unsupported("not_autotuned", detail)
    parameters = dict(case.params)
    if parameters.get("sinks"):
        raise Unsupported("no_sinks", "sinks=1: flex_attention takes no sink")
    if device == "cuda" and case.axis("d") < MIN_HEAD_DIM:
        raise Unsupported("head_dim_below_16", f"d={case.axis('d')}: torch compiles heads of {MIN_HEAD_DIM} and more")
    pairs = case.axis("b") * case.axis("hq") * case.axis("sq") * case.axis("sk")
    if pairs < MIN_PAIRS:
        raise Unsupported("too_small_to_compile", f"{pairs} pairs; a compilation of seconds pays from {MIN_PAIRS}")
    plain = case.op in ("attention", "attention_backward")
    if device == "cuda" and variant == "default" and plain and pairs > MAX_PAIRS_OF_DEFAULT and not _autotuned(case):
        raise Unsupported("shown_with_tma", f"{pairs} pairs: timed with TMA; take tma, or length {AUTOTUNED_LENGTH}")
    if not any(map(shutil.which, filter(None, (os.environ.get("CC"), "gcc", "clang", "cc")))):
        raise Unsupported("needs_compiler", "torch.compile needs a C compiler; install gcc or set CC")


def _numerics(case: Case, device: Device, *, backward: bool) -> Numerics:
    """Scores, exponentials and sums in float32, weights rounded to the tensors' dtype before they are multiplied.

    float32 tensors are multiplied as such (``set_float32_matmul_precision("highest")``).
    """
    dtype = case.text("dtype")
    accumulate = "tensor_core" if device == "cuda" and dtype != "fp32" else "fp32"
    return Numerics(accumulate, probabilities=dtype, own_forward=backward)


def make(case: Case, variant: str, device: Device) -> Kernel:
    """Of ``attention`` and ``attention_extended``.

    Raises:
        Unsupported: ``parameter_not_taken``; ``unknown_variant``; ``needs_cuda``; ``not_autotuned``; ``no_sinks``;
            ``head_dim_below_16``; ``too_small_to_compile``; ``shown_with_tma``; ``needs_compiler``.
    """
    _check(case, variant, device)
    produces = ("out", "lse") if device == "cuda" else ("out",)
    return Flex(case, variant, device, _numerics(case, device, backward=False), produces)


def make_backward(case: Case, variant: str, device: Device) -> Kernel:
    """Of the two backward ops.

    Raises:
        Unsupported: as ``make``; ``no_backward_on_cpu``.
    """
    if device == "cpu":
        raise Unsupported("no_backward_on_cpu", "torch's flex_attention has no backward on a CPU; run on CUDA")
    _check(case, variant, device)
    return FlexBackward(case, variant, device, _numerics(case, device, backward=True))
