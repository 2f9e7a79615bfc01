"""Puts the parts together: what the commands ``run``, ``show`` and ``claims`` do."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vbench import environment, registry, report, selftest, simulate, spec, spent, waivers
from vbench.backend import Device
from vbench.claims import Claim, Ledger, arithmetic_metrics, load_ledger, stated_digest
from vbench.errors import DataError, UsageError
from vbench.gate import listed
from vbench.judge import ClaimVerdict, exit_code, judge, may_rest_on
from vbench.plan import Effort, Job, plan
from vbench.record import EXCUSED, Record
from vbench.registry import BackendInfo
from vbench.resume import Pins, pins, refuse_changes
from vbench.roofline import Attained, attained, ceilings
from vbench.rows import MOST_ROWS, Limited, estimate_s, within_limit
from vbench.sources import digest, job_digest
from vbench.store import (
    RUN_FILE,
    Key,
    Loaded,
    RunStore,
    load_records,
    new_run_id,
    phase_walls,
    read_records,
    read_summary,
    start_counts,
)
from vbench.tallies import op_of


def current_sources(infos: Mapping[str, BackendInfo] | None = None) -> Callable[[Record], str | None]:
    """Digest of the sources as they are now for a record's backend and op; ``None`` where they cannot be found.

    ``infos`` are all registered backends; asked for where not given, which starts a process for each stranger.
    """
    ops, infos = registry.ops(), registry.backends() if infos is None else infos
    stated = _stated(ledgers())

    def find(record: Record) -> str | None:
        if record.kind == "arithmetic":
            return stated_digest(stated[record.case]) if record.case in stated else None
        if record.kind == "selftest":
            rests_on = {simulate.BACKEND: simulate.SOURCES, selftest.BACKEND: selftest.SOURCES}.get(record.backend)
            return digest(rests_on) if rests_on is not None else None
        if record.kind == "compile":
            compiler = infos.get(record.backend)
            return digest((compiler.configurations.partition(":")[0],)) if compiler is not None else None
        op = ops.get(op_of(record) if record.kind == "fuzz" else record.case.partition("[")[0])
        info = infos.get(record.backend)
        if op is None or info is None or op.name not in info.ops:
            return None
        return job_digest(info.ops[op.name], op.oracle, op.inputs) or None

    return find


def ledgers() -> dict[str, Ledger]:
    """Every ledger, its selects checked against the registered ops."""
    params = {op.name: [p.name for p in op.params] for op in registry.ops().values()}
    return {name: load_ledger(path, ops=params) for name, path in registry.ledger_paths().items()}


def _stated(books: dict[str, Ledger]) -> dict[str, Claim]:
    """Claims that arithmetic decides, by id."""
    return {c.id: c for book in books.values() for c in book.claims if c.stated is not None}


def device_of(asked: str) -> Device:
    """The device that ``auto``, ``cpu`` or ``cuda`` means here. Raises UsageError for a GPU that is not there."""
    from vbench.runner import detect_device

    found: Device = "cpu" if asked == "cpu" else detect_device()
    if asked == "cuda" and found != "cuda":
        raise UsageError("--device cuda: torch sees no GPU here; use --device cpu, or run on a machine with CUDA")
    return found


def run_suites(
    *,
    suites: Sequence[str],
    backends: Sequence[str],
    ops: Sequence[str],
    device: str,
    effort: Effort,
    out: Path,
    seed: int,
    strict: bool,
    as_json: bool,
    dry_run: bool = False,
    timing: bool = True,
) -> int:
    """``vbench run``; without ``timing`` checks and compilations only. Raises UsageError or DataError for bad input."""
    known_suites, known_ops, known_backends = registry.suites(), registry.ops(), registry.backends()
    chosen_suites = registry.choose("suite", suites, known_suites)
    chosen_ops = registry.choose("op", ops, known_ops)
    chosen = registry.choose("backend", backends, known_backends)
    where = device_of(device)
    run_id = new_run_id()
    recipe = {
        "run": run_id,
        "device": where,
        "effort": effort,
        "seed": seed,
        "suites": chosen_suites,
        "backends": chosen,
        "ops": chosen_ops,
        "claims": sorted(_stated(ledgers())),
        "timing": timing,
    }
    planned, pinned = _plan(recipe, known_backends)
    if dry_run:
        return _show_plan(planned, where, as_json)
    if planned.message:
        print(f"plan: {planned.message}", file=sys.stderr)
    summary = {
        **recipe,
        "jobs": len(planned.jobs),
        "timed_rows": len(planned.rows),
        "postponed": len(planned.postponed),
        "pins": pinned,
    }
    store = RunStore(out / run_id, summary)
    return _execute(summary, planned.jobs, known_backends, store, (), {}, strict=strict, as_json=as_json)


def _show_plan(planned: Limited, where: Device, as_json: bool) -> int:
    """``vbench run --dry-run``: what there is to do, and for how long by the records that vbench ships."""
    hardware = environment.describe(where)["hardware"]
    seen = [r for r in baselines() if r.hardware == hardware]
    seconds = estimate_s(planned.rows, seen)
    kinds = Counter(job.kind for job in planned.jobs)
    refused = kinds["time"] - len(planned.rows)
    body: dict[str, Any] = {
        "device": where,
        "jobs": dict(kinds),
        "timed_rows": len(planned.rows),
        "not_timed_here": refused,
    }
    body |= {"postponed": len(planned.postponed), "timing_s": seconds}
    if as_json:
        print(json.dumps(body, indent=1))
        return 0
    print(f"{len(planned.jobs)} jobs on {where}: {', '.join(f'{n} {kind}' for kind, n in kinds.items())}")
    print(f"timed here: {len(planned.rows)} rows; {refused} planned ones are refused or need a GPU")
    if planned.message:
        print(planned.message)
    told = "no shipped record tells" if seconds is None else f"{seconds:.0f} s by the shipped records of {hardware}"
    print(f"timing takes about: {told}; checks and compilation come on top")
    return 0


def _timed_here(job: Job, where: Device) -> bool:
    return where == "cuda" or job.device == "any"


def resume_run(run: str, out: Path, *, strict: bool, as_json: bool) -> int:
    """``vbench run --resume RUN``: what is missing of an unfinished run, into the same folder under the same id.

    Raises:
        UsageError: no such run.
        DataError: it is still going on, or plan, sources or machine have changed.
    """
    from vbench.runner import detect_device

    folder = find_run(run, out)
    if not folder.is_dir():
        raise UsageError(f"--resume {run}: a run's folder is needed, not a file of records")
    summary = read_summary(folder)
    where = str(folder / RUN_FILE)
    missing = [key for key in _RECIPE if key not in summary]
    if missing:
        raise DataError(f"{where}: has no {', '.join(missing)}, so that this run cannot be resumed")
    known_backends = registry.backends()
    try:
        for what, names, known in (
            ("suite", summary["suites"], registry.suites()),
            ("op", summary["ops"], registry.ops()),
            ("backend", summary["backends"], known_backends),
        ):
            registry.choose(what, names, known)
    except UsageError as error:
        raise DataError(f"{where}: cannot be resumed: {error}") from None
    planned, pinned = _plan(summary, known_backends)
    jobs = planned.jobs
    refuse_changes(summary.get("pins"), pinned, where)
    if summary["device"] == "cuda" and detect_device() != "cuda":
        raise DataError(f"{where}: ran on a GPU, and torch sees none here")
    store = RunStore(folder, summary, resume=True)
    try:
        kept = read_records(store.path)
        _refuse_strangers(kept, jobs, summary, store.path)
        starts = start_counts(folder)
    except DataError:
        store.close()
        raise
    torn = f", {store.torn} bytes of a torn line cut off" if store.torn else ""
    print(f"resuming {summary['run']}: {len(kept)} of {len(jobs)} records kept{torn}", file=sys.stderr)
    return _execute(summary, jobs, known_backends, store, kept, starts, strict=strict, as_json=as_json)


#: Keys of ``run.json`` that a plan is made from.
_RECIPE = ("run", "device", "effort", "seed", "suites", "backends", "ops", "claims")


def _refuse_strangers(kept: Sequence[Record], jobs: Sequence[Job], summary: dict[str, Any], path: Path) -> None:
    planned = {job.key for job in jobs}
    for record in kept:
        key = record.kind, record.case, record.backend, record.variant
        if key not in planned or record.run != summary["run"]:
            raise DataError(f"{path}: record {record.id} ({record.who}, {record.case}) is none of this run's plan")


def _plan(recipe: dict[str, Any], infos: dict[str, BackendInfo]) -> tuple[Limited, Pins]:
    """The jobs that a recipe means with what is installed now, and what they rest on."""
    known_suites, known_ops = registry.suites(), registry.ops()
    books = ledgers()
    stated = _stated(books)
    gone = [claim for claim in recipe["claims"] if claim not in stated]
    if gone:
        raise DataError(f"cannot be resumed, start a new run (claim {gone[0]} is in no ledger)")
    chosen = [known_suites[n] for n in recipe["suites"]]
    compiled = {}
    if any(suite.compiles for suite in chosen):
        with_code = (infos[n] for n in recipe["backends"] if infos[n].configurations)
        compiled = {i.name: listed(i.name, i.distribution, i.environment.get("compile", {})) for i in with_code}
    everything = plan(
        chosen,
        [infos[n] for n in recipe["backends"]],
        ops=recipe["ops"],
        effort=recipe["effort"],
        seed=recipe["seed"],
        claims=recipe["claims"],
        timing=recipe.get("timing", True),
        compiled=compiled,
    )
    planned = _limited(everything, recipe, infos, books)
    machine = environment.describe("cpu")
    return planned, pins(planned.jobs, infos, known_ops, machine, lambda claim: stated_digest(stated[claim]))


def _limited(
    jobs: Sequence[Job], recipe: dict[str, Any], infos: dict[str, BackendInfo], books: dict[str, Ledger]
) -> Limited:
    """The plan within its effort's limit of timed rows. Kernels are asked what they refuse only where it matters."""
    where: Device = recipe["device"]
    most = MOST_ROWS[recipe["effort"]]
    rows = [job for job in jobs if job.kind == "time" and _timed_here(job, where)]
    refused: set[tuple[str, str, str]] = set()
    if most is not None and len(rows) > most:
        from vbench.survey import ask_all

        asked: dict[str, list[tuple[str, str, str]]] = {}
        for job in rows:
            asked.setdefault(job.backend, []).append((job.op, job.case, job.variant))
        answers = ask_all([infos[name] for name in asked], where, lambda info: asked[info.name])
        refused = {(backend, case, v) for (backend, _, case, v), a in answers.items() if a.kind != "ok"}
    needs = [c.restated for book in books.values() for c in book.claims if c.restated and c.restated.kind == "time"]

    def first(job: Job) -> bool:
        return any(may_rest_on(restated, job.backend, job.variant, job.case) for restated in needs)

    return within_limit(
        jobs,
        most,
        lambda job: _timed_here(job, where) and (job.backend, job.case, job.variant) not in refused,
        first,
    )


