"""Files are read with errors that name the place, and written whole or not at all."""

import io
import os
import resource
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeexit.errors import BadFile, EdgeExitError, StorageError, UsageError
from edgeexit.files import (
    Table,
    check_output,
    digest_of,
    file_digest,
    json_bytes,
    new_folder,
    npz_bytes,
    parse_json,
    parse_npz,
    point,
    read_bytes,
    read_toml,
    write_file,
)


@pytest.mark.parametrize(
    ("text", "fact"),
    [
        (b'{"a": 1, "a": 2}', "'a' twice"),
        (b'{"a": NaN}', "NaN"),
        (b'{"a": -Infinity}', "Infinity"),
        (b'{"a": 1', "not valid JSON"),
        (b"[1]", "expected a JSON object"),
        (b'{"a": "\xff"}', "not valid JSON"),
        (b'{"a":' * 100_000, "not valid JSON"),
    ],
)
def test_unsound_json_is_refused_by_name(text: bytes, fact: str) -> None:
    with pytest.raises(BadFile, match=fact) as caught:
        parse_json(text, "some.json")

    assert str(caught.value).startswith("some.json: ")


def test_a_wrong_value_is_named_by_file_and_key() -> None:
    table = Table({"outer": {"inner": "ten"}}, "set.toml")

    with pytest.raises(BadFile, match=r"set\.toml: outer\.inner: expected float, found 'ten'"):
        table.table("outer").get("inner", float)


def test_an_integer_passes_as_float_but_a_boolean_never_as_integer() -> None:
    table = Table({"one": 1, "yes": True}, "x")

    assert table.get("one", float) == 1.0
    with pytest.raises(BadFile):
        table.get("yes", int)


def test_unknown_keys_and_formats_are_refused() -> None:
    with pytest.raises(BadFile, match="unknown key"):
        Table({"colour": 1}, "x").only("color")
    with pytest.raises(BadFile, match="found 7, this version reads 1"):
        Table({"format": 7}, "x").expect_format(1)


@given(st.binary(max_size=400))
def test_any_bytes_are_json_or_refused(data: bytes) -> None:
    try:
        parse_json(data, "x")
    except EdgeExitError:
        return


def test_equal_arrays_give_equal_bytes_and_come_back() -> None:
    arrays = {"a": np.arange(12, dtype=np.int8).reshape(3, 4), "names": np.array(["x", "yy"])}

    data = npz_bytes(arrays)
    back = parse_npz(data, "x.npz")

    assert data == npz_bytes(arrays)
    assert back.names == ["a", "names"]
    assert np.array_equal(back.get("a", kinds="i", ndim=2), arrays["a"])


def test_every_truncation_of_an_npz_is_refused() -> None:
    data = npz_bytes({"a": np.arange(50)})

    for length in range(len(data)):
        with pytest.raises(BadFile):
            parse_npz(data[:length], "x.npz")


def test_pickled_arrays_are_never_loaded() -> None:
    buffer = io.BytesIO()
    np.savez(buffer, a=np.array([{"x": 1}], dtype=object))

    with pytest.raises(BadFile, match="pickled"):
        parse_npz(buffer.getvalue(), "x.npz")


def test_a_header_that_claims_more_than_the_entry_holds_is_refused_before_memory_is_taken() -> None:
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": "<f8", "fortran_order": False, "shape": (1 << 40,)}
    )
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("a.npy", header.getvalue())

    with pytest.raises(BadFile, match="does not fit"):
        parse_npz(buffer.getvalue(), "x.npz")


def test_absent_and_wrong_paths_are_usage_errors(tmp_path: Path) -> None:
    for path in (tmp_path / "none", tmp_path, tmp_path / "none" / "deeper"):
        with pytest.raises(UsageError):
            read_bytes(path)


def test_bad_toml_is_named(tmp_path: Path) -> None:
    path = tmp_path / "x.toml"
    path.write_bytes(b"a = [1,")

    with pytest.raises(BadFile, match=r"x\.toml: not valid TOML"):
        read_toml(path)


