"""The contract between the harness and an implementation. Standard library only.

A backend is an object found through the entry-point group ``vbench.backends``. Importing its module must be cheap:
no torch, no DSL, nothing printed. The DSL is imported inside kernel factories, in the worker process.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from vbench.errors import Unsupported
from vbench.spec import Case, Numerics

Role = Literal["own", "peer", "subject"]
Device = Literal["cpu", "cuda"]

#: A bound kernel. Returns ``None`` when it wrote into ``out``, else the outputs by name.
Launch = Callable[[], Mapping[str, Any] | None]


@dataclass(frozen=True, slots=True)
class Availability:
    """Whether a backend can run on a device, and how.

    Args:
        usable: can kernels be checked here.
        mode: ``native`` (real hardware), ``interpreted`` or ``simulated`` (meaning only; never timed).
        reason: why not usable, or why not timed; a sentence that says what to do.
        versions: names and versions of what it stands on, for the record's environment.
    """

    usable: bool
    mode: Literal["native", "interpreted", "simulated", "none"] = "native"
    reason: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)


class Kernel(Protocol):
    """An implementation of one op for one case.

    Attributes:
        numerics: how it computes; the error budget follows from it.
        produces: outputs it gives. Own kernels give all of the op's; a peer may give fewer.
        deterministic: two runs on the same inputs agree bitwise.
        graph_safe: optional, default True; False where a CUDA graph cannot capture the launch (timed by wall clock).
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


class Backend(Protocol):
    """What an entry point of group ``vbench.backends`` must name (an instance).

    Attributes:
        name: equals the entry point's name.
        role: ``own`` (a wrong result fails the run), ``peer`` (what a user would pick instead) or ``subject``
            (under test on purpose).
        summary: one line for ``vbench list``.
        ops: op name -> ``module:factory`` of a KernelFactory.
        variants: op name -> variant names; an op left out has the single variant ``""``.
        environment: variables set before the worker's first import, per device (interpreter switches).
        timed: optional, default True; False for a backend whose speed means nothing (the oracle).
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

    def probe(self, device: Device) -> Availability:
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

    def probe(self, device: Device) -> Availability:
        from vbench.spec import resolve

        result = resolve(self.probe_function)(device)
        assert isinstance(result, Availability)
        return result
