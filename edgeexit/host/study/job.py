"""
A trial of a search as files: the job, and what came out of it.

Callers see Job and Result. A job's folder is named by the SHA-256 of what the job
does, whatever lies where; docs/formats.md ("Search") is the description for people. Hidden here:
the strict reading of both documents.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from edgeexit.errors import BadFile
from edgeexit.files import Table, digest_of, json_bytes, read_json, write_file
from edgeexit.host.study.space import Judge

FORMAT = 1
JOB, RESULT, MODEL = "job.json", "result.json", "model.pt"

Interval = tuple[float, float, float]


# ---------------------------------------------------------------- the job


@dataclass(frozen=True, kw_only=True)
class Job:
    """
    What a trial does; *digest* is that of everything but *places*.

    *model*, *data* and *ranges* are SHA-256 of the checkpoint, of the training samples with
    their split, and of the samples for activation ranges (None without int8). *recipe* is a
    pruning recipe without its data, None for the network as it is; *kept* the exits that are
    judged. *places* say where all that lies: "model", "data" and "yardstick" relative to the
    job's folder or absolute, "kind" and "ranges" (None: training samples).
    """

    model: str
    arch: str | None
    data: str
    ranges: str | None
    recipe: Mapping[str, Any] | None
    kept: tuple[str, ...]
    judge: Judge
    tools: Mapping[str, str]
    places: Mapping[str, str | None]

    @property
    def identity(self) -> dict[str, Any]:
        """What makes this job another one than others, as plain values."""
        return {
            "model": self.model,
            "arch": self.arch,
            "data": self.data,
            "ranges": self.ranges,
            "recipe": None if self.recipe is None else dict(self.recipe),
            "kept": list(self.kept),
            "judge": asdict(self.judge),
            "tools": dict(self.tools),
        }

    @property
    def digest(self) -> str:
        """SHA-256 of the identity, in hexadecimal; the name of the job's folder."""
        return digest_of(json_bytes(self.identity))

    def save(self, folder: Path) -> None:
        """Write job.json into *folder*, unless it is there."""
        path = folder / JOB
        if not path.exists():
            write_file(
                path,
                json_bytes(
                    {"format": FORMAT, "identity": self.identity, "places": dict(self.places)}
                ),
            )

    @classmethod
    def load(cls, folder: Path) -> "Job":
        """
        The job in *folder*. UsageError if there is none; BadFile if it is damaged, or another
        one than the folder's name says.
        """
        document = read_json(folder / JOB)
        document.expect_format(FORMAT)
        document.only("format", "identity", "places")
        table, places = document.table("identity"), document.table("places")
        table.only("model", "arch", "data", "ranges", "recipe", "kept", "judge", "tools")
        judge = table.table("judge")
        judge.only(*Judge.__dataclass_fields__)
        job = cls(
            model=table.get("model", str),
            arch=_optional(table, "arch"),
            data=table.get("data", str),
            ranges=_optional(table, "ranges"),
            recipe=None
            if table.values.get("recipe") is None
            else dict(table.table("recipe").values),
            kept=tuple(table.list_of("kept", str)),
            judge=Judge(
                **{key: judge.get(key, type(value)) for key, value in vars(Judge()).items()}
            ),
            tools=dict(table.table("tools").values),
            places={key: _optional(places, key) for key in places.values},
        )
        if job.digest != folder.resolve().name:
            raise BadFile(
                f"{folder / JOB}: altered: its digest is not the folder's name",
                hint=f"remove {folder} and search again",
            )
        return job


# ---------------------------------------------------------------- the result


@dataclass(frozen=True, kw_only=True)
class Leaving:
    """
    What it is worth to leave at exit *name*, and what it costs with the kept exits before it.

    *ratio* (median over the passes, and its 95 % interval) is to the network before, its final exit
    alone, in the same race; it and *ms* are None where nothing was timed.
    """

    name: str
    float_accuracy: float
    int8_accuracy: float | None
    macs: int
    ms: float | None
    ratio: Interval | None

    @property
    def accuracy(self) -> float:
        """As int8 if that was asked for."""
        return self.float_accuracy if self.int8_accuracy is None else self.int8_accuracy


