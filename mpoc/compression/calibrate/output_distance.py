"""How far held-out outputs move when layers are compressed, and batch norms that are recalibrated by that.

Errors of different layers, and of different forms of one layer, are compared by the distance that the
network's held-out outputs move.  Errors weighted by gradients at single positions miss that errors at many
positions of one example add up, the more so in front of a mean over positions; outputs do not.

Batch norms are recalibrated on what the compressed network gives them.  New statistics repair networks that
were fitted by their weights alone.  After a sequential fit, where running means have corrected errors
already, they may do harm.  So they are kept only where they bring held-out outputs nearer to the dense ones.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from mpoc.compression.calibrate.calibration_data import trimmed
from mpoc.compression.calibrate.layer_inputs import device_of, eval_mode, first_argument, hooked
from mpoc.compression.calibrate.output_of_interest import output_of_interest
from mpoc.compression.calibrate.statistics import CalibrationStatistics
from mpoc.models.call import Batch, Call, num_examples, to_device
from mpoc.models.introspection import copy_sharing_parameters, set_tensors, state_of
from mpoc.train.tasks import kl_of_rows

# Movements of the outputs by one layer are measured on every fourth example, but on so many numbers at least:
# on 21 images with ten logits each, ResNet-20 lost a point of accuracy.
_STEP, _FEWEST = 4, 4500


@dataclass(frozen=True)
class Replacement:
    """What a compressed layer puts in place: a weight in its own shape, and a correction of the mean."""

    weight: Tensor
    shift: Tensor | None  # (N_y,)


class OutputDistance:
    """Distance of a compressed network's held-out outputs from those of the dense one.

    Args:
        statistics: of the dense network.
        step: of each held-out batch, every how many examples are taken.
    """

    def __init__(self, statistics: CalibrationStatistics, step: int = 1) -> None:
        self._statistics, self._step = statistics, step
        self._inputs, self._blocks = statistics.held_out_inputs()
        self._dense = list(self._outputs(statistics.network, record=True))

    @cached_property
    def of_some(self) -> OutputDistance:
        """The distance on a part of the examples, to compare layers with, each compressed by itself."""
        step = min(_STEP, sum(values.numel() for values, _ in self._dense) // _FEWEST)
        return OutputDistance(self._statistics, step) if step > 1 else self

    @torch.no_grad()
    def of(self, layers: Mapping[str, Replacement]) -> float:
        """The distance with some layers replaced: mean KL divergence in nats where outputs are logits, else
        half the mean squared distance.

        Args:
            layers: by the weight's name in the checkpoint; all others stay dense.
        """
        with self._replaced(layers):
            return self.of_network(self._statistics.network, self._first_block(layers))

    def likeness(self, network: nn.Module) -> dict[str, float]:
        """How like outputs are to the dense network's: means of what ``mpoc eval`` calls so.

        Of examples by which nothing was chosen, or where there are too few, of those held out to choose with.
        ``agreement`` of the largest logit in per cent and ``kl`` in nats; where outputs are no logits
        ``cosine``.  What is not finite is left out.
        """
        return self._likeness(network, self._dense_to_report)

    @torch.no_grad()
    def likeness_of(self, layers: Mapping[str, Replacement]) -> dict[str, float]:
        """The likeness of the dense network with some layers replaced."""
        dense = self._dense_to_report  # while it is dense
        with self._replaced(layers):
            return self._likeness(self._statistics.network, dense)

    @torch.no_grad()
    def _likeness(self, network: nn.Module, dense: Sequence[tuple[Tensor, bool]]) -> dict[str, float]:
        sums: dict[str, float] = {}
        count = 0
        for (ours, are_logits), (theirs, _) in zip(self._reported(network), dense, strict=True):
            alike = {"cosine": F.cosine_similarity(ours, theirs, dim=-1)}
            if are_logits:
                same = 100.0 * (ours.argmax(-1) == theirs.argmax(-1))
                alike = {"agreement": same, "kl": kl_of_rows(ours, theirs).clamp(min=0)}
            count += len(ours)
            for name, values in alike.items():
                sums[name] = sums.get(name, 0.0) + float(values.sum())
        return {name: total / count for name, total in sums.items() if math.isfinite(total)}

    @cached_property
    def _dense_to_report(self) -> list[tuple[Tensor, bool]]:
        return list(self._reported(self._statistics.network)) if self._statistics.data.unseen else self._dense

    @torch.no_grad()
    def _reported(self, network: nn.Module) -> Iterator[tuple[Tensor, bool]]:
        """Outputs on the examples to report on."""
        data = self._statistics.data
        if not data.unseen:
            yield from self._outputs(network)
        with eval_mode(network):
            for batch in data.unseen:
                part = to_device(batch, self._statistics.context.device)
                yield output_of_interest(data.call(network, part), part, data.pooling)

    @contextmanager
    def _replaced(self, layers: Mapping[str, Replacement]) -> Iterator[None]:
        """The dense network with some layers replaced, meanwhile."""
        network = self._statistics.network
        before = set_tensors(network, self._changed(layers, state_of(network)))
        try:
            yield
        finally:
            set_tensors(network, before)

    def _changed(self, layers: Mapping[str, Replacement], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        places, means = self._statistics.places, self._statistics.means
        changed = {places[name]: layer.weight for name, layer in layers.items()}
        for name, layer in layers.items():
            if layer.shift is not None:
                correction = means[name]
                place = places[correction.name]
                changed[place] = state[place] + correction.sign * layer.shift.to(
                    self._statistics.context.device
                )
        return changed

    def _first_block(self, layers: Iterable[str]) -> int:
        """The first block of the chain that a change of these layers changes; 0: or what is before it."""
        return max(0, min((self._blocks.get(name, 0) for name in layers), default=0))

    @torch.no_grad()
    def of_network(self, network: nn.Module, start: int = 0) -> float:
        """The distance of a network of the same architecture in evaluation mode; inf in place of NaN.

        Args:
            network: whose outputs are compared.
            start: for the statistics' own network, the block before which nothing of it is changed.
        """
        total, rows = 0.0, 0
        for (ours, are_logits), (theirs, _) in zip(self._outputs(network, start), self._dense, strict=True):
            distances = kl_of_rows(ours, theirs) if are_logits else (ours - theirs).square().sum(-1) / 2
            total, rows = total + float(distances.sum()), rows + len(ours)
        return math.inf if math.isnan(total) else max(0.0, total) / rows

    @torch.no_grad()
    def _outputs(
        self, network: nn.Module, start: int = 0, record: bool = False
    ) -> Iterator[tuple[Tensor, bool]]:
        data, device = self._statistics.data, self._statistics.context.device
        with eval_mode(network):
            for index, batch in enumerate(data.held_out):
                first = min(self._step, num_examples(batch)) // 2
                part = trimmed({name: values[first :: self._step] for name, values in batch.items()})
                part = to_device(part, device)
                with ExitStack() as around:
                    if record:
                        around.enter_context(self._inputs.recorded(index))
                    elif start:
                        around.enter_context(self._inputs.skipped(start, self._inputs.given(start, index)))
                    outputs = data.call(network, part)
                yield output_of_interest(outputs, part, data.pooling)


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
    changed = copy_sharing_parameters(network)
    norms = {name: m for name, m in changed.named_modules() if keeps_statistics(m)}
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


def keeps_statistics(module: nn.Module) -> bool:
    """Whether a module is a batch norm with a mean and a variance of its own."""
    return isinstance(module, _BatchNorm) and module.running_mean is not None
