"""FC2 for MNIST: the two fully connected layers of Gao et al. 2020, section III A 1.

Weights 784 × 256 and 256 × 10, a ReLU between them; no biases, and a truncated normal of 0.1 to start from,
as in the paper's public code.

LeNet-5 for MNIST, as Gao et al. 2020 (section III A 2) take it; LeCun et al., Proc. IEEE 86, 2278 (1998).

The last convolution sees a 5 × 5 image with a 5 × 5 kernel and is therefore written as what it is, 400 → 120
fully connected. ReLU and max pooling, no biases in the last two layers, and a truncated normal of 0.1 to
start from, as in the paper's public code.

The network for MNIST on which Harada looks for the effective components of a weight (slides, 2022).

"MPO 4,4,4,4,4 → 4,4,4,4,4, ReLU, FC 1024 → 10" on images of 32 × 32: weights 1024 × 1024 and 10 × 1024, no
biases, as the slides count none.  They say neither how 28 × 28 pixels become 32 × 32 nor what the
weights start from: here black pixels surround the image, and the weights are torch's.
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
