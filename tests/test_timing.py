"""The parts of timing that need no GPU: blocks, buffer arithmetic, and the cold procedure on a simulated GPU."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.test_monitor import FakeNvml, monitor
from vbench.monitor import NoMonitor
from vbench.timing import (
    BLOCK,
    FLUSH_OVER_L2,
    HEAD_START_HZ,
    HEAD_START_LIMIT_S,
    HEAD_START_S,
    MAX_COPIES,
    MIN_REPLAY_S,
    ROTATION_OVER_L2,
    ColdClock,
    copies_needed,
    flush_bytes,
    graph_sampler,
    head_start_cycles,
    persisting_l2_reset,
    rotating_sampler,
    take_blocks,
    time_graph,
    time_wall,
)

NONE = NoMonitor("no_gpu")


@given(st.integers(1, 1 << 33), st.integers(0, 1 << 28), st.integers(0, 1 << 38))
def test_copies_exceed_l2_where_memory_allows(size: int, l2: int, free: int) -> None:
    copies = copies_needed(size, l2, free)
    assert 1 <= copies <= MAX_COPIES
    assert copies == 1 or 3 * copies * size <= free
    if copies * size < ROTATION_OVER_L2 * l2:
        assert copies == MAX_COPIES or 3 * (copies + 1) * size > free * 0.5


@given(st.integers(1, 1 << 30))
def test_the_flush_is_at_least_twice_l2_in_whole_words(l2: int) -> None:
    assert flush_bytes(l2) >= FLUSH_OVER_L2 * l2 >= 2 * l2
    assert flush_bytes(l2) % 4 == 0 and flush_bytes(l2) < FLUSH_OVER_L2 * l2 + 4


@given(st.floats(0, 10))
def test_the_head_start_outlasts_the_host(host_s: float) -> None:
    seconds = head_start_cycles(host_s) / HEAD_START_HZ
    assert HEAD_START_S * 0.999 <= seconds <= HEAD_START_LIMIT_S
    assert seconds > host_s or host_s >= HEAD_START_LIMIT_S / 2


@given(st.integers(1, 60), st.integers(1, 60), st.floats(0.5, 100))
def test_blocks(count: int, least: int, limit_s: float) -> None:
    """One second a sample: the count, the time limit, and a state before the first block and after each."""
    ticks = itertools.count()
    now = [0.0]

    def sample() -> float:
        now[0] += 1.0
        return float(next(ticks)) + 1

    warmed: list[float] = []
    taken = take_blocks(
        sample,
        monitor(FakeNvml()),
        count=count,
        least=least,
        limit_s=limit_s,
        warm=lambda: warmed.append(now[0]),
        clock=lambda: now[0],
    )
    n = len(taken.samples_s)
    assert taken.samples_s == tuple(float(i + 1) for i in range(n)), "time order, nothing dropped"
    assert n == count if taken.stopped == "count" else least <= n < count and n > limit_s
    assert n <= max(least, int(limit_s) + 1) or taken.stopped == "count"
    assert [s.at_sample for s in taken.states] == [0, *range(BLOCK, n, BLOCK), n]
    assert warmed == [float(i) for i in range(0, n, BLOCK)], "a warm-up after each reading that a block follows"
    assert taken.states_absent == "" and len(taken.clock_hz) == len(taken.states)


def test_reading_the_state_is_no_sampling_time() -> None:
    now = [0.0]

    class Slow(FakeNvml):
        def nvmlDeviceGetPowerUsage(self, handle: str) -> int:
            now[0] += 100.0
            return 1

    def sample() -> float:
        now[0] += 1.0
        return 1.0

    arguments: dict[str, Any] = {"count": 30, "least": 1, "limit_s": 31.0, "clock": lambda: now[0]}
    assert take_blocks(sample, monitor(Slow()), **arguments).stopped == "count"

    def slow_sample() -> float:
        now[0] += 20.0
        return 1.0

    # control: slow samples do end it
    assert take_blocks(slow_sample, monitor(FakeNvml()), **arguments).stopped == "time"


def test_sampling_ends_once_the_median_is_known_well_enough() -> None:
    quiet = itertools.cycle([1.0, 1.0001, 0.9999, 1.0002, 0.9998])
    arguments: dict[str, Any] = {"count": 60, "least": 10, "limit_s": 1e9, "target": 0.002}
    taken = take_blocks(lambda: next(quiet), NONE, **arguments)
    assert (len(taken.samples_s), taken.stopped) == (BLOCK, "interval")
    noisy = itertools.cycle([1.0, 1.1, 0.9, 1.2, 0.8])
    # control: noise keeps it going to the cap, and so does having no target
    assert take_blocks(lambda: next(noisy), NONE, **arguments).stopped == "count"
    assert take_blocks(lambda: next(quiet), NONE, **{**arguments, "target": None}).stopped == "count"


def test_no_monitor_is_said_and_not_zero() -> None:
    measured = time_wall(lambda: sum(range(100)), lambda: None, NONE)
    assert (measured.states, measured.states_absent, measured.clock_hz) == ((), "no_gpu", ())


class Gpu:
    """A GPU with one stream and a cache: a launch is fast where its operands are cached, and pays for dirty lines."""

    WARM_S, COLD_S, DIRTY_S = 1e-6, 5e-6, 3e-6

    def __init__(self, *, flush_s: float = 1e-6, hold_s: float = 1e-3, host_s: float = 20e-6) -> None:
        self.host, self.gpu, self.cached, self.dirty, self.persisting = 0.0, 0.0, False, False, True
        self.flush_s, self.hold_s, self.host_s = flush_s, hold_s, host_s
        self.marks = [0.0, 0.0]

    def _run(self, seconds: float) -> None:
        self.gpu = max(self.gpu, self.host) + seconds

    def reset(self) -> None:
        self.persisting = False

    def flush(self) -> None:
        self._run(self.flush_s)
        # What persists is not evicted by writes.
        self.cached, self.dirty = self.cached and self.persisting, False

    def write_only_flush(self) -> None:
        self.flush()
        self.dirty = True

    def hold(self) -> None:
        self._run(self.hold_s)

    def start(self) -> None:
        self._run(0.0)
        self.marks[0] = self.gpu

    def end(self) -> None:
        self._run(0.0)
        self.marks[1] = self.gpu

    def launch(self) -> None:
        self.host += self.host_s
        self._run((self.WARM_S if self.cached else self.COLD_S) + (self.DIRTY_S if self.dirty else 0.0))
        self.cached, self.dirty, self.persisting = True, False, True

    def reached(self) -> bool:
        return self.marks[0] <= self.host

    def elapsed_s(self) -> float:
        self.host = max(self.host, self.gpu)
        return self.marks[1] - self.marks[0]


def cold(gpu: Gpu, **replaced: Any) -> tuple[list[float], int]:
    names = ("reset", "flush", "hold", "start", "end", "reached", "elapsed_s")
    clock = ColdClock(**{**{n: getattr(gpu, n) for n in names}, **replaced})
    gpu.launch()
    return [clock.sample(gpu.launch) for _ in range(8)], clock.late


def test_cold_is_cold_in_every_sample() -> None:
    samples, late = cold(Gpu())
    assert samples == pytest.approx([Gpu.COLD_S] * 8) and late == 0


@pytest.mark.parametrize(
    ("gpu", "replaced", "wrong_s"),
    [
        (Gpu(), {"flush": "nothing"}, Gpu.WARM_S),
        (Gpu(), {"reset": "nothing"}, Gpu.WARM_S),
        (Gpu(), {"flush": "write_only_flush"}, Gpu.COLD_S + Gpu.DIRTY_S),
        (Gpu(hold_s=0.0), {}, None),
    ],
)
def test_leaving_out_any_step_is_seen(gpu: Gpu, replaced: dict[str, str], wrong_s: float | None) -> None:
    """The controls: warm operands, persisting ones, dirty lines, and a host that comes too late."""
    steps = {name: getattr(gpu, how, lambda: None) for name, how in replaced.items()}
    samples, late = cold(gpu, **steps)
    if wrong_s is None:
        assert late == 8 and all(s > 2 * Gpu.COLD_S for s in samples)
    else:
        assert samples == pytest.approx([wrong_s] * 8) and late == 0


def test_an_empty_launch_reads_the_cost_of_the_events_alone() -> None:
    gpu = Gpu()
    names = ("reset", "flush", "hold", "start", "end", "reached", "elapsed_s")
    clock = ColdClock(**{n: getattr(gpu, n) for n in names})
    assert clock.sample(lambda: None) == 0.0


class Driver:
    def __init__(self, limit: int, reset: int) -> None:
        self.codes = {"limit": limit, "reset": reset}
        self.calls: list[Any] = []

    def cuCtxSetLimit(self, limit: Any, value: Any) -> int:
        self.calls.append((limit.value, value.value))
        return self.codes["limit"]

    def cuCtxResetPersistingL2Cache(self) -> int:
        self.calls.append("reset")
        return self.codes["reset"]


def test_the_persisting_part_of_l2_is_given_back_or_it_is_said_why_not() -> None:
    driver = Driver(0, 0)
    assert persisting_l2_reset(driver) == "reset"
    assert driver.calls == [(6, 0), "reset"]
    assert persisting_l2_reset(None) == "no_driver"
    assert persisting_l2_reset(Driver(215, 0)) == "cuCtxSetLimit_215"
    assert persisting_l2_reset(Driver(0, 1)) == "cuCtxResetPersistingL2Cache_1"


class FakeCuda:
    """As much of ``torch.cuda`` as graph timing uses: launches take time on a fake clock, captured ones at replay."""

    def __init__(self) -> None:
        self.now = 0.0
        self.capturing: list[float] | None = None
        cuda = self

        class Stream:
            def wait_stream(self, other: object) -> None: ...

            def synchronize(self) -> None: ...

        class Event:
            def __init__(self, enable_timing: bool = False) -> None:
                self.at = 0.0

            def record(self, stream: object = None) -> None:
                self.at = cuda.now

            def synchronize(self) -> None: ...

            def elapsed_time(self, end: Event) -> float:
                return (end.at - self.at) * 1e3

        class CUDAGraph:
            def __init__(self) -> None:
                self.seconds: list[float] = []

            def replay(self) -> None:
                assert cuda.capturing is None and self.seconds
                cuda.now += sum(self.seconds)

        self.Stream, self.Event, self.CUDAGraph = Stream, Event, CUDAGraph

    @contextlib.contextmanager
    def graph(self, graph: Any, stream: object = None) -> Iterator[None]:
        self.capturing = graph.seconds
        yield
        self.capturing = None

    @contextlib.contextmanager
    def stream(self, stream: object) -> Iterator[None]:
        yield

    def current_stream(self) -> object:
        return self.Stream()

    def synchronize(self) -> None: ...

    def launch(self, seconds: float) -> Any:
        def run() -> None:
            if self.capturing is not None:
                self.capturing.append(seconds)
            else:
                self.now += seconds

        return run


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    import torch

    fake = FakeCuda()
    for name in ("Stream", "Event", "CUDAGraph", "graph", "stream", "current_stream", "synchronize"):
        monkeypatch.setattr(torch.cuda, name, getattr(fake, name))
    return fake


@pytest.mark.parametrize("seconds", [2e-6, 50e-6, 3e-3])
def test_a_replay_runs_every_copy_and_lasts_long_enough(cuda: FakeCuda, seconds: float) -> None:
    copies = [cuda.launch(seconds) for _ in range(5)]
    sampler = rotating_sampler(copies)
    assert sampler.launches % 5 == 0 and sampler.launches * seconds >= MIN_REPLAY_S
    measured = time_graph(sampler, 17, NONE)
    assert measured.median_s == pytest.approx(seconds) and measured.launches_per_sample == sampler.launches
    assert (measured.quantity, measured.rotated_bytes, measured.stopped) == ("graph", 17, "interval")


def test_a_slowed_graph_runs_more_launches_than_it_counts(cuda: FakeCuda) -> None:
    copies = [cuda.launch(1e-5) for _ in range(3)]
    plain, slowed = (graph_sampler(copies, 200, s).sample() for s in (0.0, 0.02))
    assert slowed / plain == pytest.approx(1.02)
    with pytest.raises(ValueError, match="cannot be slowed"):
        graph_sampler(copies, 10, 0.02)
