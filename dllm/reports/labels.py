"""Placement of labels next to points without overlaps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

_ANGLES = (90, 270, 0, 180, 45, 135, 315, 225, 67, 113, 247, 293, 22, 158, 202, 338)
_DISTANCES = (7, 14, 24, 36, 50, 66, 84)  # points
_NEAR = 14  # a label farther away gets a line to its point
_LINE = 4  # weight of overlap with lines, relative to labels: lines are thin

Box = tuple[float, float, float, float]


class Labels:
    """Places labels one by one where they overlap least.

    Args:
        figure: matplotlib's, complete except for the labels.
        axes: of the points.
        points: that no label may cover.
        lines: vertical or horizontal, that labels should not cover: the two ends of each.
    """

    def __init__(
        self,
        figure: Any,
        axes: Any,
        points: Sequence[tuple[float, float]],
        lines: Sequence[Sequence[tuple[float, float]]],
    ) -> None:
        figure.draw_without_rendering()
        self.axes, self.scale = axes, figure.dpi / 72
        self.taken: list[Box] = [(x - 6, y - 6, x + 6, y + 6) for x, y in axes.transData.transform(points)]
        ends = [sorted(map(tuple, axes.transData.transform(line))) for line in lines]
        self.lines: list[Box] = [(x - 1, min(y, v) - 1, u + 1, max(y, v) + 1) for (x, y), (u, v) in ends]

    def put(self, x: float, y: float, text: str, colour: str) -> None:
        """Write a label near a point."""
        label = self.axes.annotate(text, (x, y), (0, 0), textcoords="offset points", fontsize=8, color=colour)
        label.set_in_layout(False)
        box = label.get_window_extent()
        size = box.width, box.height
        place = self.axes.transData.transform((x, y))
        options = [(distance, self._box(place, size, angle, distance)) for distance in _DISTANCES for angle in _ANGLES]
        distance, taken = min(options, key=lambda option: round(self._cost(option[1]) + 2 * option[0]))
        left, low = (taken[0] - place[0]) / self.scale, (taken[1] - place[1]) / self.scale
        label.remove()
        line = {"arrowstyle": "-", "color": colour, "linewidth": 0.6, "alpha": 0.6, "shrinkB": 4}
        label = self.axes.annotate(
            text, (x, y), (left, low), textcoords="offset points", fontsize=8, color=colour, va="bottom",
            arrowprops=line if distance > _NEAR else None,
        )  # fmt: skip
        label.set_in_layout(False)
        self.taken.append(taken)

    def _box(self, place: Sequence[float], size: tuple[float, float], angle: float, distance: float) -> Box:
        """Bounding box of a label whose nearest edge is `distance` away."""
        across, up = math.cos(math.radians(angle)), math.sin(math.radians(angle))
        x = place[0] + across * (distance * self.scale + size[0] / 2)
        y = place[1] + up * (distance * self.scale + size[1] / 2)
        return x - size[0] / 2, y - size[1] / 2, x + size[0] / 2, y + size[1] / 2

    def _cost(self, box: Box) -> float:
        """Weighted area of overlap with labels, points and lines, and outside the axes."""
        inside = self.axes.bbox
        within = _overlap(box, (inside.x0, inside.y0, inside.x1, inside.y1))
        outside = (box[2] - box[0]) * (box[3] - box[1]) - within
        crossed = sum(_overlap(box, line) for line in self.lines)
        return 10 * outside + 3 * sum(_overlap(box, other) for other in self.taken) + _LINE * crossed


def _overlap(one: Box, other: Box) -> float:
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    return max(0.0, width) * max(0.0, height)
