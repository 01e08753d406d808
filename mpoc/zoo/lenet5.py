"""LeNet-5 for MNIST, as Gao et al. 2020 (section III A 2) take it; LeCun et al., Proc. IEEE 86, 2278 (1998).

The last convolution sees a 5 × 5 image with a 5 × 5 kernel and is therefore written as what it is, 400 → 120
fully connected. ReLU and max pooling, no biases in the last two layers, and a truncated normal of 0.1 to
start from, as in the paper's public code.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F


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
