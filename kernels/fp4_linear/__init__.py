"""``FP4Linear``: an ``nn.Linear`` for inference whose weight is 4-bit. See module.py."""

from vbench.kernels.fp4_linear.module import LAYOUT_VERSION, FP4Linear

__all__ = ["LAYOUT_VERSION", "FP4Linear"]
