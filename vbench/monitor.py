"""What the GPU was doing while something was timed, read through NVML (extra ``nvml``, package ``nvidia-ml-py``).

What cannot be read is absent with a reason code, never zero. The names and bits are those of NVML's ``nvml.h``.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from vbench.record import DeviceState

#: nvmlClocksEventReason* (nvml.h): bit -> our name.
THROTTLE_BITS = {
    0x001: "gpu_idle",
    0x002: "applications_clocks_setting",
    0x004: "sw_power_cap",
    0x008: "hw_slowdown",
    0x010: "sync_boost",
    0x020: "sw_thermal_slowdown",
    0x040: "hw_thermal_slowdown",
    0x080: "hw_power_brake_slowdown",
    0x100: "display_clock_setting",
}

#: nvmlReturn_t (nvml.h) values with a name of their own in ``absent``.
_RETURN_CODES = {2: "invalid_argument", 3: "not_supported", 4: "no_permission", 6: "not_found", 9: "no_driver"}

#: Seconds between two polls of the memory in use.
POLL_S = 0.5e-3


@dataclass(frozen=True, slots=True)
class NoMonitor:
    """NVML cannot be asked. ``reason``: ``no_gpu``, ``pynvml_not_installed``, ``no_driver`` and the like."""

    reason: str


def _code(error: Any) -> str:
    value = getattr(error, "value", None)
    return _RETURN_CODES.get(value, f"nvml_error_{value}") if isinstance(value, int) else "nvml_error"


class Monitor:
    """One GPU, read through NVML.

    Args:
        nvml: the module ``pynvml``, or an object like it.
        handle: NVML's handle of the GPU.
        pid: this process, which is not foreign.
    """

    def __init__(self, nvml: Any, handle: Any, pid: int) -> None:
        self._nvml = nvml
        self._handle = handle
        self._pid = pid

    def _throttle(self) -> tuple[str, ...]:
        # Renamed in NVML 12.2; older pynvml has only the old name, newest ones may drop it.
        ask = getattr(self._nvml, "nvmlDeviceGetCurrentClocksEventReasons", None)
        mask = int((ask or self._nvml.nvmlDeviceGetCurrentClocksThrottleReasons)(self._handle))
        return tuple(THROTTLE_BITS.get(1 << i, f"bit_{i}") for i in range(mask.bit_length()) if mask >> i & 1)

    def _foreign(self) -> int:
        pids = [int(p.pid) for p in self._nvml.nvmlDeviceGetComputeRunningProcesses(self._handle)]
        if self._pid not in pids:
            # We hold a context, so that a list without us has the numbers of another namespace, or is filtered.
            raise _Absent("own_process_not_listed")
        return sum(pid != self._pid for pid in pids)

    def _memory_used(self) -> int:
        return int(self._nvml.nvmlDeviceGetMemoryInfo(self._handle).used)

    def memory_used_bytes(self) -> int | str:
        """Device memory in use by every process together, or the reason code why NVML does not say."""
        try:
            return self._memory_used()
        except self._nvml.NVMLError as error:
            return _code(error)

    def read(self, at_sample: int) -> DeviceState:
        """The state now. A figure that NVML does not give is ``None``, and ``absent`` says why."""
        nvml, handle = self._nvml, self._handle
        asks: dict[str, Callable[[], Any]] = {
            "sm_clock_hz": lambda: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM) * 1e6,
            "memory_clock_hz": lambda: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_MEM) * 1e6,
            "power_w": lambda: nvml.nvmlDeviceGetPowerUsage(handle) * 1e-3,
            "temperature_c": lambda: float(nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU)),
            "throttle": self._throttle,
            "foreign_processes": self._foreign,
            "memory_used_bytes": self._memory_used,
        }
        found: dict[str, Any] = {}
        absent: dict[str, str] = {}
        for name, ask in asks.items():
            found[name] = None
            try:
                found[name] = ask()
            except _Absent as error:
                absent[name] = error.reason
            except nvml.NVMLError as error:
                absent[name] = _code(error)
            except AttributeError:
                absent[name] = "not_in_this_pynvml"
        return DeviceState(at_sample=at_sample, **found, absent=absent)


class _Absent(Exception):
    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def open_monitor(uuid: str, nvml: Any = None) -> Monitor | NoMonitor:
    """The monitor of the GPU with this UUID (as torch prints it, with or without ``GPU-``).

    By UUID and not by index, since CUDA_VISIBLE_DEVICES renumbers torch's devices and not NVML's.
    """
    if not uuid:
        return NoMonitor("no_gpu")
    if nvml is None:
        try:
            import pynvml
        except ImportError:
            return NoMonitor("pynvml_not_installed")
        nvml = pynvml
    try:
        nvml.nvmlInit()
        handle = nvml.nvmlDeviceGetHandleByUUID(uuid if uuid.startswith(("GPU-", "MIG-")) else f"GPU-{uuid}")
    except nvml.NVMLError as error:
        return NoMonitor(_code(error))
    return Monitor(nvml, handle, os.getpid())


def peak_while(monitor: Monitor, action: Callable[[], None], poll_s: float = POLL_S) -> int | str:
    """Device memory in use at its highest while ``action`` runs, above that before it (bytes, not below zero).

    NVML keeps no peak, so another thread polls; what rises and falls between two polls is missed.

    Returns:
        bytes, or the reason code why NVML would not say. ``action`` runs once either way, and its errors are raised.
    """
    readings: list[int | str] = [monitor.memory_used_bytes()]
    done = threading.Event()

    def poll() -> None:
        while not done.wait(poll_s):
            readings.append(monitor.memory_used_bytes())

    thread = threading.Thread(target=poll, name="vbench-memory", daemon=True)
    thread.start()
    try:
        action()
    finally:
        done.set()
        thread.join()
    readings.append(monitor.memory_used_bytes())
    numbers = [r for r in readings if isinstance(r, int)]
    reason = next((r for r in readings if isinstance(r, str)), "")
    return reason or max(numbers) - numbers[0]
