"""
A profile as one HTML page that needs nothing else: no scripts, no fonts, no network.

Callers see profile_page. The plots are SVG, written by hand from the raw values: what each exit
costs with its interval, every block over time beside the yardstick loop, and what the machine
said of its clock and temperature. Whatever text comes from files is escaped.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

from edgeexit.blocks import CLEAN, STATUSES
from edgeexit.errors import printable
from edgeexit.profile import Profile
from edgeexit.report import milliseconds, profile_table
from edgeexit.verdict import named, watched

_WIDTH, _LEFT, _RIGHT, _TOP, _BOTTOM = 860, 150, 20, 10, 30
# More dots than this cannot be told apart and make the page slow.
_MOST_DOTS = 3000
_NAME_LENGTH = 20
_COLOURS = ("#1b6ca8", "#c8553d", "#588b3b", "#8a5a9e", "#b08a1e", "#3a9e9e", "#7a5c3e", "#666666")

_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; max-width: 900px; margin: 2em auto; padding: 0 1em;
  color: #222; background: #fff }
h1 { font-size: 1.4em } h2 { font-size: 1.1em; margin: 1.6em 0 .3em }
.verdict { border-left: .5em solid #c8553d; background: #fbf1ee; padding: .6em 1em }
.clean { border-color: #588b3b; background: #f1f7ec }
svg { width: 100%; height: auto } svg text { font: 12px system-ui, sans-serif; fill: #444 }
pre { overflow-x: auto; background: #f6f6f6; padding: 1em; font-size: 12px; line-height: 1.35 }
"""


def profile_page(profile: Profile) -> str:
    """The page, complete, as text to be written as UTF-8."""
    title = _text(f"{profile.bundle_name} on {profile.device}, {profile.mode}")
    verdict = profile.verdict
    kind = "verdict clean" if verdict.status == CLEAN else "verdict"
    reasons = "".join(f"<li>{_text(reason.text)}</li>" for reason in verdict.reasons)
    box = (
        f'<div class="{kind}"><b>{_text(verdict.status.upper())}</b>: '
        f"{_text(STATUSES[verdict.status])}<ul>{reasons}</ul></div>"
    )
    sections = [
        ("What leaving at each exit costs", _bars(profile)),
        ("Every block over time, as a share of its exit's median", _blocks(profile)),
        ("Clock", _trace(profile, "MHz", _clocks(profile))),
        ("Temperature", _trace(profile, "°C", _degrees(profile))),
        ("In figures", f"<pre>{escape(profile_table(profile, everything=True))}</pre>"),
    ]
    body = "".join(f"<h2>{escape(head)}</h2>{part}" for head, part in sections if part)
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title><style>{_STYLE}</style></head>\n"
        f"<body><h1>{title}</h1>{box}{body}"
        f"<p>Measured {_text(profile.measured_at)} by edgeexit {_text(profile.made_by)}.</p>"
        "</body></html>\n"
    )


def _text(text: str) -> str:
    shown = printable(text)
    return escape(shown if len(shown) <= 500 else f"{shown[:497]}...")


# ---------------------------------------------------------------- drawing


