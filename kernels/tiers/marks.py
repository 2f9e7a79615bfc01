"""Points in a stream's work that other streams or the host can wait for. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Mark:
    """A point in the work of one stream; later marks of a stream imply its earlier ones.

    Args:
        stream: which stream, any number unique among the streams in use.
        sequence: place in that stream's order.
        event: what the links wait on.
    """

    stream: int
    sequence: int
    event: Any


Marks = tuple[Mark, ...]


def join(*groups: Marks) -> Marks:
    """All the marks, only the latest of each stream."""
    latest: dict[int, Mark] = {}
    for marks in groups:
        for mark in marks:
            kept = latest.get(mark.stream)
            if kept is None or kept.sequence < mark.sequence:
                latest[mark.stream] = mark
    return tuple(latest.values())
