"""
The page of bench/seeds/worth.py: its tables and its figure, out of the result file alone.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from seeds.contest import CERTIFICATE, REPORT, STATIC, TUNING, WITHIN, Ask, held_against
from seeds.page import Points, grid, points, verdicts

NAME = "seeds-worth"


def page(found: Mapping[str, Any]) -> str:
    """The section of docs/results.md, without its first line."""
    parts = [_told(found)]
    for seed, run in enumerate(found["runs"]):
        if len(found["runs"]) > 1:
            parts.append(f"Seed {seed}:\n")
        parts += [
            grid(_bar_rows(found, run)),
            _answer(found, run),
            _all_by_one(found, run),
            f"![accuracy against milliseconds](img/{image(found['setting'], seed)})\n",
            "Networks without early exits, int8; exits alone are the trained network cut off "
            "there. Milliseconds of one call, its preprocessing included, in the race: median "
            "(smallest .. largest) over fresh processes; beside it what the instrument says.\n",
            grid(_network_rows(run)),
            _policies_told(found, run),
            grid(_policy_rows(found, run)),
            _refused_told(found, run),
            verdicts(run["verdicts"]),
        ]
    return "\n".join(part for part in parts if part)


def image(setting: Mapping[str, Any], seed: int = 0) -> str:
    """The name of the figure of a *setting*."""
    return f"{NAME}-{setting['depth']}-{setting['epochs']}-{seed}.svg"


def _title(key: str) -> str:
    return key.replace("resnet", "ResNet-") if key.startswith("resnet") else f"`{key}` alone"


def _ask_of(found: Mapping[str, Any], key: str) -> Ask:
    return Ask(**next(ask for ask in found["setting"]["asks"] if ask["key"] == key))


def _barred(found: Mapping[str, Any]) -> list[str]:
    """The pretrained networks with a bar."""
    asks = [Ask(**ask) for ask in found["setting"]["asks"]]
    return [ask.reference for ask in asks if ask.ratio and ask.reference != STATIC]


def _against_text(found: Mapping[str, Any], ask: Ask, against: str) -> str:
    """What a policy's accuracy is held against."""
    if ask.reference == STATIC:
        return f"the best static point ({_title(against)})" if against else "the best static point"
    return _title(ask.reference) if ask.reference else "its own final exit"


def _told(found: Mapping[str, Any]) -> str:
    setting, splits, run = found["setting"], found["splits"], found["runs"][0]
    before, after = run["pruned"]["macs"]
    left, full, parts = setting["epochs"], found["full_epochs"], run["parts"]
    trained = [found["steps"][f"{seed}/trained"] for seed in range(setting["seeds"])]
    minutes = " and ".join(f"{one['wall_s'] / 60:.0f}" for one in trained)
    difference = (
        f"The full schedule (--full) trains {full} epochs instead of {left}, on the same "
        "pictures; nothing else differs. "
        if left != full
        else ""
    )
    return (
        f"The pretrained ResNet-{setting['depth']} without the blocks that `cifar-prune.toml` "
        f"does not protect ({before / 1e6:.1f} million MACs, {after / 1e6:.1f} left), early exits "
        f"behind {', '.join(f'`{place}`' for place in setting['at'])}, {left} epochs of "
        f"`cifar-train.toml` on {splits['training']['pictures']:,} pictures of CIFAR-10, the "
        f"held-out ones included: {run['parameters']:,} parameters, {run['bytes'] / 1024:.0f} KiB "
        f"as int8. {difference}The training took {minutes} minutes of wall time, all steps "
        f"{found['wall_s'] / 3600:.1f} hours. "
        "The rivals are pretrained by others. Accuracies are class means on "
        f"lossless test pictures ({splits['test']['pictures']:,}): {parts[TUNING]:,} to choose "
        f"policies, {parts[CERTIFICATE]:,} to certify them, {parts[REPORT]:,} for `report`. "
        f"{setting['seeds']} seed{'s' * (setting['seeds'] > 1)}.\n"
    )


