"""
From the name of a network's code to the network.

Callers see build_network, own_factory and OWN_FACTORIES. Hidden here: `arch` names code. A file
alone may only name the factories of edgeexit's zoo; everything else must be named by the user
as well, and only then can code be imported from the current folder.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from edgeexit.errors import BadFile, EdgeExitError, UsageError
from edgeexit.host import zoo
from edgeexit.names import load_attribute

Factory = Callable[..., nn.Module]
OWN_FACTORIES: dict[str, Factory] = {
    f"{zoo.__name__}:{name}": factory for name, factory in zoo.FACTORIES.items()
}


def own_factory(arch: str, where: str) -> Factory:
    """The factory of edgeexit that *arch*, read from the file *where*, names; else BadFile."""
    if arch in OWN_FACTORIES:
        return OWN_FACTORIES[arch]
    if arch.partition(":")[0].partition(".")[0] == "edgeexit":
        raise BadFile(
            f"{where}: arch: {arch!r} is no network of edgeexit (has: {', '.join(OWN_FACTORIES)})"
        )
    raise BadFile(
        f"{where}: arch: {arch!r} names code outside edgeexit, which a file alone may not run",
        hint=f"if you trust that code, say so with: --arch {arch}",
    )


@contextmanager
def _current_folder_importable() -> Iterator[None]:
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        yield
    finally:
        sys.path.remove(here)


def build_network(
    named: str, kwargs: dict[str, Any], where: str, *, arch: str | None = None
) -> nn.Module:
    """
    The untrained network that the file *where* names; *arch* is what the user named, or None.

    BadFile if the file may not name it or its *kwargs* do not fit; UsageError if *arch* differs
    or its code fails.
    """
    if arch is not None and arch != named:
        raise UsageError(
            f"{where}: names arch {named!r}, but --arch says {arch!r}",
            hint=f"if you trust that code: --arch {named}",
        )
    if arch is not None and named not in OWN_FACTORIES:
        return _foreign(named, kwargs)
    factory = own_factory(named, where)
    try:
        return factory(**kwargs)
    except EdgeExitError as error:
        raise BadFile(f"{where}: kwargs: {error}") from error
    except (TypeError, ValueError, RuntimeError, OverflowError, AttributeError) as error:
        raise BadFile(f"{where}: kwargs do not fit {named}: {error}") from error


def _foreign(arch: str, kwargs: dict[str, Any]) -> nn.Module:
    with _current_folder_importable():
        factory = load_attribute(arch, "--arch")
        if not callable(factory):
            raise UsageError(f"--arch {arch}: is no function or class that makes a network")
        try:
            model = factory(**kwargs)
        except Exception as error:  # the user's own code may raise anything
            raise UsageError(f"--arch {arch}: raised {type(error).__name__}: {error}") from error
    if not isinstance(model, nn.Module):
        raise UsageError(f"--arch {arch}: gave {type(model).__name__}, expected a torch.nn.Module")
    return model
