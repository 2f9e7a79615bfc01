"""Judge the systems' targets by what is on record: ``python docs/tuning/targets.py [--write | --check]``.

Read are ``results/systems/MACHINE/`` (a folder that ``systems.py --out`` left, runs included) and
``results/baselines/MACHINE/tier.jsonl``; written, or compared with ``--check`` (exit code 1 if it differs), is
``docs/systems.md``. The targets are those of issue 4,
and one promise of the document that only these records can judge.

    MET, MISSED    the figure is on the right, or the wrong, side of the limit
    INCONCLUSIVE   it is on record, and decides nothing: cut off, too few points, an interval across the limit
    STALE          measured, but the kernels have changed since (known of vbench's own records only)
    NOT_RUN        nothing is on record; a rehearsal on a CPU is nothing

Without either option it prints the document. Unreadable records are an error (exit code 2).
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vbench.commands import current_sources
from vbench.errors import DataError
from vbench.intervals import student
from vbench.judge import case_params, is_stale, quantity_of
from vbench.kernels.virtual.hardware import CARDS
from vbench.kernels.virtual.units import parse_bytes
from vbench.pairs import observations
from vbench.record import Record
from vbench.store import read_records

ROOT = Path(__file__).resolve().parents[2]
GIB = 1 << 30
SCRIPTS = ("tier_codec", "estimator", "scenarios", "tier_54gb")

OVER_BOUND = 1.15
FASTER = 2.5
OVERHEAD = 0.01
MEDIAN_ERROR, WORST_ERROR, LEAST_POINTS = 0.05, 0.15, 40
SAVING = 0.9
LARGE_BYTES = 54 * 10**9
STREAMED = {"mode": "forward", "layers": "48", "width": "8192", "gpu_bytes": str(GIB)}
TOKENS = ("16", "1024", "8192", "32768")


@dataclass(frozen=True, slots=True)
class Judged:
    """A target's state: ``word`` (module docstring), and what was found, for people."""

    target: str
    word: str
    found: str = ""


@dataclass(frozen=True, slots=True)
class Evidence:
    """What one machine left.

    Args:
        machine: folder name; its link's rate is that of the card of this name.
        scripts: script -> the JSON it wrote, where it ran on a GPU.
        records: vbench's own: the baseline's and those of the folder's runs.
        stale: ids of records whose kernels have changed.
    """

    machine: str
    scripts: Mapping[str, Mapping[str, Any]]
    records: Sequence[Record]
    stale: frozenset[str]


def read(machine: str, root: Path = ROOT) -> Evidence:
    """Everything on record of a machine; a script's file that was written without a GPU is left aside.

    Raises:
        DataError: a file that cannot be read; it is named.
    """
    folder = root / "results" / "systems" / machine
    scripts: dict[str, Any] = {}
    for name in SCRIPTS:
        path = folder / f"{name}.json"
        if not path.is_file():
            continue
        try:
            body = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise DataError(f"{path}: not JSON: {error}; take it out, or run its part again") from error
        gpu = body.get("summary", body).get("gpu_name" if name == "tier_54gb" else "gpu", "none")
        if gpu != "none":
            scripts[name] = body
    records: list[Record] = []
    baseline = root / "results" / "baselines" / machine / "tier.jsonl"
    for path in (baseline, *sorted(folder.glob("runs/*/records.jsonl"))):
        if path.is_file():
            records += [r for r in read_records(path) if r.environment.get("hardware") != "cpu"]
    now = current_sources()
    return Evidence(machine, scripts, records, frozenset(r.id for r in records if is_stale(r, now)))


def judge(have: Evidence) -> list[Judged]:
    """Every target, in the issue's order."""
    return [
        _bound(have),
        _codec(have),
        _overhead(have),
        *_peaks(have),
        *_estimator(have),
        _large(have),
        _rows(have),
        _saving(have),
    ]


def _word(good: bool, stale: bool = False) -> str:
    return "STALE" if stale else "MET" if good else "MISSED"


def _offload(have: Evidence) -> Iterator[tuple[Record, str, dict[str, str]]]:
    """Timed passes of the streamed stack: record, who, parameters."""
    for r in have.records:
        op, parameters = case_params(r.case)
        if r.kind == "time" and op == "offload_pass" and STREAMED.items() <= parameters.items():
            yield r, f"{r.backend}[{r.variant}]" if r.variant else r.backend, parameters


