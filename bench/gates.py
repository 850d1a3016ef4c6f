"""
The same networks by way of torch and by way of ONNX: answers, accuracy, latency, operators.

    EDGEEXIT_ONNX_PYTHON=.../bin/python python bench/gates.py [--processes 10]

Needs edgeexit[torch,onnx-export] here and a Python with edgeexit[onnx] there. What both make runs
here, on one LiteRT. Latency is one invoke of the uncut network with all its exits, the two taking
turns; answers are compared on 128 samples that were used for nothing else; accuracy is on the
`report` split (the nets without have random weights and batch statistics of real samples).
"""

import json
import os
import random
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from time import perf_counter_ns
from typing import Any

import numpy as np
from common import CHECKOUT, in_processes, options, save, spread

NETS = ("fashion", "mobilenet", "vit", "dscnn", "conv1d")
GATES = ("torch", "onnx")
SCHEMES = ("int8", "float")
ACROSS = "EDGEEXIT_ONNX_PYTHON"
ROUNDS, ROUND_NS = 300, 2_000_000

# Run by both Pythons: what a gate makes of a file, as it is and in int8.
MAKE = """
import json, sys
from pathlib import Path
from edgeexit.host.answers import RealSamples
from edgeexit.host.gates import Asked, open_model
from edgeexit.host.purpose import read_labels, read_preprocess
from edgeexit.host.schemes import SCHEMES
from edgeexit.samples import load_samples
path, samples, labels, preprocess, out = sys.argv[1:]
names, how = read_labels(Path(labels)), read_preprocess(Path(preprocess))
is_said = path.endswith(".onnx")
asked = Asked(labels=names, preprocess=how) if is_said else Asked()
opened = open_model(Path(path), asked)
found = load_samples(samples, opened.preprocess, names, opened.input_shape, labels_required=False)
reals = RealSamples(found.samples, opened.preprocess)
lowered = opened.lower()
quantized = SCHEMES["int8"](lowered, reals, None)
Path(f"{out}-float.tflite").write_bytes(lowered.data)
Path(f"{out}-int8.tflite").write_bytes(quantized.data)
told = {"exits": lowered.exits, "outside_xnnpack": quantized.outside_xnnpack}
Path(f"{out}.json").write_text(json.dumps(told))
"""


def timed(invoke: Callable[[], None], calls: int) -> int:
    start = perf_counter_ns()
    for _ in range(calls):
        invoke()
    return perf_counter_ns() - start


