"""Facts about where files come in: what a gate can make nothing of is refused, not ignored."""

import os
from pathlib import Path

import pytest
from click.testing import CliRunner

from edgeexit.cli.convert import command
from edgeexit.errors import EdgeExitError, UsageError
from edgeexit.host.gates import GATES, OPTIONS, Asked, open_model

VALUES = {"exits": ("a", "b"), "arch": "module:factory", "via": "onnx2tf"}


@pytest.mark.parametrize("key", OPTIONS)
@pytest.mark.parametrize("suffix", GATES)
def test_an_option_that_a_gate_does_not_take_is_refused(suffix: str, key: str, tmp_path) -> None:
    path = tmp_path / f"net{suffix}"
    path.write_bytes(b"")
    with pytest.raises(EdgeExitError) as caught:  # at the latest because the file is empty
        open_model(path, Asked(**{key: VALUES[key]}))

    is_refused = f"takes no {OPTIONS[key][0]}" in str(caught.value)
    assert is_refused == (key not in GATES[suffix].takes)


@pytest.mark.parametrize("name", ["pipe.pt", "pipe", "pipe.tflite"])
def test_a_pipe_is_refused_without_a_look_into_it(name: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / name)

    with pytest.raises(UsageError, match="is a pipe or device"):
        open_model(tmp_path / name, Asked())


@pytest.mark.parametrize("exits", ["", ",", "a,", "a,,b"])
def test_an_empty_name_is_no_exit(exits: str, tmp_path: Path) -> None:
    asked = CliRunner().invoke(command, [str(tmp_path / "net.tflite"), "--exits", exits])

    assert isinstance(asked.exception, UsageError)
    assert "a name is empty" in str(asked.exception)
