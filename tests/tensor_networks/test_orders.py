"""Orders of inputs as plain data: Z-order by digits, and what is refused."""

from __future__ import annotations

import copy
import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from mpoc.errors import UsageError
from mpoc.nn import adopt
from mpoc.tensor_networks.factors import OrderRule, order_fits, ordered_factors, parse_order, permutation
from mpoc.tensor_networks.fit.truncation import Truncation
from mpoc.tensor_networks.fit.tt_svd import tt_svd
from mpoc.tensor_networks.forms.form import form_of
from mpoc.tensor_networks.forms.layout import deinterleave, interleave, to_matrix
from mpoc.tensor_networks.structure import Structure, make_structure

SOME = settings(max_examples=60, deadline=None, derandomize=True)


def by_blocks(height: int, width: int, parts: list[tuple[int, int]]) -> list[int]:
    """Z-order by recursion: block after block, each block in the same way."""

    def walk(top: int, left: int, h: int, w: int, level: int) -> list[int]:
        if level == len(parts):
            return [top * width + left]
        down, across = parts[level]
        h, w = h // down, w // across
        return [
            place
            for y, x in itertools.product(range(down), range(across))
            for place in walk(top + y * h, left + x * w, h, w, level + 1)
        ]

    return walk(0, 0, height, width, 0)


@pytest.mark.parametrize(
    ("height", "width", "factors", "parts"),
    [
        (4, 4, (4, 4), [(2, 2), (2, 2)]),
        (28, 28, (4, 4, 49), [(2, 2), (2, 2), (7, 7)]),
        (28, 28, (4, 49, 4), [(2, 2), (7, 7), (2, 2)]),
        (28, 28, (4, 4, 7, 7), [(2, 2), (2, 2), (7, 1), (1, 7)]),
        (4, 6, (6, 4), [(2, 3), (2, 2)]),
        (8, 2, (4, 4), [(2, 2), (4, 1)]),
        (3, 5, (15,), [(3, 5)]),
    ],
)
def test_sites_split_height_and_width(
    height: int, width: int, factors: tuple[int, ...], parts: list[tuple[int, int]]
) -> None:
    found = permutation(f"morton:{height}x{width}", height * width, factors)
    assert found == tuple(by_blocks(height, width, parts))


def test_channels_of_a_pixel_stay_together() -> None:
    found = permutation("morton:3x4x4", 48, (4, 12))
    plane = by_blocks(4, 4, [(2, 2), (2, 2)])
    assert found == tuple(channel * 16 + place for place in plane for channel in range(3))


@SOME
@given(st.integers(1, 3), st.integers(1, 24), st.integers(1, 24), st.integers(1, 40))
def test_order_is_a_permutation_for_any_image(channels: int, height: int, width: int, outputs: int) -> None:
    order, inputs = f"morton:{channels}x{height}x{width}", channels * height * width
    outer, inner = ordered_factors(order, outputs, inputs, None)
    assert len(outer) == len(inner) and math.prod(inner) == inputs
    assert sorted(permutation(order, inputs, inner) or ()) == list(range(inputs))


@pytest.mark.parametrize(
    ("order", "outputs", "inputs", "expected"),
    [
        ("morton:28x28", 256, 784, ((8, 8, 4), (4, 4, 49))),
        ("morton:3x32x32", 64, 3072, ((4, 2, 2, 2, 2), (4, 4, 4, 4, 12))),
        ("morton:28x28", 7, 784, ((7,), (784,))),
        ("learned", 256, 784, ((4, 4, 4, 4), (4, 4, 7, 7))),
    ],
)
def test_chooses_factors_for_an_order(
    order: str, outputs: int, inputs: int, expected: tuple[tuple[int, ...], ...]
) -> None:
    assert ordered_factors(order, outputs, inputs, None) == expected


def test_respects_the_requested_number_of_sites() -> None:
    assert ordered_factors("morton:28x28", 256, 784, 2) == ((16, 16), (16, 49))


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("raster", OrderRule(None, "")),
        ("learned", OrderRule(None, "learned")),
        ("fc1=morton:28x28", OrderRule("fc1", "morton:28x28")),
        ("re:a=b=morton:3x32x32", OrderRule("re:a=b", "morton:3x32x32")),
    ],
)
def test_order_round_trips_text(text: str, rule: OrderRule) -> None:
    assert parse_order(text) == rule


