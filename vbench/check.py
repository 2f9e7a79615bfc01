"""Outputs against the oracle: shape, dtype, finiteness, value within the derived budget; and the trivial kernels.

Every function imports torch inside, so that importing this module is free.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from vbench.record import ErrorStats, Outcome
from vbench.spec import Expected

#: Significant bits of each floating type, for units in the last place.
_SIGNIFICANT_BITS = {"torch.bfloat16": 8, "torch.float16": 11, "torch.float32": 24, "torch.float64": 53}
_MIN_EXPONENT = {"torch.bfloat16": -125, "torch.float16": -13, "torch.float32": -125, "torch.float64": -1021}

#: What a check looks at, by the names under which ``vbench selftest`` proves each of them needed. A job may be asked to
#: leave some out, for that proof alone; ``EXTRA`` are those that cost another draw or launch and must be asked for.
ORACLES = (
    "produces",
    "precision",
    "plain_tensor",
    "shape",
    "dtype",
    "stride",
    "nonfinite",
    "value",
    "exact_grid",
    "poison",
    "red_zones",
    "inputs_unchanged",
    "rerun",
    "rerun_bitwise",
    "after_timing",
    "patched",
    "rebind",
    "battery",
    "laws",
    "batch_invariance",
)
EXTRA = frozenset({"rebind", "battery", "laws", "batch_invariance"})

#: Reasons of records that only those can leave.
BEYOND = frozenset({"laws", "batch_invariance", "rebound_inputs"})

#: Poison of integer outputs; floating outputs are poisoned with NaN.
POISON_BYTE = 0xA5


@dataclass(frozen=True, slots=True)
class Judgement:
    """What the comparison found."""

    outcome: Outcome
    reason: str = ""
    detail: str = ""
    error: ErrorStats | None = None


def poisoned(expected: Mapping[str, Expected], device: str) -> dict[str, Any]:
    """A fresh output tensor for each output, filled so that an element nobody writes is seen."""
    import torch

    out: dict[str, Any] = {}
    for name, want in expected.items():
        t = torch.empty(want.shape, dtype=want.dtype, device=device)
        poison(t)
        out[name] = t
    return out


def poison(t: Any) -> None:
    """Overwrite in place: NaN for floats, 0xA5 bytes for everything else."""
    import torch

    if t.dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        t.fill_(math.nan)
    elif t.numel():
        t.view(torch.uint8).fill_(0xFF if t.dtype.is_floating_point else POISON_BYTE)


def tensors_of(value: Any) -> list[Any]:
    """Every tensor inside nested dicts, lists and tuples, in a fixed order."""
    import torch

    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, Mapping):
        return [t for key in sorted(value) for t in tensors_of(value[key])]
    if isinstance(value, list | tuple):
        return [t for item in value for t in tensors_of(item)]
    return []


def copied(t: Any) -> Any:
    """A copy with the strides and the storage offset of ``t`` (``clone`` keeps the strides of dense tensors only).

    Where elements of ``t`` share an address the copy is contiguous.
    """
    import torch

    if t.numel() == 0 or any(n > 1 and stride == 0 for n, stride in zip(t.shape, t.stride(), strict=True)):
        return t.clone()
    end = t.storage_offset() + 1 + sum((n - 1) * stride for n, stride in zip(t.shape, t.stride(), strict=True))
    storage = torch.empty(end, dtype=t.dtype, device=t.device)
    return storage.as_strided(t.shape, t.stride(), t.storage_offset()).copy_(t)


def as_bytes(t: Any) -> Any:
    """The tensor's elements as a flat uint8 tensor (a copy where it is not contiguous)."""
    import torch

    return t.detach().contiguous().reshape(-1).view(torch.uint8)


def same_bits(a: Any, b: Any) -> bool:
    """Equal shape, dtype and bytes."""
    import torch

    return a.shape == b.shape and a.dtype == b.dtype and bool(torch.equal(as_bytes(a), as_bytes(b)))


