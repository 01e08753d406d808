"""The CIFAR-10 residual networks of He et al., for tests and benchmarks.

"Deep Residual Learning for Image Recognition" (CVPR 2016), section 4.2: depth 6n + 2, three stages
of n two-convolution blocks with 16, 32 and 64 channels, and shortcuts without parameters (option A:
every second pixel, missing channels filled with zeros). The module names are those of the published
checkpoints (``conv1``, ``layer1.0.bn2``, ..., ``linear``), which load with ``strict=True`` once
their ``module.`` prefix is gone.
"""

from torch import Tensor, nn
from torch.nn import functional as F


class Block(nn.Module):
    """Two 3x3 convolutions beside the option-A shortcut.

    (N, in_channels, H, W) -> (N, out_channels, H / stride, W / stride).
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.stride = stride
        self.new_channels = out_channels - in_channels

    def shortcut(self, x: Tensor) -> Tensor:
        """Subsample by the stride and put half of the new, zero channels on either side."""
        half = self.new_channels // 2
        strided = x[:, :, :: self.stride, :: self.stride]
        return F.pad(strided, (0, 0, 0, 0, half, self.new_channels - half))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return F.relu(y + self.shortcut(x))


class CifarResNet(nn.Module):
    """Images (N, 3, 32, 32) -> logits (N, 10); build it with :func:`cifar_resnet`."""

    def __init__(self, blocks_per_stage: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = stage(16, 16, blocks_per_stage, stride=1)  # (N, 16, 32, 32)
        self.layer2 = stage(16, 32, blocks_per_stage, stride=2)  # (N, 32, 16, 16)
        self.layer3 = stage(32, 64, blocks_per_stage, stride=2)  # (N, 64, 8, 8)
        self.linear = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean(dim=(2, 3)))


def stage(in_channels: int, out_channels: int, blocks: int, stride: int) -> nn.Sequential:
    """A row of blocks whose first one changes the number of channels and the resolution."""
    first = Block(in_channels, out_channels, stride)
    rest = [Block(out_channels, out_channels, stride=1) for _ in range(blocks - 1)]
    return nn.Sequential(first, *rest)


def cifar_resnet(depth: int) -> nn.Module:
    """The network of He et al. with ``depth`` = 6n + 2 layers (20, 32, 44, 56, 110), untrained.

    Maps images (N, 3, 32, 32) to logits (N, 10). Raises ValueError for any other depth.
    """
    blocks_per_stage, remainder = divmod(depth - 2, 6)
    if remainder or blocks_per_stage < 1:
        raise ValueError(f"depth must be 6n + 2 with n >= 1, as in 20 or 56; got {depth}")
    return CifarResNet(blocks_per_stage)
