"""Ratios as a picture that documents show: one small SVG file. Pure; standard library only.

A file of its own, since Markdown renderers take no inline SVG; so it brings its own colours for light and dark, and
nothing in it is fetched or moves. The same values always give the same bytes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from vbench.plots import BOTTOM, LEFT, RIGHT, TOP, Limit, Point, Series, Tick, build, log_ticks

#: Okabe & Ito (2008), chosen for the colour-blind; dark enough, or light enough, for either background.
COLOURS = (
    ("#0072b2", "#56b4e9"),
    ("#c04f00", "#e69f00"),
    ("#00795a", "#2fc398"),
    ("#a3487f", "#cc79a7"),
    ("#5c666f", "#9aa4ac"),
)
_CHARACTER_PX = 6.4  # width of a character of 11 px type, on average and a little more
_LINE_PX = 17


@dataclass(frozen=True, slots=True)
class Mark:
    """One value of a picture, or the word that stands in its place.

    Args:
        label: what it is a value of.
        x: where it lies, for lines.
        value, low, high: a ratio and the ends of its interval; ``None`` for a gap.
        word: what a gap is called: ``STALE``, ``NOT_RUN``, ``no record``.
        text: the value in words, as tables print it.
    """

    label: str
    x: float
    value: float | None = None
    low: float | None = None
    high: float | None = None
    word: str = ""
    text: str = ""


@dataclass(frozen=True, slots=True)
class Group:
    """Marks of one name."""

    name: str
    marks: Sequence[Mark]


def alternative(groups: Sequence[Group], head: str) -> str:
    """The picture in words, for who does not see it: each group's ends, and how many values are missing and why."""
    parts = []
    for group in groups:
        shown = [m for m in group.marks if m.value is not None]
        gaps: dict[str, int] = {}
        for mark in group.marks:
            if mark.value is None:
                gaps[mark.word] = gaps.get(mark.word, 0) + 1
        said = [f"{m.text} at {m.label}" for m in (shown if len(shown) < 3 else (shown[0], shown[-1]))]
        said = [" to ".join(said) if len(shown) >= 3 else " and ".join(said)] if said else []
        said += [f"{number} x {word}" for word, number in gaps.items()]
        parts.append(f"{group.name}: {', '.join(said) or 'nothing'}")
    return f"{head}. {'; '.join(parts)}."


def draw_lines(groups: Sequence[Group], x_label: str, y_label: str, alt: str) -> str:
    """One line a group over a logarithmic axis; a gap interrupts it and is named at the foot."""
    pieces: list[Series] = []
    colours: dict[str, int] = {}
    for number, group in enumerate(groups):
        colours[group.name] = number
        piece: list[Point] = []
        for mark in sorted(group.marks, key=lambda m: m.x):
            if mark.value is None:
                pieces.append(Series(group.name, piece, joined=True))
                piece = []
            else:
                words = f"{group.name}, {mark.label}: {mark.text}"
                piece.append(Point(mark.x, mark.value, "", words, mark.low, mark.high))
        pieces.append(Series(group.name, piece, joined=True))
    every = [m for g in groups for m in g.marks]
    where = sorted({m.x for m in every})
    ends = (where[0], max(where[-1], where[0] * 1.01))
    shown = [s for s in pieces if s.points]
    if not shown:
        # Axes without a value on them: the words below say why.
        shown = [Series("", [Point(x, 1.0, "", "") for x in ends])]
    plot = build(
        "",
        x_label,
        y_label,
        shown,
        limits=[Limit("", [(x, 1.0) for x in ends])],
        y_words=lambda v: f"{v:g}x",
        marked=where,
        colour=lambda name: colours.get(name, 0) % len(COLOURS),
    )
    body = _axes(plot.x_ticks, plot.y_ticks, LEFT, RIGHT, TOP, BOTTOM)
    body += [_text((LEFT + RIGHT) / 2, plot.height - 8, x_label, "middle"), _text(LEFT, TOP - 12, y_label, "start")]
    body += [f'<polyline class="limit" points="{limit["points"]}"/>' for limit in plot.limits]
    at = {tick_x: tick.at for tick_x, tick in zip(where, plot.x_ticks, strict=True)}
    for x in where:
        gaps = sorted({m.word for m in every if m.x == x and m.value is None})
        body += [_text(at[x], BOTTOM - 5 - 12 * i, word, "middle", "gap") for i, word in enumerate(gaps)]
    for series in plot.series:
        if not series["name"]:
            continue
        body.append(f'<g class="c{series["colour"]}">')
        if series["path"]:
            body.append(f'<polyline class="line" points="{series["path"]}"/>')
        for p in series["points"]:
            if p["low"] is not None:
                body.append(f'<line class="line" x1="{p["x"]}" x2="{p["x"]}" y1="{p["low"]}" y2="{p["high"]}"/>')
            body.append(f'<circle cx="{p["x"]}" cy="{p["y"]}" r="3.2"><title>{escape(p["text"])}</title></circle>')
        body.append("</g>")
    height = plot.height + 6
    x = float(LEFT)
    for name, number in colours.items():
        if x > LEFT and x + 16 + len(name) * _CHARACTER_PX > RIGHT:
            x, height = float(LEFT), height + _LINE_PX
        body.append(f'<rect class="c{number % len(COLOURS)}" x="{x:.1f}" y="{height - 5}" width="10" height="10"/>')
        body.append(_text(x + 15, height + 4, name, "start", "name"))
        x += 15 + len(name) * _CHARACTER_PX + 16
    return _document(plot.width, height + 12, body, alt)


