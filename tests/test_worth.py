"""Whether early exit pays: the figures add up, doubt counts against it, and the advice is plain."""

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small import EXITS, made_energy, made_profile

from edgeexit.errors import UsageError
from edgeexit.profile import Profile
from edgeexit.report import text_table
from edgeexit.worth import WORTH_IT, Rival, Worth, judge_worth

MOSTLY_EARLY = np.array([0.6, 0.2, 0.2])
ALL_LATE = np.array([0.0, 0.0, 1.0])
GOOD = (940, 1000)
FULL = (945, 1000)
WATCHED = [EXITS, EXITS[-1:]]


def judged(profile: Profile, rates: np.ndarray = MOSTLY_EARLY, **more: object) -> Worth:
    facts: dict = {
        "kept": EXITS,
        "samples": 1000,
        "accuracy": GOOD,
        "statics": {},
        "full": FULL,
        **more,
    }
    return judge_worth(rates, profile=profile, **facts)


def decoding(profile: Profile, jpeg_ns: float | None) -> Profile:
    seen = profile.processes[0].dissection
    assert seen is not None
    made = replace(seen, jpeg_ns=jpeg_ns, png_ns=jpeg_ns)
    processes = tuple(replace(process, dissection=made) for process in profile.processes)
    return replace(profile, processes=processes)


# ---------------------------------------------------------------- figures


def test_the_policy_costs_the_mean_over_its_exits_and_the_rivals_what_they_take() -> None:
    # Segments of 100 us with heads of 5: 105, 210 and 315 us; alone 305 and 205.
    worth = judged(made_profile(), statics={"exit1": (941, 1000)})
    policy, full, static = worth.rows

    assert policy.ms.value == pytest.approx(0.6 * 0.105 + 0.2 * 0.210 + 0.2 * 0.315)
    assert full.ms.value == pytest.approx(0.305)
    assert (static.kind, static.name, static.ms.value) == ("static", "exit1", pytest.approx(0.205))
    assert full.speed_up.value == pytest.approx(full.ms.value / policy.ms.value)
    assert (policy.speed_up.value, policy.speed_up.low, policy.speed_up.high) == (1, 1, 1)
    assert policy.accuracy.value == 0.94
    assert policy.accuracy.low < 0.94 < policy.accuracy.high
    assert {row.origin for row in worth.rows} == {"measured"}


def test_the_cheapest_static_exit_within_the_budget_is_the_rival() -> None:
    worth = judged(made_profile(), statics={"exit1": GOOD, "exit0": GOOD})

    assert [row.name for row in worth.rows] == ["exit0+exit1+exit2", "exit2", "exit0"]
    assert worth.static_exit == "exit0"


def test_an_exit_alone_that_costs_more_than_the_network_is_no_rival() -> None:
    worth = judged(made_profile(head=(500e3, 5e3, 5e3)), statics={"exit0": GOOD})

    assert [row.kind for row in worth.rows] == ["policy", "full"]
    assert worth.static_exit == "exit2"


def test_a_quiet_machine_still_leaves_the_doubt_of_the_exit_rates() -> None:
    few, many = (judged(made_profile(), samples=n).rows[0].ms for n in (100, 10_000))

    assert few.low < many.low < many.value < many.high < few.high


def test_a_restless_machine_adds_its_own() -> None:
    quiet = judged(made_profile(processes=10)).rows[1].speed_up
    restless = judged(made_profile(processes=10, drift=0.1)).rows[1].speed_up

    assert restless.half_width > 1.5 * quiet.half_width


@pytest.mark.parametrize("drift", [0.0, 0.03])
def test_intervals_of_the_speed_up_hold_the_truth_as_often_as_they_say(drift: float) -> None:
    costs = np.array([0.105, 0.210, 0.315])
    truth = 0.305 / float(MOSTLY_EARLY @ costs)
    rng = np.random.default_rng(5)
    held = 0
    for seed in range(60):
        rates = rng.multinomial(400, MOSTLY_EARLY) / 400
        profile = made_profile(processes=8, drift=drift, sets=WATCHED, blocks=3, seed=100 * seed)
        found = judged(profile, rates, samples=400).rows[1].speed_up
        held += found.low <= truth <= found.high
    assert held >= 52  # 57 are expected; fewer than 52 come once in 60 runs


