"""What the networks with ReLU start from: He et al., "Delving deep into rectifiers", ICCV 2015, Eq. (10)."""

from __future__ import annotations

from torch import nn


def he_normal(network: nn.Module) -> None:
    """Normal weights of variance 2 / fan-in in every convolution and linear layer, biases zero."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
