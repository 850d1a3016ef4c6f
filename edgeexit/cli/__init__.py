"""
The command line: one thin file per command, imported only when that command is used.

Results go to stdout, everything else to stderr. Every refusal becomes one line, a hint and
the exit code of its class; anything else that escapes is a bug and says so.
"""

import importlib
import math
import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import click

from edgeexit.errors import DeviceError, EdgeExitError, UsageError, from_os_error, printable

_PROGRAM = "edgeexit"
MOST_SHOWN = 2000
_MOST_COLUMNS = 110

COMMANDS = {
    "attach": "give a plain network exits, and show where they can go",
    "train": "train a multi-exit network, from a recipe or further",
    "prune": "make a trained network smaller, its exits attached",
    "search": "try many ways to prune, and keep the best ones",
    "convert": "turn a checkpoint into a bundle of int8 segments",
    "profile": "measure latency and energy of each exit on a device",
    "compare": "compare two profiles, exit by exit",
    "tune": "choose exits and thresholds from measurements",
    "verify": "recompute a policy and its certificate from the files",
    "run": "classify, stopping at the first exit that is sure enough",
    "service": "let systemd keep `run` going: install, status, uninstall",
    "evaluate": "measure accuracy, exit rates and latency on labelled samples",
    "deploy": "make a bundle what boards run, tested there before",
    "rollback": "make boards run what they ran before",
    "inspect": "show what a bundle holds",
    "devices": "list the known boards; which one is this?",
    "meters": "list the energy meters of this machine, and test one",
    "calibration": "make and check sets of labelled samples",
    "hosts": "name the boards that are reached over ssh, and check them",
    "setup": "put edgeexit on a board that has only Python",
    "uninstall": "take edgeexit off a board again",
    "doctor": "find what would ruin a run, and what mends it",
    "demo": "profile, tune and run the shipped example",
}


# Called by other machines, not by people: not listed.
HIDDEN = ("agent",)


