"""How far the outputs of a network move when layers are replaced, measured on held-out inputs.

Errors of layers, weighted by gradients at single positions, leave out that errors at many positions of one
example add up, and more so in front of a mean over positions.  What the network gives in the end does not.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mpoc.calibrate.hooks import at_rest
from mpoc.calibrate.interest import output_of_interest
from mpoc.calibrate.study import Study
from mpoc.train.call import to_device
from mpoc.train.distill import kl_of_rows


@dataclass(frozen=True)
class Replaced:
    """A layer as it would be: its weight in its own shape, and the shift of its outputs' mean."""

    weight: Tensor
    shift: Tensor | None  # (N_y,)


class OutputDistance:
    """Distance of a network with layers replaced from the dense one.

    Args:
        study: of the dense network; its held-out inputs are used.
    """

    def __init__(self, study: Study) -> None:
        self._study = study
        self._dense = list(self._outputs(study.network))

    @property
    def _state(self) -> dict[str, Tensor]:
        network = self._study.network
        return {**dict(network.named_parameters()), **dict(network.named_buffers())}

    @torch.no_grad()
    def of(self, layers: Mapping[str, Replaced]) -> float:
        """Mean KL divergence in nats where outputs are logits, else half the mean squared distance.

        Args:
            layers: by the weight's name in the checkpoint; all others stay dense.
        """
        state = self._state  # of the dense network itself, which is as it was afterwards
        changed = self._changed(layers, state)
        before = {name: state[name].clone() for name in changed}
        try:
            for name, tensor in changed.items():
                state[name].copy_(tensor)
            return self.of_network(self._study.network)
        finally:
            for name, tensor in before.items():
                state[name].copy_(tensor)

    def _changed(self, layers: Mapping[str, Replaced], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        places, means = self._study.places, self._study.means
        found = {places[name]: layer.weight for name, layer in layers.items()}
        for name, layer in layers.items():
            if layer.shift is not None:
                taken_up = means[name]
                place = places[taken_up.name]
                found[place] = state[place] + taken_up.sign * layer.shift.to(self._study.device)
        return found

    @torch.no_grad()
    def of_network(self, network: nn.Module) -> float:
        """Likewise, of a network of the same kind in evaluation mode; inf in the place of NaN."""
        total, rows = 0.0, 0
        for (ours, are_logits), (theirs, _) in zip(self._outputs(network), self._dense, strict=True):
            far = kl_of_rows(ours, theirs) if are_logits else (ours - theirs).square().sum(-1) / 2
            total, rows = total + float(far.sum()), rows + len(ours)
        return math.inf if math.isnan(total) else max(0.0, total) / rows

    @torch.no_grad()
    def _outputs(self, network: nn.Module) -> Iterator[tuple[Tensor, bool]]:
        data, device = self._study.data, self._study.device
        with at_rest(network):
            for batch in data.held_out:
                part = to_device(batch, device)
                yield output_of_interest(data.call(network, part), part, data.pooling)
