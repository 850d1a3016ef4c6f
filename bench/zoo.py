"""
Every net of the zoo: the chain of segments against the uncut int8 model, byte for byte.

    python bench/zoo.py [NET...]

At least 1,000 real samples each, all exits. For the 224x224 nets also the peak memory of
`edgeexit run` on a picture.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from common import save

SAMPLES = 1000


def differing_bytes(bundle, samples) -> int:
    from edgeexit.runtime import Runner, open_interpreter

    uncut = open_interpreter(bundle.model_data())
    target = next(iter(uncut.inputs.values()))
    names = [bundle.exit_tensors[exit] for exit in bundle.exits]
    different = 0
    with Runner(bundle, policy=None, preload=True) as runner:
        for sample in samples:
            chain = runner.raw_logits(sample)
            target[...] = runner.input_tensor(sample)
            uncut.invoke()
            whole = np.stack([uncut.outputs[name].reshape(-1) for name in names])
            different += int((chain.view(np.uint8) != whole.view(np.uint8)).sum())
    return different


def run_peak_mb(bundle, folder: Path) -> float:
    from PIL import Image

    height, width = bundle.preprocess.size
    picture = folder / "picture.png"
    noise = np.random.default_rng(0).integers(0, 256, (height * 2, width * 2, 3))
    Image.fromarray(noise.astype(np.uint8)).save(picture)
    # VmHWM is of this program alone; ru_maxrss would carry over what the parent had taken.
    code = (
        "import sys; from edgeexit.cli import entry\n"
        "code = entry(sys.argv[1:])\n"
        "peak = [l for l in open('/proc/self/status') if l.startswith('VmHWM')][0].split()[1]\n"
        "print(code, peak, file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "run", str(bundle.path), str(picture)],
        check=True,
        capture_output=True,
        text=True,
    )
    code_and_kb = done.stderr.splitlines()[-1].split()
    assert code_and_kb[0] == "0", done.stderr
    return round(int(code_and_kb[1]) / 1024, 1)


def main() -> None:
    from nets import bundle_of, real_samples

    from edgeexit.host.zoo import ZOO

    figures = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in sys.argv[1:] or ZOO:
            samples = real_samples(name, SAMPLES)
            bundle = bundle_of(name, Path(folder))
            figures[name] = {
                "samples": len(samples),
                "exits": len(bundle.exits),
                "differing_bytes": differing_bytes(bundle, samples),
            }
            if ZOO[name].input_shape[-1] == 224:
                figures[name]["run_peak_mb"] = run_peak_mb(bundle, Path(folder))
            print(name, figures[name], file=sys.stderr)
    save("zoo", "python bench/zoo.py", figures)


if __name__ == "__main__":
    main()
