"""``vbench repro HASH``: one case of a run again, in fresh workers, beside what the run recorded."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vbench import check, spec
from vbench.backend import Device
from vbench.errors import UsageError
from vbench.plan import BATTERY, CONFORMANCE, DEADLINE_S, FUZZ, Job, compile_probe, run_probe
from vbench.record import EXCUSED, Outcome, Record
from vbench.registry import BackendInfo
from vbench.report import REPEATABLE
from vbench.store import Key


@dataclass(frozen=True, slots=True)
class Pair:
    """What the run recorded, and what happened now."""

    then: Record
    now: Record


def select(records: Sequence[Record], case_hash: str, backends: Sequence[str]) -> list[Record]:
    """The records of that case to run again: checks where there are any, else timed ones, and the battery.

    Args:
        backends: names as recorded, ``backend`` or ``backend[variant]``; all where empty.

    Raises:
        UsageError: no such case, or no record of a named backend for it.
    """
    case = [r for r in records if spec.case_hash(r.case) == case_hash and r.kind in REPEATABLE]
    if not case:
        raise UsageError(f"no checked or timed case with hash {case_hash!r} in this run")
    for name in backends:
        if not any(name in (r.backend, r.who) for r in case):
            known = ", ".join(sorted({r.who for r in case}))
            raise UsageError(f"no record of backend {name!r} for this case (there are: {known})")
    chosen = [r for r in case if not backends or r.backend in backends or r.who in backends]
    checked = {r.who for r in chosen if r.kind != "time"}
    return [r for r in chosen if r.kind != "time" or r.who not in checked]


def jobs_of(records: Sequence[Record]) -> list[Job]:
    """The jobs that left these records."""
    return [
        Job(
            r.kind,
            r.suite,
            r.case,
            r.case.partition("[")[0] if r.kind != "compile" else "",
            r.backend,
            r.variant,
            r.role,
            DEADLINE_S[r.kind],
            compiles=r.kind == "compile",
            thorough=r.suite in (CONFORMANCE, FUZZ) or r.reason in check.BEYOND,
        )
        for r in records
    ]


def run(then: Sequence[Record], infos: Mapping[str, BackendInfo], device: Device) -> list[Pair]:
    """Run the jobs of these records again; each backend in a worker started for it.

    Raises:
        UsageError: a backend that is not installed here.
    """
    from vbench.runner import Run, no_arithmetic
    from vbench.store import RunStore

    missing = sorted({r.backend for r in then} - {*infos, BATTERY})
    if missing:
        raise UsageError(f"backend {missing[0]!r} of this run is not installed here")
    probes = [
        (compile_probe if compiles else run_probe)(infos[name])
        for name, compiles in dict.fromkeys((r.backend, r.kind == "compile") for r in then)
        if name != BATTERY
    ]
    jobs = jobs_of(then)
    with tempfile.TemporaryDirectory() as folder:
        store = RunStore(Path(folder) / "repro", {})
        try:
            records = Run(
                run_id="repro",
                jobs=[*probes, *jobs],
                infos=infos,
                device=device,
                store=store,
                arithmetic=no_arithmetic,
                parallel=1,
                on_record=lambda _: None,
            ).execute()
        finally:
            store.close()
    found: dict[Key, Record] = {(r.kind, r.case, r.backend, r.variant): r for r in records}
    return [Pair(old, found[job.key]) for old, job in zip(then, jobs, strict=True)]


def code(pairs: Sequence[Pair]) -> int:
    """1 if any failed now, whatever its backend's role; 3 if nothing could be run; else 0."""
    if any(p.now.outcome not in EXCUSED for p in pairs):
        return 1
    return 0 if any(p.now.outcome is Outcome.PASSED for p in pairs) else 3


def rows(record: Record) -> dict[str, Any]:
    """Everything that compares: name -> value, in a fixed order; what is missing is left out."""
    found: dict[str, Any] = {"outcome": record.outcome.value, "reason": record.reason}
    if record.error is not None:
        e = record.error
        found |= {
            "worst output": e.output,
            "worst at": list(e.at),
            "error/budget": e.worst_over_budget,
            "max ulp": e.max_ulp,
            "correctly rounded": e.correctly_rounded,
            "wrong elements": f"{e.wrong} of {e.elements}",
        }
    found |= dict(record.metrics)
    found |= {f"choice {name}": value for name, value in record.choice.items()}
    found |= {"prepare s": record.prepare_s, "compile s": record.compile_s, "steady launch s": record.steady_launch_s}
    found |= {f"{m.quantity} median s": m.median_s for m in record.measurements}
    found |= {"sources": record.sources, "hardware": record.hardware}
    return {name: value for name, value in found.items() if value not in (None, "")}


def to_text(pairs: Sequence[Pair]) -> str:
    """One block a backend: recorded beside now, a mark where they differ, and the detail now."""
    blocks = [f"case {pairs[0].now.case}"]
    for pair in pairs:
        then, now = rows(pair.then), rows(pair.now)
        lines = [f"\n{pair.now.who} ({pair.now.role}, {pair.now.kind})", f"  {'':<18} {'recorded':<28} now"]
        for name in dict.fromkeys([*then, *now]):
            old, new = _text(then.get(name)), _text(now.get(name))
            mark = "" if old == new or name.endswith(" s") else "   differs"
            lines.append(f"  {name:<18} {old:<28} {new}{mark}")
        lines += [f"  {line}" for line in pair.now.detail.strip().splitlines()]
        blocks.append("\n".join(lines))
    return "\n".join(blocks)


def _text(value: Any) -> str:
    return "-" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
