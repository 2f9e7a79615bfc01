"""Wrong attention, forward and backward."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from vbench.control import Corpus
from vbench.controls.kit import BY_NAME, Register, Setting, worst_order_product
from vbench.reference.attention import visible
from vbench.reference.ops.attention import ATTENTION, ATTENTION_BACKWARD
from vbench.spec import Numerics

control = Register()

#: Outputs rounded to bf16, so that an honest twin uses most of its budget; float32 for faults smaller than that.
SMALL: dict[str, int | str] = {"dtype": "bf16", "hq": 4, "hk": 2, "sq": 24, "sk": 24, "d": 16}
FP32 = SMALL | {"dtype": "fp32"}
CAUSAL = SMALL | {"causal": "top_left"}
BOTTOM = SMALL | {"causal": "bottom_right", "sq": 16}


def expanded(s: Setting, *, by_remainder: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v in float32, each key head given to its query heads."""
    q, k, v = (s.inputs[name].float() for name in ("q", "k", "v"))
    hq, hk = q.shape[1], k.shape[1]
    heads = torch.arange(hq) % hk if by_remainder else torch.arange(hq) // (hq // hk)
    return q, k[:, heads], v[:, heads]


def mask(s: Setting, *, causal: str = "", shift: int = 0, window: int | None = None) -> Tensor:
    """bool [sq, sk]."""
    sq, sk = s.case.axis("sq"), s.case.axis("sk")
    window = s.case.axis("window") if window is None else window
    return visible(causal or s.case.text("causal"), torch.arange(sq) + shift, sq, sk, window)


def scores(s: Setting, q: Tensor, k: Tensor, *, scale: float | None = None, cap: bool = True) -> Tensor:
    z = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    c = s.case.axis("softcap") if cap else 0
    return c * torch.tanh(z / c) if c else z


def attend(z: Tensor, v: Tensor, seen: Tensor) -> dict[str, Tensor]:
    """out and lse of masked scores."""
    z = z.masked_fill(~seen, -math.inf)
    lse = torch.logsumexp(z, dim=-1)
    p = torch.where(seen, torch.exp(z - torch.where(lse.isinf(), 0.0, lse)[..., None]), 0.0)
    return {"out": p @ v, "lse": lse}


def honest(s: Setting) -> dict[str, Tensor]:
    q, k, v = expanded(s)
    return attend(scores(s, q, k), v, mask(s))


@control(
    ATTENTION,
    BOTTOM,
    family="mask",
    oracle="value",
    fault="a bottom-right mask is aligned top left",
)
def wrong_alignment(s: Setting) -> Mapping[str, Any]:
    q, k, v = expanded(s)
    return attend(scores(s, q, k), v, mask(s, causal="top_left" if s.wrong else ""))


@control(ATTENTION, CAUSAL, family="mask", oracle="value", fault="the diagonal itself is masked (j < i)")
def masked_diagonal(s: Setting) -> Mapping[str, Any]:
    q, k, v = expanded(s)
    return attend(scores(s, q, k), v, mask(s, shift=-1 if s.wrong else 0))


@control(ATTENTION, CAUSAL | {"window": 7}, family="mask", oracle="value", fault="the window is one key too wide")
def wide_window(s: Setting) -> Mapping[str, Any]:
    q, k, v = expanded(s)
    return attend(scores(s, q, k), v, mask(s, window=8 if s.wrong else 7))


@control(
    ATTENTION,
    BOTTOM | {"sq": 40},
    family="mask",
    oracle="value",
    fault="rows that see nothing get the mean of V: the mask is a large negative number",
)
def finite_mask(s: Setting) -> Mapping[str, Any]:
    q, k, v = expanded(s)
    right = attend(scores(s, q, k), v, mask(s))
    if not s.wrong:
        return right
    p = torch.softmax(scores(s, q, k).masked_fill(~mask(s), -1e4), dim=-1)
    return right | {"out": p @ v}


@control(
    ATTENTION,
    BOTTOM | {"sq": 40},
    family="mask",
    oracle="nonfinite",
    fault="rows that see nothing are 0/0",
)
def masked_rows_nan(s: Setting) -> Mapping[str, Any]:
    right = honest(s)
    blank = right["lse"].isinf()[..., None]
    return right | {"out": torch.where(blank, torch.nan, right["out"])} if s.wrong else right


