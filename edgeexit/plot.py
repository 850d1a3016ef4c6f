"""
One figure of a tuned network, for people: png or svg.

Callers see check_plot (before the work), chart (what shall be shown) and draw. Hidden here: the
drawing library, which is an extra and is loaded only to draw. Equal charts give equal bytes:
nothing of the date, the machine or a random number goes into the file. Colours are Okabe and
Ito's, which colour-blind readers tell apart; nothing is told by colour alone.
"""

import importlib.util
import io
import math
import signal
import textwrap
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgeexit import bounds
from edgeexit.advisor import Advice
from edgeexit.decision import Bools, Costs, Family, Record, Tally
from edgeexit.errors import UsageError, printable
from edgeexit.files import check_output, write_file
from edgeexit.ranking import PROBABILITY, Ranking, rankings

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Floats = NDArray[np.float64]
# kept, bool (E,) -> what leaving at each exit costs, float64 (E,).
Pricing = Callable[[Bools], Floats]

SUFFIXES = (".png", ".svg")
BLACK, GREY, BLUE, ORANGE, GREEN, RED = (
    *("#000000", "#999999", "#0072B2", "#E69F00", "#009E73", "#D55E00"),
)
# One look for each exit, in turn: colour, marker.
_LOOKS = (
    *((BLUE, "o"), (RED, "s"), (GREEN, "^"), ("#CC79A7", "D"), (ORANGE, "v"), ("#56B4E9", "P")),
)
COIN = 0.5  # the AUROC of a confidence that tells nothing
_MOST_NAMED = 12  # more exits than this are numbered
_PANEL_INCHES = (4.6, 3.7)
_STYLE: dict[str, Any] = {
    "svg.hashsalt": "edgeexit",
    "text.parse_math": False,  # a name of an exit may hold any character
    "font.size": 9.0,
    "axes.titlesize": 10.0,
    "legend.fontsize": 7.5,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.dpi": 100.0,
    "savefig.dpi": 150.0,
}


@dataclass(frozen=True, kw_only=True, eq=False)
class Front:
    """
    Mean cost in *unit* of every policy, float64 (S,), and of each exit as a static network (E,).

    *quantity* is what stands at the axis, such as "mean latency per answer".
    """

    quantity: str
    unit: str
    costs: Floats
    statics: Floats


@dataclass(frozen=True, kw_only=True, eq=False)
class Chart:
    """
    What draw shows, on N samples.

    accuracy float64 (S,) of the policies from strict to loose, of which first..certified keep the
    promise (a drop of at most *level*, None: no such promise) and *position* is deployed;
    exit_rates float64 (E,) are that one's. static_accuracy float64 (E,) is each exit's own,
    reference that which the drop is counted from. int8 are the rankings of the deployed exits'
    *measure*, real those of the float network's (None: unknown).
    """

    title: str
    exits: tuple[str, ...]
    samples: int
    accuracy: Floats
    fronts: tuple[Front, ...]
    static_accuracy: Floats
    first: int
    certified: int
    position: int
    exit_rates: Floats
    reference: float
    level: float | None
    measure: str
    int8: tuple[Ranking, ...]
    real: tuple[Ranking, ...] | None = None
    advice: Advice | None = None


def check_plot(path: Path | str) -> None:
    """
    Refuse a --plot before hours go into what it shall show.

    UsageError for a name that is neither png nor svg, or without the drawing library;
    StorageError if the folder takes no file.
    """
    path = Path(path)
    if path.suffix.lower() not in SUFFIXES:
        raise UsageError(
            f"{path}: suffix {path.suffix or 'none'!r}, expected {' or '.join(SUFFIXES)}"
        )
    if importlib.util.find_spec("matplotlib") is None:
        raise UsageError(
            "--plot needs matplotlib; not installed here", hint='pip install "edgeexit[plot]"'
        )
    check_output(path)


