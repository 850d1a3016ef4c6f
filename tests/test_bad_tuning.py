"""What tune refuses is refused in one line, before a use of the certificate samples is counted."""

import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest
from small import EXITS, made_energy, made_profile, made_record, pictures, record_of, small_bundle

from edgeexit import plot, recut, tune
from edgeexit.bundle import Bundle, load_bundle
from edgeexit.calibration import write_set
from edgeexit.cli import entry
from edgeexit.errors import BadFile, OutOfReach, StorageError, UsageError
from edgeexit.evaluate import Record as RecordFile
from edgeexit.evaluate import record
from edgeexit.request import Request, check_inputs


@pytest.mark.parametrize("asked", [{"max_accuracy_drop": 1e-300}, {"confidence": 1e-300}])
def test_targets_that_no_number_of_labels_can_show_are_refused(asked: dict[str, float]) -> None:
    with pytest.raises(UsageError, match="1e-300: expected"):
        tune.Target(**{"max_accuracy_drop": 0.01, **asked})


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """small.edgeexit with its record r.npz and profile p.json, in the current folder."""
    monkeypatch.chdir(tmp_path)
    bundle = small_bundle(tmp_path)
    record_of(bundle).save(tmp_path / "r.npz")
    made_profile(bundle_digest=bundle.digest).save(tmp_path / "p.json")
    return tmp_path


FILES = "--device host --record r.npz --profile p.json --ledger l.json"


