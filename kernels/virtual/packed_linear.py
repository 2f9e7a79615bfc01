"""A linear layer whose weight lies on the device as nvfp4 codes, in the place of one of a model's own.

It multiplies with decode(encode(w)): the codes are decoded into a fresh tensor for each use (4 bits at rest, the whole
weight of one layer at a time) and ``F.linear`` does the rest, so that a result is bit for bit that of the same layer
with the decoded weight. Gradients reach its input and its bias, not its weight.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vbench.errors import Unsupported
from vbench.kernels.tiers.codec import DTYPES, GROUP, WeightDecoder, encode, packed_views
from vbench.kernels.tiers.units import Packing
from vbench.kernels.virtual.linears import LinearSite


class PackedLinear(nn.Module):
    """y [..., out] = x [..., in] decode(codes)^T + bias.

    ``state_dict`` has the keys, shapes and values of the layer it stands for, whose weight parameter is kept on the
    host; ``load_state_dict`` takes such and encodes anew.

    Args:
        site: the layer it stands for; its weight is read, its bias taken over as the same object.
        device: where it computes.
        decoder: of its codes there.

    Raises:
        Unsupported: ``codec_shape``, ``codec_dtype``, ``nonfinite_weight``.
    """

    codes: Tensor

    def __init__(self, site: LinearSite, device: torch.device, decoder: WeightDecoder) -> None:
        super().__init__()
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
        self.out_features, self.in_features = n, k
        self._dtype = weight.dtype
        self._decoder = decoder
        self._site = (site,)  # in a tuple, so that the module it holds is none of this one's parts
        self._packing = Packing(n, k)
        codes = torch.empty(self._packing.size_bytes, dtype=torch.uint8, device=device)
        self.register_buffer("codes", codes, persistent=False)
        self.bias = site.bias
        self.encode()

    def encode(self) -> None:
        """Make the codes anew from the kept weight."""
        site = self._site[0]
        encode(site.weight_nk(site.weight.detach()), packed_views(self._packing, self.codes), self.codes.device)

    def decoded(self) -> Tensor:
        """The weight it multiplies with, [out, in], in the dtype of the layer it stands for."""
        weight = torch.empty(self.out_features, self.in_features, dtype=self._dtype, device=self.codes.device)
        self._decoder.bind(packed_views(self._packing, self.codes), weight)()
        return weight

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in], in the layer's dtype or under autocast -> [..., out]."""
        y: Tensor = _Product.apply(x, self.bias, self.decoded)  # type: ignore[no-untyped-call]
        return y

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

    def extra_repr(self) -> str:
        """For ``print(model)``."""
        return f"nvfp4, in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


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
