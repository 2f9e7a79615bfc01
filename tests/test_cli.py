"""The command line is frozen, light, and answers bad input with exit code 2."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pytest

from vbench.cli import main, parser

PAIRS = "--suite --op --case --backend --effort --device --pairs --max-pairs --delta --limit-s --floors --seed --out"
FROZEN = {
    "run": "--suite --backend --op --device --effort --out --seed --resume --no-time --dry-run --strict --json",
    "list": "--matrix --device --run --kept --out --json",
    "show": "run --failed --case --out --format --json",
    "repro": "hash --run --backend --out --json",
    "doctor": "--json",
    "gate": f"run --baseline --against --strict --format {PAIRS}",
    "ab": f"a b --strict --format {PAIRS}",
    "baseline measure": "--suite --op --case --backend --effort --claims --baseline --device --pairs --limit-s "
    "--resume --seed --out",
    "baseline update": "runs --baseline --document --ledger --out --write --json",
    "backend check": "name --op --device --effort --seed --out --json",
    "fuzz": "--backend --case --suite --op --device --cases --limit-s --shrink-s --frames --workers --seed "
    "--regressions --resume --out --json",
    "report": "run --output --out",
    "roofline": "--device --only --folder --out --json",
    "selftest": "--control --aa --simulated --suite --op --case --backend --device --cases --skip --pairs --limit-s "
    "--join --resume --seed --out --json",
    "claims list": "--records --ledger --json",
    "claims check": "document --records --ledger --json",
    "claims update": "document --records --ledger --json",
    "claims coverage": "document --ledger --json",
}


def _commands(top: argparse.ArgumentParser, prefix: str = "") -> dict[str, str]:
    found: dict[str, str] = {}
    for action in top._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, sub in action.choices.items():
                inner = _commands(sub, f"{prefix}{name} ")
                found |= inner or {
                    f"{prefix}{name}": " ".join(
                        a.option_strings[-1] if a.option_strings else a.dest for a in sub._actions if a.dest != "help"
                    )
                }
    return found


def test_commands_and_options_are_frozen() -> None:
    assert _commands(parser()) == FROZEN


@pytest.mark.parametrize("arguments", [["--help"], ["list"], ["list", "--json"]])
def test_help_and_list_need_no_heavy_import(arguments: list[str]) -> None:
    heavy = "{'torch', 'triton', 'numba', 'pandas', 'numpy', 'hypothesis', 'rich'}"
    code = (
        "import sys\nfrom vbench.cli import main\n"
        f"try:\n    main({arguments!r})\nexcept SystemExit:\n    pass\n"
        f"print(sorted({heavy} & set(sys.modules)), file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stderr.strip() == "[]"
    # control: the same probe sees torch when it is imported
    seen = subprocess.run(
        [sys.executable, "-c", "import torch\n" + code], capture_output=True, text=True, check=True, timeout=60
    )
    assert "torch" in seen.stderr


def test_list_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "--json"]) == 0
    body = json.loads(capsys.readouterr().out)
    assert len(body["ops"]) >= 5
    assert {b["name"] for b in body["backends"]} >= {
        "torch", "as_written", "torch_native", "triton", "numba_cuda", "tiers"
    }  # fmt: skip
    assert all(not b["problem"] for b in body["backends"]), body["backends"]
    assert {s["name"] for s in body["suites"]} >= {"fp4", "attention", "tier", "model"}
    assert len(body["claims"]) >= 60
    assert body["problems"] == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["run", "--suite", "fp5"], ["unknown suite 'fp5'", "did you mean 'fp4'"]),
        (["run", "--backend", "tritn"], ["unknown backend 'tritn'", "did you mean 'triton'"]),
        (["run", "--op", "attentoin"], ["unknown op 'attentoin'", "did you mean 'attention'"]),
        (["claims", "list", "--ledger", "virtual_blackwel"], ["unknown ledger", "virtual_blackwell"]),
        (["show", "no-such-run"], ["no run 'no-such-run'"]),
        (["claims", "check", "no-such-file.md"], ["no-such-file.md"]),
    ],
)
def test_bad_input_exits_2_and_names_the_nearest(
    arguments: list[str], words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert all(word in error for word in words), error


def test_device_cuda_without_a_gpu_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if any(Path("/dev").glob("nvidia*")):
        pytest.skip("this machine has a GPU")
    assert main(["run", "--device", "cuda", "--out", str(tmp_path)]) == 2
    assert "--device cpu" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_unknown_options_exit_2() -> None:
    with pytest.raises(SystemExit) as info:
        main(["run", "--fast"])
    assert info.value.code == 2