@dataclass(frozen=True, kw_only=True)
class Chain:
    """The kept exits with one threshold: *rates* of leaving, and the means over them."""

    accuracy: float
    rates: tuple[float, ...]
    ms: float
    ratio: float


@dataclass(frozen=True, kw_only=True)
class Result:
    """
    What came out of the job *job*: *refused* says why nothing did, else None.

    *macs* are what the kept exits need, *parameters* are all of the network's; *checkpoint* is
    the SHA-256 of model.pt, None for the network before. *yardstick_ms* is what that network
    took in the race.
    """

    job: str
    refused: str | None = None
    checkpoint: str | None = None
    samples: int = 0
    macs: int = 0
    parameters: int = 0
    exits: tuple[Leaving, ...] = ()
    chain: Chain | None = None
    yardstick_ms: float | None = None
    cpu: str = ""
    seconds: float = 0.0

    @property
    def best(self) -> Leaving:
        """The exit with the most right answers, the earliest of equals."""
        return max(self.exits, key=lambda one: one.accuracy)

    @property
    def final(self) -> Leaving:
        """The final exit."""
        return self.exits[-1]

    def to_document(self) -> dict[str, Any]:
        """As plain values."""
        return {"format": FORMAT, **asdict(self)}

    @classmethod
    def load(cls, folder: Path) -> "Result | None":
        """The result in *folder*, None if it is not there yet. BadFile if it is damaged."""
        path = folder / RESULT
        if not path.exists():
            return None
        try:
            return cls._of(read_json(path), folder.resolve().name)
        except BadFile as error:
            raise BadFile(str(error), hint=f"remove {path} and run the job again") from error

    @classmethod
    def _of(cls, table: Table, job: str) -> "Result":
        table.expect_format(FORMAT)
        table.only("format", *cls.__dataclass_fields__)
        chain = None if table.values.get("chain") is None else table.table("chain")
        result = cls(
            job=table.get("job", str),
            refused=_optional(table, "refused"),
            checkpoint=_optional(table, "checkpoint"),
            samples=table.get("samples", int),
            macs=table.get("macs", int),
            parameters=table.get("parameters", int),
            exits=tuple(_leaving(one) for one in table.tables("exits")),
            chain=None
            if chain is None
            else Chain(
                accuracy=chain.get("accuracy", float),
                rates=tuple(chain.list_of("rates", float)),
                ms=chain.get("ms", float),
                ratio=chain.get("ratio", float),
            ),
            yardstick_ms=_number(table, "yardstick_ms"),
            cpu=table.get("cpu", str),
            seconds=table.get("seconds", float),
        )
        if result.job != job:
            raise BadFile(f"{table.where}: is the result of the job {result.job[:12]}")
        if result.refused is None and not result.exits:
            raise BadFile(f"{table.where}: exits: expected one or more")
        return result


def _leaving(table: Table) -> Leaving:
    table.only(*Leaving.__dataclass_fields__)
    ratio = None
    if table.values.get("ratio") is not None:
        middle, low, high = table.list_of("ratio", float, length=3)
        ratio = (middle, low, high)
    return Leaving(
        name=table.get("name", str),
        float_accuracy=table.get("float_accuracy", float),
        int8_accuracy=_number(table, "int8_accuracy"),
        macs=table.get("macs", int),
        ms=_number(table, "ms"),
        ratio=ratio,
    )


def _optional(table: Table, key: str) -> str | None:
    return None if table.values.get(key) is None else table.get(key, str)


def _number(table: Table, key: str) -> float | None:
    return None if table.values.get(key) is None else table.get(key, float)