@pytest.mark.parametrize(
    "text", ["", "zorder", "morton", "morton:28", "morton:0x28", "=raster", "morton:1x2x3x4", "fc1="]
)
def test_rejects_malformed_orders(text: str) -> None:
    with pytest.raises(UsageError, match="is not an order"):
        parse_order(text)


def test_order_fits_matching_inputs() -> None:
    assert order_fits("morton:3x4x4", 48) and not order_fits("morton:4x4", 48)
    assert order_fits("learned", 7) and order_fits("", 7)


@pytest.mark.parametrize("kind", ["conv2d", "embedding"])
def test_orders_apply_to_linear_maps_only(kind: str) -> None:
    shape = (16, 16, 3, 3) if kind == "conv2d" else (16, 16)
    with pytest.raises(UsageError, match=f"is not of a {kind} weight"):
        make_structure(kind, shape, order="morton:4x4")


def test_rejects_images_of_another_size() -> None:
    with pytest.raises(UsageError, match="morton:4x5: is not of a linear weight with 16 inputs"):
        make_structure("linear", (16, 16), order="morton:4x5")


@pytest.mark.parametrize("order", [(0, 1, 2), (0, 1, 1, 2), (0, 1, 2, 4), "morton:1x3", "learned", "spiral"])
def test_rejects_orders_that_are_not_permutations(order: str | tuple[int, ...]) -> None:
    structure = Structure("linear", (4, 4), False, (2, 2), (2, 2), order=order)
    with pytest.raises(ValueError, match=r"order|morton"):
        _ = structure.permutation


MIXED = tuple(torch.randperm(48, generator=torch.Generator().manual_seed(3)).tolist())
ORDERS: list[Any] = ["morton:3x4x4", MIXED]


def ordered(order: Any, transposed: bool = False, form_name: str = "mpo") -> Structure:
    shape = (48, 64) if transposed else (64, 48)
    plain = make_structure("linear", shape, transposed, sites=3, form=form_name)
    return replace(plain, order=order, input_factors=(4, 4, 3))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("order", ORDERS, ids=["morton", "permutation"])
class TestLayout:
    def test_columns_follow_the_order(self, order: Any, transposed: bool) -> None:
        place = ordered(order, transposed)
        weight = torch.randn(place.shape)
        columns = (weight.T if transposed else weight).T
        assert place.permutation is not None
        for position, column in enumerate(to_matrix(weight, place)[0].T):
            assert torch.equal(column, columns[place.permutation[position]])

    def test_interleave_round_trip(self, order: Any, transposed: bool) -> None:
        place = ordered(order, transposed)
        weight = torch.randn(place.shape)
        assert torch.equal(deinterleave(interleave(weight, place), place), weight)

    def test_full_bond_is_exact(self, order: Any, transposed: bool) -> None:
        place = ordered(order, transposed)
        weight = torch.randn(place.shape, dtype=torch.float64)
        fit = tt_svd(weight, place, Truncation(place.full_bond))
        torch.testing.assert_close(fit.form.to_weight(), weight)
        assert fit.relative_error < 1e-12


@pytest.mark.parametrize("form_name", ["mpo", "tree", "mera"])
@pytest.mark.parametrize("order", ORDERS, ids=["morton", "permutation"])
def test_layer_computes_with_its_weight(order: Any, form_name: str) -> None:
    place = ordered(order, form_name=form_name)
    cores = [torch.randn(shape, dtype=torch.float64) for shape in place.core_shapes(place.bonds(3))]
    layer = nn.Linear(48, 64, dtype=torch.float64)
    adopt(layer, "weight", cores, place)
    x = torch.randn(2, 5, 48, dtype=torch.float64)
    expected = x @ form_of(cores, place).to_weight().T + layer.bias
    torch.testing.assert_close(layer(x), expected)
    torch.testing.assert_close(copy.deepcopy(layer).eval()(x), expected)
    exported = torch.export.export(layer.eval(), (x,))
    torch.testing.assert_close(exported.module()(x), expected)
