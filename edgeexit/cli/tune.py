"""`edgeexit tune`: choose exits and thresholds from a record and a profile, with a certificate."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from edgeexit.cli import finite, progress
from edgeexit.errors import UsageError, printable

if TYPE_CHECKING:
    from edgeexit.advisor import Advice
    from edgeexit.bundle import Bundle
    from edgeexit.evaluate import Record
    from edgeexit.plot import Chart
    from edgeexit.policy import Policy
    from edgeexit.profile import Profile
    from edgeexit.targets import Target
    from edgeexit.tune import Tuned
    from edgeexit.worth import Worth


def _in(unit: str) -> Callable[[click.Context, click.Parameter, str | None], float | None]:
    """Reads a number that may carry its unit: 8ms, 3mJ."""

    def read(ctx: click.Context, param: click.Parameter, value: str | None) -> float | None:
        if value is None:
            return None
        try:
            return float(value.strip().lower().removesuffix(unit.lower()))
        except ValueError:
            raise click.BadParameter(f"{value!r}: expected a number, for example 8{unit}") from None

    return read


def _thresholds(
    ctx: click.Context, param: click.Parameter, value: str | None
) -> list[float] | None:
    if value is None:
        return None
    try:
        return [float(part) for part in value.split(",")]
    except ValueError:
        raise click.BadParameter(f"{value!r}: expected numbers, for example 0.9,inf") from None


@click.command("tune", short_help="choose exits and thresholds, with a certificate")
@click.argument("bundle_path", metavar="[BUNDLE]", required=False, type=click.Path(path_type=Path))
@click.option(
    "--profile",
    "profile_path",
    type=click.Path(path_type=Path),
    help="default: ./profile-DEVICE.json",
)
@click.option(
    "--record",
    "record_path",
    type=click.Path(path_type=Path),
    help="default: ./BUNDLE-record.npz, made now from the bundle's calibration set if absent",
)
@click.option(
    "--reference",
    "reference_path",
    type=click.Path(path_type=Path),
    help="record of the network that accuracy is lost against (default: the full int8 network)",
)
@click.option(
    "--calibration",
    metavar="NAME|FOLDER",
    help="the bundle's calibration set, if it does not lie here or in ./calibration",
)
@click.option("--device", "device_name", help="default: the kind of board that this machine is")
@click.option(
    "--max-accuracy-drop",
    type=float,
    callback=finite,
    help="share of samples that may be lost (default 0.01 = 1 %, without a budget)",
)
@click.option("--latency-budget", callback=_in("ms"), help="mean latency, e.g. 8ms")
@click.option("--energy-budget", callback=_in("mJ"), help="mean energy, e.g. 3mJ")
@click.option("--p95", callback=_in("ms"), help="latency that 95 % of the inputs keep, e.g. 10ms")
@click.option(
    "--confidence",
    type=float,
    default=0.95,
    show_default=True,
    help="probability that the promise holds",
)
@click.option("--minimize", default="latency", show_default=True, help="latency or energy")
@click.option("--method", default="path", show_default=True, help="path, shared, fixed, quota, ...")
@click.option(
    "--thresholds", callback=_thresholds, help="for --method fixed, inf drops: 0.9,inf,0.8"
)
@click.option("--measure", help="confidence measure (default: the best one on tuning)")
@click.option("--rate", "rate_hz", type=float, callback=finite, help="inputs a second")
@click.option(
    "--ledger",
    "ledger_path",
    type=click.Path(path_type=Path),
    help="where uses of the certificate samples are counted (default: beside the set)",
)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option(
    "--rival", type=click.Path(path_type=Path), help="a static bundle to compare with, ..."
)
@click.option(
    "--rival-profile", type=click.Path(path_type=Path), help="... its profile on this device"
)
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    help="also write what to ship: the bundle cut down to the exits kept",
)
@click.option("--plot", "plot_path", type=click.Path(path_type=Path), help="draw a .png or .svg")
@click.option("--advise", is_flag=True, help="also say what more labels would buy")
@click.option(
    "--accept-disturbed",
    is_flag=True,
    help="take a profile that was disturbed, or measured on an emulated machine",
)
@click.option("--json", "as_json", is_flag=True, help="print one JSON document instead of tables")
def command(
    bundle_path: Path | None,
    profile_path: Path | None,
    record_path: Path | None,
    reference_path: Path | None,
    calibration: str | None,
    device_name: str | None,
    max_accuracy_drop: float | None,
    latency_budget: float | None,
    energy_budget: float | None,
    p95: float | None,
    confidence: float,
    minimize: str,
    method: str,
    thresholds: list[float] | None,
    measure: str | None,
    rate_hz: float | None,
    ledger_path: Path | None,
    seed: int,
    rival: Path | None,
    rival_profile: Path | None,
    output: Path | None,
    plot_path: Path | None,
    advise: bool,
    accept_disturbed: bool,
    as_json: bool,
) -> None:
    """
    Choose the exits and thresholds for BUNDLE (default: the only one here) and certify them.

    \b
    edgeexit tune --max-accuracy-drop 0.01
    edgeexit tune fashion.edgeexit --device rpi4 --profile profile-rpi4.json
    edgeexit tune --latency-budget 8ms                    # the most accurate within it
    edgeexit tune --max-accuracy-drop 0.01 --p95 10ms     # both, or exit code 7
    edgeexit tune -o ship.edgeexit --plot tune.svg

    Chosen on the split `tuning`, certified on `certificate`: with probability --confidence, the
    accuracy on samples drawn like these drops by no more. Each new choice with the same
    certificate samples may risk less than the one before; a ledger beside them counts. What
    cannot be certified exits 7 and writes no policy. The policy goes to
    BUNDLE/policies/DEVICE.json. A profile that was disturbed is refused (exit 6); one that has
    not converged gives a warning. edgeexit verify recomputes all of it.
    """
    from edgeexit import advisor, device, ledger, names, plot, report, tune, verify
    from edgeexit.blocks import CLEAN
    from edgeexit.bundle import check_target, load_bundle
    from edgeexit.evaluate import Record
    from edgeexit.families import METHODS
    from edgeexit.files import file_digest, json_bytes
    from edgeexit.policy import MEASURES
    from edgeexit.profile import Profile

    budgets = (latency_budget, energy_budget, p95)
    if max_accuracy_drop is None and not any(budget is not None for budget in budgets):
        max_accuracy_drop = 0.01
    target = tune.Target(
        max_accuracy_drop=max_accuracy_drop,
        latency_budget_ms=latency_budget,
        energy_budget_mj=energy_budget,
        p95_ms=p95,
        confidence=confidence,
        minimize=minimize,
        rate_hz=rate_hz,
    )
    if measure is not None:
        names.choose(measure, MEASURES, "confidence measure")
    if method != tune.FIXED:
        names.choose(method, {**METHODS, tune.FIXED: None}, "method")
    name = device.find_device(device_name or device.this_device()).name
    bundle = load_bundle(bundle_path or names.only_bundle_here())
    if output is not None:
        check_target(output)
        if output.resolve().is_relative_to(bundle.path.resolve()):
            raise UsageError(
                f"{output}: is the bundle that is tuned, or lies in it", hint="choose another -o"
            )
    if plot_path is not None:
        plot.check_plot(plot_path)
    if (rival is None) != (rival_profile is None):
        raise UsageError("--rival and --rival-profile: expected both or none of them")
    source = profile_path or Path(f"profile-{name}.json")
    if not source.exists():
        raise UsageError(
            f"{source}: no profile", hint=f"make it with: edgeexit profile --device {name}"
        )
    profile = Profile.load(source)
    verdict = tune.check_verdict(profile, accept_disturbed=accept_disturbed)
    if verdict.status != CLEAN:
        click.echo(f"warning: {source}: {printable(str(verdict))}", err=True)
    record_path, record = _record(bundle, record_path, calibration)
    reference = None if reference_path is None else Record.load(reference_path)
    tune.check_inputs(bundle, record, profile, name)
    tune.check_request(
        record,
        profile,
        target,
        method=method,
        thresholds=thresholds,
        measure=measure,
        reference=reference,
    )
    digests = {
        "record": file_digest(record_path),
        "reference": None if reference_path is None else file_digest(reference_path),
        "bundle": bundle.digest,
        "profile": file_digest(source),
    }
    request = verify.asked(
        digests, target, method=method, thresholds=thresholds, measure=measure, seed=seed
    )
    key = ledger.split_key(record.digests[record.rows(tune.CERTIFICATE)])
    counted = ledger_path or ledger.place(
        calibration or record.set_name, record.set_digest, record_path
    )
    delta = ledger.share(1.0 - confidence, ledger.next_use(counted, key, request))
    tune.check_feasible(len(record.rows(tune.CERTIFICATE)), target, delta)
    use = ledger.spend(
        counted,
        key,
        request,
        {"level": max_accuracy_drop, "method": method, "bundle": bundle.name, "device": name},
    )
    found = tune.tune(
        record,
        profile,
        target,
        method=method,
        thresholds=thresholds,
        measure=measure,
        reference=reference,
        use=use,
        digests=digests,
        seed=seed,
        accept_disturbed=accept_disturbed,
    )
    worth = found.worth
    if rival is not None and rival_profile is not None:
        worth = _against(found, record, profile, target, rival, rival_profile, calibration)
    advice = None
    if advise:
        with progress(length=100, label="advice") as bar:
            advice = advisor.advise(
                *(found.method, found.tuning, found.certificate, found.costs_ns, found.goal),
                on_step=lambda done: bar.update(round(100 * done) - bar.pos),
            )
    path = bundle.policy_path(name)
    if path.exists():
        click.echo(f"note: replaces {path}", err=True)
    found.policy.save(path)
    if plot_path is not None:
        plot.draw(_chart(found, record, reference, bundle.name, advice), plot_path)
    shipped = None if output is None else _ship(bundle, found.policy, worth, output)
    if as_json:
        document = {
            **found.policy.to_document(),
            "early_exit_pays": worth.pays,
            "worth": worth.to_document(),
            "advice": None if advice is None else advice.to_document(),
        }
        click.echo(json_bytes(document), nl=False)
    else:
        click.echo(report.policy_table(found.policy, worth))
        if advice is not None:
            click.echo(f"Advice: {advice.sentence}")
    for made in (path, plot_path, shipped):
        if made is not None:
            click.echo(f"wrote {made}", err=True)


def _ship(bundle: "Bundle", policy: "Policy", worth: "Worth", output: Path) -> Path:
    """Write what the verdict says to ship: the exits kept with their policy, or one exit alone."""
    import shutil

    from edgeexit.errors import storage
    from edgeexit.files import new_folder
    from edgeexit.recut import recut
    from edgeexit.worth import STATIC

    kept = (worth.static_exit,) if worth.ship == STATIC else policy.kept
    if kept != bundle.exits:
        recut(bundle, kept, output)
        return output
    with new_folder(output) as folder, storage(output):
        shutil.copytree(bundle.path, folder, dirs_exist_ok=True)
    return output


def _against(
    found: "Tuned",
    record: "Record",
    profile: "Profile",
    target: "Target",
    rival: Path,
    rival_profile: Path,
    calibration: str | None,
) -> "Worth":
    """The verdict once more, with a network of the user's own beside the others."""
    from edgeexit import tune
    from edgeexit.bundle import load_bundle
    from edgeexit.profile import Profile
    from edgeexit.worth import Rival

    theirs = load_bundle(rival)
    costs = Profile.load(rival_profile)
    tune.check_verdict(costs, accept_disturbed=True)
    if costs.bundle_digest != theirs.digest:
        raise UsageError(f"{rival_profile}: not the profile of {rival}")
    answers = _fresh_record(theirs, calibration)
    right = tune.reference_correct(record, answers)
    used = record.splits == tune.CERTIFICATE
    lost = float(found.certificate.reference.mean()) - float(right[used].mean())
    level = 0.01 if target.max_accuracy_drop is None else target.max_accuracy_drop
    made = Rival(
        name=theirs.name,
        profile=costs,
        accuracy=(int(right[used].sum()), int(used.sum())),
        within_budget=lost <= level,
    )
    chosen = found.family.policy(found.position)
    return tune.contest(chosen, found.certificate, profile, target, made)


