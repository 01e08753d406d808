"""Statistics measured anew against those of the tensors themselves."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from mpoc.compression.calibrate.block_chain import ChainInputs
from mpoc.compression.calibrate.output_distance import OutputDistance, recalibrated_norms
from mpoc.compression.run_context import RunContext
from mpoc.io.keyed_store import Scratch
from mpoc.models.call import Call
from tests.compression.calibrate.networks import damaged, images, resnet20


def distance_from(network: nn.Module) -> OutputDistance:
    return distance_from_own(network, [images(4, seed=7)])


def distance_from_own(network: nn.Module, held_out: list[Any]) -> OutputDistance:
    data = SimpleNamespace(held_out=held_out, unseen=[], call=Call.of(network), pooling=None)
    study: Any = SimpleNamespace(
        network=network,
        data=data,
        context=RunContext(torch.device("cpu")),
        held_out_inputs=lambda: (ChainInputs(network, (), Scratch()), {}),
    )
    return OutputDistance(study)


def given_to(network: nn.Module, name: str, batches: list[Any]) -> torch.Tensor:
    """(channels, …) of all that goes into the first norm."""
    seen: list[torch.Tensor] = []
    handle = network.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        for batch in batches:
            network(batch["x"])
    handle.remove()
    return torch.cat(seen).transpose(0, 1).flatten(1)


@pytest.mark.slow
def test_statistics_match_the_inputs_of_the_norm() -> None:
    network = resnet20()
    compressed = damaged(network)
    before = copy.deepcopy(compressed.state_dict())
    found = recalibrated_norms(compressed, Call.of(network), [images(8)], distance_from(network).of_network)
    assert found is not None
    rows = given_to(compressed, "bn1", [images(8)])
    torch.testing.assert_close(found.statistics["bn1.running_mean"], rows.mean(1))
    torch.testing.assert_close(found.statistics["bn1.running_var"], rows.var(1), rtol=1e-4, atol=1e-6)
    assert all(torch.equal(before[name], now) for name, now in compressed.state_dict().items())
    assert not compressed.training
    assert len(found.statistics) == 2 * sum(isinstance(m, nn.BatchNorm2d) for m in network.modules())


@pytest.mark.slow
def test_accepted_only_where_outputs_improve() -> None:
    network, batches = resnet20(), [images(64, seed=k) for k in range(3)]
    call = Call.of(network)
    right = recalibrated_norms(network, call, batches, distance_from(network).of_network)
    assert right is not None
    good = copy.deepcopy(network)
    good.load_state_dict({**network.state_dict(), **right.statistics})
    wrong = copy.deepcopy(good)
    for module in wrong.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None
            module.running_mean.add_(1.0)
    mended = recalibrated_norms(wrong, call, batches, distance_from(good).of_network)
    assert mended is not None and mended.is_better
    assert mended.after < 0.1 * mended.before
    spoilt = recalibrated_norms(good, call, [images(2, seed=9)], distance_from(good).of_network)
    assert spoilt is not None and not spoilt.is_better
    assert spoilt.before == 0.0


def test_network_without_norms_has_no_statistics() -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 4)).eval()
    assert (
        recalibrated_norms(network, Call.of(network), [images()], distance_from(network).of_network) is None
    )


def test_batches_are_weighted_by_size() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(12, 5), nn.BatchNorm1d(5)).eval()
    batches = [{"x": torch.randn(n, 3, 4)} for n in (6, 1, 2)]
    found = recalibrated_norms(
        network, Call.of(network), batches, distance_from_own(network, batches).of_network
    )
    assert found is not None
    rows = [network[:2](batch["x"]).detach() for batch in (batches[0], batches[2])]
    torch.testing.assert_close(found.statistics["2.running_mean"], torch.cat(rows).mean(0))
    variance = (6 * rows[0].var(0) + 2 * rows[1].var(0)) / 8
    torch.testing.assert_close(found.statistics["2.running_var"], variance)
    alone = batches[1:2]
    assert (
        recalibrated_norms(network, Call.of(network), alone, distance_from_own(network, alone).of_network)
        is None
    )


def test_unreached_norms_keep_their_statistics() -> None:
    class Helped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.norm, self.helper = nn.Linear(4, 3), nn.BatchNorm1d(3), nn.BatchNorm1d(3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = self.norm(self.first(x))
            return y if not self.training else y + self.helper(y)

    network, batches = Helped().eval(), [{"x": torch.randn(8, 4)}]
    found = recalibrated_norms(
        network, Call.of(network), batches, distance_from_own(network, batches).of_network
    )
    assert found is not None
    assert set(found.statistics) == {"norm.running_mean", "norm.running_var"}