def chart(
    family: Family,
    record: Record,
    exits: Sequence[str],
    *,
    ms: Costs | Pricing | None = None,
    mj: Costs | Pricing | None = None,
    energy: str = "mean energy per answer",
    first: int = 0,
    certified: int,
    position: int,
    level: float | None,
    measure: str = PROBABILITY,
    title: str = "",
    real: tuple[Ranking, ...] | None = None,
    advice: Advice | None = None,
) -> Chart:
    """
    The chart of *family* on the samples of *record*.

    *family* may go on behind the row *certified*: what was not certified is shown as such. *ms*
    and *mj* are costs in these units, as parts or by kept set, at least one of them; *energy*
    says how the energy is known.
    *measure* names the record's confidence; *real* are the rankings of the float network's exits
    (ranking.rankings), matched by name.
    """
    names = tuple(map(printable, exits))
    if not 0 <= first <= position <= certified < len(family):
        raise UsageError(
            f"chart: rows {first}, {position}, {certified} of {len(family)}, expected them in order"
        )
    if len(names) != record.exits or len(record) == 0 or (ms is None and mj is None):
        raise UsageError(
            f"chart: {len(record)} samples, {record.exits} exits, {len(names)} names, expected "
            "samples, a name for each exit and at least one kind of cost"
        )
    tally = family.tally(record)
    reference = float(record.reference.mean())
    alone = np.eye(record.exits, dtype=bool)
    return Chart(
        title=printable(title),
        exits=names,
        samples=len(record),
        accuracy=np.asarray(reference - tally.drop),
        fronts=tuple(
            Front(
                quantity=printable(quantity),
                unit=unit,
                costs=_mean_costs(family, tally, price),
                statics=np.array([price(kept)[k] for k, kept in enumerate(alone)]),
            )
            for quantity, unit, price in (
                ("mean latency per answer", "ms", _priced(ms)),
                (energy, "mJ", _priced(mj)),
            )
            if price is not None
        ),
        static_accuracy=np.asarray(record.correct.mean(axis=0)),
        first=first,
        certified=certified,
        position=position,
        exit_rates=np.asarray(tally.rates[position]),
        reference=reference,
        level=level,
        measure=measure,
        int8=rankings(record.confidence, record.correct, exits, measure=measure),
        real=real,
        advice=advice,
    )


def _priced(given: Costs | Pricing | None) -> Pricing | None:
    return given.at if isinstance(given, Costs) else given


def _mean_costs(family: Family, tally: Tally, price: Pricing) -> Floats:
    known: dict[bytes, Floats] = {}
    rows = []
    for place in range(len(family)):
        kept = family.policy(place).kept
        rows.append(known.setdefault(kept.tobytes(), price(kept)))
    # Where nobody leaves, the price may be unknown.
    return np.asarray((tally.rates * np.where(tally.rates > 0, rows, 0.0)).sum(axis=1))


def draw(shown: Chart, path: Path | str) -> None:
    """Write *shown* durably to *path*, as png or svg by its suffix. Errors as check_plot's."""
    path = Path(path)
    check_plot(path)
    from matplotlib import style
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels: list[Callable[[Axes], None]] = [
        *[lambda axes, front=front: _front(axes, shown, front) for front in shown.fronts],
        lambda axes: _histogram(axes, shown),
        lambda axes: _reliability(axes, shown),
        lambda axes: _auroc(axes, shown),
    ]
    if shown.advice is not None:
        panels.append(lambda axes: _advice(axes, shown))
    columns = 3 if len(panels) > 4 else 2
    rows = math.ceil(len(panels) / columns)
    width, height = _PANEL_INCHES
    data = io.BytesIO()
    with _interrupted_later(), style.context(["default", _STYLE]), warnings.catch_warnings():
        # A name in a script that the font lacks is drawn as boxes.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
        FigureCanvasAgg(figure)
        for k, panel in enumerate(panels):
            panel(figure.add_subplot(rows, columns, k + 1))
        if shown.title:
            figure.suptitle(textwrap.fill(shown.title, 60 * columns), fontsize=11)
        kind = path.suffix.lower()[1:]
        figure.savefig(
            data, format=kind, metadata={"Software": None} if kind == "png" else {"Date": None}
        )
    write_file(path, data.getvalue())


