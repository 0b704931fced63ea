"""A small sketch: boxes, lines and words that become an SVG in a page, or part of a PNG.

The SVG has no background. On a dark page front.css turns its lightness round, as book.css does with all drawings.
Lengths are pixels, y runs downwards, and colours have their meaning from `pl.figures.ROLES`.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch, Polygon

INK = "#454b54"
Point = tuple[float, float]


@dataclass(frozen=True)
class Box:
    x: float
    y: float
    width: float
    height: float
    fill: str = "none"
    ink: str = INK
    round: float = 3

    def svg(self) -> str:
        place = f'x="{self.x:g}" y="{self.y:g}" width="{self.width:g}" height="{self.height:g}" rx="{self.round:g}"'
        return f'<rect {place} fill="{self.fill}" stroke="{self.ink}" stroke-width="1.2"/>'

    def draw(self, axes: Axes) -> None:
        style = f"round,pad=0,rounding_size={min(self.round, self.width / 2, self.height / 2)}"
        axes.add_patch(
            FancyBboxPatch(
                (self.x, self.y),
                self.width,
                self.height,
                boxstyle=style,
                linewidth=1.2,
                facecolor=self.fill,
                edgecolor=self.ink,
            )
        )


@dataclass(frozen=True)
class Line:
    points: Sequence[Point]
    ink: str = INK
    width: float = 1.6
    dashed: bool = False
    fill: str = "none"

    def svg(self) -> str:
        points = " ".join(f"{x:g},{y:g}" for x, y in self.points)
        dashes = ' stroke-dasharray="5 4"' if self.dashed else ""
        return (
            f'<polyline points="{points}" fill="{self.fill}" stroke="{self.ink}" stroke-width="{self.width:g}"'
            f' stroke-linecap="round" stroke-linejoin="round"{dashes}/>'
        )

    def draw(self, axes: Axes) -> None:
        if self.fill != "none":
            axes.add_patch(Polygon(list(self.points), facecolor=self.fill, edgecolor="none"))
        axes.plot(
            *zip(*self.points, strict=True),
            color=self.ink,
            linewidth=self.width,
            linestyle=(0, (4, 3)) if self.dashed else "-",
            solid_capstyle="round",
        )


@dataclass(frozen=True)
class Dot:
    x: float
    y: float
    radius: float
    fill: str
    ink: str = INK

    def svg(self) -> str:
        place = f'cx="{self.x:g}" cy="{self.y:g}" r="{self.radius:g}"'
        return f'<circle {place} fill="{self.fill}" stroke="{self.ink}" stroke-width="1.2"/>'

    def draw(self, axes: Axes) -> None:
        axes.plot(
            [self.x], [self.y], "o", markersize=2 * self.radius, color=self.fill, markeredgecolor=self.ink, zorder=3
        )


@dataclass(frozen=True)
class Words:
    x: float
    y: float  # of the line on which the letters stand
    text: str
    size: float = 15
    bold: bool = False
    anchor: str = "start"  # start, middle or end
    ink: str = "#1a1a1a"

    def svg(self) -> str:
        weight = ' font-weight="700"' if self.bold else ""
        return (
            f'<text x="{self.x:g}" y="{self.y:g}" font-size="{self.size:g}" text-anchor="{self.anchor}"'
            f'{weight} fill="{self.ink}">{html.escape(self.text)}</text>'
        )

    def draw(self, axes: Axes) -> None:
        place = {"start": "left", "middle": "center", "end": "right"}[self.anchor]
        axes.text(
            self.x,
            self.y,
            self.text,
            fontsize=0.72 * self.size,
            ha=place,
            va="baseline",
            color=self.ink,
            fontweight="bold" if self.bold else "normal",
        )


Shape = Box | Line | Dot | Words


def svg(shapes: Sequence[Shape], width: float, height: float, described: str = "") -> str:
    """Return the sketch as an SVG. One without a description is decoration, which screen readers pass over."""
    said = f'role="img" aria-label="{html.escape(described)}"' if described else 'aria-hidden="true"'
    drawn = "".join(shape.svg() for shape in shapes)
    size = f'width="{width:g}" height="{height:g}" viewBox="0 0 {width:g} {height:g}"'
    return f'<svg class="sketch" {size} {said} focusable="false">{drawn}</svg>'
