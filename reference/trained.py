"""Two weights of a model that was trained here: the case distribution ``trained``.

    virtual-blackwell train --preset tiny --seed 0 --threads 1 --steps 400 --device cpu --out tiny

on the standard library of Python 3.11 (1790 files, 31525224 bytes, sha256 92debcc73de5cb17) with torch 2.13.0 ended at
a validation loss of 2.0799 nats a byte. Kept are the two matrices of the third block's MLP, ``blocks.2.mlp.up.weight``
[512, 128] and ``blocks.2.mlp.down.weight`` [128, 512], rounded to float16. Files and not a training at run time, since
another machine's sums give other bits.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from torch import Tensor

from vbench.errors import DataError

_FOLDER = Path(__file__).parent / "data"
#: (n, k) -> sha256 of the file: row by row, little-endian float16.
DIGESTS = {
    (512, 128): "da5326174986371ceac53852157777352d132651313653dcb02dbfc0b72faf87",
    (128, 512): "9d90df0da99a31c9c6f8f3e9b31decf098a4dfce439b01c88a27fa813346e03b",
}


def trained_weight(n: int, k: int, seed: int) -> Tensor:
    """float32 [n, k]. Another seed rotates the rows, so that it is another weight with the same blocks.

    Raises:
        DataError: the file is not the one these results rest on.
    """
    path = _FOLDER / f"trained_{n}x{k}.f16"
    data = path.read_bytes()
    if hashlib.sha256(data).hexdigest() != DIGESTS[n, k]:
        raise DataError(f"{path}: altered; restore it, or give it a name and a digest of its own")
    weight = torch.frombuffer(bytearray(data), dtype=torch.float16).reshape(n, k).to(torch.float32)
    return weight.roll(seed, dims=0)