def test_a_written_file_replaces_the_old_one_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "x.json"
    write_file(path, b"old")
    write_file(path, b"new")

    assert path.read_bytes() == b"new"
    assert [p.name for p in path.parent.iterdir()] == ["x.json"]


def test_a_device_or_pipe_is_never_replaced(tmp_path: Path) -> None:
    # /dev/null would become a plain file, for everybody.
    path = tmp_path / "pipe"
    os.mkfifo(path)
    for refuse in (check_output, lambda path: write_file(path, b"new")):
        with pytest.raises(UsageError, match="no plain file"):
            refuse(path)
    assert path.is_fifo()
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("exists", [True, False])
def test_a_symbolic_link_is_followed(tmp_path: Path, exists: bool) -> None:
    link, card = tmp_path / "link", tmp_path / "card"
    card.mkdir()
    if exists:
        (card / "file").write_bytes(b"old")
    link.symlink_to(card / "file")
    write_file(link, b"new")
    assert link.is_symlink()
    assert (card / "file").read_bytes() == b"new"
    assert [path.name for path in card.iterdir()] == ["file"]


def test_modes_follow_the_users_umask(tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        write_file(tmp_path / "x", b"")
        with new_folder(tmp_path / "folder") as new:
            (new / "y").write_bytes(b"")
    finally:
        os.umask(old)

    assert (tmp_path / "x").stat().st_mode & 0o777 == 0o640
    assert (tmp_path / "folder").stat().st_mode & 0o777 == 0o750


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "folder"
    with pytest.raises(KeyError), new_folder(target) as new:
        (new / "half").write_bytes(b"x")
        raise KeyError

    assert list(tmp_path.iterdir()) == []

    with new_folder(target) as new:
        (new / "whole").write_bytes(b"1")
    with new_folder(target) as new:
        (new / "other").write_bytes(b"2")

    assert [p.name for p in target.iterdir()] == ["other"]
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]


def test_a_full_disk_is_a_storage_error_and_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "x.bin"
    path.write_bytes(b"old")
    code = f"""
import resource, signal
from pathlib import Path
from edgeexit.errors import StorageError
from edgeexit.files import write_file
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    write_file(Path({str(path)!r}), bytes(100_000))
except StorageError:
    raise SystemExit({StorageError.exit_code})
"""
    assert resource.RLIMIT_FSIZE is not None
    done = subprocess.run([sys.executable, "-c", code], check=False)

    assert done.returncode == StorageError.exit_code
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["x.bin"]


def test_json_is_canonical_and_never_holds_nan() -> None:
    assert json_bytes({"b": 1, "a": "ä"}) == '{\n "b": 1,\n "a": "ä"\n}\n'.encode()
    with pytest.raises(ValueError, match="not JSON compliant"):
        json_bytes({"a": float("nan")})


@pytest.mark.parametrize("size", [0, 1, (1 << 20) + 1])
def test_a_files_digest_is_that_of_its_bytes(tmp_path: Path, size: int) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"x" * size)

    assert file_digest(path) == digest_of(b"x" * size)
    with pytest.raises(UsageError, match="no such file"):
        file_digest(tmp_path / "none")
    with pytest.raises(UsageError, match="is a folder"):
        file_digest(tmp_path)


def test_a_link_is_exchanged_at_once_and_removed(tmp_path: Path) -> None:
    link = tmp_path / "current"
    point(link, "releases/a")
    point(link, "releases/b")

    assert link.readlink() == Path("releases/b")
    assert [path.name for path in tmp_path.iterdir()] == ["current"]
    point(link, None)
    point(link, None)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_is_not_replaced_by_a_link(tmp_path: Path) -> None:
    (tmp_path / "current").mkdir()

    with pytest.raises(StorageError):
        point(tmp_path / "current", "releases/a")
    assert [path.name for path in tmp_path.iterdir()] == ["current"]
