"""
The command line: one thin file per command, imported only when that command is used.

Results go to stdout, everything else to stderr. Every refusal becomes one line, a hint and
the exit code of its class; anything else that escapes is a bug and says so.
"""

import importlib
import sys
from collections.abc import Sequence
from typing import Any

import click

from edgeexit.errors import EdgeExitError, StorageError

COMMANDS = {
    "train": "train a multi-exit network from a recipe",
    "convert": "turn a checkpoint into a bundle of int8 segments",
    "profile": "measure the latency of each exit on a device",
    "tune": "choose exits and thresholds from measurements",
    "run": "classify, stopping at the first exit that is sure enough",
    "evaluate": "measure accuracy, exit rates and latency on labelled samples",
    "inspect": "show what a bundle holds",
    "calibration": "make and check sets of labelled samples",
    "demo": "profile, tune and run the shipped example",
}


class LazyGroup(click.Group):
    """A click group that imports edgeexit.cli.NAME only when NAME is called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The names of all commands, in the order in which they are used."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import and return one command."""
        if cmd_name not in COMMANDS:
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

        if args and not args[0].startswith("-") and args[0] not in COMMANDS:
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
    "6 disturbed measurement, 7 target out of reach, 8 busy, 9 parity, 10 self-test, 11 storage.",
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
    """Run the command line with *argv* (default: the process's) and return its exit code."""
    try:
        code = main.main(args=None if argv is None else list(argv), standalone_mode=False)
        # click turns Exit(code) into this value; commands themselves return None.
        if isinstance(code, int):
            return code
    except EdgeExitError as error:
        return _refuse(str(error), error.hint, error.exit_code)
    except click.exceptions.Exit as error:
        return error.exit_code
    except click.Abort:
        return _refuse("interrupted", None, 130)
    except click.UsageError as error:
        command = error.ctx.command_path if error.ctx else "edgeexit"
        return _refuse(error.format_message(), f"{command} --help shows how", 2)
    except click.ClickException as error:
        return _refuse(error.format_message(), None, error.exit_code)
    except KeyboardInterrupt:
        return _refuse("interrupted", None, 130)
    except BrokenPipeError:
        # The reader of our output went away (`| head`): nothing is wrong.
        sys.stderr.close()
        return 0
    except OSError as error:
        if error.errno in (28, 30, 5, 122):  # ENOSPC, EROFS, EIO, EDQUOT
            return _refuse(
                f"{error.filename or 'storage'}: {error.strerror}", None, StorageError.exit_code
            )
        raise
    return 0


def script() -> None:
    """The console script `edgeexit`."""
    sys.exit(entry())


def _refuse(message: str, hint: str | None, code: int) -> int:
    line = " ".join(message.split())
    click.echo(f"Error: {line}", err=True)
    if hint:
        click.echo(f"Hint: {hint}", err=True)
    return code


def progress(*args: Any, **kwargs: Any) -> Any:
    """A click progress bar on stderr: with rate and ETA on a terminal, silent elsewhere."""
    kwargs.setdefault("file", sys.stderr)
    kwargs.setdefault("show_eta", True)
    kwargs.setdefault("hidden", not sys.stderr.isatty())
    return click.progressbar(*args, **kwargs)
