"""The worker process: one backend, one job at a time, requests and results as JSON lines.

``python -m vbench.worker NAME DISTRIBUTION PLACE`` reads jobs from standard input. Results go to the descriptor that
was standard output at start; after that, descriptors 1 and 2 both lead to the log, whatever a kernel prints.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, is_dataclass, replace
from typing import Any

from vbench import blocks, check, environment, fence, gate, integrity, machine_code, registry, sources, timing
from vbench.backend import Configuration, Device, Kernel, Place
from vbench.draws import LastDraw
from vbench.errors import CaseError, Unsupported
from vbench.monitor import Monitor, NoMonitor, open_monitor, peak_while
from vbench.plan import BATTERY
from vbench.record import BROKEN_LAW, Measurement, Outcome
from vbench.roofline import case_floor_s
from vbench.spec import Case, Expected, Law, Numerics, Op, resolve

#: Rows of a timed case compared with the oracle; check cases are compared whole.
TIMED_ROWS = 256

#: Up to so many operations, or elements where an op counts none, the oracle of a check runs on the host: there a few
#: milliseconds, on a GPU that many workers share hundreds of launches, each of which waits for theirs.
HOST_FLOPS, HOST_ELEMENTS = 3e7, 1e6

#: Declared numerics an own kernel may have: nothing coarser than fp32 sums counts as correct.
OWN_ACCUMULATE = ("fp32", "fp64", "tensor_core", "int32")


@dataclass(slots=True)
class Result:
    """What the worker answers; the parent adds run, suite, role and environment to make a Record."""

    outcome: Outcome
    reason: str = ""
    detail: str = ""
    error: dict[str, Any] | None = None
    measurements: tuple[dict[str, Any], ...] = ()
    metrics: Mapping[str, float] | None = None
    prepare_s: float | None = None
    first_launch_s: float | None = None
    steady_launch_s: float | None = None
    peak_bytes: int | None = None
    peak_device_bytes: int | None = None
    absent: dict[str, str] = field(default_factory=dict)
    numerics: Mapping[str, Any] | None = None
    choice: Mapping[str, Any] | None = None
    sources: str = ""
    environment: Mapping[str, Any] | None = None


def choice_of(kernel: Kernel) -> dict[str, Any]:
    """A bound kernel's ``plan`` by name, and ``digest`` over it; empty where it has none."""
    plan = getattr(kernel, "plan", None)
    if not is_dataclass(plan) or isinstance(plan, type):
        return {}
    values = asdict(plan)
    text = json.dumps(values, sort_keys=True)
    return {"digest": "sha256:" + hashlib.sha256(text.encode()).hexdigest()[:16], **values}


