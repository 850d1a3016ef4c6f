"""
Cut one multi-exit .tflite into a chain of segments, one per exit.

Segment k holds the operators that exit k's logits need and no earlier segment holds; it hands
over its logits and every value that a later segment reads. The chain computes the very bytes
that the uncut model computes. Everything is bound by tensor name, never by output order.
Hidden here: in which order the exits lie, that a value may pass over a segment, that an exit
may be another's ancestor, and that what is computed from constants alone counts as a constant.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from edgeexit.errors import Unsupported, UsageError
from edgeexit.names import unknown
from edgeexit.tflite import Model, TensorSpec, read_model, write_model

__all__ = [
    "Model",
    "SegmentPlan",
    "TensorSpec",
    "cut",
    "drop_dead",
    "exit_order",
    "model_io",
    "read_model",
    "transposes",
    "uncut",
]


@dataclass(frozen=True, kw_only=True)
class SegmentPlan:
    """
    One segment: a complete .tflite file and what crosses its edges.

    inputs are the model's inputs and earlier segments' outputs that it reads; outputs[0] are
    the logits of *exit*, the rest what later segments read. Names are tensor names in the
    file. operators are indices into the uncut model, ascending. shared_bytes counts constants
    that an earlier segment holds too (they are stored twice).
    """

    data: bytes
    exit: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    operators: tuple[int, ...]
    shared_bytes: int = 0


def model_io(
    data: bytes, where: str = "model.tflite"
) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    """Inputs and outputs of a .tflite, in the file's order. Errors as read_model."""
    model = read_model(data, where)
    return _specs(model, model.inputs), _specs(model, model.outputs)


def exit_order(data: bytes, exits: Mapping[str, str], where: str = "model.tflite") -> list[str]:
    """
    The names of *exits* in the order in which the cut puts them: earliest first.

    An exit comes before another if its ancestors, or the operators it shares with other
    exits (the road up to its own head), are a proper part of the other's; where neither is,
    the order of *exits* decides. Errors as cut.
    """
    return list(_Roads(read_model(data, where), exits).ancestors)


def cut(
    data: bytes,
    exits: Mapping[str, str],
    kept: Sequence[str] | None = None,
    *,
    where: str = "model.tflite",
) -> list[SegmentPlan]:
    """
    Cut the .tflite *data* into one segment per kept exit, earliest first.

    *exits* maps each exit's name to the name of its logits tensor; *kept* names those to keep
    (default all, any order). Operators that reach no kept exit are left out. The last segment
    ends at the last kept exit. Equal arguments give equal bytes.

    BadFile for a damaged file. Unsupported for a file that cannot be cut (see read_model) and
    for an exit that no operator computes, that is computed with another by one operator, or
    that shares no operator with the other exits. UsageError for unknown names.
    """
    model = read_model(data, where)
    roads = _Roads(model, exits)
    plans: list[SegmentPlan] = []
    groups = roads.groups(roads.choose(kept))
    maker = model.maker
    stored: set[int] = set()
    for position, (name, operators) in enumerate(groups.items()):
        logits = roads.tensor[name]
        made = {t for i in operators for t in model.operators[i].outputs}
        read = dict.fromkeys(t for i in operators for t in model.operators[i].inputs)
        inputs = [t for t in read if t not in made and (t in maker or t in model.inputs)]
        later = {
            t
            for group in list(groups.values())[position + 1 :]
            for i in group
            if i not in roads.constant
            for t in model.operators[i].inputs
        }
        handed = made & later - {logits} - roads.constant_tensors
        outputs = [logits, *sorted(handed)]
        _check_names(model, {*inputs, *outputs})
        buffers = {
            model.tensors[t].buffer: tensor.size
            for t in read
            if t >= 0 and (tensor := model.tensors[t].constant) is not None
        }
        plans.append(
            SegmentPlan(
                data=write_model(model, operators, inputs, outputs, description="edgeexit segment"),
                exit=name,
                inputs=_specs(model, inputs),
                outputs=_specs(model, outputs),
                operators=tuple(operators),
                shared_bytes=sum(size for b, size in buffers.items() if b in stored),
            )
        )
        stored |= buffers.keys()
    return plans


def drop_dead(data: bytes, exits: Mapping[str, str], *, where: str = "model.tflite") -> bytes:
    """
    The model without the operators, tensors and constants that reach no exit.

    Outputs are the exits' logits, earliest exit first; inputs that nothing reads go. Tensors
    without a name, or with another's, get one of their own (inputs and exits keep theirs), so
    that every tensor can be bound by name. Errors as cut.
    """
    return uncut(data, exits, None, where=where)


