"""``vbench fuzz``: chooses what to search, prints what came of it, and keeps what failed as regressions."""

from __future__ import annotations

import itertools
import json
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from vbench import commands, environment, registry, regressions, waivers
from vbench.backend import Device
from vbench.errors import CaseError, DataError, UsageError
from vbench.fuzz import Fuzz, Pool, Target, targets_of
from vbench.record import EXCUSED, Outcome, Record
from vbench.registry import OWN_DISTRIBUTION, BackendInfo
from vbench.runner import Failure
from vbench.spec import Op, case_hash
from vbench.store import RunStore, new_run_id, read_records, read_summary
from vbench.tallies import COUNTS, tallies

#: At most so many workers share a GPU: each holds a context of some hundred MB.
MOST_GPU_WORKERS = 8
#: A backend that refuses nearly everything is given up after so many times the cases asked for.
MOST_DRAWN = 10
#: In a search's folder: what came of it so far, anew after each round, for whoever finds it cut off.
SO_FAR = "search.json"
#: Keys of ``run.json`` that a search is made from.
_RECIPE = ("backend", "variant", "given", "suites", "ops", "device", "seed", "frames", "cases", "regressions")


def workers_for(device: Device, asked: int | None) -> int:
    cores = os.cpu_count() or 1
    return asked if asked is not None else cores if device == "cpu" else max(1, min(MOST_GPU_WORKERS, cores // 2))


def fuzz_command(
    *,
    backend: str,
    suites: Sequence[str],
    ops: Sequence[str],
    given: Sequence[str],
    device: str,
    cases: int,
    frames: int,
    limit_s: float | None,
    shrink_s: float,
    seed: int,
    workers: int | None,
    regressions_file: Path | None,
    resume: str | None,
    out: Path,
    as_json: bool,
) -> int:
    """Run, print and return the exit code: 1 for any failure that is not waived, 3 if nothing passed, else 0.

    Args:
        backend: ``NAME``, or ``NAME[VARIANT]`` for one of its kernels.
        given: cases (ids, or hashes of the newest run's) to try and shrink instead of drawn ones.

    Raises:
        UsageError, DataError: bad names, a backend that cannot be loaded, a run that cannot be resumed, no disk.
    """
    began = time.monotonic()
    infos, known = registry.backends(), registry.ops()
    if resume is None:
        name, _, variant = backend.partition("[")
        (name,) = registry.choose("backend", [name], infos)
        recipe: dict[str, Any] = {
            "command": "fuzz",
            "run": new_run_id(),
            "backend": name,
            "variant": variant.removesuffix("]") if variant else None,
            "given": [_case_id(one, out) for one in given],
            "suites": registry.choose("suite", suites, registry.suites()),
            "ops": registry.choose("op", ops, known),
            "device": commands.device_of(device),
            "seed": seed,
            "frames": frames,
            "cases": cases,
            "regressions": str(regressions_file) if regressions_file is not None else "",
        }
        folder, kept = out / recipe["run"], []
    else:
        folder = commands.find_run(resume, out)
        recipe = read_summary(folder)
        if recipe.get("command") != "fuzz" or any(key not in recipe for key in _RECIPE):
            raise DataError(f"{folder}: is no search of vbench fuzz that could be resumed")
        kept = read_records(folder)
    info = infos.get(recipe["backend"])
    if info is None or info.problem:
        raise UsageError(f"backend {recipe['backend']!r}: {info.problem + ': ' + info.detail if info else 'not here'}")
    if recipe["variant"] is not None:
        info = _only(info, recipe["variant"])
    chosen = [registry.suites()[n] for n in recipe["suites"]]
    names = [n for n in recipe["ops"] if n in info.ops]
    where: Device = recipe["device"]
    targets = targets_of(chosen, known, names, where, recipe["frames"] if where == "cuda" else 0, recipe["seed"])
    wanted = {_op_of(case, known): case for case in recipe["given"]}
    if not targets or any(name not in {t.op.name for t in targets} for name in wanted):
        raise UsageError(f"backend {info.name!r} has no operation that these suites draw cases of")
    store = RunStore(folder, recipe, resume=resume is not None)
    pool = Pool(info, where, folder, workers_for(where, workers))
    try:
        probe = pool.probe()
        if isinstance(probe, Failure) or probe["outcome"] != Outcome.PASSED:
            said = probe.detail if isinstance(probe, Failure) else probe["detail"]
            print(f"{info.name}: not usable on {where}: {said}")
            return 3
        machine = probe.get("environment") or environment.describe("cpu")
        fuzz = Fuzz(recipe["run"], info, where, store, pool, machine, shrink_s)
        fuzz.take_up(kept)
        pool.until = began + limit_s if limit_s is not None else None
        began_rounds = time.monotonic()

        def after(number: int, seconds: float) -> None:
            _say(fuzz.records, number, seconds)
            judged_now = waivers.judge(waivers.of_suites(chosen), fuzz.records)
            _, so_far = verdict(fuzz.records, judged_now, wall_s=time.monotonic() - began_rounds, workers=pool.width)
            _write(folder / SO_FAR, {"run": recipe["run"], "backend": info.name, **so_far})

        fuzz.on_round = after

        def more() -> bool:
            judged = sum(r.metrics["passed"] + r.metrics["failed"] for r in fuzz.records if r.kind == "fuzz")
            drawn = sum(r.metrics["cases"] for r in fuzz.records if r.kind == "fuzz")
            in_time = pool.until is None or time.monotonic() < pool.until
            return judged < recipe["cases"] and drawn < MOST_DRAWN * recipe["cases"] and in_time

        for target in targets:
            if recipe["given"]:
                ids = [case for case in recipe["given"] if _op_of(case, known) == target.op.name]
                fuzz.replay(target, [target.op.parse(case) for case in ids], "given")
                continue
            suite = next(s for s in chosen if s.name == target.suite)
            old = regressions.cases_of(suite) + _extra(recipe, target)
            fuzz.replay(target, [c for c in old if c.op == target.op.name])
        if not recipe["given"]:
            fuzz.rounds(targets, _untried(fuzz.records), recipe["seed"], more)
        rounds_s = time.monotonic() - began_rounds
        pool.close()
    except BaseException:
        pool.kill()
        raise
    finally:
        store.close()
    found = waivers.judge(waivers.of_suites(chosen), fuzz.records)
    file = _file(recipe, info, chosen)
    added = _append(file, targets, [r for r in fuzz.shrunk if r.id not in found.excused])
    code, body = verdict(fuzz.records, found, wall_s=rounds_s, workers=pool.width)
    body |= {"run": recipe["run"], "backend": info.name, "exit": code, "regressions_added": [a.case for a in added]}
    if as_json:
        print(json.dumps(body, indent=1))
    else:
        print("\n".join([*lines(info.name, code, body, fuzz.shrunk, found), f"records   {folder}"]))
    return code


def _say(records: Sequence[Record], number: int, seconds: float) -> None:
    """Progress, a line a round."""
    done = tallies(records).values()
    counted = ", ".join(f"{sum(t.counts.get(n, 0.0) for t in done):.0f} {n}" for n in COUNTS)
    print(f"round {number}: {seconds:.0f} s; so far {counted}", file=sys.stderr, flush=True)


def _write(path: Path, body: Mapping[str, Any]) -> None:
    """Whole or not at all: who reads it finds the round before or this one."""
    draft = path.with_suffix(".tmp")
    draft.write_text(json.dumps(body, indent=1) + "\n", encoding="utf-8")
    draft.replace(path)


def _only(info: BackendInfo, variant: str) -> BackendInfo:
    """The backend with one kernel an op. Raises UsageError for a variant that no op has."""
    having = {op: (variant,) for op in info.ops if variant in info.variants_of(op)}
    if not having:
        known = sorted({v for op in info.ops for v in info.variants_of(op) if v})
        raise UsageError(f"backend {info.name!r} has no variant {variant!r} (it has {', '.join(known) or 'none'})")
    return replace(info, ops={op: info.ops[op] for op in having}, variants=having)


def _case_id(text: str, out: Path) -> str:
    """The id that ``text`` is, or is the hash of in the newest run."""
    if "[" in text:
        return text
    found = {r.case for r in commands.run_records("latest", out).records if case_hash(r.case) == text}
    if not found:
        raise UsageError(f"no case with hash {text!r} in the newest run; give the id")
    return found.pop()


def _op_of(case: str, known: Mapping[str, Op]) -> str:
    """The operation of a case id. Raises UsageError where it is none."""
    name = case.partition("[")[0]
    try:
        return known[name].parse(case).op
    except (KeyError, CaseError) as error:
        raise UsageError(f"{case!r} is no case: {error}") from None


def _untried(records: Sequence[Record]) -> Iterator[int]:
    """Round numbers from 0 on that left no record yet."""
    done = {r.case.partition("round=")[2].rstrip("]") for r in records if r.kind == "fuzz"}
    return (number for number in itertools.count() if str(number) not in done)


def _extra(recipe: dict[str, Any], target: Target) -> tuple[Any, ...]:
    """Cases of the file named by hand."""
    if not recipe["regressions"]:
        return ()
    known = regressions.load(Path(recipe["regressions"]))
    return tuple(target.op.parse(one.case) for one in known if one.case.partition("[")[0] == target.op.name)


def _file(recipe: dict[str, Any], info: BackendInfo, suites: Sequence[Any]) -> Path | None:
    """Where failures are kept: the file named by hand, else, for our own backends, the suites' file."""
    if recipe["regressions"]:
        return Path(recipe["regressions"])
    if info.distribution != OWN_DISTRIBUTION or info.role != "own":
        return None
    return next((regressions.data_file(s.regressions) for s in suites if s.regressions), None)


def _append(file: Path | None, targets: Sequence[Target], shrunk: Sequence[Record]) -> list[regressions.Regression]:
    added: list[regressions.Regression] = []
    for target in targets if file is not None else ():
        assert file is not None
        added += regressions.add(file, target.suite, [r for r in shrunk if r.case.startswith(f"{target.op.name}[")])
    return added


def verdict(
    records: Sequence[Record], waived: waivers.Waived, *, wall_s: float, workers: int
) -> tuple[int, dict[str, Any]]:
    """Exit code and body.

    Args:
        wall_s: of all rounds here; compiling is counted off it as far as first launches took longer than second ones,
            shared among the workers.
    """
    found = tallies(records).values()
    total = {n: sum(t.counts.get(n, 0.0) for t in found) for n in (*COUNTS, "compile_s")}
    bad = [r for r in records if r.kind == "check" and r.outcome not in EXCUSED and r.id not in waived.excused]
    judged = total["passed"] + total["failed"]
    running_s = max(wall_s - total["compile_s"] / workers, 1e-9)
    body = {
        **total,
        "wall_s": wall_s,
        "workers": workers,
        "judged_per_min": 60 * judged / max(wall_s, 1e-9),
        "judged_per_min_without_compiling": 60 * judged / running_s,
        "kernels": [
            {"op": t.op, "who": t.who, **t.counts, "worst_over_budget": t.worst, "error_over_budget": t.bins}
            for t in found
        ],
        "violations": [
            {"case": r.case, "who": r.who, "outcome": str(r.outcome), "reason": r.reason, "hash": case_hash(r.case)}
            for r in bad
        ],
    }
    return (1 if bad else 0 if total["passed"] else 3), body


def lines(name: str, code: int, body: dict[str, Any], shrunk: Sequence[Record], waived: waivers.Waived) -> list[str]:
    """What came of it, for people."""
    out = [
        f"{name}: {body['cases']:.0f} cases: {body['passed']:.0f} passed, {body['refused']:.0f} refused, "
        f"{body['failed']:.0f} failed; {body['judged_per_min']:.0f} judged a minute by {body['workers']} workers, "
        f"{body['judged_per_min_without_compiling']:.0f} without compiling"
    ]
    for k in body["kernels"]:
        judged = k["passed"] + k["failed"]
        worst = f"; worst error/budget {k['worst_over_budget']:.3g}" if k["passed"] else ""
        out.append(f"  {k['op']} {k['who']}: {judged:.0f} judged{worst}")
    for r in shrunk:
        if r.id in waived.excused:
            continue
        note = r.detail.strip().rpartition("\n")[2]
        out.append(f"VIOLATION {r.label} {r.who} {r.case}: {note}")
        out.append(f"          vbench repro {case_hash(r.case)} --run {body['run']} --backend '{r.who}'")
    kept = len(body["violations"]) - len(shrunk)
    if kept > 0:
        out.append(f"          and {kept} records of the same kinds: vbench show {body['run']} --failed")
    out += waived.lines()
    out += [f"kept      {case}" for case in body["regressions_added"]]
    words = {0: "nothing found", 1: "violations found", 3: "nothing judged"}
    return [*out, f"verdict   {words[code]}"]