class LazyGroup(click.Group):
    """A click group that imports edgeexit.cli.NAME only when NAME is called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The names of all commands, in the order in which they are used."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import and return one command."""
        if cmd_name not in COMMANDS and cmd_name not in HIDDEN:
            return None
        module = importlib.import_module(f"edgeexit.cli.{cmd_name}")
        command = module.command
        assert isinstance(command, click.Command)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Like click's, but an unknown command names the nearest one."""
        from edgeexit.names import unknown

        if args and not args[0].startswith("-") and args[0] not in (*COMMANDS, *HIDDEN):
            raise unknown(args[0], COMMANDS, "command")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the commands without importing them: `--help` must be quick on a small board."""
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(
    cls=LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Exit codes: 0 ok, 1 a bug, 2 usage, 3 bad file, 4 unsupported, 5 device, "
    "6 disturbed measurement, 7 target out of reach, 8 busy, 9 parity, 10 self-test, 11 storage, "
    "130 interrupted, 143 ended by SIGTERM.",
)
@click.version_option(package_name="edgeexit", prog_name="edgeexit")
def main() -> None:
    """
    Early-exit networks on small ARM boards: convert, profile, tune, run.

    \b
    edgeexit convert model.pt          # quantize and cut -> model.edgeexit/
    edgeexit profile --device host     # ms per exit on this machine
    edgeexit tune --max-accuracy-drop 0.01
    edgeexit run image.png             # label, confidence, exit, ms
    """


def entry(argv: Sequence[str] | None = None) -> int:
    """
    Run the command line with *argv* (default: the process's) and return its exit code.

    Every exception ends here as one line on stderr. With EDGEEXIT_DEBUG=1 in the environment a
    bug shows its traceback as well.
    """
    args = sys.argv[1:] if argv is None else list(argv)

    def called() -> None:
        if "_EDGEEXIT_COMPLETE" in os.environ:  # the shell asks for completions
            main.main(args=args, prog_name=_PROGRAM)
        # Not main.main(): that turns a closed pipe into exit code 1 and an EOFError into Ctrl-C.
        with main.make_context(_PROGRAM, args) as context:
            main.invoke(context)
        if sys.stdout is not None:
            sys.stdout.flush()

    return guarded(called)


def guarded(work: Callable[[], object]) -> int:
    """The exit code of *work*: whatever it raises becomes one line on stderr, as in entry."""
    try:
        work()
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message(), err=True)
        return error.exit_code
    except click.exceptions.Exit as error:
        return error.exit_code
    except BrokenPipeError:
        return _pipe_closed()
    except (Exception, KeyboardInterrupt) as error:
        return _refuse(*explained(error))
    return 0


def explained(error: BaseException) -> tuple[str, str | None, int]:
    """What *error* means for whoever called: a message, a hint or None, and the exit code."""
    if isinstance(error, OSError):
        error = from_os_error(error) or error
    match error:
        case EdgeExitError():
            return str(error), error.hint, error.exit_code
        case click.UsageError():
            command = error.ctx.command_path if error.ctx else _PROGRAM
            return error.format_message(), f"{command} --help shows how", 2
        case click.ClickException():
            return error.format_message(), None, error.exit_code
        case click.Abort() | KeyboardInterrupt():
            return "interrupted", None, 130
        case MemoryError():
            hint = "close other programs, or give fewer samples"
            return "out of memory", hint, DeviceError.exit_code
    return _bug(error)


def script() -> None:
    """
    The console script `edgeexit`.

    SIGTERM ends it as if every block were left by itself: no temporary folder or lock stays.
    """
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    sys.exit(entry())


def _pipe_closed() -> int:
    # The reader of our output went away (`| head`): nothing is wrong. What is still buffered
    # must go nowhere, or Python complains at its end.
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except BrokenPipeError:
            os.dup2(nowhere, stream.fileno())
    os.close(nowhere)
    return 0


def _bug(error: BaseException) -> tuple[str, str | None, int]:
    is_debugged = os.environ.get("EDGEEXIT_DEBUG") == "1"
    if is_debugged:
        click.echo("".join(traceback.format_exception(error)), err=True, nl=False)
    frame = traceback.extract_tb(error.__traceback__)[-1]
    place = f"{os.path.basename(frame.filename)}:{frame.lineno}"  # noqa: PTH119
    hint = (
        "please report it with this line and the command"
        if is_debugged
        else "EDGEEXIT_DEBUG=1 shows more; please report it with that and the command"
    )
    return f"a bug in edgeexit: {type(error).__name__} at {place}: {error}", hint, 1


def _refuse(message: str, hint: str | None, code: int) -> int:
    show_error(message)
    if hint:
        click.echo(f"Hint: {one_line(hint)}", err=True)
    return code


def require_host(command: str) -> None:
    """UsageError unless what *command* needs beside the device side is installed."""
    from importlib.util import find_spec

    names = ("torch", "litert_torch", "ai_edge_quantizer")
    absent = [name for name in names if not find_spec(name)]
    if absent:
        raise UsageError(
            f"{command} needs the host side; not installed here: {', '.join(absent)}",
            hint='pip install "edgeexit[torch]" (see README, "Install")',
        )


def require_remote(command: str) -> None:
    """UsageError unless what *command* needs to reach boards over ssh is installed."""
    from importlib.util import find_spec

    absent = [name for name in ("asyncssh", "tomlkit") if not find_spec(name)]
    if absent:
        raise UsageError(
            f"{command} needs ssh; not installed here: {', '.join(absent)}",
            hint='pip install "edgeexit[ssh]"',
        )


def show_error(message: str) -> None:
    """Print *message* on stderr as one line in which no character does harm."""
    click.echo(f"Error: {one_line(message)}", err=True)


def one_line(text: str) -> str:
    """*text* with every run of blanks and line ends as one blank, made printable, not endless."""
    line = " ".join(text.split())
    return printable(line if len(line) <= MOST_SHOWN else f"{line[:MOST_SHOWN]}...")


def finite(context: click.Context, option: click.Parameter, value: float | None) -> float | None:
    """Callback of an option: refuse NaN and infinity, which click's own ranges let pass."""
    if value is not None and not math.isfinite(value):
        raise click.BadParameter(f"{value} is not a finite number.", context, option)
    return value


def percentage(context: click.Context, option: click.Parameter, value: str | None) -> float | None:
    """Callback of an option: "1%" and "0.01" are both 0.01."""
    if value is None:
        return None
    text = value.strip()
    try:
        number = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        raise click.BadParameter(f"{value!r} is neither 1% nor 0.01.", context, option) from None
    return finite(context, option, number)


class StatusLine:
    """One line on the terminal in the place of the last one; silent elsewhere."""

    def __init__(self) -> None:
        self.is_shown = sys.stderr is not None and sys.stderr.isatty()
        self._width = 0

    def __enter__(self) -> "StatusLine":
        return self

    def __exit__(self, *_: object) -> None:
        self.wipe()

    def show(self, text: str) -> None:
        """Put *text* there, as much of it as a line takes."""
        if self.is_shown:
            line = one_line(text)[:_MOST_COLUMNS]
            click.echo("\r" + line.ljust(self._width), err=True, nl=False)
            self._width = len(line)

    def wipe(self) -> None:
        """Leave nothing there."""
        if self._width:
            click.echo("\r" + " " * self._width + "\r", err=True, nl=False)
            self._width = 0


def progress(*args: Any, **kwargs: Any) -> Any:
    """A click progress bar on stderr: with rate and ETA on a terminal, silent elsewhere."""
    kwargs.setdefault("file", sys.stderr)
    kwargs.setdefault("show_eta", True)
    kwargs.setdefault("hidden", sys.stderr is None or not sys.stderr.isatty())
    return click.progressbar(*args, **kwargs)
