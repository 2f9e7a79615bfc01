"""What to run: operations, cases, suites. Standard library only, so that listing needs no torch.

An ``Op`` has one meaning (its oracle) and many implementations. A ``Case`` is one point of an op's parameter space.
Oracles and input generators are named ``module:function`` and resolved in the worker process.
"""

from __future__ import annotations

import hashlib
import importlib
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from vbench.errors import CaseError

ParamValue = int | str

#: dtype short names used in case ids -> torch attribute names
TORCH_DTYPE_NAMES: Mapping[str, str] = {
    "bf16": "bfloat16",
    "fp16": "float16",
    "fp32": "float32",
    "fp64": "float64",
    "u8": "uint8",
    "i64": "int64",
    "e4m3": "float8_e4m3fn",
}


@dataclass(frozen=True, slots=True)
class Param:
    """One parameter of an op.

    Args:
        name: as in the case id.
        kind: ``axis`` (a non-negative integer), ``choice`` (one of ``choices``) or ``flag`` (0 or 1).
        doc: meaning and unit.
        choices: admitted values of a ``choice``.
        default: used when a case leaves it out; ``None`` makes it mandatory.
        quiet: left out of the case id at its default. For a parameter an op gains later: the ids of earlier cases, the
            draws seeded by them and the records under them stay what they were.
    """

    name: str
    kind: Literal["axis", "choice", "flag"]
    doc: str
    choices: tuple[str, ...] = ()
    default: ParamValue | None = None
    quiet: bool = False

    def validate(self, op: str, value: ParamValue) -> ParamValue:
        """Return ``value`` in canonical form or raise CaseError."""
        if self.kind == "choice":
            if value not in self.choices:
                raise CaseError(f"{op}: {self.name}={value!r} is not one of {', '.join(self.choices)}")
            return value
        if isinstance(value, str) and re.fullmatch(r"\d+", value):
            value = int(value)
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise CaseError(f"{op}: {self.name}={value!r} must be a non-negative integer")
        if self.kind == "flag" and value not in (0, 1):
            raise CaseError(f"{op}: {self.name}={value!r} must be 0 or 1")
        return value


@dataclass(frozen=True, slots=True)
class Case:
    """An op with every parameter fixed. Build it with ``Op.case`` so that values are validated.

    ``id`` is stable and readable; ``hash`` is the short form shown in reports and taken by ``vbench repro``.
    ``unsaid`` names the quiet parameters at their default, which the id leaves out.
    """

    op: str
    params: tuple[tuple[str, ParamValue], ...]
    seed: int = 0
    unsaid: tuple[str, ...] = ()

    def __getitem__(self, name: str) -> ParamValue:
        for key, value in self.params:
            if key == name:
                return value
        raise CaseError(f"{self.op} has no parameter {name!r}")

    def axis(self, name: str) -> int:
        """The integer parameter ``name`` (an axis or a flag)."""
        value = self[name]
        if not isinstance(value, int):
            raise CaseError(f"{self.op}: {name} is not an integer parameter")
        return value

    def text(self, name: str) -> str:
        """The choice parameter ``name``."""
        value = self[name]
        if not isinstance(value, str):
            raise CaseError(f"{self.op}: {name} is not a choice parameter")
        return value

    @property
    def id(self) -> str:
        inner = [f"{k}={v}" for k, v in self.params if k not in self.unsaid]
        if self.seed:
            inner.append(f"seed={self.seed}")
        return f"{self.op}[{','.join(inner)}]"

    @property
    def hash(self) -> str:
        return case_hash(self.id)


def case_hash(case_id: str) -> str:
    """The short form of a case id, as reports show it and ``vbench repro`` takes it."""
    return hashlib.sha256(case_id.encode()).hexdigest()[:10]


@dataclass(frozen=True, slots=True)
class Output:
    """One output tensor of an op: its name and, as text, its dtype and shape in terms of the case's parameters."""

    name: str
    dtype: str
    shape: str


