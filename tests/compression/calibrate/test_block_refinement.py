"""One block trained: against a loss computed by hand, and for what it must never do."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mpoc.compression.calibrate.block_chain import Example
from mpoc.compression.calibrate.block_refinement import (
    _SHARE,
    Refined,
    distance,
    refine_block,
    refinement_rate,
)


@pytest.fixture(autouse=True)
def few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mpoc.compression.calibrate.block_refinement._STEPS", 200)


class Block(nn.Module):
    """A residual with a bottleneck, which the block it is to imitate has not."""

    def __init__(self, rank: int = 2) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(12, rank, bias=False), nn.Linear(rank, 12)

    def forward(self, x: Tensor, scale: Tensor | None = None) -> tuple[Tensor, None]:
        y = self.up(self.down(x)).tanh()
        return x + (y if scale is None else y * scale), None


def examples(count: int = 6, seed: int = 0) -> list[Example]:
    """Texts of 5 tokens, some of padding; targets of a block of rank 12."""
    torch.manual_seed(7)
    dense = Block(12)
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(count):
        x = torch.randn(4, 5, 12, generator=generator)
        mask = torch.arange(5) < torch.tensor([5, 3, 4, 1])[:, None]
        target = dense(x)[0].detach()
        found.append(Example(x, (), {}, torch.where(mask[:, :, None], target, 1e6), mask.long()))
    return found


def block() -> Block:
    torch.manual_seed(8)
    return Block().eval()


def stored(module: nn.Module, dtype: torch.dtype = torch.float32) -> dict[str, torch.dtype]:
    return dict.fromkeys(dict(module.named_parameters()), dtype)


def refined(**options: Any) -> tuple[Block, Refined]:
    start = block()
    return start, refine_block(copy.deepcopy(start), stored(start), examples(), examples(2, 1), **options)


def with_tensors(start: Block, found: Refined) -> Block:
    state = {name: tensor.float() for name, tensor in found.tensors.items()}
    start.load_state_dict({**start.state_dict(), **state})
    return start


def by_hand(module: Block, given: list[Example]) -> float:
    """Σ ‖f(x) − y‖² / Σ ‖y‖² text by text, token by token."""
    error = total = 0.0
    for example in given:
        assert example.mask is not None
        with torch.no_grad():
            output = module(example.given)[0].double()
        for text in range(4):
            for token in range(int(example.mask[text].sum())):
                target = example.target[text, token].double()
                error += float((output[text, token] - target).square().sum())
                total += float(target.square().sum())
    return error / total


@pytest.mark.slow
def test_losses_match_the_returned_tensors() -> None:
    start, found = refined()
    assert found.before == pytest.approx(by_hand(start, examples(2, 1)), rel=1e-4)
    after = with_tensors(start, found)
    assert found.after == pytest.approx(by_hand(after, examples(2, 1)), rel=1e-4)
    assert found.after < 0.8 * found.before


@pytest.mark.slow
def test_weights_errors_by_their_effect_on_the_output() -> None:
    """(f − y)ᵀ G (f − y) / yᵀ G y by hand, G with some identity; further down than without."""
    direction = torch.zeros(12)
    direction[3] = 2.0
    metric = torch.outer(direction, direction).double()
    start = block()
    found = refine_block(copy.deepcopy(start), stored(start), examples(), examples(2, 1), metric)
    weights = torch.full((12,), _SHARE)
    weights[3] += (1 - _SHARE) * 12
    for module, loss in ((block(), found.before), (with_tensors(start, found), found.after)):
        assert loss == pytest.approx(_weighted(module, weights), rel=1e-4)
    _, plain = refined()
    assert found.after < 0.95 * _weighted(with_tensors(block(), plain), weights)


def _weighted(module: Block, weights: Tensor) -> float:
    error = total = 0.0
    for example in examples(2, 1):
        assert example.mask is not None
        rows = example.mask.bool()
        with torch.no_grad():
            output = module(example.given)[0][rows]
        error += float(((output - example.target[rows]).square() * weights).sum())
        total += float((example.target[rows].square() * weights).sum())
    return error / total


@pytest.mark.slow
def test_is_deterministic_and_depends_on_the_seed() -> None:
    (_, first), (_, again), (_, other) = refined(seed=1), refined(seed=1), refined(seed=2)
    assert all(torch.equal(first.tensors[name], again.tensors[name]) for name in first.tensors)
    assert any(not torch.equal(first.tensors[name], other.tensors[name]) for name in first.tensors)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_measures_the_stored_dtype(dtype: torch.dtype) -> None:
    start = block().to(dtype).float()
    found = refine_block(copy.deepcopy(start), stored(start, dtype), examples(), examples(2, 1))
    assert {tensor.dtype for tensor in found.tensors.values()} == {dtype}
    assert found.after == pytest.approx(by_hand(with_tensors(start, found), examples(2, 1)), rel=1e-4)


@pytest.mark.slow
def test_exact_block_stays_unchanged() -> None:
    torch.manual_seed(7)
    found = refine_block(Block(12).eval(), stored(Block(12)), examples(), examples(2, 1))
    assert found.before == found.after < 1e-10
    assert not found.tensors


@pytest.mark.slow
def test_rejects_steps_that_are_worse_on_held_out_examples() -> None:
    start = block()
    against = [
        Example(e.given, (), {}, start(e.given)[0].detach(), e.mask) for e in examples(2, 1)
    ]  # what the block gives already
    found = refine_block(copy.deepcopy(start), stored(start), examples(), against)
    assert not found.tensors and found.after == found.before


@pytest.mark.slow
def test_other_parameters_stay_unchanged() -> None:
    start = block()
    trained = copy.deepcopy(start)
    found = refine_block(trained, {"up.bias": torch.float32}, examples(), examples(2, 1))
    assert list(found.tensors) == ["up.bias"]
    assert torch.equal(trained.down.weight, start.down.weight)
    assert torch.equal(trained.up.weight, start.up.weight)


def test_passes_other_arguments_in_float32() -> None:
    start = block()
    scale = torch.full((12,), 0.5, dtype=torch.bfloat16)
    with torch.no_grad():
        x = torch.randn(4, 5, 12)
        target = start(x, scale.float())[0]
    for args, named in [((scale,), {}), ((), {"scale": scale})]:
        assert distance(start, [Example(x, args, named, target, None)]) == 0.0


def test_skips_blocks_without_gradients() -> None:
    class Stopped(Block):
        @torch.no_grad()
        def forward(self, x: Tensor, scale: Tensor | None = None) -> tuple[Tensor, None]:
            return super().forward(x, scale)

    start = Stopped().eval()
    assert not refine_block(start, stored(start), examples(), examples(2, 1)).tensors


def test_zero_outputs_do_not_divide_by_zero() -> None:
    x = torch.zeros(2, 12)
    assert distance(nn.Linear(12, 12, bias=False), [Example(x, (), {}, x, None)]) == 0.0


def test_learning_rate_warms_up_and_decays_to_zero() -> None:
    rates = [refinement_rate(step, 400) for step in range(401)]
    peak = rates.index(max(rates))
    assert rates[:peak] == sorted(rates[:peak]) and rates[peak:] == sorted(rates[peak:], reverse=True)
    assert 0 < peak < 40 and rates[0] > 0 and rates[-1] == pytest.approx(0.0)
