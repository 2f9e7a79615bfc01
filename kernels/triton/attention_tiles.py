"""Which tile the plain Triton attention forward runs with: one explicit table, no autotuner at run time.

An autotuner would make results depend on timing noise (another tile sums in another order). The rows were chosen by
``docs/tuning/tune_attention.py`` on an H200; docs/tuning/attention.md holds the predictions and what came of them.
"""

from __future__ import annotations

from dataclasses import dataclass

#: Bytes of K and V that the heads walked together may hold: half of a Hopper's 50 or 60 MB L2 cache, the other half
#: being left to queries, outputs and replacement. Also a whole number of heads at every power-of-two length, which
#: keeps the Gluon kernel's static schedule within 3.1 % of even (docs/tuning/attention.md).
L2_WORKING_SET_BYTES = 32 << 20


@dataclass(frozen=True, slots=True)
class Tile:
    """Launch geometry.

    Args:
        block_m: query rows of a program. block_n: keys of a step.
        warps: warps of a program. stages: steps of K and V in flight.
    """

    block_m: int
    block_n: int
    warps: int
    stages: int


@dataclass(frozen=True, slots=True)
class GluonTile:
    """Geometry of the warp-specialised Hopper kernel.

    Args:
        block_n: keys of a step. stages: blocks of K, and of V, in flight.
        workers: consumer warpgroups of 64 query rows each, 2 or 3.
        registers: of a consumer thread. With the producer's, a block's must fit 65536: 2 x 240 or 3 x 160.
        round_early: see ``attention_gluon._step``.
        polynomial, keep_peak: see ``attention_gluon._softmax``.
    """

    block_n: int
    stages: int
    workers: int
    registers: int
    round_early: bool
    polynomial: int = 0
    keep_peak: bool = False


