"""The commands that compare, as ``vbench.cli`` adds them. Parses and calls; as light as that module."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

DEFAULT_OUT = Path("results") / "runs"


def add_commands(commands: Any) -> None:
    """Add the commands to the subparsers ``commands``."""
    gate = commands.add_parser("gate", help="a run against a baseline; exit 1 if slower or wrong, 3 if nothing judged")
    gate.add_argument("run", metavar="RUN", help="run id, folder, JSONL file or latest")
    gate.add_argument("--baseline", type=Path, required=True, metavar="DIR", help="results/baselines/MACHINE")
    gate.add_argument("--strict", action="store_true", help="exit 3 if a cell is missing or inconclusive")
    gate.add_argument(
        "--format",
        choices=("table", "json", "github"),
        default="table",
        help="github: annotations and Markdown (table)",
    )
    gate.add_argument("--out", type=Path, default=DEFAULT_OUT, metavar="DIR", help=f"results folder ({DEFAULT_OUT})")

    verbs = commands.add_parser("baseline", help="reviewed records of a machine").add_subparsers(
        dest="verb", required=True, metavar="VERB"
    )
    update = verbs.add_parser("update", help="show what runs change in a baseline, old and new; --write writes it")
    update.add_argument("runs", nargs="+", metavar="RUN", help="run ids, folders or JSONL files")
    update.add_argument("--baseline", type=Path, required=True, metavar="DIR", help="results/baselines/MACHINE")
    update.add_argument(
        "--document", type=Path, nargs="+", default=[], metavar="DOC", help="keep what these rest on (every time)"
    )
    update.add_argument("--ledger", default="virtual_blackwell", metavar="NAME", help="which ledger")
    update.add_argument("--out", type=Path, default=DEFAULT_OUT, metavar="DIR", help=f"results folder ({DEFAULT_OUT})")
    update.add_argument("--write", action="store_true", help="write after the diff was reviewed")
    update.add_argument("--json", action="store_true", help="print JSON")

    selftest = commands.add_parser("selftest", help="our own false-alarm rate and power")
    selftest.add_argument(
        "--aa", action="store_true", required=True, help="identical code on both sides, and slowdowns"
    )
    selftest.add_argument("--simulated", action="store_true", help="on simulated noisy machines; needs no GPU")
    selftest.add_argument("--seed", type=int, default=0, metavar="N", help="seed of what is drawn (default: 0)")
    selftest.add_argument(
        "--out", type=Path, default=DEFAULT_OUT, metavar="DIR", help=f"results folder ({DEFAULT_OUT})"
    )
    selftest.add_argument("--json", action="store_true", help="print the records")


def _gate(arguments: argparse.Namespace) -> int:
    from vbench.compare_commands import gate_command

    return gate_command(arguments.run, arguments.out, arguments.baseline, strict=arguments.strict, fmt=arguments.format)


def _baseline(arguments: argparse.Namespace) -> int:
    from vbench.compare_commands import baseline_update

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
    from vbench.compare_commands import simulated_selftest

    return simulated_selftest(arguments.seed, arguments.out, arguments.json)


COMMANDS: Mapping[str, Callable[[argparse.Namespace], int]] = {
    "gate": _gate,
    "baseline": _baseline,
    "selftest": _selftest,
}
