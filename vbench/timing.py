"""Timing: CUDA-graph replay over rotated buffers, launches after an L2 flush, and wall clock.

Raw samples in time order; nothing is discarded. Between blocks of samples the GPU's state is read.
The clock functions are bound at import, before any plug-in is loaded, so that a plug-in cannot replace them.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any

from vbench.intervals import median_interval
from vbench.monitor import Monitor, NoMonitor
from vbench.record import DeviceState, Measurement, Quantity

#: Distinct buffers must exceed the L2 cache by this factor, so that no launch finds its operands there.
ROTATION_OVER_L2 = 4
MAX_COPIES = 64
#: A graph replay should last at least this long, so that event resolution (about 0.5 us) is below 0.1 %.
MIN_REPLAY_S = 1e-3
MAX_REPEATS = 200
GRAPH_SAMPLES = 40
GRAPH_LIMIT_S = 1.5
WALL_SAMPLES = 15
WALL_LIMIT_S = 4.0
COLD_SAMPLES = 20
COLD_LIMIT_S = 1.5
EMPTY_SAMPLES = 5
#: Sampling ends once half the median's 95 % interval is this part of the median: a fifth of the least change of
#: interest (1 %), so that what differs between processes, not within one, is left to be measured.
TARGET_HALF_WIDTH = 0.002
#: Samples between two readings of the GPU's state; a reading takes a few milliseconds, in which the GPU idles.
BLOCK = 10
#: Bytes written, and then as many others read, before each cold sample, in units of the L2 cache's size.
FLUSH_OVER_L2 = 2
#: The GPU is held back after the flush for this long or twice the host's time for a launch, whichever is more.
HEAD_START_S = 100e-6
HEAD_START_LIMIT_S = 20e-3
#: Cycles a second to convert a head start with; more than any boost clock, so that it is never shorter than meant.
HEAD_START_HZ = 2.2e9

#: CUlimit value of the L2 cache's part for persisting accesses (cuda.h).
_CU_LIMIT_PERSISTING_L2_CACHE_SIZE = 0x06


def copies_needed(bytes_per_launch: int, l2_bytes: int, free_bytes: int) -> int:
    """How many distinct sets of buffers to cycle through."""
    wanted = -(-ROTATION_OVER_L2 * l2_bytes // max(1, bytes_per_launch))
    affordable = max(1, int(free_bytes * 0.5) // max(1, 3 * bytes_per_launch))
    return max(1, min(wanted, affordable, MAX_COPIES))


def flush_bytes(l2_bytes: int) -> int:
    """Bytes to write, and to read, in order to empty an L2 cache of this size: a multiple of 4, at least 2 x L2."""
    return -(-FLUSH_OVER_L2 * l2_bytes // 4) * 4


def head_start_cycles(host_launch_s: float) -> int:
    """GPU cycles to wait for, so that the host has queued the launch before the GPU reaches it."""
    return int(min(max(HEAD_START_S, 2 * host_launch_s), HEAD_START_LIMIT_S) * HEAD_START_HZ)


@dataclass(frozen=True, slots=True)
class Samples:
    """What ``take_blocks`` took."""

    samples_s: tuple[float, ...]
    states: tuple[DeviceState, ...]
    states_absent: str
    stopped: str

    @property
    def clock_hz(self) -> tuple[float, ...]:
        return tuple(s.sm_clock_hz for s in self.states if s.sm_clock_hz is not None)


def take_blocks(
    sample: Callable[[], float],
    monitor: Monitor | NoMonitor,
    *,
    count: int,
    least: int,
    limit_s: float,
    warm: Callable[[], object] | None = None,
    target: float | None = None,
    clock: Callable[[], float] = perf_counter,
) -> Samples:
    """Take samples in blocks of BLOCK and read the GPU's state before the first block and after each.

    Args:
        sample: one sample in seconds.
        count, least, limit_s: at most ``count``; no more once ``limit_s`` of sampling has passed and there are
            ``least``. Reading the state does not count as sampling.
        warm: run once, untimed, after each reading that is followed by a block, since the GPU idled meanwhile.
        target: relative half-width of the median's interval at which a block is the last (``stopped`` "interval").
    """
    samples: list[float] = []
    states: list[DeviceState] = []

    def observe() -> None:
        if isinstance(monitor, Monitor):
            states.append(monitor.read(len(samples)))

    observe()
    spent = 0.0
    stopped = "count"
    while len(samples) < count and stopped == "count":
        if warm is not None:
            warm()
        began = clock()
        for _ in range(min(BLOCK, count - len(samples))):
            samples.append(sample())
            if spent + clock() - began > limit_s and least <= len(samples) < count:
                stopped = "time"
                break
        spent += clock() - began
        observe()
        if target is not None and stopped == "count" and least <= len(samples) < count:
            known = median_interval(samples)
            if known is not None and known.relative_half_width <= target:
                stopped = "interval"
    absent = monitor.reason if isinstance(monitor, NoMonitor) else ""
    return Samples(tuple(samples), tuple(states), absent, stopped)


@dataclass(frozen=True, slots=True)
class Sampler:
    """How one quantity of one bound kernel is sampled.

    Args:
        quantity: what it is.
        launches: how many launches one sample averages over.
        sample: takes one, seconds a launch.
        warm: runs once what a sample runs, untimed.
    """

    quantity: Quantity
    launches: int
    sample: Callable[[], float]
    warm: Callable[[], object]


def launches_of(estimate_s: float, least_s: float, multiple: int, most: int) -> int:
    """Launches in one sample, a multiple of ``multiple``, so that it lasts ``least_s``; at most about ``most``."""
    wanted = least_s / max(estimate_s, 1e-9)
    return max(1, min(int(wanted / multiple) + 1, max(1, most // multiple))) * multiple


def extra_launches(launches: int, slowdown: float) -> int:
    """Launches to add, untold, to a sample of ``launches`` so that it takes 1 + ``slowdown`` times as long.

    Raises:
        ValueError: the slowdown is no whole number of launches.
    """
    extra = round(launches * slowdown)
    if abs(extra - launches * slowdown) > 1e-6 * launches:
        raise ValueError(f"{launches} launches cannot be slowed by {slowdown}")
    return extra


def graph_estimate_s(launches: Sequence[Callable[[], Any]]) -> float:
    """Seconds of one launch, roughly: all of them once after a warm-up, by events, on a side stream."""
    import torch

    stream: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]  # torch leaves it untyped
    stream.wait_stream(torch.cuda.current_stream())
    start: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    end: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    with torch.cuda.stream(stream):
        for launch in launches:
            launch()
        stream.synchronize()
        start.record(stream)
        for launch in launches:
            launch()
        end.record(stream)
        stream.synchronize()
    return max(float(start.elapsed_time(end)) * 1e-3, 1e-7) / len(launches)


def graph_sampler(launches: Sequence[Callable[[], Any]], count: int, slowdown: float = 0.0) -> Sampler:
    """Replay of a CUDA graph of ``count`` launches in turn, seconds a launch.

    Args:
        slowdown: a known part of the launches is added and not counted, see ``extra_launches``.
    """
    import torch

    total = count + extra_launches(count, slowdown)
    stream: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    start: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    end: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    graph = torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.graph(graph, stream=stream):
        for i in range(total):
            launches[i % len(launches)]()

    def sample() -> float:
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) * 1e-3 / count

    return Sampler("graph", count, sample, lambda: graph.replay())


def rotating_sampler(launches: Sequence[Callable[[], Any]]) -> Sampler:
    """Replay of a CUDA graph that runs every launch in turn, repeated until a replay lasts MIN_REPLAY_S."""
    most = MAX_REPEATS * len(launches)
    return graph_sampler(launches, launches_of(graph_estimate_s(launches), MIN_REPLAY_S, len(launches), most))


def time_graph(sampler: Sampler, rotated_bytes: int, monitor: Monitor | NoMonitor) -> Measurement:
    """Seconds per launch by a graph's replays, until the median is known to TARGET_HALF_WIDTH or the limits are met."""
    import torch

    for _ in range(3):
        sampler.warm()
    torch.cuda.synchronize()
    taken = take_blocks(
        sampler.sample,
        monitor,
        count=GRAPH_SAMPLES,
        least=5,
        limit_s=GRAPH_LIMIT_S,
        warm=sampler.warm,
        target=TARGET_HALF_WIDTH,
    )
    return measurement(sampler, taken, rotated_bytes)