def _equal_elements(got: Any, want: Any) -> Any:
    """Elementwise equality of two tensors of one dtype; NaN equals NaN; packed one-byte types compare as bytes."""
    import torch

    if got.dtype.itemsize == 1:
        return got.view(torch.uint8) == want.view(torch.uint8)
    equal = got == want
    if got.dtype.is_floating_point:
        equal |= torch.isnan(got) & torch.isnan(want)
    return equal


def _ulp(value: Any, dtype: Any) -> Any:
    """Spacing of ``dtype`` at |value| (float64)."""
    import torch

    _, exponent = torch.frexp(value)
    exponent = exponent.clamp(min=_MIN_EXPONENT[str(dtype)])
    return torch.ldexp(torch.ones_like(value), exponent - _SIGNIFICANT_BITS[str(dtype)])


def _within_an_ulp(want: Expected) -> Expected:
    """An exact floating expectation, loosened to one unit in the last place."""
    import torch

    if want.budget is not None or str(want.dtype) not in _SIGNIFICANT_BITS:
        return want
    wide = want.value.double()
    return replace(want, value=wide, budget=_ulp(torch.where(torch.isfinite(wide), wide, 0.0), want.dtype))


def _compare(name: str, got: Any, want: Expected, off: frozenset[str]) -> tuple[Outcome, ErrorStats]:
    import torch

    if "exact_grid" in off:
        want = _within_an_ulp(want)
    value = want.value
    elements = value.numel()
    if elements == 0:
        return Outcome.PASSED, ErrorStats(name, 0, 0, 0.0, None, 1.0)
    floating = str(want.dtype) in _SIGNIFICANT_BITS

    def position(flat: int) -> tuple[int, ...]:
        index = []
        for size in reversed(value.shape):
            index.append(flat % size)
            flat //= size
        return tuple(reversed(index))

    if want.budget is None:
        equal = _equal_elements(got, value)
        wrong = int((~equal).sum())
        at = position(int((~equal).reshape(-1).to(torch.uint8).argmax())) if wrong else ()
        ulp = None
        if floating:
            finite = torch.isfinite(got) & torch.isfinite(value)
            difference = torch.where(finite, got.double() - value.double(), 0.0).abs()
            ulp = float((difference / _ulp(value.double(), want.dtype)).max())
        nonfinite = floating and bool((~torch.isfinite(got) & torch.isfinite(value)).any())
        outcome = Outcome.PASSED if wrong == 0 else Outcome.NONFINITE if nonfinite else Outcome.WRONG_VALUE
        stats = ErrorStats(name, elements, wrong, math.inf if wrong else 0.0, ulp, 1 - wrong / elements, at)
        return outcome, stats

    got64 = got.double()
    special = ~torch.isfinite(value)
    special_right = ~special | (got64 == value) | (torch.isnan(got64) & torch.isnan(value))
    nonfinite_got = ~torch.isfinite(got64) & ~special
    error = torch.where(special | nonfinite_got, 0.0, (got64 - value).abs())
    ratio = torch.where(error == 0, 0.0, error / want.budget)
    ratio = torch.where(nonfinite_got | ~special_right, math.inf, ratio)
    ulp_error = error / _ulp(torch.where(special, 0.0, value), want.dtype)
    rounded = _equal_elements(got, value.to(want.dtype))
    # Read from the device together: where a GPU is shared, each wait for it costs more than all of these.
    found = (ratio > 1).sum(), ratio.reshape(-1).argmax(), ratio.max(), ulp_error.max(), rounded.double().mean()
    numbers: list[float] = torch.stack([t.double() for t in (*found, nonfinite_got.any())]).tolist()
    stats = ErrorStats(
        output=name,
        elements=elements,
        wrong=int(numbers[0]),
        worst_over_budget=numbers[2],
        max_ulp=numbers[3],
        correctly_rounded=numbers[4],
        at=position(int(numbers[1])),
    )
    if stats.wrong == 0:
        return Outcome.PASSED, stats
    return (Outcome.NONFINITE if numbers[5] else Outcome.WRONG_VALUE), stats


def _blind(got: Any, want: Expected) -> Any:
    """``got`` with NaN and Inf replaced by what is expected: a comparison that takes them for wildcards."""
    import torch

    if not got.dtype.is_floating_point or got.dtype.itemsize == 1:
        return got
    return torch.where(torch.isfinite(got), got, want.value.to(got.dtype))