def _execute(
    summary: dict[str, Any],
    jobs: Sequence[Job],
    infos: dict[str, BackendInfo],
    store: RunStore,
    kept: Sequence[Record],
    starts: Mapping[Key, int],
    *,
    strict: bool,
    as_json: bool,
) -> int:
    """Run, judge and report. Closes the store."""
    from vbench.runner import Run

    books = ledgers()
    stated = _stated(books)
    where: Device = summary["device"]
    parallel = min(os.cpu_count() or 1, 2 if where == "cpu" else 12)
    progress = _Progress(len(jobs) - len(kept))
    began = time.monotonic()
    try:
        with progress:
            run = Run(
                run_id=summary["run"],
                jobs=jobs,
                infos={name: infos[name] for name in summary["backends"]},
                device=where,
                store=store,
                arithmetic=lambda claim: (arithmetic_metrics(stated[claim]), stated_digest(stated[claim])),
                parallel=parallel,
                on_record=progress.step,
                kept=kept,
                starts=starts,
            )
            records = run.execute()
    finally:
        store.close()
    now = current_sources(infos)
    verdicts = [v for book in books.values() for v in judge(book, records, current_sources=now)]
    code, reasons = exit_code(records, verdicts, strict=strict)
    if as_json:
        shown = {key: value for key, value in summary.items() if key not in ("pins", "claims")}
        body = _summary(shown, records, verdicts, code, reasons, store.path)
        print(json.dumps({**body, "time": spent.to_dict(records, *phase_walls(store.folder))}, indent=1))
        return code
    screen = report.last_screen(
        run_id=summary["run"],
        records=records,
        verdicts=verdicts,
        code=code,
        reasons=reasons,
        where=str(store.path),
        elapsed_s=time.monotonic() - began,
        device=where,
        postponed=int(summary.get("postponed", 0)),
        walls=phase_walls(store.folder),
        waived=waivers.judge(waivers.of_suites(registry.suites()[n] for n in summary["suites"]), records),
    )
    print(screen)
    return code


