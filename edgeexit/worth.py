"""
Is early exit worth it here? A policy beside the static networks it has to beat.

Callers see judge_worth, Rival and Worth. The rivals are the same network uncut and without early
exits, the cheapest single exit that is itself within the budget, cut out as a static network,
and a network of one's own. Hidden here: every interval comes from drawing anew what was measured
(processes and blocks of the profile, windows of the meter) together with the exits that samples
leave at, so that it holds the doubt of both; and an exit whose cost alone the profile bounds
only from above is judged by its lower bound. Pure: no clock, no file, no process.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeexit import bounds, intervals
from edgeexit.blocks import Kept
from edgeexit.energy import IDLE, Figure
from edgeexit.errors import UsageError, printable
from edgeexit.prices import FITTED, MEASURED, Prices
from edgeexit.profile import Estimate, Profile
from edgeexit.targets import check_rate_hz

Floats = NDArray[np.float64]
Count = tuple[int, int]

# A saving below this is within what two measurements of one thing differ by.
WORTH_IT = 1.03
POLICY, FULL, STATIC, RIVAL = "policy", "full", "static", "rival"
BOUND = "bound"
MS, MJ = "ms", "mj"
# Of no profile: theirs end at 2**32, and draws of one seed go together.
_SEED = 1 << 40
_NAME_WIDTH = 20
_ORIGINS = (MEASURED, FITTED, BOUND)


@dataclass(frozen=True, kw_only=True)
class Rival:
    """
    A network of one's own to compare with: its final exit alone, as its *profile* measured it.

    *accuracy* is (right, of) on the same samples as the policy's; *within_budget* whether the
    target allows what it gets wrong there.
    """

    name: str
    profile: Profile
    accuracy: Count
    within_budget: bool


@dataclass(frozen=True, kw_only=True)
class Row:
    """
    One contender. *kind* is POLICY, FULL, STATIC or RIVAL; *name* an exit's or the rival's.

    accuracy is a share with its exact interval; ms the mean time of the network; mj the mean
    joules of it, idling meanwhile included, None if the profile does not tell. speed_up and
    less_energy say how many times the policy is better than this. *origin*: "measured", "fitted"
    (priced from parts) or "bound" (what it costs at most; the intervals reach down to the least).

    End to end: end_ms with a picture's decoding (None if the profile does not tell it); at the
    rate busy, the share of time computing, and frame_mj, everything that the meter sees of a
    frame, idling between frames included; None without a rate or if the rate cannot be kept up.
    """

    kind: str
    name: str
    within_budget: bool
    origin: str
    accuracy: Estimate
    samples: int
    ms: Estimate
    speed_up: Estimate
    mj: Figure | None
    less_energy: Estimate | None
    end_ms: Estimate | None
    end_speed_up: Estimate | None
    busy: Estimate | None
    frame_mj: Figure | None
    frame_less_energy: Estimate | None

    @property
    def title(self) -> str:
        """What it is, for a table."""
        return {
            POLICY: "this policy",
            FULL: "uncut, without exits",
            STATIC: f"{_short(self.name)} alone",
            RIVAL: f"rival {_short(self.name)}",
        }[self.kind]

    def to_document(self) -> dict[str, Any]:
        """The row as a JSON object; endless ends of intervals are null."""
        return {key: _finite(value) for key, value in asdict(self).items()}


@dataclass(frozen=True, kw_only=True)
class Worth:
    """
    The verdict: the policy's row first, then its rivals'.

    *ship* is "policy", "static" (one exit alone: static_exit, which is the final one for the
    uncut network) or "rival". *by* is what decided: "ms" or "mj". *rate_hz* as it was asked for.
    """

    rows: tuple[Row, ...]
    pays: bool
    ship: str
    static_exit: str
    by: str
    rate_hz: float | None
    sentence: str
    notes: tuple[str, ...]

    @property
    def energy_label(self) -> str | None:
        """What kind of joules these are, None if there are none."""
        mj = self.rows[0].mj
        return None if mj is None else mj.label

    def to_document(self) -> dict[str, Any]:
        """The verdict as a JSON object."""
        return {
            "early_exit_pays": self.pays,
            "ship": self.ship,
            "static_exit": self.static_exit,
            "sentence": self.sentence,
            "by": self.by,
            "more_than": WORTH_IT,
            "rate_hz": self.rate_hz,
            "energy_label": self.energy_label,
            "rows": [row.to_document() for row in self.rows],
            "notes": list(self.notes),
        }

    def table_rows(self) -> tuple[list[str], list[list[str]]]:
        """Heads and cells of the network alone, ± half of each interval; ratios as in Row."""
        heads = ["", "accuracy", "ms", "to policy"]
        if self.energy_label is not None:
            heads += [f"mJ ({self.energy_label})", "to policy"]
        cells = []
        for row in self.rows:
            line = [row.title, _percent(row.accuracy), _ranged(row.ms), _ratio(row, row.speed_up)]
            if self.energy_label is not None:
                line += ["-" if row.mj is None else _ranged(row.mj)]
                line += [_ratio(row, row.less_energy)]
            cells.append(line)
        return heads, cells

    def end_rows(self) -> tuple[list[str], list[list[str]]] | None:
        """The same end to end, and at the rate; None if the profile tells nothing about it."""
        if self.rows[0].end_ms is None:
            return None
        heads = ["end to end", "ms", "to policy"]
        if self.rate_hz is not None:
            heads.append("busy")
            if self.energy_label is not None:
                heads += [f"mJ a frame ({self.energy_label})", "to policy"]
        cells = []
        for row in self.rows:
            line = [row.title]
            line += ["-" if row.end_ms is None else _ranged(row.end_ms)]
            line += [_ratio(row, row.end_speed_up)]
            if self.rate_hz is not None:
                line.append("-" if row.busy is None else f"{row.busy.value:.1%}")
                if self.energy_label is not None:
                    line += ["-" if row.frame_mj is None else _ranged(row.frame_mj)]
                    line += [_ratio(row, row.frame_less_energy)]
            cells.append(line)
        return heads, cells


def judge_worth(
    policy_rates: Floats,
    kept: Sequence[str],
    samples: int,
    accuracy: Count,
    statics: Mapping[str, Count],
    full: Count,
    profile: Profile,
    rival: Rival | None = None,
    rate_hz: float | None = None,
    by: str = MS,
) -> Worth:
    """
    Compare a policy with what could be shipped instead.

    *policy_rates* float64 (E,) says which share of *samples* samples leaves at each of the
    profile's exits, only at *kept* ones. *accuracy*, *full* and *statics* (the early exits whose
    answers alone are within the budget) are (right, of) on the same samples. Early exit pays if
    the low end of the 95 % interval of the speed-up (or with *by* "mj" of the saving in joules,
    at a rate those of a frame) over each rival within the budget is above 1.03. UsageError for
    rates or a rival that do not fit, or joules that the profile does not tell.
    """
    rates = np.asarray(policy_rates, np.float64)
    _check(rates, kept, profile, rival, rate_hz, by)
    rng = np.random.default_rng(_SEED)
    drawn = rng.multinomial(samples, rates / rates.sum(), intervals.REPLICATES) / samples
    costs = _Costs(profile, rate_hz)
    ours = costs.mix(tuple(kept), rates / rates.sum(), drawn)
    final = profile.exits[-1]
    uncut = costs.alone(final)
    seen: list[tuple[str, str, Count, bool, _Cost]] = [
        (POLICY, "+".join(kept), accuracy, True, ours),
        (FULL, final, full, True, uncut),
    ]
    early = [(costs.alone(name), name) for name in profile.exits[:-1] if name in statics]
    cheapest, static = min(early, key=lambda pair: _price(pair[0], by), default=(uncut, final))
    if _price(cheapest, by) < _price(uncut, by):
        seen.append((STATIC, static, statics[static], True, cheapest))
    else:
        static = final
    if rival is not None:
        theirs = _Costs(rival.profile, rate_hz).alone(rival.profile.exits[-1])
        # Of another measurement: its replicates go with ours by chance alone.
        apart = theirs.shuffled(rng.permutation(intervals.REPLICATES))
        seen.append((RIVAL, rival.name, rival.accuracy, rival.within_budget, apart))
    rows = tuple(_row(*each, ours) for each in seen)
    if by == MJ and any(row.less_energy is None for row in rows if row.within_budget):
        raise UsageError(
            "the profile does not tell the joules of the policy and of all its rivals",
            hint="edgeexit profile --meter measures them",
        )
    pays, ship, sentence = _verdict(rows, len(kept), by)
    return Worth(
        rows=rows,
        pays=pays,
        ship=ship,
        static_exit=static,
        by=by,
        rate_hz=rate_hz,
        sentence=sentence,
        notes=tuple(_notes(rows, profile, rate_hz)),
    )


def _check(
    rates: Floats,
    kept: Sequence[str],
    profile: Profile,
    rival: Rival | None,
    rate_hz: float | None,
    by: str,
) -> None:
    if rates.shape != (len(profile.exits),) or not (rates >= 0).all() or not rates.sum() > 0:
        raise UsageError(
            f"exit rates: expected {len(profile.exits)} shares, found {rates.tolist()}"
        )
    order = [name for name in profile.exits if name in kept]
    if list(kept) != order or profile.exits[-1] not in order:
        raise UsageError(
            f"kept exits {list(kept)}: expected some of {list(profile.exits)}, final last"
        )
    for name, rate in zip(profile.exits, rates, strict=True):
        if rate > 0 and name not in kept:
            raise UsageError(f"exit rates: {rate:.2%} leave at {name!r}, which is not kept")
    if by not in (MS, MJ):
        raise UsageError(f"by {by!r}: expected {MS!r} or {MJ!r}")
    check_rate_hz(rate_hz)
    if rival is not None:
        check_rival(rival.name, profile, rival.profile)


def check_rival(name: str, profile: Profile, other: Profile, by: str = MS) -> None:
    """
    Refuse (UsageError) the profile *other* of a rival that was not measured as *profile* was.

    With *by* "mj" also if its joules cannot be compared with those of *profile*.
    """
    for what in ("device", "threads", "mode"):
        mine, theirs = getattr(profile, what), getattr(other, what)
        if mine != theirs:
            raise UsageError(
                f"rival {name}: {what} {theirs}, expected {mine}",
                hint="measure both bundles alike with: edgeexit profile",
            )
    cost = _Costs(other, None).alone(other.exits[-1])
    label = "none" if profile.energy is None else profile.energy.label
    if by == MJ and (cost.mj is None or cost.label != label):
        raise UsageError(
            f"rival {name}: joules {cost.label if cost.mj else 'none'!r}, expected {label!r}",
            hint="measure both bundles alike with: edgeexit profile --meter ...",
        )


# ---------------------------------------------------------------- what things cost, with doubt


@dataclass(frozen=True, kw_only=True, eq=False)
class _Drawn:
    """A value with its bootstrap replicates; *floor* are those of the least it may be."""

    value: float
    draws: Floats
    processes: int
    floor: Floats | None = None

    def estimate(self) -> Estimate:
        low, high = intervals.interval(self.draws, self.processes)
        if self.floor is not None:
            low = min(low, intervals.interval(self.floor, self.processes)[0])
        return Estimate(value=self.value, low=min(low, self.value), high=max(high, self.value))

    def over(self, other: "_Drawn") -> "_Drawn":
        """How many times *other* this is, of the same draws."""
        return _Drawn(
            value=self.value / other.value,
            draws=self.draws / other.draws,
            processes=min(self.processes, other.processes),
            floor=None if self.floor is None else self.floor / other.draws,
        )

    def map(self, step: Callable[[Any], Any]) -> "_Drawn":
        """*step* (monotone, rising) applied to all of it."""
        return _Drawn(
            value=float(step(self.value)),
            draws=np.asarray(step(self.draws)),
            processes=self.processes,
            floor=None if self.floor is None else np.asarray(step(self.floor)),
        )

    def plus(self, other: "_Drawn") -> "_Drawn":
        return _Drawn(
            value=self.value + other.value,
            draws=self.draws + other.draws,
            processes=min(self.processes, other.processes),
            floor=None if self.floor is None else self.floor + other.draws,
        )

    def shuffled(self, order: NDArray[np.int64]) -> "_Drawn":
        floor = None if self.floor is None else self.floor[order]
        return _Drawn(
            value=self.value, draws=self.draws[order], processes=self.processes, floor=floor
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class _Cost:
    ms: _Drawn
    origin: str
    mj: _Drawn | None
    end_ms: _Drawn | None
    busy: _Drawn | None
    frame_mj: _Drawn | None
    label: str

    def shuffled(self, order: NDArray[np.int64]) -> "_Cost":
        def moved(drawn: _Drawn | None) -> _Drawn | None:
            return None if drawn is None else drawn.shuffled(order)

        return replace(
            self,
            ms=self.ms.shuffled(order),
            mj=moved(self.mj),
            end_ms=moved(self.end_ms),
            busy=moved(self.busy),
            frame_mj=moved(self.frame_mj),
        )


class _Costs:
    """What the paths of one *profile* cost, with replicates that go together."""

    def __init__(self, profile: Profile, rate_hz: float | None) -> None:
        self._profile, self._rate_hz = profile, rate_hz
        self._prices = Prices(profile)
        self._processes = len(profile.processes)

    def mix(self, kept: Kept, rates: Floats, drawn: Floats) -> _Cost:
        """The mean over samples that leave at *rates* (E,), redrawn as *drawn* (replicates, E)."""
        columns = [self._profile.exits.index(name) for name in kept]
        weights, redrawn = rates[columns], drawn[:, columns]
        parts = [self._path(kept, name) for name in kept]
        worst = max((part.origin for part in parts), key=_ORIGINS.index)

        def mean(listed: Sequence[_Drawn | None]) -> _Drawn | None:
            found = [each for each in listed if each is not None]
            if len(found) < len(listed):
                return None
            value = sum(w * each.value for w, each in zip(weights, found, strict=True))
            draws = np.column_stack([each.draws for each in found])
            total = (redrawn * draws).sum(axis=1)
            return _Drawn(value=float(value), draws=total, processes=self._processes)

        ms = mean([part.ms for part in parts])
        assert ms is not None
        return self._whole(ms, worst, mean([p.gross for p in parts]), mean([p.net for p in parts]))

    def alone(self, name: str) -> _Cost:
        """Exit *name* cut out as a static network."""
        path = self._path((name,), name)
        return self._whole(path.ms, path.origin, path.gross, path.net)

    def _whole(self, ms: _Drawn, origin: str, gross: _Drawn | None, net: _Drawn | None) -> _Cost:
        energy, rate_hz, decoding = self._profile.energy, self._rate_hz, self._decoding
        end = None if decoding is None else ms.plus(decoding)
        busy = frame = None
        if rate_hz is not None and end is not None and decoding is not None:
            busy = end.map(lambda value: value * rate_hz / 1e3)
            if energy is not None and net is not None and busy.value <= 1:
                idle_mj = energy.power_mw(IDLE).value / rate_hz
                # Decoding draws what the network draws beyond idling.
                spent = net.plus(decoding.map(lambda value: value * self._net_mw / 1e3))
                frame = spent.map(lambda value: value + idle_mj)
        return _Cost(
            ms=ms,
            origin=origin,
            mj=gross,
            end_ms=end,
            busy=busy,
            frame_mj=frame,
            label="" if energy is None else energy.label,
        )

    def _path(self, kept: Kept, name: str) -> "_Path":
        ms, origin = self._time(kept, name)
        return _Path(
            ms=ms,
            origin=origin,
            gross=self._joules(kept, name, ms, net=False),
            net=self._joules(kept, name, ms, net=True),
        )

    def _time(self, kept: Kept, name: str) -> tuple[_Drawn, str]:
        """Milliseconds as Prices tells them, else their bounds."""
        case = self._profile.case(kept, name)
        if case is not None and self._profile.costs_ns(kept) is not None:
            value, draws = self._profile.value_ns(case), self._profile.replicates(case)
            return self._ms(value, draws), MEASURED
        price = self._prices.parts.price(kept, name)
        replicates = self._prices.parts.replicates(kept, name)
        if price is not None and replicates is not None:
            return self._ms(price.value, replicates), FITTED
        # At most: leaving there with all exits computed. At least: that, had the heads before it
        # taken all that early exits add to the whole network.
        every = self._profile.exits
        most, longest = self._profile.case(every, name), self._profile.case(every, every[-1])
        if most is None or longest is None:
            raise UsageError(
                f"the profile does not tell what leaving at {name!r} of {'+'.join(kept)} costs",
                hint="measure again with: edgeexit profile",
            )
        profile = self._profile
        draws = profile.replicates(most)
        added = profile.replicates(longest) - profile.replicates(profile.full)
        floor = draws if name == every[0] else draws - np.maximum(added, 0)
        return self._ms(profile.value_ns(most), draws, floor), BOUND

    def _ms(self, value: float, draws: Floats, floor: Floats | None = None) -> _Drawn:
        drawn = _Drawn(value=value, draws=draws, processes=self._processes, floor=floor)
        return drawn.map(lambda ns: ns / 1e6)

    def _joules(self, kept: Kept, name: str, ms: _Drawn, *, net: bool) -> _Drawn | None:
        """Measured for this path; else its time at the power that the same exit drew of all."""
        energy, profile = self._profile.energy, self._profile
        if energy is None:
            return None
        for path in (kept, profile.exits):
            case = profile.case(path, name)
            place = -1 if case is None else profile.cases.index(case)
            if case is None or place not in energy.cases:
                continue
            figure = energy.net_mj(place) if net else energy.gross_mj(place)
            draws = energy.replicates(place, net=net)[: intervals.REPLICATES]
            if path == kept:
                return _Drawn(value=figure.value, draws=draws, processes=self._processes)
            # At a pace the board mostly waits: its joules do not follow the latency.
            if energy.pace_hz is not None:
                return None
            taken_ms = profile.value_ns(case) / 1e6
            power_w = _Drawn(
                value=figure.value / taken_ms, draws=draws / taken_ms, processes=self._processes
            )
            return _Drawn(
                value=ms.value * power_w.value,
                draws=ms.draws * power_w.draws,
                processes=self._processes,
                floor=None if ms.floor is None else ms.floor * power_w.draws,
            )
        return None

    @cached_property
    def _net_mw(self) -> float:
        """Milliwatts beyond idling while the uncut network computes, 0 without a meter."""
        energy, profile = self._profile.energy, self._profile
        place = profile.cases.index(profile.full)
        if energy is None or place not in energy.cases:
            return 0.0
        return max(0.0, energy.net_mj(place).value / (profile.value_ns(profile.full) / 1e9))

    @cached_property
    def _decoding(self) -> _Drawn | None:
        """Milliseconds of decoding a JPEG, 0 where no pictures are seen; None if not told."""
        seen = [process.dissection for process in self._profile.processes]
        if any(each is None for each in seen):
            return None
        times = np.array([(each and each.jpeg_ns) or 0.0 for each in seen]) / 1e6
        # The processes that the replicates of the paths draw, too.
        rng = np.random.default_rng(self._profile.seed)
        picked = rng.integers(0, len(seen), (intervals.REPLICATES, len(seen)))
        draws = np.median(times[picked], axis=1)
        return _Drawn(value=float(np.median(times)), draws=draws, processes=self._processes)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Path:
    ms: _Drawn
    origin: str
    gross: _Drawn | None
    net: _Drawn | None


def _row(kind: str, name: str, right: Count, within_budget: bool, cost: _Cost, ours: _Cost) -> Row:
    low, high = bounds.interval(*right)
    value = right[0] / right[1]

    def better(mine: _Drawn | None, theirs: _Drawn | None) -> Estimate | None:
        return None if mine is None or theirs is None else theirs.over(mine).estimate()

    speed_up = better(ours.ms, cost.ms)
    assert speed_up is not None
    return Row(
        kind=kind,
        name=name,
        within_budget=within_budget,
        origin=cost.origin,
        accuracy=Estimate(value=value, low=low, high=high),
        samples=right[1],
        ms=cost.ms.estimate(),
        speed_up=speed_up,
        mj=_labelled(cost.mj, cost.label),
        less_energy=better(ours.mj, cost.mj) if ours.label == cost.label else None,
        end_ms=None if cost.end_ms is None else cost.end_ms.estimate(),
        end_speed_up=better(ours.end_ms, cost.end_ms),
        busy=None if cost.busy is None else cost.busy.estimate(),
        frame_mj=_labelled(cost.frame_mj, cost.label),
        frame_less_energy=better(ours.frame_mj, cost.frame_mj)
        if ours.label == cost.label
        else None,
    )


def _labelled(drawn: _Drawn | None, label: str) -> Figure | None:
    if drawn is None:
        return None
    found = drawn.estimate()
    return Figure(value=found.value, low=found.low, high=found.high, label=label)


def _price(cost: _Cost, by: str) -> float:
    """What decides, endless if joules are not told."""
    if by == MS:
        return cost.ms.value
    return np.inf if cost.mj is None else cost.mj.value


# ---------------------------------------------------------------- the verdict


def _verdict(rows: Sequence[Row], kept: int, by: str) -> tuple[bool, str, str]:
    """Whether early exit pays, what to ship, and why in one sentence."""
    against = [row for row in rows[1:] if row.within_budget]

    # Between frames a board idles: that is paid for with every policy.
    has_frames = all(row.frame_less_energy is not None for row in against)

    def gain(row: Row) -> Estimate:
        energy = row.frame_less_energy if has_frames else row.less_energy
        found = row.speed_up if by == MS else energy
        assert found is not None
        return found

    saving = "saving in joules of a frame" if has_frames else "saving in joules"
    gained = "speed-up" if by == MS else saving
    closest = min(against, key=lambda row: gain(row).low)
    best = min(against, key=lambda row: gain(row).value)
    if gain(closest).low > WORTH_IT:
        parts = [f"{_times(gain(row))} over {_named(row)}" for row in against]
        return True, POLICY, f"early exit pays here: {gained} {', '.join(parts)}"
    found = gain(best)
    ship = RIVAL if best.kind == RIVAL else STATIC
    advice = f"ship {_named(best)}" + (" as a static network" if best.kind == STATIC else "")
    if kept < 2:
        why = "no early exit saves anything within the budget"
    elif gain(closest).low <= WORTH_IT < found.value:
        return (
            False,
            ship,
            f"early exit does not surely pay here: {advice}, or measure with more processes "
            f"({gained} over {_named(closest)} {_times(gain(closest))}, more than {WORTH_IT:g}x is "
            "needed)",
        )
    else:
        why = f"{gained} over it {_times(found)}, more than {WORTH_IT:g}x is needed"
    return False, ship, f"early exit does not pay here: {advice} ({why})"


def _named(row: Row) -> str:
    return {
        FULL: "the network without exits",
        STATIC: f"exit {_short(row.name)!r}",
        RIVAL: f"the rival {_short(row.name)}",
    }[row.kind]


def _notes(rows: Sequence[Row], profile: Profile, rate_hz: float | None) -> list[str]:
    found = []
    fitted = [row.title for row in rows if row.origin == FITTED]
    if fitted:
        found.append(f"priced from the parts of other paths: {', '.join(fitted)}")
    bound = [row.title for row in rows if row.origin == BOUND]
    if bound:
        found.append(
            f"the profile tells only what it costs at most, and its interval at least: "
            f"{', '.join(bound)}"
        )
    end = rows[0].end_ms
    if end is not None:
        seen = profile.processes[0].dissection
        decodes = seen is not None and seen.jpeg_ns is not None
        added = "with decoding a JPEG of the network's size" if decodes else "no picture to decode"
        found.append(f"ms includes the input stage; end to end: {added}")
    if rate_hz is not None and end is not None:
        late = [row.title for row in rows if row.busy is not None and row.busy.value > 1]
        if late:
            found.append(f"too slow for {rate_hz:g} frames a second: {', '.join(late)}")
        if rows[0].frame_mj is not None:
            found.append(
                f"mJ a frame: idling at {rate_hz:g} frames a second, and what decoding and the "
                "network draw beyond it (decoding at the network's power)"
            )
    outside = [row.title for row in rows if not row.within_budget]
    if outside:
        found.append(f"outside the budget, for comparison only: {', '.join(outside)}")
    return found


# ---------------------------------------------------------------- figures as text


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    return None if isinstance(value, float) and not np.isfinite(value) else value


def _digits(value: float) -> str:
    """Three significant digits, never an exponent for what a network costs."""
    return f"{value:#.3g}".rstrip(".") if 1e-4 < abs(value) < 1000 else f"{value:.0f}"


def _ranged(found: Estimate | Figure) -> str:
    return f"{_digits(found.value)}{_half(found)}"


def _ratio(row: Row, found: Estimate | None) -> str:
    if row.kind == POLICY:
        return ""
    return "-" if found is None else f"{found.value:.2f}x{_half(found)}"


def _half(found: Estimate | Figure) -> str:
    """Half of the interval as a share; nothing if it is endless."""
    return f" ±{found.half_width:.1%}" if np.isfinite(found.half_width) else ""


def _times(found: Estimate) -> str:
    if not np.isfinite([found.low, found.high]).all():
        return f"{found.value:.2f}x"
    return f"{found.value:.2f}x ({found.low:.2f}..{found.high:.2f})"


def _percent(found: Estimate) -> str:
    return f"{found.value:.2%} ±{(found.high - found.low) * 50:.1f} pp"


def _short(name: str) -> str:
    name = printable(name)
    return name if len(name) <= _NAME_WIDTH else f"{name[: _NAME_WIDTH - 3]}..."
