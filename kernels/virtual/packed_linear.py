"""A linear layer whose weight lies on the device as nvfp4 codes, in the place of one of a model's own.

It multiplies with decode(encode(w)): for each use the codes are decoded into a place that all layers of its shape share
(4 bits at rest, one whole weight a shape) and ``F.linear`` does the rest, so that a result is bit for bit that of the
same layer with the decoded weight. Gradients reach its input and its bias, not its weight.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vbench.errors import Unsupported
from vbench.kernels.tiers.codec import DTYPES, GROUP, WeightDecoder, encode, packed_views
from vbench.kernels.tiers.units import Packing
from vbench.kernels.virtual.linears import LinearSite


@cache
def _place(n: int, k: int, dtype: torch.dtype, device: torch.device, stream: int, thread: int) -> Tensor:
    """Where layers of one shape are decoded to by one stream or thread, whose work is in order."""
    return torch.empty(n, k, dtype=dtype, device=device)


def release_places() -> None:
    """Let go of the memory that decoded weights took; it comes again with the next use."""
    _place.cache_clear()


class StandIn(nn.Module, ABC):
    """A layer in the place of another, whose parameters it keeps: the weight on the host, the bias as its own.

    ``state_dict`` has the keys, shapes and values of the layer it stands for; ``load_state_dict`` takes such and
    encodes anew.
    """

    def __init__(self, site: LinearSite) -> None:
        super().__init__()
        self._site = (site,)  # in a tuple, so that the module it holds is none of this one's parts
        self.out_features, self.in_features = site.shape
        self.bias = site.bias

    @abstractmethod
    def encode(self) -> None:
        """Make the codes anew from the kept weight."""

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        weight = self._site[0].weight
        destination[prefix + "weight"] = weight if keep_vars else weight.detach()
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        key = prefix + "weight"
        mine = self._site[0].weight
        value = state_dict.get(key)
        if value is None:
            missing_keys.append(key)
        elif value.shape != mine.shape:
            error_msgs.append(
                f"size mismatch for {key}: copying {tuple(value.shape)}, the model has {tuple(mine.shape)}"
            )
        else:
            with torch.no_grad():
                mine.copy_(value)
            self.encode()
        rest = {name: tensor for name, tensor in state_dict.items() if name != key}
        super()._load_from_state_dict(rest, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)


class PackedLinear(StandIn):
    """y [..., out] = x [..., in] decode(codes)^T + bias.

    Args:
        site: the layer it stands for; its weight is read, its bias taken over as the same object.
        device: where it computes.
        decoder: of its codes there.

    Raises:
        Unsupported: ``codec_shape``, ``codec_dtype``, ``nonfinite_weight``.
    """

    codes: Tensor

    def __init__(self, site: LinearSite, device: torch.device, decoder: WeightDecoder) -> None:
        super().__init__(site)
        weight = site.weight
        n, k = site.shape
        if k % GROUP:
            raise Unsupported(
                "codec_shape", f"{site.name}: {k} input features are no multiple of {GROUP}; name it in plan.keep"
            )
        if weight.dtype not in DTYPES:
            raise Unsupported(
                "codec_dtype", f"{site.name} is {weight.dtype}; nvfp4 encodes {', '.join(DTYPES.values())}"
            )
        self._dtype = weight.dtype
        self._decoder = decoder
        self._packing = Packing(n, k)
        self._launches: dict[tuple[int, int], tuple[Tensor, Callable[[], object]]] = {}
        codes = torch.empty(self._packing.size_bytes, dtype=torch.uint8, device=device)
        self.register_buffer("codes", codes, persistent=False)
        self.encode()

    def encode(self) -> None:
        """Make the codes anew from the kept weight."""
        site = self._site[0]
        encode(site.weight_nk(site.weight.detach()), packed_views(self._packing, self.codes), self.codes.device)

    def decoded(self) -> Tensor:
        """The weight it multiplies with, [out, in], in the dtype of the layer it stands for; until the next decode."""
        device = self.codes.device
        stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
        place = _place(self.out_features, self.in_features, self._dtype, device, stream, threading.get_ident())
        # Binding looks at the scales, and would wait for the device each time. What a launch was bound to it keeps
        # alive, so that no other tensor has these addresses.
        key = (self.codes.data_ptr(), place.data_ptr())
        if key not in self._launches:
            self._launches[key] = (place, self._decoder.bind(packed_views(self._packing, self.codes), place))
        self._launches[key][1]()
        return place

    def __getstate__(self) -> dict[str, Any]:
        # A copy has codes of its own, and launches bound to these would decode the wrong ones.
        return {**self.__dict__, "_launches": {}}

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in], in the layer's dtype or under autocast -> [..., out]."""
        y: Tensor = _Product.apply(x, self.bias, self.decoded)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        return y

    def extra_repr(self) -> str:
        """For ``print(model)``."""
        return f"nvfp4, in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class FusedLinear(StandIn):
    """``FP4Linear`` on the layer's weight: codes decoded in registers by our kernels on a GPU, by plain torch on a CPU.

    Args:
        site: the layer it stands for; its weight is read, its bias taken over as the same object.
        device: where it computes.
        fmt: a format of ``FP4Linear``.

    Raises:
        Unsupported: as ``FP4Linear.from_weight`` does, and ``nonfinite_weight``.
    """

    def __init__(self, site: LinearSite, device: torch.device, fmt: str) -> None:
        super().__init__(site)
        self._device, self._format = device, fmt
        self.encode()

    def encode(self) -> None:
        """Make the codes anew from the kept weight."""
        from vbench.kernels.fp4_linear import FP4Linear

        site = self._site[0]
        bare = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        bare.weight = nn.Parameter(site.weight_nk(site.weight.detach()).to(self._device).contiguous(), False)
        inner = FP4Linear.from_linear(bare, self._format, device=self._device)
        inner.bias = self.bias
        self._inner = (inner,)  # in a tuple: its keys are none of the model's
        for name in ("codes", "scale", "global_scale"):  # so that budgets count them
            self.register_buffer(name, getattr(inner, name), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] in the layer's dtype -> [..., out]."""
        y: Tensor = self._inner[0](x)
        return y

    def extra_repr(self) -> str:
        """For ``print(model)``."""
        return self._inner[0].extra_repr()


class _Product(torch.autograd.Function):
    """x w^T + bias, where w is made when it is needed and never kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, decode: Callable[[], Tensor]) -> Tensor:
        ctx.decode, ctx.dtypes = decode, (x.dtype, None if bias is None else bias.dtype)
        return F.linear(x, decode(), bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        dy = gradients[0]
        x_dtype, bias_dtype = ctx.dtypes
        # Under autocast the product was in 16 bits, and so is its gradient.
        dx = (dy @ ctx.decode().to(dy.dtype)).to(x_dtype) if ctx.needs_input_grad[0] else None
        dbias = dy.flatten(0, -2).sum(0).to(bias_dtype) if ctx.needs_input_grad[1] else None
        return dx, dbias, None
