"""Plots as numbers for inline SVG: where each point, tick and line lies. Pure; standard library only."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

WIDTH, HEIGHT = 540, 330
LEFT, RIGHT, TOP, BOTTOM = 64, WIDTH - 14, 32, HEIGHT - 46


@dataclass(frozen=True, slots=True)
class Point:
    """One value: data coordinates, an interval of y where there is one, the record it leads to, and its words."""

    x: float
    y: float
    record: str
    text: str
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, slots=True)
class Series:
    """Points of one name, joined by a line where ``joined``."""

    name: str
    points: Sequence[Point]
    joined: bool = False


@dataclass(frozen=True, slots=True)
class Limit:
    """A dashed line through data coordinates, in order of x."""

    name: str
    points: Sequence[tuple[float, float]]


@dataclass(frozen=True, slots=True)
class Tick:
    """A position on an axis in pixels with its words."""

    at: float
    text: str


@dataclass(frozen=True, slots=True)
class Plot:
    """All that the template draws; positions in pixels."""

    title: str
    x_label: str
    y_label: str
    x_ticks: Sequence[Tick]
    y_ticks: Sequence[Tick]
    series: Sequence[dict[str, Any]]
    limits: Sequence[dict[str, Any]] = field(default_factory=tuple)
    width: int = WIDTH
    height: int = HEIGHT
    left: int = LEFT
    right: int = RIGHT
    top: int = TOP
    bottom: int = BOTTOM


def plain(value: float) -> str:
    """A tick's words: 3 digits with a prefix."""
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"), (1.0, ""), (1e-3, "m"), (1e-6, "µ")):
        if abs(value) >= factor * 0.9995:
            return f"{value / factor:.3g}{prefix}"
    return f"{value / 1e-9:.3g}n" if value else "0"


def log_ticks(low: float, high: float) -> list[float]:
    """Values to mark on a logarithmic axis: powers of ten, with 2 and 5 between where there are few."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    step = max(1, len(decades) // 7)
    steps: tuple[float, ...] = (1, 2, 5) if len(decades) <= 3 else (1,)
    if high < 6 * low:
        steps = (1, 1.5, 2, 2.5, 3, 4, 5, 6, 8)
    found = [m * 10.0**d for d in decades if d % step == 0 for m in steps]
    return [v for v in found if low * 0.999 <= v <= high * 1.001]


def build(
    title: str,
    x_label: str,
    y_label: str,
    series: Sequence[Series],
    *,
    limits: Sequence[Limit] = (),
    places: int | None = None,
    y_words: Callable[[float], str] = plain,
    marked: Sequence[float] = (),
    colour: Callable[[str], int],
) -> Plot:
    """Lay out a plot with logarithmic axes, or with places on x.

    Args:
        series: at least one point in all, values above zero.
        places: x counts places 0, 1, ... below this, without words; a logarithmic axis where ``None``.
        y_words: of a tick.
        marked: where the logarithmic x axis is to have its ticks; round numbers where none are given.
        colour: number of a series' colour.
    """
    points = [p for s in series for p in s.points]
    lines = [p for limit in limits for p in limit.points]
    ys = [v for p in points for v in (p.y, p.low, p.high) if v is not None] + [y for _, y in lines]
    y_low, y_high = min(ys) / 1.15, max(ys) * 1.15
    if places is None:
        xs = [p.x for p in points] + [x for x, _ in lines]
        x_low, x_high = min(xs) / 1.15, max(xs) * 1.15

        def x_of(value: float) -> float:
            return LEFT + (RIGHT - LEFT) * math.log(value / x_low) / math.log(x_high / x_low)

        words = "{:g}".format if marked else plain
        x_ticks = [Tick(round(x_of(v), 1), words(v)) for v in marked or log_ticks(x_low, x_high)]
    else:

        def x_of(value: float) -> float:
            return LEFT + (RIGHT - LEFT) * (value + 0.5) / places

        x_ticks = [Tick(round(x_of(i), 1), "") for i in range(places)]

    def y_of(value: float) -> float:
        return BOTTOM - (BOTTOM - TOP) * math.log(value / y_low) / math.log(y_high / y_low)

    def place(p: Point) -> dict[str, Any]:
        ends = (None, None) if p.low is None or p.high is None else (round(y_of(p.low), 1), round(y_of(p.high), 1))
        return {
            "x": round(x_of(p.x), 1),
            "y": round(y_of(p.y), 1),
            "low": ends[0],
            "high": ends[1],
            "record": p.record,
            "text": p.text,
        }

    drawn = []
    for s in series:
        placed = [place(p) for p in sorted(s.points, key=lambda p: p.x)]
        path = " ".join(f"{p['x']},{p['y']}" for p in placed) if s.joined and len(placed) > 1 else ""
        drawn.append({"name": s.name, "colour": colour(s.name), "points": placed, "path": path})
    shown = []
    for limit in limits:
        ends_px = [(round(x_of(x), 1), round(y_of(y), 1)) for x, y in limit.points]
        at = ends_px[-1]
        shown.append(
            {"name": limit.name, "points": " ".join(f"{x},{y}" for x, y in ends_px), "x": at[0], "y": at[1] - 5}
        )
    y_ticks = [Tick(round(y_of(v), 1), y_words(v)) for v in log_ticks(y_low, y_high)]
    return Plot(title, x_label, y_label, x_ticks, y_ticks, drawn, shown)
