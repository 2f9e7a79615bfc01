"""The commands that compare, as ``vbench.cli`` adds them. Parses and calls; as light as that module."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from vbench.errors import UsageError

DEFAULT_OUT = Path("results") / "runs"


def _seconds(text: str) -> float:
    """A time limit: a finite number above zero. argparse reports a ValueError as a bad value of the option."""
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"takes seconds above zero, not {text}")
    return value


def add_commands(commands: Any) -> None:
    """Add the commands to the subparsers ``commands``."""
    gate = commands.add_parser("gate", help="exit 1 if something of ours got slower or wrong, 3 if nothing was judged")
    gate.add_argument("run", nargs="?", metavar="RUN", help="run id, folder, JSONL file or latest; with --baseline")
    gate.add_argument("--baseline", type=Path, metavar="DIR", help="results/baselines/MACHINE; needs no GPU")
    gate.add_argument("--against", metavar="REV|DIR", help="measure what is installed against these kernels, in pairs")
    gate.add_argument("--strict", action="store_true", help="exit 3 if a cell is missing or inconclusive")
    gate.add_argument(
        "--format", choices=("table", "json", "github"), default="table", help="github: annotations too (table)"
    )
    _add_pair_options(gate, pairs=15)

    ab = commands.add_parser("ab", help="A against B in fresh process pairs: backends, options, revisions, folders")
    ab.add_argument(
        "a", metavar="A", help="BACKEND, BACKEND[VARIANT], BACKEND@OPTION=VALUE, a git revision or a folder"
    )
    ab.add_argument("b", metavar="B", help="what is judged to be SLOWER, FASTER or the SAME")
    ab.add_argument("--strict", action="store_true", help="exit 3 if a cell is inconclusive")
    ab.add_argument("--format", choices=("table", "json", "github"), default="table", help="as in gate (table)")
    _add_pair_options(ab, pairs=10)

    verbs = commands.add_parser("baseline", help="reviewed records of a machine").add_subparsers(
        dest="verb", required=True, metavar="VERB"
    )
    update = verbs.add_parser("update", help="show what runs change in a baseline, old and new; --write writes it")
    update.add_argument("runs", nargs="+", metavar="RUN", help="run ids, folders or JSONL files")
    update.add_argument("--baseline", type=Path, required=True, metavar="DIR", help="results/baselines/MACHINE")
    update.add_argument(
        "--document",
        type=Path,
        nargs="+",
        default=[],
        metavar="DOC",
        help="keep what these rest on (six times a cell)",
    )
    update.add_argument("--ledger", default="virtual_blackwell", metavar="NAME", help="which ledger")
    update.add_argument("--out", type=Path, default=DEFAULT_OUT, metavar="DIR", help=f"results folder ({DEFAULT_OUT})")
    update.add_argument("--write", action="store_true", help="write after the diff was reviewed")
    update.add_argument("--json", action="store_true", help="print JSON")

    measure = verbs.add_parser("measure", help="processes of our own cells, for update; what claims rest on first")
    measure.add_argument("--suite", action="append", default=[], metavar="NAME", help="suite's timed cases; repeatable")
    measure.add_argument("--op", action="append", default=[], metavar="NAME", help="operation; repeatable (all)")
    measure.add_argument("--case", action="append", default=[], metavar="ID", help="this case; repeatable")
    measure.add_argument("--backend", action="append", default=[], metavar="NAME", help="repeatable (our own)")
    measure.add_argument("--effort", choices=("quick", "standard", "full"), default="quick", help="which cases (quick)")
    measure.add_argument("--claims", action="store_true", help="only cells that a claim rests on")
    measure.add_argument("--baseline", type=Path, metavar="DIR", help="only cells of these records, of any effort")
    measure.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where (auto)")
    measure.add_argument("--pairs", type=int, default=3, metavar="N", help="process pairs, two processes each (3)")
    measure.add_argument("--limit-s", type=_seconds, metavar="S", help="measure as many cells as this has time for")
    measure.add_argument("--resume", nargs="+", default=[], metavar="RUN", help="leave out what these have N pairs of")
    measure.add_argument("--seed", type=int, default=0, metavar="N", help="seed of who leads (0)")
    measure.add_argument("--out", type=Path, default=DEFAULT_OUT, metavar="DIR", help=f"results folder ({DEFAULT_OUT})")

    selftest = commands.add_parser(
        "selftest", help="kernels wrong on purpose must be caught; --aa: our own false-alarm rate and power"
    )
    selftest.add_argument(
        "--control", action="append", default=[], metavar="NAME", help="without --aa: this control; repeatable (all)"
    )
    selftest.add_argument(
        "--aa", action="store_true", help="identical code on both sides, and slowdowns, measured or simulated"
    )
    selftest.add_argument("--simulated", action="store_true", help="on simulated noisy machines; needs no GPU")
    selftest.add_argument(
        "--suite", action="append", default=[], metavar="NAME", help="suite's timed cases; repeatable"
    )
    selftest.add_argument("--op", action="append", default=[], metavar="NAME", help="operation; repeatable (all)")
    selftest.add_argument("--case", action="append", default=[], metavar="ID", help="this case; repeatable")
    selftest.add_argument("--backend", action="append", default=[], metavar="NAME", help="repeatable (our own)")
    selftest.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where (auto)")
    selftest.add_argument("--cases", type=int, default=60, metavar="N", help="so many of the cheapest cases (60)")
    selftest.add_argument("--skip", type=int, default=0, metavar="N", help="leave out so many of the cheapest (0)")
    selftest.add_argument("--pairs", type=int, default=10, metavar="N", help="process pairs; 0: none, only --join (10)")
    selftest.add_argument("--limit-s", type=_seconds, metavar="S", help="measure as many cells as this has time for")
    selftest.add_argument("--join", nargs="+", default=[], metavar="RUN", help="count the pairs of these runs too")
    selftest.add_argument(
        "--resume", nargs="+", default=[], metavar="RUN", help="as --join, and leave out what these have N pairs of"
    )
    selftest.add_argument("--seed", type=int, default=0, metavar="N", help="seed of what is drawn (0)")
    selftest.add_argument(
        "--out", type=Path, default=DEFAULT_OUT, metavar="DIR", help=f"results folder ({DEFAULT_OUT})"
    )
    selftest.add_argument("--json", action="store_true", help="print the records of the rates")

    checks = commands.add_parser("backend", help="conformance of one backend").add_subparsers(
        dest="verb", required=True, metavar="VERB"
    )
    check = checks.add_parser("check", help="thorough checks of a backend on every suite's cases; exit 1 if one fails")
    check.add_argument("name", metavar="NAME", help="backend")
    check.add_argument("--op", action="append", default=[], metavar="NAME", help="operation; repeatable (all)")
    check.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where (auto)")
    check.add_argument("--effort", choices=("quick", "standard", "full"), default="quick", help="how much (quick)")
    check.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the generated cases (0)")
    check.add_argument("--out", type=Path, default=DEFAULT_OUT, metavar="DIR", help=f"results folder ({DEFAULT_OUT})")
    check.add_argument("--json", action="store_true", help="print JSON")

    fuzz = commands.add_parser("fuzz", help="many generated cases on one backend; what fails is shrunk; exit 1 if any")
    fuzz.add_argument("--backend", default="", metavar="NAME", help="backend, or backend[variant]")
    fuzz.add_argument(
        "--case",
        action="append",
        default=[],
        metavar="ID",
        help="shrink this case (id, or hash in the newest run)",
    )
    fuzz.add_argument("--suite", action="append", default=[], metavar="NAME", help="whose cases; repeatable (all)")
    fuzz.add_argument("--op", action="append", default=[], metavar="NAME", help="operation; repeatable (all)")
    fuzz.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where (auto)")
    fuzz.add_argument("--cases", type=int, default=1000, metavar="N", help="end after so many judged cases (1000)")
    fuzz.add_argument("--limit-s", type=_seconds, metavar="S", help="stop then, compiling or not; what is done counts")
    fuzz.add_argument("--shrink-s", type=_seconds, default=60.0, metavar="S", help="to shrink one kind of failure (60)")
    fuzz.add_argument(
        "--frames",
        type=int,
        default=64,
        metavar="N",
        help="on a GPU: keep each op's cases to so many compilations (64)",
    )
    fuzz.add_argument("--workers", type=int, metavar="N", help="processes side by side (cores; on a GPU at most 8)")
    fuzz.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the cases and frames (0)")
    fuzz.add_argument("--regressions", type=Path, metavar="FILE", help="keep failures here (ours: the suites' file)")
    fuzz.add_argument("--resume", metavar="RUN", help="go on with a search (run id, folder or latest)")
    fuzz.add_argument("--out", type=Path, default=DEFAULT_OUT, metavar="DIR", help=f"results folder ({DEFAULT_OUT})")
    fuzz.add_argument("--json", action="store_true", help="print JSON")

    report = commands.add_parser("report", help="a run as one offline HTML page")
    report.add_argument("run", nargs="?", default="latest", metavar="RUN", help="run id, folder or JSONL file (latest)")
    report.add_argument("-o", "--output", type=Path, default=Path("report.html"), metavar="FILE", help="(report.html)")
    report.add_argument("--out", type=Path, default=DEFAULT_OUT, metavar="DIR", help=f"results folder ({DEFAULT_OUT})")

    roofline = commands.add_parser(
        "roofline", help="measure this machine's ceilings: memory, matrix units, links, files"
    )
    roofline.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where (auto)")
    roofline.add_argument(
        "--only", action="append", default=[], metavar="WHAT", help="read, copy, matmul, ...; repeatable"
    )
    roofline.add_argument("--folder", type=Path, metavar="DIR", help="where the file probes write (the current folder)")
    roofline.add_argument(
        "--out", type=Path, default=DEFAULT_OUT, metavar="DIR", help=f"results folder ({DEFAULT_OUT})"
    )
    roofline.add_argument("--json", action="store_true", help="print the records")


def _add_pair_options(parser: argparse.ArgumentParser, pairs: int) -> None:
    """What is measured in pairs, and how much. ``pairs``: the default of --pairs."""
    parser.add_argument("--suite", action="append", default=[], metavar="NAME", help="suite's timed cases; repeatable")
    parser.add_argument("--op", action="append", default=[], metavar="NAME", help="operation; repeatable (all)")
    parser.add_argument("--case", action="append", default=[], metavar="ID", help="this case; repeatable")
    parser.add_argument("--backend", action="append", default=[], metavar="NAME", help="of two trees (our own)")
    parser.add_argument("--effort", choices=("quick", "standard", "full"), default="quick", help="which cases (quick)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where (auto)")
    parser.add_argument("--pairs", type=int, default=pairs, metavar="N", help=f"pairs at the first look ({pairs})")
    parser.add_argument("--max-pairs", type=int, metavar="N", help="pairs at the last look (twice --pairs)")
    parser.add_argument("--delta", type=float, default=0.01, metavar="PART", help="least change that counts (0.01)")
    parser.add_argument("--limit-s", type=_seconds, metavar="S", help="begin no pair that would end later than this")
    parser.add_argument(
        "--floors", metavar="RUN", help="run of selftest --aa here: do not gate what it found too noisy"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of who leads (0)")
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, metavar="DIR", help=f"results folder ({DEFAULT_OUT})")


def _gate(arguments: argparse.Namespace) -> int:
    from vbench import compare_commands

    if arguments.against is not None:
        if arguments.run is not None or arguments.baseline is not None:
            raise UsageError("gate: --against measures both sides itself; leave out RUN and --baseline")
        return compare_commands.ab_command((arguments.against,), arguments)
    if arguments.run is None or arguments.baseline is None:
        raise UsageError("gate: give RUN and --baseline DIR, or --against REV")
    return compare_commands.gate_command(
        arguments.run, arguments.out, arguments.baseline, strict=arguments.strict, fmt=arguments.format
    )


def _ab(arguments: argparse.Namespace) -> int:
    from vbench.compare_commands import ab_command

    return ab_command((arguments.a, arguments.b), arguments)


def _baseline(arguments: argparse.Namespace) -> int:
    from vbench.compare_commands import baseline_measure, baseline_update

    if arguments.verb == "measure":
        if arguments.pairs < 1:
            raise UsageError("baseline measure: --pairs takes numbers from 1 on")
        return baseline_measure(arguments)
    return baseline_update(
        arguments.runs,
        arguments.out,
        arguments.baseline,
        arguments.document,
        arguments.ledger,
        write=arguments.write,
        as_json=arguments.json,
    )


def _selftest(arguments: argparse.Namespace) -> int:
    if not arguments.aa:
        if arguments.simulated or arguments.join or arguments.resume:
            raise UsageError("selftest: --simulated, --join and --resume go with --aa")
        from vbench.attack_command import selftest_command

        return selftest_command(arguments.control, arguments.device, arguments.out, as_json=arguments.json)
    if arguments.control:
        raise UsageError("selftest: --control goes without --aa")
    for name in ("pairs", "skip"):
        if getattr(arguments, name) < 0:
            raise UsageError(f"selftest: --{name} takes numbers from 0 on")
    if arguments.cases < 1:
        raise UsageError("selftest: --cases takes numbers from 1 on")
    from vbench import compare_commands

    if arguments.simulated:
        return compare_commands.simulated_selftest(arguments.seed, arguments.out, arguments.json)
    return compare_commands.machine_selftest(arguments)


def _roofline(arguments: argparse.Namespace) -> int:
    from vbench.compare_commands import roofline_command

    return roofline_command(arguments.device, arguments.only, arguments.folder, arguments.out, as_json=arguments.json)


def _backend(arguments: argparse.Namespace) -> int:
    from vbench.conformance import check_command

    return check_command(
        arguments.name,
        arguments.op,
        device=arguments.device,
        effort=arguments.effort,
        seed=arguments.seed,
        out=arguments.out,
        as_json=arguments.json,
    )


def _fuzz(arguments: argparse.Namespace) -> int:
    from vbench.fuzz_command import fuzz_command

    if (arguments.resume is None) == (not arguments.backend):
        raise UsageError("fuzz: give --backend NAME, or --resume RUN")
    if arguments.cases < 1 or (arguments.workers is not None and arguments.workers < 1):
        raise UsageError("fuzz: --cases and --workers take numbers from 1 on")
    return fuzz_command(
        backend=arguments.backend,
        suites=arguments.suite,
        ops=arguments.op,
        given=arguments.case,
        device=arguments.device,
        cases=arguments.cases,
        frames=arguments.frames,
        limit_s=arguments.limit_s,
        shrink_s=arguments.shrink_s,
        seed=arguments.seed,
        workers=arguments.workers,
        regressions_file=arguments.regressions,
        resume=arguments.resume,
        out=arguments.out,
        as_json=arguments.json,
    )


def _report(arguments: argparse.Namespace) -> int:
    from vbench.compare_commands import report_command

    return report_command(arguments.run, arguments.out, arguments.output)


COMMANDS: Mapping[str, Callable[[argparse.Namespace], int]] = {
    "gate": _gate,
    "ab": _ab,
    "baseline": _baseline,
    "selftest": _selftest,
    "roofline": _roofline,
    "report": _report,
    "backend": _backend,
    "fuzz": _fuzz,
}
