"""What can go wrong in a tier stack, each mistake by its own type. Standard library only."""

from __future__ import annotations

from vbench.errors import VbenchError


class TierError(VbenchError):
    """Base of every error the tier engine raises on purpose. The stack is unchanged unless it says otherwise."""


class TierFullError(TierError):
    """No level at or below the wanted one can hold the tensor, or it is larger than the stack was built for."""


class UnknownKeyError(TierError, KeyError):
    """The stack holds no tensor of this key."""

    def __str__(self) -> str:  # KeyError would show the repr of the message
        return str(self.args[0])


class TierIOError(TierError):
    """The file system refused (ENOSPC, EIO, EROFS, ...). ``__cause__`` is the OSError where there is one.

    Args:
        action: what was tried, e.g. ``rename``.
        path: on which file.
        reason: what the system said.
    """

    def __init__(self, action: str, path: str, reason: str) -> None:
        super().__init__(f"{action} {path}: {reason}")
        self.action = action
        self.path = path


class CorruptTensorError(TierError):
    """A file of the lowest level is not what was written. Never a value.

    Args:
        key: whose tensor, ``""`` where the file does not tell.
        path: which file.
        rule: stable code of the broken rule, e.g. ``payload_checksum``.
        expected, got: the two sides of the comparison, as text.
    """

    def __init__(self, key: str, path: str, rule: str, expected: object, got: object) -> None:
        super().__init__(f"{rule}: key {key!r} in {path}: expected {expected}, got {got}")
        self.key = key
        self.path = path
        self.rule = rule


class FolderBusyError(TierError):
    """Another open stack holds the folder's lock."""


class PinError(TierError):
    """The driver refused to page-lock the host slab; there is no silent fall-back to pageable memory."""


class BrokenStackError(TierError):
    """An earlier device or memory error left bytes in an unknown place; the stack refuses every further call."""
