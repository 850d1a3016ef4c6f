"""
Results as text for people: pure functions from profiles, policies and evaluations to lines.

Hidden here: whatever names stand in other people's files are made harmless and short, and
tables fit into 100 columns.
"""

import math
import textwrap
from collections.abc import Sequence
from statistics import median

from edgeexit.blocks import CLEAN, STATUSES
from edgeexit.collect import Progress
from edgeexit.compare import YARDSTICK, Comparison, Row
from edgeexit.dissect import SegmentCost
from edgeexit.energy import Energy
from edgeexit.errors import printable
from edgeexit.evaluate import Evaluation
from edgeexit.parts import fit
from edgeexit.policy import DROPPED, Policy
from edgeexit.prices import FITTED
from edgeexit.profile import Estimate, Profile
from edgeexit.request import promise
from edgeexit.verdict import NO_EXITS, named, unseen, watched
from edgeexit.worth import FULL, POLICY, RIVAL, STATIC, Worth

# A saving below this is within what two measurements of one thing differ by.
_WIDTH = 100
_NAME_WIDTH = 20
_LISTED = 5


def text_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """An aligned table; the first column to the left, the others to the right."""
    cells = [list(heads), *(list(row) for row in rows)]
    widths = [max(len(row[k]) for row in cells) for k in range(len(heads))]
    lines = []
    for row in cells:
        first, *others = (
            cell.ljust(width) if k == 0 else cell.rjust(width)
            for k, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        lines.append("  ".join([first, *others]).rstrip())
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


def milliseconds(ms: float) -> str:
    """Three significant digits, never an exponent."""
    if not math.isfinite(ms) or ms <= 0:
        return f"{ms:.3f}"
    return f"{ms:.{max(0, min(6, 2 - math.floor(math.log10(ms))))}f}"


def live_line(progress: Progress) -> str:
    """
    How it stands: "exit2: 3.41 ms ± 0.6 %, 12/40 blocks, 54 °C, not throttled, ETA 40 s".

    The exit is the one whose interval is widest; before there are intervals, what is going on.
    """
    parts = [printable(progress.what)]
    if progress.exits:
        name, found = max(progress.exits, key=lambda pair: pair[1].half_width)
        parts = [f"{_short(name)}: {milliseconds(found.value / 1e6)} ms ± {found.half_width:.1%}"]
    wanted = f"/{progress.wanted}" if progress.blocks <= progress.wanted else ""
    if progress.wanted:
        parts.append(f"{progress.blocks}{wanted} blocks")
    reading = progress.reading
    if reading is not None and reading.temperature_c is not None:
        parts.append(f"{reading.temperature_c:.0f} °C")
    if reading is not None and reading.throttled is not None:
        parts.append("THROTTLED" if reading.throttled & 0xF else "not throttled")
    return ", ".join([*parts, f"ETA {progress.left_s:.0f} s"]).replace("%", " %")


def profile_table(profile: Profile, *, everything: bool = False) -> str:
    """
    What leaving at each exit costs, beside the networks without exits; parts; machine; verdict.

    With *everything* also a row for each exit of every set of kept exits.
    """
    blocks = sum(len(values) for values in profile.blocks_ns(profile.full))
    threads = "1 thread" if profile.threads == 1 else f"{profile.threads} threads"
    pinned = f" on cores {','.join(map(str, profile.cores))}" if profile.cores else ""
    delegate = f" with {profile.delegate}" if profile.delegate else ""
    head = (
        f"{profile.bundle_name} on {profile.device}, {profile.mode}: {profile.runtime}{delegate}, "
        f"{threads}{pinned}; {_count(len(profile.processes), 'process', 'processes')}, "
        f"{_count(blocks, 'block', 'blocks')} of each path"
    )
    sections = [_wrapped(head), _costs(profile), _parts(profile)]
    if everything:
        sections.append(_all_paths(profile))
    sections += [_machine(profile), profile_verdict(profile)]
    return "\n\n".join(filter(None, sections))


def profile_verdict(profile: Profile) -> str:
    """The verdict with a line for each reason, and what the machine did not tell."""
    verdict = profile.verdict
    lines = [f"verdict: {verdict.status.upper()} ({STATUSES[verdict.status]})"]
    lines += [_wrapped(f"- {reason.text} [{reason.kind}]", "  ") for reason in verdict.reasons]
    kept_back = unseen(profile)
    if kept_back:
        lines.append(_wrapped(f"this machine does not tell its {', '.join(kept_back)}", "  "))
    return "\n".join(lines)


def _costs(profile: Profile) -> str:
    """A row for each exit with all exits kept, and for each network without exits."""
    energy = profile.energy
    full = profile.full
    whole = [(named(profile, case), case) for case in watched(profile)]
    alone = [((name,), name) for name in profile.exits[:-1]]
    smaller = [(f"{_short(name)} alone", profile.case(kept, name)) for kept, name in alone]
    known = [case for _, case in whole]
    rows = []
    for name, case in [*whole, *((n, c) for n, c in smaller if c is not None and c not in known)]:
        found, share = profile.latency(case), profile.share(case, full).value
        tails = [profile.tail(case, quantile) for quantile in (0.95, 0.99)]
        row = [_short(name), milliseconds(found.value / 1e6), _width(found)]
        row += ["-" if tail is None else milliseconds(tail.value / 1e6) for tail in tails]
        row += [f"{share:.1%}", f"{1 / share:.2f}x"]
        if energy is not None:
            place = profile.cases.index(case)
            row += ["-"] * 3 if place not in energy.cases else _millijoules(energy, place)
        rows.append(row)
    heads = ["leave at", "ms", "±", "p95", "p99", "of full", "faster"]
    lines = []
    if energy is not None:
        heads += ["mJ gross", "±", "mJ net"]
        lines = [_wrapped(text) for text in _energy_lines(profile, energy)]
    full_note = f"full: the same network {NO_EXITS}; ±: half of the 95 % interval over processes"
    return "\n".join([text_table(heads, rows), "", full_note, *lines])


def _millijoules(energy: Energy, case: int) -> list[str]:
    gross, net = energy.gross_mj(case), energy.net_mj(case)
    width = f"{gross.half_width:.1%}" if math.isfinite(gross.half_width) else "-"
    return [f"{gross.value:.3g}", width, f"{net.value:.3g}"]


def _energy_lines(profile: Profile, energy: Energy) -> list[str]:
    info, idle_w = energy.info, [power_mw / 1e3 for power_mw in energy.idle_mw]
    cost = energy.sampler_share
    rate = f"{energy.rate_hz:.3g} values a second"
    reading = "" if cost is None else f"; reading it took {cost:.2%} of a core"
    lines = [
        f"joules: {info.label}, by {info.instrument}, {rate}{reading}",
        f"boundary: {info.boundary}",
        f"net: less what idling takes, {min(idle_w):.3g} .. {max(idle_w):.3g} W",
    ]
    if "warning" in info.details:
        lines.append(f"WARNING: {printable(str(info.details['warning']))}")
    return [*lines, *_savings(profile, energy)]


def _savings(profile: Profile, energy: Energy) -> list[str]:
    """At a pace: what leaving early saves of all that the meter sees, waiting included."""
    full = profile.cases.index(profile.full)
    if energy.pace_hz is None or full not in energy.cases:
        return []
    whole = {"external": "the board's energy"}.get(energy.label, f"the energy ({energy.label})")
    lines = []
    for place in energy.cases:
        found = energy.saving(place, full)
        if place != full:
            lines.append(
                f"leaving at {named(profile, profile.cases[place])} saves {found.value:.1%} "
                f"({found.low:.1%} .. {found.high:.1%}) of {whole} at {energy.pace_hz:g} inputs a "
                "second, against the network without exits"
            )
    return lines


def _parts(profile: Profile) -> str:
    """A row for each segment: what its parts cost in a call, and what opening it costs."""
    found = fit(profile)
    seen = [process.dissection for process in profile.processes if process.dissection]
    rows = []
    for place, name in enumerate(profile.exits):
        parts = (found.backbone_ns(name), found.head_ns(name), found.handover_ns(name))
        row = ["-" if part is None else _signed_ms(part.value / 1e6) for part in parts]
        segments = [d.segments[place] for d in seen if len(d.segments) == len(profile.exits)]
        row += _opening(segments)
        rows.append([_short(name), *row])
    heads = ["segment of", "backbone ms", "head ms", "hand-over ms"]
    heads += ["load ms", "first call ms", "memory MB"]
    lines = [f"parts are fitted; paths that were timed differ by up to {found.worst_residual:.1%}"]
    if seen:
        input_ms = median(dissection.preprocess_ns for dissection in seen) / 1e6
        idle_ms = median(dissection.after_idle_ns for dissection in seen) / 1e6
        lines.append(
            f"input stage {milliseconds(input_ms)} ms; first call of all segments after idling "
            f"{milliseconds(idle_ms)} ms"
        )
    return "\n".join([text_table(heads, rows), "", *lines])


def _opening(segments: Sequence[SegmentCost]) -> list[str]:
    if not segments:
        return ["-"] * 3
    grown = [cost.memory_bytes for cost in segments if cost.memory_bytes is not None]
    return [
        milliseconds(median(cost.load_ns for cost in segments) / 1e6),
        milliseconds(median(cost.first_ns for cost in segments) / 1e6),
        f"{median(grown) / 2**20:.1f}" if grown else "-",
    ]


def _all_paths(profile: Profile) -> str:
    rows = []
    for kept in profile.kept_sets():
        for name in kept:
            case = profile.case(kept, name)
            assert case is not None
            found, share = profile.latency(case), profile.share(case, profile.full)
            costs = [milliseconds(found.value / 1e6), _width(found)]
            rows.append(["+".join(map(_short, kept)), _short(name), *costs, f"{share.value:.1%}"])
    return text_table(["kept exits", "leave at", "ms", "±", "of full"], rows)


def _machine(profile: Profile) -> str:
    """One line of facts: what the machine is, how fast and how warm it was."""
    facts = profile.machine
    readings = [reading for process in profile.processes for reading in process.readings]
    about = [str(facts.get("board") or facts.get("cpu") or facts.get("machine") or "unknown")]
    clocks = [max(reading.clocks_mhz) for reading in readings if reading.clocks_mhz]
    if clocks:
        about.append(f"clock {_span(clocks, 'MHz')}")
    governors = sorted({name for reading in readings for name in reading.governors})
    if governors:
        about.append(f"governor {'/'.join(governors)}")
    degrees = [r.temperature_c for r in readings if r.temperature_c is not None]
    if degrees:
        about.append(_span(degrees, "°C"))
    bits = [reading.throttled for reading in readings if reading.throttled is not None]
    if bits:
        about.append("throttled" if any(value & 0xF for value in bits) else "not throttled")
    about.append(f"a turn of the yardstick {profile.yardstick_ns / 1e3:.4g} us")
    return _wrapped("machine: " + ", ".join(about))


def _span(values: Sequence[float], unit: str) -> str:
    low, high = f"{min(values):.0f}", f"{max(values):.0f}"
    return f"{low} {unit}" if low == high else f"{low} .. {high} {unit}"


def _signed_ms(ms: float) -> str:
    return f"-{milliseconds(-ms)}" if ms < 0 else milliseconds(ms)


def _width(found: Estimate) -> str:
    """Half the interval as a share; one process alone has none."""
    return f"{found.half_width:.1%}" if math.isfinite(found.half_width) else "-"


def _short(name: str) -> str:
    name = printable(name)
    return name if len(name) <= _NAME_WIDTH else f"{name[: _NAME_WIDTH - 3]}..."


def _count(number: int, one: str, many: str) -> str:
    return f"{number} {one if number == 1 else many}"


def _wrapped(text: str, indent: str = "") -> str:
    return textwrap.fill(
        printable(text), _WIDTH, initial_indent=indent, subsequent_indent=indent + "  "
    )


# ---------------------------------------------------------------- two profiles


def comparison_table(comparison: Comparison) -> str:
    """A row for each exit, what else differs, and the result as the last line."""
    rows = []
    for row in comparison.rows:
        counted = comparison.ratio(row)
        cells = [_short(row.name), milliseconds(row.a.value / 1e6), milliseconds(row.b.value / 1e6)]
        cells += [f"{row.time.ratio:.3f}", f"{row.yardstick.ratio:.3f}"]
        cells += [f"{counted.low:.3f} .. {counted.high:.3f}", f"{counted.chance:.2g}"]
        if comparison.joule_labels:
            pair = [row.a_mj, row.b_mj]
            cells += ["-" if mj is None else f"{mj:.3g}" for mj in pair]
            cells.append("-" if row.energy is None else f"{row.energy.ratio:.3f}")
        rows.append(cells)
    heads = ["leave at", "A ms", "B ms", "B/A", "by yardstick", "95 % interval", "p"]
    if comparison.joule_labels:
        heads += ["A mJ", "B mJ", "B/A"]
    basis = "ratios to the yardstick" if comparison.basis == YARDSTICK else "times"
    lines = [_wrapped(f"! {note}") for note in comparison.notes]
    if lines:
        lines.append("")
    lines += [text_table(heads, rows), ""]
    lines.append(_wrapped(f"interval and p are of {basis}: {comparison.why}"))
    joules = comparison.energy_summary()
    if joules is not None:
        labels = " and ".join(comparison.joule_labels)
        lines.append(_wrapped(f"joules (gross, {labels}, window by window): {joules}"))
    return "\n".join([*lines, comparison.summary()])


def unsure_line(comparison: Comparison, rows: Sequence[Row], allowed: float) -> str:
    """What the data cannot tell: where B may or may not be slower by more than *allowed*."""
    listed = ", ".join(
        f"{_short(row.name)} (up to {comparison.ratio(row).high:.3f}x)" for row in rows[:_LISTED]
    )
    more = f" and {len(rows) - _LISTED} more" if len(rows) > _LISTED else ""
    mine, yours = comparison.processes
    return (
        f"cannot tell whether B is slower by more than {allowed:.3g} at {listed}{more}: "
        f"{mine} and {yours} processes; measure with more --processes"
    )


# ---------------------------------------------------------------- policies and evaluations


def policy_table(policy: Policy, worth: Worth) -> str:
    """The exits with thresholds, rates and ms; expectations beside the rivals; the promise."""
    expected, held = policy.expected, policy.certificate
    without = uncertified(policy, worth)
    rows = []
    shares = zip(policy.exits, expected["exit_rates"], expected["exit_accuracy"], strict=True)
    for name, rate, alone in shares:
        threshold = policy.threshold(name)
        text = "final" if name == policy.exits[-1] else f"{threshold:.6g}"
        ms = expected["exit_ms"].get(name)
        rows.append(
            [
                name,
                "dropped" if threshold == DROPPED else text,
                f"{rate:.1%}",
                "" if ms is None else milliseconds(ms),
                f"{alone:.2%}",
            ]
        )
    return "\n".join(
        [
            f"Policy for {policy.device}: measure {policy.measure}, method {held['method']}",
            "",
            text_table(["exit", "threshold", "leave here", "ms", "its accuracy on all"], rows),
            "",
            *_worth_tables(worth),
            *_policy_notes(policy),
            f"Seen on {held['samples']} certificate samples: {held['harmful']} became wrong, "
            f"{held['helpful']} right (drop {held['drop']:+.2%}).",
            _wrapped(promise(policy)),
            _wrapped(worth.sentence[0].upper() + worth.sentence[1:] + "."),
            *([] if without is None else [_wrapped(f"{without[0].upper()}{without[1:]}.")]),
        ]
    )


def uncertified(policy: Policy, worth: Worth) -> str | None:
    """That what *worth* proposes to ship carries no certificate; None if it does, or needs none."""
    kind = FULL if (worth.ship, worth.static_exit) == (STATIC, policy.exits[-1]) else worth.ship
    # The full network loses nothing against itself.
    is_reference = kind == FULL and policy.certificate["digests"]["reference"] is None
    if kind == POLICY or is_reference:
        return None
    row = next(row for row in worth.rows if row.kind == kind)
    seen = row.accuracy
    what = f"the {row.title}" if kind == RIVAL else f"exit {_short(worth.static_exit)!r} alone"
    return (
        f"no certificate: accuracy of {what} as measured on {row.samples} certificate samples: "
        f"{seen.value:.2%} ({seen.low:.2%} .. {seen.high:.2%})"
    )


def _worth_tables(worth: Worth) -> list[str]:
    """The policy and its rivals: the networks alone, then end to end, then what to mind."""
    lines = [text_table(*worth.table_rows()), ""]
    end = worth.end_rows()
    if end is not None:
        lines += [text_table(*end), ""]
    return [*lines, *(_wrapped(note) for note in worth.notes), ""]


def _policy_notes(policy: Policy) -> list[str]:
    """Where the costs come from, if not simply from a clean profile that timed these exits."""
    provenance = policy.provenance
    lines = []
    costs = provenance.get("costs", {})
    if costs.get("origin") == FITTED:
        lines.append(
            f"These exits were not timed together: their ms are fitted from {costs['paths']} other "
            f"paths (which the fit meets within {costs['worst_residual']:.1%})."
        )
    if policy.class_offsets is not None:
        lines.append(
            "Each class has a threshold of its own: the one above plus its number in class_offsets "
            "of the policy file."
        )
    verdict = provenance.get("profile_verdict", {})
    if verdict.get("status", CLEAN) != CLEAN:
        status = verdict["status"]
        lines.append(f"The profile was {status.upper()}: {STATUSES[status]}.")
    return [*(_wrapped(line) for line in lines), ""] if lines else []


def evaluation_table(evaluation: Evaluation) -> str:
    """Accuracy with its interval, exit rates, latencies, each class's accuracy and confusions."""
    low, high = evaluation.interval
    exits = [
        [name, f"{rate:.1%}"]
        for name, rate in zip(evaluation.exits, evaluation.exit_rates, strict=True)
    ]
    classes = []
    for k, (name, share) in enumerate(
        zip(evaluation.class_names, evaluation.per_class, strict=True)
    ):
        row = [count if j != k else 0 for j, count in enumerate(evaluation.confusion[k])]
        most = max(row)
        mixed = f"{evaluation.class_names[row.index(most)]} ({most})" if most else ""
        count = sum(evaluation.confusion[k])
        classes.append([name, str(count), "" if share is None else f"{share:.1%}", mixed])
    return "\n".join(
        [
            f"{evaluation.data}: {evaluation.samples} samples, policy {evaluation.policy}",
            "",
            f"accuracy  {evaluation.accuracy:.2%}  (95 % interval {low:.2%} .. {high:.2%})",
            f"latency   {milliseconds(evaluation.mean_ms)} ms mean, "
            f"{milliseconds(evaluation.p95_ms)} ms p95",
            "",
            text_table(["exit", "leave here"], exits),
            "",
            text_table(["class", "samples", "accuracy", "most taken for"], classes),
        ]
    )
