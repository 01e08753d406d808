"""One pass over the dense network: moments of the inputs of each layer, and of gradients at its output."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from mpoc.compression.calibrate.block_chain import features, next_input
from mpoc.compression.calibrate.calibration_data import Pooling, direction, output_of_interest
from mpoc.compression.calibrate.layer_inputs import (
    ObservedLayer,
    device_of,
    eval_mode,
    first_argument,
    hooked,
)
from mpoc.compression.calibrate.moments import (
    ALL,
    BatchShards,
    LayerSums,
    Moments,
    Positions,
    as_rows,
    merge,
    product,
    total_rows,
)
from mpoc.compression.calibrate.trace import Trace
from mpoc.compression.run_context import RunContext
from mpoc.errors import MpocError
from mpoc.models.call import Batch, Call, to_device
from mpoc.runtime.device import derived_seed

_Key = tuple[str, str]  # "moments", "gradients" or "blocks"; the weight or the module


@dataclass(frozen=True)
class DensePass:
    """Moments and gradients of the dense network, by weight; none of a weight that the data give no rows.

    ``gradients`` are G, (N_y, N_y) float64 on the CPU: E[g gᵀ] over rows and directions, g the gradient of an
    example's Σ at the layer's output.  An example's change by an error δ there is about rows / examples times
    E[δᵀ G δ], so ``Moments.rows`` times tr[G (W − Ŵ) M (W − Ŵ)ᵀ] can be compared between layers.
    """

    moments: dict[str, Moments]
    gradients: dict[str, Tensor]
    blocks: dict[str, Tensor]  # by module Σ g gᵀ over rows and directions, at what blocks give; CPU


@dataclass(frozen=True)
class Probes:
    """Which gradients a dense pass measures."""

    count: int = 1  # random directions in the output a batch; 0: no gradients
    seed: int = 0  # of the directions
    blocks: bool = False  # also at the outputs of blocks
    pooling: Pooling | None = None  # as of :func:`output_of_interest`


def dense_pass(
    network: nn.Module,
    call: Call,
    batches: Sequence[Batch],
    trace: Trace,
    probes: Probes = Probes(),
    positions: Positions = ALL,
    context: RunContext | None = None,
) -> DensePass:
    """Run the dense network on the batches: forward and, once a probe, backward.

    Args:
        network: in evaluation mode, on any device; left as it is.
        call: how it is called.
        batches: of calibration data.
        trace: of this network.
        probes: the directions whose gradients are measured.
        positions: of convolutions.
        context: whose processes share the batches; None: one process.

    Raises:
        MpocError: all tokens are padding, or outputs are not finite.
    """
    context = context or RunContext(device_of(network))
    if all("attention_mask" in batch and not bool(batch["attention_mask"].any()) for batch in batches):
        raise MpocError("all tokens of the calibration data are padding")

    def measure(part: range) -> dict[_Key, Moments | _Sum]:
        run = _Run(network, trace, positions)
        with eval_mode(network), hooked() as handles, torch.set_grad_enabled(probes.count > 0):
            handles += run.hooks(probes.count > 0, probes.blocks)
            for index in part:
                context.log("reading the dense network: batch", index + 1, len(batches))
                batch = to_device(batches[index], device_of(network))
                run.index, run.mask = index, batch.get("attention_mask")
                values, are_logits = output_of_interest(call(network, batch), batch, probes.pooling)
                _refuse_infinite(values, network)
                if values.requires_grad:
                    _backward(values, are_logits, probes, index)
        return run.sums()

    total = BatchShards(len(batches), context.group).total(measure, _merged)
    return _result(total, trace, probes.count)


def _backward(values: Tensor, are_logits: bool, probes: Probes, index: int) -> None:
    """Run backward from each random direction in the outputs of batch ``index``."""
    for probe in range(probes.count):
        generator = torch.Generator(values.device)
        generator.manual_seed(derived_seed(probes.seed, "direction", index, probe))
        gradient = direction(values, are_logits, generator)
        values.backward(gradient, retain_graph=probe + 1 < probes.count)


def _refuse_infinite(values: Tensor, network: nn.Module) -> None:
    if not bool(values.isfinite().all()):
        raise MpocError(
            f"the outputs of the network, a {type(network).__name__}, are not finite on these data",
            "look at data and checkpoint for NaN: mpoc eval",
        )


@dataclass(frozen=True)
class _Sum:
    """Σ g gᵀ over rows; on the CPU."""

    total: Tensor
    rows: int


def _merged(one: Moments | _Sum, other: Moments | _Sum) -> Moments | _Sum:
    if isinstance(one, Moments) and isinstance(other, Moments):
        return merge(one, other)
    assert isinstance(one, _Sum)
    assert isinstance(other, _Sum)
    if one.total.shape != other.total.shape:
        return one  # the axis of a block's output is none of features
    return _Sum(one.total + other.total, one.rows + other.rows)


def _result(totals: Mapping[_Key, Moments | _Sum], trace: Trace, probes: int) -> DensePass:
    first = {name: one for (_, name), one in totals.items() if isinstance(one, Moments)}
    moments = {name: first[same] for name, same in trace.same_rows.items() if same in first}
    sums = {key: one for key, one in totals.items() if isinstance(one, _Sum)}
    halves = {key: (one.total + one.total.T) / 2 for key, one in sums.items()}
    gradients = {
        name: halves[key] / (sums[key].rows * probes)
        for name in moments
        if (key := ("gradients", name)) in sums
    }
    blocks = {name: half for (kind, name), half in halves.items() if kind == "blocks"}
    return DensePass(moments, gradients, blocks)


class _Run:
    """Hooks that accumulate over the batches of a shard."""

    index: int  # of the batch
    mask: Tensor | None

    def __init__(self, network: nn.Module, trace: Trace, positions: Positions) -> None:
        self._network, self._trace, self._positions = network, trace, positions
        self._sums = {name: LayerSums(trace.layers[name]) for name in dict.fromkeys(trace.same_rows.values())}
        self._start = torch.zeros((), device=device_of(network), requires_grad=True)
        self._gradients: dict[str, Tensor] = {}
        self._rows: dict[str, int] = {}
        self._blocks: dict[str, Tensor] = {}

    def hooks(self, gradients: bool, blocks: bool) -> Iterator[RemovableHandle]:
        """Register hooks of layers and, if wanted, of blocks."""
        for layer in self._trace.layers.values():
            for path in layer.modules:
                module = self._network.get_submodule(path)
                yield module.register_forward_pre_hook(self._before(layer), with_kwargs=True)
                if gradients:
                    yield module.register_forward_hook(self._after(layer))
        for k, chain in enumerate(self._trace.chains if blocks and gradients else ()):
            for position, block in enumerate(chain):
                behind = self._behind(block.module, self._trace.axis((k, position)))
                yield self._network.get_submodule(block.module).register_forward_hook(behind)

    def sums(self) -> dict[_Key, Moments | _Sum]:
        """The sums so far."""
        sums: dict[_Key, Moments | _Sum] = {}
        for name, layer_sums in self._sums.items():
            moments = layer_sums.moments()
            sums |= {} if moments is None else {("moments", name): moments}
        sums |= {("gradients", name): _Sum(g.cpu(), self._rows[name]) for name, g in self._gradients.items()}
        return sums | {("blocks", path): _Sum(total.cpu(), 0) for path, total in self._blocks.items()}

    def _before(self, layer: ObservedLayer) -> Any:
        """A hook that accumulates the layer's inputs."""

        def hook(_: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
            if layer.name in self._sums:
                with torch.no_grad():
                    given = first_argument(args, named)
                    self._sums[layer.name].add(given, self.mask, self._positions.of(self.index))

        return hook

    def _after(self, layer: ObservedLayer) -> Any:
        """A hook that starts the autograd graph if nothing has, and accumulates gradients at the output."""

        def hook(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            if not output.requires_grad:
                output = output + self._start.to(output.dtype)
            mask = self.mask

            def add(gradient: Tensor) -> None:
                rows = as_rows(layer, gradient, mask)
                products = product(rows, rows)
                if layer.name in self._gradients:
                    self._gradients[layer.name] += products
                else:
                    self._gradients[layer.name] = products

            if output.requires_grad:  # not so where the network itself has switched gradients off
                output.register_hook(add)
                self._rows[layer.name] = self._rows.get(layer.name, 0) + total_rows(layer, output, mask)
            return output

        return hook

    def _behind(self, path: str, axis: int) -> Any:
        """A hook that accumulates the gradients at the output of a block."""

        def hook(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            first, mask = next_input(output), self.mask

            def add(gradient: Tensor) -> None:
                rows = features(gradient, mask, axis).float()
                products = product(rows, rows)
                total = self._blocks.get(path)
                if total is None or total.shape == products.shape:  # else the axis is none of features
                    self._blocks[path] = products if total is None else total + products

            if first is not None and first.requires_grad:
                first.register_hook(add)

        return hook
