"""What the commands of ``vbench.cli_compare`` do."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from vbench import ab, baseline, commands, comparison, documents, pairs, registry, regression, selftest, simulate
from vbench.errors import CaseError, DataError, UsageError
from vbench.judge import judge, may_rest_on
from vbench.pairs import Cell
from vbench.plan import Effort
from vbench.record import EXCUSED, Record
from vbench.registry import BackendInfo
from vbench.report import si
from vbench.roofline import DATASHEETS, case_floor_s
from vbench.roofline import ceilings as ceilings_of
from vbench.sides import Side
from vbench.sources import digest
from vbench.spec import Op
from vbench.store import RECORDS, RunStore, new_run_id, read_records, write_records


def gate_command(run: str, out: Path, folder: Path, *, strict: bool, fmt: regression.Format) -> int:
    """``vbench gate RUN --baseline DIR``. Pure: reads records, needs no GPU.

    Raises:
        UsageError, DataError: no such run or baseline, or a file that is none.
    """
    path = commands.find_run(run, out)
    loaded = commands.run_records(run, out)
    reviewed = read_records(folder)
    result = regression.judge_run(reviewed, loaded.records, floor=_floor(), torn=loaded.torn)
    code, reasons = regression.exit_code(result, strict=strict)
    for what, records in ((f"baseline {folder}", reviewed), ("run", loaded.records)):
        if not records and code != 1:
            code, reasons = 3, [f"nothing judged: the {what} has no record"]
    print(regression.render(result, code, reasons, fmt, {"run": str(path), "baseline": str(folder)}))
    return code


def _floor() -> regression.Floor:
    """Seconds below which the datasheet of a record's GPU calls its time impossible."""
    ops = registry.ops()

    def floor(record: Record) -> float:
        op = ops.get(record.case.partition("[")[0])
        if op is None:
            return 0.0
        return case_floor_s(str(record.environment.get("gpu", "")), op, op.parse(record.case))

    return floor


def ab_command(specs: tuple[str, str] | tuple[str], arguments: argparse.Namespace) -> int:
    """``vbench ab A B``, and ``vbench gate --against A``, whose B is what is installed.

    Raises:
        UsageError, DataError: sides, cases or numbers that mean nothing.
    """
    looks = comparison.looks_between(arguments.pairs, arguments.max_pairs or 2 * arguments.pairs)
    rule = comparison.Rule(delta=arguments.delta, looks=looks, confirm=arguments.pairs)
    suites = registry.suites()
    floors = {}
    if arguments.floors is not None:
        floors = pairs.floors(commands.run_records(arguments.floors, arguments.out).records, looks[0])
        if not floors:
            raise DataError(f"--floors {arguments.floors}: no cell of identical code in it has three pairs")
    try:
        found, path = ab.run_ab(
            specs,
            run_id=new_run_id(),
            infos=registry.backends(),
            suites=[suites[name] for name in registry.choose("suite", arguments.suite, suites)],
            ops=registry.ops(),
            backends=arguments.backend,
            only_ops=registry.choose("op", arguments.op, registry.ops()),
            cases=arguments.case,
            effort=arguments.effort,
            device=commands.device_of(arguments.device),
            rule=rule,
            out=arguments.out,
            seed=arguments.seed,
            limit_s=arguments.limit_s,
            floors=floors,
        )
    except CaseError as error:
        raise UsageError(str(error)) from None
    code, reasons = ab.exit_code(found, strict=arguments.strict)
    names = {"a": specs[0], "b": specs[1] if len(specs) == 2 else "installed", "records": str(path)}
    if arguments.format == "json":
        print(ab.to_json(found, code, reasons, names))
        return code
    if arguments.format == "github":
        print("\n".join(ab.github_lines(found, code, reasons)))
    print(ab.to_text(found, code, reasons, names))
    return code


