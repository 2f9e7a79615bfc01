"""How a control is written: one function that launches honestly or, where ``wrong``, with its fault."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from vbench.backend import Device, Kernel, Launch
from vbench.control import HONEST, Control
from vbench.errors import Unsupported
from vbench.reference.fp4 import dequantize
from vbench.reference.linear import activate
from vbench.reference.ops import OPS
from vbench.spec import Case, Numerics, Op

BY_NAME: dict[str, Op] = {op.name: op for op in OPS}


@dataclass(slots=True)
class Setting:
    """What a control is bound to, and what it keeps between launches."""

    case: Case
    inputs: Mapping[str, Any]
    out: Mapping[str, Any]
    wrong: bool
    #: Lives as long as the kernel object, over several ``bind``.
    memory: dict[Any, Any]
    calls: int = 0


#: Computes all outputs of a launch, or writes them itself and returns ``None``.
Body = Callable[[Setting], Mapping[str, Any] | None]


@dataclass(frozen=True, slots=True)
class Built:
    """A control with its code.

    Args:
        returns: give the outputs as tensors of the kernel's own; else they are copied into the given ones.
        declares: attributes of the kernel; ``declares_wrongly`` those that only the wrong one has.
    """

    control: Control
    body: Body
    returns: bool
    declares: Mapping[str, Any]
    declares_wrongly: Mapping[str, Any]


@dataclass(slots=True)
class ControlKernel:
    """A ``vbench.backend.Kernel`` made of a Built."""

    built: Built
    case: Case
    wrong: bool
    numerics: Numerics
    produces: tuple[str, ...]
    deterministic: bool
    batch_invariant: bool
    graph_safe: bool
    memory: dict[Any, Any] = field(default_factory=dict)

    def bind(self, inputs: Mapping[str, Any], out: Mapping[str, Any]) -> Launch:
        """See ``vbench.backend.Kernel.bind``; all work is in the launch."""
        setting = Setting(self.case, inputs, out, self.wrong, self.memory)

        def launch() -> Mapping[str, Any] | None:
            setting.calls += 1
            found = self.built.body(setting)
            if found is None or self.built.returns:
                return found
            for name, value in found.items():
                out[name].copy_(value)
            return None

        return launch


class Register:
    """Collects the controls of one corpus."""

    def __init__(self) -> None:
        self.built: dict[str, Built] = {}

    def __call__(
        self,
        op: Op,
        *cases: Mapping[str, int | str],
        twin_cases: tuple[Mapping[str, int | str], ...] = (),
        family: str,
        oracle: str,
        fault: str,
        imitates: str = "",
        needs: Literal["cpu", "cuda"] = "cpu",
        kind: Literal["check", "time"] = "check",
        deadline_s: float = 60.0,
        or_by: tuple[str, ...] = (),
        raises: tuple[str, ...] = (),
        returns: bool = False,
        declares: Mapping[str, Any] | None = None,
        declares_wrongly: Mapping[str, Any] | None = None,
        name: str = "",
    ) -> Callable[[Body], Body]:
        """Register the decorated function as a control; see ``Control`` and ``Built``."""
        made, for_twin = (tuple(op.case(**v) for v in values) for values in (cases, twin_cases or cases))  # type: ignore[arg-type]  # a seed is an int

        def register(body: Body) -> Body:
            key = name or body.__name__
            if key in self.built:
                raise ValueError(f"two controls are called {key}")
            control = Control(
                key, family, op.name, made, for_twin, oracle, fault, imitates, needs, kind, deadline_s, or_by, raises
            )
            self.built[key] = Built(control, body, returns, declares or {}, declares_wrongly or {})
            return body

        return register

    @property
    def controls(self) -> tuple[Control, ...]:
        return tuple(b.control for b in self.built.values())

    def factory(self, ops: Mapping[str, Op]) -> Callable[[Case, str, Device], Kernel]:
        """The KernelFactory of all of them."""

        def make(case: Case, variant: str, device: Device) -> Kernel:
            name = variant.removesuffix(HONEST)
            built = self.built.get(name)
            if built is None:
                raise Unsupported("unknown_variant", f"no control {name!r}")
            if built.control.needs == "cuda" and device != "cuda":
                raise Unsupported("needs_cuda", f"{name} needs a GPU")
            wrong = not variant.endswith(HONEST)
            attributes = {
                "numerics": Numerics("fp32"),
                "produces": tuple(o.name for o in ops[case.op].outputs),
                "deterministic": True,
                "batch_invariant": False,
                "graph_safe": device == "cuda",
                **built.declares,
                **(built.declares_wrongly if wrong else {}),
            }
            return ControlKernel(built, case, wrong, **attributes)

        return make


def weight32(s: Setting) -> Tensor:
    """The decoded weight [n, k] in float32."""
    return dequantize(s.case.text("fmt"), dict(s.inputs), torch.float32)


def worst_order_product(a: Tensor, b: Tensor) -> Tensor:
    """a [..., m, k] @ b [..., k, n] in float32, each sum in ascending order of its terms: an honest kernel's worst.

    A budget for sums in any order must admit it: partial sums reach half the sum of magnitudes, so that it errs by
    about a tenth of LAMBDA sqrt(k) u at every k, where blocked sums need a thousandth at k = 14336 (docs/adr/0025).
    """
    rows = []
    for row in a.unbind(-2):
        terms = (row[..., :, None] * b).sort(dim=-2).values
        total = torch.zeros_like(terms[..., 0, :])
        for term in terms.unbind(-2):
            total = total + term
        rows.append(total)
    return torch.stack(rows, dim=-2)


def finish(s: Setting, sums: Tensor) -> Tensor:
    """float32 sums [m, n] -> bias, activation, and one rounding to x's dtype."""
    if "bias" in s.inputs:
        sums = sums + s.inputs["bias"].float()
    return activate(s.case.text("act"), sums).to(s.inputs["x"].dtype)


def linear(s: Setting, weight: Tensor | None = None, x: Tensor | None = None) -> Tensor:
    """y [m, n] of ``fp4_linear`` by an ordinary float32 product."""
    x = s.inputs["x"].float() if x is None else x
    return finish(s, x @ (weight32(s) if weight is None else weight).T)
