"""The CIFAR-10 residual networks of He et al., and their wide variant in Gao et al. 2020 (section III B 2).

"Deep residual learning for image recognition", CVPR 2016, section 4.2: depth 6n + 2, three stages of n blocks
of two convolutions with 16, 32 and 64 channels, and shortcuts without parameters (option A: every second
pixel, missing channels filled with zeros). ``width`` k gives the stages 16k, 32k and 64k channels. The names
are those of the published checkpoints (``conv1``, ``layer1.0.bn2``, …, ``linear``) without their ``module.``.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from mpoc.zoo.initial import he_normal

_DEEPEST = 1202  # of the paper


class Block(nn.Module):
    """Two 3 × 3 convolutions beside the shortcut: (n, C, H, W) → (n, C', H / stride, W / stride)."""

    def __init__(self, channels: int, wider: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, wider, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(wider)
        self.conv2 = nn.Conv2d(wider, wider, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(wider)
        self.stride = stride
        self.new_channels = wider - channels

    def shortcut(self, x: Tensor) -> Tensor:
        """Option A, half of the new, zero channels on either side."""
        half = self.new_channels // 2
        strided = x[:, :, :: self.stride, :: self.stride]
        return F.pad(strided, (0, 0, 0, 0, half, self.new_channels - half))

    def forward(self, x: Tensor) -> Tensor:
        """relu(F(x) + shortcut(x))."""
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return F.relu(y + self.shortcut(x))


class ResNet(nn.Module):
    """Images (n, 3, 32, 32) → logits (n, 10).

    Args:
        blocks: in each stage.
        width: factor k of the stages' channels.
    """

    def __init__(self, blocks: int, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = _stage(16, 16 * width, blocks, stride=1)  # (n, 16k, 32, 32)
        self.layer2 = _stage(16 * width, 32 * width, blocks, stride=2)  # (n, 32k, 16, 16)
        self.layer3 = _stage(32 * width, 64 * width, blocks, stride=2)  # (n, 64k, 8, 8)
        self.linear = nn.Linear(64 * width, 10)
        he_normal(self)

    def forward(self, x: Tensor) -> Tensor:
        """A convolution, three stages, the mean over pixels, a linear layer."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        logits: Tensor = self.linear(x.mean(dim=(2, 3)))
        return logits


def _stage(channels: int, wider: int, blocks: int, stride: int) -> nn.Sequential:
    """Blocks in a row; the first changes channels and size."""
    rest = [Block(wider, wider, stride=1) for _ in range(blocks - 1)]
    return nn.Sequential(Block(channels, wider, stride), *rest)


def resnet(depth: int, width: int = 1) -> ResNet:
    """ResNet of ``depth`` = 6n + 2 layers, ``width`` times as wide.

    Raises:
        ValueError: no such depth.
    """
    blocks, rest = divmod(depth - 2, 6)
    if rest or not 8 <= depth <= _DEEPEST:
        raise ValueError(f"depth={depth}: 6n + 2 from 8 to {_DEEPEST}, as 20, 32, 44, 56 or 110")
    return ResNet(blocks, width)
