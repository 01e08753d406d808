"""Statistics of batch norms measured anew on what the compressed network gives them.

They repair networks that were fitted by their weights alone; after a fit in order, where running means have
taken up errors already, they may do harm.  So they are kept only where outputs on held-out inputs gain.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mpoc.calibrate.hooks import device_of
from mpoc.calibrate.outputs import OutputDistance
from mpoc.train.call import Batch, Call, to_device


@dataclass(frozen=True)
class Renewed:
    """What new statistics would do."""

    statistics: dict[str, Tensor]  # running mean or variance, by its place in the network
    before: float  # distance of held-out outputs from the dense network's
    after: float

    @property
    def is_better(self) -> bool:
        """Whether held-out outputs gain."""
        return self.after < self.before


def renewed_norms(
    network: nn.Module, call: Call, batches: Sequence[Batch], distance: OutputDistance
) -> Renewed | None:
    """Mean and variance of what each batch norm is given, over all batches; None where there is no norm.

    Args:
        network: compressed, in evaluation mode; left as it is.
        call: how it is called.
        batches: of calibration data.
        distance: on held-out inputs.
    """
    changed = copy.deepcopy(network)
    norms = {name: m for name, m in changed.named_modules() if _keeps_statistics(m)}
    if not norms:
        return None
    for norm in norms.values():
        norm.reset_running_stats()
        norm.momentum = None  # a plain mean over batches
        norm.train()
    device = device_of(changed)
    with torch.no_grad():
        for batch in batches:
            call(changed, to_device(batch, device))
    changed.eval()
    statistics = {
        f"{name}.{kind}": getattr(norm, kind)
        for name, norm in norms.items()
        for kind in ("running_mean", "running_var")
    }
    return Renewed(statistics, distance.of_network(network), distance.of_network(changed))


def _keeps_statistics(module: nn.Module) -> bool:
    return isinstance(module, _BatchNorm) and module.running_mean is not None
