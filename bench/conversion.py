"""
What converting costs: seconds and peak memory of `edgeexit convert`, imports included.

    python bench/conversion.py
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from time import perf_counter

from common import save

NETS = ("resnet8", "resnet56")


def main() -> None:
    from nets import checkpoint_of

    figures = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in NETS:
            checkpoint, samples = checkpoint_of(name, Path(folder))
            command = [
                sys.executable,
                "-m",
                "edgeexit",
                "convert",
                str(checkpoint),
                "--json",
                "--calibration",
                str(samples),
                "-o",
                f"{folder}/{name}.edgeexit",
            ]
            start = perf_counter()
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            figures[name] = {
                "seconds": round(perf_counter() - start, 1),
                "peak_gb": round(json.loads(done.stdout)["peak_bytes"] / 1e9, 2),
            }
    save("conversion", "python bench/conversion.py", figures)


if __name__ == "__main__":
    main()