def measurement(sampler: Sampler, taken: Samples, rotated_bytes: int = 0, blocks: tuple[int, ...] = ()) -> Measurement:
    """What a sampler's samples make."""
    return Measurement(
        quantity=sampler.quantity,
        samples_s=taken.samples_s,
        launches_per_sample=sampler.launches,
        rotated_bytes=rotated_bytes,
        clock_hz=taken.clock_hz,
        stopped=taken.stopped,
        states=taken.states,
        states_absent=taken.states_absent,
        blocks=blocks,
    )


def wall_sampler(
    launch: Callable[[], Any], synchronize: Callable[[], None], count: int = 1, slowdown: float = 0.0
) -> Sampler:
    """Wall clock from before ``count`` launches to after synchronising, seconds a launch; ``slowdown`` as above."""
    total = count + extra_launches(count, slowdown)

    def run() -> None:
        for _ in range(total):
            launch()
        synchronize()

    def sample() -> float:
        before = perf_counter()
        run()
        return (perf_counter() - before) / count

    return Sampler("wall", count, sample, run)


def time_wall(launch: Callable[[], Any], synchronize: Callable[[], None], monitor: Monitor | NoMonitor) -> Measurement:
    """Seconds from before the launch to after synchronising, one launch a sample, two warm-ups."""
    sampler = wall_sampler(launch, synchronize)
    for _ in range(2):
        sampler.warm()
    taken = take_blocks(
        sampler.sample, monitor, count=WALL_SAMPLES, least=3, limit_s=WALL_LIMIT_S, target=TARGET_HALF_WIDTH
    )
    return measurement(sampler, taken)


