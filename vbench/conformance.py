"""``vbench backend check NAME``: everything a check can ask of one backend, over every suite's check cases.

Thorough checks (``vbench.check.EXTRA``): laws, the same addresses with other values, the trivial kernels beside each
case, batch invariance where declared. Nothing is timed.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vbench import commands, registry, waivers
from vbench.errors import UsageError
from vbench.plan import CONFORMANCE, DEADLINE_S, Effort, Job, check_cases, run_probe
from vbench.record import EXCUSED, Outcome, Record
from vbench.registry import BackendInfo
from vbench.runner import Run, no_arithmetic
from vbench.spec import Suite, case_hash
from vbench.store import RunStore, new_run_id

#: Failures shown before the rest is only counted.
SHOWN = 12


def jobs_of(info: BackendInfo, suites: Sequence[Suite], ops: Sequence[str], effort: Effort, seed: int) -> list[Job]:
    """The backend's probe, and a thorough check of each variant on each case of its ops, each case once."""
    cases = {case.id: case for suite in suites for case in check_cases(suite, effort, seed)}
    return [
        run_probe(info),
        *(
            Job(
                "check",
                CONFORMANCE,
                case.id,
                case.op,
                info.name,
                variant,
                info.role,
                DEADLINE_S["check"],
                thorough=True,
            )
            for case in cases.values()
            if case.op in info.ops and case.op in ops
            for variant in info.variants_of(case.op)
        ),
    ]


def verdict(records: Sequence[Record], waived: waivers.Waived | None = None) -> tuple[int, dict[str, Any]]:
    """Exit code and body: 1 with any violation that is not waived, whatever the backend's role; 3 if no case passed."""
    checked = [r for r in records if r.kind == "check"]
    excused = waived.excused if waived is not None else {}
    bad = [r for r in checked if r.outcome not in EXCUSED and r.id not in excused]
    passed = [r for r in checked if r.outcome is Outcome.PASSED]
    errors = [r.error.worst_over_budget for r in passed if r.error is not None]
    body = {
        "cases": len(checked),
        "outcomes": dict(Counter(str(r.outcome) for r in checked)),
        "refusals": dict(Counter(r.reason for r in checked if r.outcome is Outcome.UNSUPPORTED)),
        "worst_over_budget": max(errors, default=None),
        "waived": waived.lines() if waived is not None else [],
        "violations": [
            {
                "case": r.case,
                "variant": r.variant,
                "outcome": str(r.outcome),
                "reason": r.reason,
                "detail": r.detail.strip().rpartition("\n")[2],
                "hash": case_hash(r.case),
            }
            for r in bad
        ],
    }
    return (1 if bad else 0 if passed else 3), body


def lines(name: str, probe: Record | None, code: int, body: dict[str, Any], run: str) -> list[str]:
    """The verdict in words that a stranger can act on."""
    counted = ", ".join(f"{n} {o}" for o, n in sorted(body["outcomes"].items(), key=lambda item: -item[1]))
    out = [f"{name}: {body['cases']} thorough checks: {counted or 'none'}"]
    if probe is not None and probe.outcome is not Outcome.PASSED:
        out.append(f"not usable here: {probe.outcome}({probe.reason}): {probe.detail}")
    refusals = ", ".join(f"{n} {rule}" for rule, n in sorted(body["refusals"].items(), key=lambda item: -item[1])[:6])
    if refusals:
        out.append(f"refused   {refusals}")
    if body["worst_over_budget"] is not None:
        out.append(f"worst     error/budget {body['worst_over_budget']:.3g} of what passed")
    for v in body["violations"][:SHOWN]:
        who = f"[{v['variant']}]" if v["variant"] else ""
        out.append(f"VIOLATION {v['outcome']}({v['reason']}){who} {v['case']}: {v['detail']}")
        out.append(f"          vbench repro {v['hash']} --run {run} --backend '{name}{who}'")
    if len(body["violations"]) > SHOWN:
        out.append(f"          and {len(body['violations']) - SHOWN} more: vbench show {run} --failed")
    out += body["waived"]
    words = {0: "conforms on every case it takes", 1: "does not conform", 3: "nothing judged: no case passed"}
    return [*out, f"verdict   {words[code]}"]


def check_command(
    name: str, ops: Sequence[str], *, device: str, effort: Effort, seed: int, out: Path, as_json: bool
) -> int:
    """Run, print and return the exit code.

    Raises:
        UsageError: no such backend or op, or a backend that cannot be loaded or has none of the ops.
    """
    infos, known = registry.backends(), registry.ops()
    (chosen,) = registry.choose("backend", [name], infos)
    info = infos[chosen]
    if info.problem:
        raise UsageError(f"backend {name!r}: {info.problem}: {info.detail}")
    where = commands.device_of(device)
    suites = list(registry.suites().values())
    jobs = jobs_of(info, suites, registry.choose("op", ops, known), effort, seed)
    if len(jobs) == 1:
        raise UsageError(f"backend {name!r} has none of these operations; it has {', '.join(info.ops)}")
    run_id = new_run_id()
    store = RunStore(out / run_id, {"command": "backend check", "backend": name, "device": where, "seed": seed})
    try:
        records = Run(
            run_id=run_id,
            jobs=jobs,
            infos=infos,
            device=where,
            store=store,
            arithmetic=no_arithmetic,
            parallel=1,
            on_record=lambda _: None,
        ).execute()
    finally:
        store.close()
    code, body = verdict(records, waivers.judge(waivers.of_suites(suites), records))
    if as_json:
        print(json.dumps({"backend": name, "exit": code, "run": run_id, **body}, indent=1, ensure_ascii=False))
        return code
    probe = next((r for r in records if r.kind == "probe"), None)
    print("\n".join([*lines(name, probe, code, body, run_id), f"records   {out / run_id}"]))
    return code
