"""Weights that lie and travel as 4-bit codes and are decoded on the device, on the way into a slot.

nvfp4: E2M1 codes, one E4M3 scale per 16 along k, one float32 scale a weight; 0.5625 bytes an element where bf16 has 2.
The encoder follows torchao's ``NVFP4Tensor.to_nvfp4`` for the scales and OCP Microscaling v1.0 for E2M1, nearest with
ties to even, as op ``fp4_quantize`` defines it; a module then computes with decode(encode(w)), bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import entry_points
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from vbench.errors import Unsupported
from vbench.kernels.tiers.decode import Decoder
from vbench.kernels.tiers.links import Links
from vbench.kernels.tiers.marks import Marks, join
from vbench.kernels.tiers.units import Packing, Piece, Unit
from vbench.spec import TORCH_DTYPE_NAMES, Case, ParamValue, resolve

CODECS = ("raw", "nvfp4")
GROUP = 16
#: One is copied into while another is decoded.
STAGING_BUFFERS = 2
#: Elements encoded or decoded by plain torch at a time: its temporaries are several times as large.
CHUNK = 1 << 22
#: E4M3 1.0: a scale that every decoder takes.
ONE_SCALE_BYTE = 0x38
E4M3_MAX, E4M3_MIN_SCALE, E2M1_MAX, MIN_NORMAL = 448.0, 2.0**-6, 6.0, 2.0**-126
DTYPES: Mapping[torch.dtype, str] = {getattr(torch, TORCH_DTYPE_NAMES[name]): name for name in ("bf16", "fp16", "fp32")}

#: Packed tensors of a weight: ``codes`` u8 [n, k/2], ``scale`` float8_e4m3fn [n, k/16], ``global_scale`` float32 [1].
Packed = Mapping[str, Tensor]


class WeightDecoder(Protocol):
    """How packed weights become values on the device."""

    def bind(self, packed: Packed, target: Tensor) -> Callable[[], object]:
        """A launch on the stream current when it is called: decode ``packed`` into ``target`` [n, k].

        Called while nothing else reads or writes ``packed``; its scales are valid then.
        """
        ...


class TorchDecoder:
    """Plain torch, on any device; a few rows at a time."""

    def bind(self, packed: Packed, target: Tensor) -> Callable[[], object]:
        decoder = _table(target.device)
        rows = max(1, CHUNK // target.shape[1])

        def launch() -> None:
            for start in range(0, target.shape[0], rows):
                part = {name: packed[name][start : start + rows] for name in ("codes", "scale")}
                decoder.into(target[start : start + rows], {**part, "global_scale": packed["global_scale"]})

        return launch


@cache
def _table(device: torch.device) -> Decoder:
    return Decoder("nvfp4", device)


class BackendDecoder:
    """Op ``fp4_dequantize`` of an installed backend.

    Args:
        backend: name of its entry point in group ``vbench.backends``.

    Raises:
        Unsupported: ``no_decoder``: there is none of that name.
    """

    def __init__(self, backend: str) -> None:
        found = entry_points(group="vbench.backends", name=backend)
        if not found:
            raise Unsupported(
                "no_decoder", f"backend {backend} decodes nvfp4 on a GPU and is not installed; codec='raw'"
            )
        self._make = resolve(next(iter(found)).load().ops["fp4_dequantize"])

    def bind(self, packed: Packed, target: Tensor) -> Callable[[], object]:
        n, k = target.shape
        values: dict[str, ParamValue] = {"fmt": "nvfp4", "y": DTYPES[target.dtype], "dist": "normal", "n": n, "k": k}
        kernel = self._make(Case("fp4_dequantize", tuple(values.items())), "", target.device.type)
        launch: Callable[[], object] = kernel.bind(packed, {"weight": target})
        return launch


def default_decoder(device: torch.device) -> WeightDecoder:
    """Triton's kernel on a GPU, plain torch elsewhere.

    Raises:
        Unsupported: ``no_decoder``.
    """
    return BackendDecoder("triton") if device.type == "cuda" else TorchDecoder()


def mark_packed(module: nn.Module, units: Sequence[Unit], codec: str) -> None:
    """Let each ``nn.Linear``'s weight be stored packed; other parameters, and weights tied to others, stay as they are.

    Raises:
        Unsupported: ``unknown_codec``; ``codec_trainable``: a weight wants gradients, and codes have none;
            ``codec_shape``, ``codec_dtype``: a weight that nvfp4 cannot hold.
    """
    if codec not in CODECS:
        raise Unsupported("unknown_codec", f"codec={codec!r} is not one of {', '.join(CODECS)}")
    if codec == "raw":
        return
    linear = {id(m.weight) for m in module.modules() if isinstance(m, nn.Linear)}
    for part in module.modules():
        if not isinstance(part, nn.Linear):
            linear -= {id(p) for p in part.parameters(recurse=False)}
    for unit in units:
        for piece in unit.pieces:
            view = piece.views[0]
            if len(piece.views) > 1 or id(view.parameter) not in linear:
                continue
            weight = view.parameter
            if weight.requires_grad:
                raise Unsupported(
                    "codec_trainable",
                    f"a weight of {unit.name} trains, and {codec} holds frozen ones only: requires_grad_(False), or "
                    "codec='raw'",
                )
            n, k = weight.shape
            whole = weight.is_contiguous() and weight.numel() * weight.element_size() == piece.size_bytes
            if k % GROUP or not whole:
                raise Unsupported(
                    "codec_shape",
                    f"{codec} holds contiguous [n, k] weights with k a multiple of {GROUP}; {unit.name} has "
                    f"{tuple(weight.shape)}: take codec='raw'",
                )
            if weight.dtype not in DTYPES:
                raise Unsupported(
                    "codec_dtype", f"{unit.name} is {weight.dtype}; {codec} encodes {', '.join(DTYPES.values())}"
                )
            piece.packing = Packing(n, k)
        unit.lay_out()


def packed_views(packing: Packing, memory_u8: Tensor) -> dict[str, Tensor]:
    """The packed tensors over the bytes of a piece (uint8 vector of ``packing.size_bytes``)."""
    n, k = packing.n, packing.k
    codes, scales, last = packing.starts
    return {
        "codes": memory_u8[codes : codes + n * k // 2].view(n, k // 2),
        "scale": memory_u8[scales : scales + n * k // GROUP].view(torch.float8_e4m3fn).view(n, k // GROUP),
        "global_scale": memory_u8[last : last + 4].view(torch.float32),
    }


def encode(weight: Tensor, into: Packed, device: torch.device) -> None:
    """Encode ``weight`` [n, k] (bf16, fp16, fp32, anywhere) into packed tensors, computing on ``device`` by chunks.

    Raises:
        Unsupported: ``nonfinite_weight``.
    """
    n, k = weight.shape
    rows = max(1, CHUNK // k)
    chunks = [(i, min(i + rows, n)) for i in range(0, n, rows)]
    # NaN wins a maximum, so that this one look suffices.
    largest = torch.stack([weight[a:b].to(device).abs().amax() for a, b in chunks]).amax().to(torch.float32)
    if not bool(torch.isfinite(largest)):
        raise Unsupported("nonfinite_weight", "a weight holds NaN or Inf and FP4 has no code for them; codec='raw'")
    # Divisors are tensors: dividing by a Python number may be turned into multiplying by its reciprocal.
    one = torch.ones(1, dtype=torch.float32, device=device)
    g = torch.clamp(largest.reshape(1) / (one * E2M1_MAX * E4M3_MAX), min=MIN_NORMAL)
    into["global_scale"].copy_(g)
    for a, b in chunks:
        groups = weight[a:b].to(device, torch.float32).reshape(b - a, k // GROUP, GROUP)
        scale = torch.clamp(groups.abs().amax(-1) / (one * E2M1_MAX) / g, E4M3_MIN_SCALE, E4M3_MAX)
        scale = scale.to(torch.float8_e4m3fn)
        codes = _e2m1(groups / (scale.to(torch.float32) * g).unsqueeze(-1)).reshape(b - a, k)
        into["scale"][a:b].view(torch.uint8).copy_(scale.view(torch.uint8))
        into["codes"][a:b].copy_(codes[:, 0::2] | (codes[:, 1::2] << 4))


def _e2m1(value: Tensor) -> Tensor:
    """float32 -> E2M1 codes u8, nearest, ties to even, saturating; bit 3 is the sign, of zero too."""
    # Between neighbours of E2M1 lie steps of 1/2 up to 2, of 1 up to 4, of 2 up to 6; rint rounds ties to even there.
    a = value.abs()
    small = torch.round(a * 2)
    middle = torch.round(a) + 2
    large = torch.round(a / 2) + 4
    code = torch.where(a < 2, small, torch.where(a < 4, middle, large)).clamp(max=7)
    return code.to(torch.uint8) | (torch.signbit(value).to(torch.uint8) << 3)


@dataclass(slots=True)
class _Buffer:
    """``memory_u8``: where packed bytes arrive; ``free``: when nobody reads what is there any more."""

    memory_u8: Tensor
    free: Marks = ()


class Expander:
    """Brings packed units to the device: one copy into a staging buffer, then the decodes from there.

    Args:
        units: all of the module's.
        device: where to.
        links: by which bytes travel.
        decoder: of the weights.
    """

    def __init__(self, units: Sequence[Unit], device: torch.device, links: Links, decoder: WeightDecoder) -> None:
        self._links = links
        self._decoder = decoder
        self._device = device
        self._largest = max((unit.stored_bytes for unit in units if unit.packed), default=0)
        self._buffers: list[_Buffer] = []
        self._next = 0
        self._launches: dict[tuple[int, int, int, int], Callable[[], object]] = {}

    @property
    def staging_bytes(self) -> int:
        """Device bytes of the buffers while they exist."""
        return STAGING_BUFFERS * self._largest

    def open(self) -> None:
        """Make the buffers."""
        if self._largest and not self._buffers:
            for _ in range(STAGING_BUFFERS):
                memory_u8 = torch.empty(self._largest, dtype=torch.uint8, device=self._device)
                self._buffers.append(_Buffer(memory_u8))

    def close(self) -> None:
        """Let go of the buffers; what was issued must be over."""
        self._buffers.clear()
        self._launches.clear()

    def forget(self, place_u8: Tensor) -> None:
        """Drop the launches bound to a place that no unit will be brought to again."""
        address = place_u8.data_ptr()
        self._launches = {key: launch for key, launch in self._launches.items() if key[0] != address}

    def prepare(self, units: Sequence[Unit], places: Sequence[Tensor]) -> None:
        """Bind, and run once, the decodes of ``units`` into ``places`` (uint8 vectors), so that none binds on the way.

        Nothing may be on its way: buffers and places are written.
        """
        for place in places:
            for buffer in self._buffers:
                for unit in units:
                    keys = self._keys(unit, place[: unit.size_bytes], buffer)
                    for key, piece in zip(keys, unit.pieces, strict=True):
                        self._launches[key] = self._expansion(piece, place, buffer)
                        self._launches[key]()
        now = self._links.compute_mark(self._links.compute_stream())
        for buffer in self._buffers:
            buffer.free = join(buffer.free, now)

    def bring(self, unit: Unit, to_u8: Tensor, source_u8: Tensor, after: Marks) -> Marks:
        """Copy the unit's stored bytes and decode them into ``to_u8``, which is written only once ``after`` is over.

        ``prepare`` must have seen the unit and the place.
        """
        buffer = self._buffers[self._next]
        self._next = (self._next + 1) % len(self._buffers)
        launches = [self._launches[key] for key in self._keys(unit, to_u8, buffer)]
        arrived = self._links.copy(buffer.memory_u8[: unit.stored_bytes], source_u8, buffer.free)

        def work() -> None:
            for launch in launches:
                launch()

        done = self._links.beside(work, join(arrived, after))
        buffer.free = done
        return done

    def _keys(self, unit: Unit, to_u8: Tensor, buffer: _Buffer) -> list[tuple[int, int, int, int]]:
        return [(to_u8.data_ptr(), buffer.memory_u8.data_ptr(), unit.index, i) for i in range(len(unit.pieces))]

    def _expansion(self, piece: Piece, to_u8: Tensor, buffer: _Buffer) -> Callable[[], object]:
        """What turns a piece's stored bytes in ``buffer`` into its bytes in the unit at ``to_u8``."""
        stored_u8 = buffer.memory_u8[piece.stored_start : piece.stored_start + piece.stored_bytes]
        whole_u8 = to_u8[piece.start : piece.start + piece.size_bytes]
        if piece.packing is None:
            return lambda: whole_u8.copy_(stored_u8)
        packed = packed_views(piece.packing, stored_u8)
        # Decoders look at the scales when they bind, and nothing has arrived yet.
        packed["scale"].view(torch.uint8).fill_(ONE_SCALE_BYTE)
        packed["global_scale"].fill_(1.0)
        target = whole_u8.view(piece.views[0].dtype).view(piece.packing.n, piece.packing.k)
        return self._decoder.bind(packed, target)


