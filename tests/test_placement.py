"""No training that was accepted dies for want of memory: plans, and the real loop, on a simulated allocator."""

from __future__ import annotations

import gc
import itertools
import random
import tempfile
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vbench.errors import UsageError
from vbench.kernels.tiers import tiered as tiers
from vbench.kernels.tiers.budget import Budget, BudgetError
from vbench.kernels.tiers.residency import plan
from vbench.kernels.tiers.units import deepest, discover
from vbench.kernels.virtual import training
from vbench.kernels.virtual.allocator import (
    LARGE_SEGMENT_BYTES,
    SMALL_SEGMENT_BYTES,
    CachingAllocator,
    SimulatedOutOfMemory,
)
from vbench.kernels.virtual.corpus import join
from vbench.kernels.virtual.folder import DATA_FILE, TrainingFolder
from vbench.kernels.virtual.hardware import CARDS, Card
from vbench.kernels.virtual.modules import LanguageModel
from vbench.kernels.virtual.placement import Placement, least_bytes, least_for_weights, place, simulate, unit_sizes
from vbench.kernels.virtual.program import Workload
from vbench.kernels.virtual.settings import Settings, make_settings
from vbench.kernels.virtual.shapes import PRESETS, ModelShape
from vbench.kernels.virtual.training import Trainer

MIB = 1 << 20
H200 = CARDS["h200"]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# --- the allocator ------------------------------------------------------------------------------------------------


