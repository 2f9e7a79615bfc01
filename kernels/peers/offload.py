"""Peers of ``offload_pass`` in plain torch.

Variants
    all_resident: every weight on the device, whatever ``gpu_bytes`` says: what memory enough would give.
    double_buffer: two slots and a copy stream, written by hand for exactly this stack: layer i + 1 arrives while layer
        i is computed. Forward only. The bar of speed for an engine that must find all this out by itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from vbench.backend import Device, Kernel, Launch
from vbench.errors import Unsupported
from vbench.spec import Case, Numerics

VARIANTS = ("all_resident", "double_buffer", "fsdp2")
GRADIENTS = ("dx", "dw_first", "dw_middle", "dw_last")
SLOTS = 2
#: The op is judged bitwise.
EXACT = Numerics()
BF16_BYTES = 2


def run_stack(x: Tensor, weights: list[Tensor]) -> Tensor:
    """Linear layers, relu between them; [tokens, width]."""
    for weight in weights[:-1]:
        x = torch.relu(F.linear(x, weight))
    return F.linear(x, weights[-1])


def make(case: Case, variant: str, device: Device) -> Kernel:
    """Factory for op ``offload_pass``.

    Raises:
        Unsupported: ``unknown_variant``; ``forward_only`` and ``over_budget`` (two slots are more than gpu_bytes) of
            double_buffer.
    """
    if variant not in VARIANTS:
        raise Unsupported("unknown_variant", f"{variant!r} is not one of {', '.join(VARIANTS)}")
    if variant == "all_resident":
        return AllResident(case)
    if variant == "fsdp2":
        from vbench.kernels.peers import offload_fsdp

        return offload_fsdp.make(case, variant, device)
    if case.text("mode") != "forward":
        raise Unsupported("forward_only", "double_buffer has no backward; take all_resident for mode=train")
    needed, room = SLOTS * case.axis("width") ** 2 * BF16_BYTES, case.axis("gpu_bytes")
    if needed > room:
        raise Unsupported("over_budget", f"{SLOTS} slots take {needed} bytes, gpu_bytes={room}: {needed - room} short")
    return DoubleBuffer()


@dataclass(frozen=True, slots=True)
class AllResident:
    """Autograd's own backward in mode train."""

    case: Case
    numerics: Numerics = EXACT
    produces: tuple[str, ...] = ("y", *GRADIENTS)
    deterministic: bool = True
    graph_safe: bool = False

    def bind(self, inputs: Mapping[str, Any], out: Mapping[str, Any]) -> Launch:
        """Makes every weight on the device.

        Raises:
            Unsupported: ``does_not_fit``: weights (and in mode train their gradients) are more than is free there.
        """
        x: Tensor = inputs["x"]
        source = inputs["weights"]
        train = self.case.text("mode") == "train"
        if x.is_cuda:
            free, _ = torch.cuda.mem_get_info(x.device)
            free += torch.cuda.memory_reserved(x.device) - torch.cuda.memory_allocated(x.device)
            needed = source.layers * source.width**2 * BF16_BYTES * (2 if train else 1)
            if needed > free:
                raise Unsupported("does_not_fit", f"weights and gradients take {needed} bytes, {free} are free")
        weights = [source.decoded(i).requires_grad_(train) for i in range(source.layers)]
        empty = {name: out[name] for name in GRADIENTS}

        def forward() -> Mapping[str, Any]:
            with torch.no_grad():
                return {**empty, "y": run_stack(x, weights)}

        def train_step() -> Mapping[str, Any]:
            for weight in weights:
                weight.grad = None
            leaf = x.detach().requires_grad_()
            y = run_stack(leaf, weights)
            torch.autograd.backward(y, inputs["dy"])
            grads = [weight.grad for weight in weights]
            sampled = {"dw_first": grads[0], "dw_middle": grads[len(grads) // 2], "dw_last": grads[-1]}
            return {"y": y.detach(), "dx": leaf.grad, **sampled}

        return train_step if train else forward


@dataclass(frozen=True, slots=True)
class DoubleBuffer:
    """The two-slot pipeline; on a CPU the copies are plain ones."""

    numerics: Numerics = EXACT
    produces: tuple[str, ...] = ("y", *GRADIENTS)
    deterministic: bool = True
    graph_safe: bool = False

    def bind(self, inputs: Mapping[str, Any], out: Mapping[str, Any]) -> Launch:
        """Makes page-locked host copies (torch's allocator keeps them for the next case), two slots and a stream."""
        x: Tensor = inputs["x"]
        source = inputs["weights"]
        shape = (source.width, source.width)
        host: list[Tensor] = []
        for i in range(source.layers):
            home = torch.empty(shape, dtype=torch.bfloat16, pin_memory=x.is_cuda)
            host.append(home.copy_(source.decoded(i)))
        slots = [torch.empty(shape, dtype=torch.bfloat16, device=x.device) for _ in range(SLOTS)]
        empty = {name: out[name] for name in GRADIENTS}
        last = len(host) - 1

        def layer(i: int, t: Tensor) -> Tensor:
            y = F.linear(t, slots[i % SLOTS])
            return y if i == last else torch.relu(y)

        def on_cpu() -> Mapping[str, Any]:
            t = x
            for i, weight in enumerate(host):
                slots[i % SLOTS].copy_(weight)
                t = layer(i, t)
            return {**empty, "y": t}

        if not x.is_cuda:
            return on_cpu
        cuda: Any = torch.cuda  # its constructors carry no types
        copies = cuda.Stream(device=x.device)
        arrived = [cuda.Event() for _ in range(SLOTS)]
        used = [cuda.Event() for _ in range(SLOTS)]

        def fetch(i: int) -> None:
            copies.wait_event(used[i % SLOTS])
            with torch.cuda.stream(copies):
                slots[i % SLOTS].copy_(host[i], non_blocking=True)
            arrived[i % SLOTS].record(copies)

        def on_cuda() -> Mapping[str, Any]:
            compute = torch.cuda.current_stream(x.device)
            for event in used:
                event.record(compute)
            for i in range(min(SLOTS, len(host))):
                fetch(i)
            t = x
            with torch.no_grad():
                for i in range(len(host)):
                    compute.wait_event(arrived[i % SLOTS])
                    t = layer(i, t)
                    used[i % SLOTS].record(compute)
                    if i + SLOTS < len(host):
                        fetch(i + SLOTS)
            return {**empty, "y": t}

        return on_cuda
