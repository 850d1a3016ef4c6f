"""A policy is verified from its files alone, and one altered bit in any of them is seen."""

import json
import re
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small import made_profile, made_record, record_of, small_bundle

from edgeexit import ledger, tune
from edgeexit.cli import entry
from edgeexit.errors import BadFile, EdgeExitError, UsageError
from edgeexit.evaluate import Record
from edgeexit.files import json_bytes
from edgeexit.policy import Policy
from edgeexit.profile import Profile
from edgeexit.verify import Outcome, differences, verify

TARGET = tune.Target(max_accuracy_drop=0.02, confidence=0.9)
REQUEST = tune.Request(target=TARGET, method="shared", measure="max_prob")


@dataclass(frozen=True)
class World:
    """The files that one policy was made from, and the policy."""

    folder: Path

    def verify(self, **other: Path) -> Outcome:
        paths: dict[str, Any] = {
            "policy_path": self.policy,
            "bundle_path": self.bundle,
            "record_path": self.folder / "record.npz",
            "profile_path": self.folder / "profile-host.json",
            "reference_path": self.folder / "reference.npz",
            "ledger_path": self.folder / "ledger.json",
        }
        return verify(**{**paths, **other})

    @property
    def bundle(self) -> Path:
        return self.folder / "small.edgeexit"

    @property
    def policy(self) -> Path:
        return self.bundle / "policies" / "host.json"

    def spend(self, record: Record, digests: dict[str, str | None], **options: Any) -> ledger.Entry:
        key = ledger.split_key(record.digests[record.rows("certificate")])
        request = replace(REQUEST, **options).digest(digests)
        return ledger.spend(self.folder / "ledger.json", key, request, {"level": 0.02})


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("verify")
    bundle = small_bundle(folder)
    record = record_of(bundle, 800, 1500)
    rng = np.random.default_rng(1)
    logits = record.logits.copy()
    logits[rng.random(len(record)) < 0.02, -1] = 0
    reference = replace(record, logits=logits, bundle_digest="c" * 64)
    profile = made_profile(bundle_digest=bundle.digest)
    record.save(folder / "record.npz")
    reference.save(folder / "reference.npz")
    profile.save(folder / "profile-host.json")
    made = World(folder)
    digests = tune.input_digests(record, profile, reference)
    made.spend(record, digests, seed=7)
    tuned = tune.tune(
        *(record, profile, REQUEST),
        reference=reference,
        use=made.spend(record, digests),
    )
    tuned.policy.save(made.policy)
    return made


def test_what_tune_made_holds_and_nothing_is_written(world: World) -> None:
    before = {path: path.read_bytes() for path in world.folder.rglob("*") if path.is_file()}

    outcome = world.verify()

    assert outcome.differences == ()
    assert "Certified with 90% confidence on 1500 samples, use 2 of these" in outcome.sentence
    assert "is at most 2.00% (" in outcome.sentence
    assert {p: p.read_bytes() for p in world.folder.rglob("*") if p.is_file()} == before


@pytest.mark.parametrize(
    ("keys", "value"),
    [
        (("thresholds", 0), 0.5),
        (("measure",), "margin"),
        (("device",), "rpi4"),
        (("target", "max_accuracy_drop"), 0.01),
        (("target", "confidence"), 0.95),
        (("expected", "mean_ms"), 0.1),
        (("certificate", "certified"), 1000),
        (("certificate", "seed"), 7),
        (("certificate", "method"), "quota"),
        (("certificate", "method"), "fixed"),
        (("certificate", "method"), 5),
        (("certificate", "path", -1, 0), 0.1),
        (("certificate", "ledger", "use"), 1),
        (("certificate", "ledger", "at"), "2020-01-01T00:00:00+00:00"),
        (("certificate", "digests", "record"), "0" * 64),
        (("certificate", "digests", "reference"), None),
        (("certificate", "promise"), "all is well"),
        (("certificate", "more"), 1),
        (("provenance", "measure_asked"), None),
        (("provenance", "made_by"), "0"),
        (("provenance", "threads"), 9),
        (("provenance", "thresholds_asked"), ["0.5", "0.5"]),
    ],
)
def test_an_altered_value_is_a_difference(
    world: World, tmp_path: Path, keys: tuple[Any, ...], value: object
) -> None:
    document = json.loads(world.policy.read_text())
    inner = document
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = value
    path = tmp_path / "altered.json"
    path.write_bytes(json_bytes(document))

    try:
        outcome = world.verify(policy_path=path)
    except BadFile:
        return
    assert not outcome.holds
    assert all("\n" not in line and ": " in line for line in outcome.differences)


