"""
A camera in your own program: python examples/camera.py BUNDLE.edgeexit SOURCE

SOURCE is spelt as for `edgeexit run`: camera: on a Raspberry Pi, v4l2:/dev/video0, clip.mp4,
watch:incoming/, or replay:examples/images,fps=20 without any camera. It acts when the class
changes, which is what most programs with a camera want. Ctrl-C ends it.
"""

import sys

import edgeexit
from edgeexit.errors import EdgeExitError
from edgeexit.live import Live


def act(name: str, answer: edgeexit.Prediction) -> None:
    """Your program goes here."""
    print(f"{name}: {answer.class_name} ({answer.confidence:.2f})", flush=True)


def main(bundle_path: str, source: str) -> None:
    """Act on what the camera shows, until it ends."""
    bundle = edgeexit.load_bundle(bundle_path)
    live = Live(
        source,
        bundle.preprocess,
        bundle.input.shape[1:],
        tell=lambda line: print(line, file=sys.stderr),
        rate_hz=10,
    )
    last, count = None, 0
    with edgeexit.Runner(bundle, policy="auto", preload=True) as runner:
        try:
            for item in live:
                if item is None:  # nothing there now, and all is well
                    continue
                name, sample = item
                if isinstance(sample, EdgeExitError):
                    print(f"{name}: {sample}", file=sys.stderr)
                    continue
                answer = runner(sample)
                count += 1
                if answer.label != last:
                    act(name, answer)
                last = answer.label
        except KeyboardInterrupt:
            pass
        finally:
            live.close()
    print(f"{count} frames answered; {live.text()}")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
