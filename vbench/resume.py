"""What a run rests on, pinned in ``run.json`` when it starts, so that resuming it is refused when that has changed.

Pure but for reading source files. Nothing here decides by age or by commit: digests of the plan, of the sources that
each job stands on, and the versions on the machine.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vbench.errors import DataError
from vbench.plan import ARITHMETIC, BATTERY, Job
from vbench.registry import BackendInfo
from vbench.sources import digest, job_digest
from vbench.spec import Op

#: Section -> name -> digest or version.
Pins = dict[str, dict[str, str]]

#: Differences shown in one message.
_SHOWN = 6


def _digest(text: str) -> str:
    return "sha256:" + hashlib.sha256(text.encode()).hexdigest()[:16]


def harness_digest(folder: Path | None = None) -> str:
    """Digest of the harness's own modules: other code may draw, check or time otherwise."""
    files = sorted((folder or Path(__file__).parent).glob("*.py"))
    return _digest("".join(f"{f.name}\0{f.read_text(encoding='utf-8')}\0" for f in files))


def pins(
    jobs: Sequence[Job],
    infos: Mapping[str, BackendInfo],
    ops: Mapping[str, Op],
    machine: Mapping[str, Any],
    claim_digest: Callable[[str], str],
) -> Pins:
    """Pin a plan.

    Args:
        jobs: the ordered plan.
        infos, ops: what the jobs name.
        machine: versions of interpreter and packages, CPU model.
        claim_digest: digest of a claim that arithmetic decides, by id.

    Returns:
        ``plan`` (suite -> digest of its jobs, in order), ``sources`` (``backend: op``, ``oracle: op``, ``claim: id``
        and ``harness`` -> digest), ``machine`` (name -> version).
    """
    plan: dict[str, list[str]] = {}
    sources = {"harness": harness_digest()}
    for job in jobs:
        plan.setdefault(job.suite or "probes", []).append(json.dumps(asdict(job), sort_keys=True))
        if job.backend == ARITHMETIC:
            sources[f"claim: {job.case}"] = claim_digest(job.case)
        elif job.kind == "compile":
            sources[f"{job.backend}: compile"] = digest((infos[job.backend].configurations.partition(":")[0],))
        elif job.op:
            op = ops[job.op]
            factory = op.oracle if job.backend == BATTERY else infos[job.backend].ops[job.op]
            name = f"oracle: {job.op}" if job.backend == BATTERY else f"{job.backend}: {job.op}"
            if name not in sources:
                sources[name] = job_digest(factory, op.oracle, op.inputs)
    return {
        "plan": {suite: _digest("\n".join(lines)) for suite, lines in plan.items()},
        "sources": sources,
        "machine": {key: str(value) for key, value in machine.items()},
    }


def refuse_changes(then: Any, now: Pins, where: str) -> None:
    """Compare what a run was pinned to with what is here now.

    Raises:
        DataError: not pinned at all, or anything differs; the message names which.
    """
    if not isinstance(then, dict) or not all(isinstance(then.get(section), dict) for section in now):
        raise DataError(f"{where}: says nothing of plan and sources, so that this run cannot be resumed")
    found = []
    for section, new in now.items():
        old = then[section]
        for name in sorted({*old, *new}):
            if old.get(name) == new.get(name):
                continue
            what = "is new" if name not in old else "is gone" if name not in new else "changed"
            if what == "changed" and section == "machine":
                what = f"was {old[name]}, is {new[name]}"
            found.append(f"{section}: {name} {what}")
    if found:
        more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
        raise DataError(f"{where}: cannot be resumed, start a new run ({'; '.join(found[:_SHOWN])}{more})")
