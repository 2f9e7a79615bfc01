"""``VGPUStack`` and ``VGPUStackLinear``: the document's names for what ``tier(module)`` does, and no more than that.

The document replaces each ``Linear`` by a layer of its own. Here a replaced layer keeps its identity, parameters and
hooks: only its class changes, to one that can say where its weight lies and refuses to run once its stack is closed.
``close`` gives every layer its class back.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vbench.kernels.tiers.budget import Budget
from vbench.kernels.tiers.errors import TierError
from vbench.kernels.tiers.tiered import Tiered, tier


class VGPUStackLinear(nn.Linear):
    """A linear layer whose weight lies in a ``VGPUStack``; made by it, never by a constructor.

    Input [..., in_features] and output [..., out_features] as ``nn.Linear``'s, in its dtypes, bitwise.
    """

    _vgpu_stack: VGPUStack

    def __init__(self, *arguments: object, **options: object) -> None:
        raise TierError("a VGPUStackLinear is made by VGPUStack(model, budget), from a Linear that has its weights")

    @property
    def home(self) -> str:
        """Level at which the weight lies between calls: ``gpu``, ``host`` or ``file``."""
        return self._vgpu_stack.home_of(self)

    def forward(self, input: Tensor) -> Tensor:
        """As ``nn.Linear``.

        Raises:
            TierError: the stack is closed (a closed one gives the class back, so this is a layer that was copied).
        """
        if self._vgpu_stack.closed:
            raise TierError("this layer's VGPUStack is closed; make a new one for the module")
        return super().forward(input)

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Linear:
        """A plain ``nn.Linear`` on the host: a copy lies in no stack.

        Raises:
            TierError: the weight lies in a file; its parameter is empty until the stack is closed.
        """
        if self.home == "file":
            raise TierError("this layer's weight lies in a file; close the VGPUStack, then copy")
        copied = nn.Linear(self.in_features, self.out_features, self.bias is not None, dtype=self.weight.dtype)
        copied.load_state_dict(self.state_dict())
        copied.train(self.training)
        memo[id(self)] = copied
        return copied


class VGPUStack:
    """A module run from device memory, page-locked host memory and files. A context manager that closes.

    Args:
        module: every ``nn.Linear`` in it (not subclasses of it) becomes a ``VGPUStackLinear``; all its parameters are
            tiered.
        budget: bytes of each level.
        device: where it computes.
        options: further ones of ``tier``.

    Raises:
        BudgetError, TierError, Unsupported: as ``tier`` does; the module is unchanged then.
    """

    def __init__(self, module: nn.Module, budget: Budget, device: torch.device | str = "cuda", **options: Any) -> None:
        self.module = module
        self._tiered: Tiered = tier(module, budget=budget, device=device, **options)
        # Any: their class changes, which no type can follow.
        self.linears: list[Any] = [part for part in module.modules() if type(part) is nn.Linear]
        self._unit_of = {part: self._tiered.unit_of(part.weight) for part in self.linears}
        for linear in self.linears:
            linear._vgpu_stack = self
            _become(linear, VGPUStackLinear)

    @property
    def closed(self) -> bool:
        return self._tiered.closed

    def home_of(self, linear: nn.Linear) -> str:
        """Level of a layer's weight between calls."""
        unit = self._tiered.plan()["units"][self._unit_of[linear]]
        return "gpu" if unit["resident"] else str(unit["home"])

    def levels(self) -> dict[str, int]:
        """Bytes of weights by level."""
        found = {"gpu": 0, "host": 0, "file": 0}
        for unit in self._tiered.plan()["units"]:
            found["gpu" if unit["resident"] else unit["home"]] += unit["bytes"]
        return found

    def stats(self) -> dict[str, int]:
        """Hits and misses so far: see ``tiered.Stats``."""
        return self._tiered.stats()

    def close(self) -> None:
        """Undo: every weight on the host, every layer a plain ``nn.Linear`` again. Idempotent.

        Raises:
            TierError: as ``Tiered.close`` does; nothing is undone then.
        """
        self._tiered.close()
        for linear in self.linears:
            # A layer whose class is another by now was changed by somebody else, who must undo that.
            if type(linear) is VGPUStackLinear:
                _become(linear, nn.Linear)
                del linear._vgpu_stack

    def __enter__(self) -> VGPUStack:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _become(layer: Any, kind: type[nn.Linear]) -> None:
    """Change a layer's class and nothing else of it."""
    layer.__class__ = kind