def altered(world: World, path: Path, keys: tuple[Any, ...], change: Any) -> Path:
    """The policy, saved as *path*, with *change* (a value, or a function of it) made at *keys*."""
    document = json.loads(world.policy.read_text())
    inner = document
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = change(inner[keys[-1]]) if callable(change) else change
    path.write_bytes(json_bytes(document))
    return path


WORKED_OUT = [
    ("expected", "mean_ms"),
    ("expected", "worth", "rows", 0, "speed_up", "high"),
    ("expected", "worth", "rows", 1, "accuracy", "low"),
    ("certificate", "path_costs", 2),
    ("certificate", "p_value"),
]
DECIDED = [
    ("thresholds", 0),
    ("certificate", "path", 3, 0),
    ("certificate", "delta"),
    ("certificate", "drop"),
    ("certificate", "level"),
    ("target", "max_accuracy_drop"),
    ("target", "confidence"),
]


@pytest.mark.parametrize("keys", WORKED_OUT)
def test_what_is_worked_out_may_differ_in_its_last_digits_alone(
    world: World, tmp_path: Path, keys: tuple[Any, ...]
) -> None:
    """As between two processors; whatever is more is named."""
    path = altered(world, tmp_path / "p.json", keys, lambda value: value * (1 + 1e-12))
    assert path.read_bytes() != world.policy.read_bytes()
    assert world.verify(policy_path=path).differences == ()

    altered(world, path, keys, lambda value: value * (1 + 4e-9))
    (line,) = world.verify(policy_path=path).differences
    assert line.startswith(f"{keys[0]}.{keys[1]}")


@pytest.mark.parametrize("keys", DECIDED)
def test_what_was_decided_is_equal_to_the_last_digit(
    world: World, tmp_path: Path, keys: tuple[Any, ...]
) -> None:
    path = altered(world, tmp_path / "p.json", keys, lambda value: value * (1 + 1e-14))
    assert path.read_bytes() != world.policy.read_bytes()
    assert not world.verify(policy_path=path).holds


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("confidence", -1.0),
        ("confidence", 2.0),
        ("confidence", 1e308),
        ("max_accuracy_drop", -0.02),
        ("max_accuracy_drop", None),
        ("max_accuracy_drop", "0.02"),
        ("max_accuracy_drop", [0.02]),
        ("latency_budget_ms", -8.0),
        ("p95_ms", 1e-300),
        ("rate_hz", 1e300),
        ("minimize", "everything"),
        ("minimize", None),
        ("unheard_of", 1),
    ],
)
def test_an_absurd_target_is_a_difference_and_runs_all_the_same(
    world: World, tmp_path: Path, key: str, value: object, capsys: pytest.CaptureFixture[str]
) -> None:
    """What was asked for has no part in running; a policy runs as its thresholds say."""
    path = altered(world, tmp_path / "p.json", ("target", key), value)
    if key == "p95_ms":  # contradicts it
        document = json.loads(path.read_text())
        document["target"]["latency_budget_ms"] = 1.0
        path.write_bytes(json_bytes(document))
    outcome = world.verify(policy_path=path)
    assert not outcome.holds
    assert all("\n" not in line for line in outcome.differences)

    np.save(tmp_path / "x.npy", np.zeros((12, 10, 1), np.uint8))
    run = ["run", str(world.bundle), str(tmp_path / "x.npy"), "--policy", str(path)]
    assert entry(run) == 0
    capsys.readouterr()