class Worker:
    """Holds the loaded backend and the device for the life of the process."""

    def __init__(self, name: str, distribution: str, place: Place) -> None:
        self.place: Place = place
        self.device: Device = "cuda" if place == "cuda" else "cpu"
        self.ops = registry.ops()
        self.backend: Any = None
        self._captured = integrity.capture()
        self.info: registry.BackendInfo | None = None
        if name != BATTERY:
            self.info, self.backend = registry.load_backend(registry.find_entry(name, distribution))
            if self.backend is None:
                raise SystemExit(f"{self.info.problem}: {self.info.detail}")
            self.ops |= {op.name: op for op in getattr(self.backend, "defines", ())}
        self._available: Any = None
        self._monitor: Monitor | NoMonitor | None = None
        self._open: blocks.OpenCell | None = None
        self._laws: dict[str, Callable[[Case, dict[str, Any]], Iterable[Law]]] = {}
        self._last = LastDraw(self.device)
        self._configurations: dict[str, Configuration] | None = None

    # -- set-up of a job ---------------------------------------------------------------------------------------------

    def availability(self) -> Any:
        """The backend's own word, asked once."""
        if self._available is None:
            self._available = self.backend.probe(self.place)
        return self._available

    def probe(self) -> Result:
        available = self.availability()
        if not available.usable:
            return Result(Outcome.UNAVAILABLE, "not_usable", available.reason)
        env = {**environment.describe(self.device), **dict(available.versions)}
        if self.place == "compile":
            if machine_code.find_cuobjdump() is None:
                detail = "no cuobjdump to read machine code with: pip install 'vbench-kernels[triton]'"
                return Result(Outcome.UNAVAILABLE, "not_usable", detail)
            env["ptxas"] = environment.ptxas_version()
        return Result(Outcome.PASSED, available.mode, available.reason, environment=env)

    def _case(self, op_name: str, case_id: str) -> tuple[Op, Case]:
        op = self.ops[op_name]
        return op, op.parse(case_id)

    def run(self, request: Mapping[str, Any]) -> Result:
        kind = request["kind"]
        if kind == "probe":
            return self.probe()
        if kind == "compile":
            return self.compile(request["case"])
        if kind in ("arm", "block", "close"):
            cell = self._open
            if kind == "close":
                self._open = None
            return Result(**blocks.answer(cell, request))
        op, case = self._case(request["op"], request["case"])
        rejected = op.reject(case)
        if rejected is not None:
            return Result(Outcome.UNSUPPORTED, rejected[0], rejected[1])
        if kind == "battery":
            return self.battery(op, case)
        available = self.availability()
        if not available.usable:
            return Result(Outcome.UNAVAILABLE, "not_usable", available.reason)
        factory = resolve(self.backend.ops[op.name])
        kernel: Kernel = factory(case, request["variant"], self.device, **request.get("options", {}))
        digest = sources.job_digest(self.backend.ops[op.name], op.oracle, op.inputs)
        if kind == "open":
            result = self.open(op, case, kernel, request["rows"])
        else:
            off = frozenset(request.get("off", ())) if request.get("thorough") else check.EXTRA
            result = self._measure(
                op,
                case,
                kernel,
                timed=kind == "time",
                role=request["role"],
                off=off,
                make=lambda other: factory(other, request["variant"], self.device),
            )
        result.numerics = asdict(kernel.numerics)
        result.choice = choice_of(kernel)
        result.sources = digest
        return result

    # -- kinds -------------------------------------------------------------------------------------------------------

    def compile(self, case_id: str) -> Result:
        """Compile one configuration ahead of time, read its machine code and judge it."""
        if self._configurations is None:
            # What this raises belongs to every job of the backend, the one that stands for all of them too.
            self._configurations = gate.in_order(list(resolve(self.backend.configurations)()))
        digest = sources.digest((self.backend.configurations.partition(":")[0],))
        configuration = self._configurations.get(case_id)
        if configuration is None:
            detail = f"the backend lists no such configuration now; it lists {len(self._configurations)}"
            return Result(Outcome.INVALID, "unlisted_configuration", detail, sources=digest)
        began = time.perf_counter()
        try:
            cubin = configuration.compile()
        except (Unsupported, MemoryError):
            raise
        except Exception as error:
            detail = "".join(traceback.format_exception(error))[-2000:]
            return Result(Outcome.COMPILE_ERROR, type(error).__name__, detail, sources=digest)
        prepare_s = time.perf_counter() - began
        judged = gate.judge(configuration, cubin, machine_code.read(cubin.code, configuration.arch))
        return Result(
            judged.outcome, judged.reason, judged.detail, metrics=judged.metrics, prepare_s=prepare_s, sources=digest
        )

    def open(self, op: Op, case: Case, kernel: Kernel, rows: int) -> Result:
        """Bind a case for blocks of samples, and compare ``rows`` sampled rows of its first output."""
        self._open = None
        self._last.forget()
        if self.device == "cuda":
            import torch

            # What the allocator keeps of the last case would be missing to the other side of the pair.
            torch.cuda.empty_cache()
        began = time.perf_counter()
        cell = blocks.OpenCell(op, case, kernel, self.device, rows, self.monitor(), self._synchronize)
        judged = cell.verify()
        assert judged is not None, "nothing was sampled yet"
        result = Result(judged.outcome, judged.reason, judged.detail, prepare_s=time.perf_counter() - began)
        result.error = asdict(judged.error) if judged.error is not None else None
        self._open = cell
        return result

    def battery(self, op: Op, case: Case) -> Result:
        """The trivial kernels must fail this case's comparison, with the widest budget an own kernel may claim."""
        widest = Numerics("tensor_core", ("bf16",), "bf16")
        inputs, expected = self._expected(op, case, widest, None)
        other = replace(case, seed=case.seed + 1)
        _, previous = self._expected(op, other, widest, None)
        survivors, excused = check.trivial_survivors(inputs, expected, previous)
        caught = len(check.TRIVIAL_KERNELS) - len(survivors) - len(excused)
        metrics = {"caught": float(caught), "degenerate": float(len(excused))}
        digest = sources.job_digest(op.oracle, op.oracle, op.inputs)
        if survivors:
            detail = f"not caught: {', '.join(survivors)}"
            return Result(Outcome.WRONG_VALUE, "trivial_kernel_passes", detail, metrics=metrics, sources=digest)
        why = next(iter(excused.values()), "")
        return Result(Outcome.PASSED, "degenerate" if excused else "", why, metrics=metrics, sources=digest)

    def _expected(
        self, op: Op, case: Case, numerics: Numerics, max_rows: int | None
    ) -> tuple[dict[str, Any], dict[str, Expected]]:
        inputs = resolve(op.inputs)(case, self.device)
        return inputs, resolve(op.oracle)(case, self._for_oracle(op, case, inputs), numerics, max_rows)

    def _for_oracle(self, op: Op, case: Case, inputs: dict[str, Any]) -> dict[str, Any]:
        """``inputs``, copied to the host where they are small tensors on a GPU; the answer is then there, too."""
        if self.device == "cpu" or not all(hasattr(t, "data_ptr") for t in inputs.values()):
            return inputs
        elements = sum(t.numel() for t in inputs.values())
        if elements > HOST_ELEMENTS if op.flops is None else op.flops(case) > HOST_FLOPS:
            return inputs
        return {name: t.cpu() for name, t in inputs.items()}

    def _measure(
        self,
        op: Op,
        case: Case,
        kernel: Kernel,
        *,
        timed: bool,
        role: str,
        off: frozenset[str] = check.EXTRA,
        make: Callable[[Case], Kernel] | None = None,
    ) -> Result:
        """Check one bound case, and time it.

        Args:
            off: names of ``check.ORACLES`` not consulted.
            make: a kernel like ``kernel`` for another case of the op; needed for laws.
        """
        # What a job that died of an exception left patched is not this one's doing.
        self._captured.altered()
        refused = self._declarations(op, kernel, off) if role == "own" else None
        if refused is not None:
            return refused
        if timed:
            inputs, expected = self._last.take(op, case, kernel.numerics, TIMED_ROWS)
        else:
            self._last.forget()
            inputs, expected = self._expected(op, case, kernel.numerics, None)
        fences: dict[str, list[fence.Fence]] = {}
        out = self._outputs(expected, off)
        if not timed:
            inputs, out, fences = _fenced(inputs, out, off)
        before = [t.clone() for t in check.tensors_of(inputs)]
        own = role == "own"

        def judge(outputs: Mapping[str, Any]) -> check.Judgement:
            return check.judge_outputs(outputs, expected, kernel.produces, contiguous=own, off=off)

        self._synchronize()
        began = time.perf_counter()
        launch = kernel.bind(inputs, out)
        self._synchronize()
        prepare_s = time.perf_counter() - began
        # The first launch compiles what bind did not; its memory and time are not the steady state's.
        outputs, first_launch_s = self._launched(launch, out)
        judged = judge(outputs)
        result = Result(
            judged.outcome, judged.reason, judged.detail, prepare_s=prepare_s, first_launch_s=first_launch_s
        )
        result.error = asdict(judged.error) if judged.error is not None else None
        shaped = judged.outcome not in (Outcome.WRONG_SHAPE, Outcome.WRONG_DTYPE)
        if op.metrics is not None and shaped and (op.metrics_when_timed or not timed):
            given = inputs if timed else self._for_oracle(op, case, inputs)
            there = outputs if given is inputs else {name: t.cpu() for name, t in outputs.items()}
            result.metrics = resolve(op.metrics)(case, given, there, expected)
        for old, new in zip(before, check.tensors_of(inputs), strict=True):
            if "inputs_unchanged" not in off and not check.same_bits(old, new):
                result.outcome, result.reason = Outcome.MUTATED_INPUT, "input_changed"
                result.detail = f"an input of shape {tuple(old.shape)} was written to"
                return result
        if judged.outcome is Outcome.PASSED:
            first = {name: outputs[name].clone() for name in kernel.produces}
            self._rerun(kernel, launch, out, first, judge, off, result)
            breach = "" if "red_zones" in off else fence.first_breach(fences)
            if breach:
                result.outcome, result.reason, result.detail = Outcome.OUT_OF_BOUNDS, "red_zone", breach
            if result.outcome is Outcome.PASSED and not timed:
                self._beyond(op, case, kernel, inputs, out, expected, first, off, make, result)
        if timed and (result.outcome is Outcome.PASSED or role != "own"):
            del before
            if self.device == "cuda":
                self._peaks(launch, out, self.monitor(), result)
            try:
                self._time(op, case, kernel, inputs, expected, launch, result)
            except Exception:
                # Samples of a patched clock may be such as no measurement admits: then the clock is what is wrong.
                if not self._patched(off, result):
                    raise
                return result
            if "after_timing" not in off and result.outcome is Outcome.PASSED:
                self._after_timing(launch, out, judge, result)
        self._patched(off, result)
        if own and result.outcome is not Outcome.PASSED:
            # Wrong only once it was timed: such a time is none, and a record would refuse it.
            result.measurements = ()
        return result

    def _patched(self, off: frozenset[str], result: Result) -> bool:
        """Whether what measures and compares was changed meanwhile; ``result`` is INVALID then."""
        altered = self._captured.altered()
        if altered and "patched" not in off:
            result.outcome, result.reason, result.measurements = Outcome.INVALID, "patched", ()
            result.detail = f"{', '.join(altered)} changed while the kernel ran; what was measured with them is void"
        return result.outcome is Outcome.INVALID and result.reason == "patched"

    def _declarations(self, op: Op, kernel: Kernel, off: frozenset[str]) -> Result | None:
        """What an own kernel may not even declare."""
        missing = [o.name for o in op.outputs if o.name not in kernel.produces]
        if missing and "produces" not in off:
            return Result(Outcome.INVALID, "missing_outputs", f"an own kernel gives all outputs; no {missing}")
        if kernel.numerics.accumulate not in OWN_ACCUMULATE and "precision" not in off:
            detail = f"accumulate={kernel.numerics.accumulate} is coarser than an own kernel may declare"
            return Result(Outcome.INVALID, "coarse_numerics", detail)
        return None

    def _outputs(self, expected: Mapping[str, Expected], off: frozenset[str]) -> dict[str, Any]:
        """Poisoned outputs; with ``poison`` off, such as an allocator gives that hands out the reference's memory."""
        out = check.poisoned(expected, self.device)
        if "poison" in off:
            for name, want in expected.items():
                if want.take is None or tuple(want.value.shape) == want.shape:
                    out[name].copy_(want.value.to(want.dtype))
        return out

    def _rerun(
        self,
        kernel: Kernel,
        launch: Callable[[], Any],
        out: dict[str, Any],
        first: dict[str, Any],
        judge: Callable[[Mapping[str, Any]], check.Judgement],
        off: frozenset[str],
        result: Result,
    ) -> None:
        """A second launch into outputs poisoned anew: right again, and bitwise the same where so declared."""
        for t in out.values() if "poison" not in off else ():
            check.poison(t)
        again, result.steady_launch_s = self._launched(launch, out)
        second = judge(again)
        if second.outcome is not Outcome.PASSED and "rerun" not in off:
            result.outcome, result.reason, result.detail = second.outcome, "second_run", second.detail
        elif (
            kernel.deterministic
            and "rerun_bitwise" not in off
            and not all(check.same_bits(first[n], again[n]) for n in kernel.produces)
        ):
            result.outcome, result.reason = Outcome.NONDETERMINISTIC, "rerun_differs"
            result.detail = "two runs on the same inputs differ though the kernel declares itself deterministic"

    def _after_timing(
        self,
        launch: Callable[[], Any],
        out: dict[str, Any],
        judge: Callable[[Mapping[str, Any]], check.Judgement],
        result: Result,
    ) -> None:
        """What the last timed launch left in our outputs, and one launch more into poisoned ones."""
        last = judge(out)
        for t in out.values():
            check.poison(t)
        again, _ = self._launched(launch, out)
        # A kernel that gives tensors of its own leaves ours as they were poisoned.
        after = last if again is out and last.outcome is not Outcome.PASSED else judge(again)
        if after.outcome is not Outcome.PASSED:
            result.outcome, result.reason, result.detail = after.outcome, "after_timing", after.detail

    def _beyond(
        self,
        op: Op,
        case: Case,
        kernel: Kernel,
        inputs: dict[str, Any],
        out: dict[str, Any],
        expected: Mapping[str, Expected],
        first: dict[str, Any],
        off: frozenset[str],
        make: Callable[[Case], Kernel] | None,
        result: Result,
    ) -> None:
        """The checks of ``check.EXTRA``, each of which costs a draw or a launch; the first that fails ends them."""
        other = functools.cache(lambda: self._expected(op, replace(case, seed=case.seed + 1), kernel.numerics, None))
        if "battery" not in off:
            _, previous = other()
            survivors, excused = check.trivial_survivors(inputs, expected, previous)
            if excused:
                result.metrics = {**(result.metrics or {}), "degenerate": float(len(excused))}
            if survivors:
                result.outcome, result.reason = Outcome.WRONG_VALUE, "trivial_kernel_passes"
                result.detail = f"the comparison lets {', '.join(survivors)} pass too"
                return
        if make is not None and not {"laws", "batch_invariance"} <= off:
            if op.name not in self._laws:
                # Once: finding entry points reads the metadata of everything installed.
                self._laws[op.name] = registry.laws_of(op.name)
            for law in self._laws[op.name](case, inputs):
                needed = "batch_invariance" if law.declared == "batch_invariant" else "laws"
                if needed in off or not law.binds(kernel):
                    continue
                # Of the same case only the shapes are needed, but where outputs are not poisoned.
                same = law.case == case and law.broken is not None and "poison" not in off
                found = self._broken(op, make(law.case), law, first, off, expected if same else None)
                if found:
                    # Batch invariance is promised of bits between runs, not of values.
                    invariant = needed == "batch_invariance"
                    result.outcome = Outcome.NONDETERMINISTIC if invariant else Outcome.WRONG_VALUE
                    result.reason, result.detail = needed, f"{law.name}: {found}"
                    result.metrics = {**(result.metrics or {}), f"{BROKEN_LAW}{law.name}": 1.0}
                    return
        if "rebind" not in off:
            self._rebind(kernel, inputs, out, *other(), off, result)

    def _broken(
        self,
        op: Op,
        kernel: Kernel,
        law: Law,
        first: dict[str, Any],
        off: frozenset[str],
        shapes: Mapping[str, Expected] | None,
    ) -> str:
        """What a law's second run shows not to hold, ``""`` if it holds.

        Args:
            first: outputs of the first run.
            shapes: what the oracle says of another run of the same shapes, where the answer to this one is not needed.
        """
        expected = shapes
        if expected is None:
            given = self._for_oracle(op, law.case, law.inputs)
            expected = resolve(op.oracle)(law.case, given, kernel.numerics, None)
        inputs, out, _ = _fenced(law.inputs, self._outputs(expected, off), off)
        outputs, _ = self._launched(kernel.bind(inputs, out), out)
        if law.broken is not None:
            return law.broken(first, outputs)
        judged = check.judge_outputs(outputs, expected, kernel.produces, off=off)
        return "" if judged.outcome is Outcome.PASSED else judged.detail

    def _rebind(
        self,
        kernel: Kernel,
        inputs: dict[str, Any],
        out: dict[str, Any],
        fresh: dict[str, Any],
        expected: Mapping[str, Expected],
        off: frozenset[str],
        result: Result,
    ) -> None:
        """The same addresses with other values, bound anew: what a kernel remembers by address is stale.

        Cases whose next draw has other shapes or values that are no tensors are left out.

        Args:
            fresh, expected: another draw of the case, and its answer.
        """
        plain = all(hasattr(v, "shape") for v in inputs.values())
        if not plain or any(inputs[n].shape != fresh[n].shape for n in inputs):
            return
        for name, t in inputs.items():
            if 0 in t.stride():
                return
            t.copy_(fresh[name])
        for name, t in self._outputs(expected, off).items():
            out[name].copy_(t)
        outputs, _ = self._launched(kernel.bind(inputs, out), out)
        judged = check.judge_outputs(outputs, expected, kernel.produces, off=off)
        if judged.outcome is not Outcome.PASSED:
            result.outcome, result.reason, result.detail = judged.outcome, "rebound_inputs", judged.detail

    def _time(
        self,
        op: Op,
        case: Case,
        kernel: Kernel,
        inputs: dict[str, Any],
        expected: dict[str, Expected],
        launch: Callable[[], Any],
        result: Result,
    ) -> None:
        monitor = self.monitor()
        taken: list[Measurement] = []
        if self.device == "cuda" and getattr(kernel, "graph_safe", True):
            taken.append(self._time_rotated(kernel, inputs, expected, result))
            taken += self._time_cold(launch, monitor, result)
        else:
            taken.append(timing.time_wall(launch, self._synchronize, monitor))
        result.measurements = tuple(asdict(m) for m in taken)
        if self.device == "cuda":
            import torch

            floor = case_floor_s(torch.cuda.get_device_name(0), op, case)
            fastest = min(taken, key=lambda m: min(m.samples_s))
            least_s = min(fastest.samples_s)
            if least_s < floor:
                result.outcome, result.reason = Outcome.INVALID, "faster_than_datasheet"
                result.detail = f"{fastest.quantity}: {least_s:.3g} s is below the datasheet's floor of {floor:.3g} s"
                result.measurements = ()

    def _time_cold(self, launch: Callable[[], Any], monitor: Monitor | NoMonitor, result: Result) -> list[Measurement]:
        """The cold measurement, or none where the flush buffers do not fit beside the case."""
        import torch

        try:
            return [timing.time_cold(launch, torch.cuda.get_device_properties(0).L2_cache_size, monitor)]
        except torch.OutOfMemoryError:
            result.absent["cold"] = "no_memory_for_flush"
            return []

    def _time_rotated(
        self, kernel: Kernel, inputs: dict[str, Any], expected: dict[str, Expected], result: Result
    ) -> Measurement:
        """Graph replay over copies of all buffers that together exceed L2; verified by one more replay after."""
        import torch

        free_bytes, _ = torch.cuda.mem_get_info()
        bound = blocks.Rotated(kernel, inputs, expected, self.device, free_bytes)
        sampler = timing.rotating_sampler(bound.launches)
        measured = timing.time_graph(sampler, bound.rotated_bytes, self.monitor())
        after = bound.verify(self._synchronize, sampler)
        if after is not None and after.outcome is not Outcome.PASSED and result.outcome is Outcome.PASSED:
            result.outcome, result.reason, result.detail = after.outcome, "after_timing", after.detail
        return measured

    # -- device ------------------------------------------------------------------------------------------------------

    def _launched(self, launch: Callable[[], Any], out: dict[str, Any]) -> tuple[dict[str, Any], float]:
        """One launch's outputs, and seconds until the device was idle again."""
        self._synchronize()
        began = time.perf_counter()
        returned: Mapping[str, Any] | None = launch()
        self._synchronize()
        taken_s = time.perf_counter() - began
        return out if returned is None else dict(returned), taken_s

    def monitor(self) -> Monitor | NoMonitor:
        """The GPU's monitor, opened once."""
        if self._monitor is None:
            uuid = ""
            if self.device == "cuda":
                import torch

                uuid = str(getattr(torch.cuda.get_device_properties(0), "uuid", ""))
            self._monitor = open_monitor(uuid)
        return self._monitor

    def _synchronize(self) -> None:
        if self.device == "cuda":
            import torch

            torch.cuda.synchronize()

    def _peaks(
        self, launch: Callable[[], Any], out: Mapping[str, Any], monitor: Monitor | NoMonitor, result: Result
    ) -> None:
        """Peak memory of one launch, by torch's allocator and by NVML; one launch each, as polling costs host time.

        ``peak_bytes`` holds outputs and scratch, also where the outputs were allocated beforehand.
        """
        import torch

        def once() -> None:
            kept = launch()
            torch.cuda.synchronize()
            del kept

        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        kept = launch()
        torch.cuda.synchronize()
        peak_bytes = torch.cuda.max_memory_allocated() - before
        if kept is None:
            peak_bytes += sum(t.numel() * t.element_size() for t in out.values())
        del kept
        result.peak_bytes = int(peak_bytes)
        if isinstance(monitor, NoMonitor):
            result.absent["peak_device_bytes"] = monitor.reason
            return
        # What the allocator caches would be reused unseen.
        torch.cuda.empty_cache()
        peak = peak_while(monitor, once)
        if isinstance(peak, str):
            result.absent["peak_device_bytes"] = peak
        else:
            result.peak_device_bytes = peak

    def device_alive(self) -> bool:
        """Whether the device still computes; after an illegal access the context is dead for good."""
        if self.device != "cuda":
            return True
        import torch

        try:
            return int(torch.ones(8, device="cuda").sum()) == 8
        except RuntimeError:
            return False


