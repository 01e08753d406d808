"""Networks for MNIST: FC2 and LeNet-5 of Gao et al. 2020, and the network of Harada (slides, 2022).

FC2 (section III A 1): weights 784 × 256 and 256 × 10 with a ReLU between them and no biases. The weights
start from a truncated normal of 0.1, as in the paper's public code.

LeNet-5 (section III A 2; LeCun et al., Proc. IEEE 86, 2278 (1998)): the last convolution has a 5 × 5 kernel
on a 5 × 5 image and is therefore written as a fully connected layer, 400 → 120. ReLU and max pooling, no
biases in the last two layers, and the start of FC2.

Harada, "MPO 4,4,4,4,4 → 4,4,4,4,4, ReLU, FC 1024 → 10" on images of 32 × 32: weights 1024 × 1024 and 10 ×
1024, without biases, as the slides count none. The slides say neither how 28 × 28 pixels become 32 × 32 nor
how the weights start: here the images are padded with black, and the weights are torch's.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F


class FC2(nn.Module):
    """Images (n, 1, 28, 28), or (n, 784), → logits (n, 10)."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(784, 256, bias=False)
        self.fc2 = nn.Linear(256, 10, bias=False)
        for layer in (self.fc1, self.fc2):
            nn.init.trunc_normal_(layer.weight, std=0.1, a=-0.2, b=0.2)

    def forward(self, x: Tensor) -> Tensor:
        """y = W₂ relu(W₁ x)."""
        y: Tensor = self.fc2(F.relu(self.fc1(x.flatten(1))))
        return y


class LeNet5(nn.Module):
    """Images (n, 1, 28, 28) → logits (n, 10)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 6, 5, padding=2)  # (n, 6, 28, 28), pooled to 14 × 14
        self.conv2 = nn.Conv2d(6, 16, 5)  # (n, 16, 10, 10), pooled to 5 × 5
        self.fc1 = nn.Linear(400, 120)
        self.fc2 = nn.Linear(120, 84, bias=False)
        self.fc3 = nn.Linear(84, 10, bias=False)
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            else:
                nn.init.trunc_normal_(parameter, std=0.1, a=-0.2, b=0.2)

    def forward(self, x: Tensor) -> Tensor:
        """Two convolutions with pooling, then three fully connected layers."""
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        y: Tensor = self.fc3(F.relu(self.fc2(F.relu(self.fc1(x.flatten(1))))))
        return y


class Harada(nn.Module):
    """Images (n, 1, 28, 28) → logits (n, 10)."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(1024, 1024, bias=False)
        self.fc2 = nn.Linear(1024, 10, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """y = W₂ relu(W₁ x), x in raster order."""
        y: Tensor = self.fc2(F.relu(self.fc1(F.pad(x, (2, 2, 2, 2)).flatten(1))))
        return y
