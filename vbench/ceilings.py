"""Measured ceilings of this machine: what memory, matrix units, links and files give at best. ``vbench roofline``.

Each probe leaves one record of kind ``roofline`` with its samples and ``metrics.per_s``: bytes, operations or launches
a second. What a machine cannot do is a record too, with its reason. torch is imported inside functions; nothing of ours
is timed here, so that a ceiling is not a kernel's own speed.
"""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vbench import environment, timing
from vbench.backend import Device
from vbench.errors import Unsupported
from vbench.monitor import Monitor, NoMonitor, open_monitor
from vbench.record import Measurement, Outcome, Record
from vbench.worker import outcome_of

BACKEND = "roofline"
SAMPLES, LEAST, LIMIT_S = 20, 3, 0.5

MIB = 1 << 20
#: Bytes read or copied on the device; the largest exceeds every L2.
SIZES = tuple(1 << n for n in (20, 22, 24, 26, 28, 30))
CPU_SIZES = (1 << 20, 1 << 24, 1 << 27)
TRANSFER_BYTES = 256 * MIB
FILE_BYTES, FILE_BLOCK, DEPTHS = 128 * MIB, 4 * MIB, (1, 4, 16)
#: Dependent exponentials an element, so that arithmetic and not memory is the limit.
EXPS = 512


@dataclass(frozen=True, slots=True)
class Probe:
    """One thing to measure.

    Args:
        what, parameters: make the record's case ``roofline[what=...,...]``.
        work: bytes, operations or launches in one launch.
        unit: of ``work``: ``B``, ``flop``, ``op`` or ``launch``.
        make: allocates and returns (launch, synchronize); raises Unsupported where the machine cannot.
        graph: replay it from a CUDA graph, so that launch latency stays out.
    """

    what: str
    parameters: tuple[tuple[str, int | str], ...]
    work: int
    unit: str
    make: Callable[[], tuple[Callable[[], Any], Callable[[], None]]]
    graph: bool = False

    @property
    def case(self) -> str:
        return f"roofline[{','.join(f'{k}={v}' for k, v in (('what', self.what), *self.parameters))}]"


def probes(device: Device, folder: Path) -> Iterator[Probe]:
    """Everything to measure on ``device``; file probes write ``FILE_BYTES`` below ``folder``."""
    yield from _memory(device)
    yield from _matmul(device)
    if device == "cuda":
        yield from _gpu_only()
    yield from _files(folder)


def _nothing() -> None:
    return None


def _synchronizer(device: Device) -> Callable[[], None]:
    if device == "cpu":
        return _nothing
    import torch

    return torch.cuda.synchronize


