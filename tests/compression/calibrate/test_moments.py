"""Streamed moments against numpy's in float64."""

from __future__ import annotations

from functools import reduce
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mpoc.compression.calibrate import moments as kept_moments
from mpoc.compression.calibrate.moments import (
    Accumulator,
    Moments,
    merge,
    one_hot_moments,
    shrunk,
    with_seconds,
)
from mpoc.tensor_networks.fit.second_moment import OutputMoment, RowMoment


def mixed(rows: int, features: int, mean: float = 0.0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Correlated rows of scales from 0.01 to 100, their means ``mean`` deviations large."""
    x = torch.randn(rows, features) @ torch.randn(features, features) / features**0.5
    return ((x + mean) * torch.logspace(-2, 2, features)).to(dtype)


def gathered(rows: Tensor, dense: Tensor | None = None, parts: int = 3, **options: Any) -> Moments:
    accumulator = Accumulator(**options)
    for k in range(parts):
        accumulator.add(rows[..., k::parts, :], None if dense is None else dense[..., k::parts, :])
    return accumulator.moments()


def far(found: Tensor, wanted: Tensor, left: Tensor, right: Tensor) -> float:
    """The largest error of a covariance beside the deviations it belongs to."""
    deviations = left.double().std(0)[:, None] * right.double().std(0)
    return float(((found - wanted).abs() / deviations).max())


@pytest.mark.parametrize("mean", [0.0, 30.0])
def test_moments_of_one_network(mean: float) -> None:
    x = mixed(20_000, 24, mean)
    found = gathered(x)
    exact = x.double().numpy()
    assert np.abs((found.mean.numpy() - exact.mean(0)) / exact.std(0)).max() < 1e-6
    assert far(found.second, torch.from_numpy(exact.T @ exact / len(exact)), x, x) < 1e-6 * (1 + mean)
    centred = found.second - torch.outer(found.mean, found.mean)
    assert far(centred, torch.from_numpy(np.cov(exact.T, bias=True)), x, x) < 1e-6
    assert found.rows == 20_000
    assert torch.equal(found.second, found.second.T)
    assert found.dense_mean is found.mean and found.cross is found.second is found.dense_second


def test_moments_of_two_networks() -> None:
    x, y = mixed(5_000, 16, 20.0), mixed(5_000, 16, 3.0)
    y += 0.5 * x
    found = gathered(y, x)
    a, b = x.double(), y.double()
    assert torch.allclose(found.dense_mean, a.mean(0), rtol=1e-7)
    assert torch.allclose(found.mean, b.mean(0), rtol=1e-7)
    cross = found.cross - torch.outer(found.dense_mean, found.mean)
    assert far(cross, (a - a.mean(0)).T @ (b - b.mean(0)) / len(a), x, y) < 1e-6
    dense = found.dense_second - torch.outer(found.dense_mean, found.dense_mean)
    assert far(dense, torch.cov(a.T, correction=0), x, x) < 1e-6


def test_dense_second_moment_is_optional() -> None:
    x, y = mixed(300, 8), mixed(300, 8)
    accumulator = Accumulator(dense_second=False)
    accumulator.add(y, x)
    found, whole = accumulator.moments(), gathered(y, x, parts=1)
    assert found.dense_second.shape == (0,)
    assert torch.equal(found.cross, whole.cross) and torch.equal(found.second, whole.second)


def test_keeps_float64_rows() -> None:
    x = mixed(500, 12, dtype=torch.float64)
    assert torch.allclose(gathered(x).second, x.T @ x / len(x), rtol=1e-13, atol=0)


def test_constant_and_dead_inputs_have_no_variance() -> None:
    x = torch.randn(400, 3)
    x[:, 1], x[:, 2] = 0.1, 0.0
    found = gathered(x)
    centred = found.second - torch.outer(found.mean, found.mean)
    assert centred[1:].abs().max() < 1e-15
    assert found.second[2].abs().max() == 0


def test_keeps_groups_apart() -> None:
    x, y = mixed(200, 5)[None].repeat(3, 1, 1), mixed(200, 5)
    x[1] = y
    found = gathered(x)
    assert found.second.shape == (3, 5, 5) and found.mean.shape == (3, 5)
    alone = gathered(y)
    assert torch.allclose(found.second[1], alone.second, rtol=1e-6, atol=1e-9)
    assert torch.allclose(found.second[0], found.second[2], rtol=1e-6, atol=1e-9)
    assert not torch.allclose(found.second[0], found.second[1], rtol=1e-2)


def test_rejects_empty_input() -> None:
    accumulator = Accumulator()
    accumulator.add(torch.empty(0, 4))
    with pytest.raises(ValueError, match="no rows"):
        accumulator.moments()


def test_moments_of_one_hot_rows() -> None:
    ids = torch.tensor([2, 2, 0, 3])
    rows = torch.nn.functional.one_hot(ids, 5).double()
    found, full = one_hot_moments(torch.bincount(ids, minlength=5)), gathered(rows)
    assert found.rows == 4
    assert torch.allclose(torch.diag(found.second), full.second, atol=1e-15)
    assert torch.allclose(found.mean, full.mean)


def test_few_rows_shrink_towards_those_of_all() -> None:
    """As if the layer had been given as many more rows, of the others' moments, as it has inputs."""
    few, many = mixed(8, 24), mixed(5_000, 24)
    own, prior = gathered(few), gathered(many)
    found = shrunk(own, prior)
    assert found.rows == own.rows
    for field in ("mean", "second", "cross"):
        pooled = (8 * getattr(own, field) + 24 * getattr(prior, field)) / 32
        assert torch.allclose(getattr(found, field), pooled, rtol=1e-12, atol=1e-12)


def formed(moments: Moments) -> dict[str, Tensor]:
    """The second moments as matrices."""
    names = "second", "cross", "dense_second"
    seconds = {name: getattr(moments, name) for name in names}
    return {name: one.formed() if isinstance(one, RowMoment) else one for name, one in seconds.items()}


@pytest.mark.parametrize("paired", [False, True])
def test_few_rows_are_kept_and_say_the_same(monkeypatch: pytest.MonkeyPatch, paired: bool) -> None:
    monkeypatch.setattr(kept_moments, "_NARROW", 8)
    x, y = mixed(40, 30, 5.0), mixed(40, 30, 3.0)
    parts = [(y[:17], x[:17] if paired else None), (y[17:], x[17:] if paired else None)]
    found = [gathered(*part, keeps_rows=True) for part in parts]
    wanted = [gathered(*part) for part in parts]
    joined = merge(*found), merge(*wanted)
    assert all(isinstance(one.second, RowMoment) for one in found)
    assert isinstance(joined[0].second, Tensor), "more rows than features"
    for ours, theirs in zip(
        [*found, joined[0], shrunk(*found)], [*wanted, joined[1], shrunk(*wanted)], strict=True
    ):
        assert ours.rows == theirs.rows
        torch.testing.assert_close(ours.mean, theirs.mean)
        torch.testing.assert_close(ours.dense_mean, theirs.dense_mean)
        exact = formed(theirs)
        for name, second in formed(ours).items():
            scale = exact[name].abs().max()
            torch.testing.assert_close(second / scale, exact[name] / scale, rtol=0, atol=1e-6)
    assert (found[0].cross is found[0].second) == (not paired)


def test_every_other_row_of_very_wide_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("_NARROW", 4), ("ROWS_FROM", 20), ("_KEPT", 20 * 32)):
        monkeypatch.setattr(kept_moments, name, value)
    x = mixed(1000, 20, 2.0)
    sums = Accumulator(keeps_rows=True)
    for part in x.split(37):
        sums.add(part)
    found = sums.moments()
    assert torch.equal(found.second.left.values, (x - x[:37].mean(0, dtype=torch.float64).float())[::32])
    kept = found.second.left.values - found.second.left.centre
    assert float(((found.mean - kept.mean(0)) / kept.std(0)).abs().max()) < 0.5
    again = merge(found, found)
    assert len(again.second.weights) == 32 and float(again.second.weights.sum()) == pytest.approx(1)
    assert gathered(x, parts=1, keeps_rows=True).rows == 1000
    shares = [Accumulator(keeps_rows=True, parts=4) for _ in range(4)]
    for share, part in zip(shares, x.split(250), strict=True):
        share.add(part)
    both = [one.moments() for one in shares]
    assert [len(one.second.weights) for one in both] == [8] * 4
    joined = reduce(merge, both)  # no row is thrown away
    torch.testing.assert_close(joined.second.weights, torch.full((32,), 1 / 32).double(), rtol=1e-12, atol=0)
    assert len(joined.second.left.values) == 32


