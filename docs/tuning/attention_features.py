"""``python docs/tuning/attention_features.py`` prints the generated part of docs/attention.md: feature by kernel.

Every cell is what a kernel's own capability check says on ``cuda``, asked without a launch and, here, without a GPU:
torch is made to say that there is one of compute capability 9.0. ``tests/test_attention_features.py`` holds the page to
it, and the test ids in the last column to the tests.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest import mock

from vbench.errors import Unsupported
from vbench.kernels.peers.sdpa import CAN_USE
from vbench.reference.ops.attention import ATTENTION, ATTENTION_BACKWARD
from vbench.reference.ops.attention_extended import ATTENTION_EXTENDED, ATTENTION_EXTENDED_BACKWARD
from vbench.spec import Case, resolve

PLAIN, EXTENDED = (ATTENTION, ATTENTION_BACKWARD), (ATTENTION_EXTENDED, ATTENTION_EXTENDED_BACKWARD)


@dataclass(frozen=True, slots=True)
class Column:
    """One kernel: its backend, and its variants in a forward and in a backward."""

    title: str
    backend: str
    forward: str
    backward: str
    deterministic: str = ""


COLUMNS = (
    Column("ours, plain", "vbench.kernels.triton.backend:BACKEND", "", ""),
    Column("ours, Gluon", "vbench.kernels.triton.backend:BACKEND", "gluon", "gluon", "gluon_deterministic"),
    *(
        Column(title, "vbench.kernels.peers.torch_native:BACKEND", variant, variant)
        for title, variant in (
            ("SDPA cuDNN", "sdpa_cudnn"),
            ("SDPA FA2", "sdpa_flash"),
            ("SDPA efficient", "sdpa_efficient"),
            ("SDPA math", "sdpa_math"),
        )
    ),
    Column("FlexAttention", "vbench.kernels.peers.flex_attention:BACKEND", "default", "default"),
    Column("FA3", "vbench.kernels.peers.flash_attn_3:BACKEND", "", "default", "deterministic"),
    Column("FA4", "vbench.kernels.peers.flash_attn_4:BACKEND", "", "default", "deterministic"),
)

_WIDE = "tests/test_triton_attention.py::test_awkward_shapes[dtypefp32-sq33-sk40-d256]"
_WITHIN = "tests/test_triton_attention.py::test_within_budget"
_BACKWARD = "tests/test_triton_attention_backward.py::test_within_budget"
_WIDE_BACKWARD = "tests/test_triton_attention_backward.py::test_awkward_shapes[dtypefp32-sq5-sk17-d256]"
_EXTENDED = "tests/test_attention_extended.py::test_triton_is_within_budget"


@dataclass(frozen=True, slots=True)
class Feature:
    """A row: what is set beside ``SHAPE``, and the tests that prove ours (forward, backward)."""

    title: str
    values: Mapping[str, int | str]
    proof: tuple[str, ...]


SHAPE: Mapping[str, int | str] = {"dtype": "bf16", "causal": "none", "hq": 4, "hk": 4, "sq": 128, "sk": 128, "d": 64}
FEATURES = (
    Feature("head dim 64", {}, (_WITHIN, _BACKWARD)),
    Feature("head dim 17", {"d": 17}, (_WITHIN, _BACKWARD)),
    Feature("head dim 256", {"d": 256}, (_WIDE, _WIDE_BACKWARD)),
    Feature("causal, top left, sq < sk", {"causal": "top_left", "sk": 256}, (_WITHIN, _BACKWARD)),
    Feature("causal, bottom right, sq < sk", {"causal": "bottom_right", "sk": 256}, (_WITHIN, _BACKWARD)),
    Feature("rows that see nothing", {"causal": "bottom_right", "sq": 256}, (_WITHIN, _BACKWARD)),
    Feature("grouped heads", {"hk": 2}, (_WITHIN, _BACKWARD)),
    Feature("window", {"causal": "bottom_right", "window": 40}, (_WITHIN, _BACKWARD)),
    Feature("softcap", {"softcap": 30}, (_WITHIN, _BACKWARD)),
    Feature("rows apart (strides)", {"layout": "padded"}, (_WITHIN, _BACKWARD)),
    Feature("float32", {"dtype": "fp32"}, (_WITHIN, _BACKWARD)),
    Feature("ALiBi", {"alibi": 1, "causal": "bottom_right"}, (_EXTENDED,)),
    Feature("additive mask", {"mask": "normal"}, (_EXTENDED,)),
    Feature("sinks", {"sinks": 1}, (_EXTENDED,)),
    Feature("packed sequences", {"packed": 3, "causal": "bottom_right"}, (_EXTENDED,)),
)
#: Of the backward alone, and of what a kernel declares.
LSE_GRADIENT = Feature(
    "lse differentiable", {"dlse": 1}, ("tests/test_attention_autograd.py::test_gradients_are_within_budget",)
)
LSE_OUT = (_WITHIN,)
DETERMINISTIC = ("tests/test_triton_attention_backward.py::test_law[two runs agree]",)


@contextmanager
def hopper() -> Iterator[None]:
    """As if torch had a device of compute capability 9.0 with an H200's shared memory."""
    import torch

    properties = SimpleNamespace(major=9, minor=0, multi_processor_count=132, shared_memory_per_block_optin=232448)
    with ExitStack() as stack:
        for name, value in (
            ("is_available", True),
            ("get_device_capability", (9, 0)),
            ("get_device_properties", properties),
            ("current_device", 0),
        ):
            stack.enter_context(mock.patch.object(torch.cuda, name, lambda *_, value=value: value))
        yield


