"""Recalibrate batch norms: measure their statistics again on what the compressed network gives them.

New statistics repair networks that were fitted by their weights alone.  After a sequential fit, where running
means have corrected errors already, they may do harm.  So they are kept only where they bring held-out
outputs nearer to the dense ones.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mpoc.compression.calibrate.layer_inputs import device_of, first_argument, hooked
from mpoc.models.call import Batch, Call, to_device


@dataclass(frozen=True)
class RecalibratedNorms:
    """New statistics of batch norms, and the distance of the outputs before and after."""

    statistics: dict[str, Tensor]  # running mean or variance, by its place in the network; on the CPU
    before: float  # distance of held-out outputs from the dense network's
    after: float

    @property
    def is_better(self) -> bool:
        """Whether held-out outputs are nearer to the dense ones."""
        return self.after < self.before


def recalibrated_norms(
    network: nn.Module, call: Call, batches: Sequence[Batch], distance: Callable[[nn.Module], float]
) -> RecalibratedNorms | None:
    """Mean and variance of what each batch norm is given, over all batches.

    None where there is no norm, or none is given two values a channel at once.  Norms that the network does
    not reach keep what they have.

    Args:
        network: compressed, in evaluation mode; left as it is.
        call: how it is called.
        batches: of calibration data.
        distance: of a network's held-out outputs from the dense ones.
    """
    changed = copy.deepcopy(network)
    norms = {name: m for name, m in changed.named_modules() if _keeps_statistics(m)}
    counts: Counter[nn.Module] = Counter()

    def count(norm: Any, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        given = first_argument(args, named)
        values = given.numel() // given.shape[1]  # a channel
        norm.train(values > 1)  # one value has no variance
        counts[norm] += values if values > 1 else 0
        norm.momentum = values / max(1, counts[norm])  # a mean over all values

    device = device_of(changed)
    with torch.no_grad(), hooked() as handles:
        handles += [norm.register_forward_pre_hook(count, with_kwargs=True) for norm in norms.values()]
        for batch in batches if norms else ():
            call(changed, to_device(batch, device))
    changed.eval()
    statistics = {
        f"{name}.{kind}": getattr(norm, kind).cpu()
        for name, norm in norms.items()
        if counts[norm]
        for kind in ("running_mean", "running_var")
    }
    if not statistics:
        return None
    return RecalibratedNorms(statistics, distance(network), distance(changed))


def _keeps_statistics(module: nn.Module) -> bool:
    return isinstance(module, _BatchNorm) and module.running_mean is not None
