"""Peer ``deepspeed``: the given module under ZeRO stage 3 with parameters and gradients offloaded to the host.

One rank of a world of one, like FSDP2's (``offload_fsdp.py``). It takes no budget: by its defaults it prefetches and
keeps up to so many elements. A backward needs an optimizer to put gradients where one would read them (on the host, in
float32), so there is one, plain SGD, and no step is taken; generation runs without.

``memory_efficient_linear`` is off: DeepSpeed would put a linear layer of its own into ``torch.nn.functional`` for the
whole process, where later cases would run it.
Source: DeepSpeed 0.19.8, runtime/zero/config.py, runtime/zero/stage3.py, utils/tensor_fragment.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vbench.backend import Availability, DeclaredBackend, Device, Launch, refuse_beyond
from vbench.errors import Unsupported
from vbench.spec import Case, Numerics

#: A source package whose set-up imports torch.
INSTALL = "pip install --no-build-isolation 'deepspeed>=0.19'"


def probe(device: Device) -> Availability:
    """See ``vbench.backend.Backend.probe``."""
    from vbench.kernels.peers.optional import probe_package

    try:
        found = probe_package("deepspeed", device)
    except Exception as error:  # its dependencies refuse each other's versions by exceptions of their own
        return Availability(False, "none", f"deepspeed does not import ({type(error).__name__}: {error}); {INSTALL}")
    if not found.versions:
        return Availability(False, "none", f"install it: {INSTALL}")
    return found


#: Read by DeepSpeed where a launcher would have set them; on a CPU it is to be told that this is what it runs on.
_RANK = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}

BACKEND = DeclaredBackend(
    name="deepspeed",
    role="peer",
    summary="DeepSpeed: ZeRO stage 3 in one process, parameters and gradients offloaded to the host",
    ops={
        "train_step": "vbench.kernels.peers.deepspeed_zero:make",
        "generate": "vbench.kernels.peers.deepspeed_zero:make",
    },
    probe_function="vbench.kernels.peers.deepspeed_zero:probe",
    environment={"cpu": {**_RANK, "DS_ACCELERATOR": "cpu"}, "cuda": _RANK},
)


def make(case: Case, variant: str, device: Device) -> ZeroOffload:
    """Factory of both ops.

    Raises:
        Unsupported: ``unknown_variant``; ``parameter_not_taken``; ``codec``: it moves weights as they are;
            ``no_distributed``.
    """
    import torch

    from vbench.kernels.peers.model_steps import PARAMETERS

    if variant:
        raise Unsupported("unknown_variant", f"{case.op} has no variant {variant!r}; leave it out")
    refuse_beyond(case, PARAMETERS[case.op])
    if case.op == "generate" and case.text("codec") != "raw":
        raise Unsupported("codec", "ZeRO moves weights as they are; codec=raw")
    if not torch.distributed.is_available():
        raise Unsupported("no_distributed", f"torch {torch.__version__} was built without torch.distributed")
    # It multiplies with weights inside larger buffers, and BLAS picks its float32 kernels by alignment too.
    fp32 = case.text("dtype") == "fp32"
    return ZeroOffload(case, Numerics(stores=("fp32",)) if fp32 else Numerics())


def configuration(dtype: str, *, train: bool, pinned: bool) -> dict[str, Any]:
    """DeepSpeed's configuration: its defaults, but for what the module's docstring says."""
    host = {"device": "cpu", "pin_memory": pinned}
    zero: dict[str, Any] = {"stage": 3, "offload_param": host, "memory_efficient_linear": False}
    if train:
        zero["offload_optimizer"] = host
    return {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": zero,
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": dtype == "bf16"},
    }


#: The engine bound last: it holds page-locked memory, and lets go of it only when told to.
_last: Any = None


@dataclass(frozen=True, slots=True)
class ZeroOffload:
    """``deepspeed.initialize(model, config)``."""

    case: Case
    numerics: Numerics
    deterministic: bool = True
    graph_safe: bool = False

    @property
    def produces(self) -> tuple[str, ...]:
        return ("losses", "grad_first", "grad_last", "grad_norm") if self.case.op == "train_step" else ("logits",)

    def bind(self, inputs: Mapping[str, Any], out: Mapping[str, Any]) -> Launch:
        """Makes the module on the host, hands it to an engine and runs it once, so that its order is traced.

        An engine bound before is taken down; its launch must not be called again.
        """
        global _last
        import deepspeed
        import torch

        from vbench.kernels.peers.model_steps import generate, limited
        from vbench.kernels.peers.offload_fsdp import _join_world

        if _last is not None:
            _last.destroy()
            _last = None
        recipe, device = inputs["model"], inputs["ids"].device
        _join_world(device)
        gpu_bytes = self.case.axis("gpu_bytes")
        base = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
        train = self.case.op == "train_step"
        model = recipe.make("cpu")
        model.requires_grad_(train)
        with limited(device, base, gpu_bytes):
            engine, *_ = deepspeed.initialize(
                model=model,
                optimizer=torch.optim.SGD(model.parameters(), lr=0.0) if train else None,
                config=configuration(self.case.text("dtype"), train=train, pinned=device.type == "cuda"),
                dist_init_required=False,
            )
        _last = engine

        def launch() -> Mapping[str, Any]:
            with limited(device, base, gpu_bytes):
                return train_step(engine, recipe, inputs) if train else generate(engine, inputs)

        launch()
        return launch


def train_step(engine: Any, recipe: Any, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The op's outputs. The sampled gradients are read where an optimizer would, in the case's dtype."""
    from deepspeed.utils import safe_get_full_grad
    from torch.nn import functional as F

    from vbench.kernels.peers.model_steps import GRADIENTS

    # The engine's own zero_grad leaves what stage 3 accumulated on the host.
    engine.optimizer.zero_grad()
    logits = engine(inputs["ids"]).flatten(0, 1).float()
    losses = F.cross_entropy(logits, inputs["targets"].flatten(), reduction="none")
    engine.backward(losses.mean())
    outputs: dict[str, Any] = {"losses": losses.detach()}
    for name in GRADIENTS:
        weight = engine.module.get_parameter(recipe.sampled(name))
        outputs[name] = safe_get_full_grad(weight).to(weight.dtype)
    return outputs
