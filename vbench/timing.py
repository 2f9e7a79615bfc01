"""Timing: CUDA-graph replay over rotated buffers, and wall clock. Raw samples in time order; nothing is discarded.

The clock functions are bound at import, before any plug-in is loaded, so that a plug-in cannot replace them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from time import perf_counter
from typing import Any

from vbench.record import Measurement

#: Distinct buffers must exceed the L2 cache by this factor, so that no launch finds its operands there.
ROTATION_OVER_L2 = 4
MAX_COPIES = 64
#: A graph replay should last at least this long, so that event resolution (about 0.5 us) is below 0.1 %.
MIN_REPLAY_S = 1e-3
GRAPH_SAMPLES = 40
GRAPH_LIMIT_S = 1.5
WALL_SAMPLES = 15
WALL_LIMIT_S = 4.0


def copies_needed(bytes_per_launch: int, l2_bytes: int, free_bytes: int) -> int:
    """How many distinct sets of buffers to cycle through."""
    wanted = -(-ROTATION_OVER_L2 * l2_bytes // max(1, bytes_per_launch))
    affordable = max(1, int(free_bytes * 0.5) // max(1, 3 * bytes_per_launch))
    return max(1, min(wanted, affordable, MAX_COPIES))


def sm_clock_hz() -> float | None:
    """SM clock now, where NVML can be asked."""
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByIndex(0)
        return float(pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_SM)) * 1e6
    except pynvml.NVMLError:
        return None


def time_graph(launches: Sequence[Callable[[], Any]], rotated_bytes: int) -> Measurement:
    """Seconds per launch by replaying a CUDA graph that runs every launch in turn, repeated up to MIN_REPLAY_S."""
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
    estimate_s = max(start.elapsed_time(end) * 1e-3, 1e-7)
    repeats = max(1, min(200, int(MIN_REPLAY_S / estimate_s) + 1))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(repeats):
            for launch in launches:
                launch()
    count = repeats * len(launches)
    for _ in range(3):
        graph.replay()
    torch.cuda.synchronize()
    clocks = [sm_clock_hz()]
    samples: list[float] = []
    stopped = "count"
    began = perf_counter()
    while len(samples) < GRAPH_SAMPLES:
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        samples.append(start.elapsed_time(end) * 1e-3 / count)
        if perf_counter() - began > GRAPH_LIMIT_S and len(samples) >= 5:
            stopped = "time"
            break
    clocks.append(sm_clock_hz())
    return Measurement(
        quantity="graph",
        samples_s=tuple(samples),
        launches_per_sample=count,
        rotated_bytes=rotated_bytes,
        clock_hz=tuple(c for c in clocks if c is not None),
        stopped=stopped,
    )


def time_wall(launch: Callable[[], Any], synchronize: Callable[[], None]) -> Measurement:
    """Seconds from before the launch to after synchronising, one launch a sample, two warm-ups."""
    for _ in range(2):
        launch()
    synchronize()
    samples: list[float] = []
    stopped = "count"
    began = perf_counter()
    while len(samples) < WALL_SAMPLES:
        before = perf_counter()
        launch()
        synchronize()
        samples.append(perf_counter() - before)
        if perf_counter() - began > WALL_LIMIT_S and len(samples) >= 3:
            stopped = "time"
            break
    return Measurement(quantity="wall", samples_s=tuple(samples), stopped=stopped)
