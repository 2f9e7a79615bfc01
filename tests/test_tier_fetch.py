"""tier_fetch on every backend, through the worker's own checks; what it refuses; and controls that must be caught."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch

from tests.test_tiers import COMPUTE, LateLinks
from vbench.backend import DeclaredBackend
from vbench.errors import Unsupported
from vbench.kernels.numba_cuda.backend import BACKEND as NUMBA
from vbench.kernels.peers.torch_native import BACKEND as TORCH_NATIVE
from vbench.kernels.tiers.backend import BACKEND as TIERS
from vbench.kernels.tiers.decode import Decoder
from vbench.kernels.tiers.fetch import FetchKernel
from vbench.kernels.triton.backend import BACKEND as TRITON
from vbench.kernels.triton.packing import GROUPS
from vbench.plan import BATTERY
from vbench.record import Outcome
from vbench.reference.backend import BACKEND as REFERENCE
from vbench.reference.fetch import fetch_inputs, fetched
from vbench.reference.ops.fetch import TIER_FETCH, host_bytes
from vbench.roofline import DATASHEETS, PCIE5_X16_BYTES_PER_S, floor_s
from vbench.spec import Case, Numerics, resolve
from vbench.suites.tier import SUITE
from vbench.worker import Worker

BACKENDS: tuple[DeclaredBackend, ...] = (REFERENCE, TRITON, NUMBA, TIERS, TORCH_NATIVE)
CASES = [c for c in SUITE.checks if c.op == "tier_fetch" and TIER_FETCH.reject(c) is None]


@pytest.fixture(scope="module")
def worker() -> Worker:
    return Worker(BATTERY, "vbench-kernels", "cpu")


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.id)
@pytest.mark.parametrize("backend", BACKENDS, ids=lambda b: b.name)
def test_every_backend_fetches_bit_for_bit(worker: Worker, backend: DeclaredBackend, case: Case) -> None:
    for variant in backend.variants.get("tier_fetch", ("",)):
        try:
            kernel = resolve(backend.ops["tier_fetch"])(case, variant, "cpu")
        except Unsupported as refused:
            assert backend is TRITON and case.text("fmt") not in GROUPS and refused.rule == "format"
            continue
        result = worker._measure(TIER_FETCH, case, kernel, timed=False, role="own")
        assert result.outcome is Outcome.PASSED, result.detail


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.id)
def test_trivial_kernels_are_caught_or_the_case_says_why_not(worker: Worker, case: Case) -> None:
    assert worker.battery(TIER_FETCH, case).outcome is Outcome.PASSED


class Faulty:
    """The right weight but for one bit of one element."""

    numerics = Numerics()
    produces = ("weight",)
    deterministic = True

    def __init__(self, case: Case) -> None:
        self.case = case

    def bind(self, inputs: Mapping[str, Any], out: Mapping[str, Any]) -> Callable[[], None]:
        def launch() -> None:
            out["weight"].copy_(fetched(self.case, dict(inputs)))
            out["weight"].view(torch.uint8)[-1, 0] ^= 1

        return launch


@pytest.mark.parametrize("fmt", ["raw", "nvfp4"])
def test_control_one_flipped_bit_is_caught(worker: Worker, fmt: str) -> None:
    case = TIER_FETCH.case(fmt=fmt, n=3, k=32)
    result = worker._measure(TIER_FETCH, case, Faulty(case), timed=False, role="own")
    assert result.outcome is Outcome.WRONG_VALUE
    assert result.error is not None and result.error["wrong"] == 1


@pytest.mark.parametrize("backend", [TRITON, NUMBA, TIERS], ids=lambda b: b.name)
@pytest.mark.parametrize("fmt", ["raw", "nvfp4"])
def test_weights_off_the_host_and_unknown_variants_are_refused(backend: DeclaredBackend, fmt: str) -> None:
    case = TIER_FETCH.case(fmt=fmt, n=4, k=32)
    factory = resolve(backend.ops["tier_fetch"])
    inputs = {name: t.to("meta") for name, t in fetch_inputs(case, "cpu").items()}
    with pytest.raises(Unsupported) as refused:
        factory(case, "", "cpu").bind(inputs, {"weight": torch.empty(4, 32, dtype=torch.bfloat16)})
    assert refused.value.rule == "not_on_host"
    with pytest.raises(Unsupported) as refused:
        factory(case, "faster", "cpu")
    assert refused.value.rule == "unknown_variant"


def fetches_late(monkeypatch: pytest.MonkeyPatch, fmt: str, seed: int, forget: str = "") -> bool:
    """Whether three weights fetched through one kernel are all right when both streams run as late as they may."""
    case = TIER_FETCH.case(fmt=fmt, n=4, k=128)
    draws = [fetch_inputs(TIER_FETCH.case(fmt=fmt, n=4, k=128, seed=i), "cpu") for i in range(3)]
    host = {name: t.clone() for name, t in draws[0].items()}
    links = LateLinks(seed, list(host.values()), forget)
    decode = Decoder.into
    issue = links._issue
    monkeypatch.setattr(Decoder, "into", lambda *args: issue(COMPUTE, lambda: decode(*args), ()))
    out = torch.zeros(4, 128, dtype=torch.bfloat16)
    launch = FetchKernel(fmt, links).bind(host, {"weight": out})
    seen = [torch.zeros_like(out) for _ in draws]
    for draw, consumer in zip(draws, seen, strict=True):
        for name, t in draw.items():
            host[name].copy_(t)
        launch()
        links.compute_copy(consumer, out)
    links.drain()
    monkeypatch.undo()
    return all(torch.equal(got, fetched(case, draw)) for got, draw in zip(seen, draws, strict=True))


@pytest.mark.parametrize("fmt", ["raw", "absmax7_g128"])
def test_staging_slots_are_safe_however_late_the_streams_run(monkeypatch: pytest.MonkeyPatch, fmt: str) -> None:
    assert all(fetches_late(monkeypatch, fmt, seed) for seed in range(20))


@pytest.mark.parametrize("fmt", ["raw", "absmax7_g128"])
@pytest.mark.parametrize("forget", ["after", "compute_mark", "compute_wait"])
def test_control_a_broken_stream_rule_is_seen(monkeypatch: pytest.MonkeyPatch, fmt: str, forget: str) -> None:
    assert not all(fetches_late(monkeypatch, fmt, seed, forget) for seed in range(20))


def test_the_link_is_part_of_the_floor() -> None:
    case = TIER_FETCH.case(fmt="nvfp4", n=14336, k=4096)
    assert host_bytes(case) == 14336 * 4096 // 2 + 14336 * 4096 // 16 + 4
    assert host_bytes(TIER_FETCH.case(fmt="raw", y="fp32", n=3, k=5)) == 60
    for gpu in DATASHEETS:
        assert floor_s(gpu, 0, 0, host_bytes(case)) == host_bytes(case) / PCIE5_X16_BYTES_PER_S
    assert 62.9e9 < PCIE5_X16_BYTES_PER_S < 63.1e9
