"""The ledger counts every look at a certificate's samples once, and loses none."""

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeexit import ledger
from edgeexit.errors import BadFile, StorageError, UsageError
from edgeexit.samples import find_set

KEY, OTHER = "a" * 64, "b" * 64


def request(number: int) -> str:
    return ledger.request_digest({"number": number})


def filled(path: Path, count: int = 3) -> Path:
    for number in range(count):
        ledger.spend(path, KEY, request(number), {"level": 0.01, "measure": "max_prob"})
    ledger.spend(path, OTHER, request(0), {"level": 0.005})
    return path


def test_uses_of_one_split_are_numbered_from_one_and_others_do_not_count(tmp_path: Path) -> None:
    path = tmp_path / "new" / "ledger.json"

    uses = [ledger.spend(path, KEY, request(k), {}).use for k in range(3)]

    assert uses == [1, 2, 3]
    assert ledger.spend(path, OTHER, request(0), {}).use == 1
    assert [p.name for p in path.parent.iterdir()] == ["ledger.json"]


def test_the_same_request_again_is_the_same_use(tmp_path: Path) -> None:
    path = filled(tmp_path / "ledger.json")
    before = path.read_bytes()

    again = ledger.spend(path, KEY, request(1), {"level": 0.01, "measure": "max_prob"})

    assert again == ledger.find(path, KEY, request(1))
    assert again.use == 2
    assert path.read_bytes() == before


def test_reading_counts_nothing(tmp_path: Path) -> None:
    path = tmp_path / "ledger.json"
    assert ledger.next_use(path, KEY, request(0)) == 1
    assert ledger.find(path, KEY, request(0)) is None
    assert not path.exists()

    filled(path, 2)
    before = path.read_bytes()

    assert ledger.next_use(path, KEY, request(0)) == 1
    assert ledger.next_use(path, KEY, request(9)) == 3
    assert ledger.find(path, KEY, request(9)) is None
    assert path.read_bytes() == before


def test_an_entry_comes_back_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "ledger.json"
    facts = {"level": 0.01, "exits": ("a", "b"), "name": "Käfer 🐞", "nothing": None}

    entry = ledger.spend(path, KEY, request(0), facts)

    assert ledger.find(path, KEY, request(0)) == entry
    assert json.loads(path.read_text())["splits"][KEY] == [entry.to_document()]
    assert entry.to_document()["exits"] == ["a", "b"]


@given(st.floats(1e-9, 1 - 1e-9), st.integers(1, 300))
def test_the_shares_of_any_number_of_uses_sum_to_less_than_delta(delta: float, uses: int) -> None:
    shares = [ledger.share(delta, use) for use in range(1, uses + 1)]

    assert shares == sorted(shares, reverse=True)
    assert 0 < math.fsum(shares) < delta


def test_the_first_share_is_six_over_pi_squared() -> None:
    assert ledger.share(0.05, 1) == pytest.approx(0.030396, rel=1e-4)
    assert ledger.share(0.05, 2) == pytest.approx(0.007599, rel=1e-4)


@pytest.mark.parametrize(("delta", "use"), [(0.0, 1), (1.0, 1), (float("nan"), 1), (0.05, 0)])
def test_senseless_shares_are_refused(delta: float, use: int) -> None:
    with pytest.raises(UsageError, match=r"^(delta|use): "):
        ledger.share(delta, use)


@given(st.permutations(range(6)))
def test_a_split_is_its_samples_in_any_order(order: list[int]) -> None:
    digests = np.arange(96, dtype=np.uint8).reshape(6, 16)

    assert ledger.split_key(digests[order]) == ledger.split_key(digests)
    assert ledger.split_key(digests[order[:5]]) != ledger.split_key(digests)


def test_requests_differ_if_any_value_does() -> None:
    base = {"level": 0.01, "record": "x", "options": {"seed": 0}}

    assert ledger.request_digest(dict(reversed(base.items()))) == ledger.request_digest(base)
    assert ledger.request_digest({**base, "level": 0.02}) != ledger.request_digest(base)
    assert ledger.request_digest({**base, "options": {"seed": 1}}) != ledger.request_digest(base)


# ---------------------------------------------------------------- damage


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return filled(tmp_path_factory.mktemp("ledger") / "ledger.json")