def baseline_update(
    runs: Sequence[str], out: Path, destination: Path, texts: Sequence[Path], ledger: str, *, write: bool, as_json: bool
) -> int:
    """``vbench baseline update``: print old and new side by side; write only with ``write``.

    Raises:
        UsageError, DataError: bad runs, documents or ledger, too much to review, or machines that differ.
    """
    books = commands.ledgers()
    registry.choose("ledger", [ledger], books)
    records = _joined(runs, out)
    if not records:
        return commands.nothing_judged(", ".join(runs), as_json=as_json)
    read = {path: commands.read_text(path) for path in texts}
    beside = baseline.staying(destination, records)
    kept = baseline.select(records, read, books[ledger], commands.current_sources(), beside)
    if not kept:
        raise DataError("nothing to keep: no record of these runs is behind a number of the documents")
    by_suite = baseline.files(kept, records)
    old = baseline.replaced(destination, by_suite)
    found = baseline.changes(old, kept)
    timed = [[r for r in side if r.measurements] for side in (old, kept)]
    unlike = regression.differences(*timed) if all(timed) else ()
    _refuse_other_machine(destination, timed[1])
    if as_json:
        body = {
            "changes": baseline.to_json(found),
            "machine": [str(d) for d in unlike],
            "rows": {suite: len(rows) for suite, rows in by_suite.items()},
            "written": write,
        }
        print(json.dumps(body, indent=1, ensure_ascii=False))
    else:
        print(baseline.to_text(found))
        for difference in unlike:
            print(f"machine   {difference}")
        moved = sum(c.disjoint for c in found)
        print(f"cells     {len(found)}, of which {moved} moved beyond their intervals (*)")
        print(f"rows      {', '.join(f'{len(rows)} {suite}' for suite, rows in by_suite.items())}")
        print(f"written   {destination}" if write else "written   nothing; review, then add --write")
    if write:
        baseline.write(destination, by_suite)
    return 0


def _refuse_other_machine(destination: Path, new: Sequence[Record]) -> None:
    """Raises DataError where the folder holds times of another GPU: a driver may be new, the GPU is not."""
    there = [r for r in read_records(destination) if r.measurements] if destination.exists() else []
    unlike = regression.differences(there, new) if there and new else ()
    others = "; ".join(str(d) for d in unlike if d.name in ("hardware", "gpu"))
    if others:
        raise DataError(
            f"--baseline {destination}: {others}; nothing is written: give each machine a folder of its own"
        )


def _refuse_twins(records: Sequence[Record]) -> None:
    seen: set[str] = set()
    for record in records:
        if record.id in seen:
            raise DataError(f"id {record.id} occurs in two of the runs: one of them is given twice; name it once")
        seen.add(record.id)


def simulated_selftest(seed: int, out: Path, as_json: bool) -> int:
    """``vbench selftest --aa --simulated``: the rates of the rule on machines whose noise is known.

    The run's id is made of the seed and the sources, so that the same command gives the same file.
    """
    run = f"selftest-{digest(simulate.SOURCES).removeprefix('sha256:')[:8]}-{seed}"
    records = simulate.records(run=run, seed=seed)
    path = out / run / RECORDS
    write_records(path, records)
    _print_rates(records, simulate.BACKEND, as_json)
    if not as_json:
        print(f"\nrecords   {path}")
    return 0


def machine_selftest(arguments: argparse.Namespace) -> int:
    """``vbench selftest --aa``: pairs of identical code on this machine, and of known slowdowns; rates over all pairs.

    Exit code 3 as long as no cell has enough pairs.

    Raises:
        UsageError, DataError: names that are none, nothing to measure, or records that cannot be read.
    """
    joined = _joined((*arguments.join, *arguments.resume), arguments.out)
    run_id = new_run_id()
    measured, path = _measure_selftest(arguments, run_id) if arguments.pairs else ([], arguments.out / run_id / RECORDS)
    taken = [r for r in (*joined, *measured) if r.kind == "pair"]
    unlike = {
        name: sorted({str(r.environment.get(name, "-")) for r in taken if r.measurements}) for name in ("gpu", "driver")
    }
    for name, values in unlike.items():
        if len(values) > 1:
            raise DataError(f"--join: the runs are of machines that differ in {name}: {' and '.join(values)}")
    result = selftest.rates(taken, run=run_id, rule=comparison.Rule())
    if not result.records:
        print(f"nothing judged: no cell has {selftest.PAIRS} pairs yet; further runs are added with --join {run_id}")
        print(f"records   {path}")
        return 3
    rates_path = path.with_name("selftest.jsonl")
    write_records(rates_path, result.records)
    _print_rates(result.records, selftest.BACKEND, arguments.json)
    if not arguments.json:
        print(f"\n{selftest.summary(result.records)}")
        print(f"gated     {result.gated} cells; {len(result.noisy)} are too noisy for a margin of 1 %")
        for name, one in result.noisy[:10]:
            print(f"noisy     floor {100 * (one.floor or 0):.2f} % {name}")
        print(f"records   {rates_path}")
    return 0


