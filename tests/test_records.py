"""Records and their store: round trip, refusals that name file, line and rule, append-only safety."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vbench.errors import DataError
from vbench.record import SCHEMA, DeviceState, ErrorStats, Measurement, Outcome, Record
from vbench.store import RunStore, read_records, write_records

TIME = Record(
    case="op[m=1]",
    backend="b",
    kind="time",
    outcome=Outcome.PASSED,
    run="r",
    error=ErrorStats("y", 4, 0, 0.5, 1.0, 0.75, (1, 2)),
    measurements=(Measurement("graph", (1e-6, 2e-6), clock_hz=(1.98e9,)),),
    metrics={"a": 1.5},
    environment={"hardware": "sm_90"},
)


@given(
    worst=st.floats(min_value=0, allow_nan=False),
    metric=st.floats(allow_nan=False),
    samples=st.lists(st.floats(1e-9, 1e3), min_size=1, max_size=5),
)
def test_round_trip(worst: float, metric: float, samples: list[float]) -> None:
    error = ErrorStats("y", 4, 1, worst, None, 0.5, (0,))
    record = dataclasses.replace(
        TIME, error=error, metrics={"m": metric}, measurements=(Measurement("graph", tuple(samples)),)
    )
    line = record.to_json()
    json.loads(line, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    assert Record.from_json(line, "x:1") == record


NEWER = {
    "record": ("first_launch_s", "steady_launch_s", "peak_device_bytes", "absent"),
    "measurement": ("states", "states_absent", "flushed_bytes", "persisting_l2", "empty_s", "late_samples"),
}


@given(
    throttle=st.none() | st.lists(st.sampled_from(["sw_power_cap", "gpu_idle"]), unique=True).map(tuple),
    power=st.none() | st.floats(0, 1e3),
    foreign=st.none() | st.integers(0, 9),
)
def test_states_and_phases_round_trip(
    throttle: tuple[str, ...] | None, power: float | None, foreign: int | None
) -> None:
    given_figures = {"throttle": throttle, "power_w": power, "foreign_processes": foreign}
    absent = {name: "not_supported" for name, value in given_figures.items() if value is None}
    state = DeviceState(10, 1.98e9, 2.6e9, power, 40.0, throttle, foreign, 5, absent)
    cold = Measurement(
        "cold", (1e-6,), states=(state,), flushed_bytes=8, persisting_l2="reset", empty_s=(1e-7,), late_samples=1
    )
    record = dataclasses.replace(
        TIME,
        measurements=(cold,),
        first_launch_s=2.0,
        steady_launch_s=0.5,
        peak_device_bytes=7,
        absent={"cold": "no_memory_for_flush"},
    )
    again = Record.from_json(record.to_json(), "x:1")
    assert again == record and again.compile_s == 1.5


def test_a_line_of_before_these_keys_still_parses() -> None:
    body = json.loads(TIME.to_json())
    for key in NEWER["record"]:
        del body[key]
    for key in NEWER["measurement"]:
        del body["measurements"][0][key]
    old = Record.from_json(json.dumps(body), "x:1")
    assert old == TIME and old.compile_s is None


def test_a_state_without_a_figure_needs_its_reason_on_reading_too() -> None:
    state = DeviceState(0, 1.0, 1.0, None, 1.0, (), 0, 1, {"power_w": "not_supported"})
    body = json.loads(dataclasses.replace(TIME, measurements=(Measurement("wall", (1.0,), states=(state,)),)).to_json())
    del body["measurements"][0]["states"][0]["absent"]
    with pytest.raises(DataError, match=r"x:1.*power_w"):
        Record.from_json(json.dumps(body), "x:1")


def test_schema_of_a_line() -> None:
    body = json.loads(TIME.to_json())
    assert body["schema"] == SCHEMA and body["id"] == TIME.id
    assert body["measurements"][0]["samples_s"] == [1e-6, 2e-6]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"schema": SCHEMA + 1}, "newer"),
        ({"schema": "1"}, "positive integer"),
        ({"outcome": "FINE"}, "FINE"),
        ({"kind": "guess"}, "kind 'guess'"),
        ({"unknown": 1}, "unknown"),
        ({"id": "0" * 16}, "does not match"),
        ({"run": "other"}, "does not match"),
        ({"outcome": "WRONG_VALUE"}, "timed only where its check passed"),
    ],
)
def test_bad_records_are_refused_by_file_line_and_rule(tmp_path: Path, change: dict[str, object], words: str) -> None:
    path = tmp_path / "r.jsonl"
    path.write_text(TIME.to_json() + "\n" + json.dumps({**json.loads(TIME.to_json()), **change}) + "\n")
    with pytest.raises(DataError) as info:
        read_records(path)
    assert f"{path}:2" in str(info.value) and words in str(info.value)


@pytest.mark.parametrize("samples", [(), (0.0,), (-1.0,), (math.nan,), (math.inf,)])
def test_impossible_measurements_do_not_construct(samples: tuple[float, ...]) -> None:
    with pytest.raises(DataError):
        Measurement("wall", samples)


def test_a_check_carries_no_measurement() -> None:
    with pytest.raises(DataError):
        dataclasses.replace(TIME, kind="check")


def test_torn_line_and_duplicate_id_are_named(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    path.write_text(TIME.to_json() + "\n" + TIME.to_json()[:40])
    with pytest.raises(DataError, match=r"r\.jsonl:2.*not JSON"):
        read_records(path)
    path.write_text(TIME.to_json() + "\n" + TIME.to_json() + "\n")
    with pytest.raises(DataError, match="occurs twice"):
        read_records(path)
    with pytest.raises(DataError, match="no such file"):
        read_records(tmp_path / "none")


def test_store_appends_and_a_full_disk_keeps_what_was_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = RunStore(tmp_path / "run", {"run": "r"})
    store.append(TIME)

    def full(fd: int, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with pytest.raises(DataError, match="No space left"):
            store.append(dataclasses.replace(TIME, backend="c"))
    store.close()
    assert read_records(store.folder) == [TIME]


def test_a_run_folder_is_never_reused(tmp_path: Path) -> None:
    RunStore(tmp_path / "run", {}).close()
    with pytest.raises(DataError, match="results folder"):
        RunStore(tmp_path / "run", {})


def test_write_records_round_trips(tmp_path: Path) -> None:
    other = dataclasses.replace(TIME, backend="c")
    write_records(tmp_path / "a" / "b.jsonl", [TIME, other])
    assert read_records(tmp_path) == [TIME, other]