def test_parts_merge_whether_kept_as_rows_or_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept_moments, "_NARROW", 8)
    x, dense = mixed(60, 24), mixed(60, 24)
    few, many = slice(0, 10), slice(10, 60)
    options = {"dense_second": False, "keeps_rows": True}
    parts = [gathered(x[part], dense[part], 1, **options) for part in (few, many)]
    assert [isinstance(part.second, RowMoment) for part in parts] == [True, False]
    merged, whole = merge(*parts), gathered(x, dense, 1, **options)
    for found, exact in ((merged.second, whole.second), (merged.cross, whole.cross)):
        torch.testing.assert_close(found, exact, rtol=0, atol=1e-6 * float(exact.abs().max()))
    assert merged.dense_second.numel() == whole.dense_second.numel() == 0


@pytest.mark.parametrize("width", [300, 1100])  # more than one panel of columns, of each kind
def test_wide_second_moments_are_symmetric_and_exact(width: int) -> None:
    x = torch.randn(200, width, generator=torch.Generator().manual_seed(0)).double()
    rows = gathered(x.float(), parts=2, keeps_rows=True)
    for second in (formed(rows)["second"], gathered(x, parts=2).second):
        assert torch.equal(second, second.T)
        torch.testing.assert_close(second, x.T @ x / len(x), rtol=0, atol=1e-5)


