"""Everything about the systems that needs a GPU, in one command: ``python docs/tuning/systems.py --out DIR [PART...]``.

Parts, each a process of its own with its time limit; what a part wrote before it was cut off stays in DIR.

    tests      the tests that are skipped without a GPU: streams, slots, decoding into slots      40 s
    codec      offload_pass of raw against nvfp4 weights, 6.44 GB, 16 to 8192 tokens              60 s
    estimator  the table of estimated and measured peaks, at least 40 points                      70 s
    scenarios  the document's three scenarios under 8 and 24 GB                                   90 s
    overhead   a fully resident tiered stack against the plain one, in pairs of processes        100 s
    large      54 GB forward and backward under 8 GiB against all-resident, 101 GiB of host      120 s
    models     train_step of whole models under 8 and 24 GB and without: virtual, eager, fsdp2   240 s

All but ``models`` fit a call of ten minutes, and ``models`` fits one of its own.

Prints one line a part at the end, and writes them to DIR/systems.json as parts end, with one for the part that is
running: a run that is cut off says where. After ``--limit-s`` no part begins, and none may run on past it. Exit code 1
if any part failed, ran out of time or was left out.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

# Beside this file, whoever runs or loads it.
sys.path.insert(0, str(Path(__file__).parent))

import parts

GIB = 1 << 30


def commands(out: Path) -> dict[str, tuple[list[str], float]]:
    """Part -> its command and the seconds it may take."""
    here, vbench = Path(__file__).parent, ["-m", "vbench"]
    resident = f"offload_pass[mode=forward,layers=12,width=8192,tokens=1024,gpu_bytes={4 * GIB}]"
    tests = [f"tests/{name}.py" for name in ("test_tiers", "test_tiered_codec", "test_virtualize", "test_model_steps")]
    return {
        "tests": (["-m", "pytest", "-q", "-rs", *tests, "-k", "on_a_gpu or on_a_device"], 90),
        "codec": ([str(here / "tier_codec.py"), "--out", str(out)], 90),
        "estimator": ([str(here / "estimator.py"), "--out", str(out), "--limit-s", "60"], 100),
        "scenarios": ([str(here / "scenarios.py"), "--out", str(out), "--limit-s", "80"], 120),
        "overhead": (
            [*vbench, "ab", "torch_native[all_resident]", "tiers", "--case", resident, "--device", "cuda",
             "--pairs", "5", "--max-pairs", "5", "--limit-s", "100", "--out", str(out / "runs")],
            130,
        ),
        "large": ([str(here / "tier_54gb.py"), "--out", str(out)], 180),
        "models": (
            [*vbench, "run", "--suite", "model", "--op", "train_step", "--backend", "virtual", "--backend",
             "torch_native", "--effort", "standard", "--device", "cuda", "--out", str(out / "runs")],
            300,
        ),
    }  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Run the parts asked for, all by default."""
    parser = parts.parser(__doc__, 580.0)
    given = parser.parse_args(argv)
    known = commands(given.out.resolve())
    unknown = [part for part in given.parts if part not in known]
    if unknown:
        parser.error(f"no part {unknown[0]!r}: one of {', '.join(known)}")
    return parts.work(given.parts or list(known), known, given.out, "systems", given.limit_s)


if __name__ == "__main__":
    sys.exit(main())