def _joined(runs: Sequence[str], out: Path) -> list[Record]:
    """The records of several runs.

    Raises:
        UsageError, DataError: no such run, records that cannot be read, or one run given twice.
    """
    records = [record for run in runs for record in commands.run_records(run, out).records]
    _refuse_twins(records)
    return records


def baseline_measure(arguments: argparse.Namespace) -> int:
    """``vbench baseline measure``: process-level runs of our own cells, for ``baseline update``.

    Identical code on both sides of ``--pairs`` pairs, which is two processes each. Cells that claims rest on come
    first. Exit code 1 where a kernel is wrong, 3 where no cell got all its processes.

    Raises:
        UsageError, DataError: names that are none, nothing to measure, or records that cannot be read.
    """
    done = _joined(arguments.resume, arguments.out)
    there: Sequence[Record] = read_records(arguments.baseline) if arguments.baseline is not None else ()
    infos, cases, backends = _own_cases(arguments, arguments.effort if arguments.baseline is None else "full")
    every = selftest.cells_of(cases, infos, backends, injected=False)
    needs = [
        c.restated for b in commands.ledgers().values() for c in b.claims if c.restated and c.restated.kind == "time"
    ]

    def idle(cell: Cell) -> bool:
        return not any(may_rest_on(n, cell.backend["A"], cell.variant["A"], cell.case) for n in needs)

    cells = selftest.unfinished(sorted(every, key=idle), done, arguments.pairs)
    if arguments.claims:
        cells = [c for c in cells if not idle(c)]
    if arguments.baseline is not None:
        cost_s = baseline.costs_s(there)
        cells = [c for c in cells if (c.case, c.who) in cost_s]
        # The cheapest first: a limit then buys the most cells that can be gated.
        cells.sort(key=lambda c: (idle(c), cost_s[c.case, c.who]))
    if not every:
        raise UsageError("baseline measure: no timed case of these backends here; name one with --case")
    if not cells:
        print(f"nothing left to measure: {len(every)} cells have {arguments.pairs} pairs, or none that is asked for")
        return 0
    run_id = new_run_id()
    records, path = _measure(cells, infos, arguments, run_id)
    open_ = selftest.unfinished(cells, [*done, *records], arguments.pairs)
    failed = Counter(r.label for r in records if not r.measurements)
    print(f"cells     {len(cells) - len(open_)} of {len(cells)} have {2 * arguments.pairs} processes")
    timed = [[r for r in side if r.measurements] for side in (there, records)]
    for difference in regression.differences(*timed) if all(timed) else ():
        print(f"machine   {difference}; a gate refuses a baseline of both: take all of it anew here")
    for label, number in sorted(failed.items()):
        print(f"failed    {number} x {label}")
    if open_:
        print(f"go on     --resume {' '.join([*arguments.resume, run_id])}")
    print(f"records   {path}")
    if any(r.role == "own" and r.outcome not in EXCUSED for r in records):
        return 1
    return 3 if len(open_) == len(cells) else 0


def _own_cases(
    arguments: argparse.Namespace, effort: Effort
) -> tuple[Mapping[str, BackendInfo], list[ab.Chosen], Sequence[str]]:
    """All backends, the timed cases asked for, and whose they are to be: our own ones' unless named."""
    infos, ops, suites = registry.backends(), registry.ops(), registry.suites()
    try:
        cases = ab.chosen_cases(
            [suites[name] for name in registry.choose("suite", arguments.suite, suites)],
            ops,
            only_ops=registry.choose("op", arguments.op, ops),
            cases=arguments.case,
            effort=effort,
            device=commands.device_of(arguments.device),
        )
    except CaseError as error:
        raise UsageError(f"--case: {error}") from None
    own = [n for n, info in infos.items() if info.role == "own" and info.timed and not info.problem]
    return infos, cases, registry.choose("backend", arguments.backend, infos) if arguments.backend else own


