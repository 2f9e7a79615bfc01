"""``vbench selftest``: kernels wrong on purpose must be caught, their honest twins must pass.

A control goes through the same workers, checks and clocks as any backend's kernel, asked to be thorough. It is caught
if one of its jobs ends as the oracle it names ends one, and its twin's jobs do not; the twin is accused if one of its
jobs is not PASSED. A twin that dies was judged by nobody: such a pair is broken, neither caught nor accused.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vbench import registry
from vbench.backend import Device
from vbench.control import HONEST, Control, Corpus
from vbench.errors import UsageError
from vbench.plan import Job, run_probe
from vbench.record import EXCUSED, Outcome, Record
from vbench.registry import BackendInfo
from vbench.runner import Run, no_arithmetic
from vbench.store import RunStore, new_run_id

SUITE = "selftest"

_WRONG = (Outcome.WRONG_VALUE, Outcome.NONFINITE)
#: Oracle -> how it ends a job: outcomes, each with the reasons it gives. ``isolation`` is beside the oracles.
FINDINGS: Mapping[str, tuple[tuple[Outcome, str], ...]] = {
    "produces": ((Outcome.INVALID, "missing_outputs"),),
    "precision": ((Outcome.INVALID, "coarse_numerics"),),
    "plain_tensor": ((Outcome.WRONG_SHAPE, "not_a_tensor"),),
    "shape": ((Outcome.WRONG_SHAPE, "shape"),),
    "dtype": ((Outcome.WRONG_DTYPE, "dtype"),),
    "stride": ((Outcome.WRONG_SHAPE, "strides"),),
    "nonfinite": ((Outcome.NONFINITE, "value"),),
    "value": tuple((outcome, "value") for outcome in _WRONG),
    "exact_grid": ((Outcome.WRONG_VALUE, "value"),),
    # What is left of the poison: NaN, or the bytes of an integer.
    "poison": tuple((outcome, "value") for outcome in _WRONG),
    # What is read beyond an input is NaN.
    "red_zones": ((Outcome.OUT_OF_BOUNDS, "red_zone"), (Outcome.NONFINITE, "value")),
    "inputs_unchanged": ((Outcome.MUTATED_INPUT, "input_changed"),),
    "rerun": tuple((outcome, "second_run") for outcome in _WRONG),
    "rerun_bitwise": ((Outcome.NONDETERMINISTIC, "rerun_differs"),),
    "after_timing": tuple((outcome, "after_timing") for outcome in _WRONG),
    "patched": ((Outcome.INVALID, "patched"),),
    "rebind": tuple((outcome, "rebound_inputs") for outcome in _WRONG),
    "battery": ((Outcome.WRONG_VALUE, "trivial_kernel_passes"),),
    "laws": ((Outcome.WRONG_VALUE, "laws"),),
    "batch_invariance": ((Outcome.NONDETERMINISTIC, "batch_invariance"),),
}
#: How a job ends that no oracle judged.
DIED = frozenset(
    {Outcome.RUNTIME_ERROR, Outcome.COMPILE_ERROR, Outcome.CRASHED, Outcome.TIMEOUT, Outcome.OUT_OF_MEMORY}
)


def as_named(control: Control, record: Record) -> bool:
    """Whether a job of the control ended as an oracle it names ends one, or as isolation sees its fault."""
    for oracle in (control.oracle, *control.or_by):
        if oracle == "isolation":
            raised = record.outcome is Outcome.RUNTIME_ERROR and record.reason in control.raises
            if raised or record.outcome in (Outcome.CRASHED, Outcome.TIMEOUT):
                return True
        elif (record.outcome, record.reason) in FINDINGS[oracle]:
            return True
    return False


def jobs_of(corpus: str, control: Control, off: Sequence[str] = ()) -> list[Job]:
    """Each case of the control and of its twin. ``off``: oracles to leave out, for the proof that they are needed."""
    return [
        Job(
            control.kind,
            SUITE,
            case.id,
            control.op,
            corpus,
            control.name + end,
            "own",
            control.deadline_s,
            thorough=True,
            off=tuple(off),
        )
        for end, cases in (("", control.cases), (HONEST, control.twin_cases))
        for case in cases
    ]


@dataclass(frozen=True, slots=True)
class Finding:
    """What became of one control.

    Args:
        ran: it ran on this machine, and its twin did.
        caught_by: outcome and reason of each job that caught it, distinct, in order.
        otherwise: those of jobs that failed in a way that is no finding of its oracle, or is its twin's too.
        accusations: what its honest twin was accused of.
        broken: what the twin died of, so that the pair proves nothing.
        error_over_budget, twin_error_over_budget: worst of the jobs, ``None`` where nothing was compared.
    """

    corpus: str
    control: Control
    ran: bool
    caught_by: tuple[str, ...]
    otherwise: tuple[str, ...]
    accusations: tuple[str, ...]
    broken: tuple[str, ...]
    error_over_budget: float | None
    twin_error_over_budget: float | None


def _worst(records: Sequence[Record]) -> float | None:
    return max((r.error.worst_over_budget for r in records if r.error is not None), default=None)


def judge(controls: Sequence[tuple[str, Control]], records: Sequence[Record]) -> list[Finding]:
    """Findings in the order of ``controls`` ((corpus, control) each)."""
    found: dict[tuple[str, str], list[Record]] = {}
    for r in records:
        found.setdefault((r.backend, r.variant), []).append(r)
    findings = []
    for corpus, control in controls:
        wrong, honest = found.get((corpus, control.name), []), found.get((corpus, control.name + HONEST), [])
        # An honest twin that was refused or not run proves nothing.
        ran = bool(wrong) and bool(honest) and all(r.outcome is not Outcome.UNAVAILABLE for r in (*wrong, *honest))
        failed = [r for r in wrong if r.outcome not in EXCUSED]
        of_twin = {r.label for r in honest}
        caught = [r.label for r in failed if as_named(control, r) and r.label not in of_twin]
        died = [f"{r.label} on {r.case}" for r in honest if r.outcome in DIED]
        accused = [f"{r.label} on {r.case}" for r in honest if r.outcome is not Outcome.PASSED]
        findings.append(
            Finding(
                corpus,
                control,
                ran,
                tuple(dict.fromkeys(caught)) if not died else (),
                tuple(dict.fromkeys(r.label for r in failed if r.label not in caught)),
                tuple(dict.fromkeys(accused)) if ran and not died else (),
                tuple(dict.fromkeys(died)) if ran else (),
                _worst(wrong),
                _worst(honest),
            )
        )
    return findings


def summary(findings: Sequence[Finding]) -> dict[str, Any]:
    """Counts of what ran here, and the names of what is not as it should be.

    A broken pair did not run: it is counted in ``not_run`` and named in ``broken``.
    """
    ran = [f for f in findings if f.ran and not f.broken]
    return {
        "controls": len(ran),
        "caught": sum(bool(f.caught_by) for f in ran),
        "twins_accused": sum(bool(f.accusations) for f in ran),
        "families": len({f.control.family for f in ran}),
        "not_run": len(findings) - len(ran),
        "survivors": [f.control.name for f in ran if not f.caught_by],
        "accused": {f.control.name: list(f.accusations) for f in ran if f.accusations},
        "broken": {f.control.name: list(f.broken) for f in findings if f.broken},
    }


def exit_code(body: Mapping[str, Any]) -> int:
    """1 for a survivor, an accused twin or a broken pair, 3 if nothing ran, else 0."""
    if body["survivors"] or body["twins_accused"] or body["broken"]:
        return 1
    return 0 if body["controls"] else 3


def lines(findings: Sequence[Finding], body: Mapping[str, Any]) -> list[str]:
    """For people: families with their counts, then everything that is not as it should be."""
    ran = [f for f in findings if f.ran and not f.broken]
    total, caught = Counter(f.control.family for f in ran), Counter(f.control.family for f in ran if f.caught_by)
    out = [f"{'family':<14} caught"]
    out += [f"{family:<14} {caught[family]} of {n}" for family, n in sorted(total.items())]
    out.append("")
    for f in ran:
        if not f.caught_by:
            ended = f", but ended {', '.join(f.otherwise)}" if f.otherwise else ""
            out.append(f"SURVIVED  {f.control.name}: {f.control.fault}; meant for oracle {f.control.oracle}{ended}")
        for accusation in f.accusations:
            out.append(f"ACCUSED   the honest twin of {f.control.name}: {accusation}")
    for f in findings:
        out += [f"BROKEN    the honest twin of {f.control.name} died, so nothing is shown: {died}" for died in f.broken]
    missing = Counter(f.control.needs for f in findings if not f.ran)
    out += [f"not run   {n} controls that need {needs}" for needs, n in sorted(missing.items())]
    out.append(
        f"selftest  {body['caught']} of {body['controls']} controls caught in {body['families']} families, "
        f"{body['twins_accused']} honest twins accused"
    )
    return out


def chosen(wanted: Sequence[str]) -> tuple[list[tuple[str, Control]], dict[str, BackendInfo]]:
    """Controls by name (all without a name), and their corpora as the runner takes them.

    Raises:
        UsageError: an unknown name, or a corpus that cannot be loaded.
    """
    corpora: dict[str, tuple[BackendInfo, Corpus]] = registry.corpora()
    pairs = [(name, control) for name, (_, corpus) in corpora.items() for control in corpus.controls]
    if not pairs:
        raise UsageError("no controls are registered: this installation is older than they are; pip install it again")
    known = {control.name for _, control in pairs}
    picked = set(registry.choose("control", wanted, sorted(known)))
    return [p for p in pairs if p[1].name in picked], {name: info for name, (info, _) in corpora.items()}


def run(
    controls: Sequence[tuple[str, Control]],
    infos: Mapping[str, BackendInfo],
    *,
    has_gpu: bool,
    out: Path,
    off: Sequence[str] = (),
    on_record: Callable[[Record], None] = lambda _: None,
) -> tuple[list[Record], Path]:
    """Run them: those for the CPU in CPU workers, side by side; then those for a GPU, where there is one.

    Returns:
        the records, and the folder they are stored in (one each, ``-cuda`` appended for the second).
    """
    run_id = new_run_id()
    records: list[Record] = []
    places: tuple[Device, ...] = ("cpu", "cuda") if has_gpu else ("cpu",)
    for place in places:
        here = [(corpus, control) for corpus, control in controls if control.needs == place]
        if not here:
            continue
        jobs = [run_probe(infos[name]) for name in dict.fromkeys(corpus for corpus, _ in here)]
        jobs += [job for corpus, control in here for job in jobs_of(corpus, control, off)]
        folder = out / (run_id if place == "cpu" else f"{run_id}-{place}")
        store = RunStore(folder, {"command": "selftest", "device": place, "off": list(off)})
        try:
            records += Run(
                run_id=folder.name,
                jobs=jobs,
                infos=infos,
                device=place,
                store=store,
                arithmetic=no_arithmetic,
                parallel=max(1, os.cpu_count() or 1) if place == "cpu" else 1,
                on_record=on_record,
            ).execute()
        finally:
            store.close()
    return [r for r in records if r.kind != "probe"], out / run_id