@contextmanager
def _interrupted_later() -> Iterator[None]:
    """Ctrl-C waits until the end: the library's compiled parts turn it into other errors."""
    usual = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if not usual or threading.current_thread() is not threading.main_thread():
        yield
        return
    pressed: list[int] = []
    signal.signal(signal.SIGINT, lambda number, _: pressed.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if pressed:
        raise KeyboardInterrupt


# ---------------------------------------------------------------- panels


def _front(axes: "Axes", shown: Chart, front: Front) -> None:
    rows = np.arange(len(shown.accuracy))
    inside = (rows >= shown.first) & (rows <= shown.certified)
    # What loses very much more than is allowed would leave no room for what is in question.
    least = -1.0 if shown.level is None else shown.reference - max(10 * shown.level, 0.05)
    visible = inside | (shown.accuracy >= least)
    outside, statics = (
        visible & ~inside,
        np.flatnonzero((shown.static_accuracy >= least) & np.isfinite(front.statics)),
    )
    percent = 100 * shown.accuracy
    kept = front.costs[inside]
    axes.axvspan(kept.min(), kept.max(), color=BLUE, alpha=0.10, lw=0, label="certified region")
    if shown.level is not None:
        floor = 100 * (shown.reference - shown.level)
        points = f"{100 * shown.level:g} point" + ("" if shown.level == 0.01 else "s")
        axes.axhline(floor, color=GREY, ls="--", lw=1, label=f"reference less {points}")
    look: dict[str, Any] = {"ls": "", "ms": 4}
    axes.plot(front.costs[visible], percent[visible], color=GREY, lw=0.8, zorder=1)
    if outside.any():
        axes.plot(
            *(front.costs[outside], percent[outside]),
            **look,
            marker="o",
            mfc="white",
            mec=GREY,
            label="not certified",
        )
    axes.plot(kept, percent[inside], **look, marker="o", color=BLUE, label="certified")
    axes.plot(
        *(front.statics[statics], 100 * shown.static_accuracy[statics]),
        ls="",
        marker="^",
        ms=7,
        mfc="white",
        mec=BLACK,
        label="one exit, static",
    )
    for k in statics:
        axes.annotate(
            _names(shown)[k],
            (front.statics[k], 100 * shown.static_accuracy[k]),
            xytext=(0, -11),
            textcoords="offset points",
            ha="center",
            fontsize=7,
        )
    right = round(shown.accuracy[shown.position] * shown.samples)
    low, high = bounds.interval(right, shown.samples)
    here = percent[shown.position]
    axes.errorbar(
        front.costs[shown.position],
        here,
        yerr=[[max(0.0, here - 100 * low)], [max(0.0, 100 * high - here)]],
        fmt="*",
        ms=13,
        color=ORANGE,
        mec=BLACK,
        ecolor=BLACK,
        elinewidth=0.8,
        capsize=2,
        zorder=5,
        label="deployed policy, 95 % interval",
    )
    axes.margins(0.08, 0.12)
    axes.set(
        title=f"Accuracy against {front.quantity}",
        xlabel=f"{front.quantity} [{front.unit}]",
        ylabel=f"accuracy on {shown.samples:,} samples [%]",
    )
    axes.legend(loc="lower right", framealpha=0.85)


def _histogram(axes: "Axes", shown: Chart) -> None:
    places = np.arange(len(shown.exits))
    bars = axes.bar(places, 100 * shown.exit_rates, color=BLUE, edgecolor=BLACK, lw=0.5)
    if len(places) <= _MOST_NAMED:
        axes.bar_label(bars, fmt="%.1f", fontsize=8)
    _exit_ticks(axes, shown)
    axes.margins(y=0.12)
    axes.set(
        title="Where samples leave (deployed policy)", xlabel="exit", ylabel="share of samples [%]"
    )
    axes.grid(visible=False, axis="x")


def _reliability(axes: "Axes", shown: Chart) -> None:
    is_share = shown.measure == PROBABILITY
    if is_share:
        axes.plot([0, 100], [0, 100], color=GREY, lw=1, ls="--", label="as sure as right")
    for k, row in enumerate(shown.int8):
        color, marker = _LOOKS[k % len(_LOOKS)]
        found, error = row.reliability, row.reliability.error
        middle = 100 * found.accuracy
        label = _names(shown)[k] + ("" if error is None else f" (error {100 * error:.1f} points)")
        axes.errorbar(
            100 * found.confidence if is_share else found.confidence,
            middle,
            yerr=np.abs(np.stack([100 * found.low, 100 * found.high]) - middle),
            fmt=f"{marker}-",
            color=color,
            ms=4,
            lw=1,
            elinewidth=0.7,
            label=label,
        )
    unit = "[%]" if is_share else f"({shown.measure})"
    axes.set(
        title="Reliability: is a sure exit right?",
        xlabel=f"mean confidence of the bin {unit}",
        ylabel="accuracy of the bin [%]",
    )
    if len(shown.exits) <= _MOST_NAMED:
        axes.legend(loc="lower right" if is_share else "best", framealpha=0.85)


def _auroc(axes: "Axes", shown: Chart) -> None:
    real = {row.exit: row for row in shown.real or ()}
    series: list[tuple[str, str, str, list[float | None]]] = [
        ("int8", BLUE, "", [row.auroc for row in shown.int8])
    ]
    if real:
        found = [real[row.exit].auroc if row.exit in real else None for row in shown.int8]
        series.insert(0, ("float", ORANGE, "//", found))
    width = 0.8 / len(series)
    for k, (name, color, hatch, values) in enumerate(series):
        places = np.arange(len(values)) + (k - (len(series) - 1) / 2) * width
        there = [value is not None for value in values]
        heights = np.array([value for value in values if value is not None], np.float64)
        bars = axes.bar(
            places[there],
            heights - COIN,
            width,
            bottom=COIN,
            color=color,
            hatch=hatch,
            edgecolor=BLACK,
            lw=0.5,
            label=name,
        )
        if len(values) <= _MOST_NAMED:
            axes.bar_label(bars, [f"{value:.3f}" for value in heights], fontsize=7)
    axes.axhline(COIN, color=GREY, ls="--", lw=1, label="a coin")
    _exit_ticks(axes, shown)
    axes.set(
        title="Does confidence foretell a right answer?",
        xlabel="exit",
        ylabel="AUROC of confidence against correctness",
        ylim=(min([COIN, *(v for *_, row in series for v in row if v is not None)]) - 0.04, 1.05),
    )
    axes.grid(visible=False, axis="x")
    axes.legend(loc="upper left", ncols=3, framealpha=0.85)


def _advice(axes: "Axes", shown: Chart) -> None:
    assert shown.advice is not None
    advice = shown.advice
    for is_predicted, color, marker, line, label in (
        (False, BLUE, "o", "-", "parts of the labels at hand"),
        (True, RED, "s", "--", "predicted"),
    ):
        # The prediction starts where the labels end.
        rows = [
            p
            for p in advice.points
            if p.is_predicted == is_predicted or p.samples == advice.present
        ]
        if len(rows) == 1 and is_predicted:
            continue
        saved = 100 * np.array([p.saved for p in rows])
        ends = 100 * np.array([[p.low for p in rows], [p.high for p in rows]])
        axes.errorbar(
            [p.samples for p in rows],
            saved,
            yerr=np.abs(ends - saved),
            ms=4,
            lw=1,
            elinewidth=0.7,
            label=label,
            color=color,
            marker=marker,
            ls=line,
            mfc="white" if is_predicted else color,
        )
    axes.axvline(advice.present, color=GREY, ls=":", lw=1, label=f"now: {advice.present:,}")
    axes.set_xscale("log")
    axes.set_xticks([], minor=True)
    sizes = [point.samples for point in advice.points]
    axes.set_xticks(sizes, [f"{size:,}" for size in sizes], rotation=30, ha="right")
    axes.set(
        title="What more labels would buy",
        xlabel="certificate samples",
        ylabel="certified saving, median and range [%]",
    )
    axes.legend(loc="lower right", framealpha=0.85)


def _names(shown: Chart) -> list[str]:
    return [name if len(name) <= 16 else f"{name[:15]}…" for name in shown.exits]


def _exit_ticks(axes: "Axes", shown: Chart) -> None:
    count = len(shown.exits)
    if count <= _MOST_NAMED:
        is_long = max(map(len, _names(shown))) * count > 40
        axes.set_xticks(
            range(count),
            _names(shown),
            rotation=30 if is_long else 0,
            ha="right" if is_long else "center",
        )
