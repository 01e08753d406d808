from __future__ import annotations

import errno
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path
from textwrap import dedent

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mpoc.errors import MpocError, UsageError
from mpoc.runtime.distributed import ProcessGroup, is_main, map_in_threads, process_group
from tests.support.process_groups import in_threads


@pytest.mark.slow
@given(st.lists(st.floats(0, 100), max_size=30), st.integers(1, 5))
def test_splits_work_evenly(costs: list[float], size: int) -> None:
    shares = [ProcessGroup(rank, size).own_indices(costs) for rank in range(size)]
    assert sorted(number for share in shares for number in share) == list(range(len(costs)))
    loads = [sum(costs[number] for number in share) for share in shares]
    assert max(loads) - min(loads) <= max(costs, default=0) + 1e-9  # of the largest-first rule
    assert all(share == sorted(share) for share in shares)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_map_runs_each_item_once_and_shares_results(size: int) -> None:
    done: list[int] = []

    def square(number: int) -> int:
        done.append(number)
        return number**2

    costs = [1.0, 5.0, 2.0, 2.0, 1.0]
    found = in_threads(size, lambda group: group.map(range(5), square, costs))
    assert found == [[0, 1, 4, 9, 16]] * size
    assert sorted(done) == list(range(5))
    assert in_threads(size, lambda group: group.map([], square)) == [[]] * size
    assert in_threads(size, lambda group: group.on_main(lambda: group.rank)) == [0] * size


@pytest.mark.parametrize("size", [1, 3])
def test_broadcasts_from_the_main_process(size: int) -> None:
    found = in_threads(size, lambda group: list(group.map_to_main("abcd", str.upper)))
    assert found == [list("ABCD"), *[[None] * 4] * (size - 1)]


@pytest.fixture
def two_threads(request: pytest.FixtureRequest) -> None:
    request.addfinalizer(partial(torch.set_num_threads, torch.get_num_threads()))
    torch.set_num_threads(2)


@pytest.mark.usefixtures("two_threads")
def test_a_process_works_on_several_small_items_at_once() -> None:
    """Two of them wait for each other, each on one thread; the others have all threads, one by one."""
    meeting = threading.Barrier(2, timeout=30)

    def work(number: int) -> tuple[int, int]:
        if number < 2:
            meeting.wait()
        return number, torch.get_num_threads()

    wanted = [(2, 2), (0, 1), (3, 2), (1, 1)]
    assert ProcessGroup().map([2, 0, 3, 1], work, is_small=lambda k: k < 2) == wanted
    assert list(ProcessGroup().map_to_main([2, 0, 3, 1], work, is_small=lambda k: k < 2)) == wanted
    assert torch.get_num_threads() == 2


@pytest.mark.usefixtures("two_threads")
def test_an_error_ends_items_that_wait() -> None:
    done: list[int] = []

    def work(number: int) -> None:
        done.append(number)
        if number == 0:
            raise UsageError("no")
        time.sleep(0.05)

    with pytest.raises(UsageError, match="no"):
        map_in_threads(range(100), work)
    assert len(done) < 10


def test_a_signal_ends_a_process_while_its_threads_work(tmp_path: Path) -> None:
    code = f"""
        import os, signal, time, torch
        from mpoc.runtime.distributed import exit_process, map_in_threads
        torch.set_num_threads(2)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        def work(number):
            if number == 0:
                os.kill(os.getpid(), signal.SIGINT)
            time.sleep(60)
            open({str(tmp_path / "late")!r}, "w")
        try:
            map_in_threads(range(4), work)
        except KeyboardInterrupt:
            exit_process(130)
    """
    begin = time.monotonic()
    found = subprocess.run([sys.executable, "-c", dedent(code)], timeout=60, check=False)
    assert found.returncode == 130 and time.monotonic() - begin < 30
    assert not (tmp_path / "late").exists()


def test_error_in_one_process_raises_in_all() -> None:
    def ended(group: ProcessGroup, error: Exception) -> list[str]:
        def work(number: int) -> None:
            if number == 1:
                raise error

        try:
            group.map([0, 1, 2], work)
        except BaseException as found:
            return [type(found).__name__, str(found)]
        return []

    silent = ["SystemExit", "2"]
    found = in_threads(3, lambda group: ended(group, UsageError("no")))
    assert found == [["UsageError", "no"], silent, silent]
    full = OSError(errno.ENOSPC, "No space left", "m.safetensors")
    found = in_threads(2, lambda group: ended(group, full))
    assert found == [["OSError", str(full)], ["SystemExit", "1"]]
    found = in_threads(2, lambda group: ended(group, ZeroDivisionError("x")))
    assert found[0][0] == "MpocError" and "ZeroDivisionError('x')" in found[0][1]


def test_single_process_needs_no_group() -> None:
    with process_group() as alone:
        assert alone == ProcessGroup()
        assert alone.is_main
        assert alone.broadcast("a") == "a"
        with alone.all_or_raise():
            pass
        error = MpocError("no")
        with pytest.raises(MpocError) as caught, alone.all_or_raise():
            raise error
        assert caught.value is error


@pytest.mark.parametrize(("rank", "main"), [(None, True), ("0", True), ("1", False)])
def test_main_process_has_rank_zero(monkeypatch: pytest.MonkeyPatch, rank: str | None, main: bool) -> None:
    if rank is None:
        monkeypatch.delenv("RANK", raising=False)
    else:
        monkeypatch.setenv("RANK", rank)
    assert is_main() is main
