"""NVML's figures, from a fake NVML: what is there is read with its unit, what is not has a reason and is never zero."""

from __future__ import annotations

import os
import time
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vbench.errors import DataError
from vbench.monitor import THROTTLE_BITS, Monitor, NoMonitor, open_monitor, peak_while
from vbench.record import DeviceState


class FakeError(Exception):
    """Like pynvml.NVMLError: carries nvmlReturn_t."""

    def __init__(self, value: int) -> None:
        super().__init__(f"text that must decide nothing: {value}")
        self.value = value


class FakeNvml:
    """The part of pynvml that is asked, for one GPU. ``broken`` maps a function to the error code it raises."""

    NVMLError = FakeError
    NVML_CLOCK_SM, NVML_CLOCK_MEM, NVML_TEMPERATURE_GPU = 1, 2, 0

    def __init__(self, broken: dict[str, int] | None = None) -> None:
        self.broken = broken or {}
        self.mask = 0
        self.used = 1000
        self.pids = [os.getpid(), 77, 78]
        self.asked_uuid = ""

    def _may(self, name: str) -> None:
        if name in self.broken:
            raise FakeError(self.broken[name])

    def nvmlInit(self) -> None:
        self._may("nvmlInit")

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        self._may("nvmlDeviceGetHandleByUUID")
        self.asked_uuid = uuid
        return "handle"

    def nvmlDeviceGetClockInfo(self, handle: str, which: int) -> int:
        self._may("nvmlDeviceGetClockInfo")
        return {1: 1980, 2: 2619}[which]

    def nvmlDeviceGetPowerUsage(self, handle: str) -> int:
        self._may("nvmlDeviceGetPowerUsage")
        return 431_500

    def nvmlDeviceGetTemperature(self, handle: str, sensor: int) -> int:
        self._may("nvmlDeviceGetTemperature")
        return 41

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, handle: str) -> int:
        self._may("nvmlDeviceGetCurrentClocksThrottleReasons")
        return self.mask

    def nvmlDeviceGetComputeRunningProcesses(self, handle: str) -> list[Any]:
        self._may("nvmlDeviceGetComputeRunningProcesses")
        return [SimpleNamespace(pid=p) for p in self.pids]

    def nvmlDeviceGetMemoryInfo(self, handle: str) -> Any:
        self._may("nvmlDeviceGetMemoryInfo")
        return SimpleNamespace(used=self.used)


def monitor(nvml: Any) -> Monitor:
    found = open_monitor("abc", nvml)
    assert isinstance(found, Monitor)
    return found


def test_all_figures_in_si_units() -> None:
    nvml = FakeNvml()
    nvml.mask = 0x4 | 0x40
    assert monitor(nvml).read(20) == DeviceState(
        20, 1.98e9, 2.619e9, 431.5, 41.0, ("sw_power_cap", "hw_thermal_slowdown"), 2, 1000
    )
    assert nvml.asked_uuid == "GPU-abc"


#: Function -> figures that need it.
NEEDS = {
    "nvmlDeviceGetClockInfo": {"sm_clock_hz", "memory_clock_hz"},
    "nvmlDeviceGetPowerUsage": {"power_w"},
    "nvmlDeviceGetTemperature": {"temperature_c"},
    "nvmlDeviceGetCurrentClocksThrottleReasons": {"throttle"},
    "nvmlDeviceGetComputeRunningProcesses": {"foreign_processes"},
    "nvmlDeviceGetMemoryInfo": {"memory_used_bytes"},
}


@given(st.dictionaries(st.sampled_from(sorted(NEEDS)), st.sampled_from([3, 4, 999])))
def test_what_nvml_refuses_is_absent_with_its_reason_and_the_rest_is_there(broken: dict[str, int]) -> None:
    state = monitor(FakeNvml(broken)).read(0)
    names = {3: "not_supported", 4: "no_permission", 999: "nvml_error_999"}
    want = {figure: names[code] for function, code in broken.items() for figure in NEEDS[function]}
    assert dict(state.absent) == want
    for figure in set().union(*NEEDS.values()):
        assert (getattr(state, figure) is None) == (figure in want)


