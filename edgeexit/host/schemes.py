"""
The ways to make a network smaller and faster that `convert --scheme` knows by name.

Callers see SCHEMES, AUTO, WARNINGS and find_scheme. Each but "float" is a recipe, which
edgeexit.host.quantize carries out. Users name their own: a recipe in a file, or a recipe or a
function in a module.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from edgeexit.errors import BadFile, EdgeExitError, UsageError
from edgeexit.files import parse_json, read_bytes
from edgeexit.host.answers import RealSamples
from edgeexit.host.lowered import Lowered
from edgeexit.host.quantize import (
    Quantized,
    Recipe,
    Scheme,
    by_recipe,
    check_ends,
    outside_xnnpack,
)
from edgeexit.host.ranges import Advance
from edgeexit.interpreter import check_loads
from edgeexit.names import load_attribute, unknown

AUTO = "auto"  # no scheme: edgeexit.host.contest picks one
MATMULS = ("CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED")


def unquantized(lowered: Lowered, reals: RealSamples, advance: Advance | None = None) -> Quantized:
    """The float network as it is."""
    return Quantized(
        data=lowered.data,
        exits=lowered.exits,
        ranges="none",
        candidates={},
        agreement=dict.fromkeys(lowered.exits, 1.0),
        outside_xnnpack=outside_xnnpack(lowered.data),
    )


def _entry(
    weights: tuple[int, str], activation_bits: int | None = None, operation: str = "*"
) -> dict[str, Any]:
    """One entry of a recipe; *weights* are (bits, "INT" or "FLOAT")."""
    bits, kind = weights
    config: dict[str, Any] = {
        "weight_tensor_config": {
            "num_bits": bits,
            "symmetric": True,
            "granularity": "CHANNELWISE" if kind == "INT" else "TENSORWISE",
            "dtype": kind,
        },
        "compute_precision": "INTEGER" if kind == "INT" else "FLOAT",
        "explicit_dequantize": kind == "FLOAT",
        "skip_checks": False,
        "min_weight_elements": 0,
    }
    if activation_bits is not None:
        config["activation_tensor_config"] = {
            "num_bits": activation_bits,
            "symmetric": activation_bits == 16,
            "granularity": "TENSORWISE",
            "dtype": "INT",
        }
    key = "min_max_uniform_quantize" if kind == "INT" else "float_casting"
    return {"regex": ".*", "operation": operation, "algorithm_key": key, "op_config": config}


int8 = by_recipe([_entry((8, "INT"), 8)], ends="int8")

SCHEMES: dict[str, Scheme] = {
    "int8": int8,
    "float": unquantized,
    "dynamic": by_recipe([_entry((8, "INT"))]),
    "float16": by_recipe([_entry((16, "FLOAT"))], ends="float32"),
    "int8-matmul": by_recipe([_entry((8, "INT"), 8, kind) for kind in MATMULS]),
    "int16x8": by_recipe([_entry((8, "INT"), 16)], ends="int16"),
}
"""
int8: weights per channel, activations per tensor, int8 in and out. float: as it is.
dynamic: int8 weights, activations made int8 while it runs. float16: weights only.
int8-matmul: as int8, but layers with weights alone. int16x8: activations of 16 bits.
"""

WARNINGS = {"int16x8": "accurate, and very slow: no fast kernel takes 16-bit activations"}


def find_scheme(name: str) -> Scheme:
    """
    An entry of SCHEMES, the recipe in a FILE.json, or "module:attribute": a recipe or a Scheme.

    A module's code is run. UsageError for unknown names, BadFile for a file that is no recipe.
    """
    if name in SCHEMES:
        return SCHEMES[name]
    if name.endswith(".json"):
        return by_recipe(_read_recipe(Path(name)))
    if ":" not in name:
        raise unknown(name, [*SCHEMES, AUTO], "scheme")
    found = load_attribute(name, "scheme")
    if isinstance(found, (list, tuple)):
        return by_recipe(_checked(found, name))
    if not callable(found):
        raise UsageError(f"scheme {name!r}: is neither a recipe (a list) nor a function")
    return _foreign(name, cast(Scheme, found))


def _foreign(name: str, scheme: Scheme) -> Scheme:
    def carried(lowered: Lowered, reals: RealSamples, advance: Advance | None = None) -> Quantized:
        try:
            result = scheme(lowered, reals, advance)
        except EdgeExitError:
            raise
        except Exception as error:  # the user's own code may raise anything
            raise UsageError(f"scheme {name!r}: raised {type(error).__name__}: {error}") from error
        if not isinstance(result, Quantized):
            raise UsageError(f"scheme {name!r}: gave {type(result).__name__}, expected Quantized")
        check_loads(result.data, "quantized network")
        check_ends(result.data, result.exits, None)
        return result

    return carried


def _read_recipe(path: Path) -> Recipe:
    # The file holds a list; the reader of JSON that refuses what is dubious wants an object.
    table = parse_json(b'{"recipe":' + read_bytes(path) + b"}", str(path))
    table.only("recipe")
    return _checked(table.list_of("recipe", dict), str(path))


def _checked(recipe: Sequence[Any], where: str) -> Recipe:
    for k, entry in enumerate(recipe):
        if not isinstance(entry, Mapping) or not all(
            isinstance(entry.get(key, default), kind) for key, (kind, default) in _ENTRY.items()
        ):
            raise BadFile(
                f"{where}: entry {k}: expected an object with the texts regex, operation and "
                "algorithm_key, and op_config",
                hint="a recipe of ai-edge-quantizer, as its recipe_manager writes it",
            )
        try:
            re.compile(entry["regex"])
        except re.error as error:
            raise BadFile(f"{where}: entry {k}: regex: {error}") from error
    if not recipe:
        raise BadFile(f"{where}: an empty recipe", hint="for the network as it is: --scheme float")
    return recipe


# Key -> its type, and what stands for it where it is left out.
_ENTRY: dict[str, tuple[type, Any]] = {
    "regex": (str, None),
    "operation": (str, None),
    "algorithm_key": (str, None),
    "op_config": (Mapping, {}),
}
