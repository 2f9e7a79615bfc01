"""Backend ``tinygemm``, named without importing torch; its kernel is in ``int4_tinygemm``."""

from __future__ import annotations

from vbench.backend import DeclaredBackend

BACKEND = DeclaredBackend(
    name="tinygemm",
    role="peer",
    summary="torch._weight_int4pack_mm: torch's own INT4 kernel (gpt-fast's, torchao's) on absmax7_g128",
    ops={"fp4_linear": "vbench.kernels.peers.int4_tinygemm:make"},
)
