"""
One multi-exit .tflite that holds all of a network's exits: where every gate comes out.

Callers see Lowered, named and signature_outputs. Hidden here: a converter's long tensor names
(with class paths in them, or one name twice) are replaced by short ones that depend on nothing
but the graph, operators that reach no exit go, and the file is tried out where a crash does no
harm.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from edgeexit import cut, tflite
from edgeexit.errors import Unsupported
from edgeexit.host.ends import to_logits
from edgeexit.interpreter import check_loads

WHERE = "lowered network"


@dataclass(frozen=True, kw_only=True)
class Lowered:
    """
    One multi-exit .tflite: *data* its bytes, *exits* exit name -> tensor name.

    float32 throughout unless it comes from a quantized file. The input is (1, H, W, C) for
    images and the network's own shape otherwise; every logits tensor is (1, classes). Exits
    stand in the order of the cut, earliest first. *endings* says for each exit what the user's
    network ended in, a key of ends.ENDINGS.
    """

    data: bytes
    exits: Mapping[str, str]
    endings: Mapping[str, str] = field(default_factory=dict)


def named(data: bytes, exits: Mapping[str, int], where: str = WHERE) -> Lowered:
    """
    A converter's *data* made ours; *exits* maps the exits' names to tensor indices.

    Logits are named after their exits, the input "input", all other tensors by their place in
    the graph; what reaches no exit is dropped; the file is loaded once in a child process.
    Where an exit ends in a softmax or in one sigmoid, its logits come out (see ends.to_logits).
    *data* comes from a converter (what users bring goes through read_model first); *where*
    names it in errors. BadFile for a damaged file; Unsupported for one that cannot be cut, with
    operators that TFLite's runtime has no kernel for, several inputs, two exits that are one
    tensor, or exits that are no classifiers.
    """
    check_kernels(data, where)
    return from_model(tflite.read_model(data, where), exits)


def from_model(model: tflite.Model, exits: Mapping[str, int]) -> Lowered:
    """As named, for a file that was taken apart already."""
    where = model.where
    ended = to_logits(model, exits)
    renamed, names = _rename(ended.model, ended.exits)
    alive = cut.drop_dead(renamed, names, where=where)
    check_loads(alive, where)
    order = cut.exit_order(alive, names, where)
    return Lowered(
        data=alive,
        exits={name: names[name] for name in order},
        endings={name: ended.endings[name] for name in order},
    )


def by_depth(model: tflite.Model, exits: Mapping[str, int]) -> dict[str, int]:
    """
    *exits* earliest first where only the graph can tell, for files whose order means nothing.

    First the operators shared with other exits count, then all those that an exit needs.
    """
    needed = {name: _ancestors(model, index) for name, index in exits.items()}
    counts = Counter(place for places in needed.values() for place in places)

    def depth(name: str) -> tuple[int, int]:
        return sum(counts[place] > 1 for place in needed[name]), len(needed[name])

    return {name: exits[name] for name in sorted(exits, key=depth)}


def _ancestors(model: tflite.Model, index: int) -> set[int]:
    found: set[int] = set()
    maker, waiting = model.maker, [index]
    while waiting:
        place = maker.get(waiting.pop())
        if place is not None and place not in found:
            found.add(place)
            waiting.extend(model.operators[place].inputs)
    return found


def _rename(model: tflite.Model, exits: Mapping[str, int]) -> tuple[bytes, dict[str, str]]:
    if len(set(exits.values())) < len(exits):
        raise Unsupported(f"two of the exits {', '.join(exits)} are one and the same tensor")
    if len(model.inputs) != 1:
        raise Unsupported(f"the network has {len(model.inputs)} inputs, expected one")
    fresh = {index: f"c{index}" for index in range(len(model.tensors))}
    made = (index for operator in model.operators for index in operator.outputs)
    fresh |= {index: f"t{place}" for place, index in enumerate(made)}
    fresh[model.inputs[0]] = "input"
    for index in fresh:
        while fresh[index] in exits:  # a user's exit may be called "t3"
            fresh[index] += "_"
    fresh |= {index: name for name, index in exits.items()}
    renamed = tflite.write_model(
        model,
        range(len(model.operators)),
        model.inputs,
        list(exits.values()),
        description="edgeexit",
        names=fresh,
    )
    return renamed, {name: name for name in exits}


def check_kernels(data: bytes, where: str = WHERE) -> None:
    """Unsupported if the .tflite *data* has operators that TFLite's runtime has no kernel for."""
    # A converter passes on what it has no TFLite operator for under names like these.
    from ai_edge_litert import schema_py_generated as schema

    words = {number: word for word, number in vars(schema.BuiltinOperator).items()}
    model = schema.Model.GetRootAs(data, 0)
    for place in range(model.OperatorCodesLength()):
        code = model.OperatorCodes(place)
        word = words.get(max(code.BuiltinCode(), code.DeprecatedBuiltinCode()), "CUSTOM")
        custom = (code.CustomCode() or b"").decode(errors="replace")
        if "Detection_PostProcess" in custom:
            raise Unsupported(
                f"{where}: this is detection (it answers with boxes), expected a classifier"
            )
        if word == "CUSTOM" or word.startswith("STABLEHLO"):
            word = f"{word} {custom}".strip()
            raise Unsupported(
                f"{where}: operator {word} has no kernel in TFLite's runtime",
                hint="replace it in the network by operators that TFLite has",
            )


def signature_outputs(data: bytes) -> dict[str, int]:
    """
    Output name -> tensor index, by the file's first signature; empty if it has none.

    The order of a file's outputs means nothing: converters change it.
    """
    check_kernels(data)
    return dict(tflite.read_model(data, WHERE).signature)
