"""Laws: what must hold between two runs of any kernel, whatever the right answer is. No oracle and no budget is needed.

A law applies where it is bitwise true of every honest kernel: scaling by a power of two commutes with every rounding
but at the ends of the exponent's range, and what is masked or belongs to another head is never multiplied in. Where
that depends on how a kernel rounds, what it declares decides (``Law.numerics``), and its budget holds instead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from vbench.reference.attention import ScoreRule, lay_out
from vbench.reference.fp4 import dequantize
from vbench.spec import Case, Law, Numerics

Outputs = Mapping[str, Any]


def _with(case: Case, **values: int) -> Case:
    """``case`` with other axes."""
    return replace(case, params=tuple((name, values.get(name, value)) for name, value in case.params))


def _differ(got: Tensor, want: Tensor, what: str) -> str:
    """Where two tensors are not bitwise the same (NaN equals NaN)."""
    same = (got == want) | (torch.isnan(got) & torch.isnan(want))
    if bool(same.all()):
        return ""
    at = tuple(int(i) for i in (~same).nonzero()[0])
    return f"{what}: {int((~same).sum())} of {same.numel()} elements differ, the first at {at}"


def _doubled(name: str) -> Callable[[Outputs, Outputs], str]:
    """Output ``name`` of the second run is twice the first's, where both are normal numbers."""

    def broken(first: Outputs, second: Outputs) -> str:
        a, b = first[name], second[name]
        info = torch.finfo(a.dtype)
        # Intermediate sums of the same magnitude may be subnormal in float32 too, so a margin of its significand.
        safe = (a.abs() >= max(info.tiny, 2.0**-100)) & (a.abs() <= info.max / 2)
        return _differ(torch.where(safe, b, 0.0), torch.where(safe, 2 * a, 0.0), f"{name} is not doubled")

    return broken


def _unchanged(kept: Callable[[Tensor], Tensor]) -> Callable[[Outputs, Outputs], str]:
    """What ``kept`` takes of each output is bitwise the same in both runs."""

    def broken(first: Outputs, second: Outputs) -> str:
        found = (_differ(kept(second[n]), kept(first[n]), n) for n in first)
        return next((f for f in found if f), "")

    return broken


def _decodes(numerics: Numerics) -> bool:
    """Whether a kernel multiplies the decoded weight itself: of its operands it rounds none but to float32, which
    decoding does too. With nf4's table rounded to 16 bits before its scale, say, it multiplies another."""
    return numerics.accumulate != "tf32" and set(numerics.operand_roundings) <= {"fp32"}


def _other_tokens(case: Case, inputs: dict[str, Any]) -> Iterator[Law]:
    """other_tokens: another last token, of the same magnitudes, changes no bit of the other tokens' results."""
    x = inputs["x"]
    if len(x) > 1:
        other = torch.cat((x[:-1], -x[-1:].flip(1)))
        yield Law("other_tokens", case, {**inputs, "x": other}, _unchanged(lambda y: y[:-1]), "deterministic")


def int8_laws(case: Case, inputs: dict[str, Any]) -> Iterator[Law]:
    """Of ``int8_linear``. doubled_x, without bias: y(2 x) = 2 y(x), scales made in the launch doubling too.

    other_tokens: see there; x is rounded token by token.
    """
    if not case.axis("bias"):
        yield Law("doubled_x", case, {**inputs, "x": 2 * inputs["x"]}, _doubled("y"))
    yield from _other_tokens(case, inputs)


def linear_laws(case: Case, inputs: dict[str, Any]) -> Iterator[Law]:
    """Of ``fp4_linear``.

    doubled_x: y(2 x) = 2 y(x), without bias, gelu and silu. one_hot: x that picks one column a row gives decoded
    columns (without bias and activation, in 16 bits, of kernels that multiply these, see ``_decodes``); one_hot_budget:
    of the others, and in float32, where the order of scales may show, those columns within the budget.
    other_tokens: see there. first_tokens: the first half of the tokens alone give the same bits, of kernels that
    declare ``batch_invariant``.
    """
    x, act, m, k = inputs["x"], case.text("act"), case.axis("m"), case.axis("k")
    if act in ("none", "relu") and not case.axis("bias"):
        yield Law("doubled_x", case, {**inputs, "x": 2 * x}, _doubled("y"))
        if act == "none":
            columns = torch.arange(m, device=x.device) * 37 % k
            one_hot = torch.zeros_like(x)
            one_hot[torch.arange(m, device=x.device), columns] = 1.0
            want = dequantize(case.text("fmt"), inputs, x.dtype)[:, columns].T

            def broken(first: Outputs, second: Outputs) -> str:
                return _differ(second["y"], want, "y is not the decoded column")

            narrow = case.text("x") != "fp32"
            picking = {**inputs, "x": one_hot}
            if narrow:
                yield Law("one_hot", case, picking, broken, numerics=_decodes)
            yield Law("one_hot_budget", case, picking, None, numerics=lambda n: not (narrow and _decodes(n)))
    yield from _other_tokens(case, inputs)
    half = m // 2
    if half:

        def varies(first: Outputs, second: Outputs) -> str:
            return _differ(second["y"], first["y"][:half], f"the first {half} tokens alone")

        yield Law("first_tokens", _with(case, m=half), {**inputs, "x": x[:half].clone()}, varies, "batch_invariant")