def uncut(
    data: bytes,
    exits: Mapping[str, str],
    kept: Sequence[str] | None,
    *,
    where: str = "model.tflite",
) -> bytes:
    """
    One .tflite that computes only the kept exits (None: all): what cut would cut, in one piece.

    Outputs are the kept exits' logits, earliest first. With one exit kept this is the network
    without any early exit: the static rival. Names as drop_dead. Errors as cut.
    """
    model = read_model(data, where)
    roads = _Roads(model, exits)
    groups = roads.groups(roads.choose(kept))
    operators = sorted({i for group in groups.values() for i in group})
    read = {t for i in operators for t in model.operators[i].inputs}
    inputs = [t for t in model.inputs if t in read]
    outputs = [roads.tensor[name] for name in groups]
    used = {t for i in operators for t in model.operators[i].outputs} | read - {-1}
    names = _unique_names(model, used, keep={*inputs, *outputs})
    _check_names(model, {*inputs, *outputs})
    return write_model(model, operators, inputs, outputs, description="edgeexit", names=names)


def transposes(
    data: bytes, exits: Mapping[str, str], *, where: str = "model.tflite"
) -> tuple[int, int]:
    """
    How many TRANSPOSE operators the model has, and how many of them stand at a seam.

    At a seam: the operator, or a RESHAPE of what it makes, makes a boundary tensor; or it reads
    one that an earlier segment made, or a RESHAPE of it. Errors as cut.
    """
    model = read_model(data, where)
    roads = _Roads(model, exits)
    segment = {
        i: k
        for k, group in enumerate(roads.groups(list(roads.ancestors)).values())
        for i in group
        if i not in roads.constant
    }
    maker = model.maker
    readers: dict[int, set[int]] = {}
    for i in segment:
        for tensor in model.operators[i].inputs:
            readers.setdefault(tensor, set()).add(i)

    def reads_earlier(i: int) -> bool:
        source = model.operators[i].inputs[0]
        before = maker.get(source)
        if before not in segment:
            return False
        if segment[before] < segment[i]:
            return True
        return model.operators[before].kind == "RESHAPE" and reads_earlier(before)

    def hands_over(i: int) -> bool:
        after = readers.get(model.operators[i].outputs[0], set())
        return any(
            segment[j] > segment[i] or (model.operators[j].kind == "RESHAPE" and hands_over(j))
            for j in after
        )

    turned = [i for i in segment if model.operators[i].kind == "TRANSPOSE"]
    return len(turned), sum(reads_earlier(i) or hands_over(i) for i in turned)