def _bar_rows(found: Mapping[str, Any], run: Mapping[str, Any]) -> list[list[str]]:
    rows = [["is it worth it?", "wanted", "found", "reached"]]
    for bar in run["bars"]:
        if bar["ask"] == "final":
            said = f"no: {100 * (bar['short'] or 0):.2f} points short"
            rows.append(
                [
                    "int8 accuracy of the final exit, all test pictures",
                    f"{bar['wanted']:.1%}",
                    f"{bar['accuracy']:.2%}",
                    "yes" if bar["reached"] else said,
                ]
            )
            continue
        ask = _ask_of(found, bar["ask"])
        goal = f" (goal {bar['goal']:g}x)" if bar["goal"] > bar["wanted"] else ""
        rows.append(
            [
                f"faster than {_against_text(found, ask, '')}",
                f"{bar['wanted']:g}x{goal}, at most {_level(bar['level'])} lost",
                _bar_found(bar),
                _bar_verdict(bar),
            ]
        )
    return rows


def _bar_found(bar: Mapping[str, Any]) -> str:
    if bar["policy"] is None:
        return "no policy"
    return (
        f"{_ratio(bar['faster'])} faster than {_title(bar['rival'])}, "
        f"{_points(bar)} points on `report`; "
        f"{'certified' if bar['certified'] else 'not certified'}"
    )


def _bar_verdict(bar: Mapping[str, Any]) -> str:
    if bar["policy"] is None:
        said = "no"
    elif bar["reached"]:
        said = "yes, the goal too" if bar["goal_reached"] and bar["goal"] > bar["wanted"] else "yes"
        said += "" if bar["certified"] else ", without a certificate"
    else:
        ratio, points = bar["short"]["ratio"], bar["short"]["accuracy"]
        missed = [f"{ratio:.2f}x short"] if ratio else []
        missed += [f"{100 * points:.2f} points too many lost"] if points else []
        said = f"no: {', '.join(missed)}"
    return said + ("" if bar["refused"] is None else f" ({_not_certifiable(bar)})")


def _not_certifiable(bar: Mapping[str, Any]) -> str:
    return f"not certifiable with {bar['samples']:,} samples"


def _answer(found: Mapping[str, Any], run: Mapping[str, Any]) -> str:
    reached = [bar["reached"] for bar in run["bars"]]
    if all(reached):
        return "Every bar is reached.\n"
    return (
        f"{sum(reached)} of {len(reached)} bars are reached, {len(reached) - sum(reached)} not.\n"
    )


def _all_by_one(found: Mapping[str, Any], run: Mapping[str, Any]) -> str:
    """The policies that reach every ratio by themselves, whatever they were asked for."""
    asks = [ask for ask in (Ask(**one) for one in found["setting"]["asks"]) if ask.ratio]
    policies = [one for one in run["policies"] if one["refused"] is None]
    lines = []
    for one in policies:
        held = [held_against(ask, one) for ask in asks]
        if not all(bar["reached"] for bar in held):
            continue
        ratios = [
            f"{_ratio(bar['faster'])} faster than {_title(bar['rival'])} [{_points(bar)}]"
            for bar in held
        ]
        kind = f"certified (use {one['use']})" if one["certified"] else "not certified"
        lines.append(f"- {_asked_text(found, one)}, {kind}: {', '.join(ratios)}.")
    if not lines:
        return "No policy reaches every ratio by itself.\n"
    told = (
        f"Every ratio by one policy, {len(lines)} of {len(policies)}; they were asked for "
        "something else and are named for how they did on `report`, which flatters a little:\n"
    )
    return "\n".join([told, *lines]) + "\n"


def _network_rows(run: Mapping[str, Any]) -> list[list[str]]:
    rows = [["network", "million MACs", "parameters", "KiB", "top-1 %, all"]]
    rows[0] += ["top-1 %, `report`", "ms", "ms, instrument"]
    for one in run["networks"]:
        rows.append(
            [
                _title(one["key"]),
                f"{one['macs'] / 1e6:.1f}",
                "" if one["parameters"] is None else f"{one['parameters']:,}",
                f"{one['bytes'] / 1024:.0f}",
                f"{100 * one['accuracy']:.2f}",
                f"{100 * one['report']:.2f}",
                _ranged(one["ms"], 3),
                f"{one['profile_ms']:.3f}",
            ]
        )
    return rows


def _policies_told(found: Mapping[str, Any], run: Mapping[str, Any]) -> str:
    samples = run["parts"][CERTIFICATE]
    return (
        "Policies: what each may lose against what, and whether that is certified with 95 % "
        f"confidence on {samples:,} pictures; a later use of them risks less. Those not certified "
        "were tested at 50 % on the same pictures: as likely kept as not. Ratios are faster by, "
        "median (smallest .. largest) over processes; in brackets points of accuracy ahead on "
        "`report`, paired, ± one standard error. The best static point of a policy is the fastest "
        f"exit alone that is at most {100 * WITHIN:g} points less accurate than it where policies "
        "are chosen.\n"
    )