def _summary(
    plan_summary: dict[str, Any],
    records: Sequence[Record],
    verdicts: Sequence[ClaimVerdict],
    code: int,
    reasons: Sequence[str],
    path: Path,
) -> dict[str, Any]:
    return {
        **plan_summary,
        "records": str(path),
        "exit": code,
        "reasons": list(reasons),
        "outcomes": dict(Counter(r.outcome.value for r in records)),
        "claims": [_verdict_json(v) for v in verdicts],
    }


def _verdict_json(verdict: ClaimVerdict) -> dict[str, Any]:
    return {
        "id": verdict.claim,
        "as_stated": verdict.stated.to_dict(),
        "restated": verdict.restated.to_dict() if verdict.restated is not None else None,
    }


class _Progress:
    """A progress bar with time left on a terminal; elsewhere a line on standard error every ten seconds."""

    def __init__(self, total: int) -> None:
        self._total = total
        self._done = 0
        self._bad = 0
        self._began = self._said = time.monotonic()
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> _Progress:
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
            self._bar = Progress(*columns, console=Console(stderr=True), transient=True)
            self._task = self._bar.add_task("", total=self._total)
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def step(self, record: Record) -> None:
        self._done += 1
        self._bad += record.role in ("own", "harness") and record.outcome not in EXCUSED
        text = f"{record.who} {record.case[:60]}  failed: {self._bad}"
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done, description=text)
            return
        now = time.monotonic()
        if now - self._said >= 10 or self._done == self._total:
            self._said = now
            left = (now - self._began) / self._done * (self._total - self._done)
            print(f"[{self._done}/{self._total}] about {left:.0f} s left; {text}", file=sys.stderr, flush=True)


