"""Contract a network of tensors with named legs, two at a time, in an order that keeps products small.

The order is planned once for each set of shapes. While torch traces a graph, planners run as plain Python and
are not traced.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

_LARGE = 1 << 20  # numbers of a result whose legs take longer to move than those of its factors

Legs = tuple[str, ...]


def traced_once(function: Callable[..., Any]) -> Callable[..., Any]:
    """Let torch.compile run a planner instead of tracing it.

    The public decorator, torch.compiler.assume_constant_result, does just this but imports the whole compiler
    (1.6 s) first.
    """

    def run(*arguments: Any) -> Any:
        return function(*arguments)

    run._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return run


def is_traced() -> bool:
    """Whether torch is making a graph, which must serve other batch sizes too."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]


def is_autocast(device: torch.device) -> bool:
    """Whether autocast narrows products on ``device``."""
    return device.type != "meta" and torch.is_autocast_enabled(device.type)


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """A context in which ``device`` computes in the dtypes that tensors have."""
    return torch.autocast(device.type, enabled=False) if is_autocast(device) else nullcontext()


def planned_batch(x: Tensor) -> int:
    """The batch size that a plan is made for: rounded up to a power of two, so that few plans are made.

    While a graph is traced the batch size may be a symbol, on which the plan must not depend.
    """
    if is_traced():
        return 64
    return 1 << (x.shape[0] - 1).bit_length() if x.shape[0] > 1 else 1


def contract_all(
    tensors: Sequence[Tensor],
    legs: Sequence[Legs],
    result: Legs,
    steps: Iterable[tuple[int, int]] | None = None,
) -> Tensor:
    """Contract tensors over all legs that two of them share.

    Args:
        tensors: at least one tensor.
        legs: the name of every axis; each name occurs in one tensor or in two.
        result: the names that occur once, in the order of the result's axes.
        steps: the pair to contract in each step, numbered as in :func:`path`; None: by that function.
    """
    if steps is None:
        steps = _path(tuple(legs), leg_sizes(legs, [tensor.shape for tensor in tensors]))
    left = dict(enumerate(zip(tensors, legs, strict=True)))
    for number, (a, b) in enumerate(steps, len(left)):
        pair = left.pop(a), left.pop(b)
        if not left and _result_size(pair, result) >= _LARGE:  # its factors are smaller: order their legs
            pair = _ordered(*pair[0], result), _ordered(*pair[1], result)
        left[number] = _joined(*pair[0], *pair[1])
    ((tensor, names),) = left.values()
    return tensor.permute([names.index(name) for name in result])


def leg_sizes(legs: Iterable[Legs], shapes: Iterable[Sequence[int]]) -> tuple[tuple[str, int], ...]:
    """(name, dimension) of every leg, each once."""
    pairs = zip(legs, shapes, strict=True)
    return tuple({name: n for names, shape in pairs for name, n in zip(names, shape, strict=True)}.items())


def _result_size(pair: Sequence[tuple[Tensor, Legs]], result: Legs) -> int:
    size = 1  # in loops, which torch.compile follows
    for name in result:
        for tensor, names in pair:
            if name in names:
                size *= tensor.shape[names.index(name)]
    return size


def _ordered(tensor: Tensor, names: Legs, result: Legs) -> tuple[Tensor, Legs]:
    """The legs that the result has in its order, after all others."""
    ordered = sorted(names, key=lambda name: result.index(name) if name in result else -1)
    return tensor.permute([names.index(name) for name in ordered]), tuple(ordered)


def _joined(a: Tensor, names_a: Legs, b: Tensor, names_b: Legs) -> tuple[Tensor, Legs]:
    """Contract two tensors over the legs that they share; the legs of the first come first."""
    shared = [name for name in names_a if name in names_b]
    axes = [names_a.index(name) for name in shared], [names_b.index(name) for name in shared]
    rest = tuple(name for name in (*names_a, *names_b) if name not in shared)
    return torch.tensordot(a, b, dims=axes), rest


def along(tensor: Tensor, axis: int, matrix: Tensor) -> Tensor:
    """``tensor`` with ``matrix`` (new, old) applied to one axis."""
    return torch.tensordot(tensor, matrix, dims=([axis], [1])).movedim(-1, axis)


@cache
def path(legs: tuple[Legs, ...], sizes: tuple[tuple[str, int], ...]) -> tuple[tuple[int, int], ...]:
    """The pair to contract in each step, chosen greedily: the product that grows least over its two factors.

    Tensors are numbered in their order, and products after them.
    """
    left, known = dict(enumerate(legs)), dict(sizes)
    steps = []
    for number in range(len(legs), 2 * len(legs) - 1):
        pairs = list(combinations(left, 2))
        bound = [pair for pair in pairs if set(left[pair[0]]) & set(left[pair[1]])]
        a, b = min(bound or pairs, key=lambda pair: (_growth(left[pair[0]], left[pair[1]], known), pair))
        steps.append((a, b))
        left[number] = tuple(set(left.pop(a)) ^ set(left.pop(b)))
    return tuple(steps)


_path = traced_once(path)


def work(legs: tuple[Legs, ...], sizes: tuple[tuple[str, int], ...]) -> tuple[int, int]:
    """Multiplications in a contraction along :func:`path`, and the entries in all its products."""
    left, known = dict(enumerate(legs)), dict(sizes)
    multiplications = made = 0
    for number, (a, b) in enumerate(path(legs, sizes), len(legs)):
        first, second = set(left.pop(a)), set(left.pop(b))
        left[number] = tuple(first ^ second)
        multiplications += math.prod(known[name] for name in first | second)
        made += math.prod(known[name] for name in left[number])
    return multiplications, made


@cache
def legs_of_product(legs: tuple[Legs, ...], sizes: tuple[tuple[str, int], ...]) -> Legs:
    """The legs of the result along :func:`path`, those of the first factor of the last product first."""
    left = dict(enumerate(legs))
    for number, (a, b) in enumerate(path(legs, sizes), len(legs)):
        first, second = left.pop(a), left.pop(b)
        rest = (name for name in (*first, *second) if (name in first) != (name in second))
        left[number] = tuple(rest)
    (names,) = left.values()
    return names


def _growth(a: Legs, b: Legs, sizes: Mapping[str, int]) -> int:
    product, *given = (math.prod(sizes[name] for name in names) for names in (set(a) ^ set(b), a, b))
    return product - sum(given)