def test_a_set_that_was_not_timed_is_priced_from_parts_and_says_so() -> None:
    profile = made_profile(sets=[EXITS, EXITS[1:], EXITS[-1:]])
    worth = judged(profile, np.array([0.6, 0.0, 0.4]), kept=("exit0", "exit2"))

    assert worth.rows[0].origin == "fitted"
    assert worth.rows[0].ms.value == pytest.approx(0.6 * 0.105 + 0.4 * 0.310, rel=1e-3)
    assert "priced from the parts of other paths: this policy" in worth.notes


def test_an_exit_whose_cost_alone_is_not_told_is_judged_by_the_least_it_may_be() -> None:
    profile = made_profile(sets=WATCHED, head=(60e3, 5e3, 5e3))
    static = judged(profile, statics={"exit1": GOOD}).rows[2]

    # Leaving there takes 265 us with both heads; early heads together take 65 us of the whole.
    assert static.origin == "bound"
    assert static.ms.value == pytest.approx(0.265)
    assert static.ms.low == pytest.approx(0.200)
    assert static.speed_up.low < 0.200 / 0.265 * static.speed_up.value * 1.001


# ---------------------------------------------------------------- the verdict


def test_it_pays_where_most_samples_leave_early() -> None:
    worth = judged(made_profile())

    assert (worth.pays, worth.ship) == (True, "policy")
    assert worth.sentence.startswith("early exit pays here: speed-up 1.8")
    assert worth.sentence.endswith("over the network without exits")


def test_it_does_not_pay_where_an_exit_alone_is_as_cheap() -> None:
    worth = judged(made_profile(), statics={"exit0": GOOD})

    assert (worth.pays, worth.ship, worth.static_exit) == (False, "static", "exit0")
    assert worth.sentence.startswith(
        "early exit does not pay here: ship exit 'exit0' as a static network"
    )


def test_a_policy_without_early_exits_does_not_pay() -> None:
    worth = judged(made_profile(), ALL_LATE, kept=EXITS[-1:])

    assert (worth.pays, worth.ship, worth.static_exit) == (False, "static", "exit2")
    assert worth.sentence == (
        "early exit does not pay here: ship the network without exits "
        "(no early exit saves anything within the budget)"
    )


def test_a_gain_that_may_be_chance_is_no_gain() -> None:
    # One process says nothing about the next.
    worth = judged(made_profile(processes=1))

    assert not worth.pays
    assert "does not surely pay" in worth.sentence
    assert "more processes" in worth.sentence


@settings(max_examples=25, deadline=None)
@given(
    leave=st.floats(0, 1),
    head=st.floats(1e3, 2e5),
    static=st.booleans(),
    drift=st.sampled_from([0.0, 0.05]),
)
def test_it_pays_only_where_every_interval_is_above_the_bar(
    leave: float, head: float, static: bool, drift: float
) -> None:
    rates = np.array([leave, 0.0, 1 - leave])
    statics = {"exit1": GOOD} if static else {}
    worth = judged(made_profile(head=head, drift=drift, sets=WATCHED), rates, statics=statics)

    assert worth.pays == all(row.speed_up.low > WORTH_IT for row in worth.rows[1:])
    assert (worth.ship == "policy") == worth.pays
    assert "\n" not in worth.sentence
    for row in worth.rows:
        assert row.ms.low <= row.ms.value <= row.ms.high
        assert row.speed_up.low <= row.speed_up.value <= row.speed_up.high


# ---------------------------------------------------------------- a network of one's own


def rival(segment_ns: float, *, within: bool = True, **more: object) -> Rival:
    profile = made_profile((segment_ns,), 0.0, exits=("small",), bundle_digest="9" * 64, **more)
    return Rival(name="small", profile=profile, accuracy=(938, 1000), within_budget=within)


def test_a_faster_network_of_ones_own_is_what_to_ship() -> None:
    worth = judged(made_profile(), rival=rival(50e3))

    assert (worth.pays, worth.ship) == (False, "rival")
    assert "ship the rival small" in worth.sentence
    assert worth.rows[-1].ms.value == pytest.approx(0.05)
    assert worth.rows[-1].accuracy.value == 0.938


def test_a_network_outside_the_budget_is_shown_but_decides_nothing() -> None:
    worth = judged(made_profile(), rival=rival(50e3, within=False))

    assert worth.pays
    assert worth.rows[-1].speed_up.value < 1
    assert "outside the budget, for comparison only: rival small" in worth.notes


def test_a_network_of_ones_own_was_measured_apart_and_shares_no_luck() -> None:
    noisy = made_profile(processes=10, drift=0.1)
    # The same figures once more: as the same processes they would cancel out.
    twin = Rival(name="twin", profile=noisy, accuracy=GOOD, within_budget=True)
    worth = judged(noisy, ALL_LATE, kept=EXITS[-1:], rival=twin)

    assert worth.rows[1].speed_up.half_width == pytest.approx(0, abs=1e-9)
    assert worth.rows[2].speed_up.half_width > 0.02


