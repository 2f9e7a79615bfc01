"""What can go wrong in training, beside bad input (``UsageError``, ``DataError``: exit code 2)."""

from __future__ import annotations

from vbench.errors import DataError, VbenchError


class TrainingError(VbenchError):
    """Training cannot go on: a loss that is no number, no room for a checkpoint, no memory (exit code 1)."""


class CheckpointError(DataError):
    """A checkpoint is torn, altered, or of another model.

    Args:
        path: the file.
        rule: short stable code.
        message: what is wrong, and what to do.
    """

    def __init__(self, path: object, rule: str, message: str) -> None:
        super().__init__(f"{path}: {rule}: {message}")
        self.rule = rule
