"""The commands that compare: ``selftest``. Parses and calls; light, like ``vbench.cli``, which adds these commands."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

DEFAULT_OUT = Path("results") / "runs"


def add_commands(commands: Any) -> None:
    """Add the commands to the subparsers ``commands``."""
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


def _selftest(arguments: argparse.Namespace) -> int:
    from vbench.compare_commands import simulated_selftest

    return simulated_selftest(arguments.seed, arguments.out, arguments.json)


COMMANDS: Mapping[str, Callable[[argparse.Namespace], int]] = {"selftest": _selftest}