@dataclass(frozen=True, slots=True)
class Numerics:
    """How a kernel computes, declared by it and stored in each record; the error budget is derived from it.

    Args:
        accumulate: unit of the sums: ``fp64``, ``fp32`` (IEEE, any order), ``tensor_core`` (truncating adder),
            ``tf32`` (operands rounded to 11 significant bits), ``fp16`` or ``bf16`` (sums rounded to that type), or
            ``int32`` (exact sums of small integers).
        operand_roundings: for each extra rounding an operand suffers before the product, the dtype it is rounded to.
            Example: weights decoded to a product that does not fit bf16 and is rounded to it -> ``("bf16",)``.
        probabilities: attention only: dtype the softmax weights are rounded to before P@V; in the backward also the
            weights before P^T dO, and the score gradients before dS K and dS^T Q.
        own_forward: attention backward only: takes softmax weights and output from a forward of its own, so that the
            rounding of the given ``out`` and ``lse`` separates it from the oracle, which reads them.
        stores: for each rounding that a result suffers on its way to the next step of the same op (the sum of a linear
            layer before bias or activation reads it, the tensors between the layers of a block), the dtype.
            Example: F.linear in bf16, then gelu -> ``("bf16",)``.
    """

    accumulate: str = "fp32"
    operand_roundings: tuple[str, ...] = ()
    probabilities: str = "fp32"
    own_forward: bool = False
    stores: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Expected:
    """What the oracle says of one output.

    Args:
        value: torch tensor. float64 with a budget, or the exact tensor in the output's own dtype without.
        budget: float64 tensor of the same shape, largest admissible absolute error per element; ``None`` demands
            bitwise equality (NaN payloads aside, +0 and -0 apart only for packed bytes).
        take: picks from the kernel's full output the part ``value`` speaks of (sampled rows); ``None`` takes all.
        dtype: torch dtype the kernel's output must have.
        shape: shape the kernel's full output must have.
        degenerate: why a trivial kernel may be right on this case (``""`` where none may be).
    """

    value: Any
    budget: Any | None
    dtype: Any
    shape: tuple[int, ...]
    take: Callable[[Any], Any] | None = None
    degenerate: str = ""


@dataclass(frozen=True, slots=True)
class Law:
    """What must hold between two runs of a kernel, whatever the right answer is.

    An entry point of group ``vbench.laws``, named for an op, is a function ``(case, inputs) -> Iterable[Law]`` that
    gives those that apply to the case.

    Args:
        name: stable code, shown where it is broken.
        case, inputs: the second run's; the first is the case that was checked.
        broken: ``(outputs of the first, outputs of the second) -> str``: what does not hold, ``""`` if it does.
            ``None``: the second run must keep to the oracle of its inputs, within the budget of the kernel's numerics.
        declared: holds only for kernels that declare this attribute true; ``""``: for every kernel.
        numerics: holds only for kernels whose declared numerics it says yes to; ``None``: for every kernel.
    """

    name: str
    case: Case
    inputs: dict[str, Any]
    broken: Callable[[Mapping[str, Any], Mapping[str, Any]], str] | None
    declared: str = ""
    numerics: Callable[[Numerics], bool] | None = None

    def binds(self, kernel: Any) -> bool:
        """Whether a ``vbench.backend.Kernel`` is held to it, by what it declares."""
        if self.declared and not getattr(kernel, self.declared, False):
            return False
        return self.numerics is None or self.numerics(kernel.numerics)


@dataclass(frozen=True, slots=True)
class Op:
    """A named meaning.

    Args:
        name: as in case ids.
        summary: one sentence, with the formula.
        params: in id order.
        outputs: what a kernel writes.
        inputs: ``module:function(case, device) -> dict[str, Any]`` makes the inputs, deterministically.
        oracle: ``module:function(case, inputs, numerics, max_rows) -> dict[str, Expected]``; ``max_rows`` limits the
            work to that many sampled rows (``None``: all).
        reject: returns (rule, message) for cases that have no meaning for any kernel, else ``None``; no torch.
        metrics: ``module:function(case, inputs, outputs, expected) -> dict[str, float]``: further figures.
        metrics_when_timed: they mean something for a timed case too, where the oracle may give sampled rows only.
        flops: floating-point operations of the mathematics (not of an implementation).
        operands: narrowest operands an implementation may multiply; names the datasheet's rate for ``flops``.
        bytes: the fewest bytes that must cross device memory: each input read once, each output written once.
        host_bytes: the fewest bytes that must come over the host's link; ``None`` for an op whose inputs lie on the
            device.
    """

    name: str
    summary: str
    params: tuple[Param, ...]
    outputs: tuple[Output, ...]
    inputs: str
    oracle: str
    reject: Callable[[Case], tuple[str, str] | None] = field(default=lambda case: None)
    metrics: str | None = None
    metrics_when_timed: bool = False
    flops: Callable[[Case], int] | None = None
    operands: Literal["16bit", "8bit"] = "16bit"
    bytes: Callable[[Case], int] | None = None
    host_bytes: Callable[[Case], int] | None = None

    def case(self, *, seed: int = 0, **values: ParamValue) -> Case:
        """Build a validated case; parameters left out take their default.

        Raises:
            CaseError: unknown parameter, missing parameter without default, or a value out of range.
        """
        known = {p.name for p in self.params}
        for name in values:
            if name not in known:
                raise CaseError(f"{self.name} has no parameter {name!r}; it has {', '.join(sorted(known))}")
        filled: dict[str, ParamValue] = {}
        for p in self.params:
            value = values.get(p.name, p.default)
            if value is None:
                raise CaseError(f"{self.name}: parameter {p.name!r} is missing")
            filled[p.name] = p.validate(self.name, value)
        unsaid = tuple(p.name for p in self.params if p.quiet and filled[p.name] == p.default)
        return Case(self.name, tuple(filled.items()), seed, unsaid)

    def parse(self, case_id: str) -> Case:
        """The case whose ``id`` is ``case_id``.

        Raises:
            CaseError: not an id of this op.
        """
        match = re.fullmatch(r"(\w+)\[(.*)\]", case_id)
        if match is None or match.group(1) != self.name:
            raise CaseError(f"{case_id!r} is not a case id of {self.name}: expected {self.name}[name=value,...]")
        values: dict[str, ParamValue] = {}
        seed = 0
        for part in filter(None, match.group(2).split(",")):
            name, sep, value = part.partition("=")
            if not sep:
                raise CaseError(f"{case_id!r}: {part!r} is not name=value")
            if name == "seed":
                seed = int(value)
            else:
                values[name] = value
        return self.case(seed=seed, **values)