_SEVERITY = (Outcome.WRONG_SHAPE, Outcome.WRONG_DTYPE, Outcome.NONFINITE, Outcome.WRONG_VALUE)


def judge_outputs(
    outputs: Mapping[str, Any],
    expected: Mapping[str, Expected],
    produces: tuple[str, ...],
    *,
    contiguous: bool = False,
    off: frozenset[str] = frozenset(),
) -> Judgement:
    """Compare every output in ``produces`` with the oracle.

    An output that is missing, or no plain torch.Tensor (a lazy subclass could defer its work to the comparison), is
    WRONG_SHAPE, and so is, with ``contiguous``, one whose elements do not lie in order. Of several wrong outputs the
    worst decides.

    Args:
        off: names of ORACLES to leave out; only a proof that they are needed does that.
    """
    import torch

    found: list[tuple[Outcome, str, str]] = []
    stats: list[ErrorStats] = []
    for name in produces:
        want = expected[name]
        got = outputs.get(name)
        if got is None:
            found.append((Outcome.WRONG_SHAPE, "missing_output", f"no output {name!r}"))
            continue
        if "plain_tensor" in off and isinstance(got, torch.Tensor):
            got = got.as_subclass(torch.Tensor)
        if type(got) is not torch.Tensor:
            found.append((Outcome.WRONG_SHAPE, "not_a_tensor", f"{name} is a {type(got).__name__}, not a torch.Tensor"))
            continue
        if "shape" in off and got.numel() == torch.Size(want.shape).numel():
            got = got.reshape(want.shape)
        if tuple(got.shape) != want.shape:
            detail = f"{name} has shape {tuple(got.shape)}, not {want.shape}"
            found.append((Outcome.WRONG_SHAPE, "shape", detail))
            continue
        if contiguous and not got.is_contiguous() and "stride" not in off:
            detail = f"{name} has strides {tuple(got.stride())}: elements must lie in order, without gaps"
            found.append((Outcome.WRONG_SHAPE, "strides", detail))
            continue
        if "dtype" in off:
            got = got.to(want.dtype)
        if got.dtype != want.dtype:
            found.append((Outcome.WRONG_DTYPE, "dtype", f"{name} is {got.dtype}, not {want.dtype}"))
            continue
        part = (got if want.take is None else want.take(got)).to(want.value.device)
        if "nonfinite" in off:
            part = _blind(part, want)
        outcome, error = _compare(name, part, want, off)
        stats.append(error)
        if outcome is Outcome.WRONG_VALUE and "value" in off:
            outcome = Outcome.PASSED
        if outcome is not Outcome.PASSED:
            detail = f"{name}: {error.wrong} of {error.elements} elements wrong, worst at {error.at}"
            found.append((outcome, "value", detail))
    total = sum(s.elements for s in stats)
    worst = max(stats, key=lambda s: s.worst_over_budget, default=None)
    if worst is not None:
        rounded = sum(s.correctly_rounded * s.elements for s in stats) / total if total else 1.0
        ulps = [s.max_ulp for s in stats if s.max_ulp is not None]
        worst = ErrorStats(
            worst.output,
            total,
            sum(s.wrong for s in stats),
            worst.worst_over_budget,
            max(ulps) if ulps else None,
            rounded,
            worst.at,
        )
    if not found:
        return Judgement(Outcome.PASSED, error=worst)
    outcome, reason, detail = min(found, key=lambda f: _SEVERITY.index(f[0]))
    return Judgement(outcome, reason, detail, worst)


TRIVIAL_KERNELS = ("zeros", "mean", "copy", "previous", "half")


