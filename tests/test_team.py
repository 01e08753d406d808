from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpoc.errors import MpocError
from mpoc.team import Team, team


@given(st.lists(st.floats(0, 100), max_size=30), st.integers(1, 5))
def test_work_is_shared_out_whole_and_evenly(costs: list[float], size: int) -> None:
    shares = [Team(rank, size).share(costs) for rank in range(size)]
    assert sorted(number for share in shares for number in share) == list(range(len(costs)))
    loads = [sum(costs[number] for number in share) for share in shares]
    assert max(loads) - min(loads) <= max(costs, default=0) + 1e-9  # of the largest-first rule
    assert all(share == sorted(share) for share in shares)


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
