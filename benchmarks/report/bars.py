"""Bar charts as SVG, the same bytes from the same numbers everywhere."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

OURS, GOOD, FAIR, BAD, OTHER = "#c8102e", "#5f8f6a", "#b98b3e", "#c8102e", "#4c6a92"
_BAR, _NUMBER, _CHARACTER = 130, 48, 7
"""Pixels of the longest bar, of the numbers behind, and of a character, which is rather less."""
_LINE, _ABOVE, _GAP = 16, 26, 14
"""Pixels of a bar's line, of a panel's title, and between panels."""


@dataclass(frozen=True)
class Bar:
    """A number with its text; without one (None) there is no bar, only the text."""

    label: str
    value: float | None
    text: str
    colour: str = OTHER


@dataclass(frozen=True)
class Panel:
    """Bars of one scale; ``mark`` is where a line is drawn through them."""

    title: str
    bars: Sequence[Bar]
    mark: float | None = None


def chart(title: str, rows: Mapping[str, Sequence[Panel]]) -> str:
    """Panels side by side, rows of them below each other, each with its name.

    The panels of a row have the same bars, whose labels stand on the left of the first.
    """
    panels = [panel for row in rows.values() for panel in row]
    left = _GAP + _wide([*rows, *(bar.label for panel in panels for bar in panel.bars)])
    step = _GAP + max(_BAR + _NUMBER, _wide([panel.title for panel in panels]))
    width = max(left + step * max(map(len, rows.values()), default=0), _wide([title]) + 2 * _GAP)
    lines = [_text(_GAP, 18, title, "start", 'font-size="13"')]
    top = 2 * _ABOVE
    for name, row in rows.items():
        lines.append(_text(left - 6, top - 8, name, "end", 'font-weight="bold"'))
        for number, panel in enumerate(row):
            lines += _panel(panel, left + number * step, top, labelled=number == 0)
        top += _LINE * max(len(panel.bars) for panel in row) + _ABOVE + _GAP
    height = top - _ABOVE
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
            f'viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="11">',
            f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
            *lines,
            "</svg>\n",
        ]
    )


def _panel(panel: Panel, left: int, top: int, *, labelled: bool) -> Iterator[str]:
    values = [bar.value for bar in panel.bars if bar.value is not None]
    scale = _BAR / (max([*values, panel.mark or 0.0]) or 1.0)
    yield _text(left, top - 8, panel.title, "start", 'font-weight="bold"')
    for number, bar in enumerate(panel.bars):
        y = top + number * _LINE
        if labelled:
            yield _text(left - 6, y + 11, bar.label, "end")
        if bar.value is not None:
            yield (
                f'<rect x="{left}" y="{y + 1}" width="{scale * bar.value:.1f}" '
                f'height="{_LINE - 3}" fill="{bar.colour}"/>'
            )
        yield _text(left + _BAR + 6, y + 11, bar.text, "start")
    if panel.mark is not None:
        x, bottom = left + scale * panel.mark, top + _LINE * len(panel.bars)
        yield (
            f'<line x1="{x:.1f}" y1="{top}" x2="{x:.1f}" y2="{bottom}" '
            'stroke="#333333" stroke-dasharray="3 2"/>'
        )


def _wide(texts: Sequence[str]) -> int:
    return _CHARACTER * max(map(len, texts), default=0)


def _text(x: int, y: int, text: str, anchor: str, more: str = "") -> str:
    place = f'x="{x}" y="{y}" text-anchor="{anchor}"'
    return f"<text {place}{' ' * bool(more)}{more}>{escape(text)}</text>"
