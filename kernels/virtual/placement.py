"""Whether a training runs within a budget, and what of it must stream for that.

A plan that adds up tensors says what would fit if memory had no holes. A training dies by its holes: what outlives a
backward lies in the middle of what the loss had, and the next step finds no room in one piece. So a plan is tried: the
steps' allocations, in their order, on the allocator as it behaves (``allocator.py``) under the budget's limit. What is
accepted ran there. The loop keeps its side (``training.py``): what lives for ever is allocated before the first step,
gradients go as soon as the optimizer has stepped, and where that is needed free segments after each step.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

from vbench.errors import UsageError
from vbench.kernels.tiers.budget import BudgetError
from vbench.kernels.tiers.gradients import IN_FLIGHT
from vbench.kernels.tiers.residency import Residency, plan
from vbench.kernels.tiers.tiered import TRAINING_COST
from vbench.kernels.tiers.units import aligned
from vbench.kernels.virtual.allocator import CachingAllocator, SimulatedOutOfMemory
from vbench.kernels.virtual.estimate import fp4_blocks
from vbench.kernels.virtual.hardware import Card
from vbench.kernels.virtual.program import Program, Workload
from vbench.kernels.virtual.shapes import ModelShape
from vbench.kernels.virtual.tape import Tape
from vbench.kernels.virtual.units import show_bytes

#: Share of what a plan reserves that is kept free besides: the estimator was off by 1.76 % at the worst of 50 points
#: measured on an H200 (results/systems/h200/estimator.json).
MARGIN = 0.02
#: AdamW's states of a parameter: two moments as large as it, and a step count that takes a block of its own.
MOMENTS = 2
#: After these the allocator's segments have found their places; an evaluation comes in between.
STEPS = 3


@dataclass(frozen=True, slots=True)
class UnitSizes:
    """What one module owns directly, hence travels at once: the parameters' names on the tape, and their bytes."""

    names: tuple[str, ...]
    parameters_bytes: tuple[int, ...]

    @property
    def size_bytes(self) -> int:
        """As a tiered unit: each storage and the unit on boundaries of their own."""
        return sum(aligned(size) for size in self.parameters_bytes)


@dataclass(frozen=True, slots=True)
class Placement:
    """A training that runs within its limit, on the simulated allocator.

    Args:
        residency: which units stay on the device; ``None`` if all do and nothing is tiered.
        activation_bytes: to leave to everything but weights, for ``Budget``; 0 if nothing is tiered.
        gives_back: free segments must go back to the driver after each step and evaluation, or holes grow too large.
        allocated_bytes, reserved_bytes: the peaks of tensors and of segments; context left out.
    """

    residency: Residency | None
    activation_bytes: int
    gives_back: bool
    allocated_bytes: int
    reserved_bytes: int


def unit_sizes(
    shape: ModelShape, parameter_bytes: int, *, without_matrices: bool = False
) -> tuple[list[UnitSizes], int]:
    """The units of ``modules.LanguageModel``, in its order, and how many of them are in use at once at the most.

    Args:
        without_matrices: the blocks' weight matrices do not travel (masters of FP4 codes, which stay on the host).
    """

    def unit(*parts: tuple[str, int]) -> UnitSizes:
        return UnitSizes(tuple(n for n, _ in parts), tuple(e * parameter_bytes for _, e in parts))

    def norm(name: str) -> UnitSizes:
        parts = [(f"{name}.weight", shape.width)]
        return unit(*parts, *([(f"{name}.bias", shape.width)] if shape.family == "gpt" else []))

    units = [unit(("positions", shape.context * shape.width))] if shape.family == "gpt" else []
    units.append(unit(("embedding", shape.vocabulary * shape.width)))
    for i in range(shape.layers):
        units.append(norm(f"block{i}.norm1"))
        for owner in ("attn", "mlp"):
            if owner == "mlp":
                units.append(norm(f"block{i}.norm2"))
            for name, n_out, n_in, bias in shape.block_linears:
                if name.startswith(owner):
                    full = f"block{i}.{name}"
                    matrix = [] if without_matrices else [(full, n_out * n_in)]
                    parts = [*matrix, *([(f"{full}.bias", n_out)] if bias else [])]
                    if parts:
                        units.append(unit(*parts))
    units.append(norm("norm"))
    if not shape.tied:
        units.append(unit(("head", shape.vocabulary * shape.width)))
    # A gpt's root owns the position table and holds it while its children run.
    return units, 2 if shape.family == "gpt" else 1


class _Step:
    """Passes what a tape asks on to the allocator; whatever is live at the end goes."""

    def __init__(self, allocator: CachingAllocator) -> None:
        self._allocator = allocator
        self._live: dict[int, Any] = {}

    def allocate(self, size_bytes: int) -> Any:
        block = self._allocator.allocate(size_bytes)
        self._live[id(block)] = block
        return block

    def free(self, block: Any) -> None:
        del self._live[id(block)]
        self._allocator.free(block)

    def end(self) -> None:
        for block in list(self._live.values()):
            self.free(block)


