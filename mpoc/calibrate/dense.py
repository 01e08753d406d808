"""One pass of the dense network: moments of what goes into each layer, and of gradients behind it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mpoc.calibrate.chain import features, goes_on
from mpoc.calibrate.gather import ALL, LayerSums, Positions, as_rows, total_rows
from mpoc.calibrate.hooks import at_rest, device_of, first_given, hooked
from mpoc.calibrate.inputs import Layer
from mpoc.calibrate.interest import Pooling, direction, output_of_interest
from mpoc.calibrate.moments import Moments, product
from mpoc.calibrate.trace import Trace
from mpoc.errors import MpocError
from mpoc.train.call import Batch, Call, to_device
from mpoc.train.settings import derived_seed

Tell = Callable[[str, int, int], None]  # what goes on, which one begins, of how many


@dataclass(frozen=True)
class DensePass:
    """Of the dense network, by weight.

    ``gradients`` are G, (N_y, N_y) float64 on the CPU: E[g gᵀ] over rows and directions, g the gradient of an
    example's Σ at the layer's output.  An example's change by an error δ there is about rows / examples times
    E[δᵀ G δ], so ``Moments.rows`` times tr[G (W − Ŵ) M (W − Ŵ)ᵀ] can be compared between layers.
    """

    moments: dict[str, Moments]
    gradients: dict[str, Tensor]
    blocks: dict[str, Tensor]  # by module Σ g gᵀ over rows and directions, at what blocks give; CPU


def dense_pass(
    network: nn.Module,
    call: Call,
    batches: Sequence[Batch],
    trace: Trace,
    probes: int = 1,
    pooling: Pooling | None = None,
    positions: Positions = ALL,
    seed: int = 0,
    blocks: bool = False,
    tell: Tell | None = None,
) -> DensePass:
    """Run the network over the batches, forth and, ``probes`` times a batch, back.

    Args:
        network: in evaluation mode, on any device; left as it is.
        call: how it is called.
        batches: of calibration data.
        trace: of this network.
        probes: random directions in the output a batch; 0: no gradients.
        pooling: as of :func:`output_of_interest`.
        positions: of convolutions.
        seed: of the directions.
        blocks: whether gradients at the outputs of blocks are wanted too.
        tell: called before each batch.

    Raises:
        MpocError: the data give a layer no rows, or outputs are not finite.
    """
    run = _Run(network, trace)
    device = device_of(network)
    with at_rest(network), hooked() as handles, torch.set_grad_enabled(probes > 0):
        for layer in trace.layers.values():
            for path in layer.modules:
                module = network.get_submodule(path)
                handles.append(
                    module.register_forward_pre_hook(run.before(layer, positions), with_kwargs=True)
                )
                if probes:
                    handles.append(module.register_forward_hook(run.after(layer)))
        for k, chain in enumerate(trace.chains if blocks and probes else ()):
            for position, block in enumerate(chain):
                module = network.get_submodule(block.module)
                handles.append(
                    module.register_forward_hook(run.behind(block.module, trace.axis((k, position))))
                )
        for index, batch in enumerate(batches):
            if tell:
                tell("reading the dense network: batch", index + 1, len(batches))
            run.index, part = index, to_device(batch, device)
            run.mask = part.get("attention_mask")
            values, are_logits = output_of_interest(call(network, part), part, pooling)
            if not bool(values.isfinite().all()):
                raise MpocError(
                    f"the outputs of the network, a {type(network).__name__}, are not finite on these data",
                    "look at data and checkpoint for NaN: mpoc eval",
                )
            for probe in range(probes if values.requires_grad else 0):
                generator = torch.Generator(device).manual_seed(derived_seed(seed, "direction", index, probe))
                values.backward(direction(values, are_logits, generator), retain_graph=probe + 1 < probes)
    return run.result(probes)


class _Run:
    def __init__(self, network: nn.Module, trace: Trace) -> None:
        self.index, self.mask = 0, None
        self._trace = trace
        self._sums = {name: LayerSums(trace.layers[name]) for name in dict.fromkeys(trace.same_rows.values())}
        self._start = torch.zeros((), device=device_of(network), requires_grad=True)
        self._gradients: dict[str, Tensor] = {}
        self._rows: dict[str, int] = {}
        self._blocks: dict[str, Tensor] = {}

    index: int
    mask: Tensor | None

    def before(self, layer: Layer, positions: Positions) -> Any:
        """A hook that adds what the layer is given."""

        def hook(_: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
            if layer.name in self._sums:
                with torch.no_grad():
                    given = first_given(args, named)
                    self._sums[layer.name].add(given, self.mask, positions.of(self.index))

        return hook

    def after(self, layer: Layer) -> Any:
        """A hook that begins the graph where nothing has, and adds the gradients at the output."""

        def hook(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            if not output.requires_grad:
                output = output + self._start.to(output.dtype)
            mask = self.mask

            def add(gradient: Tensor) -> None:
                rows = as_rows(layer, gradient, mask)
                found = product(rows, rows)
                if layer.name in self._gradients:
                    self._gradients[layer.name] += found
                else:
                    self._gradients[layer.name] = found

            if output.requires_grad:  # not so where the network itself has switched gradients off
                output.register_hook(add)
                self._rows[layer.name] = self._rows.get(layer.name, 0) + total_rows(layer, output, mask)
            return output

        return hook

    def behind(self, path: str, axis: int) -> Any:
        """A hook that adds the gradients at the output of a block."""

        def hook(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            first, mask = goes_on(output), self.mask

            def add(gradient: Tensor) -> None:
                rows = features(gradient, mask, axis).float()
                found = product(rows, rows)
                total = self._blocks.get(path)
                if total is None or total.shape == found.shape:  # else the axis is none of features
                    self._blocks[path] = found if total is None else total + found

            if first is not None and first.requires_grad:
                first.register_hook(add)

        return hook

    def result(self, probes: int) -> DensePass:
        found = {name: sums.moments() for name, sums in self._sums.items()}
        moments = {name: found[first] for name, first in self._trace.same_rows.items()}
        gradients = {
            name: ((total + total.T) / (2 * self._rows[name] * probes)).cpu()
            for name in moments
            if (total := self._gradients.get(name)) is not None
        }
        blocks = {path: ((total + total.T) / 2).cpu() for path, total in self._blocks.items()}
        return DensePass(moments, gradients, blocks)
