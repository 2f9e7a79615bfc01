"""The contract between the harness and an implementation. Standard library only.

A backend is an object found through the entry-point group ``vbench.backends``. Importing its module must be cheap:
no torch, no DSL, nothing printed. The DSL is imported inside kernel factories, in the worker process.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from vbench.errors import DataError, Unsupported
from vbench.spec import Case, Numerics

Role = Literal["own", "peer", "subject"]
Device = Literal["cpu", "cuda"]
#: Where a worker stands: on a device, or in the compiler alone, with nothing to run the result on.
Place = Literal["cpu", "cuda", "compile"]
Effort = Literal["quick", "standard", "full"]
#: The arithmetic unit a kernel declares: warp-group or warp matrix instructions, ordinary FMAs, or none that matters.
Unit = Literal["hgmma", "qgmma", "igmma", "hmma", "qmma", "imma", "ffma", "none"]

#: A bound kernel. Returns ``None`` when it wrote into ``out``, else the outputs by name.
Launch = Callable[[], Mapping[str, Any] | None]


@dataclass(frozen=True, slots=True)
class Availability:
    """Whether a backend can run on a device, and how.

    Args:
        usable: can kernels be checked here.
        mode: ``native`` (real hardware), ``interpreted`` or ``simulated`` (meaning only; never timed), ``compiler``
            (asked for the place ``compile``: code is made and read, none is run).
        reason: why not usable, or why not timed; a sentence that says what to do.
        versions: names and versions of what it stands on, for the record's environment.
    """

    usable: bool
    mode: Literal["native", "interpreted", "simulated", "compiler", "none"] = "native"
    reason: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)


class Kernel(Protocol):
    """An implementation of one op for one case.

    Attributes:
        numerics: how it computes; the error budget follows from it.
        produces: outputs it gives. Own kernels give all of the op's; a peer may give fewer.
        deterministic: two runs on the same inputs agree bitwise.
        graph_safe: optional, default True; False where a CUDA graph cannot capture the launch (timed by wall clock).
        plan: optional; what it chose for this case among ways to compute it (path, tile, warps), a dataclass of plain
            values, frozen once ``bind`` returned. Records keep it with its digest, so that two times can be told to be
            of one choice. Nothing may be chosen later, by timing least of all.
    """

    @property
    def numerics(self) -> Numerics: ...

    @property
    def produces(self) -> tuple[str, ...]: ...

    @property
    def deterministic(self) -> bool: ...

    def bind(self, inputs: Mapping[str, Any], out: Mapping[str, Any]) -> Launch:
        """Set-up outside the clock: packing, allocation, compilation.

        Args:
            inputs: as made by the op's input generator, on the device. Must not be changed.
            out: poisoned tensors of the right shape, dtype and device, one for each output. Write into them and
                return ``None`` from the launch, or leave them and return your own.

        Raises:
            vbench.errors.Unsupported: an input this kernel does not take.
        """
        ...


def refuse_beyond(case: Case, known: Collection[str]) -> None:
    """Refuse a case that sets a parameter of which a kernel knows nothing; for the head of a KernelFactory.

    An op may gain parameters (``vbench.spec.Param.quiet``). At its default such a one changes nothing; a kernel written
    before it must not ignore another value in silence.

    Raises:
        vbench.errors.Unsupported: ``parameter_not_taken``.
    """
    for name, value in case.params:
        if name not in known and name not in case.unsaid:
            raise Unsupported("parameter_not_taken", f"{name}={value}: this kernel does not take {name}; leave it out")


#: ``(case, variant, device) -> Kernel``; raises Unsupported for a case it does not take, before any launch.
KernelFactory = Callable[[Case, str, Device], Kernel]


class TunableFactory(Protocol):
    """A KernelFactory of an op for which ``Backend.options`` names options: takes them as texts, none by default."""

    def __call__(self, case: Case, variant: str, device: Device, **options: str) -> Kernel:
        """Raises Unsupported for an option's value it does not take, too."""
        ...


