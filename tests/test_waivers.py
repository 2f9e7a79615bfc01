"""Known failures of peers: excused in verdicts, never hidden, told when they pass, and none without an issue."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from vbench import conformance, registry, waivers
from vbench.errors import DataError
from vbench.record import Outcome, Record
from vbench.reference.ops.attention import ATTENTION_BACKWARD
from vbench.report import last_screen
from vbench.waivers import Waived, Waiver

ISSUE = "https://github.com/pytorch/pytorch/issues/196678"
WAIVER = Waiver(
    ISSUE, "dQ is NaN", "torch_native", "attention_backward", "NONFINITE", "sdpa_cudnn", "sm_90", {"sk": (192, 320)}
)


def record(outcome: Outcome, **changed: Any) -> Record:
    sizes = {"hq": 2, "hk": 2, "sq": 192, "sk": changed.pop("sk", 192), "d": 64}
    values: dict[str, Any] = {
        "case": ATTENTION_BACKWARD.case(**sizes).id,
        "backend": "torch_native",
        "variant": "sdpa_cudnn",
        "kind": "check",
        "role": "peer",
        "run": "run",
        "environment": {"hardware": "sm_90"},
    }
    return Record(outcome=outcome, **{**values, **changed})


def test_it_speaks_of_its_cases_alone() -> None:
    assert WAIVER.speaks_of(record(Outcome.PASSED)) and WAIVER.excuses(record(Outcome.NONFINITE))
    assert not WAIVER.excuses(record(Outcome.WRONG_VALUE))
    for changed in (
        {"sk": 256},
        {"backend": "triton"},
        {"variant": "sdpa_flash"},
        {"environment": {"hardware": "cpu"}},
    ):
        assert not WAIVER.speaks_of(record(Outcome.NONFINITE, **changed)), changed
    assert not WAIVER.speaks_of(record(Outcome.NONFINITE, case="attention[hq=1]"))


def test_verdicts_excuse_it_and_only_it() -> None:
    known, other = record(Outcome.NONFINITE), record(Outcome.NONFINITE, sk=256)
    passed = record(Outcome.PASSED, sk=128)
    waived = waivers.judge([WAIVER], [known, passed])
    assert set(waived.excused) == {known.id} and waived.passed == ()
    code, body = conformance.verdict([known, passed], waived)
    assert code == 0 and "waived    1" in body["waived"][0] and ISSUE in body["waived"][0]
    assert conformance.verdict([known, passed])[0] == 1
    assert conformance.verdict([known, other, passed], waivers.judge([WAIVER], [known, other, passed]))[0] == 1


def test_an_unexpected_pass_is_told() -> None:
    waived = waivers.judge([WAIVER], [record(Outcome.PASSED), record(Outcome.PASSED, sk=320)])
    assert waived.passed == (WAIVER,) and "UNEXPECTED PASS" in waived.lines()[0]
    # One of its cases still fails, in whatever way; or none ran.
    assert waivers.judge([WAIVER], [record(Outcome.PASSED), record(Outcome.CRASHED, sk=320)]).passed == ()
    assert waivers.judge([WAIVER], [record(Outcome.UNAVAILABLE)]) == Waived({}, ())


def test_an_own_backend_has_no_waiver() -> None:
    assert waivers.judge([WAIVER], [record(Outcome.NONFINITE, role="own")]) == Waived({}, ())


def test_the_last_screen_names_wrong_peers() -> None:
    def screen(records: list[Record]) -> str:
        waived = waivers.judge([WAIVER], records)
        shown: dict[str, Any] = {"verdicts": [], "code": 0, "reasons": [], "where": "", "elapsed_s": 1.0}
        return last_screen(run_id="r", records=records, device="cuda", waived=waived, **shown)

    text = screen([record(Outcome.NONFINITE), record(Outcome.NONFINITE, sk=256)])
    assert "peers     2 x torch_native[sdpa_cudnn] NONFINITE; waived 1" in text
    assert "vbench fuzz --backend 'torch_native[sdpa_cudnn]' --case 'attention_backward[" in text
    assert "UNEXPECTED PASS" in screen([record(Outcome.PASSED)])
    assert "peers" not in screen([record(Outcome.PASSED, sk=256)])


GOOD = f'[[waiver]]\nissue = "{ISSUE}"\nsays = "x"\nbackend = "b"\nop = "o"\noutcome = "NONFINITE"\n'


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("[[waiver", "TOML"),
        ("[other]\n", "'other'"),
        (GOOD.replace(ISSUE, "we know"), "without one, no waiver"),
        (GOOD.replace("NONFINITE", "BAD"), "BAD"),
        (GOOD + 'colour = "red"\n', "colour"),
        (GOOD.replace('op = "o"\n', ""), "op"),
    ],
)
def test_a_bad_file_is_named(tmp_path: Path, text: str, rule: str) -> None:
    path = tmp_path / "waivers.toml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=rule):
        waivers.load(path)
    path.write_text(GOOD + "[waiver.where]\nd = 64\nsk = [192, 320]\n", encoding="utf-8")
    (waiver,) = waivers.load(path)
    assert waiver.where == {"d": (64,), "sk": (192, 320)}


def test_the_committed_waivers_name_what_there_is() -> None:
    backends, ops = registry.backends(), registry.ops()
    for waiver in waivers.of_suites(registry.suites().values()):
        assert backends[waiver.backend].role != "own" and waiver.op in backends[waiver.backend].ops
        assert set(waiver.where) <= {p.name for p in ops[waiver.op].params}


#: Failures of an H200's search, ``attention_masked_backward[...]``; then neighbours that pass there.
MEASURED = (
    "dtype=bf16,mask=shift,b=1,h=1,sq=1,sk=64,d=8",
    "dtype=bf16,mask=shift,b=1,h=3,sq=228,sk=320,d=128,seed=2",
    "dtype=bf16,mask=shift,b=2,h=3,sq=20,sk=192,d=64,seed=3",
    "dtype=bf16,mask=shift,b=2,h=3,sq=192,sk=192,d=64",
    "dtype=fp16,mask=shift,b=2,h=3,sq=229,sk=320,d=16",
    "dtype=fp16,mask=shift,b=1,h=2,sq=256,sk=192,d=128,seed=6",
)
PASSING = (
    "dtype=bf16,mask=shift,b=1,h=2,sq=192,sk=128,d=64",
    "dtype=bf16,mask=shift,b=1,h=2,sq=256,sk=256,d=64",
    "dtype=bf16,mask=shift,b=1,h=1,sq=1,sk=63,d=8",
    "dtype=bf16,mask=zeros,b=1,h=2,sq=192,sk=192,d=64",
    "dtype=fp16,mask=random,b=1,h=2,sq=192,sk=192,d=64",
)


@pytest.mark.parametrize("values", [*MEASURED, *PASSING])
def test_the_committed_waiver_speaks_of_what_was_measured_and_no_more(values: str) -> None:
    """A failure beside what was measured is news, whatever its cause."""
    known = waivers.of_suites(registry.suites().values())
    one = record(Outcome.NONFINITE, case=f"attention_masked_backward[{values}]")
    assert bool(waivers.judge(known, [one]).excused) == (values in MEASURED)
