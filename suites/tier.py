"""Suite ``tier``: the stack of memory levels against the dictionary model, and what it costs over having it all;
fetches of packed weights from host memory; passes over layers whose weights lie there.

Trace cyclic is LRU's worst case: with fewer places than keys every access misses.
"""

from __future__ import annotations

from itertools import product
from typing import Literal

from vbench.reference.ops.fetch import RAW, TIER_FETCH
from vbench.reference.ops.fp4 import FORMATS
from vbench.reference.ops.offload import OFFLOAD_PASS
from vbench.reference.ops.tiers import TIER_STACK
from vbench.reference.ops.types import DTYPES
from vbench.spec import BenchCase, Case, Generated, Suite
from vbench.suites.data import REGRESSIONS, WAIVERS

op = TIER_STACK
TRACES = ("mixed", "cyclic", "palindrome")

#: The metric cases: 8 keys of 4 KiB, half of which fit level 0 and all of which fit in ``resident``.
METRIC = {"keys": 8, "item_bytes": 4096, "steps": 64, "host_bytes": 65536, "file_bytes": 1048576}


def _checks() -> tuple[Case, ...]:
    small = {"keys": 5, "steps": 40, "host_bytes": 64, "file_bytes": 1024}
    return (
        *(op.case(trace=trace, item_bytes=32, gpu_bytes=64, **small) for trace in (*TRACES, "resident")),
        *(op.case(trace="mixed", item_bytes=32, gpu_bytes=64, seed=seed, **small) for seed in range(1, 6)),
        # Values larger than level 0, larger than levels 0 and 1, and an exact fit.
        op.case(trace="mixed", item_bytes=96, gpu_bytes=16, **small),
        op.case(trace="cyclic", item_bytes=33, gpu_bytes=32, **small),
        op.case(trace="cyclic", item_bytes=80, gpu_bytes=32, **small),
        op.case(trace="palindrome", item_bytes=16, gpu_bytes=80, **small),
        # One key; no step after the puts; fewer steps than keys.
        op.case(trace="resident", keys=1, item_bytes=1, steps=8, gpu_bytes=1, host_bytes=1, file_bytes=1),
        op.case(trace="cyclic", keys=4, item_bytes=8, steps=4, gpu_bytes=16, host_bytes=16, file_bytes=64),
        op.case(trace="mixed", keys=6, item_bytes=8, steps=3, gpu_bytes=16, host_bytes=16, file_bytes=64),
        *(op.case(trace=trace, gpu_bytes=16384, **METRIC) for trace in TRACES),
        op.case(trace="resident", gpu_bytes=65536, **METRIC),
    )


def _fetch_checks() -> tuple[Case, ...]:
    fetch = TIER_FETCH
    return (
        *(fetch.case(fmt=fmt, y=y, n=5, k=128) for fmt, y in product((RAW, *FORMATS), DTYPES)),
        # Every code, those no encoder writes too; raw: every kind of bit pattern, an odd number of 16-bit elements.
        *(fetch.case(fmt=fmt, y="bf16", dist="grid", n=3, k=128) for fmt in (RAW, *FORMATS)),
        fetch.case(fmt=RAW, y="fp16", dist="grid", n=3, k=43),
        fetch.case(fmt="nvfp4", y="bf16", dist="zeros", n=1, k=16),
        fetch.case(fmt="absmax7_row", y="fp32", n=7, k=2),
        # What must be refused.
        fetch.case(fmt=RAW, n=0, k=16),
        fetch.case(fmt="nvfp4", n=2, k=24),
    )


