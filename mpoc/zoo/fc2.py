"""FC2 for MNIST: the two fully connected layers of Gao et al. 2020, section III A 1.

Weights 784 × 256 and 256 × 10, a ReLU between them; no biases, and a truncated normal of 0.1 to start from,
as in the paper's public code.
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