@dataclass(frozen=True, slots=True)
class Order:
    """In which order the Gluon kernel's programs take the tiles. It moves no bit of the result.

    Args:
        l2_bytes: K and V of the heads walked together, at most (one K/V head's worth at least).
        even_grid: only so many programs as need the same number of rounds, instead of one a multiprocessor. For masks
            whose tiles are equally long: 2048 tiles take 132 programs 16 rounds, and 128 as well.
    """

    l2_bytes: int = L2_WORKING_SET_BYTES
    even_grid: bool = False

    def programs(self, tiles: int, processors: int) -> int:
        """Programs of a persistent grid over ``tiles`` tiles, at least 1."""
        rounds = -(-tiles // processors)
        return -(-tiles // rounds) if self.even_grid else min(tiles, processors)


def padded_head_dim(d: int) -> int:
    """Head dim as the tile holds it: the power of two above, at least 16 (the shortest sum a matrix unit takes)."""
    return max(16, 1 << (d - 1).bit_length())


#: Small on purpose, so that short sequences already walk several blocks in both loops.
INTERPRETED = Tile(block_m=32, block_n=32, warps=4, stages=1)

#: fp32 runs on the FMA units (no tensor core multiplies IEEE fp32); its accumulators bound the tile.
_FP32 = {
    16: Tile(64, 32, 4, 1),
    32: Tile(64, 32, 4, 1),
    64: Tile(64, 32, 8, 1),
    128: Tile(32, 32, 8, 1),
    256: Tile(32, 16, 8, 1),
}
#: 16-bit through pointers (cp.async) on any GPU. Two stages at 128 keep shared memory under the 99 KB of consumer GPUs
#: (sm_86, sm_89, sm_120).
_POINTERS = {
    16: Tile(128, 64, 4, 3),
    32: Tile(128, 64, 4, 3),
    64: Tile(128, 64, 8, 3),
    128: Tile(128, 64, 8, 2),
    256: Tile(64, 32, 8, 2),
}
#: The same where a program may have 227 KB (sm_90, sm_100): strides and head dims the copy engine does not take.
_POINTERS_227KB = _POINTERS | {64: Tile(64, 64, 4, 3), 128: Tile(128, 64, 8, 3)}
#: 16-bit through the bulk tensor copy engine, sm_90 and sm_100. Small tiles win: several programs share a
#: multiprocessor, and one's softmax runs under another's matrix products.
_DESCRIPTORS = {
    16: Tile(64, 64, 4, 3),
    32: Tile(64, 64, 4, 3),
    64: Tile(64, 64, 4, 3),
    128: Tile(64, 64, 4, 3),
    256: Tile(128, 64, 8, 2),
}
#: Exceptions at head dim 64, where a step's exponentials take as long as its matrix products.
_DESCRIPTORS_64_CAUSAL = Tile(64, 64, 4, 2)
_DESCRIPTORS_64_LONG = Tile(64, 128, 4, 2)
_LONG_64 = 4096
#: Few query rows (decoding): a 64-row tile would be nearly all padding.
_FEW_ROWS = {
    16: Tile(16, 64, 4, 2),
    32: Tile(16, 64, 4, 2),
    64: Tile(16, 64, 4, 2),
    128: Tile(16, 64, 4, 2),
    256: Tile(16, 32, 4, 2),
}


def choose(dtype: str, d: int, sq: int, sk: int, *, causal: bool, descriptors: bool, shared_227kb: bool) -> Tile:
    """The tile for a case.

    Args:
        dtype: ``bf16``, ``fp16`` or ``fp32``. d: head dim, at most 256. sq: query rows. sk: keys.
        descriptors: K and V come through the bulk tensor copy engine.
        shared_227kb: a program may have 227 KB of shared memory.
    """
    width = padded_head_dim(d)
    if dtype == "fp32":
        return _FP32[width]
    if sq <= 16:
        return _FEW_ROWS[width]
    if not descriptors:
        return (_POINTERS_227KB if shared_227kb else _POINTERS)[width]
    if width == 64 and sk >= _LONG_64:
        return _DESCRIPTORS_64_LONG
    if width == 64 and causal:
        return _DESCRIPTORS_64_CAUSAL
    return _DESCRIPTORS[width]


def plain_tiles(dtype: str, *, descriptors: bool, shared_227kb: bool) -> dict[int, list[Tile]]:
    """Padded head dim -> every tile ``choose`` can return for it; for the ahead-of-time compile check."""
    if dtype == "fp32":
        return {width: [tile] for width, tile in _FP32.items()}
    main = _DESCRIPTORS if descriptors else _POINTERS_227KB if shared_227kb else _POINTERS
    found = {width: [_FEW_ROWS[width], main[width]] for width in main}
    if descriptors:
        found[64] += [_DESCRIPTORS_64_CAUSAL, _DESCRIPTORS_64_LONG]
    return found


#: Gluon: three consumers hide more of the softmax when a program's walk is long and even; two waste less of a short or
#: causal one. At head dim 128 three do not fit the registers.
_GLUON_128 = GluonTile(128, 2, 2, 240, False)
_GLUON_64 = GluonTile(128, 4, 2, 240, False)
_GLUON_64_LONG = GluonTile(128, 4, 3, 160, True)
_LONG_GLUON = 2048


def choose_gluon(d: int, sk: int, *, causal: bool) -> GluonTile:
    """The Gluon kernel's tile for head dim 64 or 128 and ``sk`` keys."""
    if d == 128:
        return _GLUON_128
    return _GLUON_64_LONG if sk >= _LONG_GLUON and not causal else _GLUON_64


def gluon_tiles(d: int, *, causal: bool) -> list[GluonTile]:
    """Every tile ``choose_gluon`` can return."""
    return list(dict.fromkeys(choose_gluon(d, sk, causal=causal) for sk in (1, _LONG_GLUON)))


def heads_per_group(
    heads: int, heads_per_kv: int, sk: int, d: int, itemsize: int, l2_bytes: int = L2_WORKING_SET_BYTES
) -> int:
    """Query heads walked together so that their K and V fit ``l2_bytes`` of cache; at least one K/V head's worth."""
    kv_head_bytes = 2 * sk * d * itemsize
    kv_heads = max(1, l2_bytes // kv_head_bytes)
    return min(heads, kv_heads * heads_per_kv)
