"""Deterministic draws shared by the input generators."""

from __future__ import annotations

import hashlib

import torch

from vbench.spec import TORCH_DTYPE_NAMES, Case


def torch_dtype(name: str) -> torch.dtype:
    """``bf16`` -> torch.bfloat16 and so on."""
    dtype = getattr(torch, TORCH_DTYPE_NAMES[name])
    assert isinstance(dtype, torch.dtype)
    return dtype


def generator(case: Case, stream: str) -> torch.Generator:
    """A CPU generator seeded by the whole case and a stream name, so that inputs are independent of each other."""
    return seeded(case.id, case.seed, stream)


def seeded(*parts: object) -> torch.Generator:
    """A CPU generator seeded by the texts of ``parts``."""
    digest = hashlib.sha256("|".join(map(str, parts)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def sample_rows(case: Case, rows: int, max_rows: int | None) -> torch.Tensor | None:
    """Indices of the rows to compare, sorted: first and last always, the others at random; ``None`` for all."""
    if max_rows is None or rows <= max_rows:
        return None
    inner = torch.randperm(rows - 2, generator=generator(case, "rows"))[: max_rows - 2] + 1
    ends = torch.tensor([0, rows - 1])
    return torch.sort(torch.cat((inner, ends))).values
