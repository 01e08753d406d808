"""Small networks and batches that passes are tried on."""

from __future__ import annotations

import copy
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from mpoc.models import zoo
from mpoc.models.call import Batch
from mpoc.models.introspection import kinds_of
from tests.support.architectures import tiny

transformers: Any = import_module("transformers")


def encoder(layers: int = 3) -> Any:
    """A BERT without a head."""
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=layers, num_attention_heads=2,
        max_position_embeddings=16,
    )  # fmt: skip
    torch.manual_seed(1)
    network = transformers.BertModel(config, add_pooling_layer=False).eval()
    for parameter in network.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))  # biases and norms are not trivial
    return network


def resnet20() -> nn.Module:
    """With batch norms that have seen something."""
    torch.manual_seed(2)
    network = zoo.make("resnet:depth=20").eval()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None and module.running_var is not None
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    return network


def texts(lengths: tuple[int, ...] = (9, 4, 6), seed: int = 0, vocabulary: int = 50) -> Batch:
    """Tokens padded behind."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    ids = torch.randint(1, vocabulary, mask.shape, generator=generator) * mask
    return {"input_ids": ids, "attention_mask": mask.long()}


def windowed() -> tuple[nn.Module, list[Batch]]:
    """Blocks 1 and 2 see a window of four tokens, which no text of the first batch fills."""
    options = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}
    return tiny("qwen2", 3, **options), [texts((3, 3, 3)), texts((9, 6), seed=1)]


class Guided(nn.Module):
    """Three blocks; what each is given beside its input looks the same in batches of three, or follows from
    layers between the blocks.
    """

    seen: Tensor

    def __init__(self, how: str) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(GuidedBlock(gives_logits=how == "beside logits") for _ in range(3))
        self.between = nn.ModuleDict({name: nn.Linear(4, 4) for name in "12"})
        self.head = nn.Linear(4, 4)
        self.register_buffer("seen", torch.zeros(4))
        self.room, self.ones, self.how = torch.zeros(4), torch.ones(4), how

    def forward(self, x: Tensor) -> Tensor:
        for k, block in enumerate(self.blocks):
            if self.how == "range":
                self.seen.copy_(x.detach().abs().amax(0).maximum(self.seen))
            x = block(x, self._guide(k, x))
            x = x[0] if isinstance(x, tuple) else x
        logits: Tensor = self.head(x)
        return logits

    def _guide(self, k: int, x: Tensor) -> Tensor:
        if self.how == "refilled":
            return self.room.fill_(k + 1)
        if self.how == "hidden":
            return (x.norm(dim=-1, keepdim=True) < 9).float()
        if self.how == "above":
            return (x.norm(dim=-1, keepdim=True) > 9).float()
        if self.how == "finite":  # a network may refuse what blocks do not give
            assert x.detach().isfinite().all() and x.any()
            return self.ones * (k + 1)
        if self.how == "range":
            return self.ones * (k + 1)
        if self.how == "beside logits":
            return self.ones if len(x) == 3 else self.ones * (k + 1)
        guide: Tensor = self.between[str(k)](self.ones) if k else self.ones
        return guide


class GuidedBlock(nn.Module):
    def __init__(self, gives_logits: bool) -> None:
        super().__init__()
        self.linear, self.gives_logits = nn.Linear(4, 4), gives_logits

    def forward(self, given: Tensor, block: Tensor) -> Any:
        """With an argument of a name that other code might want."""
        output = given + self.linear(given) * block
        return (output, output.sum(-1)) if self.gives_logits else output


def guided(how: str) -> tuple[nn.Module, list[Batch]]:
    """The second batch is other than the first, on which a network is traced."""
    torch.manual_seed(3)
    return Guided(how).eval(), [{"x": torch.randn(3, 4)}, {"x": 9 * torch.randn(5, 4)}]


GUIDES = ("refilled", "hidden", "above", "finite", "beside logits", "layers")


def images(count: int = 3, seed: int = 0, size: int = 32) -> Batch:
    return {"x": torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))}


def damaged(network: nn.Module, scale: float = 0.3) -> nn.Module:
    """A copy whose weights are others: what a compressed network is to its dense one."""
    other = copy.deepcopy(network)
    generator = torch.Generator().manual_seed(3)
    for parameter in other.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data.add_(scale * parameter.data.std(correction=0) * noise)
    return other


def weights(network: nn.Module) -> list[str]:
    return [name for name, (kind, _) in kinds_of(network).items() if kind is not None]


def second(rows: Tensor) -> Tensor:
    """E[x xᵀ] in float64."""
    return rows.double().T @ rows.double() / len(rows)


class Stopped(nn.Module):
    """``body`` computes without gradients; ``late`` is called twice, ``never`` not at all."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.late, self.never = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            x = self.body(x)
        return self.late(self.late(x).relu())


class Routed(nn.Module):
    """Four experts; the first number of a row says which one takes it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.gate, self.head = nn.Linear(6, 6, bias=False), nn.Linear(6, 5)
        self.gate.weight.data.copy_(torch.eye(6))
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 6)) for _ in range(4)
        )

    def forward(self, x: Tensor) -> Tensor:
        x, y = self.gate(x), torch.zeros_like(x)
        for k, expert in enumerate(self.experts):
            chosen = x[:, 0].round() == k
            if chosen.any():
                y[chosen] = expert(x[chosen])
        return self.head(x + y)


def rows_for(*experts: int, seed: int = 0) -> Tensor:
    """One row for each of these experts of :class:`Routed`."""
    rows = torch.randn(len(experts), 6, generator=torch.Generator().manual_seed(seed))
    rows[:, 0] = torch.tensor(experts)
    return rows
