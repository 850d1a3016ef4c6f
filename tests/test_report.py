"""What people read: the right figures in the right rows, and nothing that does harm."""

from dataclasses import replace

import pytest
from profiles import all_cases, built_energy, built_profile, watched_cases, with_readings
from small import made_profile, made_record

from edgeexit import report
from edgeexit.blocks import DISTURBED, Reason, Verdict
from edgeexit.collect import Progress
from edgeexit.energy import Energy, Trace
from edgeexit.evaluate import Evaluation
from edgeexit.profile import Estimate
from edgeexit.request import Request
from edgeexit.state import Reading
from edgeexit.targets import Target
from edgeexit.tune import tune

PROFILE = built_profile()


def test_columns_stand_below_their_heads() -> None:
    lines = report.text_table(["name", "ms"], [["a", "1.25"], ["longer", "10.5"]]).splitlines()
    assert lines == ["name      ms", "------  ----", "a       1.25", "longer  10.5"]


def test_milliseconds_have_three_digits() -> None:
    assert [report.milliseconds(ms) for ms in (0.0123456, 1.5, 123.4, 1234.5)] == [
        "0.0123",
        "1.50",
        "123",
        "1234",
    ]


# ---------------------------------------------------------------- profiles


def row(text: str, name: str) -> list[str]:
    """The cells of the first line that begins with *name*."""
    line = next(line for line in text.splitlines() if line.startswith(f"{name}  "))
    return line.removeprefix(name).split()


def test_exits_stand_beside_the_network_without_exits() -> None:
    text = report.profile_table(PROFILE)
    assert row(text, "exit0")[0] == "0.330"
    assert row(text, "without exits")[-2:] == ["100.0%", "1.00x"]
    assert row(text, "exit1 alone")[-1] == "1.48x"
    assert max(map(len, text.splitlines())) <= 100
    assert "exit0+exit1" not in text


def test_an_exit_alone_that_is_the_same_files_is_no_row_of_its_own() -> None:
    first, *others = all_cases()
    shared = replace(first, also=((("exit0",), "exit0"),))
    kept = [case for case in others if case.kept != ("exit0",)]
    text = report.profile_table(built_profile(cases=(shared, *kept), rounds=2))
    assert "exit0 alone" not in text
    assert "exit1 alone" in text


def test_every_set_of_exits_is_shown_on_request() -> None:
    text = report.profile_table(PROFILE, everything=True)
    assert len([line for line in text.splitlines() if line.startswith("exit0+exit1+exit2")]) == 3


def test_parts_and_what_opening_costs_have_a_row_each() -> None:
    text = report.profile_table(made_profile(handover=700.0))
    tail = text[text.index("segment of") :]
    assert row(tail, "exit0") == ["0.0980", "0.00430", "0.000700", "1.00", "0.100", "0.0"]
    assert "input stage 0.00200 ms" in tail


def test_the_verdict_is_told_with_its_reasons_and_what_it_did_not_see() -> None:
    reasons = (Reason(kind="clock", text="clock fell from 1800 to 1000 MHz"),)
    disturbed = replace(PROFILE, verdict=Verdict(status=DISTURBED, reasons=reasons))
    text = report.profile_table(disturbed)
    assert "verdict: DISTURBED" in text
    assert "  - clock fell from 1800 to 1000 MHz [clock]" in text
    assert "does not tell" not in text
    assert "this machine does not tell its clock, temperature" in report.profile_table(
        made_profile()
    )


def test_a_line_says_what_the_machine_is_and_how_it_fared() -> None:
    hot = with_readings(
        PROFILE, lambda when, r: replace(r, temperature_c=50 + 20 * when, throttled=4)
    )
    (line,) = [x for x in report.profile_table(hot).splitlines() if x.startswith("machine:")]
    for part in ("Raspberry Pi 4", "clock 1800 MHz", "governor ondemand", "50 .. 70 °C"):
        assert part in line
    assert "throttled" in report.profile_table(hot)


