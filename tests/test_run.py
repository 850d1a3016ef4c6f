"""`edgeexit run` as a user types it."""

import io
import json
import os
import re
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_runtime import SAMPLES, make_bundle, stop_at
from tiny import tiny_model

from edgeexit.bundle import Bundle
from edgeexit.cli import entry
from edgeexit.journal import Journal

Captured = pytest.CaptureFixture[str]


@pytest.fixture
def bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bundle:
    monkeypatch.chdir(tmp_path)
    made = make_bundle(tmp_path)
    for index, sample in enumerate(SAMPLES):
        Image.fromarray(sample[..., 0]).save(tmp_path / f"{index}.png")
    return made


def lines(text: str) -> list[dict[str, object]]:
    return [json.loads(line) for line in text.splitlines()]


def test_selftest(bundle: Bundle, capsys: Captured) -> None:
    assert entry(["run"]) == 0
    assert "self-test ok: 6 samples" in capsys.readouterr().out
    assert entry(["run", "--json"]) == 0
    assert lines(capsys.readouterr().out)[0]["selftest"] == "ok"


def test_json_lines_have_exactly_the_promised_keys(bundle: Bundle, capsys: Captured) -> None:
    assert entry(["run", "0.png", "1.png", "--json"]) == 0
    captured = capsys.readouterr()
    found = lines(captured.out)
    assert [answer["input"] for answer in found] == ["0.png", "1.png"]
    assert list(found[0]) == ["input", "label", "class", "confidence", "exit", "latency_ms"]
    assert "no policy" in captured.err


def test_all_exits_and_top(bundle: Bundle, capsys: Captured) -> None:
    stop_at(bundle, "exit0").save(bundle.policy_path("host"))
    assert entry(["run", "0.png", "--json", "--all-exits", "--top", "2"]) == 0
    answer = lines(capsys.readouterr().out)[0]
    assert np.shape(answer["logits"]) == (3, 4)
    assert answer["exit"] == 2
    top = answer["top"]
    assert isinstance(top, list)
    assert (len(top), top[0]["label"]) == (2, answer["label"])


def test_policy_file_and_none(bundle: Bundle, tmp_path: Path, capsys: Captured) -> None:
    stop_at(bundle, "exit1").save(tmp_path / "p.json")
    assert entry(["run", "tiny.edgeexit/", "0.png", "--json", "--policy", "p.json"]) == 0
    assert lines(capsys.readouterr().out)[0]["exit"] == 1
    assert entry(["run", "--bundle", "tiny.edgeexit", "0.png", "--json", "--policy", "none"]) == 0
    assert lines(capsys.readouterr().out)[0]["exit"] == 2


def test_min_confidence(bundle: Bundle, capsys: Captured) -> None:
    assert entry(["run", "0.png", "--json", "--min-confidence", "1.5"]) == 0
    assert lines(capsys.readouterr().out)[0]["class"] == "unsure"


def test_a_bad_picture_among_many_is_reported_and_the_others_go_on(
    bundle: Bundle, tmp_path: Path, capsys: Captured
) -> None:
    (tmp_path / "bad.png").write_bytes((tmp_path / "0.png").read_bytes()[:60])
    assert entry(["run", "0.png", "bad.png", "absent.png", "1.png", "--json"]) == 3
    captured = capsys.readouterr()
    assert [answer["input"] for answer in lines(captured.out)] == ["0.png", "1.png"]
    errors = [line for line in captured.err.splitlines() if line.startswith("Error: ")]
    assert [("bad.png" in errors[0]), ("absent.png" in errors[1])] == [True, True]
    assert "2 answered, 2 failed" in captured.err


