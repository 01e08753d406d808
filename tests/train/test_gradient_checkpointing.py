"""Gradient checkpointing: the same training with fewer tensors kept."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import mpoc
from mpoc.errors import UsageError
from mpoc.models import zoo
from mpoc.train.engine import enable_gradient_checkpointing
from tests.support.hub_models import tiny
from tests.support.marks import slow_except
from tests.train.small import perceptron, run, weights

X = torch.linspace(-1, 1, 4 * 3 * 32 * 32).reshape(4, 3, 32, 32)
IDS = torch.arange(2, 66).reshape(2, 32) % 60


class Heads(nn.Module):
    """Neither list nor Sequential; a buffer that its first layer's inputs are counted in, and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.drop = nn.BatchNorm1d(12, momentum=None), nn.Dropout(0.5)
        self.first, self.second = nn.Linear(12, 24), nn.Linear(24, 3)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.second(self.drop(self.first(self.norm(x)).relu()))
        return logits


def chain() -> nn.Module:
    parts: list[nn.Module] = []
    for _ in range(8):
        parts += [nn.Linear(12, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Dropout(0.3)]
    return nn.Sequential(*parts)


def compressed() -> nn.Module:
    network = zoo.make("resnet:depth=20")
    mpoc.compress(network, bond=4)
    return network


def sum_of(outputs: object) -> Tensor:
    tensor = outputs if isinstance(outputs, Tensor) else outputs[0]  # type: ignore[index]
    return (tensor * torch.linspace(-1, 1, tensor.numel()).reshape(tensor.shape)).sum()


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "chain": (chain, torch.randn(64, 12)),
    "children": (Heads, torch.randn(64, 12)),
    "resnet": (lambda: zoo.make("resnet:depth=20"), X),
    "compressed": (compressed, X),
    "densenet": (lambda: zoo.make("densenet:depth=22,growth=4"), X),
    "vgg": (lambda: zoo.make("vgg16"), X),
    "picogpt": (lambda: zoo.make("picogpt:vocab=60,context=32"), IDS),
    "bert": (lambda: tiny("bert"), IDS),
    "gpt2": (lambda: tiny("gpt2"), IDS),
}


def step(network: nn.Module, x: Tensor) -> tuple[list[Tensor], list[Tensor], int]:
    """Gradients, buffers and bytes kept for the backward pass, after one pass there and back."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    torch.manual_seed(3)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = sum_of(network.train()(x))
    loss.backward()
    gradients = [p.grad for p in network.parameters() if p.grad is not None]
    return gradients, [b.clone() for b in network.buffers()], sum(kept.values())


@pytest.mark.parametrize("name", slow_except(NETWORKS, "picogpt", "bert"))
def test_keeps_gradients_and_saves_memory(name: str) -> None:
    make, x = NETWORKS[name]
    network = make()
    other = copy.deepcopy(network)
    undo = enable_gradient_checkpointing(other)
    gradients, buffers, most = step(network, x)
    again, counted, kept = step(other, x)
    assert len(again) == len(gradients) > 0
    for a, b in zip(again, gradients, strict=True):  # GPT-2's are summed in another order
        torch.testing.assert_close(a, b, rtol=0, atol=2e-6 * float(b.abs().max()))
    assert all(torch.equal(a, b) for a, b in zip(counted, buffers, strict=True))
    assert kept < (most if name == "children" else 0.7 * most)
    undo()
    assert step(other, x)[2] == most


def test_training_is_bit_identical_and_restores_the_network() -> None:
    found = []
    for recompute in (False, True):
        network = perceptron(dropout=0.3)
        run(network, gradient_checkpointing=recompute, accumulate=2)
        assert "forward" not in vars(network)
        found.append(weights(network))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_rejects_single_layers() -> None:
    with pytest.raises(UsageError, match="Linear is one layer"):
        enable_gradient_checkpointing(nn.Linear(3, 3))
