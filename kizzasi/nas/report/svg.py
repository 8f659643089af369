"""Plots as inline SVG: strings, no scripts, no fonts, no files; colours follow the page's style.

Glossary
    mark    a point with a shape and colour of its group, and a text that appears on hovering
    line    a polyline of a group; it may end in a cross (the training failed)
    group   a CSS class that sets colour and shape; see GROUPS
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise
from zlib import crc32

Point = tuple[float, float]

WIDTH, HEIGHT = 640, 380
LEFT, RIGHT, TOP, BOTTOM = 62, 14, 40, 50
GROUPS = {
    "winner": "winner",
    "proxy": "by proxy",
    "random": "at random",
    "searched": "searched",
    "preset": "preset",
    "outside": "outside",
}
COLOURS = "".join(
    f"svg .{name} {{ stroke: var(--{name}); fill: var(--{name}); }}\n"
    for name in (*GROUPS, "baseline")
)
STYLE = f"""{COLOURS}
svg {{ display: block; width: 100%; min-width: 510px; height: auto;
  font: 14px system-ui, sans-serif; }}
svg text {{ fill: var(--soft); }}
svg .value, svg .name {{ fill: var(--ink); }}
svg .axis {{ stroke: var(--soft); }}
svg .grid {{ stroke: var(--rule); }}
svg .line {{ fill: none; stroke-width: 1.4; stroke-linejoin: round;
  stroke-linecap: round; opacity: .75; }}