def _bound(have: Evidence) -> Judged:
    target = (
        f"forward over 6.44 GB streamed <= {OVER_BOUND} x max(transfer of the bytes moved, resident compute), "
        f"{TOKENS[0]} to {TOKENS[-1]} tokens"
    )
    mine: dict[str, Record] = {}
    resident: dict[str, Record] = {}
    for r, who, parameters in _offload(have):
        if "codec" not in parameters and quantity_of(r, "time.wall") is not None:
            if who == "tiers":
                mine[parameters["tokens"]] = r
            elif who == "torch_native[all_resident]":
                resident[parameters["tokens"]] = r
    both = [t for t in TOKENS if t in mine and t in resident]
    if not both:
        return Judged(target, "NOT_RUN")
    rate = CARDS[have.machine].link_bytes_s
    over = {}
    for t in both:
        transfer_s = mine[t].metrics["to_device_bytes"] / rate
        over[t] = _wall(mine[t]) / max(transfer_s, _wall(resident[t]))
    worst = max(over, key=lambda t: over[t])
    found = f"at most {over[worst]:.3f} ({worst} tokens), {len(both)} of {len(TOKENS)} token counts"
    if over[worst] <= OVER_BOUND and len(both) < len(TOKENS):
        return Judged(target, "INCONCLUSIVE", found)
    stale = any(r.id in have.stale for t in both for r in (mine[t], resident[t]))
    return Judged(target, _word(over[worst] <= OVER_BOUND, stale), found)


def _wall(record: Record) -> float:
    value = quantity_of(record, "time.wall")
    assert value is not None, record.id
    return value


def _codec(have: Evidence) -> Judged:
    target = f"nvfp4 tier >= {FASTER} x as fast as raw where the transfer is what a pass waits for"
    body = have.scripts.get("tier_codec")
    if body is None or "raw" not in body:
        return Judged(target, "NOT_RUN")
    if "nvfp4" not in body:
        return Judged(target, "INCONCLUSIVE", "cut off after raw")
    least = min((name for name in body["raw"] if name.startswith("tokens_")), key=lambda name: int(name[7:]))
    ratio = body["raw"][least]["median_s"] / body["nvfp4"][least]["median_s"]
    equal = body["raw"]["equal"] and body["nvfp4"]["equal"]
    found = f"{ratio:.2f} x at {least[7:]} tokens, passes {'bitwise equal' if equal else 'DIFFERENT'}"
    return Judged(target, _word(equal and ratio >= FASTER), found)


def _overhead(have: Evidence) -> Judged:
    target = f"all-resident overhead within {OVERHEAD:.0%} either way"
    sides: dict[str, set[tuple[str, str, str]]] = {}
    for r in have.records:
        if r.kind == "pair":
            sides.setdefault(r.run, set()).add((r.side, r.backend, r.variant))
    asked = {
        run for run, found in sides.items() if found == {("A", "torch_native", "all_resident"), ("B", "tiers", "")}
    }
    pairs_of = [r for r in have.records if r.kind == "pair" and r.run in asked]
    cells = observations(pairs_of)
    logs = [one.log_time for (_, injected), pairs in cells.items() if injected == 0 for one in pairs]
    if not logs:
        return Judged(target, "NOT_RUN")
    if len(logs) < 2:
        return Judged(target, "INCONCLUSIVE", "one pair")
    interval = student(logs, 0.975)
    ends = [math.expm1(value) for value in (interval.low, interval.high)]
    text = f"{math.expm1(interval.value):+.2%}, 95 % interval {ends[0]:+.2%} to {ends[1]:+.2%}, {len(logs)} pairs"
    if any(r.id in have.stale for r in pairs_of):
        return Judged(target, "STALE", text)
    if ends[0] >= -OVERHEAD and ends[1] <= OVERHEAD:
        return Judged(target, "MET", text)
    outside = ends[0] > OVERHEAD or ends[1] < -OVERHEAD
    return Judged(target, "MISSED" if outside else "INCONCLUSIVE", text)


def _peaks(have: Evidence) -> Iterator[Judged]:
    target = "GPU peak within the budget: 54 GB under 8 GiB"
    large = have.scripts.get("tier_54gb")
    if large is None or "peak_bytes" not in large:
        yield Judged(target, "NOT_RUN")
    else:
        limit, peak = parse_bytes(large["gpu"], "--gpu"), large["peak_bytes"]
        yield Judged(target, _word(peak <= limit), f"{peak / GIB:.3f} of {limit / GIB:.3f} GiB")
    target = "GPU peak within the budget: the document's scenarios"
    rows = [row for row in have.scripts.get("scenarios", {}).get("rows", ()) if row.get("peak_bytes")]
    shares = [row["peak_bytes"] / budget for row in rows if (budget := _budget(row))]
    if not shares:
        yield Judged(target, "NOT_RUN")
    else:
        yield Judged(target, _word(max(shares) <= 1), f"at most {max(shares):.1%} of a budget, {len(shares)} scenarios")


def _budget(row: Mapping[str, Any]) -> int:
    words = row["options"].split()
    return parse_bytes(words[words.index("--budget") + 1], "--budget") if "--budget" in words else 0


