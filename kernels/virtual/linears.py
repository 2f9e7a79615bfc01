"""Which linear layers a model has, whoever wrote it: ``nn.Linear``, and transformers' transposed ``Conv1D``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class LinearSite:
    """One linear layer.

    Args:
        name: in ``named_modules``.
        module: the layer.
        transposed: its weight is [in, out] (``Conv1D``: y = x W + b), not [out, in].
        tied: its weight is a parameter of some module that is no linear layer, too (an embedding).
    """

    name: str
    module: nn.Module
    transposed: bool
    tied: bool

    @property
    def weight(self) -> nn.Parameter:
        weight: Any = self.module.weight
        assert isinstance(weight, nn.Parameter)
        return weight

    @property
    def bias(self) -> nn.Parameter | None:
        bias: Any = self.module.bias
        assert bias is None or isinstance(bias, nn.Parameter)
        return bias

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        rows, columns = self.weight.shape
        return (columns, rows) if self.transposed else (rows, columns)

    def weight_nk(self, values: Tensor) -> Tensor:
        """``values``, laid out as the layer's weight, as [out, in]."""
        return values.t() if self.transposed else values


def _is_conv1d(module: nn.Module) -> bool:
    # By name, so that transformers need not be there.
    return type(module).__name__ == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils"


def find_linears(model: nn.Module) -> list[LinearSite]:
    """Every linear layer in definition order, one that occurs twice once; on the meta device too.

    A subclass of ``nn.Linear`` is none: its forward, or the module that reads its weight, is its own affair (the output
    projection of ``nn.MultiheadAttention``).
    """
    elsewhere: set[int] = set()
    found: list[tuple[str, nn.Module, bool]] = []
    for name, module in model.named_modules():
        if type(module) is nn.Linear or _is_conv1d(module):
            found.append((name, module, type(module) is not nn.Linear))
        else:
            elsewhere |= {id(p) for p in module.parameters(recurse=False)}
    sites = [LinearSite(name, module, transposed, False) for name, module, transposed in found]
    return [
        LinearSite(site.name, site.module, site.transposed, id(site.weight) in elsewhere) if _has_weight(site) else site
        for site in sites
    ]


def _has_weight(site: LinearSite) -> bool:
    return isinstance(site.module._parameters.get("weight"), nn.Parameter)


def owners(model: nn.Module, module: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """Every (parent, attribute) at which ``module`` hangs."""
    for parent in model.modules():
        for attribute, child in parent._modules.items():
            if child is module:
                yield parent, attribute