def test_merged_rows_leave_out_what_is_not_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept_moments, "_NARROW", 8)
    x, dense = mixed(60, 24), mixed(60, 24)
    parts = [gathered(x[part], dense[part], 1, keeps_rows=True) for part in (slice(0, 20), slice(20, 40))]
    merged, whole = (merge(*parts, dense_second=wanted) for wanted in (False, True))
    assert merged.dense_second.numel() == 0 and whole.dense_second.numel() == 24 * 24
    assert torch.equal(merged.second, whole.second) and torch.equal(merged.cross, whole.cross)


@pytest.mark.parametrize("mean", [0.0, 30.0])
@pytest.mark.parametrize("kept", [False, True])
def test_moments_of_few_outputs(monkeypatch: pytest.MonkeyPatch, mean: float, kept: bool) -> None:
    """E[(W x) x̃ᵀ] is W E[x x̃ᵀ], however the rows come together; no other weight is multiplied by it."""
    monkeypatch.setattr(kept_moments, "_NARROW", 8)
    x, y, weight = mixed(90, 24, mean), mixed(90, 24, mean), torch.randn(6, 24).double()
    parts = [slice(0, 12), slice(12, 30), slice(30, 90)]  # rows, rows, and products
    found = [gathered(y[part], x[part], 1, keeps_rows=kept, weight=weight) for part in parts]
    merged = reduce(merge, found)
    wanted = weight @ gathered(y, x).cross
    assert isinstance(merged.cross, OutputMoment) and merged.cross.matrix.shape == (6, 24)
    torch.testing.assert_close(weight @ merged.cross, wanted, rtol=0, atol=2e-6 * float(wanted.abs().max()))
    with pytest.raises(ValueError, match="another weight"):
        _ = (2 * weight) @ merged.cross


def test_moments_of_few_outputs_mix_with_those_of_one_network() -> None:
    """As where held-out data give a layer no rows in the compressed network."""
    x, y, weight = mixed(90, 24), mixed(90, 24), torch.randn(6, 24).double()
    found = merge(gathered(y, x, weight=weight), gathered(x), formed=False)
    whole = merge(gathered(y, x), gathered(x))
    wanted = weight @ whole.cross
    torch.testing.assert_close(weight @ found.cross, wanted, rtol=0, atol=2e-6 * float(wanted.abs().max()))
    assert torch.equal(found.second, whole.second)


def test_few_outputs_of_either_side_are_mixed() -> None:
    """As where a layer is given different rows in the batches of the fit alone."""
    x, y, weight = mixed(90, 24), mixed(90, 24), torch.randn(6, 24).double()
    found = merge(gathered(x), gathered(y, x, weight=weight), formed=False)
    wanted = weight @ merge(gathered(x), gathered(y, x)).cross
    assert found.weight is not None
    torch.testing.assert_close(weight @ found.cross, wanted, rtol=0, atol=2e-6 * float(wanted.abs().max()))


def test_matrices_that_layers_share_are_kept_once() -> None:
    x, y = mixed(90, 24), mixed(90, 24)
    own, shared = gathered(y, x), gathered(x)
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor.clone()

    found = with_seconds({"q": own, "k": own, "dense": shared}, keep)
    assert len(kept) == 1 and kept[0] is own.second
    assert found["q"] is found["k"] and torch.equal(found["q"].second, own.second)
    assert found["dense"] is shared
