"""The chain answers as the uncut model does, and stops where the policy says."""

import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tiny import tiny_model

import edgeexit
from edgeexit.bundle import Bundle, write_bundle
from edgeexit.errors import BadFile, Busy, UsageError
from edgeexit.interpreter import open_interpreter
from edgeexit.policy import NEVER, Policy
from edgeexit.preprocess import Preprocess
from edgeexit.runtime import Runner

GRAY = Preprocess(kind="image", size=(12, 10), color="gray", scale=1 / 255)
SAMPLES = np.random.default_rng(0).integers(0, 256, (6, 12, 10, 1)).astype(np.uint8)


def make_bundle(
    folder: Path, *, provenance: dict[str, object] | None = None, **options: object
) -> Bundle:
    model = tiny_model(**options)  # type: ignore[arg-type]
    return write_bundle(
        folder / "tiny.edgeexit",
        name="tiny",
        model_data=model.data,
        exits=model.exits,
        class_names=["a", "b", "c", "d"],
        preprocess=GRAY,
        selftest=SAMPLES,
        scheme="int8" if options.get("quantized", True) else "float",
        provenance=provenance or {},
    )


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return make_bundle(tmp_path_factory.mktemp("bundle"))


def stop_at(bundle: Bundle, name: str) -> Policy:
    return Policy.forced(bundle, exit=name, kept=bundle.exits)


@pytest.mark.parametrize("options", [{}, {"skip": True}, {"quantized": False}, {"exits": 1}])
@pytest.mark.parametrize("threads", [1, 2])
def test_chain_equals_the_uncut_model(
    tmp_path: Path, options: dict[str, object], threads: int
) -> None:
    bundle = make_bundle(tmp_path, **options)
    expected = bundle.selftest().logits

    with Runner(bundle, None, threads) as runner:
        found = np.stack([runner.raw_logits(sample) for sample in SAMPLES])

    assert found.dtype == expected.dtype
    assert (found == expected).all()


