"""Our attention under ``torch.nn.functional.scaled_dot_product_attention``, where its flash backend would run.

    register()                                             # once, makes "vbench" known; changes nothing yet
    torch.nn.attention.activate_flash_attention_impl("vbench")
    ...
    torch.nn.attention.restore_flash_attention_impl()

or ``with installed(): ...``. torch's registry (``torch.nn.attention.register_flash_attention_impl``, torch 2.11 and
later) replaces kernels of the dispatcher for the whole process: ``active()`` says what stands there, for a record of a
result. Which backend SDPA takes is still torch's choice; force it with ``sdpa_kernel(SDPBackend.FLASH_ATTENTION)``.
What SDPA may ask and we do not take (dropout, another scale) is refused with ``Unsupported``, never handed back. The
plain kernels are used, which take every shape.

On a CPU the same kernels run interpreted, for a test, through torch's CPU flash operator.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from vbench.errors import Unsupported
from vbench.kernels.triton.attention_autograd import _of as kernel_of

NAME = "vbench"
aten: Any = torch.ops.aten


def available() -> bool:
    """Does this torch have the registry, all of it that is needed here?"""
    names = ("register", "activate", "restore", "current")
    return all(hasattr(torch.nn.attention, f"{name}_flash_attention_impl") for name in names)


def _need() -> None:
    if not available():
        raise Unsupported("no_flash_registry", f"torch {torch.__version__} has no flash registry; take 2.11 or later")


def active() -> str | None:
    """The implementation that stands under SDPA's flash backend in this process; ``None`` for torch's own.

    Raises:
        Unsupported: ``no_flash_registry``.
    """
    _need()
    from torch.nn.attention import current_flash_attention_impl

    return current_flash_attention_impl()


def _check(q: Tensor, dropout_p: float, scale: float | None, return_debug_mask: bool = False) -> None:
    """Refuse what the kernels do not compute.

    Raises:
        Unsupported: ``dropout``, ``debug_mask``, ``scale``.
    """
    if dropout_p:
        raise Unsupported("dropout", f"dropout_p={dropout_p}: this attention drops nothing; pass 0")
    if return_debug_mask:
        raise Unsupported("debug_mask", "return_debug_mask=True: there is no dropout mask to return; pass False")
    usual = q.shape[-1] ** -0.5
    if scale is not None and abs(scale - usual) > 1e-12 * usual:
        raise Unsupported("scale", f"scale={scale}: only 1/sqrt(d) = {usual}; scale q instead")


def _causal(is_causal: bool) -> str:
    """SDPA documents ``is_causal`` as aligned top left."""
    return "top_left" if is_causal else "none"


def _run_forward(query: Tensor, key: Tensor, value: Tensor, is_causal: bool) -> tuple[Tensor, Tensor]:
    """out in the memory order of query, as torch's fake kernel promises to a compiler; lse float32, contiguous."""
    out, lse = torch.empty_like(query), query.new_empty(query.shape[:3], dtype=torch.float32)
    kernel = kernel_of("attention", "", query, key, _causal(is_causal), 0, 0)
    kernel.bind({"q": query, "k": key, "v": value}, {"out": out, "lse": lse})()
    return out, lse


def _run_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    is_causal: bool,
    into: tuple[Tensor, ...],
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients, written into ``into``: the memory order that torch's fake kernel promises differs by device."""
    kernel = kernel_of("attention_backward", "", query, key, _causal(is_causal), 0, 0)
    inputs = {"q": query, "k": key, "v": value, "out": out, "lse": logsumexp, "dout": grad_out}
    dq, dk, dv = into
    kernel.bind(inputs, {"dq": dq, "dk": dk, "dv": dv})()
    return dq, dk, dv


def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    return_debug_mask: bool = False,
    *,
    scale: float | None = None,
) -> tuple[Any, ...]:
    """``aten::_scaled_dot_product_flash_attention``. lse float32 [b, hq, sq], natural logarithm, as flash's."""
    _check(query, dropout_p, scale, return_debug_mask)
    out, lse = _run_forward(query, key, value, is_causal)
    # No sequences; nothing is random, and the random state's tensors have the shapes that torch's own have.
    seed, offset = (torch.empty(shape, dtype=torch.uint64, device=query.device) for shape in ((2,), ()))
    return out, lse, None, None, query.shape[2], key.shape[2], seed, offset, query.new_empty(0)


def _backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    cum_seq_q: Tensor,
    cum_seq_k: Tensor,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    philox_seed: Tensor,
    philox_offset: Tensor,
    *,
    scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """``aten::_scaled_dot_product_flash_attention_backward``."""
    _check(query, dropout_p, scale)
    like = (torch.empty_like(query), torch.empty_like(key), torch.empty_like(value))
    return _run_backward(grad_out, query, key, value, out, logsumexp, is_causal, like)


def _cpu_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """``aten::_scaled_dot_product_flash_attention_for_cpu``."""
    _check(query, dropout_p, scale)
    _no_mask(attn_mask)
    return _run_forward(query, key, value, is_causal)


def _cpu_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    dropout_p: float,
    is_causal: bool,
    *,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """``aten::_scaled_dot_product_flash_attention_for_cpu_backward``."""
    _check(query, dropout_p, scale)
    _no_mask(attn_mask)
    like = tuple(torch.empty_permuted(t.shape, (0, 2, 1, 3), dtype=t.dtype) for t in (query, key, value))
    return _run_backward(grad_out, query, key, value, out, logsumexp, is_causal, like)


def _no_mask(attn_mask: Tensor | None) -> None:
    if attn_mask is not None:
        raise Unsupported("mask", "attn_mask: take vbench's extended attention for additive masks")


class _Handle:
    """What torch's registry keeps, and asks to ``remove`` what was registered."""

    def __init__(self, *libraries: torch.library.Library) -> None:
        self.libraries: tuple[torch.library.Library, ...] = libraries

    def remove(self) -> None:
        for library in self.libraries:
            library._destroy()
        self.libraries = ()


def _install() -> _Handle:
    """Called by torch at activation."""
    cuda, cpu = (torch.library.Library("aten", "IMPL", place) for place in ("CUDA", "CPU"))
    with warnings.catch_warnings():
        # torch warns, once a process, that a kernel was overridden: that is what was asked for.
        warnings.filterwarnings("ignore", "Warning only once for all operators", UserWarning)
        if torch.version.cuda is not None:
            cuda.impl("_scaled_dot_product_flash_attention", _forward, allow_override=True)
            cuda.impl("_scaled_dot_product_flash_attention_backward", _backward, allow_override=True)
        cpu.impl("_scaled_dot_product_flash_attention_for_cpu", _cpu_forward, allow_override=True)
        cpu.impl("_scaled_dot_product_flash_attention_for_cpu_backward", _cpu_backward, allow_override=True)
    return _Handle(cuda, cpu)


def register() -> None:
    """Make the name ``vbench`` known to ``torch.nn.attention.activate_flash_attention_impl``.

    Raises:
        Unsupported: ``no_flash_registry``.
    """
    _need()
    from torch.nn.attention import register_flash_attention_impl

    register_flash_attention_impl(NAME, register_fn=_install)


@contextmanager
def installed() -> Iterator[None]:
    """Our attention under SDPA inside the block; what stood there before, after it.

    Raises:
        Unsupported: ``no_flash_registry``.
    """
    register()
    from torch.nn.attention import activate_flash_attention_impl, restore_flash_attention_impl

    before = active()
    activate_flash_attention_impl(NAME)
    try:
        yield
    finally:
        restore_flash_attention_impl()
        if before is not None:
            activate_flash_attention_impl(before)
