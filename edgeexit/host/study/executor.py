"""
Run a job in a process of its own on this machine, again if it is killed.

Callers see Running. Any other executor may do the same with run_job: a job's folder is all that
it needs.
"""

import os
import subprocess
import sys
from pathlib import Path
from time import monotonic

from edgeexit.errors import KINDS, Busy, EdgeExitError, storage
from edgeexit.host.study.job import RESULT
from edgeexit.host.study.trial import LOCK
from edgeexit.locks import is_held

LOG = "log.txt"
MOST_STARTS = 3
RETRY_S = 1.0
STOP_S = 10.0
INTERRUPTED = 130


class Running:
    """
    The job in *folder*, under way in a child, or elsewhere.

    While another process has it, nothing is started here; *waits*: one of this process's own
    children is about to. *failure* says why there will be no result: the child died three
    times. *jobs* children share this machine's processors.
    """

    def __init__(self, folder: Path, jobs: int, *, waits: bool = False) -> None:
        self.folder, self.jobs = folder, jobs
        self.failure: str | None = None
        self.starts = 0
        self._process: subprocess.Popen[bytes] | None = None
        self._next = monotonic() + (RETRY_S if waits else 0.0)

    def is_over(self) -> bool:
        """
        Look after the child; True once there is a result or a failure.

        What the child refuses for a reason outside of the job is raised here, in its own class.
        """
        if self._process is not None:
            code = self._process.poll()
            if code is None:
                return False
            self._process = None
            self._judge(code)
        if (self.folder / RESULT).exists():
            return True
        if self.failure is None and monotonic() >= self._next:
            if is_held(self.folder / LOCK):
                self._next = monotonic() + RETRY_S
            else:
                self._start()
        return self.failure is not None

    def stop(self) -> None:
        """End the child, if there is one; what it has done stays."""
        if self._process is None:
            return
        self._process.terminate()
        try:
            self._process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process = None

    def _start(self) -> None:
        self.starts += 1
        threads = max(1, len(os.sched_getaffinity(0)) // self.jobs)
        with storage(self.folder), (self.folder / LOG).open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "edgeexit.host.study.trial", str(self.folder)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={"OMP_NUM_THREADS": str(threads), **os.environ},
            )

    def _judge(self, code: int) -> None:
        if code == 0:
            return
        if code == INTERRUPTED:
            raise KeyboardInterrupt
        if code == Busy.exit_code:
            self.starts -= 1
            self._next = monotonic() + RETRY_S
            return
        message, hint = self._last_words()
        if code in KINDS:
            raise KINDS[code](message or f"{self.folder}: refused", hint=hint)
        if code > 0:
            raise EdgeExitError(
                f"{self.folder}: the trial ended with exit code {code}, a bug in edgeexit",
                hint=f"please report what {self.folder / LOG} ends with",
            )
        if self.starts >= MOST_STARTS:
            self.failure = f"its process was killed {self.starts} times (signal {-code})"

    def _last_words(self) -> tuple[str, str | None]:
        try:
            lines = (self.folder / LOG).read_text(errors="replace").splitlines()
        except OSError:
            return "", None
        found = {"Error: ": "", "Hint: ": ""}
        for line in lines:
            for start in found:
                if line.startswith(start):
                    found[start] = line.removeprefix(start)
                    if start == "Error: ":
                        found["Hint: "] = ""
        return found["Error: "], found["Hint: "] or None
