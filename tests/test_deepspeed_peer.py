"""The peer ``deepspeed``: held to the oracle where it is installed; what it refuses and says where it is not."""

from __future__ import annotations

import importlib
import sys
from typing import Any

import pytest

from vbench.errors import Unsupported
from vbench.kernels.peers.deepspeed_zero import BACKEND, INSTALL, configuration, make
from vbench.plan import BATTERY
from vbench.record import Outcome
from vbench.reference.ops.model import GENERATE, TRAIN_STEP
from vbench.spec import Case, Op, resolve
from vbench.suites.model import SUITE
from vbench.worker import Worker

OPS: dict[str, Op] = {op.name: op for op in (TRAIN_STEP, GENERATE)}
RAW = [c for c in SUITE.checks if c.op in OPS and OPS[c.op].reject(c) is None and "codec=nvfp4" not in c.id]


def missing(monkeypatch: pytest.MonkeyPatch) -> str:
    """Why it cannot be used here; ``""`` where it can. As the runner does, its variables are set before its import."""
    for name, value in BACKEND.environment["cpu"].items():
        monkeypatch.setenv(name, value)
    found = BACKEND.probe("cpu")
    return "" if found.usable else found.reason


@pytest.mark.filterwarnings("ignore")  # its own, about torch's and pydantic's names
def test_it_gives_what_eager_torch_does_and_no_gradient_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """The worker runs every launch twice: gradients that accumulate are caught."""
    if why := missing(monkeypatch):
        pytest.skip(why)
    linear = torch_linear()
    worker = Worker(BATTERY, "vbench-kernels", "cpu")
    for case in RAW[::3]:
        result = worker._measure(OPS[case.op], case, make(case, "", "cpu"), timed=False, role="own")
        assert result.outcome is Outcome.PASSED, (case.id, result.detail)
    assert torch_linear() is linear, "it changed a function of torch that other backends call"


def torch_linear() -> Any:
    """What ``torch.nn.functional.linear`` is now."""
    return importlib.import_module("torch.nn.functional").linear


def test_it_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    found = BACKEND.probe("cpu")
    assert not found.usable and INSTALL in found.reason


def test_a_package_that_breaks_at_its_import_is_a_reason_and_no_exception(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str, device: str) -> Any:
        raise SystemError("two versions do not go together")

    monkeypatch.setattr("vbench.kernels.peers.optional.probe_package", broken)
    found = BACKEND.probe("cpu")
    assert not found.usable and "SystemError: two versions" in found.reason and INSTALL in found.reason


def refusal(case: Case, variant: str) -> str:
    with pytest.raises(Unsupported) as refused:
        resolve(BACKEND.ops[case.op])(case, variant, "cpu")
    return refused.value.rule


def test_refusals_and_configuration() -> None:
    coded = next(c for c in SUITE.checks if "codec=nvfp4" in c.id and GENERATE.reject(c) is None)
    assert refusal(coded, "") == "codec" and refusal(RAW[0], "nonsense") == "unknown_variant"
    train, text = (configuration("bf16", train=t, pinned=True)["zero_optimization"] for t in (True, False))
    assert train["offload_param"] == train["offload_optimizer"] == {"device": "cpu", "pin_memory": True}
    assert "offload_optimizer" not in text and not text["memory_efficient_linear"]
    exact = {c.text("dtype"): make(c, "", "cpu").numerics.stores for c in RAW}
    assert exact == {"bf16": (), "fp32": ("fp32",)}
