"""The network for MNIST on which Harada looks for the effective components of a weight (slides, 2022).

"MPO 4,4,4,4,4 → 4,4,4,4,4, ReLU, FC 1024 → 10" on images of 32 × 32: weights 1024 × 1024 and 10 × 1024, no
biases, as the slides count none.  They say neither how 28 × 28 pixels become 32 × 32 nor what the
weights start from: here black pixels surround the image, and the weights are torch's.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F


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