@control(
    ATTENTION,
    SMALL | {"causal": "top_left"},
    family="mask",
    oracle="laws",
    fault="masked keys leak in with a weight of 2^-13: within bf16's budget, but the future is read",
    declares={"numerics": Numerics("fp32", probabilities="bf16")},
)
def leaking_mask(s: Setting) -> Mapping[str, Any]:
    q, k, v = expanded(s)
    right = attend(scores(s, q, k), v, mask(s))
    if s.wrong:
        hidden = (~mask(s)).float()
        right["out"] = right["out"] + 2.0**-13 * (hidden @ v) / hidden.sum(-1, keepdim=True).clamp(min=1.0)
    return right


@control(ATTENTION, SMALL, family="heads", oracle="value", fault="query head h reads key head h % hk")
def head_remainder(s: Setting) -> Mapping[str, Any]:
    q, k, v = expanded(s, by_remainder=s.wrong)
    return attend(scores(s, q, k), v, mask(s))


@control(ATTENTION, SMALL | {"b": 2}, family="heads", oracle="value", fault="every batch element reads the first's V")
def first_batch_values(s: Setting) -> Mapping[str, Any]:
    q, k, v = expanded(s)
    return attend(scores(s, q, k), v[:1].expand_as(v) if s.wrong else v, mask(s))


@control(
    ATTENTION,
    SMALL | {"layout": "bshd"},
    SMALL | {"layout": "padded"},
    family="heads",
    oracle="value",
    fault="strides are ignored: the tensors are read as if they were contiguous",
)
def ignored_strides(s: Setting) -> Mapping[str, Any]:
    q, k, v = (s.inputs[name] for name in ("q", "k", "v"))
    if s.wrong:
        q, k, v = (t.as_strided(t.shape, torch.empty(t.shape).stride()) for t in (q, k, v))
    other = Setting(s.case, {"q": q, "k": k, "v": v}, s.out, s.wrong, s.memory)
    return honest(other)


@control(
    ATTENTION,
    SMALL | {"dist": "large_logits"},
    family="softmax",
    oracle="nonfinite",
    fault="no maximum is subtracted: exp overflows",
)
def no_maximum(s: Setting) -> Mapping[str, Any]:
    if not s.wrong:
        return honest(s)
    q, k, v = expanded(s)
    p = torch.exp(scores(s, q, k))
    total = p.sum(-1)
    return {"out": p @ v / total[..., None], "lse": torch.log(total)}


@control(ATTENTION, SMALL, family="softmax", oracle="value", fault="lse is a logarithm to base 2")
def base_two_lse(s: Setting) -> Mapping[str, Any]:
    right = honest(s)
    return right | ({"lse": right["lse"] / math.log(2.0)} if s.wrong else {})


@control(ATTENTION, SMALL, family="softmax", oracle="value", fault="scores are scaled by 1/d instead of 1/sqrt(d)")
def wrong_scale(s: Setting) -> Mapping[str, Any]:
    q, k, v = expanded(s)
    return attend(scores(s, q, k, scale=1 / q.shape[-1] if s.wrong else None), v, mask(s))


@control(
    ATTENTION,
    SMALL | {"softcap": 2},
    family="fallback",
    oracle="value",
    fault="the cap of the scores, which the kernel does not know, is ignored in silence",
)
def ignored_softcap(s: Setting) -> Mapping[str, Any]:
    q, k, v = expanded(s)
    return attend(scores(s, q, k, cap=not s.wrong), v, mask(s))


@control(
    ATTENTION,
    SMALL | {"sk": 40},
    family="softmax",
    oracle="value",
    fault="the accumulator is not rescaled when the running maximum grows",
)
def stale_rescale(s: Setting) -> Mapping[str, Any]:
    q, k, v = expanded(s)
    z = scores(s, q, k)
    m = torch.full(z.shape[:-1], -math.inf)
    total, acc = torch.zeros(z.shape[:-1]), torch.zeros_like(q)
    for at in range(0, z.shape[-1], 16):
        part = z[..., at : at + 16]
        grown = torch.maximum(m, part.amax(-1))
        factor = torch.exp(m - grown)
        p = torch.exp(part - grown[..., None])
        total = total * factor + p.sum(-1)
        acc = acc * (torch.where(m.isinf(), factor, torch.ones(())) if s.wrong else factor)[..., None]
        acc, m = acc + p @ v[:, :, at : at + 16], grown
    return {"out": acc / total[..., None], "lse": m + torch.log(total)}


