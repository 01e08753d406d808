"""What takes up the mean of a layer's error: its bias, or the running mean of the batch norm behind it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from mpoc.calibrate.trace import Trace
from mpoc.network import same_tensor


@dataclass(frozen=True)
class TakenUp:
    """The tensor of the checkpoint that takes up the mean of a layer's error."""

    name: str
    sign: int  # 1: a bias; -1: the running mean of a batch norm


def taken_up(
    network: nn.Module, trace: Trace, weights: Mapping[str, str], places: Mapping[str, str]
) -> dict[str, TakenUp]:
    """By the weight's name in the checkpoint, where there is such a tensor that no other layer uses.

    Args:
        network: that runs.
        trace: of this network.
        weights: those of interest, from the place in the network to the name in the checkpoint.
        places: of all tensors, from the name in the checkpoint to the place in the network.
    """
    named = {place: name for name, place in places.items()}
    found, tied = {}, same_tensor(network)
    for weight, name in weights.items():
        bias = weight.removesuffix("weight") + "bias"
        norm = trace.norms.get(weight)
        layer = trace.layers.get(weight)
        if layer is None or len(layer.modules) > 1:
            continue
        if weight.endswith("weight") and bias in named and len(tied[bias]) == 1:
            found[name] = TakenUp(named[bias], 1)
        elif norm is not None and f"{norm}.running_mean" in named:
            found[name] = TakenUp(named[f"{norm}.running_mean"], -1)
    return found
