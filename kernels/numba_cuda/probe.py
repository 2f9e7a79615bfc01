"""Can numba.cuda run here: natively on ``cuda``, in its simulator on ``cpu``."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from vbench.backend import Availability, Place


def _versions() -> dict[str, str]:
    found = {}
    for name in ("numba", "numba-cuda", "llvmlite", "cuda-core", "cuda-bindings", "numpy"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _nothing() -> None:
    """An empty kernel."""


def probe(device: Place) -> Availability:
    """Whether kernels can be checked on ``device``; never raises.

    On ``cuda`` an empty kernel is compiled, since numba may import and see the GPU while NVVM or nvJitLink is missing.
    """
    versions = _versions()
    try:
        from vbench.kernels.numba_cuda.dialect import SIMULATED, cuda
    except Exception as error:  # a broken installation may raise anything at import; it must not end the probe
        return Availability(
            False, "none", f"numba.cuda cannot be imported ({error!r}): pip install 'numba-cuda[cu13]'", versions
        )
    if device == "compile":
        if SIMULATED:
            return Availability(False, "none", "set NUMBA_ENABLE_CUDASIM=0 to compile", versions)
        try:
            import cuda.core  # its linker makes machine code without a driver
        except ImportError as error:
            return Availability(False, "none", f"install it: pip install 'numba-cuda[cu13]' ({error})", versions)
        return Availability(True, "compiler", "", versions)
    if device == "cpu":
        if not SIMULATED:
            return Availability(False, "none", "set NUMBA_ENABLE_CUDASIM=1 before numba is imported", versions)
        return Availability(True, "simulated", "numba's simulator checks meaning; it is never timed", versions)
    if SIMULATED:
        return Availability(False, "none", "numba runs its simulator: unset NUMBA_ENABLE_CUDASIM for cuda", versions)
    if not cuda.is_available():
        return Availability(False, "none", "numba finds no CUDA driver or device", versions)
    try:
        cuda.jit(["void()"])(_nothing)
    except Exception as error:  # NVVM, NVRTC, nvJitLink and the driver each have their own exception types
        return Availability(False, "none", f"numba cannot compile for this device: {error!r}", versions)
    return Availability(True, "native", "", versions)