def run(*asked: str) -> int:
    return entry(["tune", "small.edgeexit", *FILES.split(), *" ".join(asked).split()])


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ("--minimize energy", "the profile holds no joules"),
        ("--method fixed", "thresholds: expected with"),
        ("--method fixed --thresholds 0.5,0.5", "belong to one confidence measure"),
        ("--method fixed --measure margin --thresholds nan,0.5", "numbers or inf"),
        ("--method fixed --measure margin --thresholds 0.5", "thresholds: [0.5], expected 2"),
        ("-o small.edgeexit", "is the bundle that is tuned"),
        ("-o small.edgeexit/inner.edgeexit", "is the bundle that is tuned, or lies in it"),
        ("--rate 1e300", "inputs a second, found 1e+300"),
        ("--rate 1e-300", "inputs a second, found 1e-300"),
        ("--rate 0", "inputs a second, found 0"),
        ("--rate -30", "inputs a second, found -30"),
        ("--rate nan", "is not a finite number"),
        ("--advise --latency-budget 1ms", "--advise tells what labels buy for an accuracy drop"),
        ("--rival small.edgeexit", "expected both or none of them"),
    ],
)
def test_what_is_refused_costs_no_use_and_writes_nothing(
    asked: str, said: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(folder.rglob("*"))

    assert run(asked) == 2

    error = capsys.readouterr().err
    assert said in error and "a bug" not in error
    assert sorted(folder.rglob("*")) == before
    assert not Path("l.json").exists()


# ---------------------------------------------------------------- records


def test_a_record_of_other_classes_or_logits_is_refused(tmp_path: Path) -> None:
    bundle = small_bundle(tmp_path)
    profile = made_profile(bundle_digest=bundle.digest)
    fits = record_of(bundle, 300, 300)
    other = replace(made_record(300, 300), bundle_digest=bundle.digest)
    scaled = replace(fits, specs=tuple(replace(s, scale=2 * s.scale) for s in fits.specs))

    check_inputs(bundle, fits, profile, "host")
    with pytest.raises(BadFile, match="the record has 10 classes, this bundle 4"):
        check_inputs(bundle, other, profile, "host")
    with pytest.raises(BadFile, match="logits of exit 'exit0' have another name, type or scale"):
        check_inputs(bundle, scaled, profile, "host")


def test_a_sample_that_stands_twice_in_a_record_is_refused(folder: Path, capsys) -> None:
    found = RecordFile.load("r.npz")
    ids = found.ids.copy()
    ids[2500:2503] = ids[2499]
    replace(found, ids=ids).save("r.npz")

    assert run() == BadFile.exit_code
    said = capsys.readouterr().err
    assert "3 samples whose ids are there already (the first: '2499')" in said
    assert "Hint: " in said
    assert not Path("l.json").exists()


def test_ids_of_other_splits_may_stand_twice(tmp_path: Path) -> None:
    bundle = small_bundle(tmp_path)
    found = record_of(bundle, 300, 300)
    splits, ids = found.splits.astype("U16"), found.ids.copy()
    splits[-5:], ids[-5:] = "report", "x"
    found = replace(found, splits=splits, ids=ids)
    check_inputs(bundle, found, made_profile(bundle_digest=bundle.digest), "host")


# ---------------------------------------------------------------- what lies in the folder


CLASSES = ("a", "b", "c", "d")


@pytest.fixture
def town(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Bundle, Bundle]:
    """A bundle and a rival of two exits, both made with the set that lies here."""
    monkeypatch.chdir(tmp_path)
    some = small_bundle(tmp_path / "plain")
    made = write_set(
        tmp_path / "calibration" / "dots",
        name="dots",
        parts={
            "tuning": pictures(150, "dots:tuning", 1),
            "certificate": pictures(350, "dots:certificate", 2),
        },
        class_names=CLASSES,
        preprocess=some.preprocess,
        origin="random",
        license="none",
        rebuild="none",
        seed=0,
    )
    known = {"calibration_set": {"name": "dots", "digest": made.digest}}
    (tmp_path / "other").mkdir()
    bundle = small_bundle(tmp_path, **known)
    rival = small_bundle(tmp_path / "other", exits=2, **known)
    made_profile(bundle_digest=bundle.digest).save("profile-host.json")
    profile_of(rival).save("rival.json")
    return bundle, rival


def profile_of(rival: Bundle, **more: object):
    return made_profile((60e3, 60e3), exits=rival.exits, bundle_digest=rival.digest, **more)


AT_HOME = ["tune", "small.edgeexit", "--device", "host", "--max-accuracy-drop", "0.1"]


def test_a_damaged_default_record_is_named_and_stays(town, capsys) -> None:
    Path("small-record.npz").write_bytes(b"PK\x03\x04 no record")

    assert entry(AT_HOME) == BadFile.exit_code

    said = capsys.readouterr().err
    assert "small-record.npz" in said
    assert "Hint: remove it, and it is made anew" in said
    assert Path("small-record.npz").read_bytes() == b"PK\x03\x04 no record"


def test_a_default_record_of_another_bundle_is_kept_aside(town, capsys) -> None:
    bundle, _ = town
    made_record(50, 50).save("small-record.npz")
    old = Path("small-record.npz").read_bytes()

    assert entry(AT_HOME) == 0

    assert "is of another bundle or set: kept as small-record-" in capsys.readouterr().err
    (aside,) = Path().glob("small-record-*.npz")
    assert aside.read_bytes() == old
    assert RecordFile.load("small-record.npz").bundle_digest == bundle.digest


def test_a_record_that_cannot_be_made_leaves_the_old_one(town, capsys) -> None:
    made_record(50, 50).save("small-record.npz")
    before = sorted(Path().iterdir())

    assert entry([*AT_HOME, "--calibration", "absent"]) == UsageError.exit_code

    assert "absent" in capsys.readouterr().err
    assert sorted(Path().iterdir()) == before


def test_a_bundle_of_one_exit_is_refused_before_anything_is_made(town, capsys) -> None:
    bundle, _ = town
    recut.recut(bundle, ["exit2"], "alone.edgeexit")
    before = sorted(Path().iterdir())

    assert entry(["tune", "alone.edgeexit", *AT_HOME[2:]]) == UsageError.exit_code

    assert "the bundle has one exit ('exit2'): nothing to choose" in capsys.readouterr().err
    assert sorted(Path().iterdir()) == before


def test_the_same_set_named_takes_the_record_that_is_there(town, capsys) -> None:
    assert entry(AT_HOME) == 0
    mine = Path("small-record.npz").stat().st_mtime_ns
    assert entry([*AT_HOME, "--calibration", "calibration/dots"]) == 0
    assert Path("small-record.npz").stat().st_mtime_ns == mine


# ---------------------------------------------------------------- rivals


def ledgers() -> Iterable[Path]:
    return Path().rglob("*ledger.json")


def test_a_rival_is_compared_end_to_end(town, capsys) -> None:
    against = ["--rival", "other/small.edgeexit", "--rival-profile", "rival.json"]

    assert entry([*AT_HOME, *against, "--json"]) == 0

    rows = json.loads(capsys.readouterr().out)["worth"]["rows"]
    assert rows[-1]["kind"] == "rival"
    assert rows[-1]["ms"]["value"] == pytest.approx(0.125)
    assert rows[-1]["samples"] == 350
    assert entry(["verify", "small.edgeexit"]) == 0


@pytest.mark.parametrize(
    ("spoil", "said", "code"),
    [
        ("absent bundle", "nowhere.edgeexit", 2),
        ("absent profile", "nowhere.json: no profile", 2),
        ("damaged bundle", "bundle.json", 3),
        ("damaged profile", "rival.json", 3),
        ("profile of another bundle", "not the profile of", 2),
        ("another board", "rival small: device rpi4, expected host", 2),
        ("other threads", "rival small: threads 4, expected 1", 2),
        ("emulated", "cannot be trusted", 6),
        ("other samples", "the record of rival small lacks 500 of 500 samples", 3),
        ("no joules", "rival small: joules 'none', expected 'external'", 2),
        ("no set", "names no calibration set", 2),
    ],
)
def test_a_rival_that_cannot_be_compared_costs_no_use(
    town, capsys, spoil: str, said: str, code: int
) -> None:
    bundle, rival = town
    path, profile, more = "other/small.edgeexit", "rival.json", []
    match spoil:
        case "absent bundle":
            path = "nowhere.edgeexit"
        case "absent profile":
            profile = "nowhere.json"
        case "damaged bundle":
            (rival.path / "bundle.json").write_text("{}")
        case "damaged profile":
            Path(profile).write_text('{"format": 0}')
        case "profile of another bundle":
            profile = "profile-host.json"
        case "another board":
            profile_of(rival, device="rpi4").save(profile)
        case "other threads":
            replace(profile_of(rival), threads=4).save(profile)
        case "emulated":
            profile_of(rival, emulated="qemu-user runs this program").save(profile)
        case "other samples":
            replace(record_of(bundle, 150, 350)).save("r.npz")
            more = ["--record", "r.npz"]
        case "no joules":
            plain = made_profile(bundle_digest=bundle.digest)
            pairs = [*((EXITS, name) for name in EXITS), (EXITS[-1:], EXITS[-1])]
            replace(plain, energy=made_energy(plain, pairs)).save("profile-host.json")
            more = ["--minimize", "energy"]
        case "no set":
            rival = small_bundle(Path("other"), exits=2)
            profile_of(rival).save(profile)

    found = entry([*AT_HOME, "--rival", path, "--rival-profile", profile, *more])

    error = capsys.readouterr().err
    assert found == code, error
    assert said in error and "a bug" not in error
    assert not list(ledgers())
    assert bundle.policy_for("host") is None


def test_joules_of_early_exits_alone_cost_no_use(folder: Path, capsys) -> None:
    bundle_digest = RecordFile.load("r.npz").bundle_digest
    plain = made_profile(bundle_digest=bundle_digest)
    energy = made_energy(plain, [(EXITS, name) for name in EXITS])
    replace(plain, energy=energy).save("p.json")

    assert run("--minimize energy") == UsageError.exit_code
    assert "no joules of the network without early exits" in capsys.readouterr().err
    assert not Path("l.json").exists()


# ---------------------------------------------------------------- what is written last


@pytest.mark.parametrize("error", [StorageError("tune.svg: cannot write"), KeyboardInterrupt()])
def test_a_figure_that_fails_loses_neither_policy_nor_use(
    folder: Path, capsys, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(plot, "draw", fail)

    assert run("--plot tune.svg -o ship.edgeexit") in (StorageError.exit_code, 130)

    said = capsys.readouterr()
    assert "Certified with 95% confidence" in " ".join(said.out.split())
    assert "wrote" in said.err
    assert not Path("tune.svg").exists()
    assert Path("ship.edgeexit/bundle.json").exists()
    assert entry(["verify", "small.edgeexit", *FILES.split()[2:]]) == 0


def test_a_bundle_to_ship_that_is_interrupted_leaves_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(recut, "_check_parity", interrupt)
    monkeypatch.setattr("shutil.copyfile", interrupt)

    assert run("-o ship.edgeexit") == 130

    assert not [p for p in folder.iterdir() if "ship" in p.name]
    assert Path("small.edgeexit/policies/host.json").exists()


def test_one_exit_to_ship_alone_comes_without_a_certificate(folder: Path, capsys) -> None:
    bundle = load_bundle("small.edgeexit")
    made_profile(head=40e3, bundle_digest=bundle.digest).save("p.json")
    skilled = made_record(skill=(0.0, 9.0, 9.0), classes=4)
    replace(skilled, bundle_digest=bundle.digest, specs=bundle.logits).save("r.npz")
    asked = "--max-accuracy-drop 0.3 -o ship.edgeexit"

    assert run(asked, "--json") == 0
    assert "no certificate: " in json.loads(capsys.readouterr().out)["uncertified"]
    assert run(asked) == 0
    assert "No certificate: accuracy of exit 'exit1' alone" in capsys.readouterr().out
    shipped = load_bundle("ship.edgeexit")
    assert (shipped.exits, shipped.policy_devices()) == (("exit1",), [])


def test_a_bundle_that_takes_no_policy_costs_no_use(folder: Path, capsys) -> None:
    Path("small.edgeexit/policies").write_text("not a folder")

    assert run() == StorageError.exit_code
    assert "policies" in capsys.readouterr().err
    assert not Path("l.json").exists()


# ---------------------------------------------------------------- budgets


def test_a_p95_out_of_reach_is_told_as_a_p95(folder: Path, capsys) -> None:
    assert run("--p95 0.06ms") == OutOfReach.exit_code
    said = capsys.readouterr().err
    assert "a p95 of 0.06 ms by none (the least of all is 0.1" in said
    assert "mean" not in said
    assert "(this was use 1 of these samples)" in said


def test_what_the_ledger_leaves_too_little_for_is_said_to_be_a_later_use(
    folder: Path, capsys
) -> None:
    """1500 samples show a drop of 0.3 % at what a first use may risk, not at a tenth."""
    for use in range(1, 10):
        assert run(f"--latency-budget {use}ms") == 0
    capsys.readouterr()
    assert run("--max-accuracy-drop 0.3%") == OutOfReach.exit_code
    assert "this would be use 10 of these samples" in capsys.readouterr().err


@pytest.mark.parametrize("asked", ["--p95 0.01ms", "--latency-budget 1e-9ms --p95 9ms"])
def test_a_time_far_below_any_answer_costs_no_use(asked: str, folder: Path, capsys) -> None:
    assert run(asked) == OutOfReach.exit_code
    assert "the quickest way to any answer takes 0.105 ms" in capsys.readouterr().err
    assert not Path("l.json").exists()


def test_too_few_calls_for_a_p95_are_told(folder: Path, capsys) -> None:
    """135 calls of each path cannot show that less than one in a hundred is late."""
    assert run("--p95 0.9ms") == OutOfReach.exit_code
    assert (
        "0.105 ms, but too few samples, or single calls in the profile" in capsys.readouterr().err
    )


def test_each_budget_out_of_reach_is_named(folder: Path, capsys) -> None:
    assert run("--latency-budget 0.07ms --p95 0.06ms --max-accuracy-drop 0.1") == 7
    said = capsys.readouterr().err
    assert "the accuracy by the " in said
    assert "a mean latency of 0.07 ms by none (the least of all is 0.1" in said
    assert "a p95 of 0.06 ms by none" in said


def test_without_an_accuracy_drop_the_measure_keeps_most_within_the_budget() -> None:
    """No other measure, asked for by name, loses less on tuning within the budget."""
    found, profile = made_record(1500, 1500), made_profile()
    target = tune.Target(latency_budget_ms=0.24)

    def lost(measure: str | None) -> tuple[str, float]:
        made = tune.tune(found, profile, Request(target=target, measure=measure))
        seen = made.family.tally(made.tuning)
        return made.policy.measure, float(seen.drop[made.first :].min())

    taken, least = lost(None)
    assert least == min(lost(name)[1] for name in ("max_prob", "margin", "peak"))
    assert lost(taken)[1] == least


def test_a_real_record_of_a_real_bundle_is_tuned_after_a_copy(town) -> None:
    """What record makes of a bundle is what check_inputs asks for."""
    bundle, _ = town
    made = record(bundle, [pictures(60), pictures(30, "small:certificate", 1)])
    check_inputs(bundle, made, made_profile(bundle_digest=bundle.digest), "host")
