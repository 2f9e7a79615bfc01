"""The inputs and the oracle's answer of the last timed case, for the next variant of the same backend.

Timed cases are large: drawing one on the host and running the oracle takes seconds, and the plan times every variant of
a backend on a case before it goes on.
"""

from __future__ import annotations

from typing import Any

from vbench import check
from vbench.backend import Device
from vbench.spec import Case, Expected, Numerics, Op, resolve


def _fingerprint(t: Any) -> int:
    """A sum over the tensor's bytes, in words where they divide."""
    import torch

    flat = check.as_bytes(t)
    words = flat.view(torch.int32) if flat.numel() % 4 == 0 and flat.storage_offset() % 4 == 0 else flat
    return int(words.sum(dtype=torch.int64))


class LastDraw:
    """Keeps one case. A kernel may have written to its inputs since: they are drawn anew if their bytes changed."""

    def __init__(self, device: Device) -> None:
        self._device: Device = device
        self._of = ""
        self._inputs: dict[str, Any] = {}
        self._prints: dict[str, int] = {}
        self._expected: dict[tuple[Numerics, int | None], dict[str, Expected]] = {}

    def forget(self) -> None:
        """Free what is kept."""
        self._of = ""
        self._inputs, self._prints, self._expected = {}, {}, {}

    def take(
        self, op: Op, case: Case, numerics: Numerics, max_rows: int | None
    ) -> tuple[dict[str, Any], dict[str, Expected]]:
        """Inputs of ``case`` on the device, and what the oracle expects of kernels with ``numerics``.

        The dictionaries are the caller's own, the tensors in them are not. Only inputs that are all tensors are kept.
        """
        if self._of != case.id or not self._unchanged():
            self.forget()
            inputs = resolve(op.inputs)(case, self._device)
            expected = resolve(op.oracle)(case, inputs, numerics, max_rows)
            if not all(hasattr(t, "data_ptr") for t in inputs.values()):
                return inputs, expected
            self._inputs = dict(inputs)
            self._prints = {name: _fingerprint(t) for name, t in inputs.items()}
            self._expected = {(numerics, max_rows): expected}
            self._of = case.id
        key = numerics, max_rows
        if key not in self._expected:
            self._expected[key] = resolve(op.oracle)(case, self._inputs, numerics, max_rows)
        return dict(self._inputs), dict(self._expected[key])

    def _unchanged(self) -> bool:
        return all(_fingerprint(t) == self._prints[name] for name, t in self._inputs.items())
