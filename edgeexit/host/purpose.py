"""What a network is for, where its file does not say: its classes and its preprocessing."""

import re
from dataclasses import dataclass, replace
from pathlib import Path

from edgeexit.errors import BadFile, UsageError, is_plain
from edgeexit.files import read_bytes, read_toml
from edgeexit.preprocess import Preprocess
from edgeexit.samples import find_set, is_set

MAX_NAME = 200  # characters of a class name


@dataclass(frozen=True, kw_only=True)
class Purpose:
    """
    What a plain state_dict, an ONNX or a .tflite file does not say.

    For images *input_shape* follows from the rest (or from the file).
    """

    class_names: tuple[str, ...]
    preprocess: Preprocess
    input_shape: tuple[int, ...] | None = None
    calibration_set: str | None = None

    @classmethod
    def of_samples(cls, name: str | Path | None) -> "Purpose | None":
        """What --calibration says of a network: something if it names a calibration set."""
        return cls.of_set(str(name)) if name is not None and is_set(name) else None

    @classmethod
    def of_set(cls, name: str) -> "Purpose":
        """What the calibration set *name* says. UsageError if there is none of that name."""
        owner = find_set(name)
        is_found_by_name = is_set(owner.name) and find_set(owner.name).digest == owner.digest
        input_shape = None
        if owner.preprocess.kind == "array":
            input_shape = (1, *owner.split("ranges").samples.shape[1:])
        return cls(
            class_names=owner.class_names,
            preprocess=owner.preprocess,
            input_shape=input_shape,
            calibration_set=owner.name if is_found_by_name else name,
        )

    @classmethod
    def told(
        cls,
        calibration: str | Path | None,
        labels: tuple[str, ...] | None,
        preprocess: Preprocess | None,
    ) -> "Purpose | None":
        """
        What --calibration, --labels and --preprocess say together; the last two win.

        None if they leave the classes or the preprocessing open.
        """
        of_set = cls.of_samples(calibration)
        if of_set is not None:
            return replace(
                of_set,
                class_names=labels or of_set.class_names,
                preprocess=preprocess or of_set.preprocess,
            )
        if labels is None or preprocess is None:
            return None
        return cls(class_names=labels, preprocess=preprocess)

    @classmethod
    def said(
        cls,
        where: str,
        calibration: str | Path | None,
        labels: tuple[str, ...] | None,
        preprocess: Preprocess | None,
    ) -> "Purpose":
        """As told, for the file *where* that says nothing itself: UsageError instead of None."""
        told = cls.told(calibration, labels, preprocess)
        if told is not None:
            return told
        if calibration is not None and not Path(calibration).exists():
            find_set(str(calibration))  # a name that was mistyped: this says which there are
        open_ends = {
            ("classes", "--labels FILE.txt"): labels is None,
            ("inputs", "--preprocess FILE.toml"): preprocess is None,
        }
        left = [words for words, is_open in open_ends.items() if is_open]
        raise UsageError(
            f"{where}: does not say which {' and '.join(what for what, _ in left)} it is for",
            hint=f"give {' and '.join(option for _, option in left)}, or --calibration SET, a "
            "set, which says both",
        )

    def fitting(
        self, where: str, input_shape: tuple[int, ...], layout: str | None = None
    ) -> "Purpose":
        """
        This, for the file *where* that takes *input_shape*; UsageError if that does not fit.

        Pictures lie in *layout* ("nchw", "nhwc"), whatever the preprocessing says; without one
        they lie channels-first, unless only channels-last fits.
        """
        preprocess = self.preprocess
        made = self.input_shape or input_shape
        if preprocess.kind == "image":
            height, width, channels = preprocess.sample_shape
            axes = {"nchw": (1, channels, height, width), "nhwc": (1, height, width, channels)}
            fits = [name for name, shape in axes.items() if shape == input_shape]
            layout = layout or (*fits, "nchw")[0]
            preprocess, made = replace(preprocess, layout=layout), axes[layout]
        if input_shape != made:
            raise UsageError(
                f"{where}: takes {list(input_shape)}, its preprocessing makes {list(made)}",
                hint="name another calibration set, or give --preprocess FILE.toml",
            )
        return replace(self, preprocess=preprocess, input_shape=input_shape)


def read_labels(path: Path) -> tuple[str, ...]:
    """The class names of a text file, one a line, in the order of the logits. BadFile if not."""
    return parse_labels(read_bytes(path), str(path))


def parse_labels(data: bytes, path: str) -> tuple[str, ...]:
    """As read_labels, of the bytes of a file called *path*."""
    try:
        lines = re.split("\r\n|\r|\n", data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise BadFile(f"{path}: expected class names as UTF-8 text, one a line") from error
    names = tuple(line.strip() for line in lines)
    while names and not names[-1]:
        names = names[:-1]
    if not names or not all(names):
        raise BadFile(f"{path}: expected one class name a line, found an empty one")
    seen: set[str] = set()
    for number, name in enumerate(names, start=1):
        if len(name) > MAX_NAME or not is_plain(name):
            raise BadFile(
                f"{path}: line {number}: {name[:40]!r}, expected a class name of at most "
                f"{MAX_NAME} characters, none of them a control character"
            )
        if name in seen:
            raise BadFile(f"{path}: {name!r} stands there twice, expected different class names")
        seen.add(name)
    return names


def read_preprocess(path: Path) -> Preprocess:
    """The preprocessing in a TOML file: the keys of a set's [preprocess], or that table itself."""
    table = read_toml(path)
    try:
        inside = table.table("preprocess") if "preprocess" in table else table
        return Preprocess.from_table(inside)
    except BadFile as error:
        hint = error.hint or "docs/formats.md, Preprocessing, says which keys there are"
        raise BadFile(str(error), hint=hint) from error
