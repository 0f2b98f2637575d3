"""Charts as SVG text: an axis, marks, labels, and links from the marks to what is behind them."""

import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

import numpy as np

CSS = (Path(__file__).parent / "charts.css").read_text(encoding="utf-8")
COLOURS = 8  # of charts.css: c0 to c7

# What would not be seen, would turn the text around it, or is not allowed in XML and UTF-8.
UNSEEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff"
    "\ufff0-\ufffb\ufffe\uffff\ud800-\udfff]"
)


def visible(text: object) -> str:
    """The text with control characters, right-to-left marks and lone surrogates by their names."""

    def name(match: re.Match) -> str:
        code = ord(match[0])
        return chr(0x2400 + code) if code < 32 else f"\u27e8U+{code:04X}\u27e9"

    return UNSEEN.sub(name, str(text))


def short(text: object, most: int = 60) -> str:
    """The text on one line, cut where it is longer than so many characters."""
    line = " ".join(visible(str(text)[: 4 * most]).split())
    return line if len(line) <= most else line[: most - 1] + "…"


@dataclass(frozen=True)
class Axis:
    """From low to high, on a logarithmic scale where asked for; style is that of its numbers."""

    low: float
    high: float
    label: str = ""
    style: str = "{:g}"
    log: bool = False

    def place(self, value: float) -> float:
        """0 at low, 1 at high; what lies outside is put at the end."""
        low, high, value = self.low, self.high, min(max(value, self.low), self.high)
        if self.log:
            low, high, value = map(math.log10, (low, high, value))
        return (value - low) / (high - low)

    def ticks(self) -> list[float]:
        """About five round numbers, whole ones where they are shown as such; or powers of ten."""
        if self.log:
            powers = range(math.ceil(math.log10(self.low)), math.floor(math.log10(self.high)) + 1)
            return [10.0**power for power in powers]
        rough = max((self.high - self.low) / 5, self.style == "{:.0f}")
        step = 10 ** math.floor(math.log10(rough))
        step *= next(times for times in (1, 2, 2.5, 5, 10) if times * step >= 0.999 * rough)
        first = math.ceil(self.low / step - 1e-9)
        return [round(i * step, 12) for i in range(first, math.floor(self.high / step + 1e-9) + 1)]


def around(values: Sequence[float], label: str = "", style: str = "{:g}", **more: float) -> Axis:
    """An axis that holds all values with a little room; more: low or high, where they are fixed."""
    low, high = more.get("low", min(values)), more.get("high", max(values))
    room = (high - low) * 0.06 or abs(high) * 0.1 or 1.0
    low = more.get("low", low - room)
    return Axis(low, more.get("high", high + room), label, style)


