"""The bench of ready files in small: MLPerf Tiny's networks with exits put on."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "bench"))
import ready as bench

pytestmark = pytest.mark.skipif(
    not (bench.DATA / "mlperf_tiny").is_dir(), reason="needs ../shared/data"
)


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[pytest.mark.slow] * n.endswith("float")) for n in bench.FILES],
)
def test_a_published_file_cut_at_inner_maps_answers_and_knows_what_it_did(name, tmp_path) -> None:
    found = bench.measure(name, tmp_path, 500)

    assert found["bytes_that_differ_from_uncut"] == 0
    assert found["answers_that_differ_from_file"] == 0
    assert found["by_run"] == found["final"]
    assert abs(found["final"] - found["published"]) < 3  # 500 samples: 1.5 points are one sigma
    chance = 100 / len(bench.FILES[name].class_names)
    first, second = found["exits"].values()
    assert 2 * chance < first < second < found["final"]
