"""Our own error rates, the processes of the baseline and the machine's ceilings, in one command.

    python docs/tuning/rates.py --out DIR [PART...]

    roofline   this machine's ceilings: memory, matrix units, links, files                                      50 s
    rates      selftest --aa: 100 cases of ours, 200 cells, ten pairs of processes each                        335 s
    baseline   three more pairs of each cell of the baseline that has not got them, those of claims first      175 s

Each is a process of its own with a limit, 560 s together. What a call had no time for is done by calling it again
with the same DIR and ``rates baseline``: cells that have their pairs are left out, and the rates are of all pairs in
DIR. Run it after a run of the suites on the same machine, or the first pair compiles.

``--rehearse`` does the same small on a CPU, with the tier stack as the kernel, in about a minute.

From DIR come the committed records (MACHINE as its folder below results/baselines is called):

    make baseline RUN=DIR/runs MACHINE=h200 && make claims
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

# Beside this file, whoever runs or loads it.
sys.path.insert(0, str(Path(__file__).parent))

import parts

OF_VBENCH = ("torch", "numpy", "hypothesis", "vbench-kernels")
#: From the limit of a command to that of its process: the cell under way ends, workers close, rates are computed.
SLACK_S = 15.0
TIER = "tier_stack[trace=resident,keys={keys},item_bytes=64,steps=8,gpu_bytes=1024,host_bytes=1024,file_bytes=4096]"


def commands(out: Path, baseline: Path, rehearse: bool = False) -> parts.Parts:
    """Part -> its command and the seconds it may take.

    Args:
        baseline: the folder whose cells want processes.
    """
    runs = out / "runs"
    where = ["--device", "cpu" if rehearse else "cuda", "--out", str(runs)]
    what = ["--suite", "fp4", "--backend", "triton", "--cases", "100"]
    cells = ["--baseline", str(baseline)]
    limits_s = (35.0, 320.0, 160.0)
    probes: list[str] = []
    if rehearse:
        # Few pairs, so that a call is short and the next one finds some of them missing.
        tiers = [word for keys in (4, 8) for word in ("--case", TIER.format(keys=keys))]
        what = ["--backend", "tiers", *tiers, "--pairs", "2"]
        cells = ["--backend", "tiers", *tiers, "--pairs", "1"]
        limits_s, probes = (20.0, 20.0, 10.0), ["--only", "read"]
    end_s = [["--limit-s", f"{s:g}"] for s in limits_s]
    # A folder of runs is all of them: what it holds is joined, and nothing of it is measured again.
    made = {
        "roofline": ["roofline", *where, "--folder", str(out), *probes],
        "rates": ["selftest", "--aa", *what, *end_s[1], "--resume", str(runs), *where],
        "baseline": ["baseline", "measure", *cells, *end_s[2], "--resume", str(runs), *where],
    }
    return {
        part: (["-m", "vbench", *words], s + SLACK_S) for (part, words), s in zip(made.items(), limits_s, strict=True)
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Run the parts asked for, all by default."""
    parser = parts.parser(__doc__, 560.0)
    default = parts.ROOT / "results" / "baselines" / "h200"
    parser.add_argument("--baseline", type=Path, default=default, metavar="DIR", help="whose cells (h200)")
    parser.add_argument("--rehearse", action="store_true", help="everything small, on a CPU")
    given = parser.parse_args(argv)
    out = given.out.resolve()
    known = commands(out, given.baseline.resolve(), given.rehearse)
    unknown = [part for part in given.parts if part not in known]
    if unknown:
        parser.error(f"no part {unknown[0]!r}: one of {', '.join(known)}")
    (out / "runs").mkdir(parents=True, exist_ok=True)
    needed = dict.fromkeys(known, OF_VBENCH)
    return parts.work(given.parts or list(known), known, given.out, "rates", given.limit_s, needed)


if __name__ == "__main__":
    sys.exit(main())
