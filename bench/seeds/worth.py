"""
Is it worth it? Pruning and early exit on CIFAR-10 in measured int8 milliseconds.

    python bench/seeds/worth.py [--full] [--steps] [--later] [--data DIR] [--work DIR]

The pretrained ResNet-56 loses half of its blocks (examples/cifar-prune.toml), gets early exits, and
is trained once (examples/cifar-train.toml). Its rivals are itself as it was, the smaller pretrained
ResNets, and each of its own exits alone as a network without early exits. Half of the test pictures
choose and certify policies; on the other half, `report`, accuracies are told and all race against
each other. Killed, it goes on where it was.
"""

import json
import sys
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from cifar import DATA, LISTED, LOSSLESS_TESTS, Cifar
from common import CHECKOUT, in_processes, options, spread
from numpy.typing import NDArray
from seeds import kinds
from seeds.contest import (
    CERTIFICATE,
    REPORT,
    STATIC,
    TUNING,
    WITHIN,
    Answers,
    Ask,
    bars,
    best_alone,
    parts_of,
    policy_row,
)
from seeds.steps import Job, Step, Table, command, main, of_settings
from seeds.worth_page import NAME, draw, page

from edgeexit.cli import guarded
from edgeexit.decision import Costs
from edgeexit.errors import OutOfReach
from edgeexit.evaluate import Record
from edgeexit.files import json_bytes, npz_bytes, read_json, read_npz, write_file
from edgeexit.race import Race

if TYPE_CHECKING:
    from edgeexit.bundle import Bundle
    from edgeexit.profile import Profile
    from edgeexit.tune import Tuned

__all__ = ["FULL", "NAME", "SMALL", "Setting", "draw", "figures", "page", "table"]

PRUNE = CHECKOUT / "examples/cifar-prune.toml"
TRAIN = CHECKOUT / "examples/cifar-train.toml"

LEDGER, POLICY, LEAVES, PLAN = "ledger.json", "policy.json", "leaves.npz", "plan.json"
CUT = "cut.edgeexit"
# What a policy without a certificate is still tested at: as likely kept as not.
COIN = 0.5
# Those with a bar first: a later use of the certificate risks less.
ASKS = (
    Ask(key="whole", reference="resnet56", level=0.01, ratio=3.0, goal=3.0),
    Ask(key="small", reference="resnet20", level=0.003, ratio=1.3, goal=1.5),
    Ask(key=STATIC, reference=STATIC, level=WITHIN, ratio=1.3, goal=1.5),
    *(Ask(key=f"own-{level:g}", reference="", level=level) for level in (0.003, 0.005, 0.01)),
)


@dataclass(frozen=True, kw_only=True)
class Setting:
    """
    What is trained how long: *epochs* on *pictures*, the recipe's held-out ones included.

    Early exits stand behind the blocks *at*, their heads with stride-2 convolutions of *widths*.
    *rivals* are the depths of the smaller pretrained networks. In the race each of so many
    *processes* answers its part of `report` so many times (*passes*).
    """

    depth: int = 56
    pictures: int = 48_129
    ranges: int = 1_000
    test: int | None = None
    at: tuple[str, ...] = ("blocks.7", "blocks.14", "blocks.19")
    widths: tuple[tuple[int, ...], ...] = ((32, 64), (64, 64), (64,))
    epochs: int = 40
    seeds: int = 1
    rivals: tuple[int, ...] = (20, 32, 44)
    time_cap_s: float = 60.0
    rival_cap_s: float = 30.0
    processes: int = 10
    passes: int = 3
    asks: tuple[Ask, ...] = ASKS


SMALL = Setting()
FULL = Setting(epochs=200)


def _resnet(depth: int) -> str:
    return f"resnet{depth}"


# ---------------------------------------------------------------- the steps


