"""What several definitions share. No torch."""

from __future__ import annotations

#: dtypes an op may be asked for, and the bytes of an element
ITEMSIZE = {"bf16": 2, "fp16": 2, "fp32": 4}
DTYPES = tuple(ITEMSIZE)
