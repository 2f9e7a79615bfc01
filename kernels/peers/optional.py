"""Probe of a peer that is a package of its own."""

from __future__ import annotations

from vbench.backend import Availability, Device


def probe_package(name: str, device: Device, extra: str = "peers") -> Availability:
    """Usable where ``name`` imports and torch has the device; else a line that says what to install. Never raises."""
    import importlib

    try:
        import torch

        package = importlib.import_module(name)
    except ImportError as error:
        return Availability(False, "none", f"install it: pip install 'vbench-kernels[{extra}]' ({error})")
    versions = {"torch": str(torch.__version__), name: str(getattr(package, "__version__", "unknown"))}
    if device == "cuda" and not torch.cuda.is_available():
        return Availability(False, "none", "torch finds no CUDA device; run with --device cpu", versions)
    return Availability(True, "native", "", versions)
