"""A linear layer on a 4-bit weight for inference: ``FP4Linear.from_linear(linear, format="nvfp4")``.

In files and in the API the weight is canonical (codes, scales, global scale; see codec.py), with the version of that
layout beside it; in memory it is what the engine reads, one copy. A state dict therefore moves between engines,
devices and dtypes, and saved and loaded it is the same bits. Engine ``triton`` runs the kernels of backend ``triton``
and is what a CUDA device gets; ``torch`` decodes in plain torch at each call and is what a CPU gets. Which it is, is
decided at construction, shown by ``repr`` and never changed on the way.

    layer = FP4Linear.from_linear(linear, format="mxfp4")
    safetensors.torch.save_file(layer.state_dict(), "layer.safetensors")
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vbench.errors import Unsupported
from vbench.kernels.fp4_linear import codec, tiles
from vbench.kernels.fp4_linear.operator import fp4_linear
from vbench.kernels.triton.packing import BYTE_SCALES, GROUPS, check_weight

#: Version of the canonical layout in state dicts.
LAYOUT_VERSION = 1
ENGINES = ("torch", "triton")
#: Keys of a state dict beside ``bias``.
STATE = ("weight_codes", "weight_scale", "weight_global_scale", "weight_layout")


def _empty(fmt: str, n: int, k: int, device: torch.device) -> dict[str, Tensor]:
    """A canonical weight of zero bytes: of the right shapes, to be loaded into."""
    group = GROUPS[fmt]
    shape = (1,) if group == 0 else (n,) if group == -1 else (n, k // group)
    return {
        "codes": torch.zeros(n, k // 2, dtype=torch.uint8, device=device),
        "scale": torch.zeros(shape, dtype=torch.float32, device=device).to(BYTE_SCALES.get(fmt, torch.float32)),
        "global_scale": torch.ones(1, device=device),
    }


class FP4Linear(nn.Module):
    """y = x W^T + bias with W in 4 bits; W is not trained, x and bias have gradients.

    The constructor makes a layer of zero scales, to be loaded into; ``from_linear`` and ``from_weight`` fill it.

    Args:
        in_features, out_features, bias: as ``nn.Linear``.
        format: absmax7_tensor, absmax7_row, absmax7_g128, nvfp4, mxfp4 or nf4.
        dtype: of x, bias and y: bf16, fp16 or fp32. Fixed, as the device is: see ``converted``.
        engine: ``torch`` or ``triton``; ``None`` is triton on CUDA and torch on a CPU.

    Attributes:
        prepare_s: seconds that bringing the weight into the engine's layout took.

    Raises:
        Unsupported: ``unknown_format``, ``unknown_engine``, ``zero_size``, ``k_odd``, ``k_not_multiple_of_block``,
            ``too_large``, ``x_dtype``, ``device``, ``gpu_too_old``, ``needs_triton``, ``not_interpreted``.
    """

    codes: Tensor
    scale: Tensor
    global_scale: Tensor
    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        format: str,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.bfloat16,
        engine: str | None = None,
    ) -> None:
        super().__init__()
        device = torch.device(device)
        if device.type not in ("cpu", "cuda"):
            raise Unsupported("device", f"device {device}: the engines run on cpu and cuda")
        if dtype not in tiles.NAMES:
            raise Unsupported("x_dtype", f"dtype {dtype} is not one of {', '.join(map(str, tiles.NAMES))}")
        self.engine = engine if engine is not None else "triton" if device.type == "cuda" else "torch"
        if self.engine not in ENGINES:
            raise Unsupported("unknown_engine", f"engine {engine!r} is not one of {', '.join(ENGINES)}")
        codec.check_shape(format, out_features, in_features)
        if self.engine == "triton":
            tiles.check_device(device, dtype, out_features, in_features)
        self.in_features, self.out_features, self.format, self.dtype = in_features, out_features, format, dtype
        self.layout: list[int] = []
        self.prepare_s = 0.0
        self._hold(_empty(format, out_features, in_features, device))
        zeros = torch.zeros(out_features, dtype=dtype, device=device)
        self.register_parameter("bias", nn.Parameter(zeros) if bias else None)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        format: str = "nvfp4",
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        engine: str | None = None,
    ) -> FP4Linear:
        """Encode a layer's weight; ``device`` and ``dtype`` default to the weight's own. The layer is left as it is.

        Raises:
            Unsupported: the constructor's, ``weight_dtype``, ``nonfinite_weight``.
        """
        weight = linear.weight.detach()
        device = weight.device if device is None else torch.device(device)
        n, k = weight.shape
        out = cls(
            k, n, linear.bias is not None, format=format, device=device, dtype=dtype or weight.dtype, engine=engine
        )
        out._hold({name: t.to(device) for name, t in codec.encode(format, weight).items()})
        if out.bias is not None:
            with torch.no_grad():
                out.bias.copy_(linear.bias)
            out.bias.requires_grad_(linear.bias.requires_grad)
        return out.train(linear.training)

    @classmethod
    def from_weight(
        cls,
        weight: Mapping[str, Tensor],
        bias: Tensor | None = None,
        *,
        format: str,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.bfloat16,
        engine: str | None = None,
    ) -> FP4Linear:
        """A canonical weight as it is; engine torch shares the tensors' memory where they are on the device.

        Raises:
            Unsupported: the constructor's, ``weight_shape``, ``weight_dtype``, ``scale_not_finite_positive``.
        """
        n, half = weight["codes"].shape
        device = weight["codes"].device if device is None else torch.device(device)
        out = cls(2 * half, n, bias is not None, format=format, device=device, dtype=dtype, engine=engine)
        check_weight(format, weight, n, 2 * half)
        out._hold({name: weight[name].to(device) for name in codec.FIELDS})
        if out.bias is not None and bias is not None:
            with torch.no_grad():
                out.bias.copy_(bias)
        return out

    def converted(
        self,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        engine: str | None = None,
    ) -> FP4Linear:
        """A new layer with the same weight, elsewhere or for another dtype; ``engine`` as in the constructor."""
        device = self.codes.device if device is None else torch.device(device)
        return FP4Linear.from_weight(
            self.weight(), None if self.bias is None else self.bias.detach(), format=self.format, device=device,
            dtype=dtype or self.dtype, engine=engine,
        )  # fmt: skip

    def _hold(self, weight: Mapping[str, Tensor]) -> None:
        """Take a canonical weight in the engine's layout; the only copy."""
        start = time.perf_counter()
        tensors: Mapping[str, Tensor] = weight
        if self.engine == "triton":
            tensors, self.layout = tiles.pack(self.format, weight, self.out_features, self.in_features, self.dtype)
        for name in codec.FIELDS:
            self.register_buffer(name, tensors[name], persistent=False)
        if self.codes.is_cuda:
            torch.cuda.synchronize(self.codes.device)
        self.prepare_s = time.perf_counter() - start

    def weight(self) -> dict[str, Tensor]:
        """The canonical weight: ``codes``, ``scale``, ``global_scale``; unpacked for the caller by engine triton."""
        tensors = {name: getattr(self, name) for name in codec.FIELDS}
        if self.engine == "torch":
            return tensors
        return tiles.unpack(self.format, tensors, self.out_features, self.in_features, self.layout)

    @property
    def weight_bytes(self) -> int:
        """Memory of codes and all scales, padding included."""
        return sum(getattr(self, name).nbytes for name in codec.FIELDS)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in_features] -> y [..., out_features]; no token at all is no error.

        Raises:
            Unsupported: ``x_shape``, ``x_dtype``, ``wrong_device``.
        """
        if x.dim() == 0 or x.shape[-1] != self.in_features:
            raise Unsupported("x_shape", f"x is {tuple(x.shape)}, this layer takes [..., {self.in_features}]")
        if x.dtype != self.dtype:
            raise Unsupported("x_dtype", f"x is {x.dtype}, this layer computes in {self.dtype}: see converted()")
        if x.device != self.codes.device:
            raise Unsupported("wrong_device", f"x is on {x.device}, the weight on {self.codes.device}: see converted()")
        y: Tensor = fp4_linear(
            x.reshape(-1, self.in_features), self.codes, self.scale, self.global_scale, self.bias, self.format,
            self.out_features, self.engine, self.layout,
        )  # fmt: skip
        return y.reshape(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"format={self.format}, engine={self.engine}, dtype={self.dtype}, device={self.codes.device}"
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FP4Linear:
        """``to``, ``half``, ``cuda`` and the like: nothing, or a refusal, since layout and engine follow both."""
        probe = torch.empty(0, dtype=self.dtype, device=self.codes.device)
        moved = fn(probe)
        if moved.dtype != probe.dtype or moved.device != probe.device:
            raise Unsupported(
                "fixed_at_construction",
                f"this layer is for {probe.dtype} on {probe.device}, not {moved.dtype} on {moved.device}: "
                "use converted(device=..., dtype=...)",
            )
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        text = {"version": LAYOUT_VERSION, "format": self.format, "n": self.out_features, "k": self.in_features}
        described = torch.tensor(list(json.dumps(text, sort_keys=True).encode()), dtype=torch.uint8)
        tensors = (*(t.contiguous() for t in self.weight().values()), described)
        destination.update({prefix + name: t for name, t in zip(STATE, tensors, strict=True)})

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Mapping[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Every rule is checked before anything is changed. Raises Unsupported as ``from_weight`` does, and
        ``layout_version``, ``other_layer``, ``layout_unreadable``."""
        given = {name: state_dict[prefix + name] for name in STATE if prefix + name in state_dict}
        missing_keys += [prefix + name for name in STATE if name not in given]
        if len(given) == len(STATE):
            self._check_described(given["weight_layout"], prefix)
            weight = {name: given[f"weight_{name}"] for name in codec.FIELDS}
            check_weight(self.format, weight, self.out_features, self.in_features)
            self._hold({name: t.detach().to(self.codes.device, copy=True) for name, t in weight.items()})
        rest = {key: value for key, value in state_dict.items() if key.removeprefix(prefix) not in STATE}
        super()._load_from_state_dict(
            rest, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )  # fmt: skip

    def _check_described(self, described: Tensor, prefix: str) -> None:
        here = f"{prefix}weight_layout"
        try:
            text = json.loads(bytes(described.cpu().tolist()).decode())
            version = text["version"]
            found = text["format"], text["n"], text["k"]
        except (ValueError, KeyError, TypeError) as error:
            raise Unsupported("layout_unreadable", f"{here} does not describe a 4-bit weight: save it again") from error
        if version != LAYOUT_VERSION:
            raise Unsupported(
                "layout_version", f"{here} is version {version}, this package reads {LAYOUT_VERSION}; convert it there"
            )
        wanted = self.format, self.out_features, self.in_features
        if found != wanted:
            raise Unsupported("other_layer", f"{here} is of {found}, this layer is {wanted} (format, n, k)")
