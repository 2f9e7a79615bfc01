"""Everything about the systems that needs a GPU, in one command: ``python docs/tuning/systems.py --out DIR [PART...]``.

Parts, each a process of its own with its time limit; what a part wrote before it was cut off stays in DIR.

    tests      the tests that are skipped without a GPU: streams, slots, decoding into slots      20 s
    codec      offload_pass of raw against nvfp4 weights, 6.44 GB, 16 to 8192 tokens              25 s
    estimator  the table of estimated and measured peaks, at least 40 points                      70 s
    scenarios  the document's three scenarios under 8 and 24 GB, and with less                   120 s
    overhead   a fully resident tiered stack against the plain one, in pairs of processes        100 s
    large      54 GB forward and backward under 8 GiB against all-resident, 101 GiB of host      120 s
    models     train_step of whole models under 8 and 24 GB and without: virtual, eager, fsdp2   240 s

All but ``models`` fit a call of ten minutes, even if each takes all of its time; ``models`` fits one of its own.

Prints one line a part at the end, and writes them to DIR/systems.json as parts end, with one for the part that is
running: a run that is cut off says where. After ``--limit-s`` no part begins, and none may run on past it. A part
whose packages are missing is left out and says which. Exit code 1 if any part failed, ran out of time or was left out.

``--rehearse`` runs the same parts on a CPU with everything small, about a minute: it finds what a GPU's minutes should
not be spent on, such as an argument nobody takes. ``python docs/tuning/targets.py`` judges what a run left in DIR.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

# Beside this file, whoever runs or loads it.
sys.path.insert(0, str(Path(__file__).parent))

import parts

GIB = 1 << 30
#: What an interpreter must be able to import. vbench finds its backends by its own metadata, so it must be installed.
PACKAGES = ("torch", "numpy")
OF_VBENCH = ("hypothesis", "vbench-kernels")
TESTS = ("test_tiers", "test_tiered_codec", "test_virtualize", "test_model_steps", "test_fp4_training")
NEEDED = {"tests": ("pytest", "hypothesis"), "overhead": OF_VBENCH, "models": OF_VBENCH}


def commands(out: Path, rehearse: bool = False) -> dict[str, tuple[list[str], float]]:
    """Part -> its command and the seconds it may take."""
    here, vbench = Path(__file__).parent, ["-m", "vbench"]
    device = "cpu" if rehearse else "cuda"
    sizes = "layers=3,width=64,tokens=4" if rehearse else "layers=12,width=8192,tokens=1024"
    resident = f"offload_pass[mode=forward,{sizes},gpu_bytes={4 * GIB}]"
    pairs, effort = ("2", "quick") if rehearse else ("5", "standard")
    codec = "--layers 5 --width 128 --gpu 100KiB --tokens 3 5" if rehearse else ""
    large = "--layers 6 --width 128 --tokens 8 --gpu 200KiB --activations 0 --pinned 10MB" if rehearse else ""
    small = ["--rehearse"] if rehearse else []
    tests = [f"tests/{name}.py" for name in TESTS]
    return {
        "tests": (["-m", "pytest", "-q", "-rs", *tests, "-k", "on_a_gpu or on_a_device"], 45),
        "codec": ([str(here / "tier_codec.py"), "--out", str(out), "--device", device, *codec.split()], 45),
        "estimator": ([str(here / "estimator.py"), "--out", str(out), "--device", device, "--limit-s", "60"], 85),
        "scenarios": ([str(here / "scenarios.py"), "--out", str(out), "--limit-s", "130", *small], 150),
        "overhead": (
            [*vbench, "ab", "torch_native[all_resident]", "tiers", "--case", resident, "--device", device,
             "--pairs", pairs, "--max-pairs", pairs, "--limit-s", "100", "--out", str(out / "runs")],
            115,
        ),
        "large": ([str(here / "tier_54gb.py"), "--out", str(out), "--device", device, *large.split()], 140),
        "models": (
            [*vbench, "run", "--suite", "model", "--op", "train_step", "--backend", "virtual", "--backend",
             "torch_native", "--effort", effort, "--device", device, "--out", str(out / "runs")],
            300,
        ),
    }  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Run the parts asked for, all by default."""
    parser = parts.parser(__doc__, 580.0)
    parser.add_argument("--rehearse", action="store_true", help="everything small, on a CPU")
    given = parser.parse_args(argv)
    known = commands(given.out.resolve(), given.rehearse)
    unknown = [part for part in given.parts if part not in known]
    if unknown:
        parser.error(f"no part {unknown[0]!r}: one of {', '.join(known)}")
    needed = {part: (*PACKAGES, *NEEDED.get(part, ())) for part in known}
    return parts.work(given.parts or list(known), known, given.out, "systems", given.limit_s, needed)


if __name__ == "__main__":
    sys.exit(main())
