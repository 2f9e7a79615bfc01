"""Quantisation-aware training: linear layers that compute with nvfp4 codes of master weights that train.

forward   y = x decode(encode(w))^T + b
backward  dx = dy decode(encode(w));  dw = dy^T x, given to w as if encoding were the identity (the straight-through
          estimator: Bengio, Leonard & Courville 2013, arXiv 1308.3432, section 2.1)

The master w keeps its name, dtype and gradient, so that optimizer and checkpoints see the model they know; codes are
made anew from it after each optimizer step and are no state. They come on top of it: in training FP4 saves no memory.
What a product reads is decoded for it, in its dtype, into a place that all layers of one shape share; the layers of a
model therefore run on one stream, and not on two threads at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import entry_points
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vbench.errors import Unsupported
from vbench.kernels.tiers.codec import GROUP, WeightDecoder, default_decoder, encode, packed_views
from vbench.kernels.tiers.units import Packing
from vbench.kernels.virtual.linears import find_linears, owners
from vbench.spec import Case, ParamValue, resolve


class TrainedFP4Linear(nn.Module):
    """A trainable linear layer on nvfp4 codes of its weight; see the module.

    Args:
        linear: whose ``weight`` [out, in] (float32, the master) and ``bias`` are taken over as the same objects.
        place: [out, in] where it computes and in the dtype it computes in; the master may be elsewhere, and gets its
            gradient there.
        decoder: of its codes.

    Raises:
        Unsupported: ``codec_shape``: in_features is no multiple of 16; ``codec_dtype``: the master is not float32.
    """

    codes: Tensor

    def __init__(self, linear: nn.Linear, place: Tensor, decoder: WeightDecoder) -> None:
        super().__init__()
        n, k = linear.weight.shape
        if k % GROUP:
            raise Unsupported("codec_shape", f"--use-fp4: {k} input features are no multiple of {GROUP}; leave it out")
        if linear.weight.dtype is not torch.float32:
            raise Unsupported("codec_dtype", f"--use-fp4: the master weight is {linear.weight.dtype}, not float32")
        self.weight, self.bias = linear.weight, linear.bias
        self._packing = Packing(n, k)
        self._encoder: Callable[[], object] | None = None
        codes = torch.empty(self._packing.size_bytes, dtype=torch.uint8, device=place.device)
        self.register_buffer("codes", codes, persistent=False)
        self.encode()
        # Bound once: codes and place keep their addresses, and binding would wait for the device each time.
        self._place, self._decode = place, decoder.bind(packed_views(self._packing, self.codes), place)

    @torch.no_grad()
    def encode(self) -> None:
        """Make the codes anew from the master, on the layer's device."""
        packed, device = packed_views(self._packing, self.codes), self.codes.device
        weight = self.weight.detach()
        if device.type != "cuda":
            encode(weight, packed, device)
            return
        if weight.device == device:
            if self._encoder is None:
                self._encoder = _bind_encoder(weight, packed)
            self._encoder()
            return
        _bind_encoder(weight.to(device), packed)()

    def decoded(self) -> Tensor:
        """decode(encode(w)) [out, in], rounded once to the place's dtype; until another layer's."""
        self._decode()
        return self._place

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out], in the place's dtype.

        Raises:
            Unsupported: ``x_dtype``: without autocast x has another dtype.
        """
        if x.dtype is not self._place.dtype:
            if not torch.is_autocast_enabled(x.device.type):
                raise Unsupported("x_dtype", f"x is {x.dtype}, this layer computes in {self._place.dtype}")
            x = x.to(self._place.dtype)
        # torch gives Function.apply no types.
        y: Tensor = _StraightThrough.apply(x, self.weight, self.bias, self.decoded)  # type: ignore[no-untyped-call]
        return y

    def extra_repr(self) -> str:
        """For ``print(model)``."""
        return f"nvfp4 of a float32 master, in_features={self._packing.k}, out_features={self._packing.n}"


class _StraightThrough(torch.autograd.Function):
    """x w^T + b with the w that is decoded for each use; its gradient goes to the master."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, master: Tensor, bias: Tensor | None, decoded: Callable[[], Tensor]) -> Tensor:
        ctx.save_for_backward(x)
        ctx.decoded, ctx.home = decoded, (master.device, master.dtype)
        ctx.bias_dtype = None if bias is None else bias.dtype
        return F.linear(x, decoded(), None if bias is None else bias.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (x,), dy = ctx.saved_tensors, gradients[0]
        needs_x, needs_w, needs_b, _ = ctx.needs_input_grad
        dx = dy @ ctx.decoded() if needs_x else None
        rows = dy.flatten(0, -2)
        dw = (rows.t() @ x.flatten(0, -2)).to(*ctx.home) if needs_w else None
        db = rows.sum(0).to(ctx.bias_dtype) if needs_b else None
        return dx, dw, db, None


def install(model: nn.Module, device: torch.device, dtype: torch.dtype) -> list[TrainedFP4Linear]:
    """Put a ``TrainedFP4Linear`` in the place of every linear layer inside ``model.blocks``; returns them.

    Args:
        device, dtype: where and in what they compute: autocast's type under autocast.

    The output layer stays as it is, tied or not: it is the layer whose errors reach the loss undamped, and codes of a
    table that is an embedding too would be a second weight.

    Raises:
        Unsupported: as ``TrainedFP4Linear``; ``no_encoder``, ``no_decoder``: no backend has the kernels.
    """
    decoder = default_decoder(device)
    places: dict[tuple[int, int], Tensor] = {}
    made = []
    for site in find_linears(model):
        if not site.name.startswith("blocks."):
            continue
        assert isinstance(site.module, nn.Linear)
        if site.shape not in places:
            places[site.shape] = torch.empty(site.shape, dtype=dtype, device=device)
        layer = TrainedFP4Linear(site.module, places[site.shape], decoder)
        for parent, attribute in list(owners(model, site.module)):
            setattr(parent, attribute, layer)
        made.append(layer)
    return made


@contextmanager
def masters_aside(layers: Sequence[TrainedFP4Linear]) -> Iterator[None]:
    """Meanwhile the masters are no parameters of their layers: tiers made here leave them where they are."""
    before = [dict(layer._parameters) for layer in layers]
    try:
        for layer in layers:
            del layer._parameters["weight"]
        yield
    finally:
        for layer, parameters in zip(layers, before, strict=True):
            layer._parameters.clear()
            layer._parameters.update(parameters)


def _bind_encoder(weight: Tensor, packed: dict[str, Tensor]) -> Callable[[], object]:
    """A launch of backend triton's ``fp4_quantize``, from ``weight`` [n, k] float32 into ``packed``.

    Raises:
        Unsupported: ``no_encoder``.
    """
    found = entry_points(group="vbench.backends", name="triton")
    if not found:
        raise Unsupported(
            "no_encoder", "backend triton encodes nvfp4 on a GPU and is not installed: leave --use-fp4 out"
        )
    n, k = weight.shape
    values: dict[str, ParamValue] = {"fmt": "nvfp4", "w": "fp32", "dist": "normal", "n": n, "k": k}
    kernel = resolve(next(iter(found)).load().ops["fp4_quantize"])(
        Case("fp4_quantize", tuple(values.items())), "", weight.device.type
    )
    launch: Callable[[], object] = kernel.bind({"w": weight.contiguous()}, packed)
    return launch