@pytest.mark.parametrize("what", [{"device": "rpi4"}])
def test_a_network_measured_elsewhere_is_refused(what: dict) -> None:
    with pytest.raises(UsageError, match=r"rival small: device rpi4, expected host"):
        judged(made_profile(), rival=rival(50e3, **what))


# ---------------------------------------------------------------- end to end


def test_decoding_is_added_to_everyone_and_makes_the_gain_smaller() -> None:
    profile = decoding(made_profile(handover=500.0), 100e3)
    policy, full = judged(profile).rows

    assert policy.end_ms is not None
    assert full.end_ms is not None
    assert policy.end_ms.value == pytest.approx(policy.ms.value + 0.1)
    assert full.end_speed_up is not None
    assert full.end_speed_up.value == pytest.approx(full.end_ms.value / policy.end_ms.value)
    assert 1 < full.end_speed_up.value < full.speed_up.value


def test_what_processes_differ_by_in_decoding_is_in_the_interval() -> None:
    profile = decoding(made_profile(processes=10, handover=500.0), 100e3)
    processes = []
    for k, process in enumerate(profile.processes):
        assert process.dissection is not None
        seen = replace(process.dissection, jpeg_ns=50e3 + 10e3 * k)
        processes.append(replace(process, dissection=seen))
    restless = judged(replace(profile, processes=tuple(processes))).rows[1].end_ms
    quiet = judged(profile).rows[1].end_ms

    assert quiet is not None
    assert restless is not None
    assert restless.value == pytest.approx(0.305 + 0.095)
    assert restless.half_width > 0.02 > quiet.half_width


def test_sensor_values_need_no_decoding() -> None:
    profile = decoding(made_profile(handover=500.0), None)
    worth = judged(profile)

    assert worth.rows[0].end_ms == worth.rows[0].ms
    assert "no picture to decode" in " ".join(worth.notes)


def test_a_profile_without_dissections_has_no_end_to_end() -> None:
    worth = judged(made_profile(), rate_hz=10.0)

    assert worth.end_rows() is None
    assert worth.rows[0].busy is None


def test_at_a_rate_idling_counts_and_what_is_drawn_beyond_it() -> None:
    profile = decoding(made_profile(handover=500.0), 100e3)
    pairs = [(EXITS, name) for name in EXITS] + [(EXITS[-1:], "exit2")]
    profile = replace(profile, energy=made_energy(profile, pairs, 3000.0, 1000.0))
    policy, full = judged(profile, rate_hz=100.0).rows

    # 2 W beyond idling at 1 W, 10 ms a frame; W x ms = mJ.
    for row in (policy, full):
        assert row.end_ms is not None
        assert row.busy is not None
        assert row.busy.value == pytest.approx(row.end_ms.value / 10)
        assert row.frame_mj is not None
        assert row.frame_mj.value == pytest.approx(10 + 2 * row.end_ms.value, rel=1e-3)
        assert row.frame_mj.label == "external"
        assert row.mj is not None
        assert row.mj.value == pytest.approx(3 * row.ms.value, rel=1e-3)
    assert full.frame_less_energy is not None
    assert full.less_energy is not None
    assert 1 < full.frame_less_energy.value < full.less_energy.value


def test_a_rate_that_cannot_be_kept_up_has_no_joules_a_frame() -> None:
    profile = decoding(made_profile(handover=500.0), 100e3)
    pairs = [(EXITS, name) for name in EXITS] + [(EXITS[-1:], "exit2")]
    profile = replace(profile, energy=made_energy(profile, pairs))
    worth = judged(profile, rate_hz=3000.0)

    assert worth.rows[1].busy is not None
    assert worth.rows[1].busy.value > 1
    assert worth.rows[1].frame_mj is None
    assert "too slow for 3000 frames a second: uncut, without exits" in worth.notes


# ---------------------------------------------------------------- by joules


def test_joules_decide_where_they_are_asked_for() -> None:
    profile = made_profile()
    pairs = [(EXITS, name) for name in EXITS] + [(EXITS[-1:], "exit2")]
    profile = replace(profile, energy=made_energy(profile, pairs))
    worth = judged(profile, by="mj", statics={"exit1": GOOD})

    assert worth.by == "mj"
    assert worth.pays
    assert "saving in joules" in worth.sentence
    assert worth.energy_label == "external"


