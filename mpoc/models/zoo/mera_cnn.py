"""The network for CIFAR-10 whose two hidden layers Hallam et al. replace (arXiv:1711.03357, 2017).

Three pairs of 3 × 3 convolutions, 64 channels but for the last of 256, each pair followed by a 3 × 3 max
pooling of stride 2: 4 × 4 × 256 features, then 4096 → hidden → 64 → 10.  Leaky ReLU of 0.2, dropout of 0.2
and 0.5 on the last two convolutions and of 0.5 on the hidden layers, batch norm after it and after the
pooling.  There are no biases, and the norms have no parameters: the paper's totals count neither.

Features are counted as TensorFlow does, which the paper used: pixel by pixel, channels last.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

FEATURES = (4, 4, 256)  # height, width, channels of what reaches the hidden layers
_CHANNELS = (3, 64, 64, 64, 64, 64, 256)


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
        for k, (before, after) in enumerate(pairwise(_CHANNELS), 1):
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
        for k in range(1, len(_CHANNELS)):
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
