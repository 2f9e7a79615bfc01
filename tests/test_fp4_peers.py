"""Peers of fp4_linear that are kernels of their own: within what they declare where installed, refusing the rest."""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType
from typing import Any

import pytest

from vbench.backend import Launch
from vbench.errors import Unsupported
from vbench.kernels.peers import fp4_bitsandbytes, fp4_torchao, int4_tinygemm
from vbench.plan import BATTERY
from vbench.record import Outcome
from vbench.reference.ops.fp4 import FORMATS, FP4_LINEAR
from vbench.spec import Case
from vbench.worker import Worker

#: Module, package, format, dtypes.
PEERS: tuple[tuple[ModuleType, str, str, tuple[str, ...]], ...] = (
    (fp4_bitsandbytes, "bitsandbytes", "nf4", ("bf16", "fp16", "fp32")),
    (fp4_torchao, "torchao", "nvfp4", ("bf16", "fp32")),
    (int4_tinygemm, "torch", "absmax7_g128", ("bf16",)),
)
by_peer = pytest.mark.parametrize(("peer", "package", "fmt", "dtypes"), PEERS, ids=lambda v: v if v in FORMATS else "")


@pytest.fixture(scope="module")
def worker() -> Worker:
    return Worker(BATTERY, "vbench-kernels", "cpu")


def cases(fmt: str, dtypes: tuple[str, ...]) -> list[Case]:
    op = FP4_LINEAR
    return [
        op.case(fmt=fmt, x=x, act=act, bias=bias, dist=dist, m=m, n=32, k=256)
        for x in dtypes
        for act, bias, dist, m in (
            ("none", 0, "normal", 1), ("silu", 1, "normal", 5), ("relu", 1, "student5", 33), ("none", 0, "outlier", 4),
        )
    ]  # fmt: skip


class Swapped:
    """A peer's kernel that is given each byte's codes in the other order."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self.numerics, self.produces, self.deterministic = inner.numerics, inner.produces, inner.deterministic

    def bind(self, inputs: Mapping[str, Any], out: Mapping[str, Any]) -> Launch:
        codes = inputs["codes"]
        launch: Launch = self.inner.bind({**inputs, "codes": (codes << 4) | (codes >> 4)}, out)
        return launch


@by_peer
def test_a_peer_is_within_what_it_declares(
    worker: Worker, peer: ModuleType, package: str, fmt: str, dtypes: tuple[str, ...]
) -> None:
    pytest.importorskip(package)
    for case in cases(fmt, dtypes):
        result = worker._measure(FP4_LINEAR, case, peer.make(case, "", "cpu"), timed=False, role="peer")
        assert result.outcome is Outcome.PASSED, (case.id, result.detail, result.error)
    case = cases(fmt, dtypes)[0]
    # control: the two codes of each byte in the other order
    swapped = Swapped(peer.make(case, "", "cpu"))
    result = worker._measure(FP4_LINEAR, case, swapped, timed=False, role="peer")
    assert result.outcome is Outcome.WRONG_VALUE


@by_peer
def test_other_formats_are_refused(peer: ModuleType, package: str, fmt: str, dtypes: tuple[str, ...]) -> None:
    for other in FORMATS:
        case = FP4_LINEAR.case(fmt=other, x="bf16", m=1, n=16, k=128)
        if other != fmt:
            with pytest.raises(Unsupported, match="format_not_of_peer"):
                peer.make(case, "", "cuda")


def test_sizes_and_dtypes_tinygemm_does_not_pack_are_refused() -> None:
    for rule, values in (
        ("needs_bf16", {"x": "fp16", "n": 16}),
        ("tinygemm_shape", {"x": "bf16", "n": 12}),
    ):
        case = FP4_LINEAR.case(fmt="absmax7_g128", m=1, k=128, **values)  # type: ignore[arg-type]
        with pytest.raises(Unsupported, match=rule):
            int4_tinygemm.make(case, "", "cuda")