def attainer(records: Sequence[Record]) -> report.Attainer:
    """What a time attains of its machine's ceilings: those among ``records``, else the baselines'."""
    ops = registry.ops()
    known = {**ceilings(baselines()), **ceilings(records)}

    def find(record: Record, median_s: float) -> Attained | None:
        op = ops.get(record.case.partition("[")[0])
        return None if op is None else attained(record, median_s, op, known)

    return find


def find_run(run: str, out: Path) -> Path:
    """The folder or file that ``RUN`` means: ``latest``, a run id below ``out``, or a path.

    Raises:
        UsageError: nothing there.
    """
    if run == "latest":
        folders = sorted((p for p in out.glob("*") if (p / "records.jsonl").is_file()), key=lambda p: p.name)
        if not folders:
            raise UsageError(f"no run in {out} yet; start one with: vbench run --suite all")
        return folders[-1]
    for candidate in (out / run, Path(run)):
        if candidate.exists():
            return candidate
    raise UsageError(f"no run {run!r} in {out}, and no such path")


def run_records(run: str, out: Path) -> Loaded:
    """The records of a run. Lines that are not whole are named on stderr and left out: what ended is not lost by them.

    Reviewed baselines are read by ``read_records``, which takes no such file.

    Raises:
        UsageError, DataError: no such run, or whole JSON that is no record, or an id seen twice.
    """
    loaded = load_records(find_run(run, out))
    for line in loaded.torn:
        print(f"vbench: {line}; left out, the rest is kept", file=sys.stderr)
    return loaded