def test_at_a_rate_the_joules_of_a_frame_decide() -> None:
    """At one frame in ten seconds nearly all is idling, and no policy saves that."""
    profile = decoding(made_profile(handover=500.0), 100e3)
    pairs = [(EXITS, name) for name in EXITS] + [(EXITS[-1:], "exit2")]
    profile = replace(profile, energy=made_energy(profile, pairs))

    often, seldom = (judged(profile, by="mj", rate_hz=rate) for rate in (1500.0, 0.1))

    assert often.pays
    assert "joules of a frame" in often.sentence
    assert not seldom.pays
    assert seldom.rows[1].less_energy == often.rows[1].less_energy


def test_joules_that_are_not_there_cannot_decide() -> None:
    with pytest.raises(UsageError, match="does not tell the joules"):
        judged(made_profile(), by="mj")


def test_at_a_pace_a_set_that_had_no_meter_has_no_joules() -> None:
    profile = made_profile()
    pairs = [(EXITS, name) for name in EXITS] + [(EXITS[-1:], "exit2")]
    energy = replace(made_energy(profile, pairs), pace_hz=10.0)
    worth = judged(replace(profile, energy=energy), statics={"exit1": GOOD})

    assert [row.mj is None for row in worth.rows] == [False, False, True]
    assert [row.less_energy is None for row in worth.rows] == [False, False, True]


# ---------------------------------------------------------------- bad input, documents, tables


@pytest.mark.parametrize(
    ("rates", "more", "message"),
    [
        ([0.5, 0.5], {}, "expected 3 shares"),
        ([-0.1, 0.6, 0.5], {}, "expected 3 shares"),
        ([np.nan, 0.5, 0.5], {}, "expected 3 shares"),
        ([0, 0, 0], {}, "expected 3 shares"),
        ([0.5, 0, 0.5], {"kept": ("exit1", "exit2")}, "50.00% leave at 'exit0'"),
        ([0, 0, 1], {"kept": ("exit1",)}, "kept exits"),
        ([0, 0, 1], {"kept": ("exit2", "exit1")}, "kept exits"),
        ([0, 0, 1], {"by": "time"}, "by 'time'"),
        ([0, 0, 1], {"rate_hz": 0.0}, "rate: expected"),
        ([0, 0, 1], {"rate_hz": float("nan")}, "rate: expected"),
    ],
)
def test_what_does_not_fit_is_refused(rates: list[float], more: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        judged(made_profile(), np.array(rates), **more)


@pytest.mark.parametrize("processes", [1, 3])
def test_the_document_is_json_and_says_it_in_its_own_line(processes: int) -> None:
    worth = judged(made_profile(processes=processes), statics={"exit0": GOOD}, rate_hz=5.0)
    again = json.loads(json.dumps(worth.to_document(), allow_nan=False))

    assert again["early_exit_pays"] is False
    assert again["static_exit"] == "exit0"
    assert [row["kind"] for row in again["rows"]] == ["policy", "full", "static"]
    assert (again["rows"][1]["speed_up"]["low"] is None) == (processes == 1)


def test_equal_input_gives_equal_answers() -> None:
    one, two = (judged(made_profile(drift=0.02), rival=rival(90e3)) for _ in range(2))

    assert one == two


def test_tables_have_a_cell_under_each_head() -> None:
    profile = decoding(made_profile(handover=500.0), 100e3)
    pairs = [(EXITS, name) for name in EXITS] + [(EXITS[-1:], "exit2")]
    profile = replace(profile, energy=made_energy(profile, pairs))
    worth = judged(profile, statics={"exit1": GOOD}, rate_hz=50.0, rival=rival(90e3))
    end = worth.end_rows()

    assert end is not None
    for heads, cells in (worth.table_rows(), end):
        assert [row[0] for row in cells] == [
            "this policy",
            "uncut, without exits",
            "exit1 alone",
            "rival small",
        ]
        assert {len(row) for row in cells} == {len(heads)}
        assert all(len(line) <= 100 for line in text_table(heads, cells).splitlines())
    assert "mJ (external)" in worth.table_rows()[0]


def test_names_of_others_can_neither_break_a_line_nor_widen_a_table() -> None:
    other = replace(rival(50e3), name="\x1b[2J\n" + "x" * 300)
    worth = judged(made_profile(), rival=other)

    assert worth.sentence.isprintable()
    assert len(worth.rows[-1].title) <= 26
    assert worth.rows[-1].title.isprintable()