def table(setting: Setting, *, name: str = NAME, data: Path = DATA, listed: str = LISTED) -> Table:
    """The steps, and what is made of them."""
    cifar = Cifar(data, listed=listed)
    steps = [
        kinds.data_step(cifar, training=setting.pictures, ranges=setting.ranges, test=setting.test)
    ]
    for seed in range(setting.seeds):
        steps += _trained_steps(setting, cifar, seed)
    steps += [kinds.dense_step(cifar, _resnet(depth), depth) for depth in setting.rivals]
    tested = LOSSLESS_TESTS if setting.test is None else setting.test
    for source in _sources(setting).values():
        steps.append(kinds.int8_step(f"{source}-int8", source, pictures=tested))
    cap_s = setting.rival_cap_s
    for source in _statics_of(setting).values():
        steps.append(kinds.timed_step(f"{source}-timed", f"{source}-int8", time_cap_s=cap_s))
    for seed in range(setting.seeds):
        whole = f"{seed}/trained"
        steps.append(_alone_step(seed))
        steps.append(
            kinds.timed_step(
                f"{whole}-timed", f"{whole}-int8", time_cap_s=setting.time_cap_s, is_whole=True
            )
        )
        steps += [_tuned_step(setting, seed), _race_step(setting, seed, tested)]
    steps.append(_counted_step(setting))
    return Table(
        name=name,
        facts={"setting": asdict(setting)},
        steps=steps,
        figures=lambda results, work: figures(setting, results, work),
    )


def _statics_of(setting: Setting) -> dict[str, str]:
    """The pretrained networks: key -> the step that makes it."""
    rivals = {_resnet(depth): _resnet(depth) for depth in setting.rivals}
    return {_resnet(setting.depth): "0/dense", **rivals}


def _sources(setting: Setting) -> dict[str, str]:
    """All networks that become int8: key -> the step that makes it."""
    trained = {f"trained-{seed}": f"{seed}/trained" for seed in range(setting.seeds)}
    return {**_statics_of(setting), **trained}


def _trained_steps(setting: Setting, cifar: Cifar, seed: int) -> list[Step]:
    pruning, training = (tomllib.loads(path.read_text()) for path in (PRUNE, TRAIN))
    net = kinds.Net(depth=setting.depth, blocks=(), shortcut="A")
    return [
        kinds.dense_step(cifar, f"{seed}/dense", setting.depth),
        kinds.prune_step(
            f"{seed}/pruned",
            f"{seed}/dense",
            net,
            pictures=setting.pictures,
            epochs=0,
            extra_s=60.0,
            recipe={"data": _data(pruning), "prune": pruning["prune"]},
        ),
        kinds.attach_step(
            f"{seed}/exits",
            f"{seed}/pruned",
            at=setting.at,
            head="convs",
            widths=setting.widths,
        ),
        kinds.train_step(
            f"{seed}/trained",
            f"{seed}/exits",
            net,
            pictures=setting.pictures,
            cost=pruning["prune"]["target"]["macs"],
            data=_data(training),
            augmentation=training["augmentation"],
            training={
                **training["training"],
                "epochs": setting.epochs,
                "seed": training["training"]["seed"] + seed,
            },
        ),
    ]


