"""
Real ARM code gives the answers that this machine gives, to the last bit where kernels allow.

The device side runs on emulated processors of a Raspberry Pi 5 (Cortex-A76, dot products) and of
a Raspberry Pi 4 (Cortex-A72, none). XNNPACK's integer kernels agree with those of this machine;
the runtime's own, which the vision transformer also needs, round differently now and then.
"""

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import answers
import arm
import numpy as np
import pytest
from board import Board

from edgeexit.bundle import load_bundle
from edgeexit.cli import entry
from edgeexit.runtime import Runner
from edgeexit.samples import find_set

EXAMPLES = arm.CHECKOUT / "examples"
SHIPPED = ("fashion", "fashion-pruned")
RECUT = tuple(f"{name}-{kept}" for name in arm.SMALL for kept in ("exit0+exit2", "exit1"))
# What runs its self-test there, too: a net of each family, and what is shipped.
TESTED = ("resnet8", "mobilenet", "vit", "dscnn", "conv1d", *SHIPPED)
# The largest difference of a stored logit where the runtime's own kernels take part, in steps.
# Of 1,500 logits of the vision transformer 327 were seen to differ, one answer of 150.
OWN_KERNELS_STEPS = 2


def samples_of(bundle: Path, folder: Path) -> str:
    """Real samples for the *bundle*, as a file."""
    stored = bundle.with_name(f"{bundle.stem.partition('-exit')[0]}.npy")
    if not stored.is_file():
        stored = folder / "fashion.npy"
        np.save(stored, find_set("fashion-mnist").split("certificate").samples[:50])
    return str(stored)


@dataclass(frozen=True)
class Both:
    """What this machine and the emulated one answered to the same job."""

    here: Mapping[str, Any]
    there: Mapping[str, Any]

    def of(self, path: Path, key: str) -> tuple[Any, Any]:
        """Both answers: an array, or an object for "facts"."""
        found = [side[f"{path}/{key}"] for side in (self.here, self.there)]
        return tuple(json.loads(str(one)) if key == "facts" else one for one in found)


def ask_both(
    kind: str, counts: Mapping[Path, int], folder: Path, tested: Sequence[Path] = ()
) -> Both:
    """
    Let this machine and an emulated board answer *counts* samples for each bundle.

    Those *tested* run their self-tests.
    """
    with arm.or_skip():
        board = Board(kind, folder / "board")
        job: dict[str, Any] = {"bundles": {}, "policies": {}, "selftests": [*map(str, tested)]}
        for path, count in counts.items():
            samples = samples_of(path, folder)
            job["bundles"][str(path)] = [samples, count]
            policy = folder / f"{path.stem}.json"
            answers.policy_for(load_bundle(path), np.load(samples)[:count]).save(policy)
            job["policies"][str(path)] = str(policy)
        (folder / "job.json").write_text(json.dumps(job))
        answers.main(str(folder / "job.json"), str(folder / "here.npz"))
        script = Path(answers.__file__)
        done = board.run(str(script), str(folder / "job.json"), str(folder / "there.npz"))
    assert done.returncode == 0, done.stderr[-2000:]
    with np.load(folder / "here.npz") as here, np.load(folder / "there.npz") as there:
        return Both(dict(here), dict(there))


def check(both: Both, path: Path, *, is_tested: bool = False) -> None:
    """The laws that hold for every bundle."""
    (here, there), facts = both.of(path, "logits"), both.of(path, "facts")
    assert facts[0]["segments"] == facts[1]["segments"]
    same = (here == there).all(axis=2)
    is_whole = set(facts[0]["segments"]) == {"XNNPACK"}
    if is_whole:
        assert int((here != there).sum()) == 0
    else:
        labels = here.argmax(axis=2) == there.argmax(axis=2)
        assert labels.mean() >= 0.99
        assert np.abs(here.astype(int) - there.astype(int)).max() <= OWN_KERNELS_STEPS
    tested = facts[1]["selftest"]
    assert (tested is not None) == is_tested
    if is_tested:
        assert tested["selftest"] == "ok"
        # 16 samples: few may stray by rounding where XNNPACK computes everything, else all.
        assert tested["allowed_samples"] == (2 if is_whole else 16)
    # Equal logits are equally sure, to the bit, so any policy decides alike; and the chain did.
    for measure_here, measure_there in zip(*both.of(path, "read"), strict=True):
        assert (measure_here == measure_there)[same.T].all()
    chain_here, chain_there = both.of(path, "chain")
    assert (chain_here == chain_there)[same.all(axis=1)[: len(chain_here)]].all()


# ---------------------------------------------------------------- nets of the zoo


@pytest.fixture(scope="module")
def on_a76(tmp_path_factory: pytest.TempPathFactory) -> tuple[Both, dict[str, Path]]:
    folder = arm.nets(arm.SMALL)
    paths = {name: folder / f"{name}.edgeexit" for name in (*arm.SMALL, *RECUT)}
    paths |= {name: EXAMPLES / f"{name}.edgeexit" for name in SHIPPED}
    counts = {path: 5 if name in RECUT else 50 for name, path in paths.items()}
    tested = [paths[name] for name in TESTED]
    return ask_both("rpi5", counts, tmp_path_factory.mktemp("a76"), tested), paths


@pytest.mark.host
@pytest.mark.parametrize("name", [*arm.SMALL, *RECUT, *SHIPPED])
def test_a_processor_with_dot_products_answers_alike(
    on_a76: tuple[Both, dict[str, Path]], name: str
) -> None:
    both, paths = on_a76
    check(both, paths[name], is_tested=name in TESTED)


