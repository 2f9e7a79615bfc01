"""Peers of the attention ops: FlashAttention-3 and -4, called by their Python interfaces.

They want [b, s, h, d], packed sequences [s, h, d]; the op's [b, h, s, d] is handed over as a view, whatever its strides
(only the last must be 1). The backward is called by the function under their autograd, on the given ``out`` and
``lse``, both of which have the meaning they give them (natural logarithm, fp32 [b, hq, sq], sinks included).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from vbench.backend import Device, Kernel, Launch
from vbench.errors import Unsupported
from vbench.kernels.peers.flash_rules import Plan, numerics, plan
from vbench.spec import Case, Numerics


@dataclass(frozen=True, slots=True)
class Packing:
    """Sequences end to end: bounds int32 [n + 1], longest lengths in rows."""

    cu_q: Tensor
    cu_k: Tensor
    longest_q: int
    longest_k: int


class Package(Protocol):
    """One FlashAttention. Tensors as it wants them; each method gives a launch."""

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, how: Plan, packing: Packing | None, sink: Tensor | None
    ) -> Callable[[], tuple[Tensor, Tensor]]:
        """(out, lse)."""
        ...

    def backward(
        self,
        tensors: Mapping[str, Tensor],
        how: Plan,
        packing: Packing | None,
        sink: Tensor | None,
    ) -> Callable[[], tuple[Tensor, ...]]:
        """(dq, dk, dv), and dsink where there is a sink, from q, k, v, out, dout, lse and perhaps dlse."""
        ...


def _function(module: Any, name: str, arguments: Mapping[str, Any]) -> Callable[..., Any]:
    """``module.name``.

    Raises:
        Unsupported: ``interface_differs``: another release, whose function is missing or lacks an argument.
    """
    found = getattr(module, name, None)
    taken = inspect.signature(found).parameters if callable(found) else {}
    missing = [argument for argument in arguments if argument not in taken]
    if not callable(found) or missing:
        detail = f"{module.__name__}.{name} takes no {', '.join(missing) or 'call'}; install the release named in docs"
        raise Unsupported("interface_differs", detail)
    result: Callable[..., Any] = found
    return result


class Flash4:
    """``flash_attn.cute``; an unbounded side of a window is ``None``."""

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, how: Plan, packing: Packing | None, sink: Tensor | None
    ) -> Callable[[], tuple[Tensor, Tensor]]:
        """See ``Package.forward``."""
        import flash_attn.cute

        named = {
            "softmax_scale": how.scale,
            "causal": how.causal,
            "window_size": (how.left, how.right),
            "learnable_sink": sink,
            "softcap": how.softcap,
            "return_lse": True,
            **self._lengths(packing),
        }
        name = "flash_attn_varlen_func" if packing else "flash_attn_func"
        call = _function(flash_attn.cute, name, named)
        return lambda: call(q, k, v, **named)

    def backward(
        self, tensors: Mapping[str, Tensor], how: Plan, packing: Packing | None, sink: Tensor | None
    ) -> Callable[[], tuple[Tensor, ...]]:
        """See ``Package.backward``."""
        import flash_attn.cute.interface

        named = {
            **tensors,
            "softmax_scale": how.scale,
            "causal": how.causal,
            "softcap": how.softcap,
            "window_size_left": how.left,
            "window_size_right": how.right,
            "deterministic": how.deterministic,
            "learnable_sink": sink,
            **self._lengths(packing),
        }
        call = _function(flash_attn.cute.interface, "_flash_attn_bwd", named)
        return lambda: call(**named)

    @staticmethod
    def _lengths(packing: Packing | None) -> dict[str, Any]:
        if packing is None:
            return {}
        return {
            "cu_seqlens_q": packing.cu_q,
            "cu_seqlens_k": packing.cu_k,
            "max_seqlen_q": packing.longest_q,
            "max_seqlen_k": packing.longest_k,
        }


class Flash3:
    """``flash_attn_interface``; an unbounded side of a window is -1. It knows no sinks."""

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, how: Plan, packing: Packing | None, sink: Tensor | None
    ) -> Callable[[], tuple[Tensor, Tensor]]:
        """See ``Package.forward``."""
        import flash_attn_interface

        named = {
            "softmax_scale": how.scale,
            "causal": how.causal,
            "window_size": self._window(how),
            "softcap": how.softcap,
            "return_attn_probs": True,
            **Flash4._lengths(packing),
        }
        name = "flash_attn_varlen_func" if packing else "flash_attn_func"
        call = _function(flash_attn_interface, name, named)
        return lambda: call(q, k, v, **named)

    def backward(
        self, tensors: Mapping[str, Tensor], how: Plan, packing: Packing | None, sink: Tensor | None
    ) -> Callable[[], tuple[Tensor, ...]]:
        """See ``Package.backward``."""
        import flash_attn_interface

        q, k, v = (tensors[name] for name in "qkv")
        left, right = self._window(how)
        named = {
            **{name: tensors[name] for name in ("q", "k", "v", "out", "dout")},
            "softmax_lse": tensors["lse"],
            "softmax_scale": how.scale,
            "is_causal": how.causal,
            "softcap": how.softcap,
            "window_size_left": left,
            "window_size_right": right,
            "deterministic": how.deterministic,
            **Flash4._lengths(packing),
        }
        call = _function(flash_attn_interface, "_flash_attn_backward", {**named, "dq": None, "dk": None, "dv": None})

        def launch() -> tuple[Tensor, ...]:
            # It fills tensors that it is given.
            dq, dk, dv = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v))
            call(**named, dq=dq, dk=dk, dv=dv)
            return dq, dk, dv

        return launch

    @staticmethod
    def _window(how: Plan) -> tuple[int, int]:
        return (-1 if how.left is None else how.left, -1 if how.right is None else how.right)


def _packing(inputs: Mapping[str, Any]) -> Packing | None:
    if "cu_q" not in inputs:
        return None
    cu_q, cu_k = inputs["cu_q"], inputs["cu_k"]
    return Packing(cu_q, cu_k, int(cu_q.diff().max()), int(cu_k.diff().max()))


def _theirs(t_BHSD: Tensor, packed: bool) -> Tensor:
    """[b, h, s, d] -> [b, s, h, d], or [s, h, d] of a batch of 1."""
    t_BSHD = t_BHSD.transpose(1, 2)
    return t_BSHD[0] if packed else t_BSHD


def _ours(t: Tensor, packed: bool) -> Tensor:
    """The inverse of ``_theirs``."""
    return (t[None] if packed else t).transpose(1, 2)


@dataclass(slots=True)
class Forward:
    """``attention`` and ``attention_extended`` by one package."""

    package: Package
    how: Plan
    numerics: Numerics
    produces: tuple[str, ...] = ("out", "lse")
    deterministic: bool = True

    def bind(self, inputs: Mapping[str, Any], out: Mapping[str, Any]) -> Launch:
        """See ``vbench.backend.Kernel.bind``. Raises Unsupported: ``interface_differs``."""
        packing = _packing(inputs)
        packed = packing is not None
        q, k, v = (_theirs(inputs[name], packed) for name in "qkv")
        call = self.package.forward(q, k, v, self.how, packing, inputs.get("sink"))

        def launch() -> Mapping[str, Tensor]:
            result, lse = call()
            # Packed, lse is [hq, s].
            return {"out": _ours(result, packed), "lse": lse[None] if packed else lse}

        return launch


@dataclass(slots=True)
class Backward:
    """``attention_backward`` and ``attention_extended_backward`` by one package."""

    package: Package
    how: Plan
    numerics: Numerics
    produces: tuple[str, ...]

    @property
    def deterministic(self) -> bool:
        return self.how.deterministic

    def bind(self, inputs: Mapping[str, Any], out: Mapping[str, Any]) -> Launch:
        """See ``vbench.backend.Kernel.bind``. Raises Unsupported: ``interface_differs``."""
        packing = _packing(inputs)
        packed = packing is not None
        tensors = {name: _theirs(inputs[name], packed) for name in ("q", "k", "v", "out", "dout")}
        for name in ("lse", "dlse"):
            if name in inputs:
                tensors[name] = inputs[name][0] if packed else inputs[name]
        call = self.package.backward(tensors, self.how, packing, inputs.get("sink"))

        def launch() -> Mapping[str, Tensor]:
            found = call()
            given = {name: _ours(t, packed) for name, t in zip(("dq", "dk", "dv"), found, strict=False)}
            return given | dict(zip(("dsink",), found[3:], strict=False))

        return launch


def _produces(case: Case) -> tuple[str, ...]:
    return ("dq", "dk", "dv", "dsink") if dict(case.params).get("sinks") else ("dq", "dk", "dv")


def make_4(case: Case, variant: str, device: Device) -> Kernel:
    """``attention`` and ``attention_extended`` by FlashAttention-4. Raises Unsupported: see ``flash_rules.plan``."""
    return Forward(Flash4(), plan(case, variant, device, sinks=True, dlse=True), numerics(case))


def make_4_backward(case: Case, variant: str, device: Device) -> Kernel:
    """Their backwards. Raises Unsupported: see ``flash_rules.plan``."""
    return Backward(Flash4(), plan(case, variant, device, sinks=True, dlse=True), numerics(case), _produces(case))


def make_3(case: Case, variant: str, device: Device) -> Kernel:
    """``attention`` and ``attention_extended`` by FlashAttention-3. Raises Unsupported: see ``flash_rules.plan``."""
    return Forward(Flash3(), plan(case, variant, device, sinks=False, dlse=False), numerics(case))


def make_3_backward(case: Case, variant: str, device: Device) -> Kernel:
    """Their backwards. Raises Unsupported: see ``flash_rules.plan``."""
    return Backward(Flash3(), plan(case, variant, device, sinks=False, dlse=False), numerics(case), _produces(case))
