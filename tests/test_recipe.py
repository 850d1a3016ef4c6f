"""Recipes: what is written is what is read, and nothing else passes."""

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("torch")

from edgeexit.errors import BadFile
from edgeexit.files import Table
from edgeexit.host.recipe import TrainingPart, read_recipe, training_part

pytestmark = pytest.mark.host

VALUES: dict[str, st.SearchStrategy[Any]] = {
    "epochs": st.integers(1, 100_000),
    "learning_rate": st.floats(1e-9, 100),
    "regime": st.text(max_size=8),
    "phase_shares": st.lists(st.floats(0.1, 1000), max_size=4),
    "patience": st.integers(0, 100_000),
    "batch": st.integers(2, 65_536),
    "seed": st.integers(0, 2**31 - 1),
    "momentum": st.floats(0, 0.9999),
    "weight_decay": st.floats(0, 1),
    "schedule": st.text(max_size=8),
    "warmup": st.floats(0, 0.9),
    "drops": st.lists(st.floats(0.01, 0.99), max_size=4, unique=True).map(sorted),
    "label_smoothing": st.floats(0, 0.9),
    "exit_weights": st.lists(st.floats(0.1, 1000), max_size=4),
    "ramp": st.booleans(),
    "equilibrium": st.booleans(),
    "distillation": st.floats(0, 100),
    "distillation_temperature": st.floats(0.01, 100),
    "head_init": st.text(max_size=8),
    "precision": st.text(max_size=8),
}
REQUIRED = {"epochs": 3, "learning_rate": 0.1}


def test_every_key_is_tried() -> None:
    assert set(VALUES) == {field.name for field in fields(TrainingPart)}


@settings(max_examples=25, deadline=None)
@given(values=st.fixed_dictionaries({}, optional=VALUES))
def test_what_is_written_is_what_is_read(values: dict[str, Any]) -> None:
    part = training_part(Table({**REQUIRED, **values}, "r.toml: training"))

    plain = TrainingPart(**REQUIRED)
    for key in VALUES:
        wanted = {**REQUIRED, **values}.get(key, getattr(plain, key))
        found = getattr(part, key)
        assert found == (tuple(wanted) if isinstance(wanted, list) else wanted)


@settings(max_examples=25, deadline=None)
@given(values=st.fixed_dictionaries({}, optional=VALUES))
def test_a_part_written_out_is_the_same_part(values: dict[str, Any]) -> None:
    part = training_part(Table({**REQUIRED, **values}, "r"))
    document = json.loads(json.dumps(part.to_document()))
    assert training_part(Table(document, "r")) == part
    # What came with a later version leaves the digests of earlier recipes as they were.
    for key in ("schedule", "drops", "precision"):
        assert (key in document) == (getattr(part, key) != getattr(TrainingPart(**REQUIRED), key))


@pytest.mark.parametrize("drops", [[0.0], [1.0], [0.6, 0.5], [0.5, 0.5], [2.0], ["half"]])
def test_drops_ascend_within_the_training(drops: list[Any]) -> None:
    with pytest.raises(BadFile, match=r"r\.toml: training\.drops"):
        training_part(Table({**REQUIRED, "drops": drops}, "r.toml: training"))


@settings(max_examples=25, deadline=None)
@given(key=st.sampled_from(sorted(VALUES)), value=st.sampled_from([None, {}, "1e400", -3, 1e12]))
def test_nonsense_is_refused_at_its_place(key: str, value: Any) -> None:
    if key in ("regime", "schedule", "head_init", "precision") and isinstance(value, str):
        return  # names are looked up where they are used
    with pytest.raises(BadFile, match=rf"r\.toml: training\.{key}: "):
        training_part(Table({**REQUIRED, key: value}, "r.toml: training"))


def test_a_recipe_from_a_checkpoint_leaves_the_rest_to_it(tmp_path: Path) -> None:
    path = tmp_path / "r.toml"
    path.write_text(
        'format = 1\n[model]\ncheckpoint = "m.pt"\n[training]\nepochs = 1\nlearning_rate = 0.1\n'
    )

    recipe = read_recipe(path)

    assert recipe.model == Path("m.pt")
    assert recipe.augmentation is None
    assert recipe.data.path is None
    assert recipe.data.holdout is None


def test_layout_and_comments_leave_the_digest(tmp_path: Path) -> None:
    shipped = Path(__file__).parent.parent / "examples" / "fashion.toml"
    other = tmp_path / "same.toml"
    lines = [line.partition("  # ")[0] for line in shipped.read_text().splitlines()]
    other.write_text("\n\n".join(line for line in lines if not line.startswith("#")))

    assert read_recipe(other).digest == read_recipe(shipped).digest
    other.write_text(other.read_text().replace("seed = 1", "seed = 2"))
    assert read_recipe(other).digest != read_recipe(shipped).digest
