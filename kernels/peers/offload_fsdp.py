"""Peer of ``offload_pass``: FSDP2 with ``CPUOffloadPolicy``, every layer a unit of its own, in one process.

One rank of a world of one: its store is a table in this process, so no address is bound and no network is asked. FSDP2
takes no budget: it holds the layer at work, the next one and the one that is being let go.
Source: torch.distributed.fsdp, fully_shard and CPUOffloadPolicy.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from vbench.backend import Device, Kernel, Launch
from vbench.errors import Unsupported
from vbench.spec import Case, Numerics

VARIANT = "fsdp2"
GRADIENTS = ("dx", "dw_first", "dw_middle", "dw_last")
#: Layers that FSDP2 has on the device at once.
LAYERS_HELD = 3
BF16_BYTES = 2
#: The op is judged bitwise.
EXACT = Numerics()


class Layers(nn.Module):
    """Linear layers without bias, relu between them."""

    def __init__(self, layers: list[nn.Linear]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = torch.relu(layer(x))
        y: Tensor = self.layers[-1](x)
        return y


def make(case: Case, variant: str, device: Device) -> Kernel:
    """Factory for op ``offload_pass``, variant ``fsdp2``.

    Raises:
        Unsupported: ``unknown_variant``; ``no_distributed``: this torch was built without; ``over_budget``: three
            layers are more than gpu_bytes.
    """
    if variant != VARIANT:
        raise Unsupported("unknown_variant", f"{variant!r} is not {VARIANT}")
    if not dist.is_available():
        raise Unsupported("no_distributed", f"torch {torch.__version__} was built without torch.distributed")
    needed, room = LAYERS_HELD * case.axis("width") ** 2 * BF16_BYTES, case.axis("gpu_bytes")
    if needed > room:
        raise Unsupported("over_budget", f"{LAYERS_HELD} layers take {needed} bytes, gpu_bytes={room}: raise it")
    return Fsdp(case)


def _join_world(device: torch.device) -> Any:
    """The mesh of one rank; the process group is made once and lives as long as the process."""
    world: Any = dist  # some of its names are not exported for type checkers
    if not dist.is_initialized():
        backend = "cuda:nccl,cpu:gloo" if device.type == "cuda" else "gloo"
        world.init_process_group(backend, store=world.HashStore(), rank=0, world_size=1)
    return world.device_mesh.init_device_mesh(device.type, (1,))


@dataclass(frozen=True, slots=True)
class Fsdp:
    """Forward and backward."""

    case: Case
    numerics: Numerics = EXACT
    produces: tuple[str, ...] = ("y", *GRADIENTS)
    deterministic: bool = True
    graph_safe: bool = False

    def bind(self, inputs: Mapping[str, Any], out: Mapping[str, Any]) -> Launch:
        """Makes the layers one by one; FSDP2 takes each to (on cuda: page-locked) host memory."""
        from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard

        x: Tensor = inputs["x"]
        source = inputs["weights"]
        train = self.case.text("mode") == "train"
        mesh = _join_world(x.device)
        policy = CPUOffloadPolicy(pin_memory=x.is_cuda)
        layers: list[nn.Linear] = []
        for i in range(source.layers):
            layer = nn.Linear(source.width, source.width, bias=False, device="meta")
            layer.weight = nn.Parameter(source.decoded(i), requires_grad=train)
            fully_shard(layer, mesh=mesh, offload_policy=policy)
            layers.append(layer)
        stack = Layers(layers)
        fully_shard(stack, mesh=mesh, offload_policy=policy)
        empty = {name: out[name] for name in GRADIENTS}

        def forward() -> Mapping[str, Any]:
            with torch.no_grad():
                return {**empty, "y": stack(x)}

        def train_step() -> Mapping[str, Any]:
            stack.zero_grad(set_to_none=True)
            leaf = x.detach().requires_grad_()
            y = stack(leaf)
            torch.autograd.backward(y, inputs["dy"])
            grads: list[Any] = [layer.weight.grad for layer in layers]
            first, middle, last = (grads[i].to_local() for i in (0, len(grads) // 2, -1))
            return {"y": y.detach(), "dx": leaf.grad, "dw_first": first, "dw_middle": middle, "dw_last": last}

        return train_step if train else forward