@dataclass(frozen=True, slots=True)
class Cubin:
    """What a compiler made for one configuration; the harness reads the machine code itself.

    Args:
        code: the cubin (ELF) of one kernel and the functions it calls.
        dynamic_shared_bytes: shared memory the launch asks for beside what the code declares.
        figures: what the machine code does not tell (layout conversions in the IR, kinds of division in PTX), by name,
            for ``Configuration.bounds``.
    """

    code: bytes
    dynamic_shared_bytes: int = 0
    figures: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Configuration:
    """One compilation that the ahead-of-time gate must see succeed, and what the machine code must be like.

    Args:
        op: the operation it serves.
        kernel: the compiled function's name.
        arch: compute capability times ten (80, 90, ...).
        unit: where the products are to run. A matrix unit must occur; ``ffma`` must occur with no matrix instruction
            beside it; ``none`` allows no matrix instruction.
        parameters: what tells it from the kernel's other configurations (tile, dtype), in id order.
        compile: makes it; anything it raises but ``Unsupported`` is the outcome COMPILE_ERROR. Needs no GPU.
        instructions: opcodes that must occur, as prefixes: ``UTMALDG``, ``USETMAXREG``, ``LDG.E.128``.
        bounds: name -> (least, most). Names: a figure of the ``Cubin``, ``total.OPCODE``, ``loop.OPCODE`` (inside the
            innermost loops that multiply), ``loop_spills``, ``loop_spill_share``.
        spill_bytes_allowed: local memory a thread may have, bytes; 0 but for a reason.
        spill_reason: why, and where that is written down; shown in the record.
        effort: smallest ``--effort`` that includes it; ``full`` holds every one.

    Raises:
        DataError: an allowance without a reason or the other way round, or a parameter that an id cannot hold.
    """

    op: str
    kernel: str
    arch: int
    unit: Unit
    parameters: Mapping[str, int | str]
    compile: Callable[[], Cubin]
    instructions: tuple[str, ...] = ()
    bounds: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    spill_bytes_allowed: int = 0
    spill_reason: str = ""
    effort: Effort = "full"

    def __post_init__(self) -> None:
        if bool(self.spill_bytes_allowed) != bool(self.spill_reason):
            raise DataError(f"{self.case_id}: spill_bytes_allowed and spill_reason go together")
        for name, value in self.parameters.items():
            if not re.fullmatch(r"[\w.+-]+", str(value)) or not re.fullmatch(r"\w+", name):
                raise DataError(f"{self.op} {self.kernel}: {name}={value} cannot stand in a case id")

    @property
    def case_id(self) -> str:
        """The id of its record: ``compile[op=...,kernel=...,arch=...,unit=...,PARAMETER=VALUE,...]``."""
        head = {"op": self.op, "kernel": self.kernel, "arch": self.arch, "unit": self.unit}
        return "compile[" + ",".join(f"{k}={v}" for k, v in (head | dict(self.parameters)).items()) + "]"


class Backend(Protocol):
    """What an entry point of group ``vbench.backends`` must name (an instance).

    Attributes:
        name: equals the entry point's name.
        role: ``own`` (a wrong result fails the run), ``peer`` (what a user would pick instead) or ``subject``
            (under test on purpose).
        summary: one line for ``vbench list``.
        ops: op name -> ``module:factory`` of a KernelFactory.
        variants: op name -> variant names; an op left out has the single variant ``""``.
        environment: variables set before the worker's first import, per place (interpreter switches).
        timed: optional, default True; False for a backend whose speed means nothing (the oracle).
        options: optional, op name -> names of the options its factory takes as keyword arguments, for comparing them
            (``vbench ab triton triton@num_warps=8``).
        configurations: optional, ``module:function() -> Iterable[Configuration]``: what it compiles to, for the
            ahead-of-time gate. Only a backend that has it is probed for the place ``compile``.
    """

    @property
    def name(self) -> str: ...

    @property
    def role(self) -> Role: ...

    @property
    def summary(self) -> str: ...

    @property
    def ops(self) -> Mapping[str, str]: ...

    @property
    def variants(self) -> Mapping[str, tuple[str, ...]]: ...

    @property
    def environment(self) -> Mapping[str, Mapping[str, str]]: ...

    def probe(self, device: Place) -> Availability:
        """Say what is usable on ``device``. Runs in the worker; may import the DSL; must not raise."""
        ...


@dataclass(frozen=True, slots=True)
class DeclaredBackend:
    """A Backend whose probe is a function named ``module:function(device) -> Availability``.

    The default suits a backend that needs torch and nothing else.
    """

    name: str
    role: Role
    summary: str
    ops: Mapping[str, str]
    probe_function: str = "vbench.environment:probe_torch"
    variants: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    environment: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    timed: bool = True
    options: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    configurations: str = ""

    def probe(self, device: Place) -> Availability:
        from vbench.spec import resolve

        result = resolve(self.probe_function)(device)
        assert isinstance(result, Availability)
        return result
