"""``virtualize(model, plan)``: a model's linear layers, attention and other weights handed to our kernels and tiers.

    with virtualize(model, Plan(fp4="all", attention="triton")) as handle:
        model(ids)

Linear layers whose weights are frozen (or all, for inference) compute with 4-bit weights; a layer tied to an embedding
shares its parameter as before; what is left over is streamed where a budget is given. The model's own code runs
unchanged, its ``state_dict`` has the same keys and values, and ``undo`` puts back the very same modules and parameters.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from vbench.errors import Unsupported, UsageError
from vbench.kernels.tiers.budget import Budget
from vbench.kernels.tiers.codec import WeightDecoder, default_decoder
from vbench.kernels.tiers.tiered import Tiered, tier, tiered_modules
from vbench.kernels.virtual.attentions import Choice, replace_attention
from vbench.kernels.virtual.linears import LinearSite, find_linears, owners
from vbench.kernels.virtual.packed_linear import FusedLinear, PackedLinear, StandIn, release_places

Kind = Literal["fp4", "tied", "tiered", "kept"]


@dataclass(frozen=True, slots=True)
class Plan:
    """What is replaced by what.

    Args:
        fp4: which linear layers compute with nvfp4 weights: those whose weight is ``frozen`` (requires no gradient),
            ``all`` (inference: no weight of a linear layer is trained afterwards), or ``none``.
        attention: ``triton`` or ``gluon`` (Hopper) for ours, ``keep`` for the model's own.
        budget: where the weights that are not fp4 live; ``None`` leaves them where they are. fp4 codes stay on the
            device and count as buffers.
        keep: names of linear layers to leave as they are.
        linear: ``decode``: nvfp4 codes become a whole weight for each use, and torch multiplies (bit for bit the
            decoded layer, under autocast too); ``fused``: ``FP4Linear``, whose kernels decode in registers.
        format: of the codes; other than nvfp4 with ``fused`` only.
    """

    fp4: Literal["frozen", "all", "none"] = "frozen"
    attention: Choice = "keep"
    budget: Budget | None = None
    keep: tuple[str, ...] = ()
    linear: Literal["decode", "fused"] = "decode"
    format: str = "nvfp4"


@dataclass(frozen=True, slots=True)
class Row:
    """What became of one linear layer.

    Args:
        name: in the model.
        kind: ``fp4``; ``tied``: reads the embedding's parameter as before; ``tiered``: streamed; ``kept``.
        shape: (out, in).
        before_bytes, device_bytes: of its weight; what a tied or tiered one takes there is counted elsewhere: 0.
    """

    name: str
    kind: Kind
    shape: tuple[int, int]
    before_bytes: int
    device_bytes: int


@dataclass(slots=True)
class _Swap:
    """A layer that was replaced, and where it hung."""

    site: LinearSite
    places: list[tuple[nn.Module, str]]


class Virtualized:
    """Handle of a virtualised model; see ``virtualize``. A context manager that undoes."""

    def __init__(self, model: nn.Module, plan: Plan, device: torch.device, decoder: WeightDecoder | None) -> None:
        self.model = model
        self.plan = plan
        self.device = device
        self.tiers: Tiered | None = None
        self._swaps: list[_Swap] = []
        self._homes: list[tuple[nn.Parameter, torch.device]] = []
        self._undo_attention: Callable[[], None] | None = None
        self._open = True
        sites = find_linears(model)
        _check(model, plan, sites)
        chosen = [site for site in sites if self._is_fp4(site)]
        if chosen and decoder is None and plan.linear == "decode":
            decoder = default_decoder(device)
        try:
            if plan.attention != "keep":
                self._undo_attention = replace_attention(model, plan.attention)
            for site in chosen:
                self._swap(site, decoder)
            if plan.budget is not None:
                self.tiers = tier(model, budget=plan.budget, device=device)
        except BaseException:
            self.undo()
            raise
        self._rows = [self._row(site) for site in sites]

    def rows(self) -> list[Row]:
        """One for each linear layer, in definition order."""
        return list(self._rows)

    def undo(self) -> None:
        """Put every module and parameter back, the same objects with their values; idempotent.

        Values are those ``state_dict`` gave: a weight that computed in fp4 comes back as it was.

        Raises:
            TierError: a forward is in progress; nothing is undone.
        """
        if not self._open:
            return
        if self.tiers is not None:
            self.tiers.close()
        self._open = False
        for swap in self._swaps:
            for parent, attribute in swap.places:
                parent._modules[attribute] = swap.site.module
        for weight, home in self._homes:
            weight.data = weight.data.to(home)
        if self._swaps:
            release_places()
        self._swaps.clear()
        self._homes.clear()
        if self._undo_attention is not None:
            self._undo_attention()

    def __enter__(self) -> Virtualized:
        return self

    def __exit__(self, *exception: object) -> None:
        self.undo()

    def _is_fp4(self, site: LinearSite) -> bool:
        if site.tied or site.name in self.plan.keep or self.plan.fp4 == "none":
            return False
        return self.plan.fp4 == "all" or not site.weight.requires_grad

    def _swap(self, site: LinearSite, decoder: WeightDecoder | None) -> None:
        if self.plan.linear == "fused":
            packed: StandIn = FusedLinear(site, self.device, self.plan.format)
        else:
            assert decoder is not None
            packed = PackedLinear(site, self.device, decoder)
        weight = site.weight
        if weight.device.type == "cuda":
            self._homes.append((weight, weight.device))
            weight.data = weight.data.to("cpu")
        swap = _Swap(site, list(owners(self.model, site.module)))
        self._swaps.append(swap)
        for parent, attribute in swap.places:
            parent._modules[attribute] = packed

    def _row(self, site: LinearSite) -> Row:
        size = site.weight.numel() * site.weight.element_size()
        n, k = site.shape
        swapped: Any = next((s for s in self._swaps if s.site.module is site.module), None)
        if swapped is not None:
            parent, attribute = swapped.places[0]
            codes: Any = parent._modules[attribute]
            return Row(site.name, "fp4", (n, k), size, sum(buffer.nbytes for buffer in codes.buffers()))
        size = n * k * site.weight.element_size()
        if site.tied:
            return Row(site.name, "tied", (n, k), size, 0)
        if self.tiers is not None:
            return Row(site.name, "tiered", (n, k), size, 0)
        return Row(site.name, "kept", (n, k), size, size)


def _check(model: nn.Module, plan: Plan, sites: list[LinearSite]) -> None:
    if plan.fp4 not in ("frozen", "all", "none"):
        raise UsageError(f"plan.fp4={plan.fp4!r} is not one of frozen, all, none")
    if plan.attention not in ("keep", "triton", "gluon"):
        raise UsageError(f"plan.attention={plan.attention!r} is not one of keep, triton, gluon")
    if plan.linear not in ("decode", "fused"):
        raise UsageError(f"plan.linear={plan.linear!r} is not one of decode, fused")
    if plan.linear == "decode" and plan.format != "nvfp4":
        raise UsageError(f"plan.format={plan.format!r} needs linear='fused'; decode knows nvfp4")
    unknown = sorted(set(plan.keep) - {site.name for site in sites})
    if unknown:
        raise UsageError(f"plan.keep names {', '.join(unknown)}, which the model has no linear layer of")
    tiered = tiered_modules()
    for name, module in model.named_modules():
        if isinstance(module, StandIn):
            raise UsageError(f"{name} is virtualised already; undo() its handle first")
        if module in tiered:
            raise UsageError(f"{name or 'the model'} is tiered already; close() its handle, and give plan.budget")
    for site in sites:
        if site.weight.device.type == "meta":
            raise Unsupported(
                "meta_parameter", f"{site.name} has no values yet (meta device); find_linears(model) lists the layers"
            )
        hooked: Any = site.module
        if site.name not in plan.keep and (
            hooked._forward_hooks or hooked._forward_pre_hooks or hooked._backward_hooks
        ):
            raise Unsupported(
                "hooked", f"{site.name} has hooks, which would go with it; remove them, or name it in keep"
            )


def virtualize(
    model: nn.Module,
    plan: Plan,
    *,
    device: torch.device | str | None = None,
    decoder: WeightDecoder | None = None,
) -> Virtualized:
    """Replace what ``plan`` says in ``model``, in place.

    Args:
        model: any; attention is replaced in this package's ``LanguageModel`` and in transformers' models.
        plan: what by what.
        device: where it computes; that of the first parameter by default.
        decoder: of fp4 codes; Triton's kernel on a GPU and plain torch elsewhere by default.

    Returns:
        the handle. ``undo`` (or leaving it as a context manager) puts everything back.

    Raises:
        UsageError: a plan that says nothing known, names no layer, or a model that is virtualised or tiered already.
        BudgetError: as ``tier`` does.
        Unsupported: ``meta_parameter``, ``hooked``, ``codec_shape``, ``codec_dtype``, ``nonfinite_weight``,
            ``no_decoder``, ``no_triton``, ``no_known_attention``. The model is then as it was.
    """
    if device is None:
        first = next(model.parameters(), None)
        if first is None:
            raise UsageError("the model has no parameters; nothing to virtualise")
        device = first.device
    return Virtualized(model, plan, torch.device(device), decoder)
