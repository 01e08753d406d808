"""Dropout of a network, wherever it keeps its probability."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.dropout import _DropoutNd


def set_dropout(network: nn.Module, probability: float) -> None:
    """Give all dropout one probability: of dropout modules, and of modules that hold a number of that name.

    Args:
        network: changed; its config is not.
        probability: from 0 to 1.
    """
    for module in network.modules():
        if isinstance(module, _DropoutNd):
            module.p = probability
        for name, value in list(vars(module).items()):
            if name.endswith(("dropout", "dropout_prob", "dropout_p")) and isinstance(value, float):
                setattr(module, name, probability)