def test_joules_carry_their_label_and_boundary() -> None:
    text = report.profile_table(built_profile(cases=watched_cases(), energy=built_energy(2.0)))
    assert "mJ gross" in text
    assert row(text, "exit0")[-3] == "2"
    assert "joules: external, by INA219, 20 values a second" in text
    assert "boundary: the board" in text
    assert max(map(len, text.splitlines())) <= 100


def test_joules_of_a_meter_that_says_zero_have_no_width() -> None:
    built = built_energy(2.0)
    trace = Trace(built.trace.at_ns, 0 * built.trace.values, False)
    dead = Energy(info=built.info, trace=trace, windows=built.windows)
    text = report.profile_table(built_profile(cases=watched_cases(), energy=dead))
    assert row(text, "exit0")[-3:] == ["0", "-", "0"]


def test_other_peoples_names_do_no_harm() -> None:
    exits = ("\x1b[2Jlong" * 30, "b\nverdict: CLEAN", "c")
    profile = built_profile(
        exits=exits,
        rounds=2,
        bundle_name="x\ny" * 200,
        runtime="r" * 300,
        machine={"board": "\x1b[31m" * 100},
    )
    text = report.profile_table(profile, everything=True)
    assert text.replace("\n", "").isprintable()
    assert "\nverdict: CLEAN\n" not in text


def test_one_process_is_reported_without_a_width() -> None:
    text = report.profile_table(built_profile(cases=watched_cases(), processes=1))
    assert "inf%" not in text
    assert "nan" not in text


@pytest.mark.parametrize(
    ("throttled", "said"), [(0, "not throttled"), (0x50000, "not throttled"), (4, "THROTTLED")]
)
def test_the_live_line_says_how_it_stands(throttled: int, said: str) -> None:
    widest = Estimate(value=3.41e6, low=3.39e6, high=3.43e6)
    progress = Progress(
        what="process 3",
        done=0.4,
        left_s=40.2,
        blocks=12,
        wanted=40,
        reading=Reading(at_ns=0, temperature_c=54.2, throttled=throttled),
        exits=(("exit1", Estimate(value=1e6, low=1e6, high=1e6)), ("exit2", widest)),
    )
    line = report.live_line(progress)
    assert line == f"exit2: 3.41 ms ± 0.6 %, 12/40 blocks, 54 °C, {said}, ETA 40 s"
    early = replace(progress, exits=None, reading=None)
    assert report.live_line(early) == "process 3, 12/40 blocks, ETA 40 s"
    later = replace(early, blocks=41)
    assert report.live_line(later) == "process 3, 41 blocks, ETA 40 s"


# ---------------------------------------------------------------- policies and evaluations


ASKED = Request(target=Target(max_accuracy_drop=0.01))


def test_a_policy_shows_its_promise_and_its_verdict() -> None:
    found = tune(made_record(), made_profile(), ASKED)
    text = " ".join(report.policy_table(found.policy, found.worth).split())
    assert "Early exit pays here" in text
    assert "Certified with 95% confidence on 2000 samples" in text
    assert "is at most 1.00%" in text
    dear = tune(
        made_record(skill=(0.0, 0.0, 7.0)),
        made_profile(head=90e3),
        ASKED,
    )
    assert "does not pay here" in " ".join(report.policy_table(dear.policy, dear.worth).split())


def test_an_average_is_not_called_certified_and_no_figure_is_rounded_to_another() -> None:
    averaged = tune(made_record(), made_profile(), Request(target=ASKED.target, method="crc"))
    text = " ".join(report.policy_table(averaged.policy, averaged.worth).split())
    assert "Kept on average over draws of 2000 samples, with no confidence attached" in text
    assert "Certified" not in text
    target = Target(max_accuracy_drop=0.0125, latency_budget_ms=8.0, confidence=0.999)
    both = tune(made_record(), made_profile(), Request(target=target, method="crc"))
    text = " ".join(report.policy_table(both.policy, both.worth).split())
    assert (
        "Certified with 99.9% confidence on 2000 samples: the mean latency is at most 8 ms" in text
    )
    assert "at most 1.25% of the answers become wrong against the full int8 network" in text


