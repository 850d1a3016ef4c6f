from dataclasses import replace

from small import made_policy, made_profile, made_record

from edgeexit import report
from edgeexit.evaluate import Evaluation
from edgeexit.tune import choose


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


def test_a_profile_lists_every_case_as_a_share_of_the_full_network() -> None:
    text = report.profile_table(made_profile())
    assert len([line for line in text.splitlines() if line.startswith("exit")]) == 12
    assert "exit0+exit1+exit2     exit0      0.105  0.105 .. 0.105    34.4%" in text


def test_a_policy_says_whether_it_is_worth_it() -> None:
    policy = made_policy()
    text = report.policy_table(policy)
    assert "Early exit is worth it here" in text
    assert "Checked on them:" in text
    assert "guarantee" not in text
    dear = choose(made_record(skill=(0.0, 0.0, 7.0)), made_profile(head=90e3), 0.01)
    assert "not worth it here: the full network" in report.policy_table(dear)
    beaten = replace(
        policy,
        expected={**policy.expected, "best_static_exit": "exit1", "speed_up_static": 0.9},
    )
    assert "ship exit 'exit1' alone" in report.verdict(beaten)


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
