"""What a GPU is needed for to prove the checks and our kernels: ``python docs/tuning/proofs.py --out DIR [PART...]``.

Parts, each a process of its own that is interrupted at its limit; what it wrote before stays in DIR. The first four
make up the default and fill its 520 s; ``selftest`` repeats the second beside the controls for a CPU, in a call of
its own.

    masked     cuDNN's NaN in masked attention backward, found by a drawn case and shrunk         65 s
    controls   the controls that need a GPU, and their honest twins                               90 s
    sanitize   races and reads past the end under compute-sanitizer, where it is installed        80 s
    search     20000 drawn cases on our Triton kernels, in rounds that double                    285 s
    selftest   every control, those for a CPU too, as vbench selftest counts them                400 s

``--seed N`` draws other cases: runs with different seeds add up, and so do two parts of one search (vbench fuzz
--resume). While ``search`` runs, DIR/runs/RUN/search.json is what it found so far, anew after each round. Exit codes
count as they come: ``masked`` is to end with 0 where what it finds is a waived failure, ``sanitize`` with 3 where the
sanitizer does not run. DIR/proofs.json has one line a part. ``--rehearse`` runs the same commands on a CPU with a few
cases.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

# Beside this file, whoever runs or loads it.
sys.path.insert(0, str(Path(__file__).parent))

import parts

#: From the limit that a search knows to the one that ends it: for its last answers and its table.
MARGIN_S = 15.0


def commands(out: Path, *, seed: int = 0, rehearse: bool = False) -> dict[str, tuple[list[str], float]]:
    """Part -> its arguments to Python and the seconds it may take."""
    from vbench.attack import chosen

    device, runs = "cpu" if rehearse else "cuda", ["--out", str(out / "runs")]
    place = "cpu" if rehearse else "cuda"
    names = [c.name for _, c in chosen([])[0] if c.needs == place]
    picked = [word for name in (names[:2] if rehearse else names) for word in ("--control", name)]
    selftest = ["-m", "vbench", "selftest", "--device", device, "--json", *runs]

    def fuzz(backend: str, limit_s: float, cases: int, *words: str) -> tuple[list[str], float]:
        few = ["--cases", str(4 if rehearse else cases), "--workers", str(1 if rehearse else 14)]
        limit = ["--limit-s", f"{limit_s - MARGIN_S:g}", "--shrink-s", "20", "--seed", str(seed)]
        return (
            ["-m", "vbench", "fuzz", "--backend", backend, "--device", device, *words, *few, *limit, *runs],
            limit_s,
        )

    return {
        "masked": fuzz("torch_native", 65, 600, "--suite", "attention", "--op", "attention_masked_backward"),
        "controls": ([*selftest, *picked], 90),
        "sanitize": (["-m", "vbench.controls.sanitize"], 80),
        "search": fuzz("triton", 285, 20000, "--suite", "fp4", "--suite", "attention", "--frames", "32"),
        "selftest": ([*selftest, *picked] if rehearse else selftest, 400),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Run the parts asked for, all but ``selftest`` by default."""
    parser = parts.parser(__doc__, 520.0)
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of what is drawn (0)")
    parser.add_argument("--rehearse", action="store_true", help="on a CPU, a few cases: only that it runs")
    given = parser.parse_args(argv)
    if given.rehearse:
        os.environ |= {f"REHEARSE_{name}": "1" for name in parts.SWITCHES}
    # Our own package, where this file stands in a checkout that is not installed.
    sys.path.insert(0, str(parts.ROOT))
    known = commands(given.out.resolve(), seed=given.seed, rehearse=given.rehearse)
    unknown = [part for part in given.parts if part not in known]
    if unknown:
        parser.error(f"no part {unknown[0]!r}: one of {', '.join(known)}")
    default = [part for part in known if part != "selftest"]
    return parts.work(given.parts or default, known, given.out, "proofs", given.limit_s)


if __name__ == "__main__":
    sys.exit(main())