@dataclass(frozen=True, kw_only=True)
class _Axes:
    """A plot's frame: from values to places, with ticks along both sides."""

    x: tuple[float, float]
    y: tuple[float, float]
    height: int

    def at(self, x: float, y: float) -> tuple[float, float]:
        return self.across(x), self.down(y)

    def across(self, x: float) -> float:
        low, high = self.x
        return _LEFT + (x - low) / (high - low) * (_WIDTH - _LEFT - _RIGHT)

    def down(self, y: float) -> float:
        low, high = self.y
        return self.height - _BOTTOM - (y - low) / (high - low) * (self.height - _TOP - _BOTTOM)

    def drawn(self, marks: Iterable[str], x_unit: str, y_unit: str | None) -> str:
        """The SVG of *marks* within the frame; no ticks upwards without *y_unit*."""
        parts = []
        for tick in _ticks(*self.x):
            place = self.across(tick)
            parts.append(_line([(place, _TOP), (place, self.height - _BOTTOM)], "#e4e4e4"))
            label = f"{tick:g} {x_unit}"
            parts.append(_label(place, self.height - 10, label, "middle"))
        for tick in _ticks(*self.y) if y_unit is not None else ():
            place = self.down(tick)
            parts.append(_line([(_LEFT, place), (_WIDTH - _RIGHT, place)], "#e4e4e4"))
            parts.append(_label(_LEFT - 8, place + 4, f"{tick:g} {y_unit}", "end"))
        inner = "".join([*parts, *marks])
        return f'<svg viewBox="0 0 {_WIDTH} {self.height}" role="img">{inner}</svg>'


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers between *low* and *high*, about six."""
    step = 10.0 ** math.floor(math.log10((high - low) / 5))
    step *= next(k for k in (1, 2, 5, 10) if (high - low) / (step * k) <= 7)
    return [round(k * step, 12) for k in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _line(points: Sequence[tuple[float, float]], colour: str, width: float = 1) -> str:
    places = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return f'<polyline points="{places}" fill="none" stroke="{colour}" stroke-width="{width}"/>'


def _label(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{_text(text)}</text>'


def _dot(x: float, y: float, colour: str) -> str:
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2" fill="{colour}" fill-opacity="0.6"/>'


def _around(values: Sequence[float], margin: float) -> tuple[float, float]:
    """A range that holds *values* and some more, never empty."""
    low, high = min(values), max(values)
    more = max((high - low) * 0.08, margin)
    return low - more, high + more


# ---------------------------------------------------------------- plots


def _bars(profile: Profile) -> str:
    cases = watched(profile)
    found = [profile.latency(case) for case in cases]
    widest = max(f.high if math.isfinite(f.high) else f.value for f in found) / 1e6
    axes = _Axes(x=(0, widest * 1.12), y=(0, len(cases)), height=_TOP + _BOTTOM + 34 * len(cases))
    marks = []
    for place, (case, estimate) in enumerate(zip(cases, found, strict=True)):
        ms, low, high = (
            min(max(ns / 1e6, 0.0), widest) for ns in (estimate.value, estimate.low, estimate.high)
        )
        top, middle = axes.down(len(cases) - place - 0.2), axes.down(len(cases) - place - 0.5)
        length = axes.across(ms) - _LEFT
        marks.append(
            f'<rect x="{_LEFT}" y="{top:.1f}" width="{length:.1f}" '
            f'height="{2 * (middle - top):.1f}" fill="{_COLOURS[0]}" fill-opacity="0.75"/>'
        )
        marks.append(_line([(axes.across(low), middle), (axes.across(high), middle)], "#111", 2))
        name = named(profile, case)[:_NAME_LENGTH]
        marks.append(_label(_LEFT - 8, middle + 4, name, "end"))
        marks.append(_label(axes.across(high) + 6, middle + 4, f"{milliseconds(ms)} ms", "start"))
    return axes.drawn(marks, "ms", None)


def _blocks(profile: Profile) -> str:
    cases = {profile.cases.index(case): case for case in watched(profile)}
    middles = {place: profile.value_ns(case) for place, case in cases.items()}
    began = profile.processes[0].began_ns
    blocks = [b for process in profile.processes for b in process.blocks if b.case in cases]
    blocks = blocks[:: math.ceil(len(blocks) / _MOST_DOTS)]
    seconds = [(block.at_ns - began) / 1e9 for block in blocks]
    shares = [100 * block.mean_ns / middles[block.case] for block in blocks]
    turns = [100 * block.yardstick_ns / profile.yardstick_ns for block in blocks]
    # A few blocks far out must not press all others flat: they stand at the edge.
    low, high = _around([*np.quantile([*shares, *turns], [0.005, 0.995]).tolist(), 100.0], 2.0)
    axes = _Axes(x=_around(seconds, 0.1), y=(low, high), height=300)
    order = list(cases)
    marks = [
        _dot(*axes.at(s, min(max(y, low), high)), _COLOURS[order.index(b.case) % len(_COLOURS)])
        for s, y, b in zip(seconds, shares, blocks, strict=True)
    ]
    for process in profile.processes:
        yardstick = [
            axes.at(s, min(max(y, low), high))
            for s, y, b in zip(seconds, turns, blocks, strict=True)
            if process.began_ns <= b.at_ns <= process.ended_ns
        ]
        marks.append(_line(yardstick, "#111", 0.7))
    legend = ", ".join(
        f'<span style="color:{_COLOURS[k % len(_COLOURS)]}">●</span> '
        f"{_text(named(profile, case)[:_NAME_LENGTH])}"
        for k, case in enumerate(cases.values())
    )
    return axes.drawn(marks, "s", "%") + f"<p>{legend}; the line is the yardstick loop.</p>"


Points = list[tuple[int, float]]


def _clocks(profile: Profile) -> Points:
    readings = [reading for process in profile.processes for reading in process.readings]
    return [(r.at_ns, max(r.clocks_mhz)) for r in readings if r.clocks_mhz]


def _degrees(profile: Profile) -> Points:
    readings = [reading for process in profile.processes for reading in process.readings]
    return [(r.at_ns, r.temperature_c) for r in readings if r.temperature_c is not None]


def _trace(profile: Profile, unit: str, points: Points) -> str:
    """One line over time; nothing where the machine does not say."""
    if len(points) < 2:
        return ""
    began = profile.processes[0].began_ns
    seconds = [(at_ns - began) / 1e9 for at_ns, _ in points]
    values = [value for _, value in points]
    axes = _Axes(x=_around(seconds, 0.1), y=_around(values, 2.0), height=170)
    line = [axes.at(x, y) for x, y in zip(seconds, values, strict=True)]
    return axes.drawn([_line(line, _COLOURS[1], 1.5)], "s", unit)
