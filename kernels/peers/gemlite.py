"""Backend ``gemlite``, named without importing it or torch; its kernel is in ``fp4_gemlite``."""

from __future__ import annotations

from vbench.backend import Availability, DeclaredBackend, Device


def probe(device: Device) -> Availability:
    """See ``vbench.backend.Backend.probe``. Its import asks the driver for a GPU; a CPU is refused before it."""
    from vbench.kernels.peers.optional import probe_package

    if device != "cuda":
        return Availability(False, "none", "gemlite's kernels are Triton's, for a GPU; run with --device cuda")
    return probe_package("gemlite", device, "gemlite")


BACKEND = DeclaredBackend(
    name="gemlite",
    role="peer",
    summary="gemlite: weight-only Triton kernels, MXFP4 and grouped INT4, tuned at the first launch of each shape",
    ops={"fp4_linear": "vbench.kernels.peers.fp4_gemlite:make"},
    probe_function="vbench.kernels.peers.gemlite:probe",
)
