"""Stand-ins for the modules of FlashAttention-3 and -4: their signatures and layouts, computed densely in float32.

Names, order and defaults of the parameters, and what is asserted of the tensors, are those of
hopper/flash_attn_interface.py and flash_attn/cute/interface.py (4.0.0b36) of Dao-AILab/flash-attention, as far as a
caller of dense and packed attention meets them. The backward reads the ``out`` and ``lse`` it is given.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from itertools import pairwise
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

Side = int | None


def scores(q_SHD: Tensor, k_SHD: Tensor, scale: float, causal: bool, left: Side, right: Side, cap: float) -> Any:
    """(z, dz/d(scaled product)), both [h, sq, sk]; z is -inf where nothing is seen."""
    (sq, hq, _), (sk, hk, _) = q_SHD.shape, k_SHD.shape
    keys = k_SHD.float().repeat_interleave(hq // hk, 1)
    z = torch.einsum("ihd,jhd->hij", q_SHD.float(), keys) * scale
    slope = torch.ones_like(z)
    if cap:
        z = cap * torch.tanh(z / cap)
        slope = 1 - (z / cap) ** 2
    apart = torch.arange(sk)[None, :] - torch.arange(sq)[:, None] - (sk - sq)
    seen = torch.ones(sq, sk, dtype=torch.bool)
    if causal:
        seen &= apart <= 0
    if left is not None:
        seen &= apart >= -left
    if right is not None:
        seen &= apart <= right
    return z.masked_fill(~seen, -torch.inf), slope


def one_forward(q: Tensor, k: Tensor, v: Tensor, sink: Tensor | None, **how: Any) -> tuple[Tensor, Tensor]:
    """(out [sq, h, d], lse [h, sq]) of one sequence."""
    z, _ = scores(q, k, **how)
    lse = torch.logsumexp(z, 2)
    if sink is not None:
        lse = torch.logaddexp(lse, sink[:, None])
    weights = torch.exp(z - lse.masked_fill(lse == -torch.inf, 0.0)[..., None])
    values = v.float().repeat_interleave(q.shape[1] // v.shape[1], 1)
    return torch.einsum("hij,jhd->ihd", weights, values).to(q.dtype), lse


def one_backward(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, dout: Tensor, lse: Tensor, dlse: Tensor | None, **how: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dq, dk, dv, rowsum(out dout) - dlse [h, sq]) of one sequence."""
    z, slope = scores(q, k, **how)
    group = q.shape[1] // k.shape[1]
    keys, values = (t.float().repeat_interleave(group, 1) for t in (k, v))
    p = torch.exp(z - lse.masked_fill(lse == -torch.inf, 0.0)[..., None])
    delta = torch.einsum("ihd,ihd->hi", out.float(), dout.float())
    delta = delta if dlse is None else delta - dlse
    ds = p * (torch.einsum("ihd,jhd->hij", dout.float(), values) - delta[..., None]) * slope * how["scale"]
    dq = torch.einsum("hij,jhd->ihd", ds, keys)
    dk = torch.einsum("hij,ihd->jhd", ds, q.float())
    dv = torch.einsum("hij,ihd->jhd", p, dout.float())
    dk, dv = (t.reshape(*k.shape[:2], group, k.shape[2]).sum(2) for t in (dk, dv))
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), delta


def validate(q: Tensor, k: Tensor, v: Tensor, cu_q: Any, cu_k: Any, longest_q: Any, longest_k: Any) -> None:
    """What the packages assert of their tensors."""
    for t in (q, k, v):
        assert t.dtype in (torch.float16, torch.bfloat16) and t.dtype == q.dtype
        assert t.stride(-1) == 1 and t.dim() == (4 if cu_q is None else 3)
        assert t.shape[-1] == q.shape[-1] and t.shape[-1] % 8 == 0
    assert k.shape == v.shape and q.shape[-2] % k.shape[-2] == 0
    if cu_q is None:
        assert cu_k is None and q.shape[0] == k.shape[0]
        return
    for cu, longest, total in ((cu_q, longest_q, q.shape[0]), (cu_k, longest_k, k.shape[0])):
        assert cu.dtype == torch.int32 and cu.is_contiguous()
        assert int(cu[0]) == 0 and int(cu[-1]) == total and isinstance(longest, int)
        assert longest >= int(cu.diff().max())


def sequences(q: Tensor, k: Tensor, cu_q: Any, cu_k: Any) -> list[tuple[Any, Any, Any]]:
    """(index of a sequence's queries, of its keys, of its rows in [.., h, s])."""
    if cu_q is None:
        return [(b, b, b) for b in range(q.shape[0])]
    bounds = zip(pairwise(cu_q.tolist()), pairwise(cu_k.tolist()), strict=True)
    return [(slice(*of_q), slice(*of_k), (slice(None), slice(*of_q))) for of_q, of_k in bounds]


