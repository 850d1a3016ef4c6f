"""
What cutting costs: the chain of all segments against the uncut model, and one decision.

    python bench/cutting.py [--processes 10]

Both sides get the input bytes copied in and run through the same runtime, one thread, blocks of
calls in turns. A decision is label, confidence and comparison of one exit.
"""

import json
import random
import statistics
import tempfile
from pathlib import Path
from time import perf_counter_ns

from common import in_processes, options, save, spread

NETS = ("resnet8", "resnet56")
CALLS, BLOCKS = 60, 60


def worker(path: Path, seed: int) -> dict[str, float]:
    from edgeexit.bundle import load_bundle
    from edgeexit.runtime import Runner, open_interpreter

    bundle = load_bundle(path)
    uncut = open_interpreter(bundle.model_data())
    target = next(iter(uncut.inputs.values())).reshape(-1).view("uint8").data
    runner = Runner(bundle, policy=None, preload=True)
    sample = bundle.selftest().samples[0]
    runner(sample)
    source = runner.input_tensor(sample).reshape(-1).view("uint8").data
    segments = runner._segments

    def whole() -> None:
        target[:] = source
        uncut.invoke()

    def chain() -> None:
        for segment in segments:
            segment.advance()

    def decide() -> None:
        for segment in segments:
            label, confidence = segment.read(segment.logits)
            assert confidence < 2 or label < 0

    cases = {"whole": whole, "chain": chain, "decide": decide}
    times: dict[str, list[float]] = {name: [] for name in cases}
    order = random.Random(seed)
    for case in cases.values():
        for _ in range(CALLS):
            case()
    for _ in range(BLOCKS):
        for name in order.sample(list(cases), len(cases)):
            case = cases[name]
            start = perf_counter_ns()
            for _ in range(CALLS):
                case()
            times[name].append((perf_counter_ns() - start) / CALLS)
    median = {name: statistics.median(values) / 1e3 for name, values in times.items()}
    return {
        "uncut_us": median["whole"],
        "chain_us": median["chain"],
        "ratio": median["chain"] / median["whole"],
        "added_segment_us": (median["chain"] - median["whole"]) / (len(segments) - 1),
        "decision_us": median["decide"] / len(segments),
    }


def main() -> None:
    given = options(__doc__.splitlines()[1])
    if given.worker:
        print(json.dumps(worker(given.worker, given.seed)))
        return
    from nets import bundle_of

    figures = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in NETS:
            bundle = bundle_of(name, Path(folder))
            runs = in_processes(given.processes, "cutting.py", str(bundle.path))
            figures[name] = {key: spread([run[key] for run in runs]) for key in runs[0]}
    save("cutting", "python bench/cutting.py", figures)


if __name__ == "__main__":
    main()