def kernel(column: Column, case: Case, variant: str) -> Any:
    """The kernel, or the ``Unsupported`` it raises."""
    factory: Callable[..., Any] = resolve(resolve(column.backend).ops[case.op])
    try:
        return factory(case, variant, "cuda")
    except Unsupported as refusal:
        return refusal


def _extended(feature: Feature) -> bool:
    return bool({"alibi", "mask", "sinks", "packed"} & set(feature.values))


def cases(feature: Feature) -> tuple[Case, Case]:
    """Of the forward and of the backward."""
    values: dict[str, Any] = {**SHAPE, **feature.values}
    forward, backward = EXTENDED if _extended(feature) else PLAIN
    return forward.case(**{k: v for k, v in values.items() if k != "dlse"}), backward.case(**values)


def word(column: Column, found: Any) -> str:
    """A rule, ``yes``, or ``asked`` of a kernel that asks torch about the very tensors in ``bind``, on a GPU."""
    if isinstance(found, Unsupported):
        return f"`{found.rule}`"
    return "asked" if column.forward in CAN_USE else "yes"


def cell(column: Column, feature: Feature) -> str:
    """``yes``, or a rule; forward and backward apart where they differ."""
    forward, backward = cases(feature)
    words = tuple(
        word(column, kernel(column, case, variant))
        for case, variant in ((forward, column.forward), (backward, column.backward))
    )
    return words[0] if words[0] == words[1] else " / ".join(words)


def declared(column: Column) -> tuple[str, str, str]:
    """(lse differentiable, lse given, deterministic backward)."""
    plain = Feature("", {}, ())
    forward, backward = cases(plain)
    gradient = word(column, kernel(column, cases(LSE_GRADIENT)[1], column.backward))
    given = "yes" if "lse" in kernel(column, forward, column.forward).produces else "no"
    for variant in (column.backward, column.deterministic):
        found = kernel(column, backward, variant) if variant or column.backward == variant else None
        if found is not None and found.deterministic:
            return gradient, given, f"yes, `{variant}`" if variant != column.backward else "yes"
    return gradient, given, "no"


def to_markdown() -> str:
    """The table."""
    head = ["feature", *(column.title for column in COLUMNS), "ours proven by"]
    rows = [head, ["---"] * len(head)]
    with hopper():
        for feature in FEATURES:
            rows.append([feature.title, *(cell(column, feature) for column in COLUMNS), _ids(feature.proof)])
        of_columns = [declared(column) for column in COLUMNS]
    titles = (
        (LSE_GRADIENT.title, LSE_GRADIENT.proof),
        ("lse given", LSE_OUT),
        ("deterministic backward", DETERMINISTIC),
    )
    for at, (title, proof) in enumerate(titles):
        rows.append([title, *(some[at] for some in of_columns), _ids(proof)])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n"


def _ids(proof: tuple[str, ...]) -> str:
    return "<br>".join(f"`{test}`" for test in proof)


if __name__ == "__main__":
    print("## Generated\n")
    print(to_markdown(), end="")
