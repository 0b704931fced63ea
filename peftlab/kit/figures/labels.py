"""Names on lines instead of legends, and ticks that a reader can read."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence

import numpy
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.text import Annotation
from matplotlib.ticker import MaxNLocator

from peftlab.kit.figures.style import SMALLEST

GAP = 7  # points from a line's point to its name
MARK = 7  # pixels from a marker's middle to its rim
ROOM = 3  # pixels to keep free around a name
TOLERATED = 2.0  # how much of its own line a name may cover; for more there is a legend
# Where a name may stand beside a point: the alignments, and the offset in units of GAP.
SIDES = (("left", "center", 1, 0), ("center", "bottom", 0, 1), ("center", "top", 0, -1), ("right", "center", -1, 0),
         ("left", "bottom", 0.7, 0.7), ("left", "top", 0.7, -0.7), ("right", "bottom", -0.7, 0.7),
         ("right", "top", -0.7, -0.7))  # fmt: skip

# Where a name may stand beside a horizontal line: the end of the axes, the alignments, and points up or down.
ENDS = ((1, "right", "bottom", 1), (0.01, "left", "bottom", 1), (1, "right", "top", -1), (0.01, "left", "top", -1))

Line = tuple[str, Sequence[float], Sequence[float], str]  # name, xs, ys, colour
Box = tuple[float, ...]  # left, bottom, right, top, in pixels


def is_plain(value: float) -> bool:
    return value == 0 or 1e-4 <= abs(value) < 1e6


def plain(value: float, powers: bool = False) -> str:
    """Write a number for a tick: 0.02, 4,096, or 3·10⁻⁵ for a small or a very large one, and with `powers` for all."""
    if is_plain(value) and not powers:
        return f"{value:,.6g}"
    power = math.floor(math.log10(abs(value)) + 1e-9)
    factor = f"{value / 10**power:.3g}"
    return f"$10^{{{power}}}$" if factor == "1" else f"${factor}\\cdot10^{{{power}}}$"


def log_ticks(axis: Axis) -> None:
    """Put ticks of a logarithmic axis at 1, 2 and 5 times a power of ten, or at powers of ten if that is enough."""
    low, high = sorted(axis.get_view_interval())
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 5, 7)):
        ticks = [factor * 10.0**power for power in powers for factor in factors]
        ticks = [tick for tick in ticks if low * (1 - 1e-9) <= tick <= high * (1 + 1e-9)]
        if len(ticks) >= 3:
            break
    if len(ticks) < 2:  # the numbers are close together
        ticks = [tick for tick in MaxNLocator(4).tick_values(low, high) if low <= tick <= high]
    set_ticks(axis, ticks[:: 1 + len(ticks) // 9])


def set_ticks(axis: Axis, values: Sequence[float]) -> None:
    """Put ticks at these values, written as plain numbers, and no others."""
    low, high = axis.get_view_interval()
    powers = not all(map(is_plain, values))
    axis.set_ticks(list(values), labels=[plain(value, powers) for value in values])
    axis.set_ticks([], minor=True)
    axis.set_view_interval(low, high, ignore=True)


def measured_ticks(axis: Axis, values: Iterable[float]) -> None:
    """Put ticks of a logarithmic axis at the values measured, if their numbers fit side by side."""
    places = sorted(set(values))
    low, high = (math.log(end) for end in sorted(axis.get_view_interval()))
    share = [(math.log(b) - math.log(a)) / (high - low) for a, b in itertools.pairwise(places)]
    wide = max(len(plain(value).replace("\\cdot", "·").replace("{", "").replace("}", "")) for value in places)
    if len(places) > 1 and min(share) * 48 < wide + 1:  # about 48 characters fit below the axes
        log_ticks(axis)
    else:
        set_ticks(axis, places)


def name_reference(figure: Figure, axes: Axes, name: str, value: float, lines: Sequence[Line]) -> Annotation:
    """Write the name of a horizontal line above or below one of its ends, where it covers least of the other lines."""
    text = axes.annotate(name, (1, value), (0, 0), xycoords=("axes fraction", "data"), textcoords="offset points",
                         fontsize=SMALLEST)
    figure.draw_without_rendering()
    covered = numpy.concatenate([numpy.empty((0, 2)), *(_on_screen(axes, xs, ys) for _, xs, ys, _ in lines)])

    def place(end: tuple[float, str, str, float]) -> int:
        across, beside, up, move = end
        text.xy = (across, value)
        text.set(ha=beside, va=up, position=(0, move))
        return _inside(tuple(text.get_window_extent().extents), covered)

    place(min(ENDS, key=place))
    return text


def name_lines(figure: Figure, axes: Axes, lines: Sequence[Line], obstacles: Sequence[Annotation] = ()) -> bool:
    """Write each line's name beside it, where it covers nothing.

    Args:
        lines: (name, xs, ys, colour) of each.
        obstacles: texts that are there already.

    Returns:
        False, with nothing written, if the names do not fit. Then a legend is needed.
    """
    figure.draw_without_rendering()
    drawn = [_on_screen(axes, xs, ys) for _, xs, ys, _ in lines]
    bars = [bar for found in axes.collections if isinstance(found, LineCollection) for bar in found.get_segments()]
    around = numpy.concatenate([numpy.empty((0, 2)), *(_on_screen(axes, *numpy.transpose(bar)) for bar in bars)])
    taken: list[Box] = [tuple(text.get_window_extent().extents) for text in obstacles]
    written: list[Annotation] = []
    for number, line in enumerate(lines):
        name, xs, ys, colour = line
        text = axes.annotate(name, (xs[-1], ys[-1]), xytext=(0, 0), textcoords="offset points", fontsize=SMALLEST,
                             color=colour, path_effects=[withStroke(linewidth=3, foreground="white")])
        text.set_in_layout(False)  # it stays inside the axes
        written.append(text)
        others = numpy.concatenate([around, *(points for i, points in enumerate(drawn) if i != number)])
        box = _place(axes, text, _candidates(line, drawn[number], axes), drawn[number], others, taken)
        if box is None:
            for text in written:
                text.remove()
            return False
        taken.append(box)
    return True


def name_points(figure: Figure, axes: Axes, points: Sequence[tuple[str, float, float, str]]) -> None:
    """Write the name of each point near it. A name that finds its place only farther away has a thin line to its point.

    Args:
        points: (name, x, y, colour) of each. Call this once the axes have their limits.
    """
    figure.draw_without_rendering()
    scale, frame = figure.dpi / 72, axes.get_window_extent()
    bars = [bar for found in axes.collections if isinstance(found, LineCollection) for bar in found.get_segments()]
    drawn = [*(_on_screen(axes, [x], [y]) for _, x, y, _ in points),
             *(_on_screen(axes, *numpy.transpose(bar)) for bar in bars)]  # fmt: skip
    covered, taken = numpy.concatenate(drawn), list[Box]()
    for name, x, y, colour in points:
        text = axes.annotate(name, (x, y), xytext=(0, 0), textcoords="offset points", fontsize=SMALLEST, color=colour,
                             path_effects=[withStroke(linewidth=3, foreground="white")], zorder=5)
        text.set_in_layout(False)
        size, pixel = text.get_window_extent(), axes.transData.transform((x, y))
        least = math.inf
        for far, (across, up, dx, dy) in itertools.product((1.0, 2.0, 3.2, 4.6, 6.2, 8.0, 10.0), SIDES):
            side = (across, up, far * dx, far * dy)
            box = _box(pixel, side, size.width, size.height, scale)
            outside = not (frame.x0 <= box[0] and box[2] <= frame.x1 and frame.y0 <= box[1] and box[3] <= frame.y1)
            cost = 100 * outside + 20 * sum(_touch(box, other) for other in taken) + 3 * _inside(box, covered) + far
            if cost < least:
                least, placed, best = cost, box, side
        across, up, dx, dy = best
        text.set(ha=across, va=up, position=(dx * GAP, dy * GAP))
        taken.append(placed)
        if max(abs(dx), abs(dy)) > 1.5:
            axes.annotate("", (x, y), xytext=(dx * GAP, dy * GAP), textcoords="offset points", zorder=2,
                          arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.6, "shrinkA": 0, "shrinkB": 3})


def _place(
    axes: Axes,
    text: Annotation,
    candidates: list[tuple[float, float, numpy.ndarray]],
    own: numpy.ndarray,
    others: numpy.ndarray,
    taken: Sequence[Box],
) -> Box | None:
    """Move a name to the place where it covers least, and return its box, or None if it covers too much everywhere."""
    size, frame, scale = text.get_window_extent(), axes.get_window_extent(), axes.figure.dpi / 72
    least, found = TOLERATED, None
    for rank, (x, y, pixel) in enumerate(candidates):
        for liking, side in enumerate(SIDES):
            box = _box(pixel, side, size.width, size.height, scale)
            inside = frame.x0 <= box[0] and box[2] <= frame.x1 + 1 and frame.y0 <= box[1] and box[3] <= frame.y1
            if not inside or any(_touch(box, other) for other in taken):
                continue
            cost = 10 * _inside(box, others) + _inside(box, own) + 0.05 * rank + 0.01 * liking
            if cost < least:
                least, found = cost, box
                across, up, dx, dy = side
                text.xy = (x, y)
                text.set(ha=across, va=up)
                text.set_position((dx * GAP, dy * GAP))
    return found


def _candidates(line: Line, pixels: numpy.ndarray, axes: Axes) -> list[tuple[float, float, numpy.ndarray]]:
    """Return points of a line, (x, y, pixels): some that were given, the last first, and some on the way."""
    _, xs, ys, _ = line
    given = list(zip(xs, ys, strict=True))[::-1][:: max(1, len(xs) // 12)]
    way = axes.transData.inverted().transform(pixels[::-1][:: max(1, len(pixels) // 24)])
    points = [*given, *map(tuple, way)]
    return [(x, y, place) for (x, y), place in zip(points, axes.transData.transform(points), strict=True)]


def _on_screen(axes: Axes, xs: Sequence[float], ys: Sequence[float]) -> numpy.ndarray:
    """Return points of a line in pixels, at most four pixels apart, and the rims of its markers."""
    corners = axes.transData.transform(numpy.column_stack([xs, ys]))
    marks = [corners + move for move in ((MARK, 0), (-MARK, 0), (0, MARK), (0, -MARK))] if len(xs) <= 50 else []
    pieces = [corners[:1], *marks]
    for one, other in itertools.pairwise(corners):
        steps = max(1, int(numpy.abs(other - one).max() // 4)) if numpy.isfinite([one, other]).all() else 1
        pieces.append(one + (other - one) * numpy.arange(1, steps + 1)[:, None] / steps)
    return numpy.concatenate(pieces)


def _box(point: numpy.ndarray, side: tuple, width: float, height: float, scale: float) -> Box:
    """Return (left, bottom, right, top) in pixels of a text beside a point."""
    across, up, dx, dy = side
    x, y = point[0] + dx * GAP * scale, point[1] + dy * GAP * scale
    left = {"left": x, "center": x - width / 2, "right": x - width}[across]
    bottom = {"bottom": y, "center": y - height / 2, "top": y - height}[up]
    return left - ROOM, bottom - ROOM, left + width + ROOM, bottom + height + ROOM


def _touch(one: Box, other: Box) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def _inside(box: Box, points: numpy.ndarray) -> int:
    left, bottom, right, top = box
    x, y = points[:, 0], points[:, 1]
    return int(((left < x) & (x < right) & (bottom < y) & (y < top)).sum())