def _estimator(have: Evidence) -> Iterator[Judged]:
    body = have.scripts.get("estimator")
    errors = [abs(row["error"]) for row in body["rows"] if "error" in row] if body else []
    enough = len(errors) >= LEAST_POINTS
    for name, limit, of in (("median", MEDIAN_ERROR, statistics.median), ("worst", WORST_ERROR, max)):
        target = f"estimator: {name} error <= {limit:.0%} over at least {LEAST_POINTS} points"
        if not errors:
            yield Judged(target, "NOT_RUN")
            continue
        error = float(of(errors))
        word = _word(error <= limit) if enough else "INCONCLUSIVE"
        yield Judged(target, word, f"{error:.2%}, {len(errors)} points")


def _large(have: Evidence) -> Judged:
    target = "54 GB forward and backward under 8 GiB: output and gradients `torch.equal` to all-resident"
    body = have.scripts.get("tier_54gb")
    if body is None or body["verdict"] == "REFUSED":
        return Judged(target, "NOT_RUN", "" if body is None else str(body["reason"]))
    if body["weight_bytes"] < LARGE_BYTES - 10**8:
        return Judged(target, "INCONCLUSIVE", f"only {body['weight_bytes'] / 1e9:.1f} GB of weights")
    if "different" not in body:
        return Judged(target, "INCONCLUSIVE", "cut off before the comparison")
    found = f"{body['weight_bytes'] / 1e9:.1f} GB, {len(body['different'])} tensors differ"
    return Judged(target, _word(not body["different"]), found)


def _rows(have: Evidence) -> Judged:
    target = "the document's scenarios run with their flags; a first forward is bitwise that without a budget"
    body = have.scripts.get("scenarios")
    if body is None or not body["rows"]:
        return Judged(target, "NOT_RUN")
    bad = [row["name"] for row in body["rows"] if row["exit_code"] or not _same_start(row, _twin(row, body["rows"]))]
    found = f"{len(body['rows']) - len(bad)} of {len(body['rows'])} as they should be"
    found += f"; wrong: {', '.join(bad)}" if bad else ""
    if body["left_out"] and not bad:
        return Judged(target, "INCONCLUSIVE", f"{found}; left out: {', '.join(body['left_out'])}")
    return Judged(target, _word(not bad), found)


def _saving(have: Evidence) -> Judged:
    """Scenario 3's promise, on the card: masters, gradients and moments on the host are not on it."""
    target = f"the document's {SAVING:.0%} saving by all options together, of the GPU's peak (scenario 3)"
    rows = {row["name"]: row for row in have.scripts.get("scenarios", {}).get("rows", ()) if row.get("peak_bytes")}
    bare = rows.get("large bare free")
    saved = {
        name: 1 - row["peak_bytes"] / bare["peak_bytes"]
        for name, row in rows.items()
        if bare and name.startswith("cluster")
    }
    if bare is None or not saved:
        return Judged(target, "NOT_RUN")
    found = f"{bare['peak_bytes'] / 1e9:.2f} GB without any; saved: "
    found += "; ".join(f"{name}: {share:.0%}" for name, share in saved.items())
    return Judged(target, _word(max(saved.values()) >= SAVING), found)


def _twin(row: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """The row of the same training without a budget."""
    free = (one for one in rows if one["name"].endswith(" free"))
    return next((one for one in free if row["name"].startswith(one["name"].removesuffix(" free"))), None)


def _same_start(row: Mapping[str, Any], twin: Mapping[str, Any] | None) -> bool:
    return twin is not None and twin["exit_code"] == 0 and bool(twin["losses"][0] == row["losses"][0])


def document(machines: Iterable[Evidence]) -> str:
    """The whole of ``docs/systems.md``."""
    lines = [
        "# The systems' targets",
        "",
        "Generated by `python docs/tuning/targets.py --write` from `results/systems/` and `results/baselines/`; what",
        "the words mean stands there. Transfers are reckoned at the rate of `CARDS` in `kernels/virtual/hardware.py`.",
    ]
    for have in machines:
        lines += ["", f"## {have.machine}", "", "| target | state | found |", "|---|---|---|"]
        lines += [f"| {one.target} | {one.word} | {one.found or '-'} |" for one in judge(have)]
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None, root: Path = ROOT) -> int:
    """Print, write or check the document."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--write", action="store_true", help="write docs/systems.md")
    how.add_argument("--check", action="store_true", help="exit code 1 if docs/systems.md says something else")
    parser.add_argument("--machine", nargs="+", choices=sorted(CARDS), default=["h200"], help="whose (h200)")
    given = parser.parse_args(argv)
    path = root / "docs" / "systems.md"
    try:
        text = document(read(machine, root) for machine in given.machine)
    except DataError as error:
        print(f"targets: {error}", file=sys.stderr)
        return 2
    if given.write:
        path.write_text(text, encoding="utf-8")
    elif given.check:
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            print(f"{path}: not what the records say; python docs/tuning/targets.py --write", file=sys.stderr)
            return 1
    else:
        print(text, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
