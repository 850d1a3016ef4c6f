"""Before and after: ratios out of one race, and the static rival is never hidden."""

from dataclasses import replace

import pytest

pytestmark = pytest.mark.host
torch = pytest.importorskip("torch")
pytest.importorskip("litert_torch")

from edgeexit.host import comparison as room  # noqa: E402
from edgeexit.host import zoo  # noqa: E402
from edgeexit.host.assess import Assessment  # noqa: E402
from edgeexit.host.comparison import comparison  # noqa: E402
from tests import host_nets, trained  # noqa: E402


@pytest.fixture(scope="module")
def nets(tmp_path_factory) -> tuple[Assessment, Assessment]:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    large = zoo.resnet(**{**trained.KWARGS, "blocks": [2, 2], "widths": [64, 64], "stem": [64]})
    large = host_nets.settled(large, trained.reals())
    folder = tmp_path_factory.mktemp("comparison") / "large"
    return trained.assess_here(large, folder), trained.assessed(tmp_path_factory)


def graded(net: Assessment, *accuracies: float) -> Assessment:
    pairs = zip(net.rows, accuracies, strict=True)
    return replace(net, rows=tuple(replace(row, int8_accuracy=value) for row, value in pairs))


def test_a_much_smaller_network_is_faster_at_every_exit(nets) -> None:
    before, after = graded(nets[0], 0.5, 0.9), graded(nets[1], 0.8, 0.9)
    heard: list[float] = []
    found = comparison(before, after, seconds=1.0, on_step=heard.append)
    assert list(found.speed_ups) == ["exit0", "exit1"]
    for value, low, high in found.speed_ups.values():
        assert low <= value <= high
        assert value > 1.5
    assert found.rival is None  # the final exit alone is as good, and slower
    assert heard == sorted(heard)
    assert heard[-1] == 1.0
    text = found.text()
    assert "no single exit of the network before" in text
    assert f"{found.speed_ups['exit1'][0]:.2f}x" in text
    document = found.to_document()
    assert document["static_rival"] is None
    assert document["speed_ups"]["exit0"]["value"] == found.speed_ups["exit0"][0]


def test_a_static_exit_that_is_as_good_and_faster_is_said(nets) -> None:
    small, large = nets[1], nets[0]
    found = comparison(graded(small, 0.896, 0.9), graded(large, 0.7, 0.9), seconds=1.0)
    assert found.rival is not None
    assert found.rival.exit == "exit0"
    assert found.rival.int8_accuracy == 0.896
    assert found.rival.speed_up > 1.5
    assert found.speed_ups["exit1"][0] < 1
    assert "A static exit0 of the network before, alone, is faster: 89.60%" in found.text()
    assert found.to_document()["static_rival"]["exit"] == "exit0"


def test_a_rival_may_be_half_a_point_worse_and_no_more(nets) -> None:
    before, after = nets
    best = graded(after, 0.7, 0.9)
    assert room._candidate(graded(before, 0.894, 0.9), best).name == "exit1"
    assert room._candidate(graded(before, 0.896, 0.9), best).name == "exit0"
    assert room._candidate(graded(before, 0.8, 0.89), best) is None


def test_without_a_race_nothing_is_claimed_about_speed(nets) -> None:
    found = comparison(*nets, is_measured=False)
    text = found.text()
    assert found.speed_ups == {}
    assert "rival" not in text
    assert "all exits: " in text
    # An exit that only one of the two has is shown all the same.
    shorter = replace(nets[1], rows=nets[1].rows[:1])
    lines = comparison(nets[0], shorter, is_measured=False).text().splitlines()
    assert sum(" before " in line or " after " in line for line in lines) == 3
