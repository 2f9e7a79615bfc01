"""The oracle of ``train_step`` and ``generate`` as kernels of backend ``torch``: eager, everything on the device."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vbench.backend import Device, Launch
from vbench.errors import Unsupported
from vbench.reference.model import SAMPLED, generate, train_step
from vbench.spec import Case, Numerics

#: It is what is compared with.
EXACT = Numerics()


@dataclass(frozen=True, slots=True)
class EagerModel:
    """The model made anew for each launch; ``gpu_bytes`` is not heeded."""

    case: Case
    numerics: Numerics = EXACT
    deterministic: bool = True
    graph_safe: bool = False

    @property
    def produces(self) -> tuple[str, ...]:
        return ("losses", *SAMPLED) if self.case.op == "train_step" else ("logits",)

    def bind(self, inputs: Mapping[str, Any], out: Mapping[str, Any]) -> Launch:
        """See ``vbench.backend.Kernel.bind``."""
        recipe = inputs["model"]
        if self.case.op == "train_step":
            return lambda: train_step(recipe.make(recipe.device), recipe, inputs)
        return lambda: generate(recipe.decoded(), inputs)


def make(case: Case, variant: str, device: Device) -> EagerModel:
    """Factory of both ops.

    Raises:
        Unsupported: ``unknown_variant``.
    """
    if variant:
        raise Unsupported("unknown_variant", f"{case.op} has no variant {variant!r}; leave it out")
    return EagerModel(case)
