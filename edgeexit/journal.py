"""
What `run` keeps while it answers: a rotating log of answers, and their summary.

A log FILE.jsonl that grows over its limit becomes FILE.jsonl.1, the older ones move up, and the
oldest goes: a board's card never fills.
"""

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from edgeexit.errors import storage
from edgeexit.files import encoded_json
from edgeexit.runtime import Prediction

LIMIT_BYTES = 10 << 20
KEPT_FILES = 3


class Journal:
    """Appends one JSON object a line to *path*, keeping KEPT_FILES older files. StorageError."""

    def __init__(self, path: Path, *, limit_bytes: int = LIMIT_BYTES) -> None:
        self._path, self._limit_bytes = path, limit_bytes
        with storage(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file: IO[bytes] = path.open("ab")

    def write(self, answer: Mapping[str, Any]) -> None:
        """Append *answer*, moving the file away first if it would become too long."""
        line = encoded_json(json.dumps(answer, ensure_ascii=False) + "\n")
        with storage(self._path):
            if self._file.tell() and self._file.tell() + len(line) > self._limit_bytes:
                self._rotate()
            self._file.write(line)
            self._file.flush()

    def _rotate(self) -> None:
        self._file.close()
        for number in range(KEPT_FILES, 0, -1):
            older = self._numbered(number - 1)
            if older.exists():
                older.replace(self._numbered(number))
        self._file = self._path.open("ab")

    def _numbered(self, number: int) -> Path:
        return self._path.with_name(f"{self._path.name}.{number}") if number else self._path

    def close(self) -> None:
        """Close the file; what could not be written then is a StorageError, too."""
        with storage(self._path):
            self._file.close()


class Summary:
    """Counts answers by exit, and how long they took."""

    def __init__(self, exits: tuple[str, ...]) -> None:
        self._exits = exits
        self._taken: Counter[int] = Counter()
        self._total_ns = 0
        self.failed = 0

    def add(self, prediction: Prediction) -> None:
        """Count one answer."""
        self._taken[prediction.exit] += 1
        self._total_ns += prediction.latency_ns

    @property
    def count(self) -> int:
        """Answers so far."""
        return self._taken.total()

    def text(self) -> str:
        """The summary in lines: answers, mean ms, and a histogram over exits."""
        count = self.count
        mean_ms = self._total_ns / count / 1e6 if count else 0.0
        lines = [f"{count} answered, {self.failed} failed, mean {mean_ms:.3f} ms"]
        width = max(map(len, self._exits))
        for index, name in enumerate(self._exits):
            share = self._taken[index] / count if count else 0.0
            bar = "#" * round(30 * share)
            lines.append(f"  {name:<{width}} {self._taken[index]:>7} {share:>6.1%} {bar}".rstrip())
        return "\n".join(lines)