def test_an_old_pynvml_without_a_function() -> None:
    class Old(FakeNvml):
        nvmlDeviceGetPowerUsage: Any = property()  # reading it raises AttributeError

    assert monitor(Old()).read(0).absent == {"power_w": "not_in_this_pynvml"}


def test_the_newer_name_of_the_throttle_query_is_preferred() -> None:
    class New(FakeNvml):
        def nvmlDeviceGetCurrentClocksEventReasons(self, handle: str) -> int:
            return 0x1

    assert monitor(New({"nvmlDeviceGetCurrentClocksThrottleReasons": 13})).read(0).throttle == ("gpu_idle",)


@given(st.sets(st.integers(0, 12)))
def test_every_throttle_bit_has_one_name(bits: set[int]) -> None:
    nvml = FakeNvml()
    nvml.mask = sum(1 << b for b in bits)
    found = monitor(nvml).read(0).throttle
    assert found is not None and len(set(found)) == len(bits)
    assert {n for n in found if not n.startswith("bit_")} == {THROTTLE_BITS[1 << b] for b in bits if b <= 8}


@pytest.mark.parametrize(
    ("pids", "foreign", "absent"),
    [
        ([os.getpid()], 0, {}),
        ([os.getpid(), 5], 1, {}),
        ([], None, {"foreign_processes": "own_process_not_listed"}),
        ([4, 5], None, {"foreign_processes": "own_process_not_listed"}),
    ],
)
def test_foreign_processes_are_counted_only_where_ours_is_seen(
    pids: list[int], foreign: int | None, absent: dict[str, str]
) -> None:
    """In a container NVML may list another namespace's numbers, or nobody: that is not zero."""
    nvml = FakeNvml()
    nvml.pids = pids
    state = monitor(nvml).read(0)
    assert (state.foreign_processes, dict(state.absent)) == (foreign, absent)


@pytest.mark.parametrize(
    ("uuid", "broken", "reason"),
    [
        ("", {}, "no_gpu"),
        ("abc", {"nvmlInit": 9}, "no_driver"),
        ("abc", {"nvmlDeviceGetHandleByUUID": 6}, "not_found"),
    ],
)
def test_no_monitor_says_why(uuid: str, broken: dict[str, int], reason: str) -> None:
    assert open_monitor(uuid, FakeNvml(broken)) == NoMonitor(reason)


def test_without_pynvml(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pynvml", None)
    assert open_monitor("abc") == NoMonitor("pynvml_not_installed")


def test_a_missing_figure_without_a_reason_does_not_construct() -> None:
    full = DeviceState(0, 1.0, 1.0, 1.0, 1.0, (), 0, 1)
    assert full.power_w == 1.0
    with pytest.raises(DataError, match="power_w"):
        DeviceState(0, 1.0, 1.0, None, 1.0, (), 0, 1)
    with pytest.raises(DataError, match="power_w"):
        DeviceState(0, 1.0, 1.0, 1.0, 1.0, (), 0, 1, {"power_w": "not_supported"})


def test_peak_memory_between_the_ends_is_seen() -> None:
    nvml = FakeNvml()
    seen = 0

    class Watched(Monitor):
        def memory_used_bytes(self) -> int | str:
            nonlocal seen
            seen += nvml.used == 5000
            return super().memory_used_bytes()

    def action() -> None:
        nvml.used = 5000
        limit = time.monotonic() + 10
        while not seen and time.monotonic() < limit:
            time.sleep(1e-3)
        nvml.used = 1200

    assert peak_while(Watched(nvml, "handle", 1), action, 1e-4) == 4000
    # control: with nothing polled in between, only the ends count
    nvml.used = 1000
    assert peak_while(Watched(nvml, "handle", 1), lambda: setattr(nvml, "used", 1200), 60.0) == 200


def test_peak_memory_that_nvml_does_not_say_is_a_reason_and_errors_of_the_launch_are_raised() -> None:
    ran: list[int] = []
    assert peak_while(monitor(FakeNvml({"nvmlDeviceGetMemoryInfo": 3})), lambda: ran.append(1)) == "not_supported"
    assert ran == [1]
    with pytest.raises(ZeroDivisionError):
        peak_while(monitor(FakeNvml()), lambda: ran.append(1 // 0))