def test_every_kind_of_input_gives_the_same_answers(
    bundle: Bundle, tmp_path: Path, capsys: Captured
) -> None:
    np.save(tmp_path / "all.npy", SAMPLES)
    np.save(tmp_path / "one.npy", SAMPLES[0])
    np.savez(tmp_path / "all.npz", samples=SAMPLES)
    folder = tmp_path / "pictures"
    folder.mkdir()
    for path in tmp_path.glob("*.png"):
        path.rename(folder / path.name)
    found = {}
    for name in ("all.npy", "all.npz", "pictures", "pictures/*.png"):
        assert entry(["run", name, "--json"]) == 0
        found[name] = [a["confidence"] for a in lines(capsys.readouterr().out)]
    assert entry(["run", "one.npy", "--json"]) == 0
    assert lines(capsys.readouterr().out)[0]["confidence"] == found["all.npy"][0]
    assert all(row == found["all.npy"] for row in found.values())


def frame(data: bytes) -> bytes:
    return struct.pack("<I", len(data)) + data


def run_frames(stream: bytes, *options: str) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-m", "edgeexit", "run", "-", "--json", *options]
    return subprocess.run(command, input=stream, capture_output=True, timeout=60, check=False)


def test_frames_on_stdin(bundle: Bundle, tmp_path: Path) -> None:
    buffer = io.BytesIO()
    np.save(buffer, SAMPLES[1])
    picture = frame((tmp_path / "0.png").read_bytes())
    stream = picture + frame(b"junk") + frame(buffer.getvalue())

    done = run_frames(stream)
    assert done.returncode == 3
    assert [a["input"] for a in lines(done.stdout.decode())] == ["-[0]", "-[2]"]
    assert b"Traceback" not in done.stderr

    cut_off = run_frames(picture + picture[:-5])
    assert cut_off.returncode == 3
    assert len(lines(cut_off.stdout.decode())) == 1


def test_signals_show_the_summary(bundle: Bundle, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "edgeexit", "run", "-", "--json"]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as child:
        assert child.stdin is not None and child.stdout is not None and child.stderr is not None
        child.stdin.write(frame((tmp_path / "0.png").read_bytes()))
        child.stdin.flush()
        child.stdout.readline()
        os.kill(child.pid, signal.SIGUSR1)
        time.sleep(0.5)
        os.kill(child.pid, signal.SIGINT)
        time.sleep(0.5)
        child.stdin.close()
        errors = child.stderr.read().decode()
    assert errors.count("1 answered") >= 1
    assert "Traceback" not in errors
    assert child.returncode == 130


def test_log_and_annotate(bundle: Bundle, tmp_path: Path) -> None:
    assert entry(["run", "0.png", "1.png", "--log", "log.jsonl", "--annotate", "out"]) == 0
    assert len(lines((tmp_path / "log.jsonl").read_text())) == 2
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["000001-0.png", "000002-1.png"]


def test_log_rotates(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "log.jsonl", limit_bytes=100)
    for number in range(60):
        journal.write({"number": number})
    journal.close()
    files = sorted(p.name for p in tmp_path.iterdir())
    assert files == ["log.jsonl", "log.jsonl.1", "log.jsonl.2", "log.jsonl.3"]
    assert all(p.stat().st_size <= 100 for p in tmp_path.iterdir())
    assert lines((tmp_path / "log.jsonl").read_text())[-1] == {"number": 59}


def test_nothing_to_run_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert entry(["run"]) == 2
    assert entry(["run", "absent.edgeexit"]) == 2


def test_arrays(tmp_path: Path, capsys: Captured) -> None:
    from edgeexit.bundle import write_bundle
    from edgeexit.preprocess import Preprocess

    model = tiny_model()
    samples = np.random.default_rng(0).random((3, 12, 10, 1)).astype(np.float32)
    made = write_bundle(
        tmp_path / "array.edgeexit",
        name="array",
        model_data=model.data,
        exits=model.exits,
        class_names=list("abcd"),
        preprocess=Preprocess(kind="array", layout="as-is"),
        selftest=samples,
        scheme="int8",
        provenance={},
    )
    np.save(tmp_path / "all.npy", samples)
    np.save(tmp_path / "wrong.npy", samples[:, :5])
    np.save(tmp_path / "nan.npy", samples[0] * np.float32("nan"))
    (tmp_path / "broken.npy").write_bytes(b"\x93NUMPY\x01\x00\xff\xff")
    assert entry(["run", str(made.path)]) == 0
    assert entry(["run", str(made.path), str(tmp_path / "all.npy"), "--json"]) == 0
    assert len(lines(capsys.readouterr().out.partition("\n")[2])) == 3
    for name, code in (("wrong", 2), ("nan", 2), ("broken", 3)):
        assert entry(["run", str(made.path), str(tmp_path / f"{name}.npy")]) == code


