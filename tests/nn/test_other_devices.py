"""Layers, training steps and statistics on another device than the CPU, without one.

Under torch's FakeTensorMode tensors have a device, a shape and a dtype, but no numbers, and an operation that
mixes devices is an error. They lie on ``meta``: on cuda, torch's build for the CPU can neither index a fake
tensor nor differentiate. What reads numbers, as truncation does, is not tested here.
"""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import mpoc
from mpoc.compression.calibrate.layer_inputs import Sample, as_rows, find_layer
from mpoc.compression.calibrate.moments import LayerSums
from mpoc.tensor_networks.fit.second_moment import (
    OutputMoment,
    ProductSum,
    exact_product,
    has_exact_products,
)
from mpoc.train.engine import make_optimizer
from mpoc.train.settings import Settings
from mpoc.train.tasks import Regression
from tests.nn.layers import NETWORKS, floats

pytestmark = pytest.mark.slow
DEVICE = "meta"


def moved(tensor: Tensor) -> Tensor:
    """A tensor like this one on the device."""
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=DEVICE)


def move(network: nn.Module) -> nn.Module:
    """Replace all parameters and buffers of a network, as ``to`` would."""
    parameters: dict[int, nn.Parameter] = {}
    for module in network.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                like = nn.Parameter(moved(parameter), parameter.requires_grad)
                module._parameters[name] = parameters.setdefault(id(parameter), like)
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else moved(buffer)
    return network


def compressed(kind: str, form: str = "mpo") -> tuple[nn.Module, Tensor]:
    network, x = NETWORKS[kind]()
    mpoc.compress(network, form=form, bond=3, embeddings=True, allow_growth=True)
    return network, x


def test_mixing_devices_is_an_error() -> None:
    with FakeTensorMode(allow_non_fake_inputs=True), pytest.raises(RuntimeError, match="same device"):
        nn.functional.linear(torch.empty(2, 3, device=DEVICE), torch.empty(4, 3))


@pytest.mark.parametrize("kind", NETWORKS)
def test_forward_stays_on_the_device(kind: str) -> None:
    network, x = compressed(kind)
    expected = network(x).shape
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        y = move(network.eval())(moved(x))
    assert y.device.type == DEVICE and y.shape == expected


@pytest.mark.parametrize("form", ["svd", "tree", "mera"])
def test_forms_stay_on_the_device(form: str) -> None:
    network, x = compressed("linear", form)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        assert move(network)(moved(x)).device.type == DEVICE


@pytest.mark.parametrize("storage", ["grid", "coded"])
def test_codes_stay_on_the_device(storage: str, tmp_path: Path) -> None:
    network = nn.Sequential(nn.Linear(128, 96))
    mpoc.compress(network, bits=4, storage=storage)
    mpoc.save(network, tmp_path / "m.safetensors")
    packed = mpoc.load(tmp_path / "m.safetensors", nn.Sequential(nn.Linear(128, 96)), weights="packed")
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        assert move(packed)(moved(floats(5, 128))).device.type == DEVICE


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("kind", ["linear, padded", "conv2d", "transposed conv2d", "embedding", "attention"])
def test_training_step_stays_on_the_device(kind: str, optimizer: str) -> None:
    network, x = compressed(kind)
    target = network(x).detach()
    settings = Settings(optimizer=optimizer, lr=0.1, l2=0.0)
    with FakeTensorMode(allow_non_fake_inputs=True):
        move(network.train())
        updates = make_optimizer(network.parameters(), settings)
        loss = Regression().loss(network(moved(x)), {"y": moved(target)})
        loss.backward()
        updates.step()
        for parameter in network.parameters():
            assert parameter.grad is not None and parameter.grad.device.type == DEVICE


@pytest.mark.parametrize(
    "kind", ["linear", "conv2d", "conv2d with its strides", "conv1d", "transposed conv1d"]
)
def test_moments_are_gathered_on_the_device(kind: str) -> None:
    """Sums lie where the network does; the moments lie on the CPU."""
    network, x = NETWORKS[kind]()
    layer = find_layer(network, "layer.weight")
    assert not isinstance(layer, str), layer
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        y = move(network)(given := moved(x))
        sums, products = LayerSums(layer), ProductSum()
        for seed in range(2):
            sums.add(given, None, Sample(3, seed), given.clone())
        rows = as_rows(layer, y, None)
        products.add(rows, rows)
        assert products.total().device.type == DEVICE
        moments = sums.moments()
        assert moments is not None
        tensors = [getattr(moments, field.name) for field in fields(moments) if field.name != "rows"]
        tensors = [tensor for tensor in tensors if tensor is not None]
        assert {tensor.device.type for tensor in tensors} == {"cpu"}
        there = moments.on(torch.device(DEVICE))
        assert there.second.shape == moments.second.shape
        assert isinstance(there.second, Tensor) and there.second.device.type == DEVICE


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_products_of_16_bits_are_summed_in_float32(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU; the CPU, and torch's build for ROCm, work with them in float32."""
    with FakeTensorMode():
        rows = torch.empty(8, 5, dtype=dtype, device="cuda")
        assert has_exact_products(rows) and not has_exact_products(rows.float())
        assert exact_product(rows.mT, rows).dtype == torch.float32
        monkeypatch.setattr(torch.version, "hip", "7.0")
        assert not has_exact_products(rows)
    rows = torch.randn(8, 5).to(dtype)
    assert not has_exact_products(rows)
    sums = ProductSum()
    sums.add(rows, rows)
    torch.testing.assert_close(sums.total(), rows.double().T @ rows.double(), rtol=1e-6, atol=1e-6)


def test_moments_of_few_outputs_are_gathered_on_the_device() -> None:
    network, x = NETWORKS["linear"]()
    layer = find_layer(network, "layer.weight")
    assert not isinstance(layer, str), layer
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        given = moved(x)
        weight = moved(torch.empty(1, layer.inputs.features, dtype=torch.float64))
        sums = LayerSums(layer, weight=weight)
        sums.add(given, None, None, given.clone())
        moments = sums.moments()
        assert moments is not None and isinstance(moments.cross, OutputMoment)
        assert {one.device.type for one in (moments.cross.weight, moments.cross.matrix)} == {"cpu"}
        there = moments.on(torch.device(DEVICE)).cross
        assert {one.device.type for one in (there.weight, there.matrix)} == {DEVICE}