class _Roads:
    """
    How the exits of one model hang together.

    ancestors maps each exit's name, earliest exit first, to the operators its logits need,
    leaving out operators that see nothing but constants (*constant*): those are copied into
    each segment that needs them, as constants are. So weights that are stored as float16 and
    widened by an operator stay constants in every segment, and keep their fast kernels.
    """

    def __init__(self, model: Model, exits: Mapping[str, str]) -> None:
        if not exits:
            raise UsageError(f"{model.where}: no exits named, expected at least one")
        self.model = model
        self.maker = model.maker
        self.constant, self.constant_tensors = _constant_part(model)
        self.tensor = {name: self._find(name, tensor) for name, tensor in exits.items()}
        found = {name: self._ancestors(t) for name, t in self.tensor.items()}
        self._check(found)
        self.ancestors = _sorted_exits(found)

    def _find(self, name: str, tensor: str) -> int:
        place = f"{self.model.where}: exit {name!r}"
        made = {t: self.model.tensors[t].name for t in (*self.model.inputs, *self.maker)}
        indices = [t for t, other in made.items() if other == tensor]
        if not indices:
            known = {other for other in made.values() if other}
            if any(other.name == tensor for other in self.model.tensors):
                raise Unsupported(f"{place}: {tensor!r} is a constant, expected computed logits")
            raise unknown(tensor, known, "tensor") from None
        if len(indices) > 1:
            raise Unsupported(
                f"{place}: {len(indices)} tensors are named {tensor!r}, expected one",
                hint="exits are bound by tensor name: give the tensor a name of its own",
            )
        (index,) = indices
        if index not in self.maker:
            raise Unsupported(f"{place}: {tensor!r} is an input, expected computed logits")
        if index in self.constant_tensors:
            raise Unsupported(f"{place}: {tensor!r} depends on no input")
        return index

    def _ancestors(self, tensor: int) -> frozenset[int]:
        found: set[int] = set()
        open_tensors = [tensor]
        while open_tensors:
            index = self.maker.get(open_tensors.pop())
            if index is None or index in found or index in self.constant:
                continue
            found.add(index)
            open_tensors.extend(self.model.operators[index].inputs)
        return frozenset(found)

    def _check(self, found: dict[str, frozenset[int]]) -> None:
        where = self.model.where
        seen: dict[frozenset[int], str] = {}
        for name, operators in found.items():
            if operators in seen:
                raise Unsupported(
                    f"{where}: exit {name!r} adds nothing to exit {seen[operators]!r}: "
                    "both need the same operators",
                    hint="leave one of them out",
                )
            seen[operators] = name
        # One common road: going from exit to exit over shared operators reaches all of them.
        apart = dict(found)
        reached: frozenset[int] = apart.pop(next(iter(apart)))
        grown = True
        while grown:
            near = [name for name, operators in apart.items() if operators & reached]
            reached = reached.union(*(apart.pop(name) for name in near))
            grown = bool(near)
        if apart:
            raise Unsupported(
                f"{where}: exit {next(iter(apart))!r} shares no operator with exit "
                f"{next(iter(found))!r}: they hang on no common road",
                hint="exits of one network share its first layers; is this two networks?",
            )

    def choose(self, kept: Sequence[str] | None) -> list[str]:
        """The kept exits in cutting order."""
        if kept is None:
            return list(self.ancestors)
        for name in kept:
            if name not in self.ancestors:
                raise unknown(name, self.ancestors, "exit")
        if not kept:
            raise UsageError(f"{self.model.where}: no exit kept, expected at least one")
        return [name for name in self.ancestors if name in kept]

    def groups(self, chosen: Sequence[str]) -> dict[str, list[int]]:
        """The operators, ascending, of each chosen exit's segment."""
        done: set[int] = set()
        groups = {}
        for name in chosen:
            new = self.ancestors[name] - done
            done |= new
            groups[name] = sorted(new | self._constants_for(new))
        return groups

    def _constants_for(self, operators: Iterable[int]) -> set[int]:
        needed: set[int] = set()
        open_operators = list(operators)
        while open_operators:
            for tensor in self.model.operators[open_operators.pop()].inputs:
                index = self.maker.get(tensor)
                if index in self.constant and index not in needed:
                    needed.add(index)
                    open_operators.append(index)
        return needed


def _constant_part(model: Model) -> tuple[set[int], set[int]]:
    live = set(model.inputs)
    operators: set[int] = set()
    tensors: set[int] = set()
    for index, operator in enumerate(model.operators):
        if live.intersection(operator.inputs):
            live.update(operator.outputs)
        else:
            operators.add(index)
            tensors.update(operator.outputs)
    return operators, tensors


def _sorted_exits(found: dict[str, frozenset[int]]) -> dict[str, frozenset[int]]:
    counts = Counter(i for operators in found.values() for i in operators)
    road = {name: {i for i in ops if counts[i] > 1} for name, ops in found.items()}

    def before(a: str, b: str) -> bool:
        return found[a] < found[b] or road[a] < road[b]

    # The relation has no cycle (a smaller set of ancestors never has the larger road), so
    # there is always an exit with none before it; the first such one keeps the given order.
    ordered: dict[str, frozenset[int]] = {}
    waiting = list(found)
    while waiting:
        first = next(a for a in waiting if not any(before(b, a) for b in waiting))
        ordered[first] = found[first]
        waiting.remove(first)
    return ordered


def _specs(model: Model, tensors: Iterable[int]) -> tuple[TensorSpec, ...]:
    return tuple(model.tensors[t].spec(model.where) for t in tensors)


def _check_names(model: Model, tensors: set[int]) -> None:
    counts = Counter(model.tensors[t].name for t in tensors)
    for name, count in counts.items():
        if count > 1:
            raise Unsupported(
                f"{model.where}: {count} tensors named {name!r} at the edges of segments",
                hint="edgeexit binds tensors by name; edgeexit.cut.drop_dead gives each its own",
            )


def _unique_names(model: Model, used: set[int], *, keep: set[int]) -> dict[int, str]:
    taken = {model.tensors[t].name for t in keep} | {""}
    counts = Counter(model.tensors[t].name for t in used)
    renamed = {}
    for index in sorted(used - keep):
        name = model.tensors[index].name
        if name not in taken:
            taken.add(name)
            continue
        number = 1
        while (fresh := f"{name or 'tensor'};{number}") in taken or fresh in counts:
            number += 1
        taken.add(fresh)
        renamed[index] = fresh
    return renamed
