"""Colours of a value from low to high; safe for colour-blind readers and print."""

from __future__ import annotations

import math

# From first to last step, and from low to high confidence.
RAMPS: dict[str, tuple[tuple[int, int, int], ...]] = {
    "commit_step": ((61, 38, 120), (42, 100, 158), (31, 150, 139), (122, 200, 88), (240, 222, 70)),
    "confidence": ((196, 62, 30), (236, 154, 76), (232, 222, 196), (120, 178, 214), (33, 102, 172)),
}
UNKNOWN = (136, 136, 136)


def shade(colour: str, share: float) -> tuple[int, int, int]:
    """The colour of a value from 0 to 1; grey if unknown."""
    if math.isnan(share):
        return UNKNOWN
    ramp = RAMPS[colour]
    place = min(max(share, 0.0), 1.0) * (len(ramp) - 1)
    low = min(int(place), len(ramp) - 2)
    # Round half up, as in the page.
    red, green, blue = (int(a + (b - a) * (place - low) + 0.5) for a, b in zip(ramp[low], ramp[low + 1], strict=True))
    return red, green, blue


def is_bright(colour: tuple[int, int, int]) -> bool:
    """Whether black is more legible on a colour than white."""
    return sum(weight * part for weight, part in zip((0.299, 0.587, 0.114), colour, strict=True)) > 140


def css(colour: tuple[int, int, int]) -> str:
    """The CSS of a colour with legible text on it."""
    return f"background:#{bytes(colour).hex()};color:{'#000' if is_bright(colour) else '#fff'}"
