from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpoc.errors import MpocError
from mpoc.team import Team, team
from tests.teams import in_threads


@given(st.lists(st.floats(0, 100), max_size=30), st.integers(1, 5))
def test_work_is_shared_out_whole_and_evenly(costs: list[float], size: int) -> None:
    shares = [Team(rank, size).share(costs) for rank in range(size)]
    assert sorted(number for share in shares for number in share) == list(range(len(costs)))
    loads = [sum(costs[number] for number in share) for share in shares]
    assert max(loads) - min(loads) <= max(costs, default=0) + 1e-9  # of the largest-first rule
    assert all(share == sorted(share) for share in shares)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_each_piece_is_done_once_and_known_to_all(size: int) -> None:
    done: list[int] = []

    def square(number: int) -> int:
        done.append(number)
        return number**2

    costs = [1.0, 5.0, 2.0, 2.0, 1.0]
    found = in_threads(size, lambda mates: mates.each(range(5), square, costs))
    assert found == [[0, 1, 4, 9, 16]] * size
    assert sorted(done) == list(range(5))
    assert in_threads(size, lambda mates: mates.each([], square)) == [[]] * size
    assert in_threads(size, lambda mates: mates.by_first(lambda: mates.rank)) == [0] * size


def test_an_error_of_one_ends_all() -> None:
    def fail(number: int) -> None:
        if number == 1:
            raise MpocError("no")

    def ended(mates: Team) -> type[BaseException] | None:
        try:
            mates.each([0, 1, 2], fail)
        except BaseException as error:
            return type(error)
        return None

    assert in_threads(3, ended) == [MpocError, SystemExit, SystemExit]


def test_one_process_needs_nobody() -> None:
    with team() as alone:
        assert alone == Team()
        assert alone.is_first
        assert alone.told("a") == "a"
        with alone.together():
            pass
        error = MpocError("no")
        with pytest.raises(MpocError) as caught, alone.together():
            raise error
        assert caught.value is error
