"""Is it worth it: all steps on tiny networks, splits, and what the page says of made-up numbers."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
BENCH = Path(__file__).parents[1] / "bench"
sys.path.insert(0, str(BENCH))

from cifar import Cifar  # noqa: E402
from common import in_processes  # noqa: E402
from seeds import contest, kinds, steps, worth  # noqa: E402
from small import made_profile  # noqa: E402
from test_seeds_steps import data, listed  # noqa: E402, F401

from edgeexit import instrument  # noqa: E402
from edgeexit.bundle import Bundle, load_bundle  # noqa: E402
from edgeexit.errors import EdgeExitError  # noqa: E402
from edgeexit.files import read_json, read_npz  # noqa: E402
from edgeexit.host.zoo import resnet  # noqa: E402
from edgeexit.policy import Policy  # noqa: E402
from edgeexit.profile import Profile  # noqa: E402
from edgeexit.runtime import Runner  # noqa: E402

pytestmark = pytest.mark.host

TINY = worth.Setting(
    depth=8,
    pictures=160,
    ranges=20,
    test=300,
    at=("blocks.0",),
    widths=((8,),),
    epochs=1,
    rivals=(),
    processes=1,
    passes=1,
    asks=(
        contest.Ask(key="whole", reference="resnet8", level=0.5, ratio=3.0, goal=3.0),
        contest.Ask(key="small", reference="resnet8", level=0.01, ratio=1.3, goal=1.5),
        contest.Ask(key="static", reference=contest.STATIC, level=0.5, ratio=1.3, goal=1.5),
        contest.Ask(key="own", reference="", level=0.5),
    ),
)
PRUNING = """
[data]
holdout = 40
[prune]
selector = "blocks"
block_criterion = "l2"
target = { macs = 0.9 }
"""
TRAINING = """
[data]
holdout = 40
[augmentation]
flip = true
[training]
batch = 32
learning_rate = 0.05
seed = 1
"""


@pytest.fixture(scope="module")
def ran(
    data: Path,  # noqa: F811
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[steps.Table, Path, dict[str, Any]]:
    """The table of tiny networks, its work folder and its document; nothing is timed but a race."""

    def pretrained(cifar: Cifar, depth: int) -> tuple[Any, dict[str, Any]]:
        torch.manual_seed(depth)
        kwargs = {"stem": [8], "widths": [8, 8], "blocks": [2, 2], "exits": []}
        return resnet(**kwargs).eval(), kwargs

    def measure(
        bundle: Bundle, device: str, *, save: Callable[[Profile], object], **more: Any
    ) -> Profile:
        made = made_profile(
            [1e5] * len(bundle.exits), exits=bundle.exits, bundle_digest=bundle.digest
        )
        save(made)
        return made

    folder = tmp_path_factory.mktemp("worth")
    with pytest.MonkeyPatch.context() as patch:
        for name, text in (("PRUNE", PRUNING), ("TRAIN", TRAINING)):
            (folder / name).write_text(text)
            patch.setattr(worth, name, folder / name)
        patch.setattr(Cifar, "pretrained", pretrained)
        patch.setattr(instrument, "measure", measure)
        table = worth.table(TINY, data=data, listed=listed(data))
        return table, folder / "work", steps.run_table(table, folder / "work")


def uses(work: Path) -> list[int]:
    splits = read_json(work / worth.LEDGER).values["splits"]
    assert len(splits) == 1  # one certificate, whatever it was asked
    return [entry["use"] for entry in next(iter(splits.values()))]


def test_every_network_and_policy_stands_beside_the_others(
    ran: tuple[steps.Table, Path, dict[str, Any]],
) -> None:
    table, work, document = ran
    (run,) = document["runs"]
    exits = load_bundle(work / "0/trained-int8" / kinds.BUNDLE).exits
    assert [one["key"] for one in run["networks"]] == ["resnet8", *exits]
    rows = {one["key"]: one for one in run["policies"]}
    assert rows["whole"]["certified"]
    assert not rows["whole-uncertified"]["certified"]
    # Too few samples for so small a drop: refused, before a use is counted.
    assert "cannot certify" in rows["small"]["refused"]
    assert rows["small"]["use"] is None
    for one in rows.values():
        if one["refused"] is None:
            assert set(one["beside"]) == {"resnet8", *exits}
            assert one["ms"]["processes"] == TINY.processes
    for one, k in zip(run["networks"][1:], range(len(exits)), strict=True):
        assert one["accuracy"] == pytest.approx(
            document["steps"]["0/trained-int8"]["result"]["accuracy"][k]
        )
    counted = uses(work)
    assert counted == list(range(1, len(counted) + 1))
    again = steps.run_table(table, work)
    assert again["runs"] == document["runs"]
    assert uses(work) == counted


def test_what_is_told_of_a_policy_is_what_its_bundle_does(
    ran: tuple[steps.Table, Path, dict[str, Any]],
) -> None:
    _, work, document = ran
    (run,) = document["runs"]
    arrays = read_npz(work / "data/test.npz")
    rows = contest.parts_of(arrays.get("ids").tolist())[contest.REPORT]
    labels = arrays.get("labels")[rows]
    for one in run["policies"]:
        if one["refused"] is not None:
            continue
        folder = work / "0/tuned" / one["key"]
        policy = Policy.load(folder / worth.POLICY)
        is_cut = policy.kept != policy.exits
        path = folder / worth.CUT if is_cut else work / "0/trained-int8" / kinds.BUNDLE
        assert list(policy.kept) == one["kept"]
        runner = Runner(load_bundle(path), policy=policy)
        found = [runner(sample) for sample in arrays.get("samples")[rows]]
        right = np.array([a.label for a in found]) == labels
        assert contest.class_mean(right, labels) == pytest.approx(one["report"])
        names = [answer.exit_name for answer in found]
        shares = [names.count(name) / len(names) for name in policy.exits]
        assert shares == pytest.approx(one["rates"])


def test_half_of_the_pictures_report_and_none_stands_twice() -> None:
    ids = [f"test-{k:05d}" for k in range(9_806)]
    parts = contest.parts_of(ids)
    assert {name: len(rows) for name, rows in parts.items()} == {
        "tuning": 1401,
        "certificate": 3502,
        "report": 4903,
    }
    assert sorted(np.concatenate(list(parts.values())).tolist()) == list(range(9_806))
    backwards = contest.parts_of(ids[::-1])
    assert {ids[k] for k in parts["tuning"]} == {ids[::-1][k] for k in backwards["tuning"]}


def test_the_best_static_point_is_the_cheapest_that_is_as_good() -> None:
    costs = [1.0, 2.0, 3.0]
    assert contest.best_alone([0.80, 0.898, 0.90], costs) == 1
    assert contest.best_alone([0.80, 0.890, 0.90], costs) == 2
    assert contest.best_alone([0.80, 0.890, 0.90], costs, 0.79) == 0
    assert contest.best_alone([0.80, 0.890, 0.90], costs, 0.95) == 2


def test_leads_are_paired_means_over_classes() -> None:
    labels = np.array([0, 0, 0, 1])
    right = {"a": np.array([True, True, False, True]), "b": np.array([False, True, False, True])}
    answers = contest.Answers(right, labels, {"report": np.arange(4)})
    found = answers.lead("a", "b")
    assert found["lead"] == pytest.approx((1 / 3 + 0) / 2)
    assert found["error"] == pytest.approx(np.sqrt(np.var([1, 0, 0], ddof=1) / 3) / 2)
    assert answers.accuracy("a") == pytest.approx((2 / 3 + 1) / 2)


# ---------------------------------------------------------------- the page

ASKS = worth.SMALL.asks
NETWORKS = ("resnet56", "resnet20", "exit0", "exit1")


def figure(value: float) -> dict[str, float]:
    return {"median": value, "min": 0.9 * value, "max": 1.1 * value, "processes": 10}


def made_up(faster: float, lead: float, final: float, refused: Sequence[str]) -> dict[str, Any]:
    """A result file whose policies are all so much faster and so much more accurate."""
    networks = [
        {
            "key": key,
            "is_exit": key.startswith("exit"),
            "macs": 1e7,
            "parameters": None if key.startswith("exit") else 1000,
            "bytes": 2048,
            "profile_ms": 1.0,
            "accuracy": final,
            "report": 0.925,
            "choose": 0.925,
            "ms": figure(1.0),
        }
        for key in NETWORKS
    ]
    policies = []
    for ask in ASKS:
        for is_certified in (True, False):
            row: dict[str, Any] = {
                "key": ask.key if is_certified else f"{ask.key}-uncertified",
                "ask": ask.key,
                "level": ask.level,
                "certified": is_certified,
                "samples": 3502,
                "use": 1 if is_certified else None,
                "refused": "too few" if is_certified and ask.key in refused else None,
                "against": "exit1" if ask.reference == contest.STATIC else "",
            }
            if row["refused"] is None:
                beside = {"lead": lead, "error": 0.002, "faster": figure(faster)}
                row |= {
                    "kept": ["exit0", "exit1"],
                    "rates": [0.7, 0.3],
                    "macs": 5e6,
                    "report": 0.92,
                    "ms": figure(0.5),
                    "expected_ms": 0.51,
                    "best_static": "exit1",
                    "beside": dict.fromkeys(NETWORKS, beside),
                }
            policies.append(row)
    run = {
        "parts": {"tuning": 1401, "certificate": 3502, "report": 4903},
        "networks": networks,
        "parameters": 1000,
        "bytes": 4096,
        "policies": policies,
        "pruned": {"macs": [2e7, 1e7], "parameters": [2000, 1000]},
        "verdicts": [{"measured": {"verdict": "CLEAN"}}],
        "bars": contest.bars(ASKS, networks, policies),
    }
    step = {"wall_s": 7200.0}
    return {
        "setting": asdict(worth.SMALL),
        "full_epochs": worth.FULL.epochs,
        "splits": {"training": {"pictures": 48129}, "test": {"pictures": 9806}},
        "wall_s": 9000.0,
        "runs": [run],
        "steps": {"0/trained": step},
    }


def test_the_page_says_what_was_reached() -> None:
    text = worth.page(made_up(3.2, -0.001, 0.925, refused=("small",)))
    assert "Every bar is reached." in text
    assert "| 92.4% | 92.50% | yes |" in text
    beside = "3.20x (2.88 .. 3.52) faster than ResNet-56, -0.10 ± 0.20 points on `report`"
    assert f"{beside}; certified | yes |" in text
    assert (
        "| yes, the goal too, without a certificate (not certifiable with 3,502 samples) |" in text
    )
    assert (
        "- Not certifiable with 3,502 samples (use 1): 0.3 points below ResNet-20. too few." in text
    )
    epochs = worth.SMALL.epochs
    assert f"{epochs} epochs of `cifar-train.toml` on 48,129 pictures" in text
    assert f"trains 200 epochs instead of {epochs}" in text
    assert "120 minutes of wall time, all steps 2.5 hours" in text
    assert "0.3 points below the best static point (`exit1` alone) | yes, use 1 |" in text
    assert "Profiles behind the milliseconds: 1 clean." in text


def test_the_page_says_what_is_missing() -> None:
    text = worth.page(made_up(1.25, -0.005, 0.91, refused=()))
    assert "0 of 4 bars are reached, 4 not." in text
    assert "| no: 1.40 points short |" in text
    assert "| no: 1.75x short |" in text  # half a point lost of ResNet-56's one
    assert "| no: 0.05x short, 0.20 points too many lost |" in text
    nothing = worth.page(made_up(1.25, -0.005, 0.91, refused=[ask.key for ask in ASKS]))
    assert "(not certifiable with 3,502 samples) |" in nothing


def test_the_page_names_policies_that_reach_every_ratio() -> None:
    found = made_up(3.2, -0.001, 0.925, refused=("small",))
    policies = found["runs"][0]["policies"]
    text = worth.page(found)
    assert f"Every ratio by one policy, {len(policies) - 1} of {len(policies) - 1};" in text

    for one in policies[:-1]:
        if one["refused"] is None:
            one["beside"] = one["beside"] | {
                "resnet56": {**one["beside"]["resnet56"], "lead": -0.02}
            }
    text = worth.page(found)
    assert f"Every ratio by one policy, 1 of {len(policies) - 1};" in text
    assert "below its own final exit, not certified: 3.20x (2.88 .. 3.52) faster than Res" in text

    policies[-1]["refused"] = "too few"
    assert "No policy reaches every ratio by itself." in worth.page(found)


def test_the_figure_shows_networks_exits_and_policies(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    found = made_up(3.2, -0.001, 0.925, refused=("small",))
    worth.draw(found, tmp_path)
    (drawn,) = tmp_path.iterdir()
    assert drawn.name in worth.page(found)
    first = drawn.read_bytes()
    for name in (b"exits alone", b"policies, certified", b"policies, not certified", b"ResNet-20"):
        assert name in first
    worth.draw(found, tmp_path)
    assert drawn.read_bytes() == first


def test_what_a_process_of_the_race_refuses_is_one_line(tmp_path: Path) -> None:
    plan = tmp_path / "plan.json"
    with pytest.raises(EdgeExitError, match=r"process 1/2: .*plan\.json: no such file") as found:
        in_processes(2, "seeds/worth.py", str(plan))
    assert found.value.exit_code == 2
