"""VGG-16 and VGG-19 for CIFAR-10, as Gao et al. 2020 (section III B 1) take them.

Simonyan and Zisserman, "Very deep convolutional networks for large-scale image recognition", arXiv:1409.1556:
configuration C (16 layers, 1 × 1 kernels in the third convolutions) and E (19 layers). As in the paper's
public code every convolution has a batch norm and no bias, and after five poolings one pixel of 512 channels
goes to 512 → 4096 → 4096 → 10 with dropout of 0.2. Here batch norm and ReLU follow their convolution, as is
usual; there they precede it.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from mpoc.zoo.initial import he_normal

_CHANNELS = (64, 128, 256, 512, 512)


class VGG(nn.Module):
    """Images (n, 3, 32, 32) → logits (n, 10).

    Args:
        kernels: for each of the five stages the kernel sizes of its convolutions.
    """

    def __init__(self, kernels: tuple[tuple[int, ...], ...]) -> None:
        super().__init__()
        self.depths = [len(sizes) for sizes in kernels]
        channels = 3
        for stage, (sizes, wider) in enumerate(zip(kernels, _CHANNELS, strict=True), 1):
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
