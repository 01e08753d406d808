"""The CIFAR-10 densely connected networks of Huang et al. without bottlenecks; Gao et al. 2020, table II.

"Densely connected convolutional networks", CVPR 2017: depth 3m + 4, three blocks of m convolutions (each of
the concatenation of all before it), 1 × 1 convolutions and average pooling between the blocks. Every
convolution sees batch norm and ReLU of its input and has no bias. The first convolution has 16 channels, or
the n of table II.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mpoc.zoo.initial import he_normal

_FIRST = {(100, 12): 24, (100, 24): 96}  # n by (depth, growth), where it is not 16
_DEEPEST = 250  # of the paper


class Unit(nn.Module):
    """Batch norm, ReLU, convolution: (n, C, H, W) → (n, C', H, W)."""

    def __init__(self, channels: int, new: int, size: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels)
        self.conv = nn.Conv2d(channels, new, size, padding=size // 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """conv(relu(norm(x)))."""
        y: Tensor = self.conv(F.relu(self.norm(x)))
        return y


class DenseNet(nn.Module):
    """Images (n, 3, 32, 32) → logits (n, 10).

    Args:
        first: channels of the first convolution.
        layers: m, in each block.
        growth: k, new channels of each layer.
    """

    def __init__(self, first: int, layers: int, growth: int) -> None:
        super().__init__()
        one, two, three = (first + block * layers * growth for block in (1, 2, 3))
        self.conv = nn.Conv2d(3, first, 3, padding=1, bias=False)
        self.block1 = _block(first, layers, growth)  # (n, first + mk, 32, 32)
        self.transition1 = Unit(one, one, 1)
        self.block2 = _block(one, layers, growth)  # (n, first + 2mk, 16, 16)
        self.transition2 = Unit(two, two, 1)
        self.block3 = _block(two, layers, growth)  # (n, first + 3mk, 8, 8)
        self.norm = nn.BatchNorm2d(three)
        self.linear = nn.Linear(three, 10)
        he_normal(self)

    def forward(self, x: Tensor) -> Tensor:
        """Three dense blocks, the mean over pixels, a linear layer."""
        x = _densely(self.block1, self.conv(x))
        x = _densely(self.block2, F.avg_pool2d(self.transition1(x), 2))
        x = _densely(self.block3, F.avg_pool2d(self.transition2(x), 2))
        logits: Tensor = self.linear(F.relu(self.norm(x)).mean(dim=(2, 3)))
        return logits


def _block(channels: int, layers: int, growth: int) -> nn.ModuleList:
    return nn.ModuleList(Unit(channels + k * growth, growth, 3) for k in range(layers))


def _densely(block: nn.ModuleList, x: Tensor) -> Tensor:
    """Each layer sees the input and what all layers before it made."""
    for layer in block:
        x = torch.cat([x, layer(x)], dim=1)
    return x


def densenet(depth: int, growth: int) -> DenseNet:
    """DenseNet of ``depth`` = 3m + 4 layers and ``growth`` k.

    Raises:
        ValueError: no such depth.
    """
    layers, rest = divmod(depth - 4, 3)
    if rest or not 7 <= depth <= _DEEPEST:
        raise ValueError(f"depth={depth}: 3m + 4 from 7 to {_DEEPEST}, as 40 or 100")
    return DenseNet(_FIRST.get((depth, growth), 16), layers, growth)