def draw_rows(groups: Sequence[Group], x_label: str, alt: str) -> str:
    """One row a mark, each with its interval and value, under its group's name; a gap is a word."""
    every = [m for g in groups for m in g.marks]
    ends = [v for m in every for v in (m.value, m.low, m.high) if v is not None] + [1.0]
    low, high = min(ends) / 1.08, max(ends) * 1.08
    width = 640
    left = 24 + math.ceil(max(len(m.label) for m in every) * _CHARACTER_PX)
    right = width - 20 - math.ceil(max(len(m.text or m.word) for m in every) * _CHARACTER_PX)
    top = 30

    def x_of(value: float) -> float:
        return round(left + (right - left) * math.log(value / low) / math.log(high / low), 1)

    body: list[str] = []
    y = top + 4
    for number, group in enumerate(groups):
        y += _LINE_PX
        body.append(_text(8, y, group.name, "start", "name"))
        body.append(f'<g class="c{number % len(COLOURS)}">')
        for mark in group.marks:
            y += _LINE_PX
            body.append(_text(20, y, mark.label, "start"))
            if mark.value is None or mark.low is None or mark.high is None:
                body.append(_text(width - 8, y, mark.word, "end", "gap"))
                continue
            middle = y - 4
            body.append(
                f'<line class="line" x1="{x_of(mark.low)}" x2="{x_of(mark.high)}" y1="{middle}" y2="{middle}"/>'
            )
            body.append(f'<circle cx="{x_of(mark.value)}" cy="{middle}" r="3.6"/>')
            body.append(_text(width - 8, y, mark.text, "end", "name"))
        body.append("</g>")
        y += 5
    bottom = y + 6
    axis = []
    for value in log_ticks(low, high):
        at = x_of(value)
        axis.append(f'<line class="axis" x1="{at}" x2="{at}" y1="{top}" y2="{bottom}"/>')
        axis.append(_text(at, bottom + 14, f"{value:g}x", "middle"))
    axis.append(f'<line class="limit" x1="{x_of(1.0)}" x2="{x_of(1.0)}" y1="{top}" y2="{bottom}"/>')
    axis.append(_text(8, 18, x_label, "start"))
    return _document(width, bottom + 24, axis + body, alt)


def _axes(x_ticks: Sequence[Tick], y_ticks: Sequence[Tick], left: int, right: int, top: int, bottom: int) -> list[str]:
    found = []
    for t in x_ticks:
        found.append(f'<line class="axis" x1="{t.at}" x2="{t.at}" y1="{top}" y2="{bottom}"/>')
        found.append(_text(t.at, bottom + 16, t.text, "middle"))
    for t in y_ticks:
        found.append(f'<line class="axis" x1="{left}" x2="{right}" y1="{t.at}" y2="{t.at}"/>')
        found.append(_text(left - 6, t.at + 4, t.text, "end"))
    return found


def _text(x: float, y: float, words: str, anchor: str, kind: str = "") -> str:
    named = f' class="{kind}"' if kind else ""
    return f'<text{named} x="{x:g}" y="{y:g}" text-anchor="{anchor}">{escape(words)}</text>'


def _style() -> str:
    light = "".join(f".c{i}{{color:{c[0]}}}" for i, c in enumerate(COLOURS))
    dark = "".join(f".c{i}{{color:{c[1]}}}" for i, c in enumerate(COLOURS))
    return (
        "svg{font:11px system-ui,sans-serif}.paper{fill:#fff}text{fill:#5c666f}.name{fill:#1c2126}.gap{fill:#5c666f;"
        "font-style:italic}.axis{stroke:#d5dade}.limit{stroke:#5c666f;stroke-dasharray:5 4;fill:none}"
        ".line{stroke:currentColor;fill:none;stroke-width:1.6}circle,rect{fill:currentColor}" + light + "@media"
        "(prefers-color-scheme:dark){.paper{fill:#15191c}text,.gap{fill:#9aa4ac}.name{fill:#e3e6e8}.axis{stroke:#3a4249}"
        ".limit{stroke:#9aa4ac}" + dark + "}"
    )


def _document(width: int, height: int, body: Sequence[str], alt: str) -> str:
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
    return "\n".join(
        [
            f'{head} role="img" aria-labelledby="alt">',
            f'<title id="alt">{escape(alt)}</title>',
            f"<style>{_style()}</style>",
            f'<rect class="paper" width="{width}" height="{height}"/>',
            *body,
            "</svg>\n",
        ]
    )
