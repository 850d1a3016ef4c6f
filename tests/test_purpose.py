"""What a file of labels may say, and what is asked for where nothing says what a network is for."""

import json
from pathlib import Path

import pytest

from edgeexit.errors import BadFile, UsageError
from edgeexit.host.purpose import MAX_NAME, Purpose, parse_labels, read_preprocess
from edgeexit.preprocess import Preprocess

ROW = Preprocess(kind="array", layout="as-is")


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_labels_are_lines_without_the_spaces_around_them(end: str) -> None:
    text = end.join(["\ufeffcat", " dog ", "Kühl\u3000schrank", "", ""])
    assert parse_labels(text.encode(), "l.txt") == ("cat", "dog", "Kühl\u3000schrank")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"", "found an empty one"),
        (b"a\n\nb", "found an empty one"),
        (b"a\nb\na", "'a' stands there twice"),
        (b"a\n\x1b[2J", "line 2: .*control character"),
        (b"a\x00", "line 1: .*control character"),
        ("a\u2028b".encode(), "line 1: .*control character"),
        (b"a\n" + b"b" * (MAX_NAME + 1), f"line 2: .*at most {MAX_NAME}"),
        (b"\xff\xfe", "UTF-8"),
    ],
)
def test_what_is_no_list_of_names_is_refused_by_its_line(text: bytes, words: str) -> None:
    with pytest.raises(BadFile, match=rf"l\.txt: .*{words}"):
        parse_labels(text, "l.txt")


@pytest.mark.parametrize(
    ("labels", "preprocess", "what", "option"),
    [
        (None, None, "classes and inputs", "--labels FILE.txt and --preprocess"),
        (None, ROW, "classes it", "--labels"),
        (("a", "b"), None, "inputs it", "--preprocess"),
    ],
)
def test_what_nobody_says_is_asked_for(
    labels: tuple[str, ...] | None,
    preprocess: Preprocess | None,
    what: str,
    option: str,
    tmp_path: Path,
) -> None:
    (tmp_path / "bare.npz").touch()
    for calibration in (None, tmp_path / "bare.npz"):
        with pytest.raises(UsageError, match=f"net: does not say which {what}") as refusal:
            Purpose.said("net", calibration, labels, preprocess)
        assert f"give {option}" in str(refusal.value.hint)


def test_a_set_that_was_mistyped_is_what_is_told() -> None:
    with pytest.raises(UsageError, match="'fashion-mnits'") as refusal:
        Purpose.said("net", "fashion-mnits", None, None)
    assert refusal.value.hint == "did you mean 'fashion-mnist'?"


@pytest.mark.parametrize("head", ["", "[preprocess]\n", 'name = "a set"\n[preprocess]\n'])
def test_a_set_s_own_file_may_say_the_preprocessing(head: str, tmp_path: Path) -> None:
    rows = [f"{key} = {json.dumps(value)}\n" for key, value in ROW.to_document().items()]
    (tmp_path / "p.toml").write_text(head + "".join(rows))
    assert read_preprocess(tmp_path / "p.toml") == ROW


@pytest.mark.parametrize(
    "text", ["", "preprocess = 3", '[preprocess]\nkind = "image"', 'knid = "array"']
)
def test_wrong_keys_of_a_preprocessing_are_refused_with_a_hint(text: str, tmp_path: Path) -> None:
    (tmp_path / "p.toml").write_text(text)
    with pytest.raises(BadFile, match=r"p\.toml") as refusal:
        read_preprocess(tmp_path / "p.toml")
    assert refusal.value.hint
