"""Layers with random cores, one network of every kind, and their dense twins."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mpoc.nn import adopt
from mpoc.tensor_networks.forms.form import form_of
from mpoc.tensor_networks.structure import Structure, make_structure
from tests.support.weights import random_cores


def structure_of(module: nn.Module, name: str = "weight", sites: int | None = None) -> Structure:
    """Automatic factors for a module's weight."""
    shape = tuple(getattr(module, name).shape)
    kind = "embedding" if isinstance(module, nn.Embedding) else "linear"
    return make_structure(f"conv{len(shape) - 2}d" if len(shape) > 2 else kind, shape, sites=sites)


def with_cores(
    module: nn.Module,
    max_bond: int = 3,
    sites: int | None = None,
    name: str = "weight",
    seed: int = 0,
    low_rank: int = 0,
) -> Any:
    """The module itself, its weight replaced by random cores; each part's entries are of about 1."""
    structure = structure_of(module, name, sites)
    every = random_cores(structure, max_bond, seed)
    if low_rank:
        every += random_cores(structure.as_low_rank(), low_rank, seed + 1)
        structure = structure.as_form("svd+mpo")
    dtype = getattr(module, name).dtype
    cores = []
    for form in form_of(every, structure).terms:
        scale = float(form.to_weight().std(correction=0)) or 1.0
        cores += [(core / scale ** (1 / len(form.cores))).to(dtype) for core in form.cores]
    adopt(module, name, cores, structure)
    return module


def pair(module: nn.Module, **options: Any) -> tuple[nn.Module, Any]:
    """A dense layer and one with cores of the very same weight (options: those of ``with_cores``)."""
    dense = copy.deepcopy(module)
    layer = with_cores(module, **options)
    with torch.no_grad():
        dense.get_parameter("weight").copy_(torch.clone(layer.weight))
    return dense, layer


def gradients(layer: nn.Module, x: Tensor) -> tuple[Tensor, dict[str, Tensor], Tensor | None]:
    """Output, gradients of all parameters and of ``x`` (None: whole numbers) for the loss Σ y_k sin k."""
    x = x.clone().requires_grad_(x.is_floating_point())
    layer.zero_grad()
    y = layer(x)
    (y * torch.arange(y.numel(), device=y.device).sin().reshape(y.shape).to(y.dtype)).sum().backward()
    found = {name: value.grad for name, value in layer.named_parameters() if value.grad is not None}
    return y.detach(), found, x.grad


def pulled_back(cores: Sequence[Tensor], structure: Structure, gradient: Tensor) -> list[Tensor]:
    """Gradients of cores from that of the weight they make."""
    leaves = [core.detach().clone().requires_grad_() for core in cores]
    return list(torch.autograd.grad(form_of(leaves, structure).to_weight(), leaves, gradient))


class First(nn.Module):
    """The first of a layer's outputs, for a sequence."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x)[0]
        return y


class SelfAttention(nn.MultiheadAttention):
    """Queries, keys and values from one sequence."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        y: Tensor = super().forward(x, x, x)[0]
        return y


class Halved(nn.Linear):
    """A linear layer with a forward of its own."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) / 2 + self.weight.mean()


def named(layer: nn.Module, name: str = "layer") -> nn.Module:
    """A network of one layer."""
    return nn.Sequential(OrderedDict({name: layer}))


def floats(*shape: int) -> Tensor:
    """Gaussian input."""
    return torch.randn(shape)


# name → (a network of that layer, an input)
NETWORKS: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "linear": lambda: (named(nn.Linear(24, 18)), floats(5, 24)),
    "linear without bias": lambda: (named(nn.Linear(24, 18, bias=False)), floats(2, 3, 24)),
    "linear, padded": lambda: (named(nn.Linear(53, 29)), floats(7, 53)),
    "own forward": lambda: (named(Halved(24, 18)), floats(5, 24)),
    "conv1d": lambda: (named(nn.Conv1d(6, 8, 5, stride=2, padding=2)), floats(2, 6, 11)),
    "conv2d": lambda: (named(nn.Conv2d(4, 6, 3, bias=False)), floats(2, 4, 7, 6)),
    "conv2d with its strides": lambda: (
        named(nn.Conv2d(8, 12, (3, 2), stride=(2, 1), padding=(1, 2), dilation=(1, 2), groups=2)),
        floats(2, 8, 9, 7),
    ),
    "conv2d reflecting": lambda: (
        named(nn.Conv2d(4, 6, 3, padding=(2, 1), padding_mode="reflect")),
        floats(2, 4, 6, 6),
    ),
    "conv2d same": lambda: (named(nn.Conv2d(4, 6, 3, padding="same")), floats(1, 4, 6, 5)),
    "conv2d circular": lambda: (
        named(nn.Conv2d(4, 6, (1, 3), padding=(0, 1), padding_mode="circular")),
        floats(2, 4, 6, 6),
    ),
    "conv3d": lambda: (named(nn.Conv3d(4, 6, (2, 1, 3), padding=1)), floats(1, 4, 4, 3, 5)),
    "transposed conv1d": lambda: (
        named(nn.ConvTranspose1d(6, 4, 3, stride=2, output_padding=1)),
        floats(2, 6, 5),
    ),
    "transposed conv2d": lambda: (
        named(nn.ConvTranspose2d(6, 4, 3, stride=(2, 3), padding=1, groups=2, dilation=(1, 2))),
        floats(2, 6, 5, 4),
    ),
    "transposed conv3d": lambda: (named(nn.ConvTranspose3d(4, 6, 2, bias=False)), floats(1, 4, 3, 2, 3)),
    "embedding": lambda: (
        named(nn.Embedding(1009, 24, padding_idx=3), "embed"),
        torch.tensor([[3, 0, 1008], [3, 7, 7]]),
    ),
    "embedding bag": lambda: (named(nn.EmbeddingBag(60, 16), "embed"), torch.randint(0, 60, (3, 4))),
    "lstm": lambda: (First(nn.LSTM(8, 12, 2, bidirectional=True)), floats(5, 2, 8)),
    "gru": lambda: (First(nn.GRU(8, 12)), floats(5, 2, 8)),
    "rnn": lambda: (First(nn.RNN(8, 12, bias=False)), floats(5, 2, 8)),
    "attention": lambda: (named(SelfAttention(16, 4, batch_first=True)), floats(2, 5, 16)),
    "attention of other sizes": lambda: (
        First(Crossed(nn.MultiheadAttention(16, 2, kdim=12, vdim=8))),
        floats(5, 2, 16),
    ),
    "transformer layer": lambda: (
        named(nn.TransformerEncoderLayer(16, 4, 24, dropout=0.0, batch_first=True)),
        floats(2, 5, 16),
    ),
}


class Crossed(nn.Module):
    """Attention to keys and values of other widths."""

    def __init__(self, attention: nn.MultiheadAttention) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        answer: tuple[Tensor, Tensor] = self.attention(x, x[..., :12], x[..., 4:12])
        return answer
