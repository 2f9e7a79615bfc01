"""Backend ``virtual``: whole models under a budget, by ``virtualize`` and tiers. No torch here."""

from __future__ import annotations

from vbench.backend import DeclaredBackend

BACKEND = DeclaredBackend(
    name="virtual",
    role="own",
    summary="virtualize(model, plan): nvfp4 linear layers, weights streamed under a budget, the model's code unchanged",
    ops={
        "train_step": "vbench.kernels.virtual.steps:make",
        "generate": "vbench.kernels.virtual.steps:make",
    },
)
