"""Networks for CIFAR-10: ResNets, VGG, DenseNets, and the network of Hallam et al. 2017.

ResNet: He et al., "Deep residual learning for image recognition", CVPR 2016, section 4.2: depth 6n + 2, three
stages of n blocks of two convolutions with 16, 32 and 64 channels, and shortcuts without parameters (option
A: every second pixel, missing channels filled with zeros). ``width`` k gives 16k, 32k and 64k channels, as in
Gao et al. 2020, section III B 2. Names are those of the published checkpoints (``conv1``, ``layer1.0.bn2``,
…, ``linear``) without their ``module.``.

VGG: Simonyan and Zisserman, arXiv:1409.1556, configurations C (16 layers, 1 × 1 kernels in the third
convolutions) and E (19 layers), as in Gao et al. 2020, section III B 1. As in the paper's public code every
convolution has a batch norm and no bias, and after five poolings one pixel of 512 channels goes to 512 → 4096
→ 4096 → 10 with dropout of 0.2. Batch norm and ReLU follow their convolution here; there they precede it.

DenseNet: Huang et al., "Densely connected convolutional networks", CVPR 2017, without bottlenecks, as in Gao
et al. 2020, table II: depth 3m + 4, three blocks of m convolutions (each of the concatenation of all before
it), 1 × 1 convolutions and average pooling between the blocks. Every convolution sees batch norm and ReLU of
its input and has no bias. The first convolution has 16 channels, or the n of table II.

MeraCNN: Hallam et al., arXiv:1711.03357. Three pairs of 3 × 3 convolutions, 64 channels but 256 in the last,
each pair followed by a 3 × 3 max pooling of stride 2: 4 × 4 × 256 features, then 4096 → hidden → 64 → 10.
Leaky ReLU of 0.2; dropout of 0.2 and 0.5 on the last two convolutions and of 0.5 on the hidden layers; batch
norm after it and after the pooling. There are no biases, and the norms have no parameters: the paper's totals
count neither. Features are counted as in TensorFlow, which the paper used: pixel by pixel, channels last.

Networks with ReLU start as in He et al., "Delving deep into rectifiers", ICCV 2015, Eq. (10).
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_DEEPEST_RESNET = 1202  # of the paper
_VGG_CHANNELS = (64, 128, 256, 512, 512)
FEATURES = (4, 4, 256)  # height, width, channels of what reaches the hidden layers
_MERA_CHANNELS = (3, 64, 64, 64, 64, 64, 256)
_FIRST = {(100, 12): 24, (100, 24): 96}  # n by (depth, growth), where it is not 16


def he_normal(network: nn.Module) -> None:
    """Normal weights of variance 2 / fan-in in every convolution and linear layer, biases zero."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


class ResidualBlock(nn.Module):
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
    rest = [ResidualBlock(wider, wider, stride=1) for _ in range(blocks - 1)]
    return nn.Sequential(ResidualBlock(channels, wider, stride), *rest)


def resnet(depth: int, width: int = 1) -> ResNet:
    """ResNet of ``depth`` = 6n + 2 layers, ``width`` times as wide.

    Raises:
        ValueError: no such depth.
    """
    blocks, rest = divmod(depth - 2, 6)
    if rest or not 8 <= depth <= _DEEPEST_RESNET:
        raise ValueError(f"depth={depth}: 6n + 2 from 8 to {_DEEPEST_RESNET}, as 20, 32, 44, 56 or 110")
    return ResNet(blocks, width)


