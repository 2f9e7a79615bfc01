"""What happened: one Record per planned job, as stored in JSONL. Standard library only.

Schema history
    1  first version. Keys are only ever added: older lines of schema 1 parse, a key they lack meaning "not recorded".
"""

from __future__ import annotations

import hashlib
import json
import math
import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from enum import StrEnum
from typing import Any, Literal, get_args

from vbench.errors import DataError

SCHEMA = 1

#: Before a law's name, the metric of a check that found it broken.
BROKEN_LAW = "broken_law."

#: ``probe``: can the backend be used here. ``check``: value against oracle. ``time``: check, then timing.
#: ``battery``: trivial kernels against the check. ``arithmetic``: a document's own figures. ``compile``: a kernel's
#: configuration compiled ahead of time and its machine code read. ``pair``: one side of a pair of processes, blocks of
#: samples between the other's. ``selftest``: our own error rates. ``roofline``: a machine's measured ceilings.
#: ``fuzz``: a round of generated cases, counted together; what failed in it has a ``check`` record of its own.
Kind = Literal["probe", "check", "time", "battery", "arithmetic", "compile", "pair", "selftest", "roofline", "fuzz"]
KINDS: tuple[Kind, ...] = get_args(Kind)

Quantity = Literal["graph", "wall", "cold"]


class Outcome(StrEnum):
    """How a job ended. Exactly one per record."""

    PASSED = "PASSED"
    WRONG_SHAPE = "WRONG_SHAPE"
    WRONG_DTYPE = "WRONG_DTYPE"
    WRONG_VALUE = "WRONG_VALUE"
    NONFINITE = "NONFINITE"
    MUTATED_INPUT = "MUTATED_INPUT"
    OUT_OF_BOUNDS = "OUT_OF_BOUNDS"
    OUT_OF_MEMORY = "OUT_OF_MEMORY"
    NONDETERMINISTIC = "NONDETERMINISTIC"
    INVALID = "INVALID"
    COMPILE_ERROR = "COMPILE_ERROR"
    RUNTIME_ERROR = "RUNTIME_ERROR"
    CRASHED = "CRASHED"
    TIMEOUT = "TIMEOUT"
    UNSUPPORTED = "UNSUPPORTED"
    UNAVAILABLE = "UNAVAILABLE"


#: Outcomes that are no fault of a kernel.
EXCUSED = frozenset({Outcome.PASSED, Outcome.UNSUPPORTED, Outcome.UNAVAILABLE})


@dataclass(frozen=True, slots=True)
class ErrorStats:
    """Comparison of the outputs with the oracle, the worst output's figures.

    Args:
        output: name of the worst output.
        elements: compared elements over all outputs.
        wrong: elements over budget (or unequal where the oracle is exact).
        worst_over_budget: largest |error| / budget; ``inf`` where an exact output differs.
        max_ulp: largest error in units in the last place of the output's dtype; ``None`` for integers.
        correctly_rounded: fraction of elements equal to the oracle rounded to the output's dtype.
        at: index of the worst element.
    """

    output: str
    elements: int
    wrong: int
    worst_over_budget: float
    max_ulp: float | None
    correctly_rounded: float
    at: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class DeviceState:
    """The GPU between two blocks of samples, as NVML gives it.

    Args:
        at_sample: how many samples had been taken.
        sm_clock_hz, memory_clock_hz: clocks now.
        power_w: board power, averaged by the driver.
        temperature_c: of the GPU.
        throttle: active reasons for lower clocks (``sw_power_cap``, ``hw_thermal_slowdown``, ...; empty: none).
        foreign_processes: compute processes on the GPU that are not ours.
        memory_used_bytes: device memory in use by all processes.
        absent: name of each figure that is ``None`` -> reason code (``not_supported``, ``no_permission``, ...).

    Raises:
        DataError: a figure is missing without a reason, or has one though it is there.
    """

    at_sample: int
    sm_clock_hz: float | None = None
    memory_clock_hz: float | None = None
    power_w: float | None = None
    temperature_c: float | None = None
    throttle: tuple[str, ...] | None = None
    foreign_processes: int | None = None
    memory_used_bytes: int | None = None
    absent: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        missing = {f.name for f in fields(self) if getattr(self, f.name) is None}
        if missing != set(self.absent):
            names = ", ".join(sorted(missing ^ set(self.absent)))
            raise DataError(f"device state: a figure is missing exactly where a reason is given; not so for {names}")