def show_run(run: str, out: Path, failed: bool, case_hash: str | None, fmt: str) -> int:
    """``vbench show``. ``fmt``: ``table`` and ``markdown`` summarise, ``csv`` a row a record, ``json`` the records."""
    path = find_run(run, out)
    records: Sequence[Record] = run_records(run, out).records
    if failed:
        records = [r for r in records if r.outcome not in EXCUSED]
    if case_hash is not None:
        records = [r for r in records if spec.case_hash(r.case) == case_hash]
        if not records:
            raise UsageError(f"no case with hash {case_hash!r} in this run")
    if fmt == "json":
        print("[" + ",\n".join(r.to_json() for r in records) + "]")
        return 0
    if fmt == "csv":
        # The header is there even for no record, so that a reader of columns does not break.
        print(report.table(report.frame(records, attainer(records)), "csv"), end="")
        return 0
    if not records:
        print("no records")
        return 0
    if case_hash is not None and fmt == "table":
        for r in records:
            print(f"{r.who}  {r.outcome}({r.reason})  {r.case}\n{r.detail}\n{r.error}\n{dict(r.metrics)}\n")
        return 0
    if failed or case_hash is not None:
        print(report.table(report.frame(records).drop(columns=["suite"]).dropna(axis="columns", how="all"), fmt))
        return 0
    parts = [report.conformance(records)] if any(r.kind == "check" for r in records) else []
    parts += [report.searched(records)] if any(r.kind == "fuzz" for r in records) else []
    parts += [report.compiled(records)] if any(r.kind == "compile" for r in records) else []
    parts += [report.timings(records, attainer(records))] if any(r.measurements for r in records) else []
    parts += [report.seconds(records)] if any(r.elapsed_s for r in records) else []
    texts = [report.table(part, fmt) for part in parts]
    texts += [f"time: {spent.line(records, *phase_walls(path))}"] if any(r.elapsed_s for r in records) else []
    print("\n\n".join(texts) or "nothing that makes a table")
    return 0


def matrix_command(device: str, as_json: bool) -> int:
    """``vbench list --matrix``. Exit code 1 where a cell is neither taken nor refused by a typed rule."""
    from vbench import survey

    where = device_of(device)
    tables = survey.matrix(registry.ops(), list(registry.suites().values()), list(registry.backends().values()), where)
    if as_json:
        print(json.dumps({"device": where, "cells": survey.to_dict(tables)}, indent=1))
    else:
        print(survey.to_markdown(tables), end="")
    holes = [cell for table in tables for cells in table.rows.values() for cell in cells if cell.kind == "hole"]
    if holes:
        print(f"vbench: {len(holes)} cells are holes: neither taken nor refused by Unsupported", file=sys.stderr)
    return 1 if holes else 0


def checked_command(run: str | None, kept: Path | None, out: Path, as_json: bool) -> int:
    """``vbench list --matrix`` of checks that were made. Exit code 1 where one of ours failed; strangers' do not count.

    Raises:
        UsageError: both or no such run. DataError: no file of cells, or a run without checks.
    """
    from vbench import cells

    if run is not None and kept is not None:
        raise UsageError("--run and --kept: one of them")
    ops, infos = registry.ops(), registry.backends()
    found = cells.read(kept) if kept is not None else cells.of_records(run_records(run or "", out).records, ops)

    def current(backend: str, op: str) -> str | None:
        if backend not in infos or op not in infos[backend].ops:
            return None
        return job_digest(infos[backend].ops[op], ops[op].oracle, ops[op].inputs)

    ours = [
        (info.name, op)
        for info in infos.values()
        if info.distribution == registry.OWN_DISTRIBUTION and info.role == "own"
        for op in info.ops
    ]
    print(cells.to_text(found) if as_json else cells.to_markdown(found, ops, current, ours), end="")
    wrong = cells.broken(found)
    for cell in wrong:
        print(f"vbench: {cell.kernel} {cell.op} {','.join(cell.values)}: {cell}", file=sys.stderr)
    return 1 if wrong else 0


def doctor_command(as_json: bool) -> int:
    """``vbench doctor``."""
    from vbench import doctor
    from vbench.runner import detect_device

    found = doctor.examine(registry.backends().values(), detect_device())
    print(doctor.to_json(found) if as_json else doctor.to_text(found))
    return found.code


