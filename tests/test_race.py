"""Racing runners: every sample is answered by all, and ratios are taken pass by pass."""

from edgeexit.race import Race, race


class Counter:
    """Stands where a Runner does and counts its calls."""

    def __init__(self) -> None:
        self.seen: list[int] = []

    def __call__(self, sample: int) -> None:
        self.seen.append(sample)


def test_every_runner_answers_every_sample_in_every_pass() -> None:
    runners = {"a": Counter(), "b": Counter()}
    steps: list[int] = []

    found = race(runners, list(range(25)), passes=3, stretch=10, on_step=steps.append)  # type: ignore[arg-type,dict-item]

    for runner in runners.values():
        assert sorted(runner.seen[10:]) == sorted(list(range(25)) * 3)
    assert sum(steps) == 25 * 2 * 3
    assert {name: len(values) for name, values in found.mean_ns.items()} == {"a": 3, "b": 3}


def test_a_ratio_is_the_median_of_ratios_within_passes() -> None:
    # Pass two ran on a machine four times slower: ratios within passes do not see that.
    found = Race(mean_ns={"ours": (1e6, 4e6, 1e6), "rival": (2e6, 8e6, 3e6)})

    assert found.speed_up("ours", "rival") == 2.0
    assert found.latency_ms("ours") == 1.0
