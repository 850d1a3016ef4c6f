"""What a machine may answer otherwise than the one that converted, and how that is told."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from small import policy_with
from test_runtime import GRAY, SAMPLES
from tiny import tiny_model

from edgeexit.bundle import Bundle, SelfTest, write_bundle
from edgeexit.cli import entry
from edgeexit.errors import SelfTestError
from edgeexit.policy import ALWAYS, NEVER, Policy
from edgeexit.runtime import Runner
from edgeexit.selftest import run_selftest

COUNT = 16
EXITS = ("exit0", "exit1", "exit2")
# What a bundle says that XNNPACK computed where it was converted: all of it, or not the GELUs.
WHOLE = {"outside_xnnpack": {}, "versions": {"ai-edge-litert": "2.3.0"}}
IN_PART = {**WHOLE, "outside_xnnpack": {"GELU": 2}}


def recorded(dtype: str) -> NDArray[np.generic]:
    """Answers of COUNT samples: ranges of 80 steps, and class 1 one step behind class 0."""
    row = np.array([40, 39, -40, 0])
    return np.broadcast_to(row, (COUNT, len(EXITS), 4)).astype(dtype)


def make(folder: Path, scheme: str, provenance: Mapping[str, object]) -> Bundle:
    """A bundle whose recorded answers are those of `recorded`."""
    model = tiny_model(quantized=scheme == "int8")
    samples = np.resize(SAMPLES, (COUNT, *SAMPLES.shape[1:]))
    path = folder / f"{scheme}.edgeexit"
    options = {
        "name": "tiny",
        "model_data": model.data,
        "exits": model.exits,
        "class_names": ["a", "b", "c", "d"],
        "preprocess": GRAY,
        "scheme": scheme,
        "provenance": provenance,
    }
    made = write_bundle(path, selftest=samples, **options)  # type: ignore[arg-type]
    test = made.selftest()
    answers = recorded(str(test.logits.dtype))
    fixed = SelfTest(samples=test.samples, inputs=test.inputs, logits=answers)
    return write_bundle(path, selftest=fixed, **options)  # type: ignore[arg-type]


def answering(monkeypatch: pytest.MonkeyPatch, logits: NDArray[np.generic]) -> None:
    """Let this machine's runtime answer *logits* (COUNT, exits, classes)."""
    left = iter(logits)
    monkeypatch.setattr(Runner, "raw_logits", lambda self, sample: next(left))


def off_by(steps: float, samples: int, dtype: str = "int8", place: int = 3) -> NDArray[np.generic]:
    """The recorded answers with one logit of the first exit off in the first *samples*."""
    found = recorded(dtype).copy()
    found[:samples, 0, place] += np.dtype(dtype).type(steps)
    return found


def otherwise(samples: int, exit: int = 2) -> NDArray[np.generic]:
    """The recorded answers with two classes exchanged at *exit* in the first *samples*."""
    found = recorded("int8").copy()
    found[:samples, exit, :2] = found[:samples, exit, 1::-1]
    return found


# Of 16 samples two may stray; an eighth of a range of 80 is 10 steps.
CASES: dict[str, tuple[str, Mapping[str, object], NDArray[np.generic], str]] = {
    "equal": ("int8", WHOLE, off_by(0, 0), ""),
    "XNNPACK, few astray": ("int8", WHOLE, off_by(2, 2), ""),
    "XNNPACK, many astray": ("int8", WHOLE, off_by(1, 3), "3 of 16 samples"),
    "XNNPACK, far off": ("int8", WHOLE, off_by(3, 1), "differ by 3 here, expected at most 2"),
    "other kernels, all off": ("int8", IN_PART, off_by(10, 16), ""),
    "other kernels, far off": ("int8", IN_PART, off_by(11, 1), "expected at most 10"),
    "unknown kernels": ("int8", {}, off_by(10, 16), ""),
    "other kernels, few answers": ("int8", IN_PART, otherwise(2), ""),
    "other kernels, many answers": ("int8", IN_PART, otherwise(3), "answer to 3 of 16 samples"),
    "float": ("float", WHOLE, off_by(0.03, 16, "float32"), ""),
    "float, far off": ("float", WHOLE, off_by(0.05, 1, "float32"), "at most 0.001"),
    "float16, far off": ("float16", WHOLE, off_by(0.05, 1, "float32"), "at most 0.001"),
    "dynamic": ("dynamic", WHOLE, off_by(9, 16, "float32"), ""),
    "dynamic, far off": ("dynamic", WHOLE, off_by(11, 1, "float32"), "at most 0.25"),
    "not a number": ("float", WHOLE, off_by(np.nan, 1, "float32"), "differ by nan"),
}


