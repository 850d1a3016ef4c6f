"""Which paths are timed: all that could pay, and no file twice."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st
from small import EXITS, made_cases, small_bundle

from edgeexit.bundle import Bundle
from edgeexit.errors import UsageError
from edgeexit.paths import ALL_SUBSETS_UP_TO, kept_sets, paths


@pytest.fixture(scope="module", params=[1, 3, 4, 6])
def bundle(request, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return small_bundle(tmp_path_factory.mktemp("paths"), exits=request.param)


def files_up_to(bundle: Bundle, kept: tuple[str, ...], exit: str) -> tuple[bytes, ...]:
    chain = bundle.chain(kept)
    return tuple(link.load() for link in chain[: kept.index(exit) + 1])


def test_every_exit_of_every_kept_set_is_timed_once(bundle: Bundle) -> None:
    pairs = [pair for case in paths(bundle) for pair in case.stands_for]

    assert sorted(pairs) == sorted((k, name) for k in kept_sets(bundle.exits) for name in k)


def test_paths_are_one_case_exactly_if_their_files_are_the_same(bundle: Bundle) -> None:
    cases = paths(bundle)
    seen = [{files_up_to(bundle, *pair) for pair in case.stands_for} for case in cases]

    assert all(len(files) == 1 for files in seen)
    assert len(set().union(*seen)) == len(cases)


def test_leaving_at_the_first_exit_is_the_same_whichever_later_ones_are_kept(tmp_path) -> None:
    bundle = small_bundle(tmp_path)
    (case,) = [c for c in paths(bundle) if (EXITS, "exit0") in c.stands_for]

    assert (("exit0", "exit2"), "exit0") in case.stands_for
    assert len(paths(bundle)) == len(made_cases(EXITS)) == 9


def test_the_final_exit_alone_is_always_there_and_sets_may_come_in_any_order(tmp_path) -> None:
    bundle = small_bundle(tmp_path)
    cases = paths(bundle, [("exit1", "exit0"), ("exit0", "exit1")])

    assert [(c.kept, c.exit) for c in cases] == [
        (("exit0", "exit1"), "exit0"),
        (("exit0", "exit1"), "exit1"),
        (("exit2",), "exit2"),
    ]


@pytest.mark.parametrize("kept", [(), ("exit7",)])
def test_unknown_exits_and_none_at_all_are_refused(tmp_path, kept) -> None:
    with pytest.raises(UsageError):
        paths(small_bundle(tmp_path), [kept])


@given(st.integers(1, 20))
def test_the_plan_holds_the_full_set_and_each_exit_alone_and_grows_with_the_exits(count) -> None:
    exits = tuple(f"e{k}" for k in range(count))
    sets = kept_sets(exits)

    assert sets[0] == exits
    assert {(name,) for name in exits} <= set(sets)
    assert len(set(sets)) == len(sets)
    assert all(kept[-1] == exits[-1] or len(kept) == 1 for kept in sets)
    assert all(kept == tuple(name for name in exits if name in kept) for kept in sets)
    if count > ALL_SUBSETS_UP_TO:
        assert sum(map(len, sets)) <= 3 * count
    else:
        final = [k for n in range(count) for k in itertools.combinations(exits[:-1], n)]
        assert {(*kept, exits[-1]) for kept in final} <= set(sets)