class VGG(nn.Module):
    """Images (n, 3, 32, 32) → logits (n, 10).

    Args:
        kernels: for each of the five stages the kernel sizes of its convolutions.
    """

    def __init__(self, kernels: tuple[tuple[int, ...], ...]) -> None:
        super().__init__()
        self.depths = [len(sizes) for sizes in kernels]
        channels = 3
        for stage, (sizes, wider) in enumerate(zip(kernels, _VGG_CHANNELS, strict=True), 1):
            for layer, size in enumerate(sizes, 1):
                conv = nn.Conv2d(channels, wider, size, padding=size // 2, bias=False)
                self.add_module(f"conv{stage}_{layer}", conv)
                self.add_module(f"bn{stage}_{layer}", nn.BatchNorm2d(wider))
                channels = wider
        self.fc1 = nn.Linear(512, 4096)
        self.fc2 = nn.Linear(4096, 4096)
        self.fc3 = nn.Linear(4096, 10)
        self.dropout = nn.Dropout(0.2)
        he_normal(self)

    def forward(self, x: Tensor) -> Tensor:
        """Five stages, each at half the size of the one before: 32, 16, 8, 4, 2 and 1 pixel."""
        for stage, depth in enumerate(self.depths, 1):
            for layer in range(1, depth + 1):
                y = self.get_submodule(f"conv{stage}_{layer}")(x)
                x = F.relu(self.get_submodule(f"bn{stage}_{layer}")(y))
            x = F.max_pool2d(x, 2)
        x = self.dropout(F.relu(self.fc1(x.flatten(1))))
        logits: Tensor = self.fc3(self.dropout(F.relu(self.fc2(x))))
        return logits


def vgg16() -> VGG:
    """Configuration C: ``conv1_1`` … ``conv5_3``, ``fc1`` … ``fc3``."""
    return VGG(((3, 3), (3, 3), (3, 3, 1), (3, 3, 1), (3, 3, 1)))


def vgg19() -> VGG:
    """Configuration E: ``conv1_1`` … ``conv5_4``, ``fc1`` … ``fc3``."""
    return VGG(((3, 3), (3, 3), (3,) * 4, (3,) * 4, (3,) * 4))


_DEEPEST_DENSENET = 250  # of the paper


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
        after1, after2, after3 = (first + block * layers * growth for block in (1, 2, 3))
        self.conv = nn.Conv2d(3, first, 3, padding=1, bias=False)
        self.block1 = _block(first, layers, growth)  # (n, first + mk, 32, 32)
        self.transition1 = Unit(after1, after1, 1)
        self.block2 = _block(after1, layers, growth)  # (n, first + 2mk, 16, 16)
        self.transition2 = Unit(after2, after2, 1)
        self.block3 = _block(after2, layers, growth)  # (n, first + 3mk, 8, 8)
        self.norm = nn.BatchNorm2d(after3)
        self.linear = nn.Linear(after3, 10)
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
    if rest or not 7 <= depth <= _DEEPEST_DENSENET:
        raise ValueError(f"depth={depth}: 3m + 4 from 7 to {_DEEPEST_DENSENET}, as 40 or 100")
    return DenseNet(_FIRST.get((depth, growth), 16), layers, growth)


class MeraCNN(nn.Module):
    """Images (n, 3, 32, 32) → logits (n, 10).

    Args:
        hidden: nodes of the first hidden layer.
        parallel: 1 where both hidden layers see the features, and the logits both of them: 4096·(hidden + 64)
            parameters, as the paper prints of its FC-2.
    """

    def __init__(self, hidden: int, parallel: int) -> None:
        super().__init__()
        if parallel not in (0, 1):
            raise ValueError(f"parallel={parallel}: 0 or 1")
        self.parallel = parallel
        for k, (before, after) in enumerate(pairwise(_MERA_CHANNELS), 1):
            self.add_module(f"conv{k}", nn.Conv2d(before, after, 3, padding=1, bias=False))
            self.add_module(f"bn{k}", nn.BatchNorm2d(after, affine=False))
        features = math.prod(FEATURES)
        self.fc1 = nn.Linear(features, hidden, bias=False)
        self.fc2 = nn.Linear(features if parallel else hidden, 64, bias=False)
        self.head = nn.Linear(hidden + 64 if parallel else 64, 10, bias=False)
        self.bn_fc1 = nn.BatchNorm1d(hidden, affine=False)
        self.bn_fc2 = nn.BatchNorm1d(64, affine=False)
        self.drop5, self.drop6 = nn.Dropout(0.2), nn.Dropout(0.5)
        self.drop_fc1, self.drop_fc2 = nn.Dropout(0.5), nn.Dropout(0.5)
        for module in self.modules():  # normal, of variance 1 / inputs
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight, nonlinearity="linear")

    def forward(self, x: Tensor) -> Tensor:
        """Three pairs of convolutions, two hidden layers, logits."""
        for k in range(1, len(_MERA_CHANNELS)):
            x = F.leaky_relu(self.get_submodule(f"conv{k}")(x), 0.2)
            if k > 4:
                x = self.get_submodule(f"drop{k}")(x)
            if k % 2 == 0:
                x = F.max_pool2d(x, 3, stride=2, padding=1)
            x = self.get_submodule(f"bn{k}")(x)
        x = x.permute(0, 2, 3, 1).flatten(1)
        first = self.bn_fc1(self.drop_fc1(F.leaky_relu(self.fc1(x), 0.2)))
        second = self.fc2(x if self.parallel else first)
        second = self.bn_fc2(self.drop_fc2(F.leaky_relu(second, 0.2)))
        logits: Tensor = self.head(torch.cat([first, second], 1) if self.parallel else second)
        return logits
