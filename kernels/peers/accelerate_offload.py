"""Peer ``accelerate``: the given module with ``cpu_offload``, as its documentation has it.

It takes no budget: one module with weights of its own is on the device at a time. Its offload hooks put every parameter
on the meta device after each forward, so that a backward leaves no gradient anywhere: ``train_step`` is refused for
that, once a backward has shown it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vbench.backend import Availability, DeclaredBackend, Device, Launch, refuse_beyond
from vbench.errors import Unsupported
from vbench.spec import Case, Numerics


def probe(device: Device) -> Availability:
    """See ``vbench.backend.Backend.probe``."""
    from vbench.kernels.peers.optional import probe_package

    return probe_package("accelerate", device)


BACKEND = DeclaredBackend(
    name="accelerate",
    role="peer",
    summary="accelerate: cpu_offload, weights fetched module by module when they are used",
    ops={
        "train_step": "vbench.kernels.peers.accelerate_offload:make",
        "generate": "vbench.kernels.peers.accelerate_offload:make",
    },
    probe_function="vbench.kernels.peers.accelerate_offload:probe",
)


#: Eager torch with weights that come later: bitwise.
EXACT = Numerics()


@dataclass(frozen=True, slots=True)
class Offloaded:
    """``cpu_offload(model, execution_device)``."""

    case: Case
    numerics: Numerics = EXACT
    deterministic: bool = True
    graph_safe: bool = False

    @property
    def produces(self) -> tuple[str, ...]:
        return ("losses", "grad_first", "grad_last", "grad_norm") if self.case.op == "train_step" else ("logits",)

    def bind(self, inputs: Mapping[str, Any], out: Mapping[str, Any]) -> Launch:
        """Makes the module on the host and hooks it.

        Raises:
            Unsupported: ``no_gradients``: a backward ran, and left none.
        """
        import torch
        from accelerate import cpu_offload

        from vbench.kernels.peers.model_steps import generate, limited, train_step

        recipe, device = inputs["model"], inputs["ids"].device
        gpu_bytes = self.case.axis("gpu_bytes")
        base = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
        train = self.case.op == "train_step"
        model = recipe.make("cpu")
        model.requires_grad_(train)
        cpu_offload(model, execution_device=device)

        def launch() -> Mapping[str, Any]:
            with limited(device, base, gpu_bytes):
                return train_step(model, model, recipe, inputs) if train else generate(model, inputs)

        lost = sorted(name for name, value in launch().items() if value is None)
        if lost:
            raise Unsupported("no_gradients", f"the backward left no {', '.join(lost)}; train without this offload")
        return launch


def make(case: Case, variant: str, device: Device) -> Offloaded:
    """Factory of both ops.

    Raises:
        Unsupported: ``unknown_variant``; ``parameter_not_taken``; ``codec``: it moves weights as they are.
    """
    from vbench.kernels.peers.model_steps import PARAMETERS

    if variant:
        raise Unsupported("unknown_variant", f"{case.op} has no variant {variant!r}; leave it out")
    refuse_beyond(case, PARAMETERS[case.op])
    if case.op == "generate" and case.text("codec") != "raw":
        raise Unsupported("codec", "accelerate moves weights as they are; codec=raw")
    return Offloaded(case)
