"""A block's compressed layers trained together: to give what the dense block gave.

    min  Σ (f(x̃) − y)ᵀ G (f(x̃) − y) / Σ yᵀ G y

f is the block with cores, x̃ what it is given in the compressed network, y what the dense block gives on the
dense network's inputs, G what matters to the network's own output; sums are over rows without padding.  So a
block also takes off errors of those before it.  Adam (Kingma and Ba 2015) on batches in a drawn order; each
tensor's step is in proportion to its own size, as the cores of a weight may have any scale.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mpoc.calibrate.chain import features, goes_on

_RATE = 0.03  # peak, as a share of a tensor's root mean square
_SMALLEST = 0.02  # root mean square that a tensor has at least, as far as its rate goes: biases may be zero
_STEPS, _PASSES = 600, 8  # at least that many steps, and passes over the examples
_SHARE = 0.1  # of the identity in G
_WARM_UP = 0.05  # share of the steps
_EVALUATIONS = 10


@dataclass(frozen=True)
class Example:
    """A batch as one block sees it."""

    given: Tensor  # first argument
    args: tuple[Any, ...]  # the others
    named: dict[str, Any]
    target: Tensor  # what the block is to give
    mask: Tensor | None  # (n, T), 0 where a token is padding
    axis: int = -1  # of the target's features


@dataclass(frozen=True)
class Refined:
    """The loss above on held-out examples, and the tensors that make it."""

    before: float
    after: float
    tensors: Mapping[str, Tensor]  # by name in the block, in their stored dtypes; none where none are better


def refine(
    block: nn.Module,
    stored: Mapping[str, torch.dtype],
    examples: Sequence[Example],
    held_out: Sequence[Example],
    metric: Tensor | None = None,
    seed: int = 0,
) -> Refined:
    """Train some parameters of a block; of several states on the way the best one, as stored, is taken.

    Args:
        block: float32, in evaluation mode; it is changed.
        stored: the parameters to train, by name in the block, and the dtype each is rounded to in the end.
        examples: to train on.
        held_out: to choose the state by.
        metric: G (width, width) to a factor: E[g gᵀ], g the gradient of the network's output by a row; None:
            the identity.
        seed: of the order.
    """
    block.requires_grad_(False)
    tensors = {name: block.get_parameter(name).requires_grad_(True) for name in stored}
    optimizer = torch.optim.Adam([{"params": [p], "scale": _size(p)} for p in tensors.values()])
    root = None if metric is None else _root(metric)
    before = after = distance(block, held_out, root)
    best: dict[str, Tensor] = {}
    scale = _energy(examples, root)
    steps = max(_STEPS, _PASSES * len(examples))
    for step, index in enumerate(_order(len(examples), steps, seed), start=1):
        for group in optimizer.param_groups:
            group["lr"] = group["scale"] * learning_rate(step - 1, steps)
        error, _ = _squares(block, examples[index], root)
        if not error.requires_grad:  # the block itself has switched gradients off
            break
        optimizer.zero_grad()
        (error * (len(examples) / scale)).backward()
        optimizer.step()
        if step % math.ceil(steps / _EVALUATIONS) == 0 or step == steps:
            rounded = {name: p.detach().to(stored[name], copy=True) for name, p in tensors.items()}
            found = _distance_with(block, rounded, held_out, root)
            if found < after:
                after, best = found, rounded
    return Refined(before, after, best)


def learning_rate(step: int, steps: int) -> float:
    """Of step ``step`` (from 0) for a tensor of size 1: a linear warm-up, then half a cosine to 0."""
    warm_up = max(1.0, _WARM_UP * steps)
    return _RATE * min(1.0, (step + 1) / warm_up) * 0.5 * (1 + math.cos(math.pi * step / steps))


@torch.no_grad()
def distance(block: nn.Module, examples: Sequence[Example], root: Tensor | None = None) -> float:
    """The loss above with G = ``root`` rootᵀ; 0 for 0/0."""
    error = total = 0.0
    for example in examples:
        found, target = _squares(block, example, root)
        error, total = error + float(found), total + float(target)
    return error / total if total else math.inf if error else 0.0


@torch.no_grad()
def _distance_with(
    block: nn.Module, tensors: Mapping[str, Tensor], examples: Sequence[Example], root: Tensor | None
) -> float:
    before = {name: block.get_parameter(name).clone() for name in tensors}
    for name, tensor in tensors.items():
        block.get_parameter(name).copy_(tensor)
    found = distance(block, examples, root)
    for name, tensor in before.items():
        block.get_parameter(name).copy_(tensor)
    return found


def _squares(block: nn.Module, example: Example, root: Tensor | None) -> tuple[Tensor, Tensor]:
    """Both sums of a batch."""
    output = goes_on(block(_float(example.given), *_float(example.args), **_float(example.named)))
    assert output is not None, "a block of a chain gives a tensor"
    target = features(example.target.float(), example.mask, example.axis)
    error = features(output, example.mask, example.axis) - target
    if root is not None:
        error, target = error @ root, target @ root
    return error.square().sum(), target.square().sum()


def _energy(examples: Sequence[Example], root: Tensor | None) -> float:
    """Σ yᵀ G y, or 1 where it is 0."""
    targets = (features(e.target.float(), e.mask, e.axis) for e in examples)
    return sum(float((y if root is None else y @ root).square().sum()) for y in targets) or 1.0


def _root(metric: Tensor) -> Tensor:
    """H with H Hᵀ = G, of mean 1 on the diagonal; a share of the identity keeps every direction in."""
    width = len(metric)
    mean = metric.diagonal().mean().clamp(min=torch.finfo(metric.dtype).tiny)
    one = torch.eye(width, dtype=metric.dtype, device=metric.device)
    return torch.linalg.cholesky((1 - _SHARE) * metric / mean + _SHARE * one).float()


def _float(value: Any) -> Any:
    """Floating-point tensors as float32, wherever they are."""
    if isinstance(value, Tensor):
        return value.float() if value.is_floating_point() else value
    if isinstance(value, dict):
        return {name: _float(entry) for name, entry in value.items()}
    if type(value) in (tuple, list):
        return type(value)(map(_float, value))
    return value


def _size(tensor: Tensor) -> float:
    return max(_SMALLEST, float(tensor.detach().square().mean().sqrt()))


def _order(count: int, steps: int, seed: int) -> Iterator[int]:
    """``steps`` numbers below ``count``, pass after pass."""
    generator = torch.Generator().manual_seed(seed)
    passes = math.ceil(steps / count)
    drawn = [torch.randperm(count, generator=generator) for _ in range(passes)]
    return iter(torch.cat(drawn)[:steps].tolist())