@dataclass(frozen=True, slots=True)
class Measurement:
    """Raw samples in time order. Statistics are computed, never stored alone.

    Args:
        quantity: ``graph`` (CUDA-graph replay over buffers rotated beyond L2), ``cold`` (L2 flushed) or ``wall``.
        samples_s: seconds per launch, in the order taken.
        launches_per_sample: how many launches one sample averages over.
        rotated_bytes: bytes of distinct buffers the launches cycle through.
        blocks: for kind ``pair``, how many of the samples each block has, in time order; the other side's blocks lie
            between them.
        clock_hz: SM clock before and after, where readable.
        stopped: why sampling ended (``count``, ``time``, ``interval``).
        states: the GPU before the first block of samples and after each.
        states_absent: why there are none (``no_gpu``, ``pynvml_not_installed``, ...).
        flushed_bytes: for ``cold``, bytes written, and as many read, before each sample to empty the L2 cache.
        persisting_l2: for ``cold``, ``reset``, or why the persisting part of L2 could not be reset.
        empty_s: for ``cold``, what the same procedure reads with no launch between its two events, seconds.
        late_samples: for ``cold``, samples in which the GPU reached the launch before the host had queued it, so that
            they hold host time.
    """

    quantity: Quantity
    samples_s: tuple[float, ...]
    launches_per_sample: int = 1
    rotated_bytes: int = 0
    clock_hz: tuple[float, ...] = ()
    stopped: str = "count"
    states: tuple[DeviceState, ...] = ()
    states_absent: str = ""
    flushed_bytes: int = 0
    persisting_l2: str = ""
    empty_s: tuple[float, ...] = ()
    late_samples: int = 0
    blocks: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not self.samples_s or any(not math.isfinite(s) or s <= 0 for s in self.samples_s):
            raise DataError("a measurement needs at least one sample, all finite and above zero")
        if self.blocks and (sum(self.blocks) != len(self.samples_s) or min(self.blocks) < 1):
            raise DataError(f"blocks {self.blocks} do not divide {len(self.samples_s)} samples")

    @property
    def median_s(self) -> float:
        return statistics.median(self.samples_s)

    @staticmethod
    def from_dict(body: Mapping[str, Any]) -> Measurement:
        """From parsed JSON, or what ``asdict`` made. Raises DataError, KeyError or TypeError for anything else."""
        states = tuple(
            DeviceState(**{**s, "throttle": None if s.get("throttle") is None else tuple(s["throttle"])})
            for s in body.get("states", ())
        )
        tuples = {name: tuple(body.get(name, ())) for name in ("samples_s", "clock_hz", "empty_s", "blocks")}
        return Measurement(**{**body, **tuples, "states": states})