# ---------------------------------------------------------------- live


@pytest.fixture
def camera(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))


def test_live_answers_say_their_age_and_what_was_dropped(
    bundle: Bundle, camera: None, capsys: Captured
) -> None:
    assert entry(["run", "cameras:fast:3000", "--json"]) == 0
    captured = capsys.readouterr()
    found = lines(captured.out)

    usual = ["input", "label", "class", "confidence", "exit", "latency_ms"]
    assert list(found[0]) == [*usual, "age_ms", "dropped"]
    assert found[-1]["input"] == "cameras:fast:3000[3000]"
    assert len(found) + int(str(found[-1]["dropped"])) == 3000
    assert f"{len(found)} answered, 0 failed" in captured.err
    assert (
        f"cameras:fast:3000: {3000 - len(found)} dropped, 0 bad, 0 times reopened" in captured.err
    )


def test_changes_shows_and_logs_an_answer_only_if_its_class_is_new(
    bundle: Bundle, tmp_path: Path, capsys: Captured
) -> None:
    np.save(tmp_path / "a.npy", np.repeat(SAMPLES[:2], 5, axis=0))
    assert entry(["run", "a.npy", "--json"]) == 0
    everything = lines(capsys.readouterr().out)
    assert entry(["run", "a.npy", "--json", "--changes", "--log", "log.jsonl"]) == 0
    captured = capsys.readouterr()
    shown, logged = lines(captured.out), lines((tmp_path / "log.jsonl").read_text())

    labels = [answer["label"] for answer in everything]
    news = [k for k in range(10) if k == 0 or labels[k] != labels[k - 1]]
    assert [answer["input"] for answer in shown] == [everything[k]["input"] for k in news]
    assert logged == shown
    assert "10 answered" in captured.err


def test_bad_frames_of_a_source_that_is_not_live_are_reported_one_by_one(
    bundle: Bundle, camera: None, capsys: Captured
) -> None:
    assert entry(["run", "cameras:garbage:2", "--json"]) == 3
    captured = capsys.readouterr()

    assert len(lines(captured.out)) == 2
    assert sum(line.startswith("Error: ") for line in captured.err.splitlines()) == 18
    assert "2 answered, 18 failed" in captured.err


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["camera:", "0.png"], 2, "a live source stands alone, found 2 inputs"),
        (["0.png", "--rate", "5"], 2, "--rate is for live sources"),
        (["kamera:"], 2, "no input source named 'kamera'"),
        (["v4l2:/dev/video77"], 5, "Error: v4l2:/dev/video77: no /dev/video77 here"),
        (["cameras:steady", "--rate", "0"], 2, "0"),
    ],
)
def test_wrong_live_words(
    bundle: Bundle, capsys: Captured, words: list[str], code: int, said: str
) -> None:
    assert entry(["run", *words]) == code
    captured = capsys.readouterr()

    assert said in captured.err
    assert captured.out == ""
    assert "answered" not in captured.err


def test_the_camera_example_acts_on_a_replay() -> None:
    root = Path(__file__).resolve().parents[1] / "examples"
    done = subprocess.run(
        [
            *(sys.executable, root / "camera.py", root / "fashion.edgeexit"),
            f"replay:{root / 'images'},fps=9,times=2",
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    *acted, last = done.stdout.splitlines()

    pictures = len(list((root / "images").glob("*.png")))
    match = re.fullmatch(r"(\d+) frames answered; .*: (\d+) dropped, 0 bad, 0 times reopened", last)
    assert match
    assert int(match[1]) + int(match[2]) == 2 * pictures
    assert len(acted) >= 2