def _chart(
    found: "Tuned",
    record: "Record",
    reference: "Record | None",
    title: str,
    advice: "Advice | None",
) -> "Chart":
    import numpy as np

    from edgeexit import plot, ranking, tune
    from edgeexit.decision import Costs

    times = found.costs_ns
    real = None
    if reference is not None:
        rows = np.flatnonzero(np.isin(reference.splits, (tune.TUNING, tune.CERTIFICATE)))
        view = tune.seen_through(reference, found.policy.measure, rows)
        real = ranking.rankings(
            view.confidence, view.correct, reference.exits, measure=found.policy.measure
        )
    return plot.chart(
        found.family,
        found.tuning.joined(found.certificate),
        record.exits,
        ms=Costs(*(part / 1e6 for part in (times.backbone, times.head, times.handover))),
        mj=found.costs_mj,
        first=found.first,
        certified=found.certified,
        position=found.position,
        level=found.policy.target["max_accuracy_drop"],
        measure=found.policy.measure,
        title=f"{title} on {found.policy.device}",
        real=real,
        advice=advice,
    )


def _record(bundle: "Bundle", path: Path | None, calibration: str | None) -> "tuple[Path, Record]":
    """The record that was named, that lies here for this very bundle, or a new one, saved."""
    from edgeexit.evaluate import Record

    if path is not None:
        return path, Record.load(path)
    path = Path(f"{bundle.path.resolve().stem}-record.npz")
    if path.exists() and calibration is None:
        found = Record.load(path)
        if found.bundle_digest == bundle.digest:
            click.echo(f"record: {path}", err=True)
            return path, found
        click.echo(f"note: {path} is of another bundle, it is made anew", err=True)
    made = _fresh_record(bundle, calibration)
    made.save(path)
    click.echo(f"wrote {path}", err=True)
    return path, made


def _fresh_record(bundle: "Bundle", calibration: str | None) -> "Record":
    """Run the tuning and certificate splits of the set that the bundle names."""
    from edgeexit import tune
    from edgeexit.errors import BadFile
    from edgeexit.evaluate import record
    from edgeexit.samples import find_set, load_samples

    named = bundle.calibration_set
    if named is None:
        raise UsageError(
            f"{bundle.path}: names no calibration set",
            hint="give --record FILE.npz, made with: edgeexit evaluate BUNDLE DATA --record",
        )
    source = calibration or named["name"]
    found = find_set(source)
    if found.digest != named["digest"]:
        raise BadFile(
            f"calibration set {found.name!r} is another one than the bundle's "
            f"({found.digest[:12]}, expected {named['digest'][:12]})",
            hint="convert again with this set, or give --record",
        )
    parts = [
        load_samples(f"{source}:{split}", bundle.preprocess, bundle.class_names, bundle.input.shape)
        for split in (tune.TUNING, tune.CERTIFICATE)
    ]
    with progress(length=sum(map(len, parts)), label="record") as bar:
        return record(
            bundle, parts, set_name=found.name, set_digest=found.digest, on_step=bar.update
        )
