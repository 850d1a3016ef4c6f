"""
A torch network that computes as its int8 file will: fake quantization, to train and to mend with.

Callers see Simulated. Hidden here: every function that the forward calls is numbered as it
passes by, so any network can be simulated without being rewritten, and what the converter
fuses (a batch norm and an activation into the layer before them) is found in one traced pass.
Weights are rounded per output channel, symmetric; activations per tensor, asymmetric, within
ranges read off the same histograms as the quantizer's. Gradients pass straight through the
rounding (Bengio et al. 2013; Jacob et al. 2018, arXiv 1712.05877, section 3).
"""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from edgeexit.errors import BadFile
from edgeexit.host.model import exit_outputs
from edgeexit.host.ranges import RANGES, Histogram

LAYERS = frozenset({"conv1d", "conv2d", "conv3d", "linear"})
NORM = "batch_norm"
SUMS = frozenset({"add", "__add__", "add_", "__iadd__", "__radd__", "sub", "__sub__", "mul"})
ACTIVATIONS = frozenset({"relu", "relu_", "relu6", "hardtanh"})

Visit = Callable[[int, str, tuple[Any, ...], torch.Tensor], torch.Tensor]
"""Told a call's number, its function's name, its arguments and its result; may replace that."""

INPUT = -1  # the number of the network's input


class Simulated(nn.Module):
    """
    *model* with its weights and activations rounded as in int8; its parameters are the model's.

    *inputs* (N, ...) are typical samples as the network takes them, N >= 1, on which activation
    ranges are taken now and by every calibrate(); *ranges* is one of ranges.RANGES. Batch norms
    keep their statistics in train mode too, for the int8 file has them folded in.
    """

    def __init__(self, model: nn.Module, inputs: torch.Tensor, ranges: str = "minmax") -> None:
        super().__init__()
        self.model, self._choice = model, ranges
        self._inputs = inputs
        model.eval()
        self._calls = _traced(model, inputs[:1])
        self._ranges: dict[int, tuple[float, float]] = {}
        self.calibrate()
        self.train(False)

    def calibrate(self) -> None:
        """
        Take the activation ranges anew; do so when weights have moved.

        BadFile if a value is NaN or infinite.
        """
        rounded, ends = self._calls.rounded, {INPUT, *self._calls.logits}
        seen = {number: Histogram() for number in (INPUT, *rounded)}
        _count(seen[INPUT], self._inputs)

        def look(
            number: int, _name: str, _args: tuple[Any, ...], result: torch.Tensor
        ) -> torch.Tensor:
            if number in rounded:
                _count(seen[number], result)
            return result

        was_training = self.model.training
        self.model.eval()
        with torch.no_grad(), _Calls(look, self._rounded_weight):
            self.model(self._inputs)
        self.model.train(was_training)
        self._freeze_norms()
        self._ranges = {
            number: (RANGES["minmax"] if number in ends else RANGES[self._choice])(histogram)
            for number, histogram in seen.items()
        }

    def train(self, mode: bool = True) -> "Simulated":
        """As nn.Module.train, but batch norms stay in eval mode."""
        super().train(mode)
        self._freeze_norms()
        return self

    def _freeze_norms(self) -> None:
        for module in self.model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.train(False)

    def forward(self, x: torch.Tensor) -> Any:
        """What the model returns, computed in steps of int8."""
        return self._run(x, None)

    def _run(self, x: torch.Tensor, before: Visit | None) -> Any:
        def visit(
            number: int, name: str, args: tuple[Any, ...], result: torch.Tensor
        ) -> torch.Tensor:
            if before is not None:
                result = before(number, name, args, result)
            if number not in self._ranges:
                return result
            return _rounded(result, *self._ranges[number])

        x = _rounded(x, *self._ranges[INPUT])  # outside: the model's own calls are numbered
        with _Calls(visit, self._rounded_weight):
            return self.model(x)

    def _rounded_weight(self, weight: torch.Tensor) -> torch.Tensor:
        # A batch norm that is folded in later scales whole output channels, which changes
        # nothing about symmetric rounding per channel.
        peaks = weight.detach().abs().reshape(len(weight), -1).amax(1)
        scales = (peaks / 127).clamp(min=1e-30)
        zeros = torch.zeros(len(weight), dtype=torch.int32)
        rounded: torch.Tensor = torch.fake_quantize_per_channel_affine(
            weight, scales, zeros, 0, -127, 127
        )
        return rounded

    def correct_biases(self) -> int:
        """
        Shift the model's biases until every layer's mean output is the float network's.

        Empirical bias correction (Nagel et al. 2019, "Data-free quantization through weight
        equalization and bias correction", section 4.2): per output channel, before the
        activation, over the samples, in the order of execution, so that a layer is corrected
        behind layers that are. The bias is the batch norm's where one follows. Returns how many
        layers were shifted; those without a bias are left alone.
        """
        biases = {id(value): value for value in self.model.parameters()}
        wanted: dict[int, torch.Tensor] = {}
        shifted: set[int] = set()

        def remember(
            number: int, _name: str, _args: tuple[Any, ...], result: torch.Tensor
        ) -> torch.Tensor:
            if number in self._calls.biased:
                wanted[number] = _channel_means(result, self._calls.biased[number][1])
            return result

        def correct(
            number: int, _name: str, args: tuple[Any, ...], result: torch.Tensor
        ) -> torch.Tensor:
            place, axis = self._calls.biased.get(number, (0, 0))
            bias = biases.get(id(args[place])) if 0 < place < len(args) else None
            if bias is None or id(bias) in shifted:
                return result
            change = wanted[number] - _channel_means(result, axis)
            bias.add_(change)
            shifted.add(id(bias))
            shape = [1] * result.ndim
            shape[axis] = -1
            return result + change.reshape(shape)

        self.train(False)
        with torch.no_grad():
            with _Calls(remember, None):
                self.model(self._inputs)
            self._run(self._inputs, correct)
        self.calibrate()
        return len(shifted)


