"""
How the learning rate goes through a phase of a training.

Callers see COURSES and Course.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, OneCycleLR

from edgeexit.host.recipe import TrainingPart

DROP = 0.1


@dataclass(frozen=True, kw_only=True)
class Course:
    """
    *make* begins it: for an optimizer, the recipe's numbers, and how many steps the phase has.

    What it returns is stepped behind the optimizer. *has_drops*: the recipe's drops mean something.
    """

    make: Callable[[torch.optim.Optimizer, TrainingPart, int], LRScheduler]
    has_drops: bool = False


def _one_cycle(optimizer: torch.optim.Optimizer, part: TrainingPart, steps: int) -> LRScheduler:
    # One step more than there are: the schedule's last value would stop all learning.
    steps += 1
    return OneCycleLR(
        optimizer,
        part.learning_rate,
        total_steps=steps,
        # torch divides by zero where the warm-up is exactly the first step.
        pct_start=0.0 if part.warmup * steps == 1 else part.warmup,
        cycle_momentum=False,
    )


def _steps(optimizer: torch.optim.Optimizer, part: TrainingPart, steps: int) -> LRScheduler:
    rising = part.warmup * steps
    drops = [round(share * steps) for share in part.drops]

    def factor(step: int) -> float:
        risen = min(1.0, (step + 1) / rising) if rising else 1.0
        return float(risen * DROP ** sum(step >= drop for drop in drops))

    return LambdaLR(optimizer, factor)


# "one-cycle": Smith & Topin, arXiv 1708.07120. "steps": how ResNets for CIFAR were first trained
# (He et al. 2015), and since then most networks that papers prune.
COURSES: dict[str, Course] = {
    "one-cycle": Course(make=_one_cycle),
    "steps": Course(make=_steps, has_drops=True),
}