class Chart:
    """One picture, made of SVG parts; name is that of its file."""

    def __init__(
        self, name: str, title: str, about: str, x: Axis, y: Axis | None, height: int = 240
    ):
        """y None: no axis, places from 0 at the bottom to 1. about: what a screen reader says."""
        self.name, self.title, self.about = name, title, about
        self.x, self.y = x, y or Axis(0, 1)
        self.width, self.height = 640, height
        self.left, self.right, self.top, self.bottom = 62 if y else 12, 12, 26, 38
        self.parts: list[str] = []
        self.fixed: list[str] = []  # parts that lie outside the axes
        self.links = 0
        self.has_y = y is not None

    def at(self, x: float, y: float) -> tuple[float, float]:
        """Where a point of the axes lies, in pixels."""
        across, down = self.width - self.left - self.right, self.height - self.top - self.bottom
        return (
            round(self.left + across * self.x.place(x), 1),
            round(self.top + down * (1 - self.y.place(y)), 1),
        )

    def line(self, points: Sequence[tuple[float, float]], look: str) -> None:
        """look: classes of charts.css, such as 'line c0'."""
        path = "L".join(f"{px} {py}" for px, py in (self.at(*point) for point in points))
        self.parts.append(f'<path class="{look}" d="M{path}"/>')

    def segments(self, pairs: Sequence[Sequence[tuple[float, float]]], look: str) -> None:
        """Lines from point to point, that hang together or not, as one path."""
        ends = (
            " ".join(f"{x} {y}" for x, y in (self.at(*point) for point in pair)) for pair in pairs
        )
        self.parts.append(f'<path class="{look}" d="{"".join(f"M{pair}" for pair in ends)}"/>')

    def area(self, points: Sequence[tuple[float, float, float]], look: str) -> None:
        """Filled between y's low and high: points (x, low, high)."""
        around = [(x, high) for x, _, high in points] + [(x, low) for x, low, _ in points[::-1]]
        self.line(around, f"area {look}")

    def cells(self, places: Sequence[tuple[float, float]], look: str, depth: float) -> None:
        """Squares of side 1 around the places, all filled to the same depth, from 0 to 1."""
        corners = [(self.at(x - 0.5, y + 0.5), self.at(x + 0.5, y - 0.5)) for x, y in places]
        path = "".join(f"M{x0} {y0}H{x1}V{y1}H{x0}z" for (x0, y0), (x1, y1) in corners)
        self.parts.append(f'<path class="cell {look}" fill-opacity="{depth}" d="{path}"/>')

    def mark(
        self, x: float, y: float, look: str, tip: str, href: str = "", radius: float = 4
    ) -> None:
        """A dot or a ring; tip: what it says when it is pointed at."""
        (px, py), tip = self.at(x, y), escape(short(tip, 200))
        circle = f'<circle class="{look}" cx="{px}" cy="{py}" r="{radius}">'
        circle += f"<title>{tip}</title></circle>"
        if href:
            self.links += 1
            circle = f'<a href="{escape(href)}" aria-label="{tip}">{circle}</a>'
        self.parts.append(circle)

    def text(
        self, x: float, y: float, said: str, look: str = "", anchor: str = "start", dx: float = 0
    ) -> None:
        px, py = self.at(x, y)
        where = f'x="{px + dx:.1f}" y="{py + 4:.1f}" text-anchor="{anchor}"'
        self.parts.append(f'<text class="{look}" {where}>{escape(visible(said))}</text>')

    def legend(self, labels: Sequence[tuple[str, str]]) -> None:
        """Pairs (label, look of its dot) under the title, in as many lines as they need."""
        px, py = self.left, 32
        for label, look in labels:
            wide = 7 * len(label) + 26  # about, for the fonts that there are
            if px + wide > self.width and px > self.left:
                px, py = self.left, py + 17
            dot = f'<circle class="dot {look}" cx="{px + 5}" cy="{py - 4}" r="4"/>'
            said = f'<text x="{px + 13}" y="{py}">{escape(visible(label))}</text>'
            self.fixed.append(dot + said)
            px += wide
        self.height += py + 12 - self.top
        self.top = py + 12

    def axes(self) -> str:
        parts, bottom = [], self.height - self.bottom
        for value in self.x.ticks():
            px, _ = self.at(value, self.y.low)
            parts.append(f'<path class="grid" d="M{px} {self.top}V{bottom}"/>')
            said = self.x.style.format(value)
            anchor = "end" if px > self.width - 30 else "middle"
            where = f'x="{px}" y="{bottom + 15}" text-anchor="{anchor}"'
            parts.append(f'<text class="soft" {where}>{said}</text>')
        for value in self.y.ticks() if self.has_y else ():
            _, py = self.at(self.x.low, value)
            parts.append(f'<path class="grid" d="M{self.left} {py}H{self.width - self.right}"/>')
            said = self.y.style.format(value)
            where = f'x="{self.left - 6}" y="{py + 4}" text-anchor="end"'
            parts.append(f'<text class="soft" {where}>{said}</text>')
        middle = (self.left + self.width - self.right) / 2
        where = f'x="{middle}" y="{self.height - 6}" text-anchor="middle"'
        parts.append(f'<text class="soft" {where}>{escape(visible(self.x.label))}</text>')
        where = f'class="title" x="{self.left}" y="15"'
        title = f"<text {where}>{escape(visible(self.title))}</text>"
        return title + "".join(self.fixed + parts)

    def svg(self, alone: bool = False) -> str:
        """As a part of the page, or alone as a file, which brings its style and links nowhere."""
        body = "".join(self.parts)
        if alone:
            body = f"<style>{CSS}</style>" + re.sub(r"</?a\b[^>]*>", "", body)
        elif self.links > 60:  # too many to walk through with the tab key: the records are a list
            body = body.replace("<a ", '<a tabindex="-1" ')
        role = "group" if self.links and not alone else "img"
        name, about = escape(visible(self.title)), escape(visible(self.about))
        space = ' xmlns="http://www.w3.org/2000/svg"' if alone else ""
        head = f'<svg{space} viewBox="0 0 {self.width} {self.height}" role="{role}"'
        head += f' aria-label="{name}"><title>{name}</title><desc>{about}</desc>'
        return f"{head}{self.axes()}{body}</svg>"


def contours(values: np.ndarray, level: float) -> list[list[tuple[float, float]]]:
    """Segments where a grid of values [rows, columns] crosses the level, as (column, row) pairs.

    Marching squares: in each cell the crossings of its four edges, linearly between the corners;
    where there are four, they are joined in the edges' order.
    """
    found, (rows, columns) = [], values.shape
    for r in range(rows - 1):
        for c in range(columns - 1):
            corners = [(c, r), (c + 1, r), (c + 1, r + 1), (c, r + 1), (c, r)]
            crossings = []
            for (x0, y0), (x1, y1) in itertools.pairwise(corners):
                a, b = values[y0, x0] - level, values[y1, x1] - level
                if (a < 0) != (b < 0):
                    share = a / (a - b)
                    crossings.append((x0 + share * (x1 - x0), y0 + share * (y1 - y0)))
            found += [crossings[i : i + 2] for i in range(0, len(crossings), 2)]
    return found
