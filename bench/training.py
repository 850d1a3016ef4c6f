"""
What an epoch of training costs in bfloat16 beside float32, in turns: a ratio in each process.

    python bench/training.py [--processes N]
"""

import json
import sys
from dataclasses import replace
from time import perf_counter

from common import in_processes, options, save, spread

NETS = ("resnet20", "resnet56", "mobilenet", "vit")
PRECISIONS = ("float32", "bfloat16")
SAMPLES, BATCH, TURNS = 768, 128, 2


def worker(name: str) -> dict[str, float]:
    """Seconds of the quicker epoch of each precision of the zoo's net *name*."""
    import numpy as np
    import torch
    from nets import preprocess_of

    from edgeexit.host.feed import TrainingSet
    from edgeexit.host.fit import Fit
    from edgeexit.host.material import Material
    from edgeexit.host.recipe import Augmentation, TrainingPart
    from edgeexit.host.zoo import ZOO

    net, random = ZOO[name], np.random.default_rng(0)
    _, channels, height, width = net.input_shape
    torch.manual_seed(0)
    model = net()
    classes = int(model.eval()(torch.zeros(net.input_shape))[-1].shape[-1])
    data = TrainingSet(
        samples=random.integers(0, 256, (SAMPLES, height, width, channels), dtype=np.uint8),
        labels=np.arange(SAMPLES) % classes,
        class_names=tuple(map(str, range(classes))),
    )
    material = Material(
        data=data,
        training=np.arange(SAMPLES)[:-BATCH],
        holdout=np.arange(SAMPLES)[-BATCH:],
        preprocess=preprocess_of(name),
        augmentation=Augmentation(),
    )
    part = TrainingPart(epochs=1 + TURNS, learning_rate=0.01, batch=BATCH)
    fits = {p: Fit(model, material, replace(part, precision=p), where=name) for p in PRECISIONS}
    taken: dict[str, list[float]] = {precision: [] for precision in PRECISIONS}
    for _ in range(1 + TURNS):
        for precision, fit in fits.items():
            start = perf_counter()
            fit.run_epoch()
            taken[precision].append(perf_counter() - start)
    return {precision: min(seconds[1:]) for precision, seconds in taken.items()}


def main() -> None:
    asked = options(__doc__)
    if asked.worker:
        print(json.dumps(worker(str(asked.worker))))
        return
    figures = {}
    for name in NETS:
        print(name, file=sys.stderr)
        found = in_processes(asked.processes, "training.py", name)
        figures[name] = {
            "float32_seconds": spread([one["float32"] for one in found]),
            "times_faster": spread([one["float32"] / one["bfloat16"] for one in found]),
        }
    save("training", "python bench/training.py", {"samples": SAMPLES - BATCH, "nets": figures})


if __name__ == "__main__":
    main()
