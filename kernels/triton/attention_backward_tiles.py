"""Which tiles the plain Triton attention backward runs with: one explicit table, as for the forward.

Chosen by compile reports (registers, spills, shared memory) until ``docs/tuning/tune_attention.py`` has measured them.
"""

from __future__ import annotations

from dataclasses import dataclass

from vbench.kernels.triton.attention_tiles import Tile, padded_head_dim


@dataclass(frozen=True, slots=True)
class BackwardTiles:
    """Geometry of the two kernels.

    Args:
        queries: of dQ: ``block_m`` rows a program owns, ``block_n`` keys of a step.
        keys: of dK and dV: ``block_n`` keys a program owns, ``block_m`` query rows of a step.
    """

    queries: Tile
    keys: Tile


#: Rows of lse and delta are padded to a multiple of this, so that no block of rows reads past them.
ROW_PADDING = 128
#: Rows of a program of ``prepare_rows``.
PREPARE_ROWS = 64

#: Small on purpose, and unequal, so that a mix-up of rows and keys shows.
INTERPRETED = BackwardTiles(queries=Tile(32, 16, 4, 1), keys=Tile(16, 32, 4, 1))

#: fp32 runs on the FMA units, whose products keep whole rows of their operands in registers.
_FP32 = {
    16: BackwardTiles(Tile(64, 32, 4, 1), Tile(32, 32, 4, 1)),
    32: BackwardTiles(Tile(64, 32, 8, 1), Tile(32, 64, 8, 1)),
    64: BackwardTiles(Tile(32, 32, 8, 1), Tile(32, 32, 8, 1)),
    128: BackwardTiles(Tile(32, 16, 8, 1), Tile(16, 16, 8, 1)),
    256: BackwardTiles(Tile(16, 16, 8, 1), Tile(16, 16, 8, 1)),
}
#: 16-bit through pointers on any GPU, under the 99 KB of shared memory of consumer GPUs (sm_86, sm_89, sm_120).
_POINTERS = {
    16: BackwardTiles(Tile(64, 64, 4, 2), Tile(64, 64, 4, 2)),
    32: BackwardTiles(Tile(64, 64, 4, 2), Tile(64, 64, 4, 2)),
    64: BackwardTiles(Tile(64, 64, 4, 2), Tile(32, 64, 8, 2)),
    128: BackwardTiles(Tile(64, 32, 4, 2), Tile(32, 64, 8, 2)),
    256: BackwardTiles(Tile(64, 32, 8, 1), Tile(16, 64, 8, 1)),
}
#: The same where a program may have 227 KB (sm_90, sm_100): strides and head dims the copy engine does not take.
_POINTERS_227KB = _POINTERS | {
    64: BackwardTiles(Tile(64, 64, 4, 2), Tile(32, 64, 4, 2)),
    128: BackwardTiles(Tile(64, 32, 4, 2), Tile(32, 64, 8, 1)),
    256: BackwardTiles(Tile(64, 32, 8, 2), Tile(32, 32, 8, 1)),
}
#: 16-bit through the bulk tensor copy engine, sm_90 and sm_100.
_DESCRIPTORS = {
    16: BackwardTiles(Tile(64, 64, 4, 2), Tile(64, 64, 4, 2)),
    32: BackwardTiles(Tile(64, 64, 4, 2), Tile(64, 64, 4, 2)),
    64: BackwardTiles(Tile(64, 64, 4, 2), Tile(64, 64, 4, 2)),
    128: BackwardTiles(Tile(64, 64, 4, 2), Tile(64, 64, 4, 2)),
    256: BackwardTiles(Tile(64, 32, 8, 2), Tile(32, 64, 8, 2)),
}


#: The same with a window or capped scores, whose steps hold more.
_DESCRIPTORS_EDGES = _DESCRIPTORS | {
    128: BackwardTiles(Tile(64, 64, 4, 2), Tile(32, 64, 4, 2)),
    256: BackwardTiles(Tile(64, 32, 8, 2), Tile(16, 64, 8, 2)),
}


def table(dtype: str, *, descriptors: bool, shared_227kb: bool, edges: bool) -> dict[int, BackwardTiles]:
    """Padded head dim -> tiles, all that ``choose`` can return; the ahead-of-time compile check walks it."""
    if dtype == "fp32":
        return _FP32
    if descriptors:
        return _DESCRIPTORS_EDGES if edges else _DESCRIPTORS
    return _POINTERS_227KB if shared_227kb else _POINTERS


def choose(dtype: str, d: int, *, descriptors: bool, shared_227kb: bool, edges: bool) -> BackwardTiles:
    """The tiles for a head dim ``d`` of at most 256 in ``dtype`` (``bf16``, ``fp16`` or ``fp32``).

    Args:
        descriptors: blocks come through the bulk tensor copy engine.
        shared_227kb: a program may have 227 KB of shared memory.
        edges: there is a window, or scores are capped.
    """
    tables = table(dtype, descriptors=descriptors, shared_227kb=shared_227kb, edges=edges)
    return tables[padded_head_dim(d)]