def worker(folder: Path, seed: int) -> dict[str, float]:
    """For each net and scheme: microseconds by way of torch, and ONNX's over torch's."""
    from edgeexit.interpreter import open_interpreter

    found, order = {}, random.Random(seed)
    for name in NETS:
        for scheme in SCHEMES:
            nets = {
                gate: open_interpreter((folder / f"{name}-{gate}-{scheme}.tflite").read_bytes())
                for gate in GATES
            }
            calls = max(1, ROUND_NS // max(1, timed(nets["torch"].invoke, 3) // 3))
            ns: dict[str, list[int]] = {gate: [] for gate in GATES}
            for _ in range(ROUNDS):
                for gate in order.sample(GATES, len(GATES)):
                    ns[gate].append(timed(nets[gate].invoke, calls))
            # Rounds shorter than a slice of the scheduler's: the quickest tenth was left alone.
            quick = {gate: sorted(ns[gate])[ROUNDS // 10] for gate in GATES}
            found[f"{name} {scheme}"] = quick["onnx"] / quick["torch"]
            found[f"{name} {scheme} us"] = quick["torch"] / calls / 1e3
    return found


def prepare(name: str, folder: Path) -> None:
    """What each gate makes of the net *name*, and fresh samples, in *folder*."""
    from nets import checkpoint_of, real_samples

    from edgeexit.host.checkpoint import load_checkpoint
    from edgeexit.host.onnx_export import exported
    from edgeexit.samples import find_set

    if name == "fashion":
        path, samples = CHECKOUT / "examples" / "fashion.pt", "fashion-mnist:ranges"
        fresh = find_set("fashion-mnist").split("tuning").samples[:128]
    else:
        path, made = checkpoint_of(name, folder)
        samples, fresh = str(made), real_samples(name, 256)[128:]
    np.save(folder / f"{name}.npy", fresh)
    checkpoint = load_checkpoint(path)
    _, data = exported(checkpoint.model, checkpoint.input_shape)
    (folder / f"{name}.onnx").write_bytes(data)
    labels, preprocess = folder / f"{name}.txt", folder / f"{name}.toml"
    labels.write_text("\n".join(checkpoint.class_names))
    rows = [f"{k} = {json.dumps(v)}" for k, v in checkpoint.preprocess.to_document().items()]
    preprocess.write_text("\n".join(rows))
    files = {"torch": (sys.executable, path), "onnx": (os.environ[ACROSS], folder / f"{name}.onnx")}
    for gate, (python, model) in files.items():
        told = [model, samples, labels, preprocess, folder / f"{name}-{gate}"]
        environment = {**os.environ, "PYTHONPATH": str(CHECKOUT)}
        done = subprocess.run(
            [python, "-c", MAKE, *map(str, told)], capture_output=True, text=True, env=environment
        )
        if done.returncode:
            raise SystemExit(f"{name}, {gate}: {done.stderr}")
        print(f"  {name}: by way of {gate}", file=sys.stderr)


def compared(name: str, folder: Path) -> dict[str, Any]:
    """Answers, accuracy and operators of the net *name*."""
    from edgeexit import cut, tflite
    from edgeexit.files import read_toml
    from edgeexit.host.answers import RealSamples, tflite_logits
    from edgeexit.host.quantize import agreement, real_logits
    from edgeexit.preprocess import Preprocess
    from edgeexit.samples import find_set

    told = {gate: json.loads((folder / f"{name}-{gate}.json").read_text()) for gate in GATES}
    exits = {gate: told[gate]["exits"] for gate in GATES}
    files = {
        (gate, scheme): (folder / f"{name}-{gate}-{scheme}.tflite").read_bytes()
        for gate in GATES
        for scheme in SCHEMES
    }
    preprocess = Preprocess.from_table(read_toml(folder / f"{name}.toml"))
    reals = RealSamples(np.load(folder / f"{name}.npy"), preprocess)
    # An ONNX file knows its exits by the names of its outputs; they stand in the same order.
    floats = {g: list(tflite_logits(files[g, "float"], exits[g], reals).values()) for g in GATES}
    int8 = {g: list(real_logits(files[g, "int8"], exits[g], reals).values()) for g in GATES}
    pairs = zip(floats["torch"], floats["onnx"], strict=True)
    figures: dict[str, Any] = {
        "float_error": [float(np.abs(a - b).max() / np.abs(a).max()) for a, b in pairs],
        "int8_agreement": {
            gate: [agreement(a, b) for a, b in zip(floats["torch"], int8[gate], strict=True)]
            for gate in GATES
        },
    }
    if name == "fashion":
        report = find_set("fashion-mnist").split("report")
        images = RealSamples(report.samples, preprocess)
        figures["int8_accuracy"] = {
            gate: [
                float((logits.argmax(axis=1) == report.labels).mean())
                for logits in real_logits(files[gate, "int8"], exits[gate], images).values()
            ]
            for gate in GATES
        }
    for scheme in SCHEMES:
        lists = {
            gate: Counter(o.kind for o in tflite.read_model(files[gate, scheme]).operators)
            for gate in GATES
        }
        figures[f"{scheme}_operators"] = {gate: sum(lists[gate].values()) for gate in GATES}
        figures[f"{scheme}_more_by_onnx"] = difference(lists)
    figures["transposes"] = {
        gate: list(cut.transposes(files[gate, "int8"], exits[gate])) for gate in GATES
    }
    figures["outside_xnnpack"] = {gate: told[gate]["outside_xnnpack"] for gate in GATES}
    return figures


def difference(lists: Mapping[str, Counter[str]]) -> dict[str, int]:
    """Operator -> how many more there are by way of ONNX; those that are equal left out."""
    kinds = sorted(set(lists["torch"]) | set(lists["onnx"]))
    return {k: n for k in kinds if (n := lists["onnx"][k] - lists["torch"][k])}


def main() -> None:
    given = options(__doc__.splitlines()[1])
    if given.worker:
        print(json.dumps(worker(given.worker, given.seed)))
        return
    if ACROSS not in os.environ:
        raise SystemExit(f"${ACROSS}: name a Python that has edgeexit[onnx]")
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        for name in NETS:
            prepare(name, folder)
        figures = {name: compared(name, folder) for name in NETS}
        runs = in_processes(given.processes, "gates.py", str(folder))
    for name in NETS:
        for scheme in SCHEMES:
            figures[name][f"{scheme}_latency"] = spread([run[f"{name} {scheme}"] for run in runs])
            figures[name][f"{scheme}_us"] = spread([run[f"{name} {scheme} us"] for run in runs])
    save("gates", "python bench/gates.py", {"nets": figures})


if __name__ == "__main__":
    main()