svg .line.winner {{ stroke-width: 2.6; opacity: 1; }}
svg .front {{ fill: none; stroke: var(--soft); stroke-width: 1.3; stroke-dasharray: 5 4; }}
svg .link {{ fill: none; stroke: var(--soft); opacity: .35; }}
svg .mark {{ stroke-width: 1.6; fill-opacity: .8; }}
svg .mark.early {{ fill-opacity: 0; stroke-opacity: .7; }}
svg .cross {{ fill: none; stroke-width: 2; }}
svg .box {{ stroke: none; }}
svg .noise {{ fill: var(--soft); opacity: .16; }}
svg .mean {{ stroke: var(--ink); stroke-width: 2; }}
svg .whisker {{ stroke: var(--ink); stroke-width: 1.5; }}
"""


@dataclass(frozen=True)
class Mark:
    x: float
    y: float
    group: str
    text: str
    early: bool = False


@dataclass(frozen=True)
class Line:
    points: Sequence[Point]
    group: str
    text: str = ""
    failed: bool = False
    name: str = ""  # written at its end


@dataclass(frozen=True)
class Axis:
    """Maps values onto pixels, by their logarithm if they span more than a factor of five."""

    label: str
    low: float
    high: float
    start: float
    stop: float
    log: bool
    whole: bool = False

    @classmethod
    def fit(
        cls, label: str, values: Iterable[float], start: float, stop: float, whole: bool = False
    ) -> Axis:
        """`whole`: of counts, whose ticks are whole numbers."""
        values = list(values)
        assert all(math.isfinite(v) for v in values), f"{label}: not finite"
        low, high = min(values), max(values)
        if low > 0 and high > 5 * low:
            return cls(label, low / 1.15, high * 1.15, start, stop, True, whole)
        pad = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
        return cls(label, low - pad, high + pad, start, stop, False, whole)

    def __call__(self, value: float) -> float:
        low, high = self.low, self.high
        if self.log:
            value, low, high = math.log(value), math.log(low), math.log(high)
        return self.start + (value - low) / (high - low) * (self.stop - self.start)

    def ticks(self) -> list[float]:
        """About five round values inside the axis."""
        if self.log:
            decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            factors = (1, 2, 5) if self.high / self.low < 1e3 else (1,)
            found = [f * 10.0**d for d in decades for f in factors]
        else:
            rough = (self.high - self.low) / 5
            power = 10.0 ** math.floor(math.log10(rough))
            step = power * next(f for f in (1, 2, 5, 10) if f * power >= rough * (1 - 1e-9))
            first = math.ceil(self.low / step)
            found = [i * step for i in range(first, math.floor(self.high / step) + 1)]
        inside = [tick for tick in found if self.low <= tick <= self.high]
        return [tick for tick in inside if tick == round(tick)] if self.whole else inside


def short(value: float) -> str:
    """Three digits and a unit: 198k, 1.2M, 0.35."""
    for unit in ("", "k", "M", "G", "T"):
        text = f"{value:.3g}"
        if abs(float(text)) < 1000 or unit == "T":
            return text + unit
        value /= 1000
    raise AssertionError("the last unit takes every value")


def plot(
    title: str,
    x_label: str,
    y_label: str,
    marks: Sequence[Mark] = (),
    lines: Sequence[Line] = (),
    fronts: Sequence[Sequence[Point]] = (),
    links: Sequence[Sequence[Point]] = (),
    whole: bool = False,
) -> str:
    """Draw marks and lines over two axes; at least one of them.

    Args:
        title: read out in place of the picture.
        x_label, y_label: with their units.
        marks, lines: what the legend explains.
        fronts: Pareto fronts, drawn as dashed steps.
        links: thin lines between marks of the same candidate.
        whole: the horizontal axis counts.
    """
    points = [(m.x, m.y) for m in marks] + [point for line in lines for point in line.points]
    x = Axis.fit(x_label, (p[0] for p in points), LEFT, WIDTH - RIGHT, whole)
    y = Axis.fit(y_label, (p[1] for p in points), HEIGHT - BOTTOM, TOP)
    body = _axes(x, y)
    body += [_polyline(x, y, link, "link") for link in links]
    body += [_polyline(x, y, _steps(front), "front") for front in fronts if len(front) > 1]
    body += [_line(x, y, line) for line in sorted(lines, key=lambda line: line.group == "winner")]
    body += [_mark(x(m.x), y(m.y), m.group, m.text, m.early) for m in marks]
    body += _names(x, y, lines)
    used = {item.group for item in (*marks, *lines)}
    return _svg(title, HEIGHT, [*body, *_legend([g for g in GROUPS if g in used])])


def bars(title: str, unit: str, rows: Sequence[tuple[str, str, float, float | None]]) -> str:
    """Draw horizontal bars from 0: (name, group, value, spread or None), first on top."""
    left, top, step = 268, 12, 36
    longest = max(value + (spread or 0) for _, _, value, spread in rows)
    x = Axis(unit, 0.0, longest * 1.15, left, WIDTH - RIGHT, False)
    height = top + step * len(rows) + 42
    floor = top + step * len(rows)
    body = [
        f'<line class="grid" x1="{x(t):.1f}" x2="{x(t):.1f}" y1="{top}" y2="{floor}"/>'
        f'<text x="{x(t):.1f}" y="{floor + 16}" text-anchor="middle">{t:g}</text>'
        for t in x.ticks()
    ]
    middle = (left + WIDTH - RIGHT) / 2
    body.append(f'<text x="{middle:.1f}" y="{height - 8}" text-anchor="middle">{unit}</text>')
    for i, (name, group, value, spread) in enumerate(rows):
        y = top + step * i + 5
        end = x(value + (spread or 0)) + 8
        body.append(
            f'<text class="name" x="{left - 10}" y="{y + 17}" text-anchor="end">'
            f"{_cut(name, 32)}</text>"
            f'<rect class="mark box {group}" x="{left}" y="{y}" rx="3" '
            f'width="{x(value) - left:.1f}" height="{step - 10}"/>'
            f'<text class="value" x="{end:.1f}" y="{y + 17}">{value:.3f}</text>'
        )
        if spread:
            a, b, c = x(max(0.0, value - spread)), x(value + spread), y + (step - 10) / 2
            body.append(f'<path class="whisker" d="M{a:.1f} {c}H{b:.1f}"/>')
    return _svg(title, height, body)


def strips(
    title: str,
    unit: str,
    rows: Sequence[tuple[str, str, Sequence[float]]],
    floor: float | None,
) -> str:
    """Draw every seed of every finalist: (name, group, values), first on top, best mean first.

    Each row has a mark per seed, a tick at the mean, and a whisker of one standard deviation. The
    shaded band reaches from the first mean as far as `floor`: means inside of it are tied.
    """
    left, top, step = 268, 34, 34
    means = [statistics.fmean(values) for _, _, values in rows]
    edge = [means[0], means[0] + (floor or 0.0)]
    x = Axis.fit(unit, [v for _, _, vs in rows for v in vs] + edge, left, WIDTH - RIGHT)
    bottom = top + step * len(rows)
    body = [*_strip_axis(x, top, bottom)]
    if floor is not None:
        a, b = x(edge[0]), x(edge[1])
        body.append(
            f'<rect class="noise" x="{a:.1f}" y="{top}" width="{max(1.0, b - a):.1f}" '
            f'height="{bottom - top}"/><text x="{left}" y="{top - 12}">'
            f"shaded: tied with the first (noise floor {floor:.3f})</text>"
        )
    for i, (name, group, values) in enumerate(rows):
        y, mean = top + step * i + step / 2, means[i]
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        a, b = x(max(x.low, mean - spread)), x(min(x.high, mean + spread))
        body.append(
            f'<text class="name" x="{left - 10}" y="{y + 4:.1f}" text-anchor="end">'
            f'{_cut(name, 32)}</text><path class="whisker" d="M{a:.1f} {y:.1f}H{b:.1f}"/>'
            f'<path class="mean" d="M{x(mean):.1f} {y - 9:.1f}v18"/>'
        )
        body += [_mark(x(v), y, group, f"{name}: {v:.3f} {unit}", False) for v in values]
    return _svg(title, bottom + 46, body)


def _strip_axis(x: Axis, top: float, bottom: float) -> list[str]:
    ticks = [
        f'<line class="grid" x1="{x(t):.1f}" x2="{x(t):.1f}" y1="{top}" y2="{bottom}"/>'
        f'<text x="{x(t):.1f}" y="{bottom + 16}" text-anchor="middle">{short(t)}</text>'
        for t in x.ticks()
    ]
    middle = (x.start + x.stop) / 2
    label = f'<text x="{middle:.1f}" y="{bottom + 36}" text-anchor="middle">{x.label}</text>'
    return [*ticks, f'<path class="axis" fill="none" d="M{x.start} {bottom}H{x.stop}"/>', label]


def sketch(title: str, rows: Sequence[Sequence[str]]) -> str:
    """Draw a model as boxes from top to bottom: (which layers, box, box, ...) per row.

    A box is "kind: details"; boxes of one kind have one colour.
    """
    left, top, step, gap = 92, 6, 44, 10
    body: list[str] = []
    for i, (label, *boxes) in enumerate(rows):
        y = top + step * i
        body.append(
            f'<text x="{left - 12}" y="{y + 20}" text-anchor="end">{_cut(label, 13)}</text>'
        )
        if i:
            body.append(f'<path class="axis" d="M{left + 24} {y - 12}v10"/>')
        width = (WIDTH - RIGHT - left - gap * (len(boxes) - 1)) / len(boxes)
        for j, box in enumerate(boxes):
            x = left + j * (width + gap)
            hue = crc32(box.split(":")[0].encode())  # one kind, one colour, in every report
            body.append(
                f'<rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="32" rx="6" '
                f'fill="hsl({hue % 360} 65% 55% / .22)" stroke="hsl({hue % 360} 55% 55%)"/>'
                f'<text class="name" x="{x + 12:.1f}" y="{y + 20}">'
                f"{_cut(box, int(width / 7.7))}</text>"
            )
    return _svg(title, top + step * len(rows), body)


def _svg(title: str, height: float, body: Iterable[str]) -> str:
    return (
        f'<svg role="img" aria-label="{escape(title)}" viewBox="0 0 {WIDTH} {height}">'
        f"<title>{escape(title)}</title>" + "".join(body) + "</svg>"
    )


def _axes(x: Axis, y: Axis) -> list[str]:
    floor, right = HEIGHT - BOTTOM, WIDTH - RIGHT
    parts: list[str] = []
    for tick in x.ticks():
        parts.append(
            f'<line class="grid" x1="{x(tick):.1f}" x2="{x(tick):.1f}" y1="{TOP}" y2="{floor}"/>'
            f'<text x="{x(tick):.1f}" y="{floor + 18}" text-anchor="middle">{short(tick)}</text>'
        )
    for tick in y.ticks():
        parts.append(
            f'<line class="grid" x1="{LEFT}" x2="{right}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>'
            f'<text x="{LEFT - 8}" y="{y(tick) + 4:.1f}" text-anchor="end">{short(tick)}</text>'
        )
    note = {True: " (log scale)", False: ""}
    middle_x, middle_y = (LEFT + right) / 2, (TOP + floor) / 2
    return [
        *parts,
        f'<path class="axis" fill="none" d="M{LEFT} {TOP}V{floor}H{right}"/>',
        f'<text x="{middle_x}" y="{HEIGHT - 10}" text-anchor="middle">'
        f"{escape(x.label)}{note[x.log]}</text>",
        f'<text transform="translate(14 {middle_y}) rotate(-90)" text-anchor="middle">'
        f"{escape(y.label)}{note[y.log]}</text>",
    ]


def _legend(groups: Sequence[str]) -> list[str]:
    parts, x = [], float(LEFT)
    for group in groups:
        parts.append(_mark(x + 5, 18, group, "", False))
        parts.append(f'<text x="{x + 18:.1f}" y="22">{GROUPS[group]}</text>')
        x += 34 + 7.4 * len(GROUPS[group])
    return parts


def _mark(x: float, y: float, group: str, text: str, early: bool) -> str:
    """Every group has a shape of its own, so that colour is never the only difference."""
    shape = {
        "winner": f"M{x:.1f} {y - 8:.1f}l2.4 5.2 5.6 .6-4.2 3.8 1.2 5.6-5-2.9-5 2.9 1.2-5.6"
        "-4.2-3.8 5.6-.6z",
        "proxy": f"M{x - 4.5:.1f} {y:.1f}a4.5 4.5 0 1 0 9 0a4.5 4.5 0 1 0-9 0z",
        "random": f"M{x:.1f} {y - 5:.1f}l5 9h-10z",
        "preset": f"M{x - 4:.1f} {y - 4:.1f}h8v8h-8z",
        "searched": f"M{x:.1f} {y - 5:.1f}v10M{x - 5:.1f} {y:.1f}h10",
        "outside": f"M{x:.1f} {y - 5.5:.1f}l5.5 5.5-5.5 5.5-5.5-5.5z",
    }[group]
    return f'<path class="mark {group}{" early" * early}" d="{shape}"{_about(text)}</path>'


def _line(x: Axis, y: Axis, line: Line) -> str:
    if len(line.points) == 1:  # a line of no length is hardly seen
        (a, b), *_ = line.points
        drawn = _mark(x(a), y(b), line.group, line.text, False)
    else:
        drawn = _polyline(x, y, line.points, f"line {line.group}", line.text)
    if not line.failed:
        return drawn
    a, b = x(line.points[-1][0]), y(line.points[-1][1])
    cross = f"M{a - 5:.1f} {b - 5:.1f}l10 10m0-10l-10 10"
    return f'{drawn}<path class="cross {line.group}" d="{cross}"/>'


def _names(x: Axis, y: Axis, lines: Sequence[Line]) -> list[str]:
    """The names of lines at their ends, one above the other where these are close."""
    parts, above = [], math.inf
    for line in sorted((line for line in lines if line.name), key=lambda ln: -y(ln.points[-1][1])):
        end = x(line.points[-1][0])
        above = min(y(line.points[-1][1]) - 6, above - 15)
        side = "end" if end - 7 * len(line.name) > LEFT else "start"  # within the picture
        parts.append(
            f'<text class="name" x="{end + (4 if side == "start" else -4):.1f}" y="{above:.1f}" '
            f'text-anchor="{side}">{_cut(line.name, 40)}</text>'
        )
    return parts


def _polyline(x: Axis, y: Axis, points: Sequence[Point], style: str, text: str = "") -> str:
    path = "L".join(f"{x(a):.1f} {y(b):.1f}" for a, b in points)
    path += "h0" if len(points) == 1 else ""  # round ends make it a dot
    return f'<path class="{style}" d="M{path}"{_about(text)}</path>'


def _about(text: str) -> str:
    """The end of a tag that tells, on hover or touch and to readers, what it stands for."""
    said = escape(text)
    return f' data-about="{said}"><title>{said}</title>' if text else ">"


def _steps(front: Sequence[Point]) -> list[Point]:
    """A front as stairs: until the next point is reached, the last one is the best."""
    corners = [(b[0], a[1]) for a, b in pairwise(front)]
    return [p for pair in zip(front, [*corners, front[-1]], strict=True) for p in pair]


def _cut(text: str, length: int) -> str:
    return escape(text if len(text) <= length else text[: length - 1] + "…")
