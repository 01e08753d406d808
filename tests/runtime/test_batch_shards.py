from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mpoc.runtime.distributed import BatchShards, ProcessGroup
from tests.support.process_groups import in_threads


def rows(index: int) -> Tensor:
    return torch.randn(7, 3, generator=torch.Generator().manual_seed(index))


def total(count: int, group: ProcessGroup) -> dict[str, Tensor]:
    """Of float32 squares, so that the order of sums shows; one key is of some parts only."""

    def measure(part: range) -> dict[str, Tensor]:
        found = {"squares": torch.stack([rows(k).T @ rows(k) for k in part]).sum(0)}
        return found | ({"third": torch.ones(1)} if 3 in part else {})

    return BatchShards(count, group).total(measure, torch.add)


@given(st.integers(1, 40))
def test_shards_hold_every_batch_once(count: int) -> None:
    every = BatchShards(count).every
    assert [index for part in every for index in part] == list(range(count))
    assert len(every) == max(1, min(8, count // 2))  # no shard of one batch where there are more
    lengths = [len(part) for part in every]
    assert max(lengths, default=0) - min(lengths, default=0) <= 1
    assert BatchShards(count).mine == list(range(count))


@pytest.mark.parametrize("count", [1, 2, 5, 8, 13])
@pytest.mark.parametrize("size", [1, 2, 3, 9])
def test_result_does_not_depend_on_the_number_of_processes(count: int, size: int) -> None:
    wanted = total(count, ProcessGroup())
    every = torch.cat([rows(k) for k in range(count)]).double()
    assert torch.allclose(wanted["squares"].double(), every.T @ every, rtol=1e-5, atol=1e-5)
    assert ("third" in wanted) == (count > 3)
    for found in in_threads(size, lambda group: total(count, group)):
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[key], wanted[key]) for key in wanted)


def test_processes_take_distinct_batches() -> None:
    mine = in_threads(3, lambda group: BatchShards(20, group).mine)
    assert sorted(index for one in mine for index in one) == list(range(20))
    assert all(5 <= len(one) <= 8 for one in mine)