def _measure(
    cells: Sequence[Cell], infos: Mapping[str, BackendInfo], arguments: argparse.Namespace, run_id: str
) -> tuple[list[Record], Path]:
    """The pairs of one run, stored as they are made."""
    return ab.measure_cells(
        cells,
        {side: Side("installed") for side in "AB"},
        run_id=run_id,
        infos=infos,
        device=commands.device_of(arguments.device),
        out=arguments.out,
        seed=arguments.seed,
        pairs=arguments.pairs,
        limit_s=arguments.limit_s,
    )


def _measure_selftest(arguments: argparse.Namespace, run_id: str) -> tuple[list[Record], Path]:
    ops = registry.ops()
    infos, cases, backends = _own_cases(arguments, "full")
    cost_s = {c.case: _bound_s(ops[c.op], c.case) for c in cases}
    every = selftest.cells_of(selftest.cheapest(cases, cost_s, arguments.cases, arguments.skip), infos, backends)
    if not every:
        raise UsageError("selftest: no timed case of these backends here; name one with --case")
    cells = selftest.unfinished(every, _joined(arguments.resume, arguments.out), arguments.pairs)
    if not cells:
        return [], arguments.out / run_id / RECORDS
    return _measure(cells, infos, arguments, run_id)


def _bound_s(op: Op, case_id: str) -> float:
    """A lower bound on a case's time on the GPUs we know, to order cases by; 0 where the op gives no figures."""
    return min(case_floor_s(gpu, op, op.parse(case_id)) for gpu in DATASHEETS)


def roofline_command(device: str, only: Sequence[str], folder: Path | None, out: Path, *, as_json: bool) -> int:
    """``vbench roofline``: this machine's measured ceilings, one record a probe.

    Raises:
        UsageError, DataError: an unknown probe, a folder that is none, or a results folder that cannot be written.
    """
    from vbench import ceilings

    where = commands.device_of(device)
    if folder is not None and not folder.is_dir():
        raise UsageError(f"--folder {folder}: no such folder")
    run_id = new_run_id()
    with ceilings.temporary_folder(folder) as scratch:
        every = list(ceilings.probes(where, Path(scratch)))
        wanted = registry.choose("probe", only, dict.fromkeys(p.what for p in every))
        chosen = [p for p in every if p.what in wanted]
        store = RunStore(out / run_id, {"run": run_id, "device": where, "probes": len(chosen)})
        try:
            found = ceilings.records(chosen, where, run_id, ceilings.open_monitor_on(where), store.append)
        finally:
            store.close()
    if as_json:
        print("[" + ",\n".join(r.to_json() for r in found) + "]")
        return 0
    for r in found:
        unit = {"launch": "launches/s", "B": "B/s", "flop": "flop/s", "op": "op/s"}[r.source]
        value = si(r.metrics["per_s"], unit) if r.metrics else f"{r.label}: {r.detail}"
        print(f"{r.case:<60} {value}")
    print(f"records   {store.path}")
    return 0


def report_command(run: str, out: Path, output: Path) -> int:
    """``vbench report``: one offline page. Exit code 3 where the run has no record.

    Raises:
        UsageError, DataError: no such run, records that cannot be read, no jinja2, or a file that cannot be written.
    """
    from vbench import html_report

    path = commands.find_run(run, out)
    loaded = commands.run_records(run, out)
    if not loaded.records:
        print(f"nothing to report: {path} has no record")
        return 3
    books = commands.ledgers()
    sources = commands.current_sources()
    verdicts = {name: judge(book, loaded.records, current_sources=sources) for name, book in books.items()}
    known = {**ceilings_of(commands.baselines()), **ceilings_of(loaded.records)}
    page = html_report.render(
        loaded.records,
        verdicts,
        books,
        registry.ops(),
        known,
        run=path.stem if path.is_file() else path.name,
        where=str(path),
    )
    html_report.write(output, page)
    print(f"report    {output} ({len(page.encode()) / 1024:.0f} KiB, {len(loaded.records)} records)")
    return 0


def _print_rates(records: Sequence[Record], backend: str, as_json: bool) -> None:
    if as_json:
        print("[" + ",\n".join(r.to_json() for r in records) + "]")
        return
    print("\n".join(documents.rates_table(records, backend)))