def _fenced(
    inputs: dict[str, Any], out: dict[str, Any], off: frozenset[str]
) -> tuple[dict[str, Any], dict[str, Any], dict[str, list[fence.Fence]]]:
    """Inputs and outputs between red zones, and these by group.

    With ``red_zones`` off they are there all the same, but harmless: what a kernel does must not change.
    """
    harmless = "red_zones" in off
    fences: dict[str, list[fence.Fence]] = {"input": [], "output": []}
    inputs = fence.fenced(inputs, 0 if harmless else fence.INPUT_FILL, fences["input"])
    out = fence.fenced(out, 0 if harmless else fence.OUTPUT_FILL, fences["output"])
    return inputs, out, fences


def outcome_of(error: BaseException) -> tuple[Outcome, str]:
    """Outcome and reason code of an exception, by its type alone."""
    if isinstance(error, Unsupported):
        return Outcome.UNSUPPORTED, error.rule
    if isinstance(error, CaseError):
        return Outcome.INVALID, "case"
    if isinstance(error, MemoryError):
        return Outcome.OUT_OF_MEMORY, "host_memory"
    if isinstance(error, SystemExit):
        return Outcome.CRASHED, f"exit_{error.code if isinstance(error.code, int) else 0 if error.code is None else 1}"
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(error, torch.OutOfMemoryError):
        return Outcome.OUT_OF_MEMORY, "device_memory"
    for module, names in _COMPILE_ERRORS.items():
        loaded = sys.modules.get(module)
        if loaded is not None and isinstance(error, tuple(getattr(loaded, n) for n in names if hasattr(loaded, n))):
            return Outcome.COMPILE_ERROR, type(error).__name__
    return Outcome.RUNTIME_ERROR, type(error).__name__


