"""A case of the attention ops as FlexAttention wants it: which pairs are seen and what becomes of scores, as functions.

Both are called with tensors of indices (batch, query head, query, key); torch compiles them into its kernel. The
distance of a pair is counted from the diagonal of the causal mask, inside its own sequence where sequences are packed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vbench.spec import Case

Seen = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
Score = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
#: (query, key) -> key minus query minus shift.
Distance = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Rules:
    """``seen``: None where every pair is. ``score``: None where the scaled product is the score."""

    seen: Seen | None
    score: Score | None


def _places(cu: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """(sequence, place inside it) of each of ``length`` rows, int32; ``cu`` int32 [sequences + 1]."""
    rows = torch.arange(length, device=cu.device, dtype=torch.int32)
    # Of sequences that begin at one row, all but the last are empty.
    sequence = torch.searchsorted(cu[1:-1].contiguous(), rows, right=True)
    return sequence.to(torch.int32), rows - cu[sequence]


def _distance(case: Case, inputs: Mapping[str, Any]) -> tuple[Distance, Seen | None]:
    sq, sk, bottom_right = case.axis("sq"), case.axis("sk"), case.text("causal") == "bottom_right"
    if "cu_q" not in inputs:
        shift = sk - sq if bottom_right else 0
        return (lambda i, j: j - i - shift), None
    (sequence_q, at_q), (sequence_k, at_k) = _places(inputs["cu_q"], sq), _places(inputs["cu_k"], sk)
    if bottom_right:
        longer = (inputs["cu_k"].diff() - inputs["cu_q"].diff()).to(torch.int32)
        at_q = at_q + longer[sequence_q]
    return (lambda i, j: at_k[j] - at_q[i]), (lambda b, h, i, j: sequence_q[i] == sequence_k[j])


def _both(one: Seen | None, other: Seen) -> Seen:
    return other if one is None else lambda b, h, i, j: one(b, h, i, j) & other(b, h, i, j)


def _then(one: Score | None, other: Score) -> Score:
    return other if one is None else lambda s, b, h, i, j: other(one(s, b, h, i, j), b, h, i, j)


def rules(case: Case, inputs: Mapping[str, Any]) -> Rules:
    """Of ops ``attention`` and ``attention_extended`` and their backwards.

    Args:
        inputs: as the op's; ``slopes``, ``mask``, ``cu_q`` and ``cu_k`` are read where they are there.
    """
    apart, seen = _distance(case, inputs)
    score: Score | None = None
    window, cap = case.axis("window"), case.axis("softcap")
    if case.text("causal") != "none":
        seen = _both(seen, lambda b, h, i, j: apart(i, j) <= 0)
    if window:
        seen = _both(seen, lambda b, h, i, j: (apart(i, j) < window) & (apart(i, j) > -window))
    if cap:
        score = _then(score, lambda s, b, h, i, j: cap * torch.tanh(s / cap))
    if "slopes" in inputs:
        slopes: Tensor = inputs["slopes"]
        score = _then(score, lambda s, b, h, i, j: s - slopes[h] * apart(i, j).abs())
    if "mask" in inputs:
        shape = (case.axis("b"), case.axis("hq"), case.axis("sq"), case.axis("sk"))
        mask: Tensor = inputs["mask"].expand(shape)
        score = _then(score, lambda s, b, h, i, j: s + mask[b, h, i, j])
    return Rules(seen, score)
