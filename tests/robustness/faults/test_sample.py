"""A sample of all faults in a process of its own, which has one thread and can be forked."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.robustness.faults.judge import KINDS
from tests.robustness.faults.kills import FAULTS
from tests.robustness.faults.ranks import strike_a_rank
from tests.support.process import run_python

pytestmark = pytest.mark.slow

pytestmark = pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="needs Linux's /proc")


@pytest.fixture(scope="module")
def sample() -> dict[str, Any]:
    return dict(json.loads(run_python("-m", "tests.robustness.faults.sample")))


def test_sampled_faults_lose_nothing(sample: dict[str, Any]) -> None:
    assert sample["found"] == []


def test_every_kind_of_fault_is_injected(sample: dict[str, Any]) -> None:
    injected = dict(sample["injected"])
    assert FAULTS.keys() <= injected.keys()
    assert len(injected) >= len(FAULTS) + 6  # where nothing can be mounted; 8 elsewhere
    assert set(injected.values()) == {2}


def test_detects_a_careless_command(sample: dict[str, Any]) -> None:
    assert sample["careless"].keys() == KINDS.keys() - {"hang"}
    assert sample["hung"] is True


def test_killed_process_is_reported_by_the_other() -> None:
    ended, found = strike_a_rank(signal.SIGKILL, rank=1, late=False)
    assert found == [] and ended.status == 1
    assert "Sending process" in ended.err or "error: " in ended.err  # torchrun ended it, or it said so
