"""The kernels ``train_step`` and ``generate``: the given module, virtualised, under the case's budget."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vbench.backend import Device, Launch, refuse_beyond
from vbench.errors import Unsupported
from vbench.kernels.tiers.budget import Budget, BudgetError
from vbench.kernels.tiers.units import ALIGN_BYTES
from vbench.kernels.virtual.linears import find_linears
from vbench.kernels.virtual.virtualize import Plan, virtualize
from vbench.spec import Case, Numerics

SIZES = ("family", "dtype", "layers", "width", "heads", "inner", "vocab", "batch", "seq", "gpu_bytes")
PARAMETERS = {"train_step": SIZES, "generate": (*SIZES, "new", "codec")}
OUTPUTS = {"train_step": ("losses", "grad_first", "grad_last", "grad_norm"), "generate": ("logits",)}
#: No arithmetic of the model's is changed but for the weights that a codec names.
EXACT = Numerics()


class Recipe(Protocol):
    """How the op's inputs describe the model; ``make`` in ``bind`` only."""

    @property
    def codec(self) -> str: ...

    def make(self, home: str) -> nn.Module: ...

    def sampled(self, output: str) -> str: ...


def make(case: Case, variant: str, device: Device) -> ModelKernel:
    """Factory of both ops.

    Raises:
        Unsupported: ``unknown_variant``; ``parameter_not_taken``.
    """
    if variant:
        raise Unsupported("unknown_variant", f"{case.op} has no variant {variant!r}; leave it out")
    refuse_beyond(case, PARAMETERS[case.op])
    return ModelKernel(case)


@contextmanager
def limited(device: torch.device, base_bytes: int, gpu_bytes: int) -> Iterator[None]:
    """Let torch's allocator have ``gpu_bytes`` beyond ``base_bytes`` meanwhile; no limit on a CPU, or for 0.

    A byte more is ``torch.OutOfMemoryError``: an emulated smaller card, of which the driver knows nothing.
    """
    if device.type != "cuda" or not gpu_bytes:
        yield
        return
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, (base_bytes + gpu_bytes) / total), device)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)


@dataclass(frozen=True, slots=True)
class ModelKernel:
    """Bitwise what eager torch gives with everything on the device."""

    case: Case
    numerics: Numerics = EXACT
    deterministic: bool = True
    graph_safe: bool = False

    @property
    def produces(self) -> tuple[str, ...]:
        return OUTPUTS[self.case.op]

    def bind(self, inputs: Mapping[str, Any], out: Mapping[str, Any]) -> Launch:
        """Makes the module on the host where there is a budget, virtualises it, and runs it twice to learn its order.

        The launch owns the module and returns tensors of its own.

        Raises:
            Unsupported: ``over_budget``: it does not fit; by how many bytes.
        """
        case, recipe = self.case, inputs["model"]
        ids: Tensor = inputs["ids"]
        device, budget_bytes = ids.device, case.axis("gpu_bytes")
        base = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
        model = recipe.make("cpu" if budget_bytes else device.type)
        train = case.op == "train_step"
        model.requires_grad_(train)
        plan = _plan(model, recipe, base + budget_bytes if budget_bytes else 0, device)
        try:
            handle = virtualize(model, plan, device=device)
        except BudgetError as error:
            raise Unsupported("over_budget", f"gpu_bytes={budget_bytes}: {error}") from error

        def run() -> dict[str, Tensor]:
            assert handle.model is model
            return train_step(model, recipe, inputs) if train else generate(model, inputs)

        def launch() -> Mapping[str, Any]:
            with limited(device, base, budget_bytes):
                try:
                    return run()
                except BudgetError as error:
                    raise Unsupported("over_budget", f"gpu_bytes={budget_bytes}: {error}") from error

        # The first pass fetches on demand and is recorded, the second may move what activations leave room for.
        for _ in range(2):
            launch()
        return launch


def _plan(model: nn.Module, recipe: Recipe, gpu_bytes: int, device: torch.device) -> Plan:
    """nvfp4 for the blocks' linear layers where the case says so; the rest streamed where there is a budget."""
    outside = tuple(site.name for site in find_linears(model) if not site.name.startswith("blocks."))
    budget = None
    if gpu_bytes:
        sizes = [p.numel() * p.element_size() + 2 * ALIGN_BYTES for p in model.parameters()]
        # A CPU stands in for a GPU without an allocator to measure: there the budget is for weights alone.
        activations: str | int = "auto" if device.type == "cuda" else 0
        budget = Budget(gpu=gpu_bytes, pinned=3 * sum(sizes), activations=activations)
    return Plan(fp4="none" if recipe.codec == "raw" else "all", keep=outside, budget=budget)


def train_step(model: nn.Module, recipe: Recipe, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    """Losses by token (float32 [b s]) and the sampled gradients."""
    model.zero_grad(set_to_none=True)
    logits = model(inputs["ids"]).flatten(0, 1).float()
    losses = F.cross_entropy(logits, inputs["targets"].flatten(), reduction="none")
    torch.autograd.backward(losses.mean())
    outputs: dict[str, Any] = {"losses": losses.detach()}
    outputs |= {name: model.get_parameter(recipe.sampled(name)).grad for name in OUTPUTS["train_step"][1:]}
    return outputs


def generate(model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    """Logits of each pass over the growing text, float32 [b, new, vocab]."""
    ids, given = inputs["ids"], inputs["given"]
    with torch.no_grad():
        passes = [model(torch.cat((ids, given[:, :i]), 1))[:, -1].float() for i in range(given.shape[1])]
    return {"logits": torch.stack(passes, 1)}
