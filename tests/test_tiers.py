"""The tier engine on a CPU: the rules against the reference, exact bytes, cost in links, and copies that come late."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vbench.errors import Unsupported
from vbench.kernels.as_written import vgpu_stack
from vbench.kernels.peers import all_resident
from vbench.kernels.tiers import op
from vbench.kernels.tiers.arena import Arena, Block
from vbench.kernels.tiers.backend import BACKEND
from vbench.kernels.tiers.errors import BrokenStackError, CorruptTensorError, TierFullError, UnknownKeyError
from vbench.kernels.tiers.ledger import Ledger
from vbench.kernels.tiers.links import CudaLinks, HostLinks
from vbench.kernels.tiers.marks import Mark, Marks
from vbench.kernels.tiers.stack import TierStack
from vbench.reference.ops.tiers import TIER_STACK
from vbench.reference.tiers import DictStack, replay
from vbench.spec import Case, resolve

TRACES = ("mixed", "cyclic", "palindrome", "resident")


@pytest.fixture(scope="module", autouse=True)
def own_temporary_folder() -> Iterator[None]:
    """Temporary folders in memory where there is such a place (each spill syncs twice), and none left behind."""
    shared_memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shared_memory if shared_memory.is_dir() else None) as name:
        saved, tempfile.tempdir = tempfile.tempdir, name
        try:
            yield
        finally:
            tempfile.tempdir = saved
        assert not list(Path(name).iterdir())


T = TypeVar("T")


def long_lists(elements: st.SearchStrategy[T], longest: int) -> st.SearchStrategy[list[T]]:
    """Lists of every length alike: Hypothesis's own are about five elements long, too short for states to build up."""
    return st.integers(0, longest).flatmap(lambda n: st.lists(elements, min_size=n, max_size=n))


def tier_cases(file_bytes: st.SearchStrategy[int]) -> st.SearchStrategy[Case]:
    """Small traces; levels from nothing at all to room for everything, tensors from one byte."""

    def build(trace: str, keys: int, item: int, steps: int, gpu: int, host: int, files: int, seed: int) -> Case:
        return TIER_STACK.case(
            trace=trace,
            keys=keys,
            item_bytes=item,
            steps=steps,
            gpu_bytes=gpu,
            host_bytes=host,
            file_bytes=files,
            seed=seed,
        )

    item = st.sampled_from((1, 2, 7, 64, 600))
    return item.flatmap(
        lambda size: st.builds(
            build,
            st.sampled_from(TRACES),
            st.integers(1, 7),
            st.just(size),
            st.integers(1, 60),
            st.integers(0, 5 * size),
            st.integers(0, 5 * size),
            file_bytes,
            st.integers(0, 1 << 20),
        )
    )


ROOMY = st.just(1 << 20)


def inputs_of(case: Case) -> dict[str, Any]:
    made = resolve(TIER_STACK.inputs)(case, "cpu")
    assert isinstance(made, dict)
    return made


def poisoned(inputs: dict[str, Any]) -> dict[str, Tensor]:
    """Output tensors of the right shapes, filled with what no right answer holds."""
    return {
        name: torch.full_like(t, 0xA5 if t.dtype == torch.uint8 else -(1 << 40)) for name, t in replay(inputs).items()
    }


def run(make: Callable[..., Any], case: Case, variant: str = "", launches: int = 1) -> Mapping[str, Tensor]:
    inputs = inputs_of(case)
    out = poisoned(inputs)
    kernel = make(case, variant, "cpu")
    launch = kernel.bind(inputs, out)
    got = out
    for _ in range(launches):
        got = launch() or out
    assert set(kernel.produces) <= set(got)
    return {name: got[name] for name in kernel.produces}