def store(unit: Unit, into_u8: Tensor, device: torch.device) -> None:
    """Copy or encode the unit's storages from where they are now into its stored form (uint8 vector)."""
    for piece in unit.pieces:
        stored = into_u8[piece.stored_start : piece.stored_start + piece.stored_bytes]
        if piece.packing is not None:
            encode(piece.views[0].parameter.data, packed_views(piece.packing, stored), device)
            continue
        source: Any = piece.views[0].parameter.untyped_storage()
        stored.copy_(torch.empty(0, dtype=torch.uint8, device=source.device).set_(source))


def restore(unit: Unit, stored_u8: Tensor) -> Tensor:
    """The unit's bytes, decoded by plain torch on the host, from its stored form in host memory."""
    whole_u8 = torch.zeros(unit.size_bytes, dtype=torch.uint8)
    for piece in unit.pieces:
        stored = stored_u8[piece.stored_start : piece.stored_start + piece.stored_bytes]
        whole = whole_u8[piece.start : piece.start + piece.size_bytes]
        if piece.packing is None:
            whole.copy_(stored)
        else:
            target = whole.view(piece.views[0].dtype).view(piece.packing.n, piece.packing.k)
            TorchDecoder().bind(packed_views(piece.packing, stored), target)()
    return whole_u8