@settings(max_examples=400, deadline=None)
@given(st.data())
def test_one_altered_bit_is_seen(written: Path, data: st.DataObject) -> None:
    good = written.read_bytes()
    bit = data.draw(st.integers(0, 8 * len(good) - 1))
    bad = bytearray(good)
    bad[bit // 8] ^= 1 << bit % 8
    path = written.with_name("bad.json")
    path.write_bytes(bytes(bad))

    with pytest.raises(BadFile):
        ledger.spend(path, KEY, request(0), {})
    assert path.read_bytes() == bytes(bad)


def test_every_single_cut_of_the_file_is_seen(written: Path) -> None:
    good = written.read_bytes()
    path = written.with_name("cut.json")
    for length in range(0, len(good), 7):
        path.write_bytes(good[:length])
        with pytest.raises(BadFile):
            ledger.next_use(path, KEY, request(0))


def test_an_entry_taken_out_is_seen(written: Path) -> None:
    document = json.loads(written.read_text())
    del document["splits"][KEY][1]
    document["splits"][KEY][1]["use"] = 2
    path = written.with_name("shorter.json")
    path.write_text(json.dumps(document, indent=1) + "\n")

    with pytest.raises(BadFile, match=r"splits\.a+\[1\]: altered") as refusal:
        ledger.spend(path, KEY, request(7), {})
    assert "copy" in str(refusal.value.hint)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "not valid JSON"),
        ("[]", "expected a JSON object"),
        ('{"format": 2, "splits": {}}', "format: found 2, this version reads 1"),
        ('{"format": 1}', "splits: missing"),
        ('{"format": 1, "splits": {}, "more": 1}', "more: unknown key"),
        ('{"format": 1, "splits": {"x": 1}}', "splits.x: expected list"),
        ('{"format": 1, "splits": {"x": [{}]}}', r"splits.x\[0\].request: missing"),
        ('{"format": 1, "splits": {}}', "altered: not as edgeexit wrote it"),
    ],
)
def test_another_file_is_refused_and_left_alone(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "ledger.json"
    path.write_text(text)

    with pytest.raises(BadFile, match=words) as refusal:
        ledger.spend(path, KEY, request(0), {})
    assert refusal.value.hint
    assert path.read_text() == text


def test_a_ledger_that_cannot_be_written_counts_nothing_and_says_what_helps(tmp_path: Path) -> None:
    (tmp_path / "file").touch()

    with pytest.raises(StorageError, match="cannot count this use") as refusal:
        ledger.spend(tmp_path / "file" / "ledger.json", KEY, request(0), {})
    assert "--ledger" in str(refusal.value.hint)


def test_a_full_disk_leaves_the_old_ledger_and_no_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = filled(tmp_path / "ledger.json")
    before = path.read_bytes()

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        with pytest.raises(StorageError, match="No space left"):
            ledger.spend(path, KEY, request(8), {})

    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["ledger.json"]
    assert ledger.spend(path, KEY, request(8), {}).use == 4


def test_a_counted_use_needs_no_storage_that_can_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = filled(tmp_path / "ledger.json")
    monkeypatch.setattr(ledger, "write_file", None)
    monkeypatch.setattr(ledger, "hold", None)

    assert ledger.spend(path, KEY, request(2), {}).use == 3


@pytest.mark.parametrize("facts", [{"use": 1}, {"digest": ""}, {"x": float("nan")}])
def test_facts_are_json_and_no_key_of_the_ledger(tmp_path: Path, facts: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"own keys|Out of range"):
        ledger.spend(tmp_path / "ledger.json", KEY, request(0), facts)


# ---------------------------------------------------------------- several at once

SPENDER = """
import sys
from pathlib import Path
from edgeexit import ledger
path, key, first, count = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
print("ready", flush=True)
sys.stdin.readline()
for k in range(first, first + count):
    print(ledger.spend(path, key, ledger.request_digest({"number": k}), {}).use)
"""


def spenders(path: Path, firsts: list[int], count: int) -> list[list[int]]:
    """What processes that start at the same time are told."""
    command = [sys.executable, "-c", SPENDER, str(path), KEY]
    running = [
        subprocess.Popen(
            [*command, str(first), str(count)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for first in firsts
    ]
    for child in running:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
    for child in running:
        assert child.stdin is not None
        child.stdin.write("go\n")
        child.stdin.flush()
    told = [child.communicate()[0].split() for child in running]
    assert [child.returncode for child in running] == [0] * len(firsts)
    return [[int(use) for use in uses] for uses in told]


def test_processes_at_the_same_time_are_all_counted(tmp_path: Path) -> None:
    path = tmp_path / "ledger.json"
    link = tmp_path / "link.json"
    link.symlink_to(path)

    told = spenders(link, [0, 100, 200], 15)

    assert sorted(use for uses in told for use in uses) == list(range(1, 46))
    assert ledger.next_use(path, KEY, request(999)) == 46
    assert link.is_symlink()
    assert {p.name for p in tmp_path.iterdir()} == {"ledger.json", "link.json"}


def test_processes_with_the_same_requests_share_the_uses(tmp_path: Path) -> None:
    path = tmp_path / "ledger.json"

    told = spenders(path, [0, 0], 10)

    assert told[0] == told[1] == list(range(1, 11))


# ---------------------------------------------------------------- where it lies


def test_it_lies_beside_the_set_that_the_record_names(tmp_path: Path) -> None:
    shipped = find_set("fashion-mnist")
    record = tmp_path / "mine.npz"

    assert ledger.place(shipped.name, shipped.digest, record) == shipped.folder / "ledger.json"
    assert ledger.place(shipped.name, shipped.digest, None) == shipped.folder / "ledger.json"


@pytest.mark.parametrize(("name", "digest"), [("fashion-mnist", "0"), ("gone", "0"), ("", "")])
def test_without_that_set_it_lies_beside_the_record(tmp_path: Path, name: str, digest: str) -> None:
    record = tmp_path / "mine.npz"

    assert ledger.place(name, digest, record) == tmp_path / "mine.npz.ledger.json"
    with pytest.raises(UsageError) as refusal:
        ledger.place(name, digest, None)
    assert "--ledger" in str(refusal.value.hint)
