"""For every operation: the oracle's own answer with an error of twice the budget in one element (or one wrong bit).

The honest twin is the oracle's answer, rounded once, so that the comparison and nothing else is put to the test.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from vbench.check import as_bytes
from vbench.control import Corpus
from vbench.controls.kit import BY_NAME, Register, Setting
from vbench.spec import Expected, Numerics, Op, resolve

control = Register()

#: In budgets.
PLANTED = 2.0
NUMERICS = Numerics("fp32")

MODEL: dict[str, int | str] = {
    "family": "gpt",
    "layers": 2,
    "width": 16,
    "heads": 2,
    "inner": 32,
    "vocab": 24,
    "batch": 2,
    "seq": 5,
}
#: A small case of every operation.
CASES: dict[str, dict[str, int | str]] = {
    "fp4_quantize": {"fmt": "mxfp4", "n": 8, "k": 64},
    "fp4_dequantize": {"fmt": "nvfp4", "n": 8, "k": 64},
    "fp4_linear": {"fmt": "nvfp4", "m": 8, "n": 16, "k": 128},
    "attention": {"hq": 2, "hk": 1, "sq": 16, "sk": 16, "d": 16},
    "attention_backward": {"hq": 2, "hk": 1, "sq": 16, "sk": 16, "d": 16, "dlse": 1},
    "attention_masked_backward": {"mask": "random", "h": 2, "sq": 16, "sk": 16, "d": 16},
    "attention_extended": {"hq": 2, "hk": 1, "sq": 16, "sk": 16, "d": 16, "alibi": 1, "sinks": 1, "mask": "normal"},
    "attention_extended_backward": {"hq": 2, "hk": 1, "sq": 16, "sk": 16, "d": 16, "sinks": 1, "mask": "normal"},
    "tier_stack": {
        "keys": 6,
        "item_bytes": 64,
        "steps": 60,
        "gpu_bytes": 128,
        "host_bytes": 256,
        "file_bytes": 4096,
    },
    "tier_fetch": {"fmt": "nvfp4", "n": 8, "k": 64},
    "offload_pass": {"mode": "train", "layers": 3, "width": 32, "tokens": 4, "gpu_bytes": 1 << 16},
    "decoder_block": {"family": "llama", "fmt": "nvfp4", "s": 8, "hidden": 64, "hq": 4, "hk": 2, "inner": 96},
    "int8_linear": {"m": 8, "n": 16, "k": 128},
    "svd": {"m": 12, "n": 9},
    "elementwise_chain": {"n": 64, "steps": 8},
    "train_step": {**MODEL},
    "generate": {**MODEL, "new": 3},
}


def spoil(want: Expected) -> torch.Tensor:
    """The answer of ``want`` with one element (the middle one) wrong by PLANTED budgets, or by its lowest bit."""
    exact = want.value if want.budget is None else want.value.to(want.dtype)
    wrong: torch.Tensor = exact.clone().contiguous()
    at = wrong.numel() // 2
    if want.budget is None:
        as_bytes(wrong)[at * wrong.element_size()] ^= 1
        return wrong
    value, budget = want.value.reshape(-1)[at], want.budget.reshape(-1)[at]
    wrong.view(-1)[at] = (value + PLANTED * budget).to(want.dtype)
    return wrong


def _plant(op: Op, case: dict[str, int | str]) -> None:
    @control(
        op,
        case,
        family="planted",
        oracle="value",
        fault="one element is off by twice its budget (one bit, where the operation is exact)",
        name=f"planted_{op.name}",
        returns=True,
        declares={"numerics": NUMERICS},
    )
    def planted(s: Setting) -> Mapping[str, Any]:
        expected: dict[str, Expected] = resolve(op.oracle)(s.case, dict(s.inputs), NUMERICS, None)
        outputs = {
            name: (want.value if want.budget is None else want.value.to(want.dtype)) for name, want in expected.items()
        }
        if s.wrong:
            name = next(n for n, want in expected.items() if want.value.numel())
            outputs[name] = spoil(expected[name])
        return outputs


for _name, _op in BY_NAME.items():
    _plant(_op, CASES[_name])

make = control.factory(BY_NAME)
CORPUS = Corpus("controls_planted", "an error of twice the budget", control.controls, "vbench.controls.planted:make")
