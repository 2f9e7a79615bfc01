"""What of a module travels between levels, and in which lumps.

The thing that travels is a *storage* (tied weights and views of one buffer stay tied); storages that one module owns
directly form a *unit*, which lies contiguous on the host and moves in one copy. A module needs the units of all its
direct parameters, also of those it shares with an earlier module.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from vbench.errors import Unsupported

#: Modules whose forward reads parameters of its children without calling them (torch's fused attention paths do).
READS_CHILDREN: tuple[type[nn.Module], ...] = (nn.MultiheadAttention, nn.TransformerEncoderLayer)

#: Units and storages start at multiples of this: CUDA's own allocations do, and kernels choose by alignment.
ALIGN_BYTES = 512


@dataclass(slots=True)
class View:
    """A parameter as a view of its storage: dtype, shape, strides and offset in elements, kept through every move."""

    parameter: nn.Parameter
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    def over(self, storage_u8: Tensor) -> Tensor:
        """The same view over the bytes of ``storage_u8`` (uint8 vector, whole storage)."""
        typed = storage_u8.view(self.dtype)
        return typed.as_strided(self.shape, self.stride, typed.storage_offset() + self.offset)


@dataclass(frozen=True, slots=True)
class Packing:
    """A weight [n, k] stored as nvfp4: codes, then a scale per 16 along k, then the global scale."""

    n: int
    k: int

    @property
    def starts(self) -> tuple[int, int, int]:
        """Where codes, scales and the global scale begin."""
        scales = aligned(self.n * self.k // 2)
        return 0, scales, scales + aligned(self.n * self.k // 16)

    @property
    def size_bytes(self) -> int:
        return self.starts[-1] + ALIGN_BYTES


@dataclass(slots=True)
class Piece:
    """One storage: its bytes, where it starts in its unit, and every parameter that looks at it.

    ``packing``: how it is stored below the device, ``None`` for as it is; ``stored_start``: where in the stored unit.
    """

    size_bytes: int
    start: int
    views: list[View] = field(default_factory=list)
    packing: Packing | None = None
    stored_start: int = 0

    @property
    def stored_bytes(self) -> int:
        return self.size_bytes if self.packing is None else self.packing.size_bytes


@dataclass(slots=True)
class Unit:
    """Storages that move together.

    ``size_bytes`` on the device and ``stored_bytes`` below it count the padding between them; they differ where a piece
    is packed.
    """

    index: int
    name: str
    pieces: list[Piece] = field(default_factory=list)
    size_bytes: int = 0
    stored_bytes: int = 0

    @property
    def packed(self) -> bool:
        """Whether any piece is stored in another form than it has on the device."""
        return any(piece.packing is not None for piece in self.pieces)

    def lay_out(self) -> None:
        """Place the pieces in the stored unit; to be called again once packings are chosen."""
        self.stored_bytes = 0
        for piece in self.pieces:
            piece.stored_start = self.stored_bytes
            self.stored_bytes = aligned(self.stored_bytes + piece.stored_bytes)

    def views(self, unit_u8: Tensor) -> list[tuple[View, Tensor]]:
        """Each parameter's view over the unit's bytes (uint8 vector of at least ``size_bytes``)."""
        return [
            (view, view.over(unit_u8[piece.start : piece.start + piece.size_bytes]))
            for piece in self.pieces
            for view in piece.views
        ]

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [view.parameter for piece in self.pieces for view in piece.views]


def aligned(size_bytes: int) -> int:
    """``size_bytes`` rounded up to ``ALIGN_BYTES``."""
    return -(-size_bytes // ALIGN_BYTES) * ALIGN_BYTES


def _check(name: str, parameter: nn.Parameter) -> None:
    # isinstance is too generous here: a subclass (quantised, distributed) keeps its bytes where no copy of ours finds
    # them.
    if type(parameter.data) is not Tensor:
        kind = type(parameter.data).__name__
        raise Unsupported("tensor_subclass", f"parameter {name} is a {kind}; tier its plain tensors instead")
    if parameter.layout is not torch.strided:
        raise Unsupported("sparse_parameter", f"parameter {name} has layout {parameter.layout}; make it dense")
    if parameter.device.type == "meta":
        raise Unsupported("meta_parameter", f"parameter {name} has no values yet (meta device); load weights first")


def discover(
    module: nn.Module, reads_children: tuple[type[nn.Module], ...] = ()
) -> tuple[list[Unit], Mapping[nn.Module, tuple[int, ...]]]:
    """Units of a module in definition order, and for each submodule the units it needs.

    Parameters without elements travel nowhere and belong to no unit.

    Args:
        reads_children: classes, beside ``READS_CHILDREN``, whose forward uses the parameters of submodules directly.

    Raises:
        Unsupported: ``tensor_subclass``, ``sparse_parameter``, ``meta_parameter``.
    """
    units: list[Unit] = []
    needs: dict[nn.Module, tuple[int, ...]] = {}
    piece_of: dict[int, tuple[int, Piece]] = {}
    seen: set[int] = set()
    for prefix, submodule in module.named_modules():
        needed: list[int] = []
        unit = Unit(len(units), prefix or "(root)")
        for name, parameter in submodule.named_parameters(prefix, recurse=False):
            _check(name, parameter)
            if parameter.numel() == 0:
                continue
            storage = parameter.untyped_storage()
            address = storage.data_ptr()
            if address not in piece_of:
                piece = Piece(storage.nbytes(), aligned(unit.size_bytes))
                unit.pieces.append(piece)
                unit.size_bytes = piece.start + piece.size_bytes
                piece_of[address] = (unit.index, piece)
            owner, piece = piece_of[address]
            if id(parameter) not in seen:
                seen.add(id(parameter))
                shape, stride = tuple(parameter.shape), parameter.stride()
                piece.views.append(View(parameter, parameter.dtype, shape, stride, parameter.storage_offset()))
            if owner not in needed:
                needed.append(owner)
        if unit.pieces:
            unit.size_bytes = aligned(unit.size_bytes)
            unit.lay_out()
            units.append(unit)
        if needed:
            needs[submodule] = tuple(needed)
    for submodule in module.modules():
        if isinstance(submodule, READS_CHILDREN + reads_children):
            below = dict.fromkeys(unit for part in submodule.modules() for unit in needs.get(part, ()))
            if below:
                needs[submodule] = tuple(below)
    return units, needs


def deepest(module: nn.Module, needs: Mapping[nn.Module, tuple[int, ...]]) -> int:
    """Most units in use at once in one call: those along the path from the root to any submodule."""

    def walk(at: nn.Module, held: frozenset[int], path: frozenset[int]) -> int:
        if id(at) in path:
            return len(held)
        now = held | frozenset(needs.get(at, ()))
        below = (walk(child, now, path | {id(at)}) for child in at.children())
        return max([len(now), *below])

    return walk(module, frozenset(), frozenset())