def differing(got: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> list[str]:
    """Names of outputs that are not bitwise, in shape and dtype, what they must be."""
    return [
        name
        for name, tensor in got.items()
        if tensor.dtype != expected[name].dtype or not torch.equal(tensor, expected[name])
    ]


# --- against the reference -------------------------------------------------------------------------------------------


@settings(max_examples=120)
@given(tier_cases(ROOMY))
def test_kernel_is_bitwise_the_reference(case: Case) -> None:
    assert differing(run(op.make, case, launches=2), replay(inputs_of(case))) == []


@settings(max_examples=60)
@given(tier_cases(st.integers(0, 300)))
def test_a_trace_that_overflows_the_last_level_is_unsupported_exactly_where_the_reference_says_so(case: Case) -> None:
    inputs = inputs_of(case)
    try:
        expected = replay(inputs)
    except Unsupported as error:
        assert error.rule == "stack_full"
        with pytest.raises(Unsupported, match=r"^stack_full"):
            op.make(case, "", "cpu").bind(inputs, {"values": torch.empty(0, dtype=torch.uint8)})
        assert not list(Path(tempfile.gettempdir()).iterdir())
    else:
        assert differing(run(op.make, case), expected) == []


@pytest.mark.parametrize("broken", ["fifo", "no_promotion"])
def test_control_the_comparison_tells_other_policies_apart(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real_move = Ledger.move

    def move(self: Ledger, key: str, level: int) -> Any:
        now = self.level_of(key)
        stays = level <= now if broken == "no_promotion" else level == now
        if not stays:
            return real_move(self, key, level)
        plan = real_move(self, key, now)
        self.undo(plan)  # a first-in-first-out list does not care about an access
        plan.others.clear()
        return plan

    monkeypatch.setattr(Ledger, "move", move)
    case = TIER_STACK.case(
        trace="resident", keys=7, item_bytes=8, steps=80, gpu_bytes=24, host_bytes=16, file_bytes=1 << 20
    )
    assert "found_level" in differing(run(op.make, case), replay(inputs_of(case)))


def test_backend_declares_what_it_serves() -> None:
    assert BACKEND.name == "tiers" and BACKEND.role == "own"
    assert resolve(BACKEND.ops["tier_stack"]) is op.make
    assert BACKEND.probe("cpu").usable
    assert BACKEND.probe("cuda").usable == torch.cuda.is_available()
    case = TIER_STACK.case(keys=1, item_bytes=1, steps=1, gpu_bytes=1, host_bytes=1, file_bytes=1)
    with pytest.raises(Unsupported, match=r"^unknown_variant"):
        op.make(case, "fast", "cpu")


def test_the_launch_owns_its_folder_and_gives_everything_back() -> None:
    case = TIER_STACK.case(keys=5, item_bytes=32, steps=40, gpu_bytes=64, host_bytes=64, file_bytes=1 << 20)
    inputs = inputs_of(case)
    before = len(list(Path("/proc/self/fd").iterdir()))
    launch = op.TierKernel().bind(inputs, poisoned(inputs))
    assert isinstance(launch, op.Replay)
    launch()
    folder = launch.stack.files.folder
    assert sorted(folder.glob("*.tensor")) == sorted(r.path for r in launch.stack.files.records.values())
    launch.stack.clear()
    assert not list(folder.glob("*.tensor"))
    assert [pool.arena.used_bytes for pool in launch.stack.pools] == [0, 0]
    del launch
    assert not folder.exists()
    assert len(list(Path("/proc/self/fd").iterdir())) == before


# --- the state machine, beyond what the traces reach -----------------------------------------------------------------


@contextmanager
def stack_in_temporary_folder(*capacities: int, largest: int = 64, **options: Any) -> Iterator[TierStack]:
    assert len(capacities) == 3
    with (
        tempfile.TemporaryDirectory() as folder,
        TierStack((capacities[0], capacities[1], capacities[2]), Path(folder), largest_bytes=largest, **options) as s,
    ):
        yield s


VALUES = [
    torch.tensor(3.5),  # no axes
    torch.empty(0, 3, dtype=torch.float16),
    torch.arange(6, dtype=torch.int16).reshape(2, 3).t(),  # not contiguous
    torch.tensor([1.0]).expand(4),  # stride 0
    torch.tensor([float("nan"), -0.0, float("inf")]),
    torch.tensor([0x7FC01234, -1], dtype=torch.int32).view(torch.float32),  # NaN payloads
    torch.tensor([1.5, -2.25], dtype=torch.bfloat16),
    torch.tensor([1.0, 448.0]).to(torch.float8_e4m3fn),
    torch.tensor([1.0, -57344.0]).to(torch.float8_e5m2),
    torch.tensor([True, False, True]),
    torch.tensor([1 + 2j, -3j]).conj(),
    torch.tensor([65535, 1], dtype=torch.uint16),
    torch.arange(16, dtype=torch.float32).reshape(1, 2, 2, 4).to(memory_format=torch.channels_last),
    torch.ones(3, dtype=torch.float64, requires_grad=True),
]


@pytest.mark.parametrize("level", [0, 1, 2])
@pytest.mark.parametrize("number", range(len(VALUES)))
def test_every_dtype_and_layout_comes_back_bit_for_bit_from_every_level(number: int, level: int) -> None:
    value = VALUES[number]
    with stack_in_temporary_folder(128, 128, 1024) as stack:
        stack.put("odd", torch.zeros(1, dtype=torch.uint8))  # makes the next offset an odd one
        stack.put("x", value)
        for _ in range(level):
            stack.evict("x")
        assert stack.level_of("x") == level
        got = stack.access("x")
        assert (got.dtype, got.shape) == (value.dtype, value.shape)
        plain = value.detach().resolve_conj().contiguous()
        assert torch.equal(got.reshape(-1).view(torch.uint8), plain.reshape(-1).view(torch.uint8))


def test_the_caller_may_change_what_it_put_and_a_view_changes_the_value() -> None:
    with stack_in_temporary_folder(8, 8, 64) as stack:
        value = torch.arange(4, dtype=torch.int16)
        stack.put("x", value)
        value.zero_()
        view = stack.access("x")
        assert view.tolist() == [0, 1, 2, 3]
        view.add_(10)
        stack.spill("x")
        assert stack.access("x").tolist() == [10, 11, 12, 13]


def test_mistakes_have_types_and_change_nothing() -> None:
    with stack_in_temporary_folder(4, 4, 8, largest=16) as stack:
        for letter in "abcd":
            stack.put(letter, torch.full((4,), ord(letter), dtype=torch.uint8))
        before = stack.keys(), stack.used_bytes
        for act in (stack.access, stack.promote, stack.evict, stack.spill, stack.delete, stack.size_of):
            with pytest.raises(UnknownKeyError, match="no tensor 'zz'"):
                act("zz")
        with pytest.raises(TierFullError, match="level 2 is full, 4 bytes short"):
            stack.put("e", torch.zeros(4, dtype=torch.uint8))
        with pytest.raises(TierFullError, match="more than level 2 holds in all"):
            stack.put("a", torch.zeros(9, dtype=torch.uint8))
        with pytest.raises(TierFullError, match="largest_bytes=16"):
            stack.put("a", torch.zeros(17, dtype=torch.uint8))
        assert (stack.keys(), stack.used_bytes) == before
        assert [bytes(stack.access(k).tolist()) for k in "abcd"] == [b"aaaa", b"bbbb", b"cccc", b"dddd"]
    with pytest.raises(BrokenStackError, match="closed"):
        stack.access("a")


class FailingLinks(HostLinks):
    """A device that dies at the first copy after ``armed`` is set."""

    armed = False

    def copy(self, to: Tensor, source: Tensor, after: Marks) -> Marks:
        if self.armed:
            raise RuntimeError("device error")
        return super().copy(to, source, after)


def test_a_device_error_in_the_middle_of_a_move_makes_the_stack_refuse_to_guess() -> None:
    links = FailingLinks()
    with stack_in_temporary_folder(4, 8, 64, links=links) as stack:
        stack.put("a", torch.zeros(4, dtype=torch.uint8))
        links.armed = True
        with pytest.raises(RuntimeError, match="device error"):
            stack.evict("a")
        links.armed = False
        with pytest.raises(BrokenStackError, match="broken"):
            stack.access("a")


# --- cost ------------------------------------------------------------------------------------------------------------


def worst_steps(ledger: Ledger, keys: int) -> int:
    """Most links any access costs with ``keys`` tensors of one byte, half of them on level 0, in the worst order."""
    for key in range(keys):
        ledger.put(str(key), 1)
    worst = 0
    for key in list(range(keys)) * 2:
        before = ledger.steps
        ledger.level_of(str(key))
        ledger.move(str(key), 0)
        worst = max(worst, ledger.steps - before)
    return worst


class ScanningLedger(Ledger):
    """What a stack costs that looks for its keys."""

    def level_of(self, key: str) -> int:
        for level in range(len(self.capacities_bytes)):
            for other in self.keys(level):
                self.steps += 1
                if other == key:
                    return level
        return -1


def test_an_access_costs_the_same_links_whatever_the_number_of_tensors() -> None:
    costs = [worst_steps(Ledger((n // 2, n // 4, n)), n) for n in (100, 1000, 10000)]
    assert costs[0] == costs[1] == costs[2] <= 8
    scanning = [worst_steps(ScanningLedger((n // 2, n // 4, n)), n) for n in (100, 400)]
    assert scanning[1] > 3 * scanning[0]  # the control: the count does see a search


@settings(max_examples=60)
@given(
    long_lists(st.tuples(st.sampled_from("pma"), st.integers(0, 6), st.integers(0, 9), st.integers(0, 2)), 40),
    st.tuples(st.integers(0, 15), st.integers(0, 15), st.integers(20, 60)),
)
def test_undo_restores_levels_bytes_and_order(
    actions: list[tuple[str, int, int, int]], capacities: tuple[int, int, int]
) -> None:
    ledger = Ledger(capacities)

    def state() -> Any:
        return [ledger.keys(level) for level in range(3)], list(ledger.used_bytes), len(ledger)

    for kind, number, size, level in actions:
        key = str(number)
        if kind != "p" and key not in ledger:
            continue
        before = state()
        try:
            for undo_it in (True, False):
                if kind == "p":
                    plan = ledger.put(key, size)
                elif kind == "m":
                    plan = ledger.move(key, level)
                else:
                    plan = ledger.remove(key)
                if undo_it:
                    ledger.undo(plan)
                    assert state() == before
        except TierFullError:
            assert state() == before
        assert all(used <= capacity for used, capacity in zip(ledger.used_bytes, capacities, strict=True))


# --- exact bytes -----------------------------------------------------------------------------------------------------


@settings(max_examples=60)
@given(
    st.integers(1, 5000),
    long_lists(st.tuples(st.integers(0, 2).map(bool), st.integers(0, 1400)), 80),
    st.integers(0, 1 << 20).map(random.Random),
)
def test_whatever_fits_by_count_of_bytes_fits_the_arena_and_keeps_its_contents(
    size: int, actions: list[tuple[bool, int]], rng: random.Random
) -> None:
    arena, memory = Arena(size), bytearray(size)
    held: list[tuple[Block, bytes]] = []
    for take, wanted in actions:
        if take and arena.used_bytes + wanted <= size:
            block = arena.take(wanted)
            if block is None:
                for moved, old_start in arena.pack(wanted):
                    assert moved.start <= old_start
                    memory[moved.start : moved.start + moved.size_bytes] = memory[
                        old_start : old_start + moved.size_bytes
                    ]
                block = arena.take(wanted)
            assert block is not None, "exact capacity is promised"
            content = rng.randbytes(wanted)
            memory[block.start : block.start + wanted] = content
            held.append((block, content))
        elif held:
            arena.give(held.pop(rng.randrange(len(held)))[0])
        assert arena.used_bytes == sum(block.size_bytes for block, _ in held)
        for block, content in held:
            assert bytes(memory[block.start : block.start + block.size_bytes]) == content
    for block, _ in held:
        arena.give(block)
    whole = arena.take(size)  # all holes joined up again
    assert whole is not None and whole.start == 0


def test_tensors_of_one_size_stay_aligned_and_never_pack() -> None:
    case = TIER_STACK.case(
        trace="resident", keys=12, item_bytes=1024, steps=200, gpu_bytes=4096, host_bytes=3072, file_bytes=1 << 20
    )
    inputs = inputs_of(case)
    launch = op.TierKernel().bind(inputs, poisoned(inputs))
    assert isinstance(launch, op.Replay)
    launch()
    device, host = launch.stack.pools
    assert (device.packings, host.packings) == (0, 0)
    assert device.arena.size_bytes == device.arena.peak_bytes == 4096
    assert host.arena.size_bytes == 3072 + 1024 and host.arena.peak_bytes <= host.arena.size_bytes
    assert all(start % 512 == 0 for start in device.arena.live)


# --- copies that come late -------------------------------------------------------------------------------------------

COPY, COMPUTE, BESIDE = 1, 2, 3


class LateLinks:
    """Three streams (copies, compute, what runs beside) whose work runs at random, as late as waits allow.

    Memory the test lends counts as pageable.

    Args:
        seed: of the schedule.
        lent: tensors that belong to the caller; their bytes are read when a copy is issued.
        forget: which rule of the stream contract to break, for the controls.
    """

    early = 0.3
    early_streams: tuple[int, ...] = (COPY, COMPUTE, BESIDE)

    def __init__(self, seed: int, lent: list[Tensor], forget: str = "") -> None:
        self._rng = random.Random(seed)
        self._lent = {t.untyped_storage().data_ptr() for t in lent}
        self._forget = forget
        self._queues: dict[int, list[tuple[Callable[[], object], Marks]]] = {COPY: [], COMPUTE: [], BESIDE: []}
        self._done = {COPY: 0, COMPUTE: 0, BESIDE: 0}

    def _issue(self, stream: int, work: Callable[[], object], after: Marks) -> Marks:
        queue = self._queues[stream]
        queue.append((work, after))
        while self._rng.random() < self.early:  # now and then something happens to be done early
            self._run_one(self._rng.choice(self.early_streams))
        return (Mark(stream, len(queue), None),)

    def _over(self, mark: Mark) -> bool:
        return self._done[mark.stream] >= mark.sequence

    def _run_one(self, stream: int) -> None:
        at = self._done[stream]
        if at < len(self._queues[stream]):
            work, after = self._queues[stream][at]
            if all(self._over(mark) for mark in after):
                work()
                self._done[stream] = at + 1

    def _force(self, marks: Marks) -> None:
        for mark in marks:
            while not self._over(mark):
                self._force(self._queues[mark.stream][self._done[mark.stream]][1])
                self._run_one(mark.stream)

    def copy(self, to: Tensor, source: Tensor, after: Marks) -> Marks:
        if source.untyped_storage().data_ptr() in self._lent:
            source = source.clone()
        if self._forget == "after":
            after = ()
        return self._issue(COPY, lambda: to.copy_(source), after)

    def beside(self, work: Callable[[], None], after: Marks) -> Marks:
        return self._issue(BESIDE, work, () if self._forget == "beside_after" else after)

    def compute_stream(self) -> Any:
        return COMPUTE

    def compute_mark(self, stream: Any) -> Marks:
        if self._forget == "compute_mark":
            return ()
        return (Mark(COMPUTE, len(self._queues[COMPUTE]), None),)

    def compute_wait(self, marks: Marks) -> None:
        if self._forget != "compute_wait":
            self._issue(COMPUTE, lambda: None, marks)

    def compute_copy(self, to: Tensor, source: Tensor) -> None:
        self._issue(COMPUTE, lambda: to.copy_(source), ())

    def compute_add(self, value_u8: Tensor, number: int) -> None:
        """Change a value in place on the compute stream, as an optimizer step does."""
        self._issue(COMPUTE, lambda: value_u8.add_(number), ())

    def host_wait(self, marks: Marks) -> None:
        if self._forget != "host_wait":
            self._force(marks)

    def over(self, marks: Marks) -> bool:
        return all(self._over(mark) for mark in marks)

    def drain(self) -> None:
        for stream, queue in self._queues.items():
            self._force((Mark(stream, len(queue), None),))


def late_replay(case: Case, schedule: int, forget: str = "") -> list[str]:
    """Outputs that differ from the reference when copies come late."""
    inputs = inputs_of(case)
    links = LateLinks(schedule, inputs["values"], forget)
    sizes = [v.numel() for v in inputs["values"]]
    accessed = op.rehearse(inputs["capacities_bytes"], inputs["steps"], sizes)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "tier"
        folder.mkdir()
        stack = TierStack(inputs["capacities_bytes"], folder, largest_bytes=max(sizes), links=links)
        launch = op.Replay(stack, folder, inputs["steps"], inputs["values"], accessed)
        try:
            got = launch()
            links.drain()
            return differing(got, replay(inputs))
        finally:
            launch.close()


@settings(max_examples=100)
@given(tier_cases(ROOMY), st.integers(0, 1 << 20))
def test_values_are_right_however_late_copies_come(case: Case, schedule: int) -> None:
    assert late_replay(case, schedule) == []


KINDS = ("put", "put", "access", "access", "add", "add", "promote", "evict", "spill", "delete")


@settings(max_examples=200)
@given(st.integers(0, 1 << 32))
def test_changes_in_place_and_deletions_are_right_however_late(seed: int) -> None:
    # Drawn from the seed, not by Hypothesis: its own draws repeat themselves too much to meet a race.
    rng = random.Random(seed)
    capacities = rng.randrange(200), rng.randrange(200)
    actions = [
        (rng.choice(KINDS), rng.randrange(rng.choice((3, 6))), rng.choice((1, 30, 50, 50, 64, 90))) for _ in range(60)
    ]
    puts = [torch.full((size,), number % 251, dtype=torch.uint8) for number, (_, _, size) in enumerate(actions)]
    links = LateLinks(seed, puts)
    model: dict[str, Tensor] = {}
    read: list[tuple[Tensor, Tensor]] = []
    with stack_in_temporary_folder(*capacities, 1 << 20, largest=90, links=links) as stack:
        for (kind, number, _), value in zip(actions, puts, strict=True):
            key = str(number)
            if kind == "put":
                stack.put(key, value)
                model[key] = value.clone()
            elif key not in model:
                continue
            elif kind == "access":
                read.append((torch.zeros_like(model[key]), model[key].clone()))
                stack.access_into(key, read[-1][0])
            elif kind == "add":
                value = stack.access(key)
                if stack.level_of(key) == 0:  # elsewhere a fresh copy is handed out
                    links.compute_add(value, 3)
                    model[key] += 3
            elif kind == "delete":
                stack.delete(key)
                del model[key]
            else:
                {"promote": stack.promote, "evict": stack.evict, "spill": stack.spill}[kind](key)
        links.drain()
        assert [i for i, (got, expected) in enumerate(read) if not torch.equal(got, expected)] == []


@pytest.mark.parametrize("forget", ["after", "compute_mark", "compute_wait", "host_wait"])
def test_control_each_forgotten_wait_is_noticed(forget: str) -> None:
    noticed = 0
    for seed in range(12):
        case = TIER_STACK.case(
            trace="mixed", keys=6, item_bytes=64, steps=60, gpu_bytes=150, host_bytes=150, file_bytes=1 << 20, seed=seed
        )
        try:
            noticed += "values" in late_replay(case, seed, forget)
        except CorruptTensorError:
            noticed += 1
    assert noticed > 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("trace", TRACES)
@pytest.mark.parametrize("slow", ["copy", "compute"])
def test_values_are_right_on_a_device_with_a_sluggish_stream(trace: str, slow: str) -> None:
    cuda: Any = torch.cuda  # carries no types

    class Sluggish(CudaLinks):
        def copy(self, to: Tensor, source: Tensor, after: Marks) -> Marks:
            if slow == "copy":
                with torch.cuda.stream(self._side):
                    cuda._sleep(200_000)
            return super().copy(to, source, after)

        def compute_copy(self, to: Tensor, source: Tensor) -> None:
            if slow == "compute":
                cuda._sleep(200_000)
            super().compute_copy(to, source)

    case = TIER_STACK.case(
        trace=trace, keys=9, item_bytes=70001, steps=150, gpu_bytes=220000, host_bytes=300000, file_bytes=1 << 24
    )
    inputs = inputs_of(case)
    expected = replay(inputs)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "tier"
        folder.mkdir()
        device = torch.device("cuda")
        stack = TierStack(
            inputs["capacities_bytes"], folder, largest_bytes=70001, device=device, links=Sluggish(device)
        )
        launch = op.Replay(stack, folder, inputs["steps"], inputs["values"], expected["values"].numel())
        got = {key: value.cpu() for key, value in launch().items()}
        launch.close()
    assert differing(got, expected) == []


# --- the baseline and the document's own stack -----------------------------------------------------------------------


@settings(max_examples=40)
@given(tier_cases(ROOMY))
def test_all_resident_gives_the_same_values(case: Case) -> None:
    assert differing(run(all_resident.make, case, "all_resident", launches=2), replay(inputs_of(case))) == []


@settings(max_examples=40)
@given(tier_cases(ROOMY))
def test_the_documents_stack_is_right_while_everything_fits_level_0(case: Case) -> None:
    roomy = dict(case.params) | {"gpu_bytes": 7 * 600, "trace": "resident"}
    fits = TIER_STACK.case(seed=case.seed, **roomy)
    for variant in vgpu_stack.VARIANTS:
        assert differing(run(vgpu_stack.make, fits, variant), replay(inputs_of(fits))) == []


@settings(max_examples=40)
@given(tier_cases(ROOMY))
def test_refusing_levels_lose_no_value(case: Case) -> None:
    assert "values" not in differing(run(vgpu_stack.make, case, "refuse"), replay(inputs_of(case)))


def test_the_documents_stack_loses_tensors_as_soon_as_level_0_overflows() -> None:
    case = TIER_STACK.case(
        trace="cyclic", keys=6, item_bytes=64, steps=30, gpu_bytes=256, host_bytes=1024, file_bytes=1 << 20
    )
    expected = replay(inputs_of(case))
    got = run(vgpu_stack.make, case)
    assert set(differing(got, expected)) == {"values", "found_level", "level_bytes", "hits"}
    first_lost = got["values"][:64]  # of layer.0, dropped by the fifth put
    assert not first_lost.any() and expected["values"][:64].any()
    assert got["hits"].tolist() == [24, 0, 0]  # it still books every access as a hit on level 0
    assert DictStack((256, 1024, 1 << 20)).find("layer.0") == -1


@pytest.mark.parametrize("make", [vgpu_stack.make, all_resident.make])
def test_unknown_variants_are_refused(make: Callable[..., Any]) -> None:
    case = TIER_STACK.case(keys=1, item_bytes=1, steps=1, gpu_bytes=1, host_bytes=1, file_bytes=1)
    with pytest.raises(Unsupported, match=r"^unknown_variant"):
        make(case, "other", "cpu")
