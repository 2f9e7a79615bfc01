"""Peers of ``train_step`` and ``generate`` in plain torch: the given module, run as torch offers to.

Variants
    eager: everything on the device; where ``gpu_bytes`` is too small for that, torch's own out-of-memory error.
    torch_compile: the same, compiled with default options. Orders sums otherwise, and is held to a budget.
    fsdp2: ``fully_shard`` of every block with ``CPUOffloadPolicy``, in one process.
    nvfp4 weights (``codec``) are decoded once, outside the clock, by eager and torch_compile; none of them keeps codes.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn
from torch.nn import functional as F

from vbench.backend import Device, Launch, refuse_beyond
from vbench.errors import Unsupported
from vbench.spec import Case, Numerics

VARIANTS = ("eager", "torch_compile", "fsdp2")
SIZES = ("family", "dtype", "layers", "width", "heads", "inner", "vocab", "batch", "seq", "gpu_bytes")
PARAMETERS = {"train_step": SIZES, "generate": (*SIZES, "new", "codec")}
#: Eager torch in another place: bitwise.
EXACT = Numerics()
GRADIENTS = ("grad_first", "grad_last", "grad_norm")
#: Held to float64 by the oracle, which copies the model to it: larger ones take too much memory.
LARGEST_COMPILED = 1 << 30
SMALLEST_COMPILED = 1 << 20


class Recipe(Protocol):
    """How the op's inputs describe the model."""

    @property
    def codec(self) -> str: ...

    def make(self, home: str) -> nn.Module: ...

    def decoded(self) -> nn.Module: ...

    def sampled(self, output: str) -> str: ...


@contextmanager
def limited(device: torch.device, base_bytes: int, gpu_bytes: int) -> Iterator[None]:
    """Let torch's allocator have ``gpu_bytes`` beyond ``base_bytes`` meanwhile; no limit on a CPU, or for 0."""
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


def train_step(runs: Any, model: nn.Module, recipe: Recipe, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The op's outputs; a gradient that was lost is ``None``. ``runs`` is what is called, ``model`` has the weights."""
    model.zero_grad(set_to_none=True)
    logits = runs(inputs["ids"]).flatten(0, 1).float()
    losses = F.cross_entropy(logits, inputs["targets"].flatten(), reduction="none")
    torch.autograd.backward(losses.mean())
    out: dict[str, Any] = {"losses": losses.detach()}
    for name in GRADIENTS:
        gradient: Any = model.get_parameter(recipe.sampled(name)).grad
        out[name] = gradient.to_local() if hasattr(gradient, "to_local") else gradient
    return out


def generate(runs: Any, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The op's output."""
    ids, given = inputs["ids"], inputs["given"]
    with torch.no_grad():
        passes = [runs(torch.cat((ids, given[:, :i]), 1))[:, -1].float() for i in range(given.shape[1])]
    return {"logits": torch.stack(passes, 1)}


def make(case: Case, variant: str, device: Device) -> TorchModel:
    """Factory of both ops.

    Raises:
        Unsupported: ``unknown_variant``; ``parameter_not_taken``; ``needs_cuda``, ``size``, ``needs_compiler`` of
            torch_compile; ``no_distributed``, ``codec`` of fsdp2.
    """
    if variant not in VARIANTS:
        raise Unsupported("unknown_variant", f"{variant!r} is not one of {', '.join(VARIANTS)}")
    refuse_beyond(case, PARAMETERS[case.op])
    if variant == "fsdp2":
        if not torch.distributed.is_available():
            raise Unsupported("no_distributed", f"torch {torch.__version__} was built without torch.distributed")
        if case.op == "generate" and case.text("codec") != "raw":
            raise Unsupported("codec", "FSDP2 moves weights as they are; codec=raw")
    if variant == "torch_compile":
        _check_compiled(case, device)
        return TorchModel(case, variant, Numerics("tensor_core", stores=(case.text("dtype"),)))
    return TorchModel(case, variant)


def _check_compiled(case: Case, device: Device) -> None:
    if device != "cuda":
        raise Unsupported("needs_cuda", "compiling each check case for a CPU takes minutes; compared on CUDA only")
    weights = case.axis("layers") * case.axis("width") * (4 * case.axis("width") + 2 * case.axis("inner"))
    if not SMALLEST_COMPILED <= weights <= LARGEST_COMPILED:
        raise Unsupported("size", f"{weights} weights: compared from {SMALLEST_COMPILED} to {LARGEST_COMPILED}")
    if not any(map(shutil.which, filter(None, (os.environ.get("CC"), "gcc", "clang", "cc")))):
        raise Unsupported("needs_compiler", "torch.compile needs a C compiler; install gcc or set CC")


@dataclass(frozen=True, slots=True)
class TorchModel:
    """See the variants above."""

    case: Case
    variant: str
    numerics: Numerics = EXACT
    deterministic: bool = True
    graph_safe: bool = False

    @property
    def produces(self) -> tuple[str, ...]:
        return ("losses", *GRADIENTS) if self.case.op == "train_step" else ("logits",)

    def bind(self, inputs: Mapping[str, Any], out: Mapping[str, Any]) -> Launch:
        """Makes the module where it belongs and runs it once, within the limit from then on."""
        case, recipe = self.case, inputs["model"]
        device, gpu_bytes = inputs["ids"].device, case.axis("gpu_bytes")
        base = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
        train = case.op == "train_step"
        with limited(device, base, gpu_bytes):
            if self.variant == "fsdp2":
                model: Any = _sharded(recipe.make("cpu"), device)
            else:
                model = recipe.make(device.type) if recipe.codec == "raw" else recipe.decoded()
            model.requires_grad_(train)
            runs: Any = torch.compile(model) if self.variant == "torch_compile" else model

        def launch() -> Mapping[str, Any]:
            with limited(device, base, gpu_bytes):
                return train_step(runs, model, recipe, inputs) if train else generate(runs, inputs)

        launch()
        return launch


def _sharded(model: Any, device: torch.device) -> nn.Module:
    from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard

    from vbench.kernels.peers.offload_fsdp import _join_world

    mesh = _join_world(device)
    policy = CPUOffloadPolicy(pin_memory=device.type == "cuda")
    for block in model.blocks:
        fully_shard(block, mesh=mesh, offload_policy=policy)
    fully_shard(model, mesh=mesh, offload_policy=policy)
    sharded: nn.Module = model
    return sharded