def test_sizes_come_from_the_segments_that_pytorch_takes() -> None:
    for size, segment in ((1, 2), (MIB, 2), (MIB + 1, 20), (10 * MIB - 512, 20), (10 * MIB, 10), (10 * MIB + 1, 12)):
        allocator = CachingAllocator()
        allocator.allocate(size)
        assert allocator.reserved_bytes == segment * MIB
        # A remainder worth splitting off stays usable; in the large pool that is more than 1 MiB.
        assert allocator.allocated_bytes in (-(-size // 512) * 512, segment * MIB)
    assert (SMALL_SEGMENT_BYTES, LARGE_SEGMENT_BYTES) == (2 * MIB, 20 * MIB)


def test_a_hole_that_nothing_whole_fits_into_is_out_of_memory_though_bytes_are_free() -> None:
    allocator = CachingAllocator(200 * MIB)
    large = allocator.allocate(100 * MIB)
    allocator.free(large)
    pin = allocator.allocate(20 * MIB)  # lies at the start of what was freed
    assert (allocator.reserved_bytes, allocator.allocated_bytes) == (100 * MIB, 20 * MIB)
    allocator.allocate(100 * MIB)
    with pytest.raises(SimulatedOutOfMemory) as caught:
        allocator.allocate(81 * MIB)
    assert caught.value.short_bytes == 82 * MIB  # 80 MiB lie free beside the pin
    allocator.free(pin)
    allocator.allocate(100 * MIB)


def test_free_segments_go_back_before_giving_up() -> None:
    allocator = CachingAllocator(100 * MIB)
    for size in (60, 80, 100):
        allocator.free(allocator.allocate(size * MIB))
    assert allocator.reserved_bytes == 100 * MIB


@settings(max_examples=100)
@given(st.integers(0, 2**32))
def test_blocks_never_overlap_and_everything_freed_leaves_whole_segments(seed: int) -> None:
    draw = random.Random(seed)
    allocator = CachingAllocator()
    live: list[Any] = []
    for _ in range(120):
        if live and draw.random() < 0.45:
            allocator.free(live.pop(draw.randrange(len(live))))
        else:
            live.append(allocator.allocate(draw.choice((100, 5_000, 700_000, 3 * MIB, 9 * MIB, 30 * MIB))))
        spans = sorted((b.start, b.start + b.size_bytes) for b in live)
        assert all(a[1] <= b[0] for a, b in itertools.pairwise(spans))
        assert allocator.allocated_bytes == sum(b.size_bytes for b in live) <= allocator.reserved_bytes
    for block in live:
        allocator.free(block)
    allocator.empty_cache()
    assert (allocator.allocated_bytes, allocator.reserved_bytes) == (0, 0)


# --- the plan -----------------------------------------------------------------------------------------------------


def shapes() -> st.SearchStrategy[ModelShape]:
    def build(layers: int, heads: int, dim: int, inner: int, vocabulary: int, tied: bool) -> ModelShape:
        return ModelShape("g", "gpt", layers, heads * dim, heads, heads, dim, inner, vocabulary, 64, tied)

    return st.builds(
        build, st.integers(1, 3), st.integers(1, 2), st.sampled_from((16, 64)), st.integers(16, 400),
        st.integers(64, 4000), st.booleans(),
    )  # fmt: skip


@settings(max_examples=25)
@given(shapes())
def test_units_are_those_that_tiers_find(shape: ModelShape) -> None:
    model = LanguageModel(shape)
    found, needs = discover(model)
    units, depth = unit_sizes(shape, 4)
    assert [unit.size_bytes for unit in units] == [unit.size_bytes for unit in found]
    assert depth == deepest(model, needs)


@settings(max_examples=100)
@given(st.lists(st.integers(1, 10**6), min_size=1, max_size=12), st.integers(1, 4))
def test_the_least_for_weights_is_what_residency_takes(sizes: list[int], slots: int) -> None:
    least = least_for_weights(sizes, slots)
    assert plan(sizes, least, slots, [4.0] * len(sizes)).device_bytes <= least
    with pytest.raises(BudgetError):
        plan(sizes, least - 1, slots, [4.0] * len(sizes))


def test_the_documents_scenarios_are_placed_and_what_killed_one_is_known() -> None:
    """4.5 GB for the student: added up it fits, as it was once planned, and its second step died on an H200."""
    card = replace(H200, memory_bytes=4_500_000_000)
    shape, work = PRESETS["vb-medium"], Workload(4, 1024, "amp", checkpointing=True)
    placed = place(shape, work, card, tiers=True)
    assert placed is not None and placed.residency is not None and placed.residency.streamed_bytes > 0
    assert placed.reserved_bytes <= card.memory_bytes - card.context_bytes
    with pytest.raises(SimulatedOutOfMemory):
        simulate(
            shape, work, card, placed.residency, limit_bytes=card.memory_bytes - card.context_bytes, gives_back=False
        )
    assert place(shape, work, card, tiers=False) is None
    least = least_bytes(shape, work, card)
    assert place(shape, work, replace(card, memory_bytes=least), tiers=False) is not None


@settings(max_examples=15)
@given(
    st.sampled_from(("vb-small", "vb-medium", "vb-large")), st.sampled_from(("fp32", "amp")), st.booleans(),
    st.integers(1, 4), st.integers(1, 2), st.floats(1.0, 12.0),
)  # fmt: skip
def test_a_plan_stays_within_its_budget_or_says_what_is_short(
    name: str, dtype: Any, checkpointing: bool, batch: int, accumulation: int, size_gb: float
) -> None:
    card = replace(H200, memory_bytes=int(size_gb * 1e9))
    work = Workload(batch, 256, dtype, checkpointing=checkpointing)
    try:
        placed = place(PRESETS[name], work, card, tiers=True, accumulation=accumulation)
    except UsageError as error:
        assert "--batch" in str(error) and ("less" in str(error) or "short" in str(error) or "more" in str(error))
        return
    assert placed is not None
    assert placed.allocated_bytes <= placed.reserved_bytes <= card.memory_bytes - card.context_bytes


# --- the real loop, on a simulated card ---------------------------------------------------------------------------


class SimulatedCard(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch has no types there
    """Gives every storage that operations make a block of a simulated allocator, but for what lies on the host.

    On the host lies what is made while ``on_host``, and what is made from nothing but that (an optimizer's states of
    parameters there).
    """

    def __init__(self, limit_bytes: int, fatal: str = "") -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch has no types there
        self.allocator = CachingAllocator(limit_bytes)
        self.fatal = fatal  # an operation that dies whatever is free
        self.on_host = True
        self._host: dict[int, weakref.ref[Any]] = {}
        self._device: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        if self.fatal and self.fatal in str(func):
            raise torch.OutOfMemoryError(self.fatal)
        out = func(*args, **(kwargs or {}))
        from_host = bool(given) and all(self._in(self._host, t) for t in given)
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._note(leaf, self.on_host or from_host)
        return out

    @staticmethod
    def _in(known: dict[int, weakref.ref[Any]], tensor: Tensor) -> bool:
        key = tensor.untyped_storage()._cdata
        return key in known and known[key]() is not None

    def _note(self, tensor: Tensor, host: bool) -> None:
        if self._in(self._host, tensor) or self._in(self._device, tensor):
            return
        storage = tensor.untyped_storage()
        key, block = storage._cdata, None
        table = self._host if host else self._device
        if not host:
            try:
                block = self.allocator.allocate(storage.nbytes())
            except SimulatedOutOfMemory as error:
                raise torch.OutOfMemoryError(str(error)) from error

        def died(_: Any) -> None:
            table.pop(key, None)
            self.allocator.free(block)

        table[key] = weakref.ref(storage, died)

    @contextmanager
    def elsewhere(self) -> Iterator[None]:
        before, self.on_host = self.on_host, True
        yield
        self.on_host = before


SHAPE = replace(
    PRESETS["vb-tiny"], name="vb-wide", layers=2, width=256, heads=4, head_dim=64, inner=512, vocabulary=12000,
    tied=False,
)  # fmt: skip
#: A card of this test: no context of its own; a CPU's matrix products take no workspace from the allocator.
CARD = replace(H200, context_bytes=0)
#: What the tape does not see on a CPU (scalars, batches, gradients' norms), in small segments.
SLACK_BYTES = 4 * MIB


def chosen(mixed: bool, checkpointing: bool, accumulation: int) -> tuple[Settings, Workload]:
    options = {"batch": 4, "seq": 64, "steps": 2, "eval_every": 1, "eval_batches": 1, "sample": 0}
    made = make_settings(
        "tiny", "cpu",
        {**options, "model": "vb-wide", "mixed_precision": mixed, "gradient_checkpointing": checkpointing,
         "accumulation": accumulation, "checkpoint_every": 0},
    )  # fmt: skip
    work = Workload(4, 64, "amp" if mixed else "fp32", "sdpa", checkpointing, device="cpu")
    return made, work


def run(
    monkeypatch: pytest.MonkeyPatch, made: Settings, budget: Budget | None, mode: SimulatedCard, *, gives_back: bool
) -> None:
    """The real trainer on a simulated card."""
    real_tier, real_slab = tiers.tier, tiers._pageable
    mode.on_host = budget is not None

    def slab(size_bytes: int) -> Any:
        with mode.elsewhere():
            return real_slab(size_bytes)

    def tier(*args: Any, **kwargs: Any) -> Any:
        mode.on_host = False
        return real_tier(*args, **kwargs)

    monkeypatch.setattr(tiers, "_pageable", slab)
    monkeypatch.setattr(training, "tier", tier)
    monkeypatch.setattr(training, "PRESETS", {**PRESETS, "vb-wide": SHAPE})
    if gives_back:
        monkeypatch.setattr(Trainer, "_give_back", lambda self: mode.allocator.empty_cache())
    with tempfile.TemporaryDirectory() as name:
        folder = TrainingFolder(Path(name))
        try:
            (folder.path / "words.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 200)
            source = join([folder.path / "words.txt"], folder.path / DATA_FILE)
            folder.write_settings(asdict(made))
            with mode:
                Trainer(
                    folder, made, source, resume=False, tiering=budget, gives_back=gives_back, say=lambda line: None
                ).run()
        finally:
            folder.close()


def budget_of(placed: Placement, card: Card) -> Budget | None:
    if placed.residency is None:
        return None
    return Budget(gpu=card.memory_bytes, pinned=1 << 30, activations=placed.activation_bytes)


@pytest.mark.parametrize(("mixed", "checkpointing", "accumulation"), [(False, False, 1), (True, True, 2)])
def test_what_is_accepted_runs_on_a_card_of_that_size(
    monkeypatch: pytest.MonkeyPatch, mixed: bool, checkpointing: bool, accumulation: int
) -> None:
    made, work = chosen(mixed, checkpointing, accumulation)
    whole = least_bytes(SHAPE, work, CARD, accumulation=accumulation)
    tiered = 0
    for share in (1.0, 0.7):
        card = replace(CARD, memory_bytes=int(whole * share))
        try:
            placed = place(SHAPE, work, card, tiers=True, accumulation=accumulation)
        except UsageError:
            continue
        assert placed is not None
        tiered += placed.residency is not None
        budget = budget_of(placed, card)
        mode = SimulatedCard(card.memory_bytes + SLACK_BYTES)
        run(monkeypatch, made, budget, mode, gives_back=placed.gives_back)
        assert mode.allocator.peak_allocated_bytes == pytest.approx(placed.allocated_bytes, rel=0.04)
        # The control: with less it dies.
        with pytest.raises(torch.OutOfMemoryError):
            run(monkeypatch, made, budget, SimulatedCard(9 * placed.allocated_bytes // 10), gives_back=True)
    assert tiered


@pytest.mark.parametrize("detached", [True, False])
def test_a_backward_that_died_leaves_no_activation_behind(monkeypatch: pytest.MonkeyPatch, detached: bool) -> None:
    """The next training in this process has all of the card.

    Control: hooks that hand saved tensors on as they are keep the graph, as those of tiers did on an H200.
    """
    made, work = chosen(True, True, 1)
    whole = least_bytes(SHAPE, work, CARD)
    placed = place(SHAPE, work, replace(CARD, memory_bytes=int(0.7 * whole)), tiers=True)
    assert placed is not None
    mode = SimulatedCard(2 * whole, fatal="_log_softmax_backward_data")
    kept = nullcontext() if detached else torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t)
    with pytest.raises(torch.OutOfMemoryError), kept:
        run(monkeypatch, made, budget_of(placed, replace(CARD, memory_bytes=whole)), mode, gives_back=True)
    gc.collect()
    left = mode.allocator.allocated_bytes
    assert (left == 0) == detached, left
