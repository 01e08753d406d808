from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import linear

from mpoc.nn import MPOLinear, adopt, use_weights
from mpoc.nn.linear import MPOConv1D
from mpoc.tensor_networks.forms.mpo import MPO
from mpoc.tensor_networks.structure import make_structure
from tests.nn.layers import gradients, pair, pulled_back, with_cores
from tests.support.weights import random_cores

SIDE = st.integers(1, 40)


@given(
    SIDE, SIDE, st.integers(2, 4), st.integers(1, 6), st.lists(st.integers(0, 3), max_size=3), st.booleans()
)
@settings(max_examples=60, derandomize=True, deadline=None)
def test_matches_the_dense_layer(
    outputs: int, inputs: int, sites: int, bond: int, batch: list[int], bias: bool
) -> None:
    dense, layer = pair(nn.Linear(inputs, outputs, bias).double(), max_bond=bond, sites=sites)
    x = torch.randn(*batch, inputs, dtype=torch.float64)
    expected, found = gradients(dense, x), gradients(layer, x)
    torch.testing.assert_close(found[0], expected[0])
    torch.testing.assert_close(found[2], expected[2])
    if bias:
        torch.testing.assert_close(found[1]["bias"], expected[1]["bias"])
    cores = pulled_back(list(layer.cores), layer.structure, expected[1]["weight"])
    torch.testing.assert_close([found[1][f"cores.{k}"] for k in range(len(cores))], cores)


@pytest.mark.parametrize("shape", [(6, 8), (7, 11)])
def test_gradients_match_finite_differences(shape: tuple[int, int]) -> None:
    layer = with_cores(nn.Linear(*shape).double(), max_bond=2)
    x = torch.randn(2, shape[0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, *_: layer(x), (x, *layer.parameters()))


@pytest.mark.parametrize("batch", [(), (0,), (2, 0), (1,), (300,)])
def test_accepts_batches_of_any_shape(batch: tuple[int, ...]) -> None:
    dense, layer = pair(nn.Linear(24, 18))
    x = torch.randn(*batch, 24)
    assert layer(x).shape == (*batch, 18)
    torch.testing.assert_close(layer(x), dense(x), rtol=0, atol=1e-5)


def test_accepts_any_input_strides() -> None:
    dense, layer = pair(nn.Linear(24, 18))
    for x in (torch.randn(24, 5).T, torch.randn(5, 48)[:, ::2], torch.randn(1, 24).expand(5, 24)):
        torch.testing.assert_close(layer(x), dense(x), rtol=0, atol=1e-5)


def test_padding_has_no_effect() -> None:
    dense, layer = pair(nn.Linear(53, 29), sites=2)
    assert min(layer.structure.padding) > 0
    x = torch.randn(4, 53)
    torch.testing.assert_close(layer(x), dense(x), rtol=0, atol=1e-5)


def test_rejects_inputs_of_the_wrong_width() -> None:
    layer = with_cores(nn.Linear(24, 18))
    for width in (12, 23, 25, 48):
        with pytest.raises(RuntimeError):
            layer(torch.randn(4, width))


def test_has_no_bias_without_one() -> None:
    dense, layer = pair(nn.Linear(24, 18, bias=False))
    assert layer.bias is None
    assert "bias" not in dict(layer.named_parameters())
    assert not layer(torch.zeros(3, 24)).any()
    torch.testing.assert_close(layer(torch.ones(24)), dense(torch.ones(24)), rtol=0, atol=1e-5)


def test_keeps_no_dense_weight() -> None:
    layer = with_cores(nn.Linear(64, 64), max_bond=2)
    layer(torch.randn(3, 64))
    held = [*layer.parameters(), *layer.buffers(), *(v for v in vars(layer).values() if torch.is_tensor(v))]
    assert sum(tensor.numel() for tensor in held) < 64 * 64 / 4


class TestDtypes:
    def test_computes_in_bfloat16(self) -> None:
        dense, layer = pair(nn.Linear(24, 18).bfloat16(), max_bond=2)
        x = torch.randn(5, 24).bfloat16()
        assert layer(x).dtype == torch.bfloat16
        torch.testing.assert_close(layer(x), dense(x), rtol=0.05, atol=0.2)
        _, found, _ = gradients(layer, x)
        assert {gradient.dtype for gradient in found.values()} == {torch.bfloat16}

    def test_computes_in_float64(self) -> None:
        dense, layer = pair(nn.Linear(24, 18).double())
        x = torch.randn(5, 24).double()
        torch.testing.assert_close(layer(x), dense(x), rtol=0, atol=1e-12)
        dense, layer = pair(nn.Linear(24, 18))
        torch.testing.assert_close(layer.double()(x), dense.double()(x), rtol=0, atol=1e-6)

    @pytest.mark.parametrize("bias", [True, False])
    def test_autocast_matches_a_dense_layer(self, bias: bool) -> None:
        dense, layer = pair(nn.Linear(24, 18, bias), max_bond=2)
        x = torch.randn(5, 24)
        with torch.autocast("cpu", torch.bfloat16):
            assert layer(x).dtype == dense(x).dtype == torch.bfloat16
            torch.testing.assert_close(layer(x), dense(x), rtol=0.05, atol=0.2)
            layer(x).float().square().sum().backward()
        assert {parameter.grad.dtype for parameter in layer.parameters()} == {torch.float32}


def test_supports_transposed_weights() -> None:
    pytest.importorskip("transformers")
    from transformers import pytorch_utils

    make: Any = pytorch_utils.Conv1D
    dense = make(18, 24)  # 24 inputs, 18 outputs, weight (24, 18)
    structure = make_structure("linear", (24, 18), transposed=True)
    cores = [core.float() for core in random_cores(structure, 3)]
    layer = make(18, 24)
    with torch.no_grad():
        layer.bias.copy_(dense.bias.normal_())
        dense.weight.copy_(MPO(cores, structure).to_weight())
    adopt(layer, "weight", cores, structure)
    assert (layer.nx, layer.nf) == (24, 18)
    assert type(layer) is MPOConv1D
    x = torch.randn(2, 5, 24)
    torch.testing.assert_close(layer(x), dense(x), rtol=0, atol=1e-4)
    torch.testing.assert_close(linear(x, layer.weight.T, layer.bias), dense(x), rtol=0, atol=1e-4)
    use_weights(layer.eval().requires_grad_(False), "dense")
    torch.testing.assert_close(layer(x), dense(x), rtol=0, atol=1e-4)


def test_is_an_nn_linear() -> None:
    layer = with_cores(nn.Linear(24, 18))
    assert type(layer) is MPOLinear
    assert isinstance(layer, nn.Linear)
    assert (layer.in_features, layer.out_features) == (24, 18)
    assert "in_features=24" in repr(layer)
    assert "outputs=(3, 3, 2)" in repr(layer)


@pytest.mark.parametrize("batch", [0, 4])
def test_rejects_inputs_of_another_width(batch: int) -> None:
    layer = with_cores(nn.Linear(64, 48))
    with pytest.raises(RuntimeError, match="32 features, the layer takes 64"):
        layer(torch.empty(batch, 32))


def test_traces_for_any_batch() -> None:
    layer = with_cores(nn.Linear(64, 48)).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit.trace is deprecated, and says what it cannot follow
        traced = torch.jit.trace(layer, torch.randn(3, 64), check_trace=False)
    x = torch.randn(7, 64)
    torch.testing.assert_close(traced(x), layer(x))
