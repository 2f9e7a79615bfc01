"""What people read: tables and the last screen. The only module that imports pandas and tabulate, and only on use."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from vbench import spent, tallies
from vbench.record import EXCUSED, Outcome, Record
from vbench.spec import case_hash

if TYPE_CHECKING:
    from pandas import DataFrame

    from vbench.judge import ClaimVerdict
    from vbench.roofline import Attained
    from vbench.waivers import Waived

LAST_SCREEN_LINES = 15

#: Kinds of records that ``vbench repro`` takes.
REPEATABLE = ("check", "time", "battery", "compile")


def si(value: float, unit: str) -> str:
    """Three significant digits with a prefix: 0.0000312 s -> ``31.2 us``."""
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"), (1, ""), (1e-3, "m"), (1e-6, "u")):
        if abs(value) >= factor:
            return f"{value / factor:.3g} {prefix}{unit}"
    return f"{value / 1e-9:.3g} n{unit}" if value else f"0 {unit}"


#: Columns of a frame of no records.
_COLUMNS = ["hash", "kind", "suite", "backend", "case", "outcome", "reason", "err/budget", "correctly rounded"]
_COLUMNS += ["prepare_s", "compile_s", "steady_launch_s", "peak_bytes", "peak_device_bytes"]


#: What a record's median in seconds attains of the machine's ceilings.
Attainer = Callable[[Record, float], "Attained | None"]


def frame(records: Iterable[Record], attained: Attainer | None = None) -> DataFrame:
    """One row a record, for tables, CSV and further analysis.

    With ``attained`` a timed row has the quantity's floor in seconds and the fractions it reaches of it.
    """
    import pandas as pd

    rows = []
    for r in records:
        row: dict[str, Any] = {
            "hash": case_hash(r.case),
            "kind": r.kind,
            "suite": r.suite,
            "backend": r.who,
            "case": r.case,
            "outcome": r.outcome.value,
            "reason": r.reason,
            "err/budget": r.error.worst_over_budget if r.error else None,
            "correctly rounded": r.error.correctly_rounded if r.error else None,
        }
        row |= {"prepare_s": r.prepare_s, "compile_s": r.compile_s, "steady_launch_s": r.steady_launch_s}
        row |= {"peak_bytes": r.peak_bytes, "peak_device_bytes": r.peak_device_bytes}
        for m in r.measurements:
            row[f"{m.quantity}_s"] = m.median_s
        # Graph first: of the three quantities it is the kernel's own time.
        first = min(r.measurements, key=lambda m: ("graph", "cold", "wall").index(m.quantity), default=None)
        reached = attained(r, first.median_s) if attained is not None and first is not None else None
        if reached is not None:
            row |= {"floor_s": reached.floor_s, "of measured": reached.of_measured}
            row["of datasheet"] = reached.of_datasheet
        rows.append(row)
    return pd.DataFrame(rows, columns=None if rows else _COLUMNS)


def table(data: DataFrame, fmt: str = "table") -> str:
    """Render a frame as ``table`` (terminal), ``markdown``, ``csv`` or ``json`` (records)."""
    if fmt == "csv":
        return str(data.to_csv(index=False))
    if fmt == "json":
        return str(data.to_json(orient="records", indent=1))
    from tabulate import tabulate

    style = "github" if fmt == "markdown" else "simple"
    clean = data.astype(object).where(data.notna(), "")
    return tabulate(clean.to_dict("list"), headers="keys", tablefmt=style, floatfmt=".3g")


def conformance(records: Sequence[Record]) -> DataFrame:
    """Backend x op: how many checks passed of how many were not excused, and what was excused or wrong."""
    import pandas as pd

    cells: dict[tuple[str, str], Counter[str]] = {}
    for r in records:
        if r.kind == "check":
            cells.setdefault((r.who, r.case.partition("[")[0]), Counter())[r.outcome.value] += 1
    rows = []
    for (who, op), counts in sorted(cells.items()):
        rest = ", ".join(f"{n} {o}" for o, n in sorted(counts.items()) if o != "PASSED")
        rows.append({"backend": who, "op": op, "passed": counts["PASSED"], "other": rest})
    return pd.DataFrame(rows, columns=["backend", "op", "passed", "other"])


def compiled(records: Sequence[Record]) -> DataFrame:
    """Backend x op x architecture: configurations compiled ahead of time, and the most that any of them takes.

    ``spill_bytes`` is the largest local memory of a thread and ``allowed`` how many needed their declared allowance.
    """
    import pandas as pd

    cells: dict[tuple[str, str, str], list[Record]] = {}
    for r in records:
        params = dict(part.partition("=")[::2] for part in r.case.partition("[")[2].rstrip("]").split(","))
        if r.kind == "compile" and "arch" in params:
            cells.setdefault((r.who, params["op"], params["arch"]), []).append(r)
    rows = []
    for (who, op, arch), found in sorted(cells.items()):
        row: dict[str, Any] = {"backend": who, "op": op, "arch": arch, "configurations": len(found)}
        row["passed"] = sum(r.outcome is Outcome.PASSED for r in found)
        row["allowed"] = sum(r.reason == "spill_allowed" for r in found)
        for name in ("registers", "spill_bytes", "shared_bytes"):
            row[name] = int(max((r.metrics.get(name, 0.0) for r in found), default=0.0))
        rows.append(row)
    return pd.DataFrame(rows)


def timings(records: Sequence[Record], attained: Attainer | None = None) -> DataFrame:
    """Timed cases x backend: median seconds per launch; with ``attained`` also the part of the measured ceiling
    (``of datasheet`` where no ceiling was measured)."""
    import pandas as pd

    rows: dict[str, dict[str, Any]] = {}
    for r in records:
        for m in r.measurements:
            mark = "" if r.outcome is Outcome.PASSED else " (wrong)"
            reached = attained(r, m.median_s) if attained is not None else None
            part = "" if reached is None else f", {_percent(reached)}"
            rows.setdefault(f"{r.case} {m.quantity}", {})[r.who] = si(m.median_s, "s") + part + mark
    return pd.DataFrame([{"case": case, **cells} for case, cells in rows.items()])


def _percent(reached: Attained) -> str:
    if reached.of_measured is not None:
        return f"{100 * reached.of_measured:.0f} % of measured"
    return f"{100 * (reached.of_datasheet or 0):.0f} % of datasheet"


def _count_line(records: Sequence[Record]) -> str:
    counts = Counter(r.outcome.value for r in records)
    return ", ".join(f"{n} {o}" for o, n in counts.most_common())


def seconds(records: Iterable[Record]) -> DataFrame:
    """One row a kind and backend: seconds in workers by what they went to (``spent.Spent``), the longest first; the sum
    last.
    """
    import pandas as pd

    found = spent.by_backend(records)
    rows = [
        {
            "kind": kind,
            "backend": backend,
            "jobs": one.jobs,
            "seconds": round(one.total_s, 1),
            "prepare": round(one.prepare_s, 1),
            "compile": round(one.compile_s, 1),
            "samples": round(one.samples_s, 1),
            "rest": round(one.rest_s, 1),
        }
        for (kind, backend), one in [*found.items(), (("all", ""), sum(found.values(), spent.Spent()))]
    ]
    return pd.DataFrame(rows)


def searched(records: Iterable[Record]) -> DataFrame:
    """One row a kernel that ``vbench fuzz`` searched."""
    import pandas as pd

    head, rows = tallies.rows(records)
    return pd.DataFrame(rows, columns=head)


def _worst(records: Sequence[Record]) -> Record | None:
    scored = [r for r in records if r.role == "own" and r.kind in ("check", "time") and r.error is not None]
    return max(scored, key=lambda r: r.error.worst_over_budget if r.error else 0.0, default=None)


def _slowest_against_peer(records: Sequence[Record]) -> str:
    best_peer: dict[tuple[str, str], Record] = {}
    own: dict[tuple[str, str], Record] = {}
    for r in records:
        for m in r.measurements:
            key = r.case, str(m.quantity)
            table = own if r.role == "own" else best_peer if r.role == "peer" else None
            if table is None or r.outcome is not Outcome.PASSED:
                continue
            old = table.get(key)
            old_m = old.measurement(m.quantity) if old else None
            if old_m is None or m.median_s < old_m.median_s:
                table[key] = r
    pairs = []
    for key, mine in own.items():
        peer = best_peer.get(key)
        a, b = mine.measurement(key[1]), peer.measurement(key[1]) if peer else None
        if peer is not None and a is not None and b is not None:
            pairs.append((b.median_s / a.median_s, key[0], mine.who, peer.who))
    if not pairs:
        return "no timed cell has both one of ours and a peer"
    ratio, case, who, peer_who = min(pairs)
    return f"{ratio:.2g}x of {peer_who} by {who} on {case_hash(case)} ({case})"


def last_screen(
    *,
    run_id: str,
    records: Sequence[Record],
    verdicts: Sequence[ClaimVerdict],
    code: int,
    reasons: Sequence[str],
    where: str,
    elapsed_s: float,
    device: str,
    postponed: int = 0,
    waived: Waived | None = None,
    walls: tuple[Mapping[str, float], bool] = ({}, False),
) -> str:
    """At most LAST_SCREEN_LINES lines: what happened, what it means, what to do next."""
    stated = Counter(v.stated.word for v in verdicts if v.stated is not None)
    restated = Counter(v.restated.word for v in verdicts if v.restated is not None)
    battery = [r for r in records if r.kind == "battery"]
    caught = int(sum(r.metrics.get("caught", 0) for r in battery))
    degenerate = int(sum(r.metrics.get("degenerate", 0) for r in battery))
    alive = sum(1 for r in battery if r.outcome is Outcome.WRONG_VALUE)
    missing = Counter(r.reason for r in records if r.outcome in (Outcome.UNAVAILABLE, Outcome.UNSUPPORTED))
    if postponed:
        missing["timed rows wait for --effort full"] = postponed
    failed = [r for r in records if r.role in ("own", "harness") and r.outcome not in EXCUSED]
    found = Counter(f"{r.who} {r.outcome.value}" for r in records if r.role == "subject" and r.outcome not in EXCUSED)
    worst = _worst(records)
    lines = [
        f"run {run_id}: {len(records)} jobs on {device} in {elapsed_s:.0f} s, exit {code}"
        + (f" ({reasons[0]})" if code and reasons else ""),
        f"outcomes  {_count_line(records)}",
        f"claims    as stated: {_words(stated)}; restated: {_words(restated)}",
        f"battery   trivial kernels caught {caught}, excused as degenerate {degenerate}, cases with a survivor {alive}",
    ]
    if worst is not None and worst.error is not None:
        w = worst.error
        lines.append(
            f"worst     error/budget {w.worst_over_budget:.3g} in {w.output} by {worst.who} on {case_hash(worst.case)}"
        )
    lines.append(f"slowest   {_slowest_against_peer(records)}")
    code_read = [r for r in records if r.kind == "compile"]
    if code_read:
        passed = sum(r.outcome is Outcome.PASSED for r in code_read)
        allowed = [r.metrics["spill_bytes"] for r in code_read if r.reason == "spill_allowed"]
        most = f", at most {max(allowed):.0f} B" if allowed else ""
        lines.append(
            f"compiled  {passed} of {len(code_read)} configurations pass, {len(allowed)} by a declared spill{most}"
        )
    wrong = [r for r in records if r.role == "peer" and r.outcome not in EXCUSED]
    if wrong or (waived is not None and waived.passed):
        lines.append(_peers_line(wrong, waived))
    if found:
        lines.append(f"subjects  {', '.join(f'{n} x {what}' for what, n in found.most_common(4))}")
    # After the failures: how many more there are, and the four lines at the end.
    shown = min(3, LAST_SCREEN_LINES - len(lines) - 5)
    for r in failed[:shown]:
        lines.append(f"FAILED    {r.who} {r.outcome.value}({r.reason}) {case_hash(r.case)} {r.case}"[:200])
    if len(failed) > shown:
        lines.append(f"          and {len(failed) - shown} more: vbench show {run_id} --failed")
    lines.append(f"not run   {', '.join(f'{n} {reason}' for reason, n in missing.most_common(6)) or 'nothing'}")
    lines.append(f"time      {spent.line(records, *walls)}")
    lines.append(f"records   {where}")
    again = (
        f"vbench repro {case_hash(failed[0].case)} --run {run_id}" if failed and failed[0].kind in REPEATABLE else ""
    )
    if wrong and not failed:
        again = f"vbench fuzz --backend '{wrong[0].who}' --case '{wrong[0].case}' shrinks it"
    lines.append(f"next      {again or f'vbench show {run_id}'}")
    return "\n".join(lines[:LAST_SCREEN_LINES])


def _peers_line(wrong: Sequence[Record], waived: Waived | None) -> str:
    """Who else is wrong, what of it is known, and what was known and is right now."""
    counts = Counter(f"{r.who} {r.outcome.value}" for r in wrong)
    known = sum(r.id in waived.excused for r in wrong) if waived is not None else 0
    text = f"peers     {', '.join(f'{n} x {what}' for what, n in counts.most_common(4)) or 'right'}"
    text += f"; waived {known}" if known else ""
    for waiver in waived.passed if waived is not None else ():
        text += f"; UNEXPECTED PASS {waiver.backend} {waiver.op} ({waiver.issue})"
    return text


def _words(counts: Counter[str]) -> str:
    return ", ".join(f"{n} {word}" for word, n in counts.most_common()) or "none"