def forward(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Any, cu_k: Any, longest_q: Any, longest_k: Any, sink: Any, **how: Any
) -> tuple[Tensor, Tensor]:
    validate(q, k, v, cu_q, cu_k, longest_q, longest_k)
    assert sink is None or sink.shape == (q.shape[-2],)
    out = torch.empty(q.shape, dtype=q.dtype)
    lse = torch.empty((q.shape[0], q.shape[2], q.shape[1]) if cu_q is None else (q.shape[1], q.shape[0]))
    for i, j, rows in sequences(q, k, cu_q, cu_k):
        out[i], lse[rows] = one_forward(q[i], k[j], v[j], sink, **how)
    return out, lse


def backward(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, dout: Tensor, lse: Tensor, dlse: Any, cu_q: Any, cu_k: Any,
    longest_q: Any, longest_k: Any, **how: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    validate(q, k, v, cu_q, cu_k, longest_q, longest_k)
    assert out.shape == dout.shape == q.shape and out.dtype == dout.dtype == q.dtype
    wanted = (q.shape[0], q.shape[2], q.shape[1]) if cu_q is None else (q.shape[1], q.shape[0])
    for t in (lse,) if dlse is None else (lse, dlse):
        assert t.shape == wanted and t.dtype == torch.float32
    dq, dk, dv = (torch.zeros(t.shape, dtype=t.dtype) for t in (q, k, v))
    delta = torch.zeros(wanted)
    for i, j, rows in sequences(q, k, cu_q, cu_k):
        of_lse = None if dlse is None else dlse[rows]
        dq[i], dk[j], dv[j], delta[rows] = one_backward(
            q[i], k[j], v[j], out[i], dout[i], lse[rows], of_lse, **how
        )  # fmt: skip
    return dq, dk, dv, delta


# --- FlashAttention-4 ------------------------------------------------------------------------------------------------


def four_func(
    q: Any, k: Any, v: Any, qv: Any = None, gather_kv_indices: Any = None, softmax_scale: float | None = None,
    causal: bool = False, window_size: tuple[Side, Side] = (None, None), learnable_sink: Any = None,
    softcap: float = 0.0, num_splits: int = 1, pack_gqa: Any = None, deterministic: bool = False,
    score_mod: Any = None, score_mod_bwd: Any = None, mask_mod: Any = None, aux_tensors: Any = None,
    aux_scalars: Any = None, block_sparse_tensors: Any = None, block_sparse_tensors_bwd: Any = None,
    return_lse: bool = False, gather_bwd_recompute_p: bool = False, gather_bwd_token_chunk: Any = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    assert qv is gather_kv_indices is None
    how = four_how(softmax_scale, causal, window_size, softcap, q)
    out, lse = forward(q, k, v, None, None, None, None, learnable_sink, **how)
    return out, lse if return_lse else None


def four_varlen_func(
    q: Any, k: Any, v: Any, qv: Any = None, cu_seqlens_q: Any = None, cu_seqlens_k: Any = None,
    max_seqlen_q: Any = None, max_seqlen_k: Any = None, min_seqlen_k: Any = None, seqused_q: Any = None,
    seqused_k: Any = None, gather_kv_indices: Any = None, page_table: Any = None, softmax_scale: float | None = None,
    causal: bool = False, window_size: tuple[Side, Side] = (None, None), learnable_sink: Any = None,
    softcap: float = 0.0, num_splits: int = 1, pack_gqa: Any = None, deterministic: bool = False,
    return_lse: bool = False,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    assert qv is seqused_q is seqused_k is page_table is None
    how = four_how(softmax_scale, causal, window_size, softcap, q)
    out, lse = forward(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, learnable_sink, **how)
    return out, lse if return_lse else None


def four_how(scale: float | None, causal: bool, window: Any, softcap: float, q: Tensor) -> dict[str, Any]:
    left, right = window
    if causal:
        right = 0
    return {
        "scale": scale or q.shape[-1] ** -0.5, "causal": causal, "left": left, "right": right, "cap": softcap,
    }  # fmt: skip


def four_bwd(
    q: Any, k: Any, v: Any, out: Any, dout: Any, lse: Any, softmax_scale: float | None = None, causal: bool = False,
    softcap: float = 0.0, window_size_left: Side = None, window_size_right: Side = None, m_block_size: int = 64,
    cu_seqlens_q: Any = None, cu_seqlens_k: Any = None, seqused_q: Any = None, seqused_k: Any = None,
    max_seqlen_q: Any = None, max_seqlen_k: Any = None, deterministic: bool = False, dq: Any = None, dk: Any = None,
    dv: Any = None, dlse: Any = None, learnable_sink: Any = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    how = four_how(softmax_scale, causal, (window_size_left, window_size_right), softcap, q)
    lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    *found, delta = backward(q, k, v, out, dout, lse, dlse, *lengths, **how)
    if learnable_sink is None:
        return tuple(found)
    share = torch.exp((learnable_sink[:, None] if cu_seqlens_q is not None else learnable_sink[None, :, None]) - lse)
    dsink = -(share * delta).sum((0, 2) if cu_seqlens_q is None else 1)
    return *found, dsink


# --- FlashAttention-3 ------------------------------------------------------------------------------------------------


def three_how(scale: float | None, causal: bool, window: Any, softcap: float, q: Tensor) -> dict[str, Any]:
    assert all(isinstance(side, int) for side in window), "an unbounded side is -1"
    sides = tuple(None if side < 0 else side for side in window)
    return four_how(scale, causal, sides, softcap, q)


def three_func(
    q: Any, k: Any, v: Any, softmax_scale: float | None = None, causal: bool = False, qv: Any = None,
    q_descale: Any = None, k_descale: Any = None, v_descale: Any = None, window_size: Any = (-1, -1),
    attention_chunk: int = 0, softcap: float = 0.0, num_splits: int = 1, pack_gqa: Any = None,
    deterministic: bool = False, sm_margin: int = 0, return_attn_probs: bool = False,
) -> Any:  # fmt: skip
    assert qv is None
    how = three_how(softmax_scale, causal, window_size, softcap, q)
    out, lse = forward(q, k, v, None, None, None, None, None, **how)
    return (out, lse) if return_attn_probs else out


def three_varlen_func(
    q: Any, k: Any, v: Any, cu_seqlens_q: Any, cu_seqlens_k: Any, max_seqlen_q: Any, max_seqlen_k: Any,
    seqused_q: Any = None, seqused_k: Any = None, softmax_scale: float | None = None, causal: bool = False,
    qv: Any = None, q_descale: Any = None, k_descale: Any = None, v_descale: Any = None, window_size: Any = (-1, -1),
    attention_chunk: int = 0, softcap: float = 0.0, num_splits: int = 1, pack_gqa: Any = None,
    deterministic: bool = False, sm_margin: int = 0, return_attn_probs: bool = False,
) -> Any:  # fmt: skip
    how = three_how(softmax_scale, causal, window_size, softcap, q)
    out, lse = forward(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, None, **how)
    return (out, lse) if return_attn_probs else out


def three_bwd(
    dout: Any, q: Any, k: Any, v: Any, out: Any, softmax_lse: Any, cu_seqlens_q: Any = None, cu_seqlens_k: Any = None,
    sequed_q: Any = None, sequed_k: Any = None, max_seqlen_q: Any = None, max_seqlen_k: Any = None, dq: Any = None,
    dk: Any = None, dv: Any = None, softmax_scale: float | None = None, is_causal: bool = False,
    window_size_left: int = -1, window_size_right: int = -1, softcap: float = 0.0, deterministic: bool = False,
    sm_margin: int = 0,
) -> Tensor:  # fmt: skip
    how = three_how(softmax_scale, is_causal, (window_size_left, window_size_right), softcap, q)
    lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    *found, delta = backward(q, k, v, out, dout, softmax_lse, None, *lengths, **how)
    for given, computed in zip((dq, dk, dv), found, strict=True):
        assert given.is_contiguous()
        given.copy_(computed)
    return delta


def install(monkeypatch: pytest.MonkeyPatch, **instead: Callable[..., Any]) -> None:
    """Put the modules where an import finds them. ``instead``: a function in place of ``four_bwd`` and so on."""
    package, cute, interface, three = (
        ModuleType(name)
        for name in ("flash_attn", "flash_attn.cute", "flash_attn.cute.interface", "flash_attn_interface")
    )
    functions: tuple[tuple[ModuleType, str, str], ...] = (
        (cute, "flash_attn_func", "four_func"),
        (cute, "flash_attn_varlen_func", "four_varlen_func"),
        (interface, "_flash_attn_bwd", "four_bwd"),
        (three, "flash_attn_func", "three_func"),
        (three, "flash_attn_varlen_func", "three_varlen_func"),
        (three, "_flash_attn_backward", "three_bwd"),
    )
    for module, name, own in functions:
        setattr(module, name, instead.get(own, globals()[own]))
    # A module made here has no declared attributes.
    package.cute = cute  # type: ignore[attr-defined]
    cute.interface = interface  # type: ignore[attr-defined]
    for module in (package, cute, interface, three):
        monkeypatch.setitem(sys.modules, module.__name__, module)