def test_thresholds_of_classes_are_not_shown_as_one_for_all() -> None:
    found = tune(made_record(), made_profile(), Request(target=ASKED.target, method="class"))
    assert "class_offsets" in report.policy_table(found.policy, found.worth)


def test_a_static_network_to_ship_is_said_to_have_no_certificate() -> None:
    """One early exit alone was only measured; the full network loses nothing against itself."""
    asked = Request(target=Target(max_accuracy_drop=0.3))
    static = tune(made_record(skill=(0.0, 9.0, 9.0)), made_profile(head=40e3), asked)
    assert (static.worth.ship, static.worth.static_exit) == ("static", "exit1")
    said = report.uncertified(static.policy, static.worth)
    assert said is not None
    right = static.certificate.correct[:, 1].mean()
    assert said.startswith(
        "no certificate: accuracy of exit 'exit1' alone as measured on 2000 certificate samples: "
        f"{right:.2%} ("
    )
    assert said[1:] in " ".join(report.policy_table(static.policy, static.worth).split())

    full = tune(made_record(skill=(0.0, 0.0, 7.0)), made_profile(head=90e3), ASKED)
    assert (full.worth.ship, full.worth.static_exit) == ("static", "exit2")
    early = tune(made_record(), made_profile(), ASKED)
    for found in (full, early):
        assert report.uncertified(found.policy, found.worth) is None
        assert "o certificate" not in report.policy_table(found.policy, found.worth)
    other = tune(
        *(made_record(skill=(0.0, 0.0, 7.0)), made_profile(head=90e3), ASKED),
        reference=made_record(skill=(0.0, 0.0, 7.0)),
    )
    assert "accuracy of exit 'exit2' alone" in str(report.uncertified(other.policy, other.worth))


def test_an_evaluation_names_the_worst_confusion() -> None:
    evaluation = Evaluation(
        samples=10,
        correct=8,
        interval=(0.4, 0.97),
        per_class=(0.75, 5 / 6, None),
        confusion=((3, 1, 0), (1, 5, 0), (0, 0, 0)),
        exits=("exit0", "exit1"),
        exit_rates=(0.6, 0.4),
        mean_ms=0.2,
        p95_ms=0.3,
        class_names=("cat", "dog", "owl"),
        policy="none",
        data="pets:report",
        bundle_digest="",
    )
    text = report.evaluation_table(evaluation)
    assert "accuracy  80.00%" in text
    assert "dog (1)" in text
    assert "owl          0" in text


def test_a_paced_report_says_what_share_of_the_boards_energy_the_exits_save() -> None:
    energy = built_energy(2.0)
    steady = built_profile(cases=watched_cases(), energy=energy)
    assert "saves" not in report.profile_table(steady)
    paced = replace(steady, energy=replace(energy, pace_hz=5.0))
    text = " ".join(report.profile_table(paced).split())
    assert "leaving at exit0 saves" in text
    assert "of the board's energy at 5 inputs a second" in text
    partial = replace(energy, pace_hz=5.0, info=replace(energy.info, label="partial"))
    text = report.profile_table(replace(steady, energy=partial))
    assert "the board's" not in text
    assert "of the energy (partial) at 5" in " ".join(text.split())


def test_a_meter_that_warns_is_quoted() -> None:
    energy = built_energy(2.0)
    info = replace(energy.info, details={"warning": "the driver believes in 0.01 Ohm"})
    profile = built_profile(cases=watched_cases(), energy=replace(energy, info=info))
    assert "WARNING: the driver believes in 0.01 Ohm" in report.profile_table(profile)
