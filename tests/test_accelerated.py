"""
Trainings where there is a GPU: what is trained lies there, all else and all files on the processor.

No GPU is needed: torch's meta device stands in for one. It has shapes and no numbers, so numbers
read from there are made up, but what lies there may as little meet what lies here as on a GPU.
"""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_leaves  # noqa: E402

from edgeexit.errors import UsageError  # noqa: E402
from edgeexit.host import fit as fitting  # noqa: E402
from edgeexit.host import train as training  # noqa: E402
from edgeexit.host.checkpoint import load_checkpoint  # noqa: E402
from edgeexit.host.fit import Fit, accelerated  # noqa: E402
from edgeexit.host.prune import engine  # noqa: E402
from edgeexit.host.prune.composition import Target  # noqa: E402
from edgeexit.host.prune.engine import Progress, prune  # noqa: E402
from edgeexit.host.prune.methods import METHODS  # noqa: E402
from edgeexit.host.prune.removal import Removal  # noqa: E402
from edgeexit.host.statefile import state_bytes  # noqa: E402
from edgeexit.host.train import Choices, train  # noqa: E402
from tests import prune_nets  # noqa: E402
from tests.prune_nets import PART  # noqa: E402

# torch warns that numbers are lost there; that is what it is used for.
pytestmark = [pytest.mark.host, pytest.mark.filterwarnings("ignore:.*which is a no-op")]

aten = torch.ops.aten
AWAY = torch.device("meta")


class Pretended(TorchDispatchMode):
    """The meta device with numbers, made up when they are read."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        is_read = func in (aten._local_scalar_dense.default, aten.item.default)
        if is_read and args[0].device == AWAY:
            return {torch.bool: True, torch.float32: 1.0, torch.float64: 1.0}.get(args[0].dtype, 1)
        is_brought = func is aten._to_copy.default and kwargs.get("device") == torch.device("cpu")
        if is_brought and args[0].device == AWAY:
            made = torch.arange(args[0].numel()).reshape(args[0].shape) % 4
            made = (made + 1) / 50 if args[0].is_floating_point() else made
            return made.to(kwargs.get("dtype") or args[0].dtype)
        places = {x.device.type for x in tensors if x.ndim}
        # As on a GPU, copies go across, and indices may lie on the processor.
        if func not in (aten.copy_.default, aten.index.Tensor) and len(places) > 1:
            raise RuntimeError(f"{func}: expected all tensors to be on the same device")
        return func(*args, **kwargs)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with the pretended GPU."""
    torch.set_num_threads(1)
    monkeypatch.setattr(fitting, "_gpu", lambda: AWAY)

    @contextmanager
    def pretended(model: nn.Module) -> Iterator[None]:
        # Not elsewhere: a mode makes the analysis of networks slow.
        with Pretended(), accelerated(model):
            yield

    for module in (training, engine):
        monkeypatch.setattr(module, "accelerated", pretended)


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prune_nets.save_samples(tmp_path_factory.mktemp("away") / "samples.npz", 500)


@pytest.fixture
def dense(samples: Path, tmp_path: Path) -> Path:
    return prune_nets.save_net(tmp_path / "net.pt", samples, prune_nets.new_net())


def places(value: Any) -> set[str]:
    return {x.device.type for x in tree_leaves(value) if isinstance(x, torch.Tensor)}


def watch_epochs(monkeypatch: pytest.MonkeyPatch) -> list[tuple[set[str], set[str]]]:
    """Where weights lay, and where the momentum, at the end of each epoch."""
    seen: list[tuple[set[str], set[str]]] = []
    run = Fit.run_epoch

    def epoch(self: Fit, *args: Any) -> None:
        optimizer = self.optimizer
        run(self, *args)
        seen.append((places(self.model.state_dict()), places(optimizer.state_dict())))

    monkeypatch.setattr(Fit, "run_epoch", epoch)
    return seen


def test_what_meets_what_lies_elsewhere_is_refused() -> None:
    """The pretended GPU is as strict as one: otherwise nothing here would be shown."""
    with Pretended():
        with pytest.raises(RuntimeError, match="same device"):
            torch.zeros(2, device=AWAY).add(torch.zeros(2))
        assert torch.zeros(2, device=AWAY).cpu().tolist() == pytest.approx([0.02, 0.04])


