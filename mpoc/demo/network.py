"""The demo's network: small enough to ship, with one large linear map worth compressing."""

from __future__ import annotations

from importlib import resources

import torch
from safetensors.torch import load
from torch import Tensor, nn

NETWORK_FILE = "digits-cnn.safetensors"


class DigitsNet(nn.Module):
    """Classifies 8x8 greyscale digits: (batch, 1, 8, 8) floats in [0, 1] to (batch, 10) logits.

    Shapes along the way: conv1 (batch, 16, 8, 8), conv2 (batch, 32, 8, 8), pooling
    (batch, 32, 4, 4), flattened (batch, 512), fc1 (batch, 128), fc2 (batch, 10). Dropout
    acts on the inputs of fc1 and fc2, in training only.
    """

    def __init__(self) -> None:
        """Build the layers with PyTorch's default random weights."""
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, kernel_size=3, padding=1)
        self.conv2 = nn.Conv2d(16, 32, kernel_size=3, padding=1)
        self.fc1 = nn.Linear(512, 128)
        self.fc2 = nn.Linear(128, 10)
        self.dropout = nn.Dropout(0.5)

    def forward(self, images: Tensor) -> Tensor:
        """Map images (batch, 1, 8, 8) to logits (batch, 10)."""
        features = torch.relu(self.conv1(images))
        features = torch.relu(self.conv2(features))
        features = self.dropout(nn.functional.max_pool2d(features, 2).flatten(1))
        features = self.dropout(torch.relu(self.fc1(features)))
        logits: Tensor = self.fc2(features)
        return logits


def load_network() -> DigitsNet:
    """Return the trained network that the package contains, in eval mode."""
    weights = resources.files(__package__).joinpath(NETWORK_FILE).read_bytes()
    network = DigitsNet()
    network.load_state_dict(load(weights))
    return network.eval()