def repro_command(case_hash: str, run: str, out: Path, backends: Sequence[str], as_json: bool) -> int:
    """``vbench repro``. Raises UsageError for a hash, run or backend that is not there."""
    from vbench import repro
    from vbench.runner import detect_device

    then = repro.select(run_records(run, out).records, case_hash, backends)
    pairs = repro.run(then, registry.backends(), detect_device())
    code = repro.code(pairs)
    if as_json:
        body = [{"recorded": json.loads(p.then.to_json()), "now": json.loads(p.now.to_json())} for p in pairs]
        print(json.dumps({"exit": code, "pairs": body}, indent=1, ensure_ascii=False))
    else:
        print(repro.to_text(pairs))
    return code


def _ledger(name: str) -> Ledger:
    books = ledgers()
    registry.choose("ledger", [name], books)
    return books[name]


def baselines() -> list[Record]:
    """Reviewed records shipped with the package, or none."""
    from importlib import resources

    folder = Path(str(resources.files("vbench").joinpath("results", "baselines")))
    return read_records(folder) if any(folder.rglob("*.jsonl")) else []


def claims_command(arguments: argparse.Namespace) -> int:
    """``vbench claims list|check|update|coverage``."""
    from vbench import documents

    ledger = _ledger(arguments.ledger)
    if arguments.verb == "coverage":
        found = documents.coverage(read_text(arguments.document), ledger, where=str(arguments.document))
        if arguments.json:
            print(json.dumps({"unaccounted": [str(n) for n in found]}, indent=1, ensure_ascii=False))
        else:
            for numeral in found:
                print(f"{arguments.document}:{numeral}")
            print(f"{len(found)} unaccounted numerals")
        return 1 if found else 0
    records = read_records(arguments.records) if arguments.records is not None else baselines()
    if arguments.records is not None and not records:
        # Not even update: it would take every number out of the document.
        return nothing_judged(str(arguments.records), as_json=arguments.json)
    if arguments.verb == "list":
        verdicts = judge(ledger, records, current_sources=current_sources())
        if arguments.json:
            print(json.dumps([_verdict_json(v) for v in verdicts], indent=1))
        else:
            for v in verdicts:
                print(f"{v.claim:<40} as stated: {v.stated}  restated: {v.restated}")
        return 0
    text = read_text(arguments.document)
    where = str(arguments.document)
    if arguments.verb == "check":
        drifts = documents.check(
            text,
            ledger,
            records,
            current_sources=current_sources(),
            where=where,
            files=lambda path: _file(arguments.document.parent / path),
        )
        if arguments.json:
            print(json.dumps({"drift": [str(d) for d in drifts]}, indent=1, ensure_ascii=False))
        else:
            for drift in drifts:
                print(drift)
            print(f"{where}: {len(drifts)} generated spans differ from the records")
        return 1 if drifts else 0
    new = documents.update(text, ledger, records, current_sources=current_sources(), where=where)
    drawn = documents.pictures(text, records, current_sources=current_sources(), where=where)
    written = [where] if new != text else []
    for name, picture in drawn.items():
        path = arguments.document.parent / name
        if _file(path) != picture:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(picture, encoding="utf-8")
            written.append(str(path))
    if new != text:
        arguments.document.write_text(new, encoding="utf-8")
    if arguments.json:
        print(json.dumps({"changed": bool(written)}))
    else:
        print("\n".join(f"{path}: rewritten" for path in written) or f"{where}: unchanged")
    return 0


def _file(path: Path) -> str | None:
    return path.read_text(encoding="utf-8") if path.is_file() else None


def nothing_judged(what: str, *, as_json: bool) -> int:
    """Say that ``what`` holds no record. Returns the exit code."""
    said = f"nothing judged: {what} has no record"
    print(json.dumps({"exit": 3, "reasons": [said]}) if as_json else said)
    return 3


def read_text(path: Path) -> str:
    """A document. Raises DataError where it cannot be read as UTF-8 text."""
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}; name a Markdown file") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from None