@pytest.mark.parametrize("regime", ["joint", "mixed", "frozen", "prototypes"])
def test_a_training_lies_on_the_gpu_and_its_files_do_not(
    regime: str, gpu: None, dense: Path, samples: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = watch_epochs(monkeypatch)
    state = dense.with_name("out.pt.state")
    kept: list[set[str]] = []

    def look(step: fitting.Step) -> None:
        if state.exists():
            # As a machine without the GPU would: no map_location.
            kept.append(places(torch.load(state, weights_only=True)))

    epochs = {"prototypes": None, "mixed": 3}.get(regime, 2)
    choices = Choices(regime=regime, epochs=epochs, data=str(samples), holdout=300)
    train(dense, dense.with_name("out.pt"), choices=choices, on_step=look)
    assert seen == [({"meta"}, {"meta"})] * (epochs or 0)
    assert all(found == {"cpu"} for found in kept) and bool(kept) == bool(epochs)
    assert places(torch.load(dense.with_name("out.pt"), weights_only=True)) == {"cpu"}


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("everything", {}),
        ("gormez-ordered", {"steps": 1}),
        ("greg-2", {}),
        ("polarization", {}),
        ("lacoot", {}),
    ],
)
def test_a_pruning_trains_there_and_scores_here(
    name: str,
    changes: dict[str, Any],
    gpu: None,
    dense: Path,
    samples: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Killed in the middle, it goes on from a file in which nothing lies on the GPU."""
    seen = watch_epochs(monkeypatch)
    cuts: list[set[str]] = []
    cut = Removal.cut

    def here(self: Removal, *args: Any) -> dict[str, Any]:
        cuts.append(places(self.model.state_dict()))
        return cut(self, *args)

    monkeypatch.setattr(Removal, "cut", here)
    out = dense.with_name("out.pt")

    def stop(progress: Progress) -> None:
        if progress.fit is not None and progress.fit.epoch == 2:
            raise KeyboardInterrupt

    plan = replace(METHODS[name], round_to=1, samples=64, phase_epochs=2, **changes)
    if plan.target.what == "macs":
        plan = replace(plan, target=Target(what="macs", share=0.9))
    recipe = prune_nets.recipe(samples, plan, finetune=replace(PART, epochs=2, batch=100))
    with pytest.raises(KeyboardInterrupt):
        prune(dense, recipe, out, on_step=stop)
    state = torch.load(out.with_name("out.pt.state"), weights_only=True)
    assert places(state) == {"cpu"} and places(state["fit"]["optimizer"]) == {"cpu"}
    prune(dense, recipe, out)
    assert len(seen) > 1 and set(map(str, seen)) == {str(({"meta"}, {"meta"}))}
    assert cuts and all(found == {"cpu"} for found in cuts)
    assert places(load_checkpoint(out).model.state_dict()) == {"cpu"}


def test_without_a_gpu_the_network_stays(samples: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Linear(2, 2)
    weight = model.weight
    with accelerated(model):
        assert model.weight is weight and model.weight.device.type == "cpu"


def test_no_room_on_the_gpu_is_one_line(gpu: None) -> None:
    model = nn.Linear(2, 2)
    said = "no room for this training: 3 GiB"
    with pytest.raises(UsageError, match=said) as caught, engine.accelerated(model):
        raise torch.OutOfMemoryError("3 GiB wanted\nand much more")
    assert "smaller batch" in str(caught.value.hint) and "\n" not in str(caught.value)
    assert model.weight.device.type == "cpu"


def test_a_state_file_keeps_what_a_state_dict_says_of_itself() -> None:
    model = nn.BatchNorm1d(2)
    data = state_bytes("training", "d", {"model": model.state_dict(), "pair": (1, [2.0])})
    state = torch.load(io.BytesIO(data), weights_only=True)
    assert state["model"]._metadata == model.state_dict()._metadata
    assert state["pair"] == (1, [2.0]) and state["digest"] == "d"
