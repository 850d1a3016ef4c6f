"""Facts about how a scheme is picked: the rule, the measuring in turns, and what it leaves."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from profiles import added_cost, built_profile, slowed, watched_cases, with_blocks

from edgeexit import cli
from edgeexit.blocks import CLEAN, DISTURBED, Verdict
from edgeexit.bundle import Bundle, load_bundle
from edgeexit.errors import UsageError
from edgeexit.profile import Profile

pytestmark = pytest.mark.host
torch = pytest.importorskip("torch")
pytest.importorskip("litert_torch")

from dataclasses import replace  # noqa: E402

from edgeexit.cli.schemes import choice_table  # noqa: E402
from edgeexit.host import contest, lower  # noqa: E402
from edgeexit.host.checkpoint import save_checkpoint  # noqa: E402
from edgeexit.host.contest import Held, Trial, decide  # noqa: E402
from edgeexit.host.convert import convert  # noqa: E402
from edgeexit.host.torch_answers import torch_logits  # noqa: E402
from tests import host_nets  # noqa: E402
from tests.sshd import boards, laptop  # noqa: E402

__all__ = ["boards", "laptop"]

COSTS = {"int8": 7.0, "int8-matmul": 1.2, "dynamic": 1.0, "float16": 1.9, "float": 1.9}


def trial(scheme: str, cost: float, size: int = 100, agree: float = 1.0, right: float = 0.9):
    return Trial(
        scheme=scheme,
        model_bytes=size,
        agreement={"early": 1.0, "final": agree},
        accuracy={"early": 0.8, "final": right},
        latency={},
        cost=cost,
        outside_xnnpack={},
    )


FLOAT = trial("float", 10.0, size=400)
IN_FLOAT = {"early": 0.8, "final": 0.9}


@pytest.mark.parametrize(
    ("others", "labels", "taken"),
    [
        ([trial("int8", 2.0)], True, "int8"),
        ([trial("int8", 70.0)], True, "float"),
        ([trial("int8", 2.0, agree=0.98, right=0.88)], True, "float"),
        ([trial("int8", 2.0, agree=0.98, right=0.896)], True, "int8"),
        ([trial("int8", 2.0, agree=0.98, right=0.896)], False, "float"),
        ([trial("int8", 2.0, agree=0.99, right=0.5)], True, "int8"),
        ([trial("int8", 2.0), trial("dynamic", 2.05, size=90)], True, "dynamic"),
        ([trial("int8", 2.0), trial("dynamic", 2.1, size=90)], True, "int8"),
        ([trial("int8", 2.0, agree=0.5, right=0.5), trial("dynamic", 3.0)], True, "dynamic"),
        ([Trial(scheme="int8", refused="no")], True, "float"),
    ],
)
def test_the_fastest_that_answers_as_float_does_is_taken(others, labels, taken) -> None:
    best, why = decide([*others, FLOAT], IN_FLOAT if labels else None)

    assert best.scheme == taken
    assert "fastest" in why


def test_what_was_faster_but_wrong_and_how_much_slower_the_next_is_are_told() -> None:
    _, why = decide([trial("int8", 1.0, agree=0.5, right=0.4), trial("dynamic", 4.0), FLOAT], None)

    assert why == (
        "the fastest: float takes 2.50 times as long; int8: faster, but too many answers differ"
    )


def simulated(
    measured: list[str], drift: float = 1.0, costs: dict[str, float] = COSTS
) -> Callable[[Bundle], Profile]:
    """Measures as a machine that gets *drift* times slower from one bundle to the next."""

    def measure(bundle: Bundle) -> Profile:
        factor = costs[bundle.scheme]
        measured.append(bundle.scheme)
        slower = drift ** len(measured)
        found = built_profile(
            exits=bundle.exits,
            processes=5,
            seed=len(measured),
            cases=watched_cases(bundle.exits),
            cost=lambda case: factor * added_cost(case, bundle.exits),
        )
        return with_blocks(found, lambda _, block: slowed(block, slower))

    return measure


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """A checkpoint and its samples."""
    folder = tmp_path_factory.mktemp("contest")
    net, reals = host_nets.conv_net(count=80, seed=1)
    save_checkpoint(
        folder / "net.pt",
        model=net,
        arch="tests.host_nets:ConvNet",
        kwargs={},
        input_shape=(1, 1, 12, 12),
        class_names=list("abcde"),
        preprocess=host_nets.GRAY,
    )
    labels = torch_logits(net, reals)["final"].argmax(axis=1)
    np.savez(folder / "some.npz", samples=reals.samples, labels=labels)
    return folder


ARCH = "tests.host_nets:ConvNet"


def test_the_bundle_is_that_of_the_scheme_by_name_and_says_how_it_was_picked(
    work, monkeypatch
) -> None:
    candidates = ("int8", "dynamic", "float")
    monkeypatch.setattr(contest, "CANDIDATES", candidates)
    measured: list[str] = []
    auto = convert(
        work / "net.pt",
        work / "auto.edgeexit",
        work / "some.npz",
        scheme="auto",
        arch=ARCH,
        measure=simulated(measured, drift=1.1),
    )
    named = convert(
        work / "net.pt", work / "named.edgeexit", work / "some.npz", scheme=auto.scheme, arch=ARCH
    )
    choice = auto.provenance["scheme_choice"]
    rows = {row["scheme"]: row for row in choice["candidates"]}
    right = [name for name in rows if rows[name]["is_right"]]

    assert measured == [*candidates, *reversed(candidates)]
    assert auto.scheme == choice["scheme"] == min(right, key=COSTS.__getitem__)
    assert auto.segments == named.segments
    assert auto.files == named.files
    left = {key: value for key, value in auto.provenance.items() if key != "scheme_choice"}
    assert left == named.provenance
    assert (choice["held_out"]["count"], choice["device"]) == (16, "rpi4")
    # The machine grew slower all the time; in turns of the yardstick the ratios stand.
    for name in candidates:
        assert rows[name]["times_fastest"] == pytest.approx(COSTS[name], rel=0.02)
    assert rows["float"]["agreement"] == {"small": 1.0, "middle": 1.0, "final": 1.0}
    assert choice["float_accuracy"]["final"] == 1.0
    text = "\n".join(choice_table(choice))
    assert all(name in text for name in (*candidates, "<- taken", "95 % interval"))


def test_a_disturbed_machine_is_told_and_what_cannot_be_made_is_left_out(
    monkeypatch, tmp_path
) -> None:
    from edgeexit.bundle import write_bundle
    from edgeexit.errors import Unsupported
    from edgeexit.host import schemes

    def refuses(lowered, reals, advance):
        raise Unsupported("no kernel for it")

    monkeypatch.setitem(schemes.SCHEMES, "int8", refuses)
    monkeypatch.setitem(schemes.SCHEMES, "int8-matmul", schemes.SCHEMES["float"])
    net, reals = host_nets.conv_net(count=40, seed=1)
    lowered = lower.from_torch(net, (1, 1, 12, 12), host_nets.GRAY)
    measured: list[str] = []
    fair = simulated(measured)

    def measure(bundle: Bundle) -> Profile:
        status = DISTURBED if len(measured) == 0 else CLEAN
        return replace(fair(bundle), verdict=Verdict(status=status))

    def write(path, scheme, made):
        return write_bundle(
            path,
            name="net",
            model_data=made.data,
            exits=made.exits,
            class_names=list("abcde"),
            preprocess=host_nets.GRAY,
            selftest=reals.samples[:2],
            scheme=scheme,
            provenance={},
        )

    held = Held(reals=reals, labels=None, name="some")
    document = contest.pick(lowered, reals, held, measure, write).to_document()
    rows = {row["scheme"]: row for row in document["candidates"]}
    text = "\n".join(choice_table(document))

    assert measured == ["int8-matmul", "dynamic", "float16", "float16", "dynamic", "int8-matmul"]
    assert rows["int8"] == {"scheme": "int8", "refused": "no kernel for it"}
    assert "float" not in rows  # the same bytes as what stands for int8-matmul here
    assert rows["int8-matmul"]["verdict"] == DISTURBED
    assert "not itself while these were measured: int8-matmul" in text
    assert "no kernel for it" in text
    json.dumps(document, allow_nan=False)


def test_a_set_lends_its_tuning_split(work, tmp_path) -> None:
    from edgeexit.host.convert import _held_back
    from edgeexit.host.gates import Asked, open_model
    from edgeexit.samples import find_set

    opened = open_model(work / "net.pt", Asked(arch=ARCH, calibration=work / "some.npz"))
    some = find_set("fashion-mnist")
    opened = replace(opened, preprocess=some.preprocess, class_names=some.class_names)
    ranges = some.split("ranges")
    fit, held = _held_back(opened, "fashion-mnist", ranges)

    assert len(fit) == len(ranges)
    assert (held.name, len(held.reals)) == ("fashion-mnist:tuning", 1000)
    assert held.labels is not None


@pytest.mark.parametrize("option", [["--device", "rpi4"], ["--host", "pi"]])
def test_who_measures_is_named_for_auto_only(option, work, capsys) -> None:
    assert cli.entry(["convert", str(work / "net.pt"), "--scheme", "int8", *option]) == 2
    assert "nothing is measured for --scheme int8" in capsys.readouterr().err


@pytest.fixture
def pi4(boards, tmp_path, monkeypatch) -> None:
    """A board in hosts.toml of the current folder that says it is a Raspberry Pi 4."""
    pytest.importorskip("asyncssh")
    from test_remote_profiling import LIMITS, host_of, install, replayed

    from edgeexit.remote.hosts import Hosts

    monkeypatch.chdir(tmp_path)
    fake = replayed(tmp_path / "tree", "Raspberry Pi 4 Model B Rev 1.4")
    Hosts.read().add(host_of(install(boards(), **fake), device="rpi4"))
    monkeypatch.setattr(contest, "LIMITS", LIMITS)


def test_the_board_of_a_device_measures_over_ssh(pi4, tmp_path) -> None:
    from small import small_bundle

    from edgeexit.cli.schemes import measuring

    bundle = small_bundle(tmp_path, exits=2)
    measure = measuring("auto", "rpi4", None)
    assert measure is not None
    found = measure(bundle)

    assert (found.device, found.bundle_digest) == ("rpi4", bundle.digest)
    assert all(found.case(bundle.exits, exit) for exit in bundle.exits)


def test_an_unknown_scheme_names_auto_too(work) -> None:
    with pytest.raises(UsageError, match="auto") as refusal:
        convert(work / "net.pt", scheme="atuo")
    assert refusal.value.hint == "did you mean 'auto'?"


@pytest.mark.slow
def test_a_very_slow_scheme_says_so(work, capsys, monkeypatch) -> None:
    monkeypatch.chdir(work)
    given = ["--arch", ARCH, "--calibration", "some.npz", "-o", "slow.edgeexit"]

    assert cli.entry(["convert", "net.pt", "--scheme", "int16x8", *given]) == 0
    assert "warning: int16x8: accurate, and very slow" in capsys.readouterr().err
    assert load_bundle("slow.edgeexit").logits[0].dtype == "int16"


@pytest.mark.slow
def test_this_machine_measures_them(work, capsys, monkeypatch) -> None:
    monkeypatch.chdir(work)
    given = ["--arch", ARCH, "--calibration", "some.npz", "-o", "here.edgeexit", "--json"]

    assert cli.entry(["convert", "net.pt", "--scheme", "auto", *given]) == 0
    choice = json.loads(capsys.readouterr().out)["scheme_choice"]
    for row in choice["candidates"]:
        assert all(0 < ms["low"] <= ms["value"] <= ms["high"] for ms in row["ms"].values())
    assert choice["device"] == "host"


@pytest.mark.slow
def test_a_board_measures_them_all(pi4, work, tmp_path, capsys) -> None:
    given = ["--arch", ARCH, "--calibration", str(work / "some.npz"), "-o", "there.edgeexit"]
    asked = ["--scheme", "auto", "--device", "rpi4", "--json"]

    assert cli.entry(["convert", str(work / "net.pt"), *given, *asked]) == 0
    choice = json.loads(capsys.readouterr().out)["scheme_choice"]
    assert choice["device"] == "rpi4"
    assert len(choice["candidates"]) > 2
    taken = [row for row in choice["candidates"] if row["scheme"] == choice["scheme"]]
    assert all(ms["value"] > 0 for ms in taken[0]["ms"].values())
    assert load_bundle("there.edgeexit").scheme == choice["scheme"]
