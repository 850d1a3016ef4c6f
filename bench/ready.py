"""
Ready .tflite files, not ours: MLPerf Tiny's ResNet-8 and DS-CNN, float and int8, with exits put on.

    python bench/ready.py [--samples N]

Each file is converted as it is, with exits fitted on inner maps. Then the chain of segments is
compared with the uncut network byte for byte, the final exit with what the file itself answers, and
`edgeexit run` classifies the test samples: the files' published accuracies must come out. Of
CIFAR-10 the lossless test pictures are taken and the mean of the class accuracies; of the keyword
set all 1,000 maps (the early exits are fitted on the first 400 and judged on the others).
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from cifar import CLASSES as PICTURES
from cifar import DATA, NORMAL, Cifar
from common import save
from zoo import differing_bytes

from edgeexit.preprocess import Preprocess
from edgeexit.samples import Samples

WORDS = (
    *("down", "go", "left", "no", "off", "on", "right", "stop", "up", "yes"),
    *("silence", "unknown"),
)
MFCC_STEP, MFCC_ZERO = 0.5847029089927673, 83  # how the set's maps are stored
FITTED_ON = 400

RAW = replace(NORMAL, scale=1.0, mean=(0.0,), std=(1.0,), layout="nhwc")
SPEECH = Preprocess(kind="array", scale=MFCC_STEP, mean=(MFCC_STEP * MFCC_ZERO,), layout="as-is")


@dataclass(frozen=True)
class Ready:
    """One file: what it takes, where exits go, its published accuracy in percent."""

    file: str
    data: Callable[[int | None], tuple[Samples, Samples]]
    class_names: tuple[str, ...]
    preprocess: Preprocess
    exits: tuple[str, ...]
    published: float
    scheme: str | None = None


def pictures(count: int | None) -> tuple[Samples, Samples]:
    """1,000 pictures to fit on, or *count* if that is less, and *count* to judge by (None: all)."""
    cifar = Cifar()
    return cifar.pictures("train", min(count or 1000, 1000)), cifar.pictures("test", count)


def speech(count: int | None) -> tuple[Samples, Samples]:
    """The first maps of the keyword set, and *count* of them (None: all)."""
    with np.load(DATA / "kws01" / "kws01.npz") as file:
        maps, labels = file["X"].astype(np.float32)[..., None], file["y"].astype(np.int64)
    everything = Samples(
        samples=maps, labels=labels, ids=np.arange(len(maps)).astype(str), name="kws01"
    )
    return everything[:FITTED_ON], everything[:count]


RESNET = ("model/add/add", "model/add_1/add", "final")
DSCNN = ("functional_1/activation_2/Relu", "functional_1/activation_4/Relu", "final")
FILES = {
    "resnet8 float": Ready(
        "pretrainedResnet.tflite", pictures, PICTURES, RAW, RESNET, 87.19, "float"
    ),
    "resnet8 int8": Ready("pretrainedResnet_quant.tflite", pictures, PICTURES, RAW, RESNET, 86.96),
    "dscnn float": Ready("kws_ref_model_float32.tflite", speech, WORDS, SPEECH, DSCNN, 90.0),
    "dscnn int8": Ready("kws_ref_model.tflite", speech, WORDS, SPEECH, DSCNN, 90.2),
}
"""Name -> file. "dscnn float" has float activations; its weights are int8 (dynamic)."""


def measure(name: str, folder: Path, count: int | None = None) -> dict[str, Any]:
    """Convert FILES[*name*] in *folder* and classify *count* test samples (None: all)."""
    from edgeexit.host.convert import convert

    ready = FILES[name]
    fit, test = ready.data(count)
    np.savez(folder / "fit.npz", samples=fit.samples, labels=fit.labels)
    np.savez(folder / "test.npz", samples=test.samples, labels=test.labels)
    (folder / "labels.txt").write_text("\n".join(ready.class_names))
    lines = [f"{k} = {json.dumps(v)}" for k, v in ready.preprocess.to_document().items()]
    (folder / "preprocess.toml").write_text("\n".join(lines))
    bundle = convert(
        DATA / "mlperf_tiny" / ready.file,
        folder / "ready.edgeexit",
        folder / "fit.npz",
        ready.scheme,
        exits=ready.exits,
        labels=folder / "labels.txt",
        preprocess=folder / "preprocess.toml",
    )
    early = slice(FITTED_ON, None) if ready.data is speech else slice(None)
    right = _right(bundle, test)
    answered = _by_run(bundle, folder)
    final = len(bundle.exits) - 1
    return {
        "file": ready.file,
        "scheme": bundle.scheme,
        "samples": len(test),
        "exits": {
            exit_name: _percent(ready, right[:, k][early], test.labels[early])
            for k, exit_name in enumerate(bundle.exits[:final])
        },
        "final": _percent(ready, right[:, final], test.labels),
        "published": ready.published,
        "by_run": _percent(ready, answered == test.labels, test.labels),
        "bytes_that_differ_from_uncut": differing_bytes(bundle, test.samples),
        "answers_that_differ_from_file": _unlike_file(bundle, ready, test),
        "kernels_outside_xnnpack": bundle.provenance["outside_xnnpack"],
    }


def _right(bundle: Any, test: Samples) -> np.ndarray:
    from edgeexit.evaluate import record

    found: np.ndarray = record(bundle, [test]).correct()
    return found


def _percent(ready: Ready, right: np.ndarray, labels: np.ndarray) -> float:
    if ready.data is pictures:
        right = np.array([right[labels == k].mean() for k in np.unique(labels)])
    return round(100 * float(right.mean()), 2)


def _by_run(bundle: Any, folder: Path) -> np.ndarray:
    """The classes that `edgeexit run` writes into its log."""
    command = [sys.executable, "-m", "edgeexit", "run", "--bundle", str(bundle.path)]
    command += ["--policy", "none", "--log", str(folder / "log.jsonl"), str(folder / "test.npz")]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    lines = (folder / "log.jsonl").read_text().splitlines()
    names = [json.loads(line).get("class") for line in lines]
    return np.array([bundle.class_names.index(one) for one in names if one is not None])


def _unlike_file(bundle: Any, ready: Ready, test: Samples) -> int:
    """
    Samples to which the final exit names a class that the untouched file does not.

    The file's int8 probabilities tie where its logits do not: the largest ones all count.
    """
    from edgeexit.interpreter import open_interpreter
    from edgeexit.runtime import Runner

    whole = open_interpreter((DATA / "mlperf_tiny" / ready.file).read_bytes())
    (feed,), (answer,) = whole.inputs.values(), whole.outputs.values()
    unlike = 0
    with Runner(bundle, policy=None) as runner:
        for sample in test.samples:
            feed[...] = runner.input_tensor(sample)
            whole.invoke()
            label = runner.raw_logits(sample)[-1].argmax()
            unlike += int(answer[0, label] != answer.max())
    return unlike


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("--samples", type=int, help="test samples of each file; default: all")
    count = parser.parse_args().samples
    figures = {}
    for name in FILES:
        with tempfile.TemporaryDirectory() as folder:
            figures[name] = measure(name, Path(folder), count)
        print(f"  {name}", file=sys.stderr)
    save("ready", "python bench/ready.py" + (f" --samples {count}" if count else ""), figures)
    print(f"{'file':<16} {'published':>9} {'final':>7} {'early exits':>16}  differing")
    for name, one in figures.items():
        early = " / ".join(f"{value:.1f}" for value in one["exits"].values())
        print(
            f"{name:<16} {one['published']:>9.2f} {one['by_run']:>7.2f} {early:>16}  "
            f"{one['bytes_that_differ_from_uncut']} bytes, "
            f"{one['answers_that_differ_from_file']} answers"
        )


if __name__ == "__main__":
    main()