@control(
    ATTENTION,
    SMALL | {"sk": 21},
    family="softmax",
    oracle="value",
    fault="keys that pad the last tile count, with a score of 0",
)
def padding_counts(s: Setting) -> Mapping[str, Any]:
    q, k, v = expanded(s)
    if not s.wrong:
        return attend(scores(s, q, k), v, mask(s))
    k, v = (torch.nn.functional.pad(t, (0, 0, 0, -t.shape[2] % 16)) for t in (k, v))
    return attend(scores(s, q, k), v, torch.ones(q.shape[2], k.shape[2], dtype=torch.bool))


@control(
    ATTENTION,
    FP32 | {"sk": 256, "d": 8},
    family="accumulation",
    oracle="value",
    fault="weights are rounded to bf16 before P V though fp32 is declared",
)
def undeclared_bf16_weights(s: Setting) -> Mapping[str, Any]:
    q, k, v = expanded(s)
    z = scores(s, q, k)
    lse = torch.logsumexp(z, dim=-1)
    p = torch.exp(z - lse[..., None])
    return {"out": p.bfloat16().float() @ v if s.wrong else worst_order_product(p, v), "lse": lse}


# -- backward ----------------------------------------------------------------------------------------------------------

GRAD: dict[str, int | str] = SMALL | {"dlse": 1}


def gradients(s: Setting, *, group_sum: bool = True, scaled: bool = True, use_dlse: bool = True) -> dict[str, Tensor]:
    q, k, v = expanded(s)
    out, dout, lse = (s.inputs[name].float() for name in ("out", "dout", "lse"))
    p = torch.where(mask(s), torch.exp(scores(s, q, k) - lse[..., None]), 0.0)
    shift = (out * dout).sum(-1)
    if use_dlse and "dlse" in s.inputs:
        shift = shift - s.inputs["dlse"]
    ds = p * (dout @ v.transpose(-1, -2) - shift[..., None])
    scale = q.shape[-1] ** -0.5

    def heads(t: Tensor) -> Tensor:
        grouped = t.reshape(t.shape[0], s.case.axis("hk"), -1, *t.shape[2:])
        return grouped.sum(dim=2) if group_sum else grouped[:, :, 0]

    dq = ds @ k * (scale if scaled else 1.0)
    return {"dq": dq, "dk": heads(ds.transpose(-1, -2) @ q * scale), "dv": heads(p.transpose(-1, -2) @ dout)}


@control(
    ATTENTION_BACKWARD,
    GRAD,
    family="gradient",
    oracle="value",
    fault="dk and dv are those of the group's first query head, not the sum",
)
def missing_group_sum(s: Setting) -> Mapping[str, Any]:
    return gradients(s, group_sum=not s.wrong)


@control(ATTENTION_BACKWARD, GRAD, family="gradient", oracle="value", fault="dq is not scaled by 1/sqrt(d)")
def unscaled_dq(s: Setting) -> Mapping[str, Any]:
    return gradients(s, scaled=not s.wrong)


@control(ATTENTION_BACKWARD, GRAD, family="gradient", oracle="value", fault="the gradient into lse is ignored")
def ignored_dlse(s: Setting) -> Mapping[str, Any]:
    return gradients(s, use_dlse=not s.wrong)


@control(
    ATTENTION_BACKWARD,
    GRAD | {"sq": 64, "sk": 192, "d": 64, "hq": 2},
    family="gradient",
    oracle="nonfinite",
    fault="dq is NaN in a few rows where S mod 128 is 64",
    imitates="pytorch/pytorch#196678",
)
def nan_dq_rows(s: Setting) -> Mapping[str, Any]:
    right = gradients(s)
    if s.wrong and s.case.axis("sk") % 128 == 64:
        right["dq"][:, :, 5] = torch.nan
    return right


@control(
    ATTENTION_BACKWARD,
    GRAD | {"dtype": "fp32"},
    family="determinism",
    oracle="rerun_bitwise",
    fault="dq is summed by atomics in changing order, and declared deterministic",
)
def atomic_dq(s: Setting) -> Mapping[str, Any]:
    right = gradients(s)
    if s.wrong and s.calls % 2 == 0:
        # Another order of the sum: a last bit more here and there.
        right["dq"] = torch.where(right["dq"].abs() > 0.01, torch.nextafter(right["dq"], right["dq"] * 2), right["dq"])
    return right


make = control.factory(BY_NAME)
CORPUS = Corpus("controls_softmax", "wrong attention", control.controls, "vbench.controls.softmax:make")