@pytest.mark.parametrize("command_name", ["verify", "run"])
def test_a_target_that_is_no_number_is_a_bad_file(
    world: World, tmp_path: Path, command_name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "p.json"
    text = world.policy.read_text().replace('"max_accuracy_drop": 0.02', '"max_accuracy_drop": NaN')
    path.write_text(text)
    np.save(tmp_path / "x.npy", np.zeros((12, 10, 1), np.uint8))
    asked = command(world) if command_name == "verify" else ["run", str(world.bundle)]
    more = [] if command_name == "verify" else [str(tmp_path / "x.npy")]

    assert entry([*asked, *more, "--policy", str(path)]) == BadFile.exit_code
    said = capsys.readouterr().err
    assert "NaN is not allowed" in said
    assert "Hint: " in said


def is_the_same_but_for_rounding(good: bytes, bad: bytes) -> bool:
    """Whether two policy files hold the same, their figures to a share of 1e-9."""
    figures = re.compile(rb"-?\d+\.\d+(?:e-?\d+)?")
    pairs = zip(figures.findall(good), figures.findall(bad), strict=True)
    return figures.sub(b"", good) == figures.sub(b"", bad) and all(
        float(mine) == pytest.approx(float(yours), rel=1e-9, abs=0) for mine, yours in pairs
    )


@pytest.mark.parametrize("group", ["policy", "record", "reference", "profile", "ledger", "bundle"])
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_one_altered_bit_in_any_input_is_seen(
    world: World, group: str, data: st.DataObject
) -> None:
    bundle = world.folder / "bits" / "small.edgeexit"
    if not bundle.exists():
        shutil.copytree(world.bundle, bundle)
    sources = {
        "policy": world.policy,
        "record": world.folder / "record.npz",
        "reference": world.folder / "reference.npz",
        "profile": world.folder / "profile-host.json",
        "ledger": world.folder / "ledger.json",
        "bundle": data.draw(st.sampled_from(sorted(p for p in bundle.iterdir() if p.is_file()))),
    }
    good = sources[group].read_bytes()
    bit = data.draw(st.integers(0, 8 * len(good) - 1))
    bad = bytearray(good)
    bad[bit // 8] ^= 1 << bit % 8
    path = sources[group] if group == "bundle" else world.folder / "bits" / sources[group].name
    path.write_bytes(bytes(bad))
    other = {f"{group}_path": bundle if group == "bundle" else path}
    try:
        outcome = world.verify(**other)
        assert not outcome.holds or (group == "policy" and is_the_same_but_for_rounding(good, bad))
    except EdgeExitError as error:
        assert error.exit_code == BadFile.exit_code
    finally:
        path.write_bytes(good)
    if group == "bundle":
        assert world.verify(**other).holds


def test_other_files_are_named_and_nothing_else_is_compared(world: World, tmp_path: Path) -> None:
    other = tmp_path / "other.npz"
    made_record(300, 300).save(other)

    outcome = world.verify(record_path=other)

    assert len(outcome.differences) == 1
    assert outcome.differences[0].startswith("certificate.digests.record: found ")


def test_a_use_that_no_ledger_counted_promises_nothing(world: World, tmp_path: Path) -> None:
    assert "no ledger" in world.verify(ledger_path=tmp_path / "none.json").differences[0]

    path = tmp_path / "ledger.json"
    ledger.spend(path, "a" * 64, "b" * 64, {})
    assert "knows no use" in world.verify(ledger_path=path).differences[0]

    path.write_text("{}")
    with pytest.raises(BadFile, match="format: missing"):
        world.verify(ledger_path=path)


def test_only_the_use_that_was_counted_is_believed(world: World, tmp_path: Path) -> None:
    """A policy made as if it were the first use is not the one that the ledger knows."""
    policy = Policy.load(world.policy)
    known, known_digests = policy.certificate["ledger"], policy.certificate["digests"]
    first = ledger.Entry(use=1, request=known["request"], at=known["at"], facts={}, digest="")
    made = tune.tune(
        Record.load(world.folder / "record.npz"),
        Profile.load(world.folder / "profile-host.json"),
        REQUEST,
        reference=Record.load(world.folder / "reference.npz"),
        use=first,
        digests=known_digests,
    ).policy
    path = tmp_path / "first.json"
    made.save(path)

    found = world.verify(policy_path=path).differences

    assert any(line.startswith("certificate.ledger.use: found 1, expected 2") for line in found)
    assert any(line.startswith("certificate.delta: ") for line in found)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(JSON, JSON)
def test_values_differ_just_if_their_json_does(found: object, expected: object) -> None:
    lines = list(differences(found, expected, "x"))

    def words(value: object) -> str:
        return json.dumps(value, sort_keys=True).replace("-0.0", "0.0")

    assert bool(lines) == (words(found) != words(expected))
    assert list(differences(found, found)) == []
    assert all(line.startswith("x") for line in lines)


# ---------------------------------------------------------------- the command


def command(world: World, *more: str) -> list[str]:
    files = {
        "--record": world.folder / "record.npz",
        "--profile": world.folder / "profile-host.json",
        "--reference": world.folder / "reference.npz",
        "--ledger": world.folder / "ledger.json",
    }
    given_files = [word for name, path in files.items() for word in (name, str(path))]
    return ["verify", str(world.bundle), *given_files, *more]


def test_the_command_prints_what_holds(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    assert entry(command(world)) == 0
    shown = capsys.readouterr()
    assert shown.out.count("\n") == 1
    assert "recomputed, all equal" in shown.out

    assert entry(command(world, "--json")) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["holds"] is True
    assert document["promise"].startswith("Certified with 90% confidence")
    assert document["differences"] == []


@pytest.mark.parametrize("option", ["--record", "--profile"])
def test_a_file_that_is_not_there_is_asked_for_by_its_option(
    world: World, option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert entry(command(world, option, str(world.folder / "away"))) == UsageError.exit_code
    said = capsys.readouterr().err
    assert f"name it with {option}" in said
    assert "verify PARENT --policy CHILD/policies" in said


def test_the_command_lists_differences_and_exits_3(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    document = json.loads(world.policy.read_text())
    document["expected"]["mean_ms"] *= 0.5
    document["expected"]["accuracy"] = 1.0
    path = tmp_path / "host.json"
    path.write_bytes(json_bytes(document))

    assert entry(command(world, "--policy", str(path))) == BadFile.exit_code
    shown = capsys.readouterr()
    assert [line.partition(":")[0] for line in shown.out.splitlines()] == [
        "expected.accuracy",
        "expected.mean_ms",
    ]
    assert "places that differ: 2" in shown.err

    assert entry(command(world, "--policy", str(path), "--json")) == BadFile.exit_code
    assert json.loads(capsys.readouterr().out)["holds"] is False


@pytest.mark.parametrize(
    "options",
    [
        ["--max-accuracy-drop", "0.02"],
        ["--latency-budget", "0.25ms", "--method", "shared"],
        ["--method", "fixed", "--thresholds", "0.9,inf", "--measure", "margin"],
        ["--method", "fixed", "--thresholds", "0,0", "--measure", "max_prob"],
    ],
)
def test_what_the_command_tune_writes_holds(
    world: World, tmp_path: Path, options: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(world.bundle, tmp_path / "small.edgeexit")
    shutil.copy(world.folder / "record.npz", tmp_path / "small-record.npz")
    shutil.copy(world.folder / "profile-host.json", tmp_path)
    monkeypatch.chdir(tmp_path)

    assert entry(["tune", "--device", "host", *options]) == 0
    assert entry(["verify"]) == 0
    counted = json.loads((tmp_path / "small-record.npz.ledger.json").read_text())
    assert [len(uses) for uses in counted["splits"].values()] == [1]
