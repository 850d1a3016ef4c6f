"""Sliding answers with certified policies only, and never looks at what it answers."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from test_runtime import SAMPLES, make_bundle

from edgeexit import decision
from edgeexit.bundle import Bundle
from edgeexit.cli import entry
from edgeexit.errors import BadFile, DeviceError, UsageError
from edgeexit.machine import ENVIRONMENT
from edgeexit.policy import ALWAYS, DROPPED, NEVER, Policy
from edgeexit.recut import recut
from edgeexit.runtime import Runner
from edgeexit.slide import LOOK_EVERY_S, WINDOW, Slider, Track, parse_slide
from tests.trees import put, tree

INF = float("inf")
PATH = (
    (INF, INF),
    (INF, 0.9),
    (INF, 0.6),
    (0.95, 0.5),
    (0.8, 0.4),
    (0.5, 0.3),
    (0.4, 0.2),
    (ALWAYS, ALWAYS),
)
CERTIFIED, POSITION = 6, 5
BATTERY = "sys/class/power_supply/BAT0"
Captured = pytest.CaptureFixture[str]


def policy_on(
    path: tuple[tuple[float, ...], ...] = PATH,
    *,
    position: int = POSITION,
    certified: int = CERTIFIED,
    digest: str = "d" * 64,
) -> Policy:
    rows = [[t if np.isfinite(t) else str(t) for t in row] for row in path]
    return Policy(
        device="host",
        bundle_digest=digest,
        measure="max_prob",
        exits=tuple(f"exit{k}" for k in range(len(path[0]) + 1)),
        thresholds=path[position],
        certificate={"path": rows, "certified": certified, "position": position},
    )


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return make_bundle(tmp_path_factory.mktemp("bundle"))


def slider_on(bundle: Bundle, text: str, **options: Any) -> Slider:
    runner = Runner(bundle, policy_on(digest=bundle.digest))
    return Slider(runner, parse_slide(text), **options)


limits = st.sampled_from([ALWAYS, 0.1, 0.3, 0.5, 0.7, 0.9, INF])


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_every_position_leaves_where_its_certified_row_leaves(data: st.DataObject) -> None:
    exits = data.draw(st.integers(2, 4))
    rows = st.lists(limits, min_size=exits - 1, max_size=exits - 1).map(tuple)
    path = tuple(data.draw(st.lists(rows, min_size=1, max_size=6)))
    certified = data.draw(st.integers(0, len(path) - 1))
    position = data.draw(st.integers(0, certified))
    policy = policy_on(path, position=position, certified=certified)
    rng = np.random.default_rng(0)
    record = decision.Record(
        rng.random((50, exits)).astype(np.float32),
        rng.integers(0, 3, (50, exits)),
        rng.integers(0, 3, 50),
        np.arange(50),
    )
    if min(policy.thresholds) == INF:
        with pytest.raises(UsageError, match="nothing to slide"):
            Track.of(policy)
        return

    track = Track.of(policy)

    assert track.positions[track.start] == position
    assert list(track.positions) == sorted(set(track.positions))
    assert set(track.positions) <= set(range(certified + 1))
    for place, moved in zip(track.positions, track.policies, strict=True):
        assert (moved.kept, moved.measure) == (policy.kept, policy.measure)
        assert moved.certificate["position"] == place
        found = decision.leaves(record, np.array(moved.thresholds))
        assert (found == decision.leaves(record, np.array(path[place]))).all()


def test_the_track_ends_at_the_stop_and_leaves_out_the_full_network() -> None:
    track = Track.of(policy_on())

    assert track.positions == (1, 2, 3, 4, 5, 6)
    assert track.policies[0].thresholds == (NEVER, 0.9)
    assert track.policies[track.start].thresholds == PATH[POSITION]


def test_rows_that_need_a_dropped_exit_are_left_out() -> None:
    track = Track.of(policy_on(position=2))

    assert track.positions == (1, 2)
    assert {policy.kept for policy in track.policies} == {("exit1", "exit2")}
    assert track.policies[0].thresholds[0] == DROPPED


def test_without_the_final_exit_only_rows_that_end_before_it_are_served() -> None:
    path = ((INF, INF), (0.8, 0.5), (0.7, ALWAYS), (0.5, ALWAYS))
    policy = replace(policy_on(path, position=3, certified=3), kept=("exit0", "exit1"))

    assert Track.of(policy).positions == (2, 3)


@pytest.mark.parametrize(
    ("changes", "error", "place"),
    [
        ({"path": None}, UsageError, "no path"),
        ({"path": 3}, BadFile, "path: expected list"),
        ({"path": [["inf", "x"]]}, BadFile, r"path\[0\]\[1\]"),
        ({"path": [["inf"]]}, BadFile, "rows of 2"),
        ({"certified": 8}, BadFile, "certified 8"),
        ({"position": 7}, BadFile, "position 7"),
        ({"position": 4}, BadFile, "not the policy's"),
        ({"certified": "6"}, BadFile, "certified: expected int"),
    ],
)
def test_a_certificate_without_a_path_is_refused(
    changes: dict[str, object], error: type[Exception], place: str
) -> None:
    policy = policy_on()

    with pytest.raises(error, match=place):
        Track.of(replace(policy, certificate={**policy.certificate, **changes}))


def test_a_full_battery_is_strict_and_an_empty_one_loose(bundle: Bundle, tmp_path: Path) -> None:
    machine = tree(tmp_path, "host", files={f"{BATTERY}/capacity": "100\n"})
    now_s = 0.0
    slider = slider_on(bundle, "battery=20..80", machine=machine, clock=lambda: now_s)
    found = []
    for level in ("100", "80", "50", "20", "3", None, "80"):
        put(machine, {f"{BATTERY}/capacity": level})
        slider.move()
        found.append(slider.position)
        now_s += LOOK_EVERY_S

    # Of six rows: the middle of the range is between the third and the fourth.
    assert found == [1, 1, 3, 6, 6, 6, 1]


def test_sensors_are_not_asked_before_every_answer(bundle: Bundle, tmp_path: Path) -> None:
    machine = tree(tmp_path, "host", files={f"{BATTERY}/capacity": "100\n"})
    slider = slider_on(bundle, "battery", machine=machine, clock=lambda: 5.0)
    slider.move()
    put(machine, {f"{BATTERY}/capacity": "0\n"})
    slider.move()

    assert slider.position == 1


def test_heat_makes_loose(bundle: Bundle, tmp_path: Path) -> None:
    machine = tree(tmp_path, "rpi4")
    zone = "sys/class/thermal/thermal_zone0"
    now_s = 0.0
    slider = slider_on(bundle, "temperature=50..70", machine=machine, clock=lambda: now_s)
    found = []
    for degrees in (40, 50, 66, 70, 95):
        put(machine, {f"{zone}/temp": f"{degrees}000\n"})
        slider.move()
        found.append(slider.position)
        now_s += LOOK_EVERY_S

    assert found == [1, 1, 5, 6, 6]


def test_slow_answers_make_loose_quick_ones_strict(bundle: Bundle) -> None:
    slider = slider_on(bundle, "latency=8ms")

    def answer(latency_ms: float, times: int) -> int:
        for _ in range(times):
            slider.move()
            slider.note(round(latency_ms * 1e6))
        slider.move()
        return slider.position

    assert answer(500.0, 1) == POSITION  # the first answer warms up
    assert answer(7.5, 3 * WINDOW) == POSITION
    assert answer(9.0, WINDOW) == POSITION + 1
    assert answer(900.0, 10 * WINDOW) == CERTIFIED
    assert answer(3.0, WINDOW) == CERTIFIED - 1
    assert answer(3.0, 20 * WINDOW) == 1


def test_the_runner_answers_by_the_row_it_slid_to(bundle: Bundle) -> None:
    path = ((INF, INF), (0.0, INF), (0.0, 0.0))
    rows = replace(policy_on(path, position=2, certified=2), bundle_digest=bundle.digest)
    rows = replace(rows, thresholds=path[2])
    with Runner(bundle, rows) as runner:
        slider = Slider(runner, parse_slide("latency=1s"))
        for position, leaves in ((2, 0), (1, 0)):
            for _ in range(WINDOW):
                slider.note(1)
            assert (slider.position, runner(SAMPLES[0]).exit) == (position, leaves)
            slider.note(1)
            slider.move()


def test_a_bundle_that_was_cut_out_slides_like_its_parent(bundle: Bundle, tmp_path: Path) -> None:
    policy = policy_on(position=2, digest=bundle.digest)
    child = recut(bundle, policy.kept, tmp_path / "child.edgeexit")
    with Runner(child, policy) as runner:
        slider = Slider(runner, parse_slide("latency=1s"))
        for _ in range(WINDOW + 1):
            slider.note(1)
        slider.move()

        assert slider.position == 1
        assert runner.policy.thresholds == (DROPPED, 0.9)


WRONG = "cpu latency latency=8 latency=0ms battery= battery=80..20 battery=a..b temperature=60"


@pytest.mark.parametrize("text", ["", *WRONG.split(), "latency=-8ms", "battery=20..80 "])
def test_other_words_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="expected battery, temperature or latency"):
        parse_slide(text)


def test_without_a_sensor_or_a_policy_nothing_slides(bundle: Bundle, tmp_path: Path) -> None:
    machine = tree(tmp_path, "rpi4")
    with pytest.raises(DeviceError, match="no battery gauge"):
        slider_on(bundle, "battery", machine=machine)
    with Runner(bundle, None) as runner, pytest.raises(UsageError, match="no policy to slide"):
        Slider(runner, parse_slide("latency=8ms"))


def test_run_tells_the_position(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    monkeypatch.chdir(tmp_path)
    made = make_bundle(tmp_path)
    policy_on(digest=made.digest).save(made.policy_path("host"))
    for index, sample in enumerate(SAMPLES[:2]):
        Image.fromarray(sample[..., 0]).save(tmp_path / f"{index}.png")
    machine = tree(tmp_path / "tree", "host", files={f"{BATTERY}/capacity": "10\n"})
    monkeypatch.setenv(ENVIRONMENT, str(machine.root))
    command = ["run", "0.png", "1.png", "--json", "--device", "host"]

    assert entry([*command, "--slide", "battery"]) == 0
    shown = capsys.readouterr()
    answers = [json.loads(line) for line in shown.out.splitlines()]
    assert [answer["position"] for answer in answers] == [CERTIFIED] * 2
    assert f"slide: positions {CERTIFIED}..{CERTIFIED} of " in shown.err
    assert entry([*command, "--slide", "wind"]) == 2
    put(machine, {BATTERY: None})
    assert entry([*command, "--slide", "battery"]) == 5


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ("", "between inputs: none given"),
        ("0.png --policy none", "--policy none runs without one"),
        ("0.png --all-exits", "--all-exits runs without one"),
        ("0.png", "no policy to slide along"),
        ("0.png --policy bare.json", "no path of policies that were certified together"),
        ("0.png --policy full.json", "no path of policies that were certified together"),
        ("0.png --policy forged.json", "expected them to rise"),
    ],
)
def test_what_cannot_slide_says_why_and_what_to_do(
    asked: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    monkeypatch.chdir(tmp_path)
    made = make_bundle(tmp_path)
    policy = policy_on(digest=made.digest)
    replace(policy, certificate={}).save("bare.json")
    Policy.full(made).save("full.json")
    replace(policy, certificate={**policy.certificate, "position": 99}).save("forged.json")
    Image.fromarray(SAMPLES[0][..., 0]).save("0.png")

    code = entry(["run", *asked.split(), "--device", "host", "--slide", "latency=8ms"])

    shown = capsys.readouterr()
    assert code == (3 if "forged" in asked else 2)
    assert said in shown.err and "Hint: " in shown.err
    assert shown.out == ""


@pytest.mark.parametrize("value", [None, "", "full\n", "\x00\xff", "nan\n", "1e999\n"])
def test_a_sensor_that_says_nonsense_meanwhile_changes_nothing(
    bundle: Bundle, tmp_path: Path, value: str | None
) -> None:
    machine = tree(tmp_path, "host", files={f"{BATTERY}/capacity": "10\n"})
    clock = iter(range(0, 1000, 10))
    slider = slider_on(bundle, "battery", machine=machine, clock=lambda: next(clock))
    slider.move()
    put(machine, {f"{BATTERY}/capacity": value})
    slider.move()
    assert slider.position == CERTIFIED
