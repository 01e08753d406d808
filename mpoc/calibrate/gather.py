"""The sums of one layer over a pass."""

from __future__ import annotations

from collections.abc import Container, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from mpoc.calibrate.inputs import ConvInputs, EmbeddingInputs, Layer, Sample
from mpoc.calibrate.moments import Accumulator, Moments, one_hot_moments
from mpoc.errors import MpocError
from mpoc.train.settings import derived_seed


@dataclass(frozen=True)
class Positions:
    """Which positions of convolutions are taken."""

    most: int | None = None  # an example, on average; None: all
    seed: int = 0

    def of(self, batch: int) -> Sample | None:
        """The choice in batch number ``batch``: the same in every pass."""
        return None if self.most is None else Sample(self.most, derived_seed(self.seed, "positions", batch))


ALL = Positions()


class LayerSums:
    """What is summed of the inputs of one layer.

    Args:
        layer: whose.
        dense_second: as of :class:`Accumulator`.
    """

    def __init__(self, layer: Layer, dense_second: bool = True) -> None:
        self._layer = layer
        self._accumulator = Accumulator(dense_second)
        self._counts: Tensor | int = 0
        self.rows = 0

    def add(
        self, given: Tensor, mask: Tensor | None, sample: Sample | None, dense: Tensor | None = None
    ) -> None:
        """Add what the layer was given in one call, and what it was given in the dense network.

        Raises:
            MpocError: the two are of different shapes.
        """
        inputs = self._layer.inputs
        if dense is not None and dense.shape != given.shape:
            raise MpocError(
                f"{self._layer.name}: the dense network gives it {tuple(dense.shape)}, the compressed one "
                f"{tuple(given.shape)}",
                f"compress without it: --exclude '{self._layer.name.removesuffix('.weight')}'",
            )
        if isinstance(inputs, EmbeddingInputs):
            self._counts = self._counts + inputs.counts(given, mask)
            return
        added = self._accumulator.count
        if dense is None:
            for block in inputs.blocks(given, mask, sample):
                self._accumulator.add(block)
        else:
            blocks = inputs.blocks(given, mask, sample), inputs.blocks(dense, mask, sample)
            for block, other in zip(*blocks, strict=True):
                self._accumulator.add(block, other)
        part = sample is not None and isinstance(inputs, ConvInputs)
        self.rows += inputs.count(given, mask) if part else self._accumulator.count - added

    def moments(self) -> Moments | None:
        """Of all that was added; None: no rows were."""
        if isinstance(self._counts, Tensor) and bool(self._counts.any()):
            return one_hot_moments(self._counts)
        return self._accumulator.moments(self.rows) if self.rows else None


def refuse_without_rows(layers: Iterable[Layer], found: Container[str]) -> None:
    """Whether all of these were found.

    Raises:
        MpocError: the data give a layer no rows.
    """
    without = next((layer.name for layer in layers if layer.name not in found), None)
    if without is not None:
        raise MpocError(f"{without}: the calibration data give it no rows")


def total_rows(layer: Layer, output: Tensor, mask: Tensor | None) -> int:
    """How many rows a layer's output has."""
    return len(layer.inputs.outputs(output.detach(), mask))


def as_rows(layer: Layer, gradient: Tensor, mask: Tensor | None) -> Tensor:
    """(rows, N_y) of a gradient at the layer's output, float32 or float64."""
    rows = layer.inputs.outputs(gradient, mask)
    return rows if rows.dtype == torch.float64 else rows.float()