#: Exception types that mean a kernel did not compile.
_COMPILE_ERRORS = {
    "triton.compiler.errors": ("CompilationError", "CompileTimeAssertionFailure", "UnsupportedLanguageConstruct"),
    "triton.runtime.errors": ("PTXASError", "OutOfResources"),
    "numba.core.errors": ("NumbaError",),
}


def _die_with_parent() -> None:
    """Ask Linux to kill this process when the harness dies, so that a hung kernel is not left behind."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)


def main(argv: list[str]) -> int:
    name, distribution, place = argv
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)
    _die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Imported before the first job, so that no job's deadline pays for it.
    import torch

    threads = int(os.environ.get("VBENCH_WORKER_THREADS", "1"))
    if threads:
        torch.set_num_threads(threads)
    places: dict[str, Place] = {"cpu": "cpu", "cuda": "cuda", "compile": "compile"}
    worker = Worker(name, distribution, places[place])
    answers.write(json.dumps({"ready": True}) + "\n")
    for line in sys.stdin:
        request = json.loads(line)
        began = time.perf_counter()
        dead = False
        try:
            result = worker.run(request)
        except BaseException as error:
            outcome, reason = outcome_of(error)
            result = Result(outcome, reason, "".join(traceback.format_exception(error))[-2000:])
            if isinstance(error, Unsupported):
                result.detail = error.message
            dead = outcome not in (Outcome.UNSUPPORTED,) and not worker.device_alive()
        body = {**asdict(result), "elapsed_s": time.perf_counter() - began, "dead": dead}
        answers.write(json.dumps(body) + "\n")
        answers.flush()
        if dead:
            return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