def test_later_segments_are_neither_run_nor_opened(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = []
    original = edgeexit.runtime.open_interpreter

    def watched(data: bytes, threads: int = 1, *, where: str = "") -> object:
        opened.append(Path(where).name)
        return original(data, threads, where=where)

    monkeypatch.setattr(edgeexit.runtime, "open_interpreter", watched)
    runner = Runner(bundle, stop_at(bundle, "exit1"))

    assert opened == []
    assert [runner(sample).exit for sample in SAMPLES] == [1] * 6
    assert opened == ["segment-0.tflite", "segment-1.tflite"]
    assert runner.opened == ["exit0", "exit1"]


def test_preloaded_segments_behind_the_exit_are_never_invoked(bundle: Bundle) -> None:
    runner = Runner(bundle, stop_at(bundle, "exit0"), preload=True)
    last = runner._segments[-1]
    before = bytes(last.logits)

    def refuse() -> None:
        raise AssertionError("invoked")

    last.advance = refuse
    assert [p.exit for p in runner.stream(SAMPLES)] == [0] * 6
    assert bytes(last.logits) == before
    assert len(runner.opened) == 3


@pytest.mark.parametrize(
    "kept", [("exit0", "exit2"), ("exit1", "exit2"), ("exit2",), ("exit0", "exit1"), ("exit1",)]
)
@pytest.mark.parametrize("skip", [False, True])
def test_dropped_exits_leave_the_others_as_they_were(
    tmp_path: Path, kept: tuple[str, ...], skip: bool
) -> None:
    bundle = make_bundle(tmp_path, skip=skip)
    expected = bundle.selftest().logits
    runner = Runner(bundle, Policy.forced(bundle, exit=kept[-1], kept=kept))

    for sample, rows in zip(SAMPLES, expected, strict=True):
        index = bundle.exits.index(kept[-1])
        answer = runner(sample)
        spec = bundle.logits[index]
        real = (rows[index].astype(np.float32) - spec.zero_point) * np.float32(spec.scale)
        assert answer.exit == index
        assert (answer.logits == real).all()
    assert runner.logits(SAMPLES[0]).shape == (3, 4)


def test_thresholds_decide(bundle: Bundle) -> None:
    probe = Runner(bundle, stop_at(bundle, "exit0"))
    confidences = [probe(sample).confidence for sample in SAMPLES]
    middle = sorted(confidences)[3]
    policy = Policy(
        device="host",
        bundle_digest=bundle.digest,
        measure="max_prob",
        exits=bundle.exits,
        thresholds=(middle, NEVER),
    )

    exits = [Runner(bundle, policy)(sample).exit for sample in SAMPLES]

    assert exits == [0 if confidence >= middle else 2 for confidence in confidences]


def test_prediction_has_all_that_is_promised(bundle: Bundle) -> None:
    answer = Runner(bundle, None)(SAMPLES[0])

    assert answer.class_name == bundle.class_names[answer.label]
    assert answer.label == int(answer.logits.argmax())
    assert answer.logits.dtype == np.float32
    assert answer.latency_ns > 0
    assert 0 < answer.confidence <= 1
    assert (Runner(bundle, None).logits(SAMPLES[0])[2] == answer.logits).all()


def test_without_a_policy_the_full_network_runs_and_says_so(bundle: Bundle) -> None:
    runner = Runner(bundle, device="rpi4")

    assert runner(SAMPLES[0]).exit == 2
    assert "rpi4" in (runner.notice or "")


def test_auto_takes_this_devices_policy(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path)
    stop_at(bundle, "exit0").save(bundle.policy_path("rpi4"))

    runner = Runner(bundle, device="rpi4")

    assert (runner(SAMPLES[0]).exit, runner.notice) == (0, None)


def test_policy_of_another_bundle_is_refused(bundle: Bundle, tmp_path: Path) -> None:
    other = make_bundle(tmp_path, seed=7)
    stop_at(other, "exit0").save(tmp_path / "p.json")

    with pytest.raises(BadFile, match="made for bundle"):
        Runner(bundle, tmp_path / "p.json")


def test_samples_that_do_not_fit_are_refused_and_the_runner_goes_on(bundle: Bundle) -> None:
    runner = Runner(bundle, None)
    for sample in (np.zeros((12, 10, 1), np.float32), np.zeros((2, 2, 2, 2), np.uint8), "x"):
        with pytest.raises(UsageError):
            runner(sample)

    assert runner(SAMPLES[0]).exit == 2


def test_two_threads_in_one_runner_are_noticed(bundle: Bundle) -> None:
    runner = Runner(bundle, None)
    inside, leave = threading.Event(), threading.Event()
    first = runner._segments[0]
    advance = first.advance

    def slow() -> None:
        inside.set()
        leave.wait(5)
        advance()

    first.advance = slow
    thread = threading.Thread(target=runner, args=(SAMPLES[0],))
    thread.start()
    inside.wait(5)
    try:
        with pytest.raises(Busy):
            runner(SAMPLES[1])
    finally:
        leave.set()
        thread.join()


def test_closed_runner_is_refused(bundle: Bundle) -> None:
    with Runner(bundle, None) as runner:
        runner(SAMPLES[0])

    with pytest.raises(UsageError, match="closed"):
        runner(SAMPLES[0])


def test_two_runners_do_not_disturb_each_other(bundle: Bundle) -> None:
    one, two = Runner(bundle, None), Runner(bundle, None)
    expected = [one(sample).logits for sample in SAMPLES]

    for sample, logits in zip(SAMPLES, expected, strict=True):
        two(SAMPLES[0])
        answer = one(sample)
        two(SAMPLES[1])
        assert (answer.logits == logits).all()


def test_the_copying_way_answers_alike(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """For runtimes whose Python class has no inner interpreter to reach into."""
    from edgeexit import interpreter

    monkeypatch.setattr(interpreter, "_Direct", interpreter._Copying)

    found = np.stack([Runner(bundle, None).raw_logits(sample) for sample in SAMPLES])

    assert (found == bundle.selftest().logits).all()


def test_garbage_is_refused_by_open_interpreter() -> None:
    with pytest.raises(BadFile):
        open_interpreter(b"TFL3" * 100)
    with pytest.raises(UsageError):
        open_interpreter(b"", threads=0)


def test_the_face_of_the_package() -> None:
    assert edgeexit.Runner is Runner
    assert edgeexit.Prediction.__name__ == "Prediction"


def test_a_path_for_a_bundle_is_refused_with_the_way_out() -> None:
    with pytest.raises(UsageError, match="expected a Bundle, found str") as caught:
        Runner("fashion.edgeexit")  # type: ignore[arg-type]
    assert "load_bundle" in str(caught.value.hint)


def test_each_class_has_its_own_limit(bundle: Bundle) -> None:
    """An offset beyond any confidence keeps one class from leaving early, and no other."""
    early = stop_at(bundle, "exit0")
    with Runner(bundle, early) as runner:
        labels = [runner(sample).label for sample in SAMPLES]
    barred = labels[0]
    offsets = tuple(9.0 if label == barred else 0.0 for label in range(4))
    policy = replace(early, thresholds=(0.0, NEVER), class_offsets={"exit0": offsets})

    with Runner(bundle, policy) as runner:
        assert [runner(sample).exit for sample in SAMPLES] == [
            2 if label == barred else 0 for label in labels
        ]
    with pytest.raises(BadFile, match="each of 4 classes"):
        Runner(bundle, replace(policy, class_offsets={"exit0": (0.0,)}))


def test_a_runner_adopts_another_policy_of_the_same_exits(bundle: Bundle) -> None:
    with Runner(bundle, stop_at(bundle, "exit2")) as runner:
        assert runner(SAMPLES[0]).exit == 2
        runner.adopt(stop_at(bundle, "exit0"))
        assert runner(SAMPLES[0]).exit == 0
        assert runner.policy == stop_at(bundle, "exit0")
        with pytest.raises(UsageError, match="this Runner has"):
            runner.adopt(Policy.forced(bundle, exit="exit2", kept=("exit2",)))
