"""A bundle cut down to some exits answers as its parent does, and says whose child it is."""

import json
import shutil
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from test_bundle import contents
from test_runtime import SAMPLES, make_bundle

from edgeexit import recut as recut_room
from edgeexit.bundle import Bundle, load_bundle
from edgeexit.cli import entry
from edgeexit.errors import BadFile, ParityError, UsageError
from edgeexit.policy import DROPPED, Policy
from edgeexit.recut import recut
from edgeexit.runtime import Runner
from edgeexit.selftest import run_selftest

GOLDEN = Path(__file__).parent / "golden"
NAMES = ("exit0", "exit1", "exit2")


@pytest.fixture(scope="module")
def parent(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return make_bundle(tmp_path_factory.mktemp("parent"), skip=True)


def policy_of(bundle: Bundle, kept: tuple[str, ...], threshold: float = 0.3) -> Policy:
    names = bundle.exits[:-1]
    return Policy(
        device="host",
        bundle_digest=bundle.digest,
        measure="max_prob",
        exits=bundle.exits,
        thresholds=tuple(threshold if name in kept else DROPPED for name in names),
    )


@pytest.mark.parametrize("kept", [k for n in (1, 2) for k in combinations(NAMES, n)])
def test_kept_exits_answer_as_the_parent_does(
    parent: Bundle, tmp_path: Path, kept: tuple[str, ...]
) -> None:
    child = recut(parent, kept[::-1], tmp_path / "child.edgeexit")
    columns = [NAMES.index(name) for name in kept]

    assert child.exits == kept
    assert child.parent is not None
    assert (child.parent.digest, child.parent.exits) == (parent.digest, NAMES)
    assert len(child.segments) == len(kept)
    assert len(child.model_data()) < len(parent.model_data())
    assert (child.selftest().logits == parent.selftest().logits[:, columns]).all()
    assert run_selftest(child).differing == 0
    with Runner(parent, None) as whole, Runner(child, None) as part:
        for sample in SAMPLES:
            assert (part.raw_logits(sample) == whole.raw_logits(sample)[columns]).all()


def test_a_policy_of_the_parent_decides_alike_in_the_child(tmp_path: Path) -> None:
    parent = make_bundle(tmp_path)
    policy = policy_of(parent, ("exit1",))
    policy.save(parent.policy_path("host"))
    Policy.full(parent).save(parent.policy_path("rpi4"))

    child = recut(parent, policy.kept, tmp_path / "child.edgeexit")

    assert child.policy_devices() == ["host"]
    assert child.policy_for("host") == policy
    with Runner(parent, policy) as whole, Runner(child, device="host") as part:
        for sample in SAMPLES:
            one, two = whole(sample), part(sample)
            assert (one.label, one.confidence, one.exit_name) == (
                *(two.label, two.confidence, two.exit_name),
            )
        assert part.policy == policy
    other = recut(parent, ("exit0", "exit2"), tmp_path / "other.edgeexit")
    with pytest.raises(BadFile, match="made for bundle"):
        Runner(other, policy)


def test_inspect_names_the_parent(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parent = make_bundle(tmp_path)
    policy_of(parent, ("exit1",)).save(parent.policy_path("host"))
    child = recut(parent, ("exit1", "exit2"), tmp_path / "child.edgeexit")

    assert entry(["inspect", str(child.path)]) == 0
    shown = capsys.readouterr().out
    assert f"cut out of  {parent.digest}, which has exit0, exit1, exit2" in shown
    assert "of another bundle" not in shown
    assert entry(["inspect", str(child.path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["parent"]["digest"] == parent.digest


def test_one_exit_alone_is_not_said_to_lack_a_policy(
    parent: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(recut(parent, ("exit0",), tmp_path / "static.edgeexit").path)
    np.save(tmp_path / "one.npy", SAMPLES[0])

    assert entry(["inspect", path]) == 0
    assert "a static network: one exit" in capsys.readouterr().out
    asked = (["verify", path], ["run", path, str(tmp_path / "one.npy"), "--slide", "latency=8ms"])
    for words in asked:
        assert entry(words) == UsageError.exit_code
        said = capsys.readouterr().err
        assert "a network of one exit" in said
        assert "edgeexit tune" not in said


def test_equal_cuts_give_equal_bytes_and_keep_policies_made_for_the_child(
    parent: Bundle, tmp_path: Path
) -> None:
    child = recut(parent, ("exit0",), tmp_path / "a.edgeexit")
    Policy.full(child).save(child.policy_path("host"))
    before = contents(child.path)

    again = recut(parent, ("exit0",), tmp_path / "a.edgeexit")

    assert contents(again.path) == before
    assert again.policy_devices() == ["host"]


def test_a_cut_that_changes_an_answer_is_refused(
    parent: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = make_bundle(tmp_path, skip=True, seed=7)
    monkeypatch.setattr(recut_room, "uncut", lambda *_, **__: other.model_data())

    with pytest.raises(ParityError, match="self-test sample 0"):
        recut(parent, ("exit0", "exit2"), tmp_path / "child.edgeexit")
    assert not (tmp_path / "child.edgeexit").exists()


def test_senseless_cuts_are_refused(parent: Bundle, tmp_path: Path) -> None:
    for kept, place in (((), "0 of 3"), (NAMES, "3 of 3"), (("exit9",), "exit9")):
        with pytest.raises(UsageError, match=place):
            recut(parent, kept, tmp_path / "child.edgeexit")
    with pytest.raises(UsageError, match="itself"):
        recut(parent, ("exit0",), parent.path)


@pytest.mark.parametrize(
    ("parent_key", "place"),
    [
        ([], "parent"),
        ({"digest": "a" * 64}, "exits: missing"),
        ({"digest": "a" * 64, "exits": ["exit0"]}, "exits that include"),
        ({"digest": "x", "exits": list(NAMES)}, "expected a digest"),
        ({"digest": "a" * 64, "exits": list(NAMES), "more": 1}, "more"),
    ],
)
def test_a_wrong_parent_is_refused(
    parent: Bundle, tmp_path: Path, parent_key: object, place: str
) -> None:
    child = recut(parent, ("exit0", "exit1"), tmp_path / "child.edgeexit")
    document = json.loads((child.path / "bundle.json").read_text())
    (child.path / "bundle.json").write_text(json.dumps(document | {"parent": parent_key}))

    with pytest.raises(BadFile, match=place):
        load_bundle(child.path)


def test_bundles_of_format_1_are_read(tmp_path: Path) -> None:
    """The folder was written by the version that knew no parents."""
    shutil.copytree(GOLDEN / "bundle-1.edgeexit", tmp_path / "old.edgeexit")
    old = load_bundle(tmp_path / "old.edgeexit")

    assert json.loads((old.path / "bundle.json").read_text())["format"] == 1
    assert old.parent is None
    assert run_selftest(old).samples == len(SAMPLES)
    child = recut(old, ("exit0", "exit2"), tmp_path / "new.edgeexit")
    assert child.parent is not None
    assert child.parent.digest == old.digest
    assert np.array_equal(child.selftest().samples, old.selftest().samples)
    document = json.loads((old.path / "bundle.json").read_text()) | {"parent": None}
    (old.path / "bundle.json").write_text(json.dumps(document))
    with pytest.raises(BadFile, match="parent: unknown key"):
        load_bundle(old.path)