def _offload_checks() -> tuple[Case, ...]:
    offload = OFFLOAD_PASS
    sizes = ({"gpu_bytes": 2 * 2048 + 512, "layers": 5}, {"gpu_bytes": 1 << 20, "layers": 3})
    return (
        # Width 32: a layer is 2 KiB. Two streaming slots; then everything fits.
        *(
            offload.case(mode=mode, width=32, tokens=tokens, **size)
            for mode, tokens, size in product(("forward", "train"), (1, 17), sizes)
        ),
        # Some layers stay and others stream; one layer; a width that no alignment likes.
        offload.case(mode="forward", layers=7, width=32, tokens=3, gpu_bytes=5 * 2048),
        offload.case(mode="train", layers=7, width=32, tokens=3, gpu_bytes=12 * 2048, seed=1),
        offload.case(mode="train", layers=1, width=48, tokens=4, gpu_bytes=1 << 16),
        offload.case(mode="train", layers=4, width=23, tokens=5, gpu_bytes=3 * 1536),
        # Weights as codes: two streaming slots beside two staging buffers of 1.5 KiB; some layers stay; all do.
        *(
            offload.case(layers=5, width=32, tokens=3, gpu_bytes=gpu, codec="nvfp4")
            for gpu in (2 * 2048 + 2 * 1536, 4 * 2048 + 2 * 1536, 1 << 20)
        ),
        offload.case(layers=2, width=48, tokens=17, gpu_bytes=1 << 14, codec="nvfp4", seed=1),
        # What must be refused.
        offload.case(layers=0, width=32, tokens=1, gpu_bytes=4096),
        offload.case(mode="train", layers=2, width=32, tokens=1, gpu_bytes=4096, codec="nvfp4"),
        offload.case(layers=2, width=24, tokens=1, gpu_bytes=4096, codec="nvfp4"),
    )


KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
SOURCE = "16 layers of equal size through a level 0 that holds a quarter of them (resident: all)"


def _benches() -> tuple[BenchCase, ...]:
    """16 keys, 64 steps: large items for the transfers, small ones for the bookkeeping alone."""
    efforts: tuple[tuple[Literal["quick", "standard"], int], ...] = (("quick", 64 * KIB), ("standard", 16 * MIB))
    out: list[BenchCase] = []
    for (effort, item), trace in product(efforts, ("resident", "cyclic", "palindrome")):
        case = op.case(
            trace=trace,
            keys=16,
            item_bytes=item,
            steps=64,
            gpu_bytes=item * (32 if trace == "resident" else 4),
            host_bytes=8 * item,
            file_bytes=64 * item,
        )
        out.append(BenchCase(case, SOURCE, effort, "any"))
    return tuple(out)


#: Formats whose fetch is timed: as it is, and the two ways to put 4 bits in its place.
FETCHED = (RAW, "absmax7_row", "nvfp4")
FETCH_SOURCE = "gate_proj, up_proj of Llama-3-8B (config.json: hidden_size=4096, intermediate_size=14336)"


def _fetch_benches() -> tuple[BenchCase, ...]:
    return tuple(BenchCase(TIER_FETCH.case(fmt=fmt, n=14336, k=4096), FETCH_SOURCE, "standard") for fmt in FETCHED)


OFFLOADED = "48 square layers of 8192 features in bf16, 6.44 GB: the bytes of 24 MLP blocks streamed by other engines"


CODED = "the same layers as nvfp4 codes, 1.81 GB: 3.56 times fewer bytes over the link"


def _offload_benches() -> tuple[BenchCase, ...]:
    """Weights six times the budget at four token counts, all of them within it, and a training step beyond it."""
    case = OFFLOAD_PASS.case
    large = {"layers": 48, "width": 8192}
    return (
        BenchCase(
            case(layers=12, width=512, tokens=16, gpu_bytes=2 * MIB), "small layers, 6.3 MB: overhead", "quick", "any"
        ),
        *(BenchCase(case(tokens=t, gpu_bytes=GIB, **large), OFFLOADED) for t in (16, 1024, 8192, 32768)),
        BenchCase(case(tokens=1024, gpu_bytes=8 * GIB, **large), OFFLOADED),
        *(BenchCase(case(tokens=t, gpu_bytes=GIB, codec="nvfp4", **large), CODED) for t in (16, 1024, 8192)),
        BenchCase(
            case(mode="train", layers=12, width=8192, tokens=8192, gpu_bytes=GIB // 2),
            "12 square layers of 8192 features in bf16 and their gradients",
        ),
    )


SUITE = Suite(
    name="tier",
    summary="tier stack, fetch and passes from host memory: bitwise, every byte counted; cost over all-resident",
    checks=(*_checks(), *_fetch_checks(), *_offload_checks()),
    generated=(
        Generated("vbench.suites.strategies:tier_cases", (15, 100, 1000)),
        Generated("vbench.suites.strategies:tier_fetch_cases", (8, 50, 500)),
    ),
    benches=(*_benches(), *_fetch_benches(), *_offload_benches()),
    regressions=REGRESSIONS,
    waivers=WAIVERS,
)
