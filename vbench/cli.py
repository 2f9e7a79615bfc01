"""The command line. Parses, calls, prints; decides nothing. Heavy imports happen inside the commands."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vbench import cli_compare
from vbench.cli_compare import DEFAULT_OUT
from vbench.errors import DataError, UsageError

EXIT_INTERRUPTED = 130


def parser() -> argparse.ArgumentParser:
    """Every command and option; a test freezes them."""
    top = argparse.ArgumentParser(prog="vbench", description="Turn a document's performance claims into tests.")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    run = commands.add_parser("run", help="plan, check, time, judge, report")
    run.add_argument("--suite", action="append", default=[], metavar="NAME", help="suite to run; repeatable (all)")
    run.add_argument("--backend", action="append", default=[], metavar="NAME", help="backend to run; repeatable (all)")
    run.add_argument("--op", action="append", default=[], metavar="NAME", help="operation to run; repeatable (all)")
    # No defaults here: --resume must be able to tell a given option from an omitted one.
    run.add_argument("--device", choices=("auto", "cpu", "cuda"), help="where (default: auto)")
    run.add_argument(
        "--effort",
        choices=("quick", "standard", "full"),
        help="how much: quick, a taste; standard, at most 300 timed rows; full, everything (quick)",
    )
    run.add_argument("--out", type=Path, default=DEFAULT_OUT, metavar="DIR", help=f"results folder ({DEFAULT_OUT})")
    run.add_argument("--seed", type=int, metavar="N", help="seed of the generated cases (0)")
    run.add_argument("--resume", metavar="RUN", help="finish an unfinished run (run id, folder or latest)")
    run.add_argument("--no-time", action="store_true", help="checks and compilations only")
    run.add_argument("--dry-run", action="store_true", help="print how much there is to do and end")
    run.add_argument("--strict", action="store_true", help="exit 3 if anything was not decided")
    run.add_argument("--json", action="store_true", help="print a JSON summary instead of the last screen")

    ls = commands.add_parser("list", help="ops, backends, suites, claims")
    ls.add_argument("--matrix", action="store_true", help="what each kernel takes by format and dtype, or its refusal")
    ls.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="of the matrix (auto)")
    ls.add_argument("--run", metavar="RUN", help="the matrix of this run's checks (with --json: to be kept)")
    ls.add_argument("--kept", type=Path, metavar="FILE", help="the matrix of kept checks")
    ls.add_argument("--out", type=Path, default=DEFAULT_OUT, metavar="DIR", help=f"results folder ({DEFAULT_OUT})")
    ls.add_argument("--json", action="store_true", help="print JSON")

    show = commands.add_parser("show", help="the records of a run as tables")
    show.add_argument("run", nargs="?", default="latest", metavar="RUN", help="run id, folder or JSONL file (latest)")
    show.add_argument("--failed", action="store_true", help="only what is neither passed nor excused")
    show.add_argument("--case", metavar="HASH", help="only this case, with every detail")
    show.add_argument("--out", type=Path, default=DEFAULT_OUT, metavar="DIR", help=f"results folder ({DEFAULT_OUT})")
    show.add_argument(
        "--format", choices=("table", "markdown", "csv", "json"), default="table", help="csv: a row a record (table)"
    )
    show.add_argument("--json", action="store_const", const="json", dest="format", help="the same as --format json")

    repro = commands.add_parser("repro", help="run one case of a run again and compare; exit 1 if it fails")
    repro.add_argument("hash", metavar="HASH", help="the case's short hash, as reports print it")
    repro.add_argument("--run", default="latest", metavar="RUN", help="run id, folder or JSONL file (latest)")
    repro.add_argument(
        "--backend", action="append", default=[], metavar="NAME", help="backend or backend[variant]; repeatable (all)"
    )
    repro.add_argument("--out", type=Path, default=DEFAULT_OUT, metavar="DIR", help=f"results folder ({DEFAULT_OUT})")
    repro.add_argument("--json", action="store_true", help="print both records of each backend")

    doctor = commands.add_parser("doctor", help="what is usable here, why the rest is not, how to install it")
    doctor.add_argument("--json", action="store_true", help="print JSON")

    claims = commands.add_parser("claims", help="the claims ledger, and the numbers in documents")
    verbs = claims.add_subparsers(dest="verb", required=True, metavar="VERB")
    for verb, text in (
        ("list", "every claim with its verdicts from the given records"),
        ("check", "exit 1 if a document's generated numbers differ from the records"),
        ("update", "rewrite a document's generated numbers from the records"),
        ("coverage", "numerals of a document that neither a claim nor an exclusion accounts for; exit 1 if any"),
    ):
        sub = verbs.add_parser(verb, help=text)
        if verb != "list":
            sub.add_argument("document", type=Path, metavar="DOC", help="Markdown file")
        if verb != "coverage":
            sub.add_argument(
                "--records", type=Path, metavar="PATH", help="run folder, JSONL file or folder of them (the baselines)"
            )
        sub.add_argument("--ledger", default="virtual_blackwell", metavar="NAME", help="which ledger")
        sub.add_argument("--json", action="store_true", help="print JSON")

    cli_compare.add_commands(commands)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Exit code: 0 fine, 1 contradicted, 2 bad input, 3 nothing judged, 130 interrupted."""
    arguments = parser().parse_args(argv)
    try:
        return int(_COMMANDS[arguments.command](arguments))
    except (UsageError, DataError) as error:
        print(f"vbench: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        hint = "; vbench run --resume latest does the rest" if arguments.command == "run" else ""
        print(f"vbench: interrupted; finished records are kept{hint}", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # The reader of our output went away (| head): no error of ours, but Python must not complain at exit.
        sys.stderr.close()
        return 0


def _run(arguments: argparse.Namespace) -> int:
    from vbench.commands import resume_run, run_suites

    if arguments.resume is not None:
        given = [
            n for n in ("suite", "backend", "op", "device", "effort", "seed") if getattr(arguments, n) not in (None, [])
        ]
        if arguments.dry_run:
            given.append("dry-run")
        if arguments.no_time:
            given.append("no-time")
        if given:
            raise UsageError(f"--resume takes the plan of the run: leave out --{', --'.join(given)}")
        return resume_run(arguments.resume, arguments.out, strict=arguments.strict, as_json=arguments.json)
    return run_suites(
        suites=arguments.suite,
        backends=arguments.backend,
        ops=arguments.op,
        device=arguments.device or "auto",
        effort=arguments.effort or "quick",
        out=arguments.out,
        seed=arguments.seed or 0,
        strict=arguments.strict,
        as_json=arguments.json,
        dry_run=arguments.dry_run,
        timing=not arguments.no_time,
    )


def _list(arguments: argparse.Namespace) -> int:
    from vbench import registry
    from vbench.claims import load_ledger

    if not arguments.matrix and (arguments.run or arguments.kept):
        raise UsageError("--run and --kept are of the matrix: add --matrix")
    if arguments.run or arguments.kept:
        from vbench.commands import checked_command

        return checked_command(arguments.run, arguments.kept, arguments.out, arguments.json)
    if arguments.matrix:
        from vbench.commands import matrix_command

        return matrix_command(arguments.device, arguments.json)
    problems: list[registry.Problem] = []
    ops, suites, backends = registry.ops(problems), registry.suites(problems), registry.backends()
    ledgers = {name: load_ledger(path) for name, path in registry.ledger_paths(problems).items()}
    body: dict[str, Any] = {
        "ops": [{"name": o.name, "summary": o.summary, "params": [p.name for p in o.params]} for o in ops.values()],
        "backends": [
            {
                "name": b.name,
                "role": b.role,
                "distribution": b.distribution,
                "summary": b.summary,
                "ops": sorted(b.ops),
                "problem": b.problem,
                "detail": b.detail,
            }
            for b in backends.values()
        ],
        "suites": [
            {"name": s.name, "summary": s.summary, "checks": len(s.checks), "benches": len(s.benches)}
            for s in suites.values()
        ],
        "claims": [
            {"id": c.id, "ledger": name, "section": c.section, "says": c.says, "hardware": c.hardware}
            for name, ledger in ledgers.items()
            for c in ledger.claims
        ],
        "problems": [{"group": p.group, "name": p.name, "detail": p.detail} for p in problems],
    }
    if arguments.json:
        print(json.dumps(body, indent=1, ensure_ascii=False))
        return 0
    width = {key: max((len(item["name"]) for item in body[key]), default=0) for key in ("ops", "suites", "backends")}
    for key in ("ops", "suites"):
        print(f"{key}:")
        for item in body[key]:
            print(f"  {item['name']:<{width[key]}} {item['summary']}")
    print("backends:")
    for item in body["backends"]:
        state = f"UNAVAILABLE({item['problem']}): {item['detail']}" if item["problem"] else item["summary"]
        print(f"  {item['name']:<{width['backends']}} {item['role']:<8} {state}")
    print(f"claims: {len(body['claims'])} (vbench claims list)")
    for problem in problems:
        print(f"problem: {problem.group} {problem.name}: {problem.detail}")
    return 0


def _show(arguments: argparse.Namespace) -> int:
    from vbench.commands import show_run

    return show_run(arguments.run, arguments.out, arguments.failed, arguments.case, arguments.format)


def _repro(arguments: argparse.Namespace) -> int:
    from vbench.commands import repro_command

    return repro_command(arguments.hash, arguments.run, arguments.out, arguments.backend, arguments.json)


def _doctor(arguments: argparse.Namespace) -> int:
    from vbench.commands import doctor_command

    return doctor_command(arguments.json)


def _claims(arguments: argparse.Namespace) -> int:
    from vbench.commands import claims_command

    return claims_command(arguments)


_COMMANDS = {
    "run": _run,
    "list": _list,
    "show": _show,
    "repro": _repro,
    "doctor": _doctor,
    "claims": _claims,
    **cli_compare.COMMANDS,
}