@pytest.mark.parametrize("name", CASES)
def test_equality_is_asked_for_where_kernels_agree_and_agreement_elsewhere(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheme, provenance, answers, refusal = CASES[name]
    bundle = make(tmp_path, scheme, provenance)
    answering(monkeypatch, answers)

    if refusal:
        with pytest.raises(SelfTestError, match=refusal) as caught:
            run_selftest(bundle)
        assert "ai-edge-litert" in str(caught.value.hint)
    else:
        report = run_selftest(bundle)
        assert report.same_kernels == (provenance is WHOLE and scheme == "int8")
        assert report.largest <= report.allowed
        assert report.astray <= report.may_stray


def test_agreement_is_told_for_each_exit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answering(monkeypatch, otherwise(1, exit=1))

    report = run_selftest(make(tmp_path, "int8", IN_PART))

    assert report.agreement == {"exit0": 1.0, "exit1": 15 / 16, "exit2": 1.0}
    assert report.decided is None
    assert str(report) == (
        "2 of 192 logits differ, by at most 1 step: other kernels than where it was converted; "
        "equal answers: exit0 100.0%, exit1 93.8%, exit2 100.0%"
    )


@pytest.mark.parametrize(("last", "alike"), [("exit0", 1.0), ("exit1", 14 / 16)])
def test_of_a_policy_the_share_is_told_that_it_decides_alike(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, last: str, alike: float
) -> None:
    """What lies behind the exit that is taken makes no difference."""
    bundle = make(tmp_path, "int8", IN_PART)
    answering(monkeypatch, otherwise(2, exit=1))

    report = run_selftest(bundle, policy=Policy.forced(bundle, exit=last, kept=EXITS))

    assert report.decided == alike
    assert str(report).endswith(f"; decided alike by the policy: {alike:.1%}")


def test_leaving_at_another_exit_is_deciding_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The answers are equal, the confidences of one sample are not."""
    bundle = make(tmp_path, "int8", IN_PART)
    answering(monkeypatch, off_by(-5, 1, place=1))
    with_one = run_selftest(bundle, policy=policy_with(bundle, (0.51, ALWAYS)))
    answering(monkeypatch, off_by(-5, 1, place=1))
    without = run_selftest(bundle, policy=policy_with(bundle, (NEVER, ALWAYS)))

    assert (with_one.decided, without.decided) == (15 / 16, 1.0)
    assert set(with_one.agreement.values()) == {1.0}


def test_run_tells_it_and_a_policy_of_the_bundle_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = make(tmp_path, "int8", IN_PART)
    Policy.forced(bundle, exit="exit1", kept=EXITS).save(bundle.policy_path("host"))
    said = []
    for words in (["--device", "host"], ["--policy", "none"]):
        answering(monkeypatch, otherwise(1, exit=1))
        assert entry(["run", str(bundle.path), *words]) == 0
        said.append(capsys.readouterr().out)

    assert "self-test ok: 16 samples, all 3 exits" in said[0]
    assert "decided alike by the policy: 93.8%" in said[0]
    assert "policy" not in said[1]