def attention_laws(case: Case, inputs: dict[str, Any]) -> Iterator[Law]:
    """Of ``attention``.

    doubled_v: out(2 v) = 2 out(v). causal_prefix: keys and values that the first half of the queries may not see change
    no bit of it. other_heads: another k and v for the last key head change no bit of the others. other_batches: nor do
    those of the last batch element. first_batches: the first half of the batch alone gives the same bits, of kernels
    that declare ``batch_invariant``.
    """
    layout, rule = case.text("layout"), ScoreRule.of(case)
    k, v = inputs["k"], inputs["v"]
    hk, sk = k.shape[1:3]
    sq, group = case.axis("sq"), case.axis("hq") // hk

    def changed(picked: Tensor) -> dict[str, Any]:
        """k and v negated, v halved too, where ``picked`` (bool, broadcast over [b, hk, sk, d])."""
        other_k, other_v = torch.where(picked, -k, k), torch.where(picked, -0.5 * v, v)
        return {**inputs, "k": lay_out(other_k, layout), "v": lay_out(other_v, layout)}

    yield Law("doubled_v", case, {**inputs, "v": lay_out(2 * v, layout)}, _doubled("out"))
    rows = torch.arange(sq // 2, device=k.device)
    unseen = ~rule.seen(rows, sq, sk).any(dim=0)
    if len(rows) and bool(unseen.any()):

        def leaks(first: Outputs, second: Outputs) -> str:
            found = (_differ(second[n][:, :, : len(rows)], first[n][:, :, : len(rows)], n) for n in first)
            return next((f for f in found if f), "")

        yield Law("causal_prefix", case, changed(unseen[None, None, :, None]), leaks)
    if hk > 1:
        last = torch.arange(hk, device=k.device) == hk - 1
        kept = (hk - 1) * group

        def mixes(first: Outputs, second: Outputs) -> str:
            found = (_differ(second[n][:, :kept], first[n][:, :kept], n) for n in first)
            return next((f for f in found if f), "")

        yield Law("other_heads", case, changed(last[None, :, None, None]), mixes)
    if k.shape[0] > 1:
        last = torch.arange(len(k), device=k.device) == len(k) - 1
        yield Law("other_batches", case, changed(last[:, None, None, None]), _unchanged(lambda t: t[:-1]))
        half = len(k) // 2
        alone = {name: lay_out(inputs[name][:half], layout) for name in ("q", "k", "v")}

        def varies(first: Outputs, second: Outputs) -> str:
            what = f"the first {half} batch elements alone"
            return next((f for f in (_differ(second[n], first[n][:half], f"{n}, {what}") for n in first) if f), "")

        yield Law("first_batches", _with(case, b=half), {**inputs, **alone}, varies, "batch_invariant")


def backward_laws(case: Case, inputs: dict[str, Any]) -> Iterator[Law]:
    """Of ``attention_backward``, for kernels that declare themselves deterministic (sums in any order differ anyway).

    doubled_dout: twice dout and dlse give twice each gradient; not where score gradients may be subnormal, in fp16 and
    with large logits. other_heads, other_batches: another dout for the last
    key head's query heads, or the last batch element, changes no bit of the others' gradients.
    """
    dout, layout = inputs["dout"], case.text("layout")
    hq, hk = case.axis("hq"), case.axis("hk")
    twice = {**inputs, "dout": lay_out(2 * dout, layout)}
    if "dlse" in inputs:
        twice["dlse"] = 2 * inputs["dlse"]

    def not_doubled(first: Outputs, second: Outputs) -> str:
        return next((f for f in (_doubled(n)(first, second) for n in first) if f), "")

    if case.text("dtype") != "fp16" and case.text("dist") != "large_logits":
        yield Law("doubled_dout", case, twice, not_doubled, "deterministic")

    def changed(picked: Tensor) -> dict[str, Any]:
        """dout turned and halved where ``picked`` (bool, broadcast over [b, hq, sq, d])."""
        return {**inputs, "dout": lay_out(torch.where(picked, -0.5 * dout, dout), layout)}

    if hk > 1:
        last = torch.arange(hq, device=dout.device) >= hq - hq // hk

        def mixes(first: Outputs, second: Outputs) -> str:
            kept = {"dq": hq - hq // hk, "dk": hk - 1, "dv": hk - 1}
            found = (_differ(second[n][:, : kept[n]], first[n][:, : kept[n]], n) for n in first)
            return next((f for f in found if f), "")

        yield Law("other_heads", case, changed(last[None, :, None, None]), mixes, "deterministic")
    if len(dout) > 1:
        last = torch.arange(len(dout), device=dout.device) == len(dout) - 1
        others = changed(last[:, None, None, None])
        yield Law("other_batches", case, others, _unchanged(lambda t: t[:-1]), "deterministic")


def _last_sequence(inputs: dict[str, Any], of: str) -> Tensor:
    """bool [length]: rows (``of`` q) or keys (k) of the last packed sequence."""
    length = inputs[of].shape[2]
    rows = torch.arange(length, device=inputs[of].device)
    return rows >= int(inputs[f"cu_{of}"][-2])


def extended_laws(case: Case, inputs: dict[str, Any]) -> Iterator[Law]:
    """Of ``attention_extended``.

    doubled_v: out(2 v) = 2 out(v), sinks or not. other_sequences: other keys and values of the last packed sequence
    change no bit of the others.
    """
    layout, k, v = case.text("layout"), inputs["k"], inputs["v"]

    def changed(picked: Tensor) -> dict[str, Any]:
        """k and v negated, v halved too, where ``picked`` (bool [sk])."""
        there = picked[None, None, :, None]
        other_k, other_v = torch.where(there, -k, k), torch.where(there, -0.5 * v, v)
        return {**inputs, "k": lay_out(other_k, layout), "v": lay_out(other_v, layout)}

    yield Law("doubled_v", case, {**inputs, "v": lay_out(2 * v, layout)}, _doubled("out"))
    if case.axis("packed") > 1:
        kept = ~_last_sequence(inputs, "q")
        yield Law(
            "other_sequences",
            case,
            changed(_last_sequence(inputs, "k")),
            _unchanged(lambda t: t[:, :, kept.to(t.device)]),
        )


def extended_backward_laws(case: Case, inputs: dict[str, Any]) -> Iterator[Law]:
    """Of ``attention_extended_backward``, for deterministic kernels. other_sequences: another dout of the last packed
    sequence changes no bit of the others' gradients."""
    if case.axis("packed") > 1:
        dout, last = inputs["dout"], _last_sequence(inputs, "q")
        other = torch.where(last[None, None, :, None], -0.5 * dout, dout)
        rows, keys = ~last, ~_last_sequence(inputs, "k")

        def mixes(first: Outputs, second: Outputs) -> str:
            kept = {"dq": rows, "dk": keys, "dv": keys}
            found = (_differ(second[n][:, :, m], first[n][:, :, m], n) for n, m in kept.items() if n in first)
            return next((f for f in found if f), "")

        yield Law(
            "other_sequences", case, {**inputs, "dout": lay_out(other, case.text("layout"))}, mixes, "deterministic"
        )


def quantize_laws(case: Case, inputs: dict[str, Any]) -> Iterator[Law]:
    """Of ``fp4_quantize``. negated (not nf4, whose table is not symmetric): the same scales, signs turned."""
    if case.text("fmt") == "nf4":
        return
    symmetric = case.text("fmt").startswith("absmax7")

    def broken(first: Outputs, second: Outputs) -> str:
        for name in ("scale", "global_scale"):
            found = _differ(second[name].float(), first[name].float(), name)
            if found:
                return found
        low, high = (first["codes"] & 15, first["codes"] >> 4)
        turned = (16 - low) | ((16 - high) << 4) if symmetric else first["codes"] ^ 0x88
        return _differ(second["codes"], turned, "codes")

    yield Law("negated", case, {**inputs, "w": -inputs["w"]}, broken)