def _data(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """What a recipe says of its samples besides where they are."""
    return {key: value for key, value in recipe["data"].items() if key != "path"}


def _counted_step(setting: Setting) -> Step:
    """MACs and parameters of every network, and MACs of the ways to the trained ones' exits."""
    sources = _sources(setting)

    def run(job: Job) -> dict[str, Any]:
        from edgeexit.host.checkpoint import load_checkpoint

        found = {}
        for key, source in sources.items():
            model = load_checkpoint(job.of(source) / "model.pt").model
            costs, _, _ = kinds.counted(model)
            found[key] = {
                "backbone_macs": costs.backbone.tolist(),
                "head_macs": costs.head.tolist(),
                "parameters": sum(p.numel() for p in model.parameters()),
            }
            job.tell()
        return found

    return Step(name="counted", needs=tuple(sources.values()), run=run, extra_s=10.0)


def _alone_step(seed: int) -> Step:
    """Each exit of the trained network cut out as a network without early exits: K.edgeexit."""
    source = f"{seed}/trained-int8"

    def run(job: Job) -> dict[str, Any]:
        from edgeexit.bundle import load_bundle
        from edgeexit.recut import recut

        bundle = load_bundle(job.of(source) / kinds.BUNDLE)
        sizes = []
        for k, name in enumerate(bundle.exits):
            made = recut(bundle, (name,), job.folder / f"{k}.edgeexit")
            sizes.append(len(made.model_data()))
            job.tell()
        return {"exits": list(bundle.exits), "bytes": sizes}

    return Step(name=f"{seed}/alone", needs=(source,), run=run, extra_s=5.0)


# ---------------------------------------------------------------- policies


def _split(record: Record) -> Record:
    splits = np.empty(len(record), dtype="U16")
    for name, places in parts_of(record.ids.tolist()).items():
        splits[places] = name
    return replace(record, splits=splits)


def _only(record: Record, exit: int) -> Record:
    """The record of a network that ends with the exit number *exit*."""
    return replace(
        record,
        logits=record.logits[:, exit : exit + 1],
        exits=record.exits[exit : exit + 1],
        specs=record.specs[exit : exit + 1],
    )


def _tuned_step(setting: Setting, seed: int) -> Step:
    """
    The policies that were asked for, each with a certificate and once more without.

    KEY/policy.json, cut.edgeexit with the exits that it keeps if these are not all, and in
    leaves.npz where every test picture leaves.
    """
    whole = f"{seed}/trained"
    references = _statics_of(setting)
    needs = [f"{whole}-int8", f"{whole}-timed", *(f"{name}-int8" for name in references.values())]

    def run(job: Job) -> dict[str, Any]:
        from edgeexit.bundle import load_bundle
        from edgeexit.profile import Profile
        from edgeexit.recut import recut
        from edgeexit.request import check_inputs

        bundle = load_bundle(job.of(f"{whole}-int8") / kinds.BUNDLE)
        record = _split(Record.load(job.of(f"{whole}-int8") / kinds.RECORD))
        profile = Profile.load(job.of(f"{whole}-timed") / kinds.PROFILE)
        check_inputs(bundle, record, profile, profile.device)
        records: dict[str, Record | None] = {
            key: _split(Record.load(job.of(f"{name}-int8") / kinds.RECORD))
            for key, name in references.items()
        }
        # On tuning alone: the certificate must not say what it is compared with.
        right = record.correct()[record.rows(TUNING)].mean(axis=0)
        place = best_alone(right.tolist(), _alone_ns(profile))
        final = len(bundle.exits) - 1
        records |= {STATIC: None if place == final else _only(record, place), "": None}
        rows: list[dict[str, Any]] = []
        leaves: dict[str, NDArray[np.int8]] = {}
        for ask in setting.asks:
            reference = records[ask.reference]
            same = [row for row in rows if row["reference"] == "" and row["level"] == ask.level]
            if reference is None and same:
                continue
            for confidence in (0.95, COIN):
                row, found = _answered(job, ask, confidence, bundle, record, profile, reference)
                row["reference"] = "" if reference is None else ask.reference
                row["against"] = bundle.exits[place] if ask.reference == STATIC else ""
                rows.append(row)
                if found is None:
                    continue
                folder = job.folder / row["key"]
                found.policy.save(folder / POLICY)
                if found.policy.kept != bundle.exits:
                    recut(bundle, found.policy.kept, folder / CUT)
                leaves[row["key"]] = _leaves(found, record)
                job.tell(f"{row['key']}: {', '.join(found.policy.kept)}")
        write_file(job.folder / LEAVES, npz_bytes(leaves))
        return {"measured": {"rows": rows}}

    return Step(
        name=f"{seed}/tuned",
        needs=tuple(needs),
        task={"asks": [asdict(ask) for ask in setting.asks]},
        extra_s=60.0,
        is_timing=True,
        run=run,
    )


def _alone_ns(profile: "Profile") -> list[float]:
    """What each exit alone takes, in the order of the exits."""
    cases = [profile.case((name,), name) for name in profile.exits]
    return [profile.value_ns(case) for case in cases if case is not None]


def _leaves(found: "Tuned", record: Record) -> NDArray[np.int8]:
    """The number of the exit at which each picture leaves, int8 (N,)."""
    from edgeexit.tune import seen_through

    view = seen_through(record, found.policy.measure, np.arange(len(record)))
    taken = found.family.policy(found.position).exits(view)
    return np.asarray(taken, np.int8)


def _answered(
    job: Job,
    ask: Ask,
    confidence: float,
    bundle: "Bundle",
    record: Record,
    profile: "Profile",
    reference: Record | None,
) -> tuple[dict[str, Any], "Tuned | None"]:
    """
    The policy for *ask* and what is told of it; None if *confidence* in it cannot be had.

    Uses of the certificate are counted in the ledger of the work folder, and lower what may be
    risked. A COIN is no certificate: it is not counted, and risks what it says.
    """
    from edgeexit import tune
    from edgeexit.request import Request

    is_counted = confidence > COIN
    request = Request(target=tune.Target(max_accuracy_drop=ask.level, confidence=confidence))
    request.check(record, profile, reference)
    use = None
    samples = len(record.rows(CERTIFICATE))
    row: dict[str, Any] = {
        "key": ask.key if is_counted else f"{ask.key}-uncertified",
        "ask": ask.key,
        "level": ask.level,
        "confidence": confidence,
        "certified": is_counted,
        "samples": samples,
        "use": None,
        "refused": None,
    }
    digests = tune.input_digests(record, profile, reference)
    try:
        if is_counted:
            use = tune.spend(
                record,
                request,
                job.work / LEDGER,
                digests,
                bundle=bundle.name,
                device=profile.device,
            )
            row["use"] = use.use
        found = tune.tune(
            record,
            profile,
            request,
            reference=reference,
            use=use,
            digests=digests,
            accept_disturbed=True,
        )
    except OutOfReach as error:
        return {**row, "refused": str(error)}, None
    policy = found.policy
    told = {
        "kept": list(policy.kept),
        "measure": policy.measure,
        "thresholds": policy.to_document()["thresholds"],
        "expected_ms": policy.expected["mean_ms"],
        "expected_rates": policy.expected["exit_rates"],
        "p_value": policy.certificate["p_value"],
    }
    return {**row, **told}, found


# ---------------------------------------------------------------- the race


def _race_step(setting: Setting, seed: int, tested: int) -> Step:
    """All networks, exits alone and policies against each other on `report`, interleaved."""
    statics = _statics_of(setting)
    tuned, alone, trained = f"{seed}/tuned", f"{seed}/alone", f"{seed}/trained-int8"
    needs = ("data", tuned, alone, trained, *(f"{name}-int8" for name in statics.values()))

    def run(job: Job) -> dict[str, Any]:
        runners: dict[str, tuple[Path, Path | None]] = {
            key: (job.of(f"{name}-int8") / kinds.BUNDLE, None) for key, name in statics.items()
        }
        exits = job.result_of(alone)["exits"]
        for k, name in enumerate(exits):
            runners[name] = (job.of(alone) / f"{k}.edgeexit", None)
        whole = job.of(trained) / kinds.BUNDLE
        for row in job.result_of(tuned)["measured"]["rows"]:
            folder = job.of(tuned) / row["key"]
            if row["refused"] is None:
                bundle = whole if row["kept"] == exits else folder / CUT
                runners[row["key"]] = (bundle, folder / POLICY)
        plan = {
            "pictures": str(job.of("data") / "test.npz"),
            "runners": {
                key: [str(bundle), None if policy is None else str(policy)]
                for key, (bundle, policy) in runners.items()
            },
            "processes": setting.processes,
            "passes": setting.passes,
        }
        write_file(job.folder / PLAN, json_bytes(plan))
        found = in_processes(setting.processes, "seeds/worth.py", str(job.folder / PLAN))
        return {"measured": {"mean_ns": found}}

    answers = tested / 2 * (setting.passes + 1)
    return Step(
        name=f"{seed}/race",
        needs=needs,
        task={"processes": setting.processes, "passes": setting.passes},
        extra_s=10.0 + 2.0 * setting.processes + 0.02 * answers,
        is_timing=True,
        run=run,
    )


def worker(plan: Path, seed: int) -> dict[str, list[float]]:
    """One process of the race: nanoseconds a picture of every runner in each pass."""
    from edgeexit.bundle import load_bundle
    from edgeexit.race import race
    from edgeexit.runtime import Runner

    given = read_json(plan).values
    arrays = read_npz(Path(given["pictures"]))
    report = parts_of(arrays.get("ids").tolist())[REPORT]
    pictures = arrays.get("samples")[report[seed :: given["processes"]]]
    runners = {
        key: Runner(load_bundle(Path(bundle)), policy=policy, preload=True)
        for key, (bundle, policy) in given["runners"].items()
    }
    found = race(runners, list(pictures), passes=given["passes"], seed=seed)
    return {key: list(times) for key, times in found.mean_ns.items()}


# ---------------------------------------------------------------- what comes out


def figures(setting: Setting, results: Mapping[str, Any], work: Path) -> dict[str, Any]:
    """All that the page shows, out of the steps' *results* and their files in *work*."""
    return {
        "splits": results["data"],
        "full_epochs": FULL.epochs,
        "runs": [_run_figures(setting, results, work, seed) for seed in range(setting.seeds)],
    }


def _run_figures(
    setting: Setting, results: Mapping[str, Any], work: Path, seed: int
) -> dict[str, Any]:
    from edgeexit.profile import Profile

    statics, trained = _statics_of(setting), f"{seed}/trained"
    record = Record.load(work / f"{trained}-int8" / kinds.RECORD)
    exits, rows = record.exits, results[f"{seed}/tuned"]["measured"]["rows"]
    leaves = read_npz(work / f"{seed}/tuned" / LEAVES)
    left = {row["key"]: leaves.get(row["key"]) for row in rows if row["refused"] is None}
    own = record.correct()
    right = {name: own[:, k] for k, name in enumerate(exits)}
    right |= {key: own[np.arange(len(own)), taken] for key, taken in left.items()}
    for key, name in statics.items():
        right[key] = Record.load(work / f"{name}-int8" / kinds.RECORD).correct()[:, -1]
    answers = Answers(right, record.labels, parts_of(record.ids.tolist()))
    races = [Race(mean_ns=one) for one in results[f"{seed}/race"]["measured"]["mean_ns"]]
    counted = results["counted"]
    backbone, head = (
        np.array(counted[f"trained-{seed}"][key]) for key in ("backbone_macs", "head_macs")
    )
    costs = Costs(backbone, head, np.zeros(len(exits)))
    networks = [
        {
            "key": key,
            "is_exit": False,
            "macs": sum(counted[key]["backbone_macs"] + counted[key]["head_macs"]),
            "parameters": counted[key]["parameters"],
            "bytes": results[f"{name}-int8"]["bytes"],
            "profile_ms": results[f"{name}-timed"]["measured"]["ms"][-1],
        }
        for key, name in statics.items()
    ]
    alone_ns = _alone_ns(Profile.load(work / f"{trained}-timed" / kinds.PROFILE))
    networks += [
        {
            "key": name,
            "is_exit": True,
            "macs": float(costs.backbone[: k + 1].sum() + costs.head[k]),
            "parameters": None,
            "bytes": results[f"{seed}/alone"]["bytes"][k],
            "profile_ms": alone_ns[k] / 1e6,
        }
        for k, name in enumerate(exits)
    ]
    for one in networks:
        one |= {
            "accuracy": answers.accuracy(one["key"]),
            "report": answers.accuracy(one["key"], REPORT),
            "choose": answers.accuracy(one["key"], TUNING, CERTIFICATE),
            "ms": spread([race.latency_ms(one["key"]) for race in races]),
        }
    policies = [
        policy_row(row, left.get(row["key"]), exits, networks, answers, races, costs)
        for row in rows
    ]
    return {
        "parts": {name: len(places) for name, places in answers.parts.items()},
        "networks": networks,
        "parameters": counted[f"trained-{seed}"]["parameters"],
        "bytes": results[f"{trained}-int8"]["bytes"],
        "policies": policies,
        "pruned": {key: results[f"{seed}/pruned"][key] for key in ("macs", "parameters")},
        "verdicts": [
            {"measured": {"verdict": results[f"{name}-timed"]["measured"]["verdict"]}}
            for name in (*statics.values(), trained)
        ],
        "bars": bars(setting.asks, networks, policies),
    }


# ---------------------------------------------------------------- the command


if __name__ == "__main__":
    if "--worker" in sys.argv:
        asked = options("one process of the race")
        sys.exit(guarded(lambda: print(json.dumps(worker(asked.worker, asked.seed)))))
    make = of_settings(table, NAME, SMALL, FULL)
    sys.exit(main(command(__doc__ or "", "bench/seeds/worth.py", make)))
