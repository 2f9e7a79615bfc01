"""Probe of a FlashAttention package."""

from __future__ import annotations

from collections.abc import Iterable

from vbench.backend import Availability, Device


def probe_flash(
    device: Device, module: str, install: str, capability: tuple[int, int], distributions: Iterable[str]
) -> Availability:
    """Usable where ``module`` imports and torch's device has just this compute capability. Never raises.

    Args:
        install: what to do where the module is missing.
        distributions: packages whose versions are recorded, where they have any.
    """
    import importlib
    from importlib.metadata import PackageNotFoundError, version

    try:
        import torch

        importlib.import_module(module)
    except Exception as error:
        # A DSL that does not fit its driver or libraries fails in ways of its own.
        return Availability(False, "none", f"{install} ({type(error).__name__}: {error})")
    versions = {"torch": str(torch.__version__)}
    for name in distributions:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "unknown"
    wanted = ".".join(map(str, capability))
    if device != "cuda" or not torch.cuda.is_available():
        return Availability(False, "none", f"needs a CUDA device of compute capability {wanted}", versions)
    found = torch.cuda.get_device_capability()
    if found != capability:
        reason = f"needs compute capability {wanted}, this device has {'.'.join(map(str, found))}"
        return Availability(False, "none", reason, versions)
    return Availability(True, "native", "", versions)
