"""How far outputs move, against the formula."""

from __future__ import annotations

import copy
import math

import torch
from torch import nn

from tests.calibrate.networks import images
from tests.calibrate.test_norms import distance_from_own


def test_divergence_of_classes_and_no_number_is_infinitely_far() -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 5)).eval()
    batches = [images(3), images(2, seed=1)]
    distance = distance_from_own(network, batches)
    other = copy.deepcopy(network)
    with torch.no_grad():
        other.get_parameter("1.bias")[0] += 0.5
    assert distance.of_network(network) < 1e-6
    x = torch.cat([batch["x"] for batch in batches])
    ours, theirs = (nn.Module.__call__(one, x).double().log_softmax(-1).detach() for one in (other, network))
    divergence = (theirs.exp() * (theirs - ours)).sum(-1).mean()
    assert math.isclose(distance.of_network(other), float(divergence), rel_tol=1e-4)
    with torch.no_grad():
        other.get_parameter("1.weight")[0, 0] = math.nan
    assert distance.of_network(other) == math.inf
