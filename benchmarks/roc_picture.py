"""The ROC curves of the zoo as an SVG picture, whose bytes depend on the scores alone."""

from collections.abc import Mapping, Sequence
from html import escape

SIDE, LEFT, TOP = 300, 60, 20  # of the axes, in pixels
COLOURS = ("#1f5fbf", "#c2571a", "#2e7d4f", "#7a3e9d")

Score = tuple[float, ...]
Point = tuple[float, float]
"""The share of clean models, and that of models with a backdoor, that raise an alarm."""


def curve(clean: Sequence[Score], attacked: Sequence[Score]) -> list[Point]:
    """The shares at every threshold, from no alarm at all to an alarm on each model.

    >>> curve([(0.0,), (2.0,)], [(1.0,), (3.0,)])
    [(0.0, 0.0), (0.0, 0.5), (0.5, 0.5), (0.5, 1.0), (1.0, 1.0)]
    """
    thresholds = sorted({*clean, *attacked}, reverse=True)
    points = [(0.0, 0.0)]
    for threshold in thresholds:
        shares = [sum(score >= threshold for score in group) / len(group) for group in (clean, attacked)]
        points.append((shares[0], shares[1]))
    return points


def picture(title: str, curves: Mapping[str, Sequence[Point]], rules: Mapping[str, Point]) -> str:
    """Draws curves as lines, and rules that have one threshold each as dots; the names stand below."""
    names = [*curves, *rules]
    height = TOP + SIDE + 60 + 22 * len(names)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {SIDE + LEFT + 240} {height}" role="img" '
        f'aria-label="{escape(title)}" font-family="sans-serif" font-size="13">',
        f'<rect width="100%" height="100%" fill="white"/><rect x="{LEFT}" y="{TOP}" width="{SIDE}" height="{SIDE}" '
        'fill="none" stroke="#888"/>',
        f'<path d="M{LEFT} {TOP + SIDE}l{SIDE} -{SIDE}" stroke="#bbb" stroke-dasharray="4 4"/>',
    ]
    for percent in (0, 25, 50, 75, 100):
        x, y = _place((percent / 100, percent / 100))
        parts.append(f'<text x="{x:g}" y="{TOP + SIDE + 18}" text-anchor="middle">{percent}</text>')
        parts.append(f'<text x="{LEFT - 8}" y="{y + 4:g}" text-anchor="end">{percent}</text>')
    middle = TOP + SIDE / 2
    parts.append(f'<text x="{LEFT + SIDE / 2:g}" y="{TOP + SIDE + 38}" text-anchor="middle">false alarms, %</text>')
    parts.append(f'<text transform="translate(16 {middle:g}) rotate(-90)" text-anchor="middle">detected, %</text>')
    for place, name in enumerate(names):
        colour, y = COLOURS[place % len(COLOURS)], TOP + SIDE + 66 + 22 * place
        parts.append(f'<text x="{LEFT + 34}" y="{y}">{escape(name)}</text>')
        if name in curves:
            line = " ".join("{:g},{:g}".format(*_place(point)) for point in curves[name])
            parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"/>')
            parts.append(f'<path d="M{LEFT} {y - 4}h26" stroke="{colour}" stroke-width="2"/>')
        else:
            x, dot = _place(rules[name])
            parts.append(f'<circle cx="{x:g}" cy="{dot:g}" r="5" fill="{colour}"/>')
            parts.append(f'<circle cx="{LEFT + 13}" cy="{y - 4}" r="5" fill="{colour}"/>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def _place(point: Point) -> Point:
    return round(LEFT + SIDE * point[0], 2), round(TOP + SIDE * (1 - point[1]), 2)