def simulate(
    shape: ModelShape,
    work: Workload,
    card: Card,
    residency: Residency | None,
    *,
    limit_bytes: int,
    gives_back: bool,
    accumulation: int = 1,
) -> CachingAllocator:
    """Run ``STEPS`` steps and an evaluation of the training loop on a simulated allocator, and return it.

    Args:
        residency: of ``unit_sizes``; ``None``: nothing is tiered.
        limit_bytes: most that may be reserved; ``gives_back``: see ``Placement``.
        accumulation: forwards and backwards a step.

    Raises:
        SimulatedOutOfMemory: it died.
    """
    units, _ = unit_sizes(shape, work.parameter_bytes, without_matrices=work.fp4 and residency is not None)
    allocator = CachingAllocator(limit_bytes)
    stays = [True] * len(units) if residency is None else list(residency.resident)
    leaving = {name for unit, here in zip(units, stays, strict=True) if not here for name in unit.names}
    masters = {f"block{i}.{name}": n * k for i in range(shape.layers) for name, n, k, _ in shape.block_linears}
    aside = work.fp4 and residency is not None
    leaving |= set(masters) if aside else set()
    for size in itertools.chain(*fp4_blocks(shape, work)):
        allocator.allocate(size)
    for _ in range(0 if residency is None else residency.slots):
        assert residency is not None
        allocator.allocate(residency.slot_bytes)
    here = [unit for unit, resident in zip(units, stays, strict=True) if resident]
    for unit in here:
        for size in unit.parameters_bytes if residency is None else (unit.size_bytes,):
            allocator.allocate(size)
    for unit in here:
        for size in unit.parameters_bytes:
            for state in (4, *[size] * MOMENTS):
                allocator.allocate(state)
    if work.device == "cuda":
        for _ in range(2):  # of the forward's thread and the backward's
            allocator.allocate(card.matrix_workspace_bytes // 2)
    for index in range(STEPS):
        step = _Step(allocator)
        tape = Tape(allocator=step, leaving=leaving, in_flight=IN_FLIGHT)
        for _ in range(min(accumulation, 2)):  # from the second on gradients are there already
            loss = Program(shape, work, tape).forward()
            tape.backward(loss)
            tape.free(loss)
        step.end()
        if aside:  # where a master from the host is encoded
            allocator.free(allocator.allocate(max(masters.values()) * work.parameter_bytes))
        if gives_back:
            allocator.empty_cache()
        if index == 0:
            step = _Step(allocator)
            Program(shape, work, Tape(saving=False, allocator=step)).forward()
            step.end()
            if gives_back:
                allocator.empty_cache()
    return allocator


def place(
    shape: ModelShape, work: Workload, card: Card, *, tiers: bool, accumulation: int = 1, margin: float = MARGIN
) -> Placement | None:
    """How a training runs within ``card``: all of it there, or, if ``tiers`` are allowed, some of it streamed.

    Args:
        margin: share of what is reserved to keep free besides.

    Returns:
        ``None`` where it runs in neither way that was allowed and tiers were not.

    Raises:
        UsageError: with tiers: what of it does not fit, by how many bytes, and what to turn.
    """
    room = card.memory_bytes - card.context_bytes
    limit = int(room / (1 + margin))
    for gives_back in (False, True):
        try:
            tried = simulate(
                shape, work, card, None, limit_bytes=limit, gives_back=gives_back, accumulation=accumulation
            )
        except SimulatedOutOfMemory:
            continue
        return Placement(None, 0, gives_back, tried.peak_allocated_bytes, tried.peak_reserved_bytes)
    return _tiered(shape, work, card, room, limit, accumulation) if tiers else None


def _tiered(shape: ModelShape, work: Workload, card: Card, room: int, limit: int, accumulation: int) -> Placement:
    units, depth = unit_sizes(shape, work.parameter_bytes, without_matrices=work.fp4)
    codes = sum(fp4_blocks(shape, work)[0])
    sizes = [unit.size_bytes for unit in units]
    activations = working_bytes(shape, work, card)
    if activations > limit:
        raise UsageError(
            f"--vgpu-auto: activations alone take an estimated {show_bytes(activations)}, "
            f"{show_bytes(activations - limit)} more than the budget leaves; lower --batch or --seq, or add "
            "--gradient-checkpointing"
        )
    while True:
        try:
            residency = plan(
                sizes, room - activations - codes, max(2, depth + 1), [TRAINING_COST] * len(sizes), [True] * len(sizes)
            )
        except BudgetError as error:
            raise UsageError(
                f"--vgpu-auto: {error} (gpu is the budget less the context, activations take {activations} bytes with "
                "the holes that they leave: raise --budget, lower --batch or --seq, or add --gradient-checkpointing)"
            ) from error
        try:
            tried = simulate(
                shape, work, card, residency, limit_bytes=limit, gives_back=True, accumulation=accumulation
            )
        except SimulatedOutOfMemory as error:
            activations += max(error.short_bytes, min(sizes))
        else:
            return Placement(residency, activations, True, tried.peak_allocated_bytes, tried.peak_reserved_bytes)


def working_bytes(shape: ModelShape, work: Workload, card: Card) -> int:
    """The most that lives on the device at once beside parameters, their codes, gradients and states; no context."""
    tape = Tape()
    tape.backward(Program(shape, work, tape).forward())
    places = sum(fp4_blocks(shape, work)[1])
    return tape.working_peak_bytes + places + (card.matrix_workspace_bytes if work.device == "cuda" else 0)


def least_bytes(shape: ModelShape, work: Workload, card: Card, *, accumulation: int = 1) -> int:
    """Least memory, context and margin included, in which the whole training runs without tiers."""
    limit = 0
    while True:
        try:
            simulate(shape, work, card, None, limit_bytes=limit, gives_back=True, accumulation=accumulation)
        except SimulatedOutOfMemory as error:
            limit += error.short_bytes
        else:
            return int(limit * (1 + MARGIN)) + 1 + card.context_bytes
