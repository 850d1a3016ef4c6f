"""Who may import whom: the rooms are stacked, and torch stays on the host side of the wall."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import edgeexit

PACKAGE = Path(edgeexit.__file__).parent

# From the ground up: a room may import only rooms that stand before it.
ROOMS = (
    "errors",
    "files",
    "names",
    "children",
    "bounds",
    "duplicates",
    "decision",
    "search",
    "certify",
    "flips",
    "nested",
    "quota",
    "risk",
    "families",
    "ranking",
    "overlap",
    "pictures",
    "preprocess",
    "labelled",
    "samples",
    "calibration",
    "runtimes",
    "tflite",
    "cut",
    "vetting",
    "interpreter",
    "policy",
    "machine",
    "intervals",
    "series",
    "device",
    "state",
    "bundle",
    "recut",
    "runtime",
    "inputs",
    "sources",
    "capture",
    "live",
    "notify",
    "journal",
    "selftest",
    "race",
    "evaluate",
    "locks",
    "manifest",
    "blobs",
    "intents",
    "shelf",
    "releases",
    "serve",
    "service",
    "ledger",
    "meters",
    "slide",
    "energy",
    "sampler",
    "dissect",
    "blocks",
    "paths",
    "timing",
    "profile",
    "parts",
    "sitting",
    "notebook",
    "collect",
    "verdict",
    "instrument",
    "compare",
    "prices",
    "targets",
    "choice",
    "request",
    "worth",
    "tune",
    "verify",
    "advisor",
    "plot",
    "report",
    "page",
    "recording",
    "symptoms",
    "vitals",
    "installation",
    "doctor",
    "agent",
    "remote",
    "demo",
)
FOREIGN = (
    "torch",
    "tensorflow",
    "litert_torch",
    "ai_edge_quantizer",
    "jax",
    "onnx",
    "scipy",
    "matplotlib",
)
DEVICE_LIBRARIES = {
    "click",
    "numpy",
    "PIL",
    "psutil",
    "ai_edge_litert",
    "tflite_runtime",
    "flatbuffers",
}


def modules() -> dict[str, Path]:
    names = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        names[".".join(part for part in parts if part != "__init__")] = path
    return names


def imports(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def rooms_used(path: Path) -> set[str]:
    known = modules()
    used = set()
    for name in imports(path):
        if name.startswith("edgeexit."):
            inner = name.removeprefix("edgeexit.")
            used.add(inner if inner in known else inner.rpartition(".")[0])
    return used - {""}


@pytest.mark.parametrize("module", [m for m in modules() if m])
def test_every_room_imports_only_rooms_below_it(module: str) -> None:
    room = module.partition(".")[0]
    if room in ("__main__", "cli", "host"):
        return
    assert room in ROOMS, f"{room} has no place in the stack"
    below = set(ROOMS[: ROOMS.index(room)])

    # The files of one folder are one room.
    used = {name.partition(".")[0] for name in rooms_used(modules()[module])}
    assert used - ({room} if "." in module else set()) <= below


@pytest.mark.parametrize("room", [m for m in modules() if m.startswith("host.")])
def test_the_host_side_knows_nothing_of_the_command_line(room: str) -> None:
    assert not {used for used in rooms_used(modules()[room]) if used.startswith("cli")}


# Extras: one room each may import one, and only when it is used.
EXTRAS = {
    "plot": {"matplotlib"},
    "remote.broken": {"asyncssh"},
    "remote.hosts": {"tomlkit"},
    "remote.onboard": {"installer"},
    "remote.link": {"asyncssh"},
    "remote.login": {"asyncssh"},
    "remote.talk": {"asyncssh"},
    "remote.upload": {"asyncssh"},
    "sources": {"picamera2"},
}


@pytest.mark.parametrize("room", [m for m in modules() if not m.startswith("host")])
def test_outside_host_only_the_device_side_libraries_are_imported(room: str) -> None:
    roots = {name.partition(".")[0] for name in imports(modules()[room])}
    foreign = roots - set(sys.stdlib_module_names) - DEVICE_LIBRARIES - {"edgeexit"}

    assert not foreign - EXTRAS.get(room, set())


@pytest.mark.parametrize("room", [m for m in modules() if m.startswith("cli.")])
def test_a_command_imports_only_click_errors_and_its_kin_at_the_top(room: str) -> None:
    allowed = ("click", "edgeexit.errors", "edgeexit.cli")
    for node in ast.parse(modules()[room].read_text()).body:
        names = {
            ast.Import: lambda n: [alias.name for alias in n.names],
            ast.ImportFrom: lambda n: [n.module],
        }.get(type(node), lambda n: [])(node)
        for name in names:
            if name.partition(".")[0] not in sys.stdlib_module_names:
                assert name.startswith(allowed), f"{room}: {name}"


def test_nothing_outside_host_loads_a_converter_even_by_way_of_another_module() -> None:
    outside = [
        f"edgeexit.{m}" for m in modules() if m and m != "__main__" and not m.startswith("host")
    ]
    code = f"""
import sys
class Wall:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {FOREIGN!r}:
            raise AssertionError("imported " + name)
sys.meta_path.insert(0, Wall())
import importlib
for name in {outside!r}:
    importlib.import_module(name)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_help_starts_without_numpy() -> None:
    code = (
        "import sys, edgeexit.cli as c\n"
        "assert c.entry(['--help']) == 0\n"
        "assert 'numpy' not in sys.modules, 'numpy loaded'\n"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)

    assert "convert" in done.stdout
    assert "profile" in done.stdout


def test_the_runtime_loads_neither_the_instrument_nor_tune() -> None:
    code = (
        "import sys, edgeexit.runtime\n"
        "assert not {'edgeexit.profile', 'edgeexit.tune', 'edgeexit.evaluate'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
