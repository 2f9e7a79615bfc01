"""Definitions of the operations: parameters, outputs, formulas, and the names of oracle and input generator.

One module per family; this one lists them for the entry point. A consumer imports the family it needs, so that a
result's source digest does not change with another family's definitions. Imports no torch.
"""

from __future__ import annotations

from vbench.reference.ops import (
    attention,
    attention_extended,
    block,
    fetch,
    fp4,
    insight,
    int8,
    masked,
    model,
    offload,
    tiers,
)
from vbench.spec import Op

OPS: tuple[Op, ...] = (
    *fp4.OPS,
    *attention.OPS,
    *attention_extended.OPS,
    *masked.OPS,
    *tiers.OPS,
    *fetch.OPS,
    *offload.OPS,
    *block.OPS,
    *int8.OPS,
    *insight.OPS,
    *model.OPS,
)
