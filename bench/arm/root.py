"""
An ARM system below a folder, made out of Debian's and PyPI's packages without running ARM code.

    python bench/arm/root.py [bare|ready]      make what is missing and print where it lies

Callers see system (a Debian for arm64 that has Python and what a login needs, as an empty board
has it), site (the wheels of edgeexit's device side for it) and layers, which names both for a kind
of board. Each lies in a folder of the cache, $EDGEEXIT_ARM_CACHE or ~/.cache/edgeexit/arm, that is
named after its recipe; it is complete or not there, and never written to again. Needs root, the
two registries, and Debian's packages mmdebstrap and arch-test.
"""

import compileall
import hashlib
import json
import os
import py_compile
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from edgeexit.errors import EdgeExitError
from edgeexit.locks import hold

ENVIRONMENT = "EDGEEXIT_ARM_CACHE"
SUITE = "bookworm"
MIRROR = "http://deb.debian.org/debian"
PYTHON = "3.11"
# Python, and what every login meets on an empty board: no pip, no venv, no compiler.
PACKAGES = (
    *("python3", "libstdc++6", "libgcc-s1", "zlib1g", "base-files", "base-passwd", "libc-bin"),
    *("dash", "bash", "coreutils", "grep", "sed", "tar", "gzip", "findutils"),
)
WHEELS = (
    "ai-edge-litert==2.3.0",
    "click==8.5.1",
    "numpy==2.4.6",
    "pillow==13.0.0",
    "psutil==7.2.2",
)
SITE = "opt/site"  # where the wheels lie in their layer, and on a board that has them
_VERSION = 1  # of what is done below with packages and wheels
_TRIES = 3  # a mirror in the middle of its update refuses now and then
_UNUSED = ("libLiteRtWebGpuAccelerator.so",)  # 17 MB for graphics processors


class CannotBuild(EdgeExitError):
    """The ARM system cannot be made here: a tool, a registry or the right to is missing."""


def cache() -> Path:
    """The folder of all layers."""
    place = os.environ.get(ENVIRONMENT)
    return Path(place) if place else Path.home() / ".cache" / "edgeexit" / "arm"


def system(packages: Sequence[str] = ()) -> Path:
    """The Debian with PACKAGES and these *packages* more. CannotBuild."""
    wanted = sorted({*PACKAGES, *packages})

    def build(folder: Path) -> None:
        extract(wanted, folder)
        compile_python(folder / f"usr/lib/python{PYTHON}", folder)

    return layer("system", [SUITE, *wanted, str(_is_same_python())], build)


def site(wheels: Sequence[str] = WHEELS) -> Path:
    """A layer whose SITE folder holds *wheels* and what they need. CannotBuild."""
    wanted = sorted(wheels)

    def build(folder: Path) -> None:
        _install(wanted, folder / SITE)
        compile_python(folder / SITE, folder)

    return layer("site", [PYTHON, *wanted, str(_is_same_python())], build)


def layers(*, ready: bool) -> list[Path]:
    """The layers of a board, the upper one first: a *ready* one has the wheels."""
    return [site(), system()] if ready else [system()]


def layer(kind: str, recipe: Sequence[str], build: Callable[[Path], None]) -> Path:
    digest = hashlib.sha256(json.dumps([_VERSION, *recipe]).encode()).hexdigest()[:16]
    place = cache() / f"{kind}-{digest}"
    if place.is_dir():
        return place
    with hold(cache() / f"{place.name}.lock", f"the building of {place.name}", wait=True):
        if place.is_dir():
            return place
        part = cache() / f"{place.name}.part"
        if part.exists():  # of a builder that was killed: its mounts, if any, died with it
            shutil.rmtree(part)
        part.mkdir()
        print(f"making {place} (once) ...", file=sys.stderr)
        build(part)
        part.rename(place)
    return place


def extract(packages: Sequence[str], folder: Path) -> None:
    if os.geteuid() != 0:
        raise CannotBuild("an ARM system is made by root only")
    leave_out = (f"/usr/share/{name}/*" for name in ("doc", "man", "locale", "info", "lintian"))
    _run(
        # In a name space of its own: a mount that a killed builder leaves behind is gone with it.
        *("unshare", "--mount", "--propagation", "private"),
        *("mmdebstrap", "--quiet", "--mode=root", "--arch=arm64", "--variant=extract"),
        "--skip=chroot/mount",
        *(f"--dpkgopt=path-exclude={pattern}" for pattern in leave_out),
        f"--include={','.join(packages)}",
        *(SUITE, str(folder), f"deb {MIRROR} {SUITE} main"),
        clean=folder,
    )
    for name in ("hostname", "resolv.conf"):  # copies of this machine's
        (folder / "etc" / name).unlink(missing_ok=True)
    shutil.rmtree(folder / "var" / "lib" / "apt", ignore_errors=True)


def compile_python(folder: Path, root: Path, where: str = "/") -> None:
    """
    Put byte code beside the programs in *folder*, for a machine that has *root* at *where*.

    Debian's installer does that on a board. Does nothing unless this Python is the machine's:
    then that compiles what it imports at every start.
    """
    if _is_same_python():
        compileall.compile_dir(
            folder,
            rx=re.compile(r"/tests?/|/lib2to3/"),
            quiet=2,
            stripdir=str(root),
            prependdir=where,
            invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH,
        )


def _is_same_python() -> bool:
    return ".".join(map(str, sys.version_info[:2])) == PYTHON


def _install(wheels: Sequence[str], folder: Path) -> None:
    tag = f"cp{PYTHON.replace('.', '')}"
    _run(
        *(sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"),
        *("--root-user-action=ignore", "--no-compile", "--target", str(folder)),
        *("--only-binary=:all:", "--implementation=cp", f"--python-version={PYTHON}"),
        *(f"--abi={abi}" for abi in (tag, "abi3", "none")),
        *(f"--platform=manylinux{age}_aarch64" for age in ("_2_28", "_2_27", "2014")),
        *wheels,
        clean=folder,
    )
    for name in _UNUSED:
        for path in folder.rglob(name):
            path.unlink()


def _run(*argv: str, clean: Path) -> None:
    for _ in range(_TRIES):
        shutil.rmtree(clean, ignore_errors=True)
        clean.mkdir(parents=True)
        try:
            done = subprocess.run(argv, check=False, capture_output=True, text=True)
        except FileNotFoundError as error:
            raise CannotBuild(
                f"{error.filename} is missing",
                hint="apt-get install mmdebstrap arch-test qemu-user-static openssh-server",
            ) from error
        if done.returncode == 0:
            return
    said = [line for line in done.stderr.splitlines() if line.strip()]
    raise CannotBuild(f"{argv[0]}: {' | '.join(said[-3:]) or f'code {done.returncode}'}")


if __name__ == "__main__":
    try:
        for place in layers(ready="bare" not in sys.argv[1:]):
            print(place)
    except EdgeExitError as error:
        sys.exit(f"Error: {error}")
