"""The contract of the self-attack corpus: kernels wrong on purpose, each beside an honest twin. Standard library only.

A corpus is an object found through the entry-point group ``vbench.controls``. It is a backend that no run takes up;
``vbench selftest`` sends its kernels the way of every other backend's, in worker processes, so that what catches them
is what would catch a user's kernel.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from vbench.backend import Availability, Place, Role
from vbench.spec import Case, Op

#: Appended to a control's name: its honest twin.
HONEST = "+honest"


@dataclass(frozen=True, slots=True)
class Control:
    """One planted fault.

    Args:
        name: of the variant; the twin's is ``name + HONEST``.
        family: kind of fault.
        op: the operation it pretends to compute.
        cases: it is caught if one of them catches it.
        twin_cases: all of which the twin must pass.
        oracle: which of ``vbench.check.ORACLES`` is meant to catch it, or ``isolation`` (it takes its process down, or
            raises). It is caught only by a finding of that kind (``vbench.attack.FINDINGS``).
        or_by: oracles that may see it instead: a race may win the first launch and lose a later one.
        raises: names of the exceptions by which ``isolation`` is to see it; any other is not its fault.
        fault: what is wrong, in a sentence.
        imitates: the real bug, as ``owner/repository#issue``.
        needs: where it can run.
        kind: ``time`` for a fault that only timing meets.
        deadline_s: of each of its jobs.
    """

    name: str
    family: str
    op: str
    cases: tuple[Case, ...]
    twin_cases: tuple[Case, ...]
    oracle: str
    fault: str
    imitates: str = ""
    needs: Literal["cpu", "cuda"] = "cpu"
    kind: Literal["check", "time"] = "check"
    deadline_s: float = 60.0
    or_by: tuple[str, ...] = ()
    raises: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Corpus:
    """Controls as the variants of one backend.

    Args:
        factory: ``module:function``, a ``vbench.backend.KernelFactory`` that knows every control and its twin.
        defines: operations that exist for these controls alone.
    """

    name: str
    summary: str
    controls: tuple[Control, ...]
    factory: str
    defines: tuple[Op, ...] = ()
    role: Role = "own"
    environment: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    timed: bool = True

    @property
    def ops(self) -> Mapping[str, str]:
        return {control.op: self.factory for control in self.controls}

    @property
    def variants(self) -> Mapping[str, tuple[str, ...]]:
        return {op: tuple(c.name + end for c in self.controls if c.op == op for end in ("", HONEST)) for op in self.ops}

    def probe(self, device: Place) -> Availability:
        return Availability(usable=device != "compile", reason="" if device != "compile" else "nothing to compile")