def _policy_rows(found: Mapping[str, Any], run: Mapping[str, Any]) -> list[list[str]]:
    rivals = _barred(found)
    exits = [one["key"] for one in run["networks"] if one["is_exit"]]
    rows = [["at most", "certified", "keeps", f"leave at {' / '.join(exits)}, %"]]
    rows[0] += ["million MACs", "top-1 %, `report`", "ms", "ms, instrument"]
    rows[0] += [*(f"than {_title(rival)}" for rival in rivals), "than the best static point"]
    for one in run["policies"]:
        if one["refused"] is not None:
            continue
        best = one["best_static"]
        cells = [_beside(one["beside"][rival]) for rival in rivals]
        rows.append(
            [
                _asked_text(found, one),
                f"yes, use {one['use']}" if one["certified"] else "no",
                ", ".join(one["kept"]),
                " / ".join(f"{100 * rate:.1f}" for rate in one["rates"]),
                f"{one['macs'] / 1e6:.1f}",
                f"{100 * one['report']:.2f}",
                _ranged(one["ms"], 3),
                f"{one['expected_ms']:.3f}",
                *cells,
                f"{_title(best)}: {_beside(one['beside'][best])}",
            ]
        )
    return rows


def _asked_text(found: Mapping[str, Any], row: Mapping[str, Any]) -> str:
    ask = _ask_of(found, row["ask"])
    return f"{_level(row['level'])} below {_against_text(found, ask, row['against'])}"


def _level(level: float) -> str:
    return f"{100 * level:g} point{'s' * (level != 0.01)}"


def _refused_told(found: Mapping[str, Any], run: Mapping[str, Any]) -> str:
    """One line for each policy that there is not."""
    lines = []
    for one in run["policies"]:
        if one["refused"] is not None:
            kind = "Not certifiable" if one["certified"] else "Not even at 50 %"
            use = f" (use {one['use']})" if one["use"] else ""
            lines.append(
                f"- {kind} with {one['samples']:,} samples{use}: {_asked_text(found, one)}. "
                f"{one['refused']}."
            )
    return "\n".join(lines) + "\n" if lines else ""


def _ranged(figure: Mapping[str, float], digits: int = 2) -> str:
    median, low, high = (f"{figure[key]:.{digits}f}" for key in ("median", "min", "max"))
    return f"{median} ({low} .. {high})"


def _ratio(figure: Mapping[str, float]) -> str:
    median, low, high = (f"{figure[key]:.2f}" for key in ("median", "min", "max"))
    return f"{median}x ({low} .. {high})"


def _points(beside: Mapping[str, Any]) -> str:
    return f"{100 * beside['lead']:+.2f} ± {100 * beside['error']:.2f}"


def _beside(beside: Mapping[str, Any]) -> str:
    return f"{_ratio(beside['faster'])} [{_points(beside)}]"


def draw(found: Mapping[str, Any], folder: Path) -> None:
    """Draw accuracy on `report` against milliseconds into *folder*; needs the extra `plot`."""
    for seed, run in enumerate(found["runs"]):
        policies = [one for one in run["policies"] if one["refused"] is None]
        groups = {
            "pretrained networks": [one for one in run["networks"] if not one["is_exit"]],
            "exits alone": [one for one in run["networks"] if one["is_exit"]],
            "policies, certified": [one for one in policies if one["certified"]],
            "policies, not certified": [one for one in policies if not one["certified"]],
        }
        points(
            folder / image(found["setting"], seed),
            {title: _drawn(some) for title, some in groups.items() if some},
            title=f"Pruning and early exit, CIFAR-10, {found['setting']['epochs']} epochs",
            cost="mean ms an answer, int8, measured",
            accuracy="accuracy on report, class mean",
        )


def _drawn(some: Sequence[Mapping[str, Any]]) -> Points:
    """Points with the names of networks; policies have none, and are a line."""
    ordered = sorted(some, key=lambda one: one["ms"]["median"])
    names = ["" if "ask" in one else _title(one["key"]).replace("`", "") for one in ordered]
    return Points(
        costs=[one["ms"]["median"] for one in ordered],
        accuracies=[one["report"] for one in ordered],
        names=names,
        is_line="ask" in ordered[0],
    )
