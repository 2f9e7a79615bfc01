"""The errors a user or a plug-in author can meet, each named for the mistake. Standard library only."""

from __future__ import annotations


class VbenchError(Exception):
    """Base of every error vbench raises on purpose."""


class UsageError(VbenchError):
    """The command line names something that does not exist, or options that do not fit together (exit code 2)."""


class DataError(VbenchError):
    """A results, claims or document file breaks a rule; the message names file, line and rule (exit code 2)."""


class CaseError(VbenchError):
    """A case names an unknown parameter, or gives one a value its operation does not admit."""


class Unsupported(VbenchError):
    """Raised by a capability check, before any launch, when a kernel does not take a case or an input.

    Only this type leads to the outcome UNSUPPORTED; the text of any other exception never does.

    Args:
        rule: short stable code, lower case with underscores, e.g. ``k_not_multiple_of_block``.
        message: which input, which rule, what to do.
    """

    def __init__(self, rule: str, message: str) -> None:
        super().__init__(f"{rule}: {message}")
        self.rule = rule
        self.message = message