@dataclass(frozen=True, slots=True)
class Record:
    """One job's result.

    Args:
        case: case id, or for kind ``arithmetic`` the claim id.
        backend, variant, role: who computed. ``role`` is own, peer, subject or harness.
        kind: see ``Kind``.
        outcome: see ``Outcome``.
        reason: short stable code for anything but PASSED (``needs_cuda``, ``k_not_multiple_of_block``, ``signal_11``).
        detail: text for a person; no decision may rest on it.
        run: id of the process run the record belongs to.
        suite: the suite that planned it.
        source: where a timed shape comes from.
        error: for kinds check and time.
        measurements: only with PASSED, or for peers and subjects with a note in ``reason`` that the value was wrong.
        metrics: further figures by name (accuracy, bytes, hit rate), plain floats.
        prepare_s: phase 1, seconds of set-up outside the clock (binding, packing, compiling ahead); for kind
            ``compile``, of the compilation.
        first_launch_s: phase 2, the first launch, wall time until the device is idle; compiles what ``bind`` did not.
        steady_launch_s: phase 3, the second launch, measured like the first; see ``compile_s``.
        peak_bytes: device memory of one launch's outputs and scratch at its peak, allocator's count.
        peak_device_bytes: device memory in use during one launch above that before it, NVML, polled; it holds what
            the allocator does not see, and whatever other processes took meanwhile.
        absent: name of a figure that was asked for and could not be had -> reason code.
        numerics: the kernel's declared numerics.
        choice: what the kernel chose for the case (path, tile, warps), by name, and ``digest`` over it; empty where it
            does not say.
        environment: machine and versions; key ``hardware`` is the class claims name (``cpu``, ``sm_90``).
        sources: digest of kernel, oracle and op sources.
        pair, side: for kind ``pair``: number of the process pair in its run, and ``A`` or ``B``.
        tuning: what was set beside case and variant, name -> text: a backend's options; ``injected``: by what part
            side B of this cell is slowed on purpose, given on both sides.
        tree: for kind ``pair``: whose kernels these are, where not the installed ones (a revision or a folder's name).
        deadline_s, elapsed_s: the job's limit and its duration in the worker.
    """

    case: str
    backend: str
    kind: Kind
    outcome: Outcome
    run: str
    role: str = "own"
    variant: str = ""
    suite: str = ""
    reason: str = ""
    detail: str = ""
    source: str = ""
    error: ErrorStats | None = None
    measurements: tuple[Measurement, ...] = ()
    metrics: Mapping[str, float] = field(default_factory=dict)
    prepare_s: float | None = None
    first_launch_s: float | None = None
    steady_launch_s: float | None = None
    peak_bytes: int | None = None
    peak_device_bytes: int | None = None
    absent: Mapping[str, str] = field(default_factory=dict)
    numerics: Mapping[str, Any] = field(default_factory=dict)
    choice: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, Any] = field(default_factory=dict)
    sources: str = ""
    elapsed_s: float = 0.0
    pair: int | None = None
    side: str = ""
    tuning: Mapping[str, str] = field(default_factory=dict)
    tree: str = ""
    schema: int = SCHEMA

    def __post_init__(self) -> None:
        if self.kind == "check" and self.measurements:
            raise DataError(f"{self.case}: a check record carries no measurement")
        if self.measurements and self.role == "own" and self.outcome is not Outcome.PASSED:
            raise DataError(f"{self.case}: an own backend is timed only where its check passed")
        if (self.kind == "pair") != (self.pair is not None and self.side in ("A", "B")):
            raise DataError(f"{self.case}: a record of kind pair, and no other, has a pair number and a side A or B")

    @property
    def id(self) -> str:
        """Digest of job and process run."""
        tuning = ",".join(f"{k}={v}" for k, v in sorted(self.tuning.items()))
        beside = () if self.pair is None else (str(self.pair), self.side, tuning)
        return job_id(self.run, self.kind, self.case, self.backend, self.variant, *beside)

    @property
    def process(self) -> tuple[str, int | None, str]:
        """Which process took the times: a run is one, and so is each side of each pair."""
        return self.run, self.pair, self.side

    @property
    def who(self) -> str:
        """``backend`` or ``backend[variant]``, as claims name it."""
        return f"{self.backend}[{self.variant}]" if self.variant else self.backend

    @property
    def label(self) -> str:
        """``OUTCOME`` or ``OUTCOME(reason)``."""
        return f"{self.outcome.value}({self.reason})" if self.reason else self.outcome.value

    @property
    def hardware(self) -> str:
        return str(self.environment.get("hardware", ""))

    @property
    def compile_s(self) -> float | None:
        """What the first launch took beyond a steady one, seconds; ``None`` where there was no second launch."""
        if self.first_launch_s is None or self.steady_launch_s is None:
            return None
        return self.first_launch_s - self.steady_launch_s

    def measurement(self, quantity: str) -> Measurement | None:
        return next((m for m in self.measurements if m.quantity == quantity), None)

    def to_json(self) -> str:
        """One JSON line, keys in schema order, ``id`` and each measurement's samples included."""
        body = asdict(self)
        schema = body.pop("schema")
        if body["error"] is not None:
            body["error"] = {k: _to_json(v) for k, v in body["error"].items()}
        body["metrics"] = {k: _to_json(v) for k, v in body["metrics"].items()}
        return json.dumps({"schema": schema, "id": self.id, **body}, ensure_ascii=False, allow_nan=False)

    @staticmethod
    def from_json(line: str, where: str) -> Record:
        """Parse one line. ``where`` (file:line) starts each message.

        Raises:
            DataError: not JSON, a newer schema, a missing or unknown key, a wrong type or a wrong id.
        """
        try:
            body = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{where}: not JSON ({error.msg} at column {error.colno})") from None
        if not isinstance(body, dict):
            raise DataError(f"{where}: a record must be a JSON object")
        schema = body.get("schema")
        if not isinstance(schema, int) or isinstance(schema, bool) or schema < 1:
            raise DataError(f"{where}: 'schema' must be a positive integer")
        if schema > SCHEMA:
            raise DataError(f"{where}: schema {schema} is newer than this vbench reads ({SCHEMA}); update vbench")
        given_id = body.pop("id", None)
        try:
            if body.get("error") is not None:
                error_stats = dict(body["error"])
                error_stats["at"] = tuple(error_stats.get("at", ()))
                for name in ("worst_over_budget", "max_ulp", "correctly_rounded"):
                    error_stats[name] = None if error_stats[name] is None else float(error_stats[name])
                body["error"] = ErrorStats(**error_stats)
            body["measurements"] = tuple(Measurement.from_dict(m) for m in body.get("measurements", ()))
            body["metrics"] = {k: float(v) for k, v in body.get("metrics", {}).items()}
            body["outcome"] = Outcome(body["outcome"])
            if body.get("kind") not in KINDS:
                raise DataError(f"kind {body.get('kind')!r} is not one of {', '.join(KINDS)}")
            record = Record(**body)
        except DataError as error:
            raise DataError(f"{where}: {error}") from None
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"{where}: not a record of schema {schema} ({error})") from None
        if given_id != record.id:
            raise DataError(f"{where}: id {given_id!r} does not match the record's content ({record.id})")
        return record


def job_id(run: str, kind: str, case: str, backend: str, variant: str, *beside: str) -> str:
    """The id of the record that this job leaves in this run; ``beside``: pair, side and tuning, for kind ``pair``."""
    return hashlib.sha256("\n".join((run, kind, case, backend, variant, *beside)).encode()).hexdigest()[:16]


def _to_json(value: Any) -> Any:
    """JSON has no infinity and no NaN: they become the texts ``inf``, ``-inf`` and ``nan``."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
