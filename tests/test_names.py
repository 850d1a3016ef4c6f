"""A wrong word is an error with help, never a guess."""

from pathlib import Path

import pytest

from edgeexit.errors import UsageError
from edgeexit.names import choose, data_folder, load_attribute, only_bundle_here


def test_a_known_name_is_looked_up() -> None:
    assert choose("b", {"a": 1, "b": 2}, "letter") == 2


def test_an_unknown_name_lists_what_there_is_and_the_nearest() -> None:
    with pytest.raises(UsageError, match=r"no measure named 'margins' \(have: margin, peak\)") as e:
        choose("margins", {"peak": 1, "margin": 2}, "measure")

    assert e.value.hint == "did you mean 'margin'?"


def test_of_many_names_the_nearest_and_the_first_are_listed() -> None:
    many = {f"layer{n:03}": n for n in range(100)} | {"zoom": 0}
    with pytest.raises(UsageError) as e:
        choose("zooms", many, "tensor")

    first = ", ".join(f"layer{n:03}" for n in range(19))
    assert str(e.value) == f"no tensor named 'zooms' (have: zoom, {first} and 81 more)"
    assert e.value.hint == "did you mean 'zoom'?"


def test_twenty_names_are_all_listed_in_order() -> None:
    letters = "abcdefghijklmnopqrst"
    with pytest.raises(UsageError) as e:
        choose("z", dict.fromkeys(letters), "letter")

    assert str(e.value) == f"no letter named 'z' (have: {', '.join(letters)})"


def test_names_from_a_file_cannot_fake_a_line() -> None:
    with pytest.raises(UsageError) as e:
        choose("line", {"line\n\x1b[2J": 1}, "tensor")

    assert str(e.value) == "no tensor named 'line' (have: line\\n\\x1b[2J)"
    assert str(e.value.hint).isprintable()


def test_a_module_attribute_is_loaded_and_absent_ones_are_refused() -> None:
    assert load_attribute("os.path:join", "thing") is __import__("os").path.join
    for name in ("os.path", "os:", ":x", "os:no_such", "no_such_module:x"):
        with pytest.raises(UsageError):
            load_attribute(name, "thing")


def test_data_is_found_in_this_checkout() -> None:
    assert (data_folder("devices") / "rpi4.toml").is_file()
    assert (data_folder("calibration") / "fashion-mnist" / "set.toml").is_file()


def test_the_only_bundle_is_taken_none_or_two_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no bundle") as caught:
        only_bundle_here(tmp_path)
    assert "edgeexit convert" in str(caught.value.hint)

    (tmp_path / "a.edgeexit").mkdir()
    assert only_bundle_here(tmp_path) == tmp_path / "a.edgeexit"

    (tmp_path / "b.edgeexit").mkdir()
    with pytest.raises(UsageError, match="2 bundles"):
        only_bundle_here(tmp_path)
