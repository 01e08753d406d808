"""Parameters of fully connected layers beside those of a study's baseline: Table 1 of Hallam et al. 2017."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from mpoc import zoo
from mpoc.reproduce.experiment import Study


@dataclass(frozen=True)
class Counts:
    """Parameters of a network as the paper counts them."""

    fully_connected: int
    total: int

    def of(self, baseline: Counts) -> tuple[float, float]:
        """How many times fewer than the baseline's."""
        return baseline.fully_connected / self.fully_connected, baseline.total / self.total


def counts(study: Study, network: str, parameters: int | None = None) -> Counts:
    """The paper's number of the last layer stands in the place of its own.

    Args:
        study: that has a baseline.
        network: of the zoo, whose last layer is its ``head``.
        parameters: that it has, with cores in the place of hidden layers; None: dense.
    """
    with torch.device("meta"):
        made = zoo.make(network)
    total = sum(parameter.numel() for parameter in made.parameters())
    linear = sum(module.weight.numel() for module in made.modules() if isinstance(module, nn.Linear))
    now = total if parameters is None else parameters
    now += study.head - made.get_submodule("head").get_parameter("weight").numel()
    return Counts(now - (total - linear), now)


def baseline_counts(study: Study) -> Counts:
    """Those of the dense network that others are compared with."""
    return counts(study, study.variants[study.baseline].network)