class _Calls(TorchFunctionMode):
    """Numbers the calls that make real numbers; *weight* is applied to what layers multiply by."""

    def __init__(self, visit: Visit, weight: Callable[[torch.Tensor], torch.Tensor] | None) -> None:
        super().__init__()
        self._visit, self._weight, self._number = visit, weight, 0

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        if name in LAYERS and self._weight is not None:
            args = (args[0], self._weight(args[1]), *args[2:])
        result = func(*args, **(kwargs or {}))
        if not isinstance(result, torch.Tensor) or name == "__get__":
            return result
        if not result.is_floating_point():
            return result
        # batch_norm's weight and bias come by name: put them where other layers have theirs.
        if name == NORM and kwargs:
            args = (*args[:3], kwargs.get("weight"), kwargs.get("bias"))
        number = self._number
        self._number += 1
        return self._visit(number, name, args, result)


class _Plan:
    """
    What one traced pass found, by numbers of calls.

    *rounded*: those whose results are tensors of the int8 file; *logits*: the exits';
    *biased*: those that end a layer -> (which argument is its bias, axis of its channels).
    """

    def __init__(self) -> None:
        self.rounded: set[int] = set()
        self.logits: set[int] = set()
        self.biased: dict[int, tuple[int, int]] = {}


def _traced(model: nn.Module, inputs: torch.Tensor) -> _Plan:
    makers: dict[int, int] = {}
    kept: list[torch.Tensor] = []  # an id means something only as long as its tensor lives
    names: list[str] = []
    reads: list[list[int]] = []

    def look(number: int, name: str, args: tuple[Any, ...], result: torch.Tensor) -> torch.Tensor:
        reads.append([makers[id(arg)] for arg in _tensors(args) if id(arg) in makers])
        names.append(name)
        kept.append(result)
        makers[id(result)] = number
        return result

    with torch.no_grad():
        with _Calls(look, None):
            returned = model(inputs)
        outputs = exit_outputs(_Returned(returned), inputs)
    plan = _Plan()
    plan.logits = {makers[id(logits)] for logits in outputs.values() if id(logits) in makers}
    readers = Counter(source for row in reads for source in row)
    fused: set[int] = set()
    for number, name in enumerate(names):
        sources = reads[number]
        if len(sources) != 1 or readers[sources[0]] != 1 or sources[0] in plan.logits:
            continue
        before = names[sources[0]]
        is_norm = name == NORM and before in LAYERS
        if is_norm or (name in ACTIVATIONS and before in LAYERS | SUMS | {NORM}):
            fused.add(sources[0])
    plan.rounded = set(range(len(names))) - fused
    for number, name in enumerate(names):
        follows = [names[source] for source in reads[number]]
        if name == NORM and follows and follows[0] in LAYERS:
            plan.biased[number] = (4, 1)
            plan.biased.pop(reads[number][0], None)
        elif name in LAYERS:
            plan.biased[number] = (2, -1 if name == "linear" else 1)
    return plan


class _Returned(nn.Module):
    """Gives back what a model returned, for exit_outputs to name."""

    def __init__(self, value: Any) -> None:
        super().__init__()
        self._value = value

    def forward(self, _x: torch.Tensor) -> Any:
        return self._value


def _tensors(args: Sequence[Any]) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    for arg in args:
        if isinstance(arg, torch.Tensor):
            found.append(arg)
        elif isinstance(arg, list | tuple):
            found += _tensors(arg)
    return found


def _rounded(values: torch.Tensor, low: float, high: float) -> torch.Tensor:
    low, high = min(low, 0.0), max(high, 0.0)
    scale = max(high - low, 1e-30) / 255
    zero = max(-128, min(127, round(-128 - low / scale)))
    result: torch.Tensor = torch.fake_quantize_per_tensor_affine(values, scale, zero, -128, 127)
    return result


def _count(histogram: Histogram, values: torch.Tensor) -> None:
    try:
        histogram.add(values.numpy())
    except ValueError as error:
        raise BadFile(f"the network computes {error} for real samples") from error


def _channel_means(values: torch.Tensor, axis: int) -> torch.Tensor:
    return values.movedim(axis, 0).flatten(1).mean(1)
