"""`edgeexit tune`: choose exits and thresholds from a record and a profile, with a certificate."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from edgeexit.cli import finite, percentage, progress
from edgeexit.errors import OutOfReach, UsageError

if TYPE_CHECKING:
    from edgeexit.advisor import Advice
    from edgeexit.bundle import Bundle
    from edgeexit.evaluate import Record
    from edgeexit.plot import Chart
    from edgeexit.policy import Policy
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
) -> tuple[float, ...] | None:
    if value is None:
        return None
    try:
        return tuple(map(float, value.split(",")))
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
    callback=percentage,
    help="share of samples that may be lost, 0.01 or 1% (default 1%, without a budget)",
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
@click.option(
    "--method",
    default="path",
    show_default=True,
    help="path, shared, fixed, quota, pcee, class, pareto, ltt, ucb or crc",
)
@click.option(
    "--thresholds", callback=_thresholds, help="for --method fixed, inf drops: 0.9,inf,0.8"
)
@click.option(
    "--measure", help="max_prob, margin or peak (default: the one that does best on tuning)"
)
@click.option(
    "--rate",
    "rate_hz",
    type=float,
    callback=finite,
    help="inputs a second: also tell how busy that keeps the board, and joules a frame",
)
@click.option(
    "--ledger",
    "ledger_path",
    type=click.Path(path_type=Path),
    help="where uses of the certificate samples are counted (default: beside the set)",
)
@click.option(
    "--seed",
    type=int,
    default=0,
    show_default=True,
    help="nothing is drawn: it is written down, and another one is another question",
)
@click.option(
    "--rival",
    type=click.Path(path_type=Path),
    help="a bundle to compare with, run to its final exit, ...",
)
@click.option(
    "--rival-profile", type=click.Path(path_type=Path), help="... its profile on this device"
)
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    help="also write what the verdict says to ship: the bundle cut down to the exits kept, or to "
    "one exit",
)
@click.option("--plot", "plot_path", type=click.Path(path_type=Path), help="draw a .png or .svg")
@click.option("--advise", is_flag=True, help="also say what more labels would buy")
@click.option(
    "--accept-disturbed",
    is_flag=True,
    help="take a profile that was disturbed (one of an emulated machine never)",
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
    thresholds: tuple[float, ...] | None,
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
    from edgeexit import advisor, device, ledger, names, plot, tune
    from edgeexit.bundle import check_target, load_bundle
    from edgeexit.cli.material import challenger, find_record, load_profile
    from edgeexit.evaluate import Record
    from edgeexit.files import check_output, file_digest
    from edgeexit.request import Request, check_choice, check_inputs, check_profile

    budgets = (latency_budget, energy_budget, p95)
    if max_accuracy_drop is None and not any(budget is not None for budget in budgets):
        max_accuracy_drop = 0.01
    request = Request(
        target=tune.Target(
            max_accuracy_drop=max_accuracy_drop,
            latency_budget_ms=latency_budget,
            energy_budget_mj=energy_budget,
            p95_ms=p95,
            confidence=confidence,
            minimize=minimize,
            rate_hz=rate_hz,
        ),
        method=method,
        thresholds=thresholds,
        measure=measure,
        seed=seed,
    )
    name = device.find_device(device_name or device.this_device()).name
    bundle = load_bundle(bundle_path or names.only_bundle_here())
    check_choice(bundle.exits)
    if output is not None:
        check_target(output)
        if output.resolve().is_relative_to(bundle.path.resolve()):
            raise UsageError(
                f"{output}: is the bundle that is tuned, or lies in it", hint="choose another -o"
            )
    if plot_path is not None:
        plot.check_plot(plot_path)
    check_output(bundle.policy_path(name))
    if advise and max_accuracy_drop is None:
        raise UsageError(
            "--advise tells what labels buy for an accuracy drop, and none is asked for",
            hint="give --max-accuracy-drop, too",
        )
    if (rival is None) != (rival_profile is None):
        raise UsageError(
            "--rival and --rival-profile: expected both or none of them",
            hint="make the profile with: edgeexit profile RIVAL",
        )
    source = profile_path or Path(f"profile-{name}.json")
    profile = load_profile(source, name, accept_disturbed)
    check_profile(bundle, profile, name)  # before a record is made in vain
    record_path, record = find_record(bundle, record_path, calibration)
    reference = None if reference_path is None else Record.load(reference_path)
    check_inputs(bundle, record, profile, name)
    request.check(record, profile, reference)
    other = None
    if rival is not None and rival_profile is not None:
        other = challenger(rival, rival_profile, calibration, accept_disturbed)
        other.check(record, profile, request)
    digests = {
        "record": file_digest(record_path),
        "reference": None if reference_path is None else file_digest(reference_path),
        "bundle": bundle.digest,
        "profile": file_digest(source),
    }
    counted = ledger_path or ledger.place(
        calibration or record.set_name, record.set_digest, record_path
    )
    # Nothing that could have been refused before may be refused from here on: it would cost a use.
    use = tune.spend(record, request, counted, digests, bundle=bundle.name, device=name)
    try:
        found = tune.tune(
            record,
            profile,
            request,
            reference=reference,
            use=use,
            digests=digests,
            accept_disturbed=accept_disturbed,
        )
    except OutOfReach as error:
        error.hint = f"{error.hint} (this was use {use.use} of these samples)"
        raise
    path = bundle.policy_path(name)
    if path.exists():
        click.echo(f"note: replaces {path}", err=True)
    found.policy.save(path)
    click.echo(f"wrote {path}", err=True)
    worth = found.worth if other is None else other.against(found, record, profile, request)
    advice = None
    if advise:
        with progress(length=100, label="advice") as bar:
            advice = advisor.advise(
                *(found.method, found.tuning, found.certificate, found.costs_ns, found.goal),
                on_step=lambda done: bar.update(round(100 * done) - bar.pos),
            )
    # A full disk, or Ctrl-C, must not keep the result back.
    try:
        if output is not None:
            _ship(bundle, found.policy, worth, output)
            click.echo(f"wrote {output}", err=True)
        if plot_path is not None:
            plot.draw(_chart(found, record, reference, bundle.name, advice), plot_path)
            click.echo(f"wrote {plot_path}", err=True)
    finally:
        _show(found.policy, worth, advice, as_json)


def _show(policy: "Policy", worth: "Worth", advice: "Advice | None", as_json: bool) -> None:
    from edgeexit import report
    from edgeexit.files import json_bytes

    if as_json:
        document = {
            **policy.to_document(),
            "early_exit_pays": worth.pays,
            "worth": worth.to_document(),
            "uncertified": report.uncertified(policy, worth),
            "advice": None if advice is None else advice.to_document(),
        }
        click.echo(json_bytes(document), nl=False)
        return
    click.echo(report.policy_table(policy, worth))
    if advice is not None:
        click.echo(f"Advice: {advice.sentence}")


def _ship(bundle: "Bundle", policy: "Policy", worth: "Worth", output: Path) -> None:
    """Write what the verdict says to ship: the exits kept with their policy, or one exit alone."""
    import shutil

    from edgeexit.errors import storage
    from edgeexit.files import new_folder
    from edgeexit.recut import recut
    from edgeexit.worth import RIVAL, STATIC

    if worth.ship == RIVAL:
        click.echo(f"note: {output} holds this policy, although the rival is better", err=True)
    kept = (worth.static_exit,) if worth.ship == STATIC else policy.kept
    if kept != bundle.exits:
        recut(bundle, kept, output)
        return
    with new_folder(output) as folder, storage(output):
        for source in sorted(bundle.path.rglob("*")):
            copy = folder / source.relative_to(bundle.path)
            if source.is_dir():
                copy.mkdir()
            else:
                shutil.copyfile(source, copy)


def _chart(
    found: "Tuned",
    record: "Record",
    reference: "Record | None",
    title: str,
    advice: "Advice | None",
) -> "Chart":
    from edgeexit import plot, ranking, tune
    from edgeexit.decision import Costs
    from edgeexit.request import CERTIFICATE

    times = found.costs_ns
    real = None
    if reference is not None:
        rows = reference.rows(CERTIFICATE)
        view = tune.seen_through(reference, found.policy.measure, rows)
        real = ranking.rankings(
            view.confidence, view.correct, reference.exits, measure=found.policy.measure
        )
    return plot.chart(
        found.family,
        found.certificate,
        record.exits,
        ms=Costs(*(part / 1e6 for part in (times.backbone, times.head, times.handover))),
        mj=found.costs_mj,
        energy=f"mean energy per answer ({found.worth.energy_label or 'unknown'})",
        first=found.first,
        certified=found.certified,
        position=found.position,
        level=found.policy.target["max_accuracy_drop"],
        measure=found.policy.measure,
        title=f"{title} on {found.policy.device}",
        real=real,
        advice=advice,
    )