def trivial_outputs(
    kernel: str, inputs: Mapping[str, Any], expected: Mapping[str, Expected], previous: Mapping[str, Expected]
) -> dict[str, Any]:
    """What a kernel that does no honest work would return.

    zeros: all zero. mean: the right mean everywhere. copy: the bytes of the largest input. previous: the right answer
    to another draw of the same case. half: half the right answer (for integers, the second half of it missing).
    """
    import torch

    out: dict[str, Any] = {}
    sources = [t for t in tensors_of(inputs) if t.numel()]
    source = max(sources, key=lambda t: t.numel())
    for name, want in expected.items():
        exact = want.value if want.budget is None else want.value.to(want.dtype)
        wide = exact.double()
        if kernel == "zeros":
            t = torch.zeros_like(exact)
        elif kernel == "mean":
            finite = wide[torch.isfinite(wide)]
            mean = float(finite.mean()) if finite.numel() else 0.0
            t = torch.full_like(wide, mean).to(want.dtype)
        elif kernel == "copy":
            needed = exact.numel() * exact.element_size()
            raw = as_bytes(source)[: max(needed, 1)].to(exact.device)
            raw = raw.repeat(-(-needed // raw.numel()) or 1)[:needed]
            t = raw.clone().view(want.dtype).reshape(exact.shape) if needed else exact.clone()
        elif kernel == "previous":
            old = previous[name]
            t = old.value if old.budget is None else old.value.to(want.dtype)
        elif want.dtype.is_floating_point:
            t = (wide * 0.5).to(want.dtype)
        else:
            t = exact.clone().reshape(-1)
            t[t.numel() // 2 :] = 0
            t = t.reshape(exact.shape)
        out[name] = t
    return out


#: Why a trivial kernel is right on a case whose outputs no oracle tagged.
ALIKE = {
    "zeros": "the answer is zero to a unit in the last place",
    "mean": "the answer is the same everywhere to a unit in the last place",
    "half": "the answer is zero to a unit in the last place",
}
#: Those whose answer has nothing to do with this draw's: excused only where zeros are too, or else an input generator
#: that makes the same draw twice would be.
_UNRELATED = ("copy", "previous")
#: What may be flushed to zero: below float32's least normal number, and its range of exponents is bfloat16's; else what
#: the type has no number for.
_FLUSHED = {"torch.bfloat16": 2.0**-126, "torch.float16": 2.0**-24, "torch.float32": 2.0**-126}


def is_the_answer(got: Any, want: Expected) -> bool:
    """Whether ``got`` is everywhere what the oracle says, to a unit in the last place of its dtype.

    Whatever the budget: one that is too wide excuses nothing. What has no budget must be equal.
    """
    import torch

    if want.budget is None:
        return bool(_equal_elements(got, want.value).all())
    value, got64 = want.value, got.double()
    special = ~torch.isfinite(value)
    least = _FLUSHED.get(str(want.dtype), 2.0**-1022)
    unit = _ulp(torch.where(special | (value == 0), least, value), want.dtype).clamp(min=least)
    near = (got64 - value).abs() <= unit
    same = (got64 == value) | (torch.isnan(got64) & torch.isnan(value))
    return bool(torch.where(special, same, near).all())


def trivial_survivors(
    inputs: Mapping[str, Any], expected: Mapping[str, Expected], previous: Mapping[str, Expected]
) -> tuple[list[str], dict[str, str]]:
    """Trivial kernels the comparison lets pass, and those it rightly does, each with the reason.

    One is excused where each output is tagged degenerate by the oracle, or is such that the trivial answer is the true
    one (``is_the_answer``).
    """
    survivors: list[str] = []
    excused: dict[str, str] = {}
    for kernel in TRIVIAL_KERNELS:
        outputs = trivial_outputs(kernel, inputs, expected, previous)
        # One output after the other: nearly always the first is wrong, and the rest need not be looked at.
        if any(judge_outputs(outputs, expected, (name,)).outcome is not Outcome.PASSED for name in expected):
            continue
        answers = [outputs]
        if kernel in _UNRELATED:
            answers.append(trivial_outputs("zeros", inputs, expected, previous))
        reasons = [
            want.degenerate
            or (ALIKE.get(kernel, ALIKE["zeros"]) if all(is_the_answer(a[n], want) for a in answers) else "")
            for n, want in expected.items()
        ]
        if all(reasons):
            excused[kernel] = reasons[0]
        else:
            survivors.append(kernel)
    return survivors, excused