def _memory(device: Device) -> Iterator[Probe]:
    def read(size: int) -> Any:
        def make() -> tuple[Callable[[], Any], Callable[[], None]]:
            import torch

            data = torch.ones(size // 4, dtype=torch.float32, device=device)
            return lambda: data.sum(), _synchronizer(device)

        return make

    def copy(size: int) -> Any:
        def make() -> tuple[Callable[[], Any], Callable[[], None]]:
            import torch

            source = torch.ones(size // 8, dtype=torch.float32, device=device)
            target = torch.empty_like(source)
            return lambda: target.copy_(source), _synchronizer(device)

        return make

    for size in SIZES if device == "cuda" else CPU_SIZES:
        yield Probe("read", (("bytes", size),), size, "B", read(size), device == "cuda")
        yield Probe("copy", (("bytes", size),), size, "B", copy(size), device == "cuda")


def _matmul(device: Device) -> Iterator[Probe]:
    n = 8192 if device == "cuda" else 512

    def make_for(dtype: str) -> Any:
        def make() -> tuple[Callable[[], Any], Callable[[], None]]:
            import torch

            if dtype == "fp8":
                if torch.cuda.get_device_capability() < (8, 9):
                    raise Unsupported("no_fp8", "fp8 matrix products need compute capability 8.9")
                a, b = (torch.randn(n, n, device=device).to(torch.float8_e4m3fn) for _ in "ab")
                one = torch.ones((), device=device)
                return (
                    lambda: torch._scaled_mm(a, b.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16),
                    _synchronizer(device),
                )
            kind = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(dtype, torch.float32)
            left, right = (torch.randn(n, n, device=device, dtype=kind) for _ in "ab")

            def launch() -> Any:
                # The switch is global and read at the call; a captured graph keeps what it was captured with.
                before = torch.backends.cuda.matmul.fp32_precision
                torch.backends.cuda.matmul.fp32_precision = "tf32" if dtype == "tf32" else "ieee"
                try:
                    return left @ right
                finally:
                    torch.backends.cuda.matmul.fp32_precision = before

            return launch, _synchronizer(device)

        return make

    for dtype in ("bf16", "fp16", "fp8", "tf32", "fp32") if device == "cuda" else ("fp32",):
        yield Probe("matmul", (("dtype", dtype), ("n", n)), 2 * n**3, "flop", make_for(dtype), device == "cuda")


def _gpu_only() -> Iterator[Probe]:
    elements = 1 << 22

    def exponentials() -> tuple[Callable[[], Any], Callable[[], None]]:
        import torch

        body = f"for (int i = 0; i < {EXPS}; ++i) x = exp2f(-x); return x;"
        function: Any = torch.cuda.jiterator._create_jit_fn("template <typename T> T chain(T x) { " + body + " }")
        data = torch.rand(elements, device="cuda")
        return lambda: function(data), torch.cuda.synchronize

    def empty() -> tuple[Callable[[], Any], Callable[[], None]]:
        import torch

        data = torch.zeros(1, device="cuda")
        return lambda: data.add_(1), torch.cuda.synchronize

    def transfer(pinned: bool, to_device: bool) -> Any:
        def make() -> tuple[Callable[[], Any], Callable[[], None]]:
            import torch

            host = torch.empty(TRANSFER_BYTES, dtype=torch.uint8, pin_memory=pinned)
            far = torch.empty(TRANSFER_BYTES, dtype=torch.uint8, device="cuda")
            target, source = (far, host) if to_device else (host, far)
            return lambda: target.copy_(source, non_blocking=True), torch.cuda.synchronize

        return make

    def duplex() -> tuple[Callable[[], Any], Callable[[], None]]:
        import torch

        hosts = [torch.empty(TRANSFER_BYTES, dtype=torch.uint8, pin_memory=True) for _ in "io"]
        fars = [torch.empty(TRANSFER_BYTES, dtype=torch.uint8, device="cuda") for _ in "io"]
        streams: list[Any] = [torch.cuda.Stream() for _ in "io"]  # type: ignore[no-untyped-call]

        def launch() -> None:
            with torch.cuda.stream(streams[0]):
                fars[0].copy_(hosts[0], non_blocking=True)
            with torch.cuda.stream(streams[1]):
                hosts[1].copy_(fars[1], non_blocking=True)

        return launch, torch.cuda.synchronize

    yield Probe("exp", (("elements", elements),), elements * EXPS, "op", exponentials, True)
    # Queued one after the other from Python, and each waited for.
    yield Probe("launch", (("wait", "each"),), 1, "launch", empty)
    yield Probe("launch", (("wait", "graph"),), 1, "launch", empty, True)
    for pinned in (True, False):
        for to_device in (True, False):
            named = (("memory", "pinned" if pinned else "pageable"), ("bytes", TRANSFER_BYTES))
            yield Probe("h2d" if to_device else "d2h", named, TRANSFER_BYTES, "B", transfer(pinned, to_device))
    yield Probe("duplex", (("memory", "pinned"), ("bytes", TRANSFER_BYTES)), 2 * TRANSFER_BYTES, "B", duplex)


def _files(folder: Path) -> Iterator[Probe]:
    for write in (True, False):
        for depth in DEPTHS:
            named = (("depth", depth), ("block", FILE_BLOCK), ("bytes", FILE_BYTES))
            make = _file_maker(folder, depth, write)
            yield Probe("file_write" if write else "file_read", named, FILE_BYTES, "B", make)


def _file_maker(folder: Path, depth: int, write: bool) -> Any:
    def make() -> tuple[Callable[[], Any], Callable[[], None]]:
        flag = getattr(os, "O_DIRECT", None)
        if flag is None:
            raise Unsupported("no_o_direct", "this system has no O_DIRECT")
        # O_DIRECT wants aligned memory: anonymous maps start on a page.
        buffers = [mmap.mmap(-1, FILE_BLOCK) for _ in range(depth)]
        path = folder / "roofline.bin"
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | flag, 0o600)
        except OSError as error:
            raise Unsupported("o_direct_refused", f"{folder}: {error.strerror}; name another folder") from None
        path.unlink()
        pool = ThreadPoolExecutor(max_workers=depth)

        def part(worker: int, writing: bool) -> None:
            for offset in range(worker * FILE_BLOCK, FILE_BYTES, depth * FILE_BLOCK):
                move = os.pwritev if writing else os.preadv
                if move(descriptor, [buffers[worker]], offset) != FILE_BLOCK:
                    raise OSError(f"short transfer at {offset}")

        def run(writing: bool) -> None:
            for future in [pool.submit(part, worker, writing) for worker in range(depth)]:
                future.result()
            if writing:
                os.fsync(descriptor)

        if not write:
            run(True)
        return lambda: run(write), _nothing

    return make


def measure(probe: Probe, device: Device, monitor: Monitor | NoMonitor) -> tuple[Measurement, float]:
    """Samples of a probe, and its work a second at the median.

    Raises:
        Unsupported: the machine cannot do it.
    """
    launch, synchronize = probe.make()
    if probe.graph:
        measured = timing.time_graph(timing.rotating_sampler([launch]), 0, monitor)
    else:
        sampler = timing.wall_sampler(launch, synchronize)
        sampler.warm()
        taken = timing.take_blocks(
            sampler.sample,
            monitor,
            count=SAMPLES,
            least=LEAST,
            limit_s=LIMIT_S,
            target=timing.TARGET_HALF_WIDTH,
        )
        measured = timing.measurement(sampler, taken)
    return measured, probe.work / measured.median_s


def records(
    chosen: Sequence[Probe],
    device: Device,
    run: str,
    monitor: Monitor | NoMonitor,
    keep: Callable[[Record], None],
) -> list[Record]:
    """One record a probe, also where it cannot be had. Each is given to ``keep`` as soon as it is made."""
    if device == "cpu":
        import torch

        # As the workers are: what one thread gives is what a kernel on one thread can be held to.
        torch.set_num_threads(1)
    described = environment.describe(device)
    found = []
    for probe in chosen:
        outcome, reason, detail = Outcome.PASSED, "", ""
        measurements: tuple[Measurement, ...] = ()
        metrics: dict[str, float] = {}
        try:
            measured, per_s = measure(probe, device, monitor)
            measurements, metrics = (measured,), {"per_s": per_s, "work": float(probe.work)}
        except Exception as error:
            outcome, reason = outcome_of(error)
            detail = error.message if isinstance(error, Unsupported) else f"{type(error).__name__}: {error}"
        record = Record(
            case=probe.case,
            backend=BACKEND,
            kind="roofline",
            outcome=outcome,
            run=run,
            role="harness",
            suite=BACKEND,
            reason=reason,
            detail=detail,
            source=probe.unit,
            measurements=measurements,
            metrics=metrics,
            environment=described,
        )
        keep(record)
        found.append(record)
        _free(device)
    return found


def _free(device: Device) -> None:
    if device == "cuda":
        import torch

        torch.cuda.empty_cache()


def temporary_folder(below: Path | None) -> tempfile.TemporaryDirectory[str]:
    """A folder for the file probes, by default where the command runs: a temporary file system may be memory."""
    return tempfile.TemporaryDirectory(prefix="vbench-roofline-", dir=below or Path.cwd())


def open_monitor_on(device: Device) -> Monitor | NoMonitor:
    """The monitor of the device's GPU."""
    if device == "cpu":
        return NoMonitor("no_gpu")
    import torch

    return open_monitor(str(getattr(torch.cuda.get_device_properties(0), "uuid", "")))