class ColdClock:
    """The order of one cold sample: reset, flush, hold back, event, launch, event. Everything it does is passed in.

    Args:
        reset: frees the part of L2 that persisting accesses hold.
        flush: writes FLUSH_OVER_L2 times the L2 cache and then reads as much of another buffer, so that what the
            cache holds is neither the launch's operands nor lines still to be written back at the launch's cost.
        hold: makes the GPU wait, so that the launch is queued before the start event is reached.
        start, end: record an event each.
        reached: whether the GPU has passed the start event already.
        elapsed_s: seconds between the two events, after waiting for the second.
    """

    def __init__(
        self,
        *,
        reset: Callable[[], object],
        flush: Callable[[], object],
        hold: Callable[[], object],
        start: Callable[[], object],
        end: Callable[[], object],
        reached: Callable[[], bool],
        elapsed_s: Callable[[], float],
    ) -> None:
        self._before = (reset, flush, hold, start)
        self._end = end
        self._reached = reached
        self._elapsed_s = elapsed_s
        self.late = 0

    def sample(self, launch: Callable[[], object]) -> float:
        """Seconds of one launch that finds nothing of its own in L2."""
        for step in self._before:
            step()
        launch()
        self._end()
        # Asked before anything waits: the host was late if the GPU is there already.
        self.late += bool(self._reached())
        return self._elapsed_s()


def persisting_l2_reset(driver: Any) -> str:
    """Give back the part of L2 set aside for persisting accesses, by the CUDA driver: torch exposes neither call.

    Args:
        driver: the loaded ``libcuda``, or ``None``. The calling thread's current context is meant.

    Returns:
        ``reset``, or why not: ``no_driver``, ``cuCtxSetLimit_N`` or ``cuCtxResetPersistingL2Cache_N`` with the
        CUresult N (215: the device has no such limit).
    """
    if driver is None:
        return "no_driver"
    code = driver.cuCtxSetLimit(ctypes.c_int(_CU_LIMIT_PERSISTING_L2_CACHE_SIZE), ctypes.c_size_t(0))
    if code:
        return f"cuCtxSetLimit_{code}"
    code = driver.cuCtxResetPersistingL2Cache()
    return f"cuCtxResetPersistingL2Cache_{code}" if code else "reset"


def load_driver() -> Any:
    """The CUDA driver's library, or ``None`` where there is none."""
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None


def time_cold(launch: Callable[[], Any], l2_bytes: int, monitor: Monitor | NoMonitor) -> Measurement:
    """Seconds per launch with its operands out of L2, by an event pair after a flush.

    Raises:
        torch.OutOfMemoryError: no room for the two flush buffers of ``flush_bytes(l2_bytes)``.
    """
    import torch

    size = flush_bytes(l2_bytes)
    dirty = torch.empty(size // 4, dtype=torch.int32, device="cuda")
    clean = torch.zeros(size // 4, dtype=torch.int32, device="cuda")
    start: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    end: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    driver = load_driver()
    launch()
    torch.cuda.synchronize()
    before = perf_counter()
    launch()
    cycles = head_start_cycles(perf_counter() - before)
    torch.cuda.synchronize()

    def flush() -> None:
        dirty.fill_(1)
        clean.sum()

    def elapsed_s() -> float:
        end.synchronize()
        return float(start.elapsed_time(end)) * 1e-3

    clock = ColdClock(
        reset=lambda: persisting_l2_reset(driver),
        flush=flush,
        hold=lambda: torch.cuda._sleep(cycles),  # type: ignore[no-untyped-call]
        start=lambda: start.record(),
        end=lambda: end.record(),
        reached=lambda: bool(start.query()),
        elapsed_s=elapsed_s,
    )
    empty = tuple(clock.sample(lambda: None) for _ in range(EMPTY_SAMPLES))
    clock.late = 0
    taken = take_blocks(
        lambda: clock.sample(launch),
        monitor,
        count=COLD_SAMPLES,
        least=5,
        limit_s=COLD_LIMIT_S,
        target=TARGET_HALF_WIDTH,
    )
    return Measurement(
        quantity="cold",
        samples_s=taken.samples_s,
        clock_hz=taken.clock_hz,
        stopped=taken.stopped,
        states=taken.states,
        states_absent=taken.states_absent,
        flushed_bytes=size,
        persisting_l2=persisting_l2_reset(driver),
        empty_s=empty,
        late_samples=clock.late,
    )