@dataclass(frozen=True, slots=True)
class BenchCase:
    """A case to be timed.

    Args:
        case: what.
        source: where the shape comes from (model and file), shown in reports.
        effort: smallest ``--effort`` that includes it.
        device: ``cuda``, or ``any`` when timing it on a CPU means something too.
        first: kernels that are taken before the op's others where an effort's limit of rows leaves some out: both sides
            of the ratios that the case is there for.
        later: kernels that only effort ``full`` times on this case, as they cost more than they tell.

    Kernels are named ``backend[variant]``, or ``backend`` for all its variants.
    """

    case: Case
    source: str
    effort: Literal["quick", "standard", "full"] = "standard"
    device: Literal["cuda", "any"] = "cuda"
    first: tuple[str, ...] = ()
    later: tuple[str, ...] = ()


def size_class(value: int) -> str:
    """What a compiler may specialise an integer on: ``zero``, ``one``, ``sixteens`` (a multiple) or ``other``."""
    return "zero" if value == 0 else "one" if value == 1 else "sixteens" if value % 16 == 0 else "other"


@dataclass(frozen=True, slots=True)
class Frame:
    """Cases that need (nearly) one compilation: some parameters fixed, each remaining size within its class.

    Args:
        fixed: parameter -> value.
        sizes: axis -> ``size_class`` of its value.
    """

    fixed: tuple[tuple[str, ParamValue], ...]
    sizes: tuple[tuple[str, str], ...]

    @staticmethod
    def of(op: Op, case: Case, names: Collection[str]) -> Frame:
        """The frame around ``case`` with the parameters ``names`` fixed."""
        sizes = ((p.name, size_class(case.axis(p.name))) for p in op.params if p.kind == "axis" and p.name not in names)
        return Frame(tuple((name, case[name]) for name in names), tuple(sizes))


@dataclass(frozen=True, slots=True)
class Generated:
    """Check cases drawn from a Hypothesis strategy.

    Args:
        strategy: ``module:function() -> SearchStrategy[Case]``; with ``frame`` it also takes a ``Frame`` to keep to.
        count: examples at effort quick, standard, full.
        frame: the parameters that a kernel is compiled for, so that a search of many cases can be kept to few frames.
        device: ``cuda`` for cases too large for an interpreter; only ``vbench fuzz`` draws those.
    """

    strategy: str
    count: tuple[int, int, int]
    frame: tuple[str, ...] = ()
    device: Literal["cuda", "any"] = "any"


@dataclass(frozen=True, slots=True)
class Suite:
    """Which cases to try. Fixed check cases are the ones no random draw may be trusted to hit.

    Args:
        native: those of ``checks`` that have too many elements for an interpreter or a simulator: they are there for
            their metrics, and smaller ones of each kind beside them.
        compiles: it also holds every configuration that the backends compile to (the ahead-of-time gate).
        searched: strategies that only ``vbench fuzz`` draws from, besides ``generated``.
        regressions: ``package:file`` of cases that once failed, tried before all others (``vbench.regressions``).
        waivers: ``package:file`` of known failures (``vbench.waivers``).
    """

    name: str
    summary: str
    checks: tuple[Case, ...] = ()
    generated: tuple[Generated, ...] = ()
    benches: tuple[BenchCase, ...] = ()
    compiles: bool = False
    searched: tuple[Generated, ...] = ()
    native: frozenset[Case] = frozenset()
    regressions: str = ""
    waivers: str = ""


def resolve(reference: str) -> Any:
    """Import ``module:attribute``. Raises ImportError or AttributeError as Python does."""
    module, _, attribute = reference.partition(":")
    return getattr(importlib.import_module(module), attribute)
