"""
The shipped network on the `report` split: float against int8 at every exit, and the cost of each.

    python bench/accuracy.py
"""

import tempfile
from pathlib import Path

from common import profiled, save


def main() -> None:
    from edgeexit import demo
    from edgeexit.evaluate import record
    from edgeexit.host.convert import convert
    from edgeexit.samples import find_set

    report = [find_set("fashion-mnist").split("report")]
    with tempfile.TemporaryDirectory() as folder:
        bundle = demo.copy_of_shipped_bundle(Path(folder))
        real = convert(demo.example("fashion.pt"), Path(folder) / "float.edgeexit", scheme="float")
        costs = profiled(bundle, time_cap_s=40)
        accuracy = {
            scheme: record(made, report).correct().mean(axis=0).tolist()
            for scheme, made in (("int8", bundle), ("float", real))
        }
    full = costs.case(bundle.exits, bundle.exits[-1])
    assert full is not None
    figures = {
        "profile": costs.verdict.status,
        "checkpoint_bytes": demo.example("fashion.pt").stat().st_size,
        "bundle_bytes": sum(f.stat().st_size for f in demo.example(demo.BUNDLE).rglob("*")),
    }
    for k, name in enumerate(bundle.exits):
        case = costs.case(bundle.exits, name)
        assert case is not None
        figures[name] = {
            "float_accuracy": accuracy["float"][k],
            "int8_accuracy": accuracy["int8"][k],
            "share_of_whole": costs.share(case, full).value,
        }
    save("accuracy", "python bench/accuracy.py", figures)


if __name__ == "__main__":
    main()
