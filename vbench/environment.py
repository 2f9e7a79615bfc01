"""Machine and versions a record was made on."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

from vbench.backend import Availability, Device

PACKAGES = ("torch", "triton", "numba", "numba-cuda", "numpy", "nvidia-ml-py", "vbench-kernels")


def package_versions() -> dict[str, str]:
    """Installed versions of the packages results depend on."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def ptxas_version() -> str:
    """Version of the ptxas that Triton carries, ``""`` where there is none."""
    spec = importlib.util.find_spec("triton")
    if spec is None or spec.origin is None:
        return ""
    ptxas = Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "ptxas"
    if not ptxas.is_file():
        return ""
    done = subprocess.run([str(ptxas), "--version"], capture_output=True, text=True, check=False, timeout=20)
    match = re.search(r"release [\d.]+, V([\d.]+)", done.stdout)
    return match.group(1) if match else ""


def cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def describe(device: str) -> dict[str, Any]:
    """The environment of records made on ``device``. ``hardware`` is the class that claims name."""
    found: dict[str, Any] = {"python": platform.python_version(), "cpu": cpu_model(), **package_versions()}
    if device != "cuda":
        return {"hardware": "cpu", **found}
    import torch

    properties = torch.cuda.get_device_properties(0)
    gpu: dict[str, Any] = {
        "hardware": f"sm_{properties.major}{properties.minor}",
        "gpu": properties.name,
        "uuid": str(getattr(properties, "uuid", "")),
        "sm_count": properties.multi_processor_count,
        "l2_bytes": properties.L2_cache_size,
        "memory_bytes": properties.total_memory,
        "cuda": torch.version.cuda or "",
        "driver": _driver_version(),
        "ptxas": ptxas_version(),
    }
    return {**gpu, **found}


def probe_torch(device: Device) -> Availability:
    """The probe of a backend in plain torch: usable on the CPU always, on ``cuda`` where torch finds a device."""
    import torch

    versions = {"torch": str(torch.__version__)}
    if device == "cuda" and not torch.cuda.is_available():
        return Availability(False, "none", "torch finds no CUDA device; run with --device cpu", versions)
    return Availability(True, "native", "", versions)


def _driver_version() -> str:
    try:
        line = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8").splitlines()[0]
    except OSError:
        try:
            done = subprocess.run(
                ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
                capture_output=True,
                text=True,
                check=False,
                timeout=20,
            )
        except (OSError, subprocess.TimeoutExpired):
            return ""
        return done.stdout.splitlines()[0].strip() if done.stdout.strip() else ""
    match = re.search(r"\b(\d{3,}\.[\d.]+)\b", line)
    return match.group(1) if match else ""
