"""What the commands that train share: a bar for each epoch and a line when it ends."""

from typing import TYPE_CHECKING, Any

import click

from edgeexit.cli import progress

if TYPE_CHECKING:
    from edgeexit.host.fit import Step


class Bars:
    """One bar for each epoch, one line when it ends; *whole_epochs* have ended."""

    def __init__(self) -> None:
        self._bar: Any = None
        self.whole_epochs = 0

    def __call__(self, step: "Step", what: str = "") -> None:
        """Show *step* of the training *what*."""
        label = f"{what}  epoch {step.epoch}/{step.epochs} ({step.phase})".strip()
        if step.accuracies is not None:
            self.close()
            self.whole_epochs = step.epoch
            figures = "  ".join(f"{k} {100 * v:.2f} %" for k, v in step.accuracies.items())
            best = "  (best so far)" if step.is_best else ""
            click.echo(f"{label}  {figures}{best}", err=True)
            return
        if self._bar is None:
            self._bar = progress(length=step.batches, label=label, show_pos=True)
            self._bar.__enter__()
        self._bar.update(1)

    def close(self) -> None:
        """End the bar under way, if there is one."""
        if self._bar is not None:
            self._bar.__exit__(None, None, None)
            self._bar = None
