"""How far outputs move, against the formula."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import nn

from mpoc.compression.calibrate.calibration_data import CalibrationData, CalibrationRequest
from mpoc.compression.calibrate.output_distance import OutputDistance, Replacement
from mpoc.compression.calibrate.statistics import CalibrationStatistics, MeanCorrection
from mpoc.compression.run_context import RunContext
from mpoc.models.call import Call
from tests.compression.calibrate.networks import encoder, images, texts, weights
from tests.compression.calibrate.test_batch_norm import distance_from_own


def test_measures_divergence_and_treats_nan_as_infinite() -> None:
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
    same = 100 * float((ours.argmax(-1) == theirs.argmax(-1)).double().mean())
    assert distance.likeness(other) == pytest.approx({"agreement": same, "kl": float(divergence)}, rel=1e-4)
    with torch.no_grad():
        other.get_parameter("1.weight")[0, 0] = math.nan
    assert distance.of_network(other) == math.inf
    assert "kl" not in distance.likeness(other)


def test_reports_on_examples_that_nothing_was_chosen_by() -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 5)).eval().requires_grad_(False)
    distance = distance_from_own(network, [images(3)])
    study: Any = distance._statistics
    study.data.unseen, study.places, study.means = [images(2, seed=1)], {"w": "1.weight"}, {}
    other = copy.deepcopy(network)
    with torch.no_grad():
        other.get_parameter("1.weight").mul_(0.5)
    changed = {"w": Replacement(other.get_parameter("1.weight").detach().clone(), None)}
    found = distance.likeness_of(changed)  # before the dense network's outputs are asked for
    assert found == distance.likeness(other) != distance_from_own(network, [images(3)]).likeness(other)
    assert found == pytest.approx(distance_from_own(network, [images(2, seed=1)]).likeness(other))


def test_restores_layers_after_measuring() -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 5)).eval()
    distance = distance_from_own(network, [images(3)])
    study: Any = distance._statistics
    study.places, study.means = {"w": "1.weight", "b": "1.bias"}, {"w": MeanCorrection("b", 1)}
    before = copy.deepcopy(network.state_dict())
    other = copy.deepcopy(network)
    weight, shift = torch.randn(5, 3 * 32 * 32) / 50, torch.arange(5.0).double()
    with torch.no_grad():
        other.get_parameter("1.weight").copy_(weight)
        other.get_parameter("1.bias").add_(shift)
    assert distance.of({"w": Replacement(weight, shift)}) == distance.of_network(other) > 0
    with pytest.raises(RuntimeError):  # of another shape
        distance.of({"w": Replacement(torch.ones(7, 7), None)})
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


def test_passes_that_begin_at_a_block_give_what_whole_passes_give() -> None:
    network = encoder()
    held_out = [texts((9, 4, 6)), texts((5, 7), seed=1)]
    names = weights(network)
    places = {name: name for name in network.state_dict()}
    data = CalibrationData(network.requires_grad_(False), places, Call.of(network), held_out, held_out, [])
    context = RunContext(torch.device("cpu"))
    study = CalibrationStatistics(data, CalibrationRequest(None), names, context)
    distance = OutputDistance(study)
    assert {distance._first_block([name]) for name in names} == {0, 1, 2}
    for name in names:
        other = copy.deepcopy(network)
        with torch.no_grad():
            other.get_parameter(name).mul_(0.9)
        layer = Replacement(other.get_parameter(name).detach().clone(), None)
        assert distance.of({name: layer}) == distance.of_network(other) > 0
    part = OutputDistance(study, step=3)  # of (9, 4, 6) the second, of (5, 7) the second
    lone = [
        {n: v[1:2, :length] for n, v in batch.items()} for batch, length in zip(held_out, (4, 7), strict=True)
    ]
    alone = distance_from_own(network, lone)
    assert part.of_network(other) == pytest.approx(alone.of_network(other), rel=1e-5)
