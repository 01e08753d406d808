"""A calibrated compression that was stopped goes on, and ends with the bytes of one that was not."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import mpoc.compression.calibrate.block_refinement
from mpoc.compression.calibrate.allocation import allocate_by_gain
from mpoc.compression.calibrate.calibrated_fit import fit_calibrated
from mpoc.errors import UsageError
from tests.compression.calibrate.blocks import Case


@pytest.fixture(autouse=True)
def few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mpoc.compression.calibrate.block_refinement, "_STEPS", 40)


def stop_after(layers: int) -> Callable[..., None]:
    def tell(record: Any, seconds: float, done: int, total: int, share: float) -> None:
        if done == layers:
            raise KeyboardInterrupt

    return tell


def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of what is done, as it is done."""
    done: list[str] = []

    def watched(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **named: Any) -> Any:
            done.append(name)
            return function(*args, **named)

        return call

    monkeypatch.setattr(
        "mpoc.compression.calibrate.sequential.fit_calibrated", watched("fit", fit_calibrated)
    )
    monkeypatch.setattr(
        "mpoc.compression.calibrate.allocation.allocate_by_gain", watched("share", allocate_by_gain)
    )
    return done


@pytest.mark.slow
@pytest.mark.parametrize(
    ("network", "refine", "goal", "kept"),
    [
        pytest.param("convolutions", False, {"ratio": 0.5}, [1, 4], marks=pytest.mark.slow),
        # a block is fitted whole
        pytest.param("convolutions", True, {"ratio": 0.5, "form": "svd"}, [1, 3, 4], marks=pytest.mark.slow),
        pytest.param("blocks", True, {"size": 11_000, "storage": "float"}, [2, 5], marks=pytest.mark.slow),
        ("blocks", False, {"bond": 2}, [4]),
        ("grouped", False, {"bond": 3, "form": "mpo"}, [1, 2]),
    ],
)
def test_resume_gives_the_same_bytes(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    network: str,
    refine: bool,
    goal: dict[str, Any],
    kept: list[int],
) -> None:
    case = Case(tmp_path, network)
    whole = case.compress(refine, "whole", **goal)
    total = len(whole.manifest.layers)
    for layers in kept:
        with pytest.raises(KeyboardInterrupt) as stopped:
            case.compress(refine, resume=True, tell=stop_after(layers), **goal)
        assert "--resume reuses them" in stopped.value.__notes__[-1]
    done = counted(monkeypatch)
    found = case.compress(refine, resume=True, **goal)
    assert done.count("fit") < total and "share" not in done
    assert found.output.read_bytes() == whole.output.read_bytes()
    assert not (tmp_path / "o.safetensors.partial").exists()


def with_another_bond(data: bytes) -> bytes:
    """An allocation's file with one digit of its record changed."""
    return re.sub(rb'"bond\\": (\d)', lambda at: at[0][:-1] + str(9 - int(at[1])).encode(), data, count=1)


@pytest.mark.slow
def test_resume_ignores_results_of_another_goal(tmp_path: Path) -> None:
    case = Case(tmp_path, "blocks")
    whole = case.compress(False, "whole", ratio=0.4)
    with pytest.raises(KeyboardInterrupt):
        case.compress(False, resume=True, tell=stop_after(4), ratio=0.6)
    with pytest.raises(UsageError, match=r"holds the layers of other work: --ratio was 0\.6 and is 0\.4"):
        case.compress(False, resume=True, ratio=0.4)
    found = case.compress(False, resume=True, ratio=0.4, force=True)
    assert found.output.read_bytes() == whole.output.read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["allocation.safetensors", "moments.safetensors"])
def test_recomputes_damaged_results(tmp_path: Path, name: str) -> None:
    """Another bond in the allocation; a truncated file of moments."""
    case = Case(tmp_path, "blocks")
    whole = case.compress(False, "whole", ratio=0.4)
    with pytest.raises(KeyboardInterrupt):
        case.compress(False, resume=True, tell=stop_after(1), ratio=0.4)
    file = tmp_path / "o.safetensors.partial" / "calibration" / name
    data = file.read_bytes()
    changed = data[:-100] if name == "moments.safetensors" else with_another_bond(data)
    assert changed != data
    file.write_bytes(changed)
    found = case.compress(False, resume=True, ratio=0.4)
    assert found.output.read_bytes() == whole.output.read_bytes()
