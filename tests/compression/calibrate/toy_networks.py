"""Small networks that calibration is tried on; ``--arch`` names them by :func:`arch`."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(16), nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(self.norm(x)).relu())


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = (nn.Conv2d(8, 8, 3, padding=1, bias=False) for _ in range(2))
        self.norm_one, self.norm_two = (nn.BatchNorm2d(8, momentum=1.0) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm_one(self.one(x)).relu_()
        return (x + self.norm_two(self.two(y))).relu()


def blocks() -> nn.Sequential:
    torch.manual_seed(4)
    return nn.Sequential(Block(), Block(), nn.Linear(16, 6))


def shared() -> nn.Sequential:
    net = blocks()
    net[1].up = net[0].up
    return net


def convolutions() -> nn.Sequential:
    torch.manual_seed(4)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 1), Convolutions(), Convolutions(), nn.AvgPool2d(8), nn.Flatten(), nn.Linear(8, 6)
    )
    net(torch.rand(64, 3, 8, 8).cumsum(2) / 9)
    return net


def grouped() -> nn.Sequential:
    torch.manual_seed(4)
    return nn.Sequential(
        nn.Conv2d(3, 8, 1),
        nn.Conv2d(8, 8, 3, padding=1, groups=2),
        nn.ReLU(),
        nn.AvgPool2d(8),
        nn.Flatten(),
        nn.Linear(8, 24),
        nn.ReLU(),
        nn.Linear(24, 6),
    )


def plain() -> nn.Sequential:
    torch.manual_seed(4)
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 6))


def mlp() -> nn.Sequential:
    torch.manual_seed(4)
    return nn.Sequential(
        nn.Linear(24, 48),
        nn.ReLU(),
        nn.Linear(48, 48),
        nn.ReLU(),
        nn.Linear(48, 32, bias=False),
        nn.Linear(32, 6),
    )


def conv() -> nn.Sequential:
    torch.manual_seed(4)
    net = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16, momentum=1.0),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, stride=2, bias=False),
        nn.BatchNorm2d(16, momentum=1.0),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, groups=4),
        nn.Flatten(),
        nn.Linear(16 * 25, 6),
    )
    net(torch.rand(64, 3, 16, 16).cumsum(2) / 17)
    return net


class WideBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(24, 48), nn.Linear(48, 24)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(x).relu())


def residual() -> nn.Sequential:
    torch.manual_seed(4)
    return nn.Sequential(WideBlock(), WideBlock(), nn.Linear(24, 6))


class Words(nn.Module):
    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(60, 16), nn.Linear(16, 60 if tied else 6)
        if tied:
            self.head.weight = self.table.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.table(x.long()).mean(1))


class Experts(nn.Module):
    """Five experts of which each row takes the best one; the last is never chosen."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.head = nn.Linear(24, 5), nn.Linear(24, 6)
        self.gate.bias.data[4] = -1e9
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(24, 32), nn.ReLU(), nn.Linear(32, 24)) for _ in range(5)
        )

    def forward(self, x: Tensor) -> Tensor:
        best, y = self.gate(x).argmax(-1), torch.zeros_like(x)
        for k, expert in enumerate(self.experts):
            if (best == k).any():
                y[best == k] = expert(x[best == k])
        return self.head(x + y)


def experts() -> nn.Module:
    torch.manual_seed(4)
    return Experts()


def words() -> nn.Module:
    torch.manual_seed(4)
    return Words(False)


def tied() -> nn.Module:
    torch.manual_seed(4)
    return Words(True)


def make(name: str) -> nn.Module:
    """One of the networks."""
    network: nn.Module = globals()[name]()
    return network


def arch(name: str) -> str:
    """How ``--arch`` names it."""
    return f"{__name__}:{name}"
