"""Show the steps of a long job on stderr: a line when one ends, its share on a terminal."""

import sys
from time import perf_counter

import click


class Steps:
    """
    Called with a step's name and how far it has come (0..1); 1 ends it.

    *seconds* holds how long each finished step took. On a terminal the running step's share and
    the time it still needs are shown; elsewhere only a line for each step that has ended.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._name = ""
        self._started = perf_counter()
        self._is_terminal = sys.stderr is not None and sys.stderr.isatty()

    def __call__(self, name: str, done: float) -> None:
        """Tell that the step *name* has come as far as *done*."""
        if name != self._name:
            # A step that tells only its end began when the one before it ended.
            self._name = name
            if name in self.seconds or done < 1.0:
                self._started = perf_counter()
        elapsed = perf_counter() - self._started
        if done >= 1.0:
            self.seconds[name] = self.seconds.get(name, 0.0) + elapsed
            click.echo(f"{self._erase}{name:<20} {elapsed:6.1f} s", err=True)
            self._started = perf_counter()
            self._name = ""
        elif self._is_terminal:
            left = f", {elapsed / done * (1 - done):.0f} s left" if done > 0.02 else ""
            click.echo(f"{self._erase}{name:<20} {done:5.0%}{left}", err=True, nl=False)

    @property
    def _erase(self) -> str:
        return "\r\x1b[K" if self._is_terminal else ""