@pytest.mark.host
def test_only_the_transformer_needs_the_runtimes_own_kernels(
    on_a76: tuple[Both, dict[str, Path]],
) -> None:
    both, paths = on_a76
    outside = {n for n, p in paths.items() if both.of(p, "facts")[1]["whole"] != "XNNPACK"}

    assert outside == {name for name in paths if name.startswith("vit")}


@pytest.mark.host
def test_samples_leave_at_every_exit(on_a76: tuple[Both, dict[str, Path]]) -> None:
    """Else equal decisions would say little."""
    both, paths = on_a76
    for name in (*arm.SMALL, *SHIPPED):
        exits = both.of(paths[name], "chain")[1][:, 0]
        assert set(exits) == {0, 1, 2}, name


@pytest.mark.host
def test_the_emulated_board_says_that_it_is_one(
    on_a76: tuple[Both, dict[str, Path]],
) -> None:
    about = json.loads(str(on_a76[0].there["about"]))

    assert about["processor"] == "aarch64"
    assert about["emulated"] == "qemu-user (qemu-aarch64-static)"
    assert about["runtime"] == json.loads(str(on_a76[0].here["about"]))["runtime"]


@pytest.mark.host
@pytest.mark.parametrize(
    "names", [arm.SMALL, pytest.param((*RECUT, *SHIPPED), marks=pytest.mark.slow)], ids=len
)
def test_a_processor_without_dot_products_answers_alike(
    names: tuple[str, ...], tmp_path: Path
) -> None:
    folder = arm.nets(arm.SMALL)
    paths = [(EXAMPLES if name in SHIPPED else folder) / f"{name}.edgeexit" for name in names]
    both = ask_both("rpi4", dict.fromkeys(paths, 5), tmp_path)

    for path in paths:
        check(both, path)


@pytest.mark.slow
@pytest.mark.host
@pytest.mark.parametrize("kind", ["rpi3b+", "rpi4", "rpi5"])
def test_large_pictures_are_answered_alike(kind: str, tmp_path: Path) -> None:
    folder = arm.nets(arm.LARGE)
    paths = [folder / f"{name}.edgeexit" for name in arm.LARGE]
    both = ask_both(kind, dict.fromkeys(paths, 5), tmp_path)

    for path in paths:
        check(both, path)


# ---------------------------------------------------------------- the shipped example


@pytest.fixture(scope="module")
def pi4(tmp_path_factory: pytest.TempPathFactory) -> Board:
    with arm.or_skip():
        return Board("rpi4", tmp_path_factory.mktemp("pi4"))


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    bundle = load_bundle(EXAMPLES / "fashion.edgeexit")
    path = tmp_path_factory.mktemp("policy") / "policy.json"
    samples = find_set("fashion-mnist").split("certificate").samples[:50]
    answers.policy_for(bundle, samples).save(path)
    return path


def test_the_command_says_there_what_it_says_here(
    pi4: Board, policy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The self-test, and answers to pictures; one start of Python serves both."""
    bundle = str(EXAMPLES / "fashion.edgeexit")
    pictures = [str(EXAMPLES / "images"), "--policy", str(policy), "--top", "3"]
    commands = [["run", bundle, "--json"], ["run", bundle, *pictures, "--json"]]
    for argv in commands:
        assert entry(argv) == 0
    here = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    script = f"from edgeexit.cli import entry\nfor argv in {commands!r}: assert entry(argv) == 0"
    done = pi4.run("-c", script)
    assert done.returncode == 0, done.stderr
    there = [json.loads(line) for line in done.stdout.splitlines()]

    assert there[0]["selftest"] == "ok"
    assert there[0]["differing"] == 0
    assert len(there) > 2
    for line in (*here[1:], *there[1:]):
        assert line.pop("latency_ms") > 0
    assert there == here


def test_what_lies_behind_the_exit_taken_is_never_run(
    pi4: Board, policy: Path, tmp_path: Path
) -> None:
    """The later segments are not even there."""
    whole = load_bundle(EXAMPLES / "fashion.edgeexit")
    samples = find_set("fashion-mnist").split("certificate").samples[:50]
    with Runner(whole, policy) as runner:
        early = [sample for sample in samples if runner(sample).exit == 0]
        late = [sample for sample in samples if runner(sample).exit > 0]
    assert len(early) > 5
    assert late
    np.save(tmp_path / "early.npy", early)
    np.save(tmp_path / "late.npy", late[:1])
    part = tmp_path / "part.edgeexit"
    shutil.copytree(whole.path, part)
    for segment in whole.segments[1:]:
        (part / segment.file).unlink()
    script = tmp_path / "script.py"
    script.write_text(
        "import sys, numpy as np\n"
        "from edgeexit import vetting\n"
        "from edgeexit.bundle import load_bundle\n"
        "from edgeexit.errors import EdgeExitError\n"
        "from edgeexit.runtime import Runner\n"
        "part, policy, early, late = sys.argv[1:]\n"
        "vetting._try = lambda files, timeout_s: None\n"  # deploying tried them out
        "runner = Runner(load_bundle(part, verify=False), policy)\n"
        "print([runner(sample).exit for sample in np.load(early)], runner.opened)\n"
        "try:\n"
        "    runner(np.load(late)[0])\n"
        "except EdgeExitError as error:\n"
        "    print(error)\n"
    )
    files = [part, policy, tmp_path / "early.npy", tmp_path / "late.npy"]
    done = pi4.run(str(script), *map(str, files))

    assert done.returncode == 0, done.stderr
    answered, refused = done.stdout.splitlines()
    assert answered == f"{[0] * len(early)} ['{whole.exits[0]}']"
    assert whole.segments[1].file in refused
