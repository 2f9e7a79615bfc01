"""Suite ``rivals``: what the document sets itself against or warns of: INT8, singular values, NumPy round trips."""

from __future__ import annotations

from vbench.reference.ops.insight import CHAIN, SVD
from vbench.reference.ops.int8 import ACT_QUANTS, INT8_LINEAR
from vbench.reference.ops.types import DTYPES
from vbench.spec import BenchCase, Case, Generated, Suite
from vbench.suites.data import REGRESSIONS, WAIVERS

LLAMA3 = "gate_proj, up_proj of Llama-3-8B (config.json: hidden_size=4096, intermediate_size=14336)"
#: The size of the accuracy cases of suite fp4, so that claims can set one against the other.
METRIC_SIZE = 512


def _int8_checks() -> tuple[Case, ...]:
    op = INT8_LINEAR
    return (
        *(
            op.case(x=x, act_quant=quant, bias=(i + j) % 2, m=3, n=24, k=40)
            for i, x in enumerate(DTYPES)
            for j, quant in enumerate(ACT_QUANTS)
        ),
        op.case(x="fp16", act_quant="row127", dist="student5", m=1, n=8, k=8),
        op.case(x="bf16", act_quant="row127h", dist="outlier", m=19, n=16, k=64),
        op.case(x="fp32", dist="zeros", m=2, n=8, k=16),
        op.case(x="fp32", act_quant="row127", m=5, n=7, k=9),
        # The accuracy claims'.
        *(op.case(x="fp32", act_quant=quant, m=4, n=METRIC_SIZE, k=METRIC_SIZE) for quant in ("none", "row127")),
        # What must be refused.
        op.case(m=0, n=8, k=8),
        op.case(m=1, n=8, k=0),
    )


def _insight_checks() -> tuple[Case, ...]:
    return (
        *(SVD.case(m=m, n=n) for m, n in ((1, 1), (7, 3), (24, 40), (33, 33))),
        *(CHAIN.case(n=n, steps=steps) for n, steps in ((1, 1), (37, 3), (256, 40))),
        SVD.case(m=0, n=4),
        CHAIN.case(n=8, steps=0),
    )


def _benches() -> tuple[BenchCase, ...]:
    """INT8: at the shape of the speed claims; fp16 x for LLM.int8, which takes nothing else."""
    n, k = 14336, 4096
    op = INT8_LINEAR
    rounded = [op.case(x="bf16", act_quant=quant, m=m, n=n, k=k) for quant in ACT_QUANTS for m in (1, 16, 1024)]
    half = [op.case(x="fp16", act_quant="row127", m=m, n=n, k=k) for m in (1, 16, 1024)]
    insight = "square matrices as layers of the document's models have, and a million elements through 16 steps"
    return (
        *(BenchCase(case, LLAMA3, "standard") for case in (*rounded, *half)),
        BenchCase(SVD.case(m=256, n=256), insight, "quick"),
        BenchCase(SVD.case(m=1024, n=1024), insight, "standard"),
        BenchCase(CHAIN.case(n=1 << 20, steps=16), insight, "quick"),
        BenchCase(CHAIN.case(n=1 << 24, steps=16), insight, "standard"),
    )


SUITE = Suite(
    name="rivals",
    summary="int8 linear layers, singular values and NumPy round trips: what the document compares itself with",
    checks=(*_int8_checks(), *_insight_checks()),
    generated=(Generated("vbench.suites.strategies:int8_linear_cases", (8, 50, 500)),),
    benches=_benches(),
    regressions=REGRESSIONS,
    waivers=WAIVERS,
)
