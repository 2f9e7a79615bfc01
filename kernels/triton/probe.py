"""Where the Triton backend runs: natively on NVIDIA GPUs of compute capability 8.0 and later, interpreted on the CPU.

The interpreter is chosen by TRITON_INTERPRET=1 at the first import of Triton and holds for the whole process, so a
process serves one device.
"""

from __future__ import annotations

import os

from vbench.backend import Availability, Device, Place
from vbench.errors import Unsupported

#: Bfloat16 matrix instructions, and two-lane bf16 arithmetic, begin here.
MIN_CAPABILITY = (8, 0)

#: Whether kernels decorated in this process are interpreted: what Triton itself reads at decoration.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "y", "yes", "t")


def probe(device: Place) -> Availability:
    """See ``vbench.backend.Backend.probe``; never raises."""
    try:
        import torch
        import triton
    except ImportError as error:
        reason = f"install it: pip install 'vbench-kernels[triton]' ({error})"
        return Availability(False, "none", reason)
    versions = {"triton": str(triton.__version__), "torch": str(torch.__version__)}
    if device == "compile":
        if INTERPRETED:
            return Availability(False, "none", "set TRITON_INTERPRET=0 to compile", versions)
        return Availability(True, "compiler", "", versions)
    if device == "cpu":
        if not INTERPRETED:
            reason = "set TRITON_INTERPRET=1 before Triton is imported"
            return Availability(False, "none", reason, versions)
        return Availability(True, "interpreted", "Triton's interpreter checks meaning and is never timed", versions)
    if not torch.cuda.is_available():
        return Availability(False, "none", "no NVIDIA GPU is visible", versions)
    if torch.version.cuda is None:
        return Availability(False, "none", "this torch was not built for CUDA", versions)
    if INTERPRETED:
        return Availability(False, "none", "unset TRITON_INTERPRET to run on the GPU", versions)
    capability = torch.cuda.get_device_capability()
    if capability < MIN_CAPABILITY:
        reason = f"needs compute capability 8.0 or later, this GPU has {capability[0]}.{capability[1]}"
        return Availability(False, "none", reason, versions)
    return Availability(True, "native", "", versions)


def check_device(device: Device) -> None:
    """Refuse to build a kernel that this process cannot run.

    Raises:
        Unsupported: ``not_interpreted`` or ``interpreted_on_gpu``.
    """
    if device == "cpu" and not INTERPRETED:
        raise Unsupported("not_interpreted", "on the CPU set TRITON_INTERPRET=1 before Triton is imported")
    if device == "cuda" and INTERPRETED:
        raise Unsupported("interpreted_on_gpu", "unset TRITON_INTERPRET to run on the GPU")
