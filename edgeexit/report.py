"""
Results as text for people: pure functions from Profile, Policy and Evaluation to lines.
"""

import math
from collections.abc import Sequence

from edgeexit.evaluate import Evaluation
from edgeexit.policy import DROPPED, Policy
from edgeexit.profile import Profile

# A saving below this is within what two measurements of one thing differ by.
WORTH_IT = 1.03


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


def profile_table(profile: Profile) -> str:
    """Median ms, its interval and the share of the full network for every case."""
    full = profile.full
    rows = []
    for case in profile.cases:
        found, share = profile.latency(case), profile.share(case, full)
        low, high = milliseconds(found.low / 1e6), milliseconds(found.high / 1e6)
        rows.append(
            [
                "+".join(case.kept),
                case.exit,
                milliseconds(found.value / 1e6),
                f"{low} .. {high}",
                f"{share.value:.1%}",
            ]
        )
    head = (
        f"{profile.bundle_name} on {profile.device}: {profile.runtime}, "
        f"{profile.threads} thread(s), {len(full.blocks_ns)} processes, "
        f"{sum(map(len, full.blocks_ns))} blocks each"
    )
    heads = ["kept exits", "leave at", "median ms", "95 % interval", "of full"]
    return (
        f"{head}\n\n{text_table(heads, rows)}\n\n"
        f"full: the final exit ({profile.exits[-1]}) alone, without other heads"
    )


def verdict(policy: Policy) -> str:
    """One line: is early exit worth it, and if not, what to ship instead."""
    expected = policy.expected
    full, static = float(expected["speed_up_full"]), float(expected["speed_up_static"])
    name = expected["best_static_exit"]
    if name != policy.exits[-1] and static < WORTH_IT:
        return (
            f"Early exit is not worth it here: ship exit {name!r} alone as a static network "
            f"({milliseconds(float(expected['best_static_ms']))} ms, within the same budget)."
        )
    if full < WORTH_IT or len(policy.kept) < 2:
        return "Early exit is not worth it here: the full network is as cheap."
    return (
        f"Early exit is worth it here: {full:.2f}x faster than the full network, "
        f"{static:.2f}x faster than the best static one ({name})."
    )


def policy_table(policy: Policy) -> str:
    """The exits with thresholds, rates and ms; expectations beside the rivals; the check."""
    expected, check = policy.expected, policy.check
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
    rivals = [
        ["this policy", expected["accuracy"], expected["mean_ms"]],
        ["full network", expected["accuracy_full"], expected["full_ms"]],
        [
            f"static: {expected['best_static_exit']}",
            expected["accuracy_static"],
            expected["best_static_ms"],
        ],
    ]
    low, high = expected["accuracy_interval"]
    lines = [
        [name, f"{accuracy:.2%}", milliseconds(ms), f"{ms / expected['mean_ms']:.2f}x"]
        for name, accuracy, ms in rivals
    ]
    return "\n".join(
        [
            f"Policy for {policy.device}: measure {policy.measure}, accuracy drop at most "
            f"{policy.target['max_accuracy_drop']:.2%}",
            "",
            text_table(["exit", "threshold", "leave here", "ms", "its accuracy on all"], rows),
            "",
            text_table(["", "accuracy", "mean ms", "to policy"], lines),
            "",
            f"Accuracy 95 % interval {low:.2%} .. {high:.2%}, on {expected['samples']} "
            f"{expected['split']} samples.",
            f"Checked on them: {check['harmful']} became wrong ({check['harmful_rate']:.2%}; "
            f"upper bound {check['harmful_rate_upper_bound']:.2%}).",
            verdict(policy),
        ]
    )


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
