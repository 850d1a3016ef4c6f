"""
The TFLite runtimes that edgeexit takes, and what their wheels were built for.

Callers see Runtime, RUNTIMES (best first), pointer_bits and for_programs. Which one a machine can
have is decided by the size of a pointer, not by the processor: 32-bit programs under a 64-bit
kernel hear that the machine is an aarch64, as pip's markers do, and no wheel for that fits them.
"""

import struct
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """
    One TFLite runtime and what its wheels were built for (as on PyPI, by their tags).

    *name* is the distribution, *module* what is imported of it. *machines* maps the kernel's word
    to the wheels' one, *bits* are those of a pointer. *borrowed* are packages that no wheel exists
    for: they must be the system's own.
    """

    name: str
    module: str
    requirement: str
    machines: Mapping[str, str]
    bits: int
    pythons: tuple[tuple[int, int], tuple[int, int]]
    libc: tuple[int, int]
    numpy: str
    borrowed: tuple[str, ...] = ()

    @property
    def install(self) -> str:
        """The command that installs it where edgeexit is."""
        # Without dependencies: pip would build numpy, of which there are no 32-bit wheels.
        options = "--no-deps " if self.borrowed else ""
        return (
            f"python3 -m pip install {options}{self.name if self.bits == 64 else self.requirement}"
        )


# edgeexit itself asks for Python 3.11.
LITERT = Runtime(
    name="ai-edge-litert",
    module="ai_edge_litert.interpreter",
    requirement="ai-edge-litert>=2.1,<2.4",
    machines={"aarch64": "aarch64", "x86_64": "x86_64"},
    bits=64,
    pythons=((3, 11), (3, 14)),
    libc=(2, 27),
    numpy="numpy>=1.24",
)
# The last one with 32-bit wheels; PyPI has neither numpy, pillow nor psutil for armv7l.
TFLITE = Runtime(
    name="tflite-runtime",
    module="tflite_runtime.interpreter",
    requirement="tflite-runtime==2.14.0",
    machines={"aarch64": "armv7l", "armv7l": "armv7l", "armv8l": "armv7l"},
    bits=32,
    pythons=((3, 11), (3, 11)),
    libc=(2, 34),
    numpy="numpy>=1.24,<2",
    borrowed=("numpy", "pillow", "psutil"),
)
RUNTIMES = (LITERT, TFLITE)


def pointer_bits() -> int:
    """The size of a pointer in this Python: 32 or 64."""
    return 8 * struct.calcsize("P")


def for_programs(bits: int) -> Runtime:
    """The runtime for programs whose pointers have so many *bits*."""
    return next((runtime for runtime in RUNTIMES if runtime.bits == bits), LITERT)
