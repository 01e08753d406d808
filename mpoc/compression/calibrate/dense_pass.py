"""Moments of a dense network, of the inputs of each layer and of gradients at its output, piece by piece."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from mpoc.compression.calibrate.block_chain import (
    ChainInputs,
    CutCheck,
    features,
    given_on,
)
from mpoc.compression.calibrate.cache import DensePass
from mpoc.compression.calibrate.calibration_data import glimpse
from mpoc.compression.calibrate.chain_tracer import Chain, StopPassError, next_input, replaced_forwards
from mpoc.compression.calibrate.layer_inputs import (
    ALL,
    ObservedLayer,
    Positions,
    as_rows,
    device_of,
    eval_mode,
    first_argument,
    hooked,
    total_rows,
)
from mpoc.compression.calibrate.moments import LayerSums, Moments, merge
from mpoc.compression.calibrate.output_of_interest import Pooling, direction, output_of_interest
from mpoc.compression.calibrate.trace import Trace
from mpoc.compression.run_context import RunContext
from mpoc.errors import MpocError
from mpoc.io.keyed_store import Scratch
from mpoc.models.call import Batch, Call, to_device
from mpoc.runtime.device import derived_seed, release_freed_memory
from mpoc.runtime.distributed import BatchShards
from mpoc.tensor_networks.fit.second_moment import ProductSum

# From so many rows of a batch on every second stands for all in G: rows of one example are much alike there.
_MANY, _STEP = 1024, 2
_Key = tuple[str, str]  # "moments", "gradients" or "blocks"; the weight or the module


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
    scratch: Scratch | None = None,
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
        scratch: that holds what is measured, and what lies between pieces of the network; None: memory.

    Raises:
        MpocError: all tokens are padding, or outputs are not finite.
    """
    context = context or RunContext(device_of(network))
    if all("attention_mask" in batch and not bool(batch["attention_mask"].any()) for batch in batches):
        raise MpocError("all tokens of the calibration data are padding")

    steps = 0

    def measure(piece: _Piece, part: range) -> dict[_Key, Moments | _Sum]:
        run = _Run(network, trace, positions, piece.names, len(shards.every))
        with eval_mode(network), hooked() as handles, torch.set_grad_enabled(probes.count > 0):
            handles += run.hooks(probes.count > 0, piece.blocks if probes.blocks else [])
            for index in part:
                context.log("reading the dense network: step", piece.number * len(batches) + index + 1, steps)
                run.index, run.mask = (
                    index,
                    to_device(batches[index], device_of(network)).get("attention_mask"),
                )
                piece.run(index)
        return run.sums()

    scratch = scratch or Scratch()
    result = DensePass(scratch)
    sweep = _Sweep(network, call, batches, trace, probes, scratch)
    shards = BatchShards(len(batches), context.group)
    for piece in sweep.pieces(shards.mine):
        steps = piece.count * len(batches)
        _keep(shards.total(partial(measure, piece), _merged), trace, probes.count, result)
        release_freed_memory()
    return result


def cutting_chain(
    network: nn.Module, call: Call, batches: Sequence[Batch], trace: Trace, pooling: Pooling | None = None
) -> Chain:
    """The chain of blocks that cuts the network in pieces; () where none does.

    Args:
        network: in evaluation mode, no parameter requires a gradient.
        call: how it is called.
        batches: examples to see it on.
        trace: of this network.
        pooling: as of :func:`output_of_interest`.
    """
    pieces = trace.pieces
    if pieces is None:
        return ()
    before = [path for name in pieces.names(-1) for path in trace.layers[name].modules]
    batch = to_device(glimpse(batches[0]), device_of(network))
    with eval_mode(network):
        check = CutCheck(network, pieces.chain, before)
        cuts = check.holds(lambda: output_of_interest(call(network, batch), batch, pooling)[0])
    return pieces.chain if cuts else ()


@dataclass(frozen=True)
class _Piece:
    """A part of the network, whose layers are measured together."""

    names: list[str]  # of weights
    blocks: list[tuple[str, int]]  # modules and the axes of their features, measured at their outputs
    run: Callable[[int], None]  # forward and backward on one batch
    number: int = 0  # of ``count`` pieces
    count: int = 1


class _Sweep:
    """Forward and backward passes: of the whole network at once, or of its pieces one by one, last to first.

    Between pieces lie, for each batch, the input of the later one and, once it was run, the gradients there.

    Args:
        network: in evaluation mode.
        call: how it is called.
        batches: of calibration data.
        trace: of the network.
        probes: the directions whose gradients are measured.
        scratch: for what lies between the pieces.
    """

    def __init__(
        self,
        network: nn.Module,
        call: Call,
        batches: Sequence[Batch],
        trace: Trace,
        probes: Probes,
        scratch: Scratch,
    ) -> None:
        self._scratch = scratch
        self._network, self._call, self._batches, self._trace = network, call, batches, trace
        self._probes, self._device = probes, device_of(network)
        self._chain = cutting_chain(network, call, batches, trace, probes.pooling)
        self._inputs = ChainInputs(network, self._chain, scratch)

    def pieces(self, mine: Sequence[int]) -> Iterator[_Piece]:
        """The pieces, in the order in which they must run on the batches ``mine``."""
        own = {block.module for block in self._chain}
        others = [
            (block.module, self._trace.axis((k, position)))
            for k, chain in enumerate(self._trace.chains)
            for position, block in enumerate(chain)
            if block.module not in own
        ]
        pieces = self._trace.pieces
        at_once = self._probes.count == 0 and not self._scratch.is_required
        if not own or pieces is None or at_once:
            yield _Piece(list(self._trace.layers), others, self._run_whole)
            return
        self._keep_inputs(mine)
        count = len(self._chain)
        yield _Piece(pieces.names(count), others, self._run_tail, 0, count + 2)
        for k in reversed(range(count)):
            path = self._chain[k].module
            axis = self._trace.axis((self._trace.chains.index(self._chain), k))
            run = partial(self._run_block, k)
            yield _Piece(pieces.names(k), [(path, axis)], run, count - k, count + 2)
            for index in mine:
                self._inputs.drop(k + 1, index)
        yield _Piece(pieces.names(-1), others, self._run_head, count + 1, count + 2)
        for index in mine:
            self._inputs.drop(0, index)

    @torch.no_grad()
    def _keep_inputs(self, mine: Sequence[int]) -> None:
        for index in mine:
            with eval_mode(self._network), self._inputs.recorded(index):
                self._call(self._network, to_device(self._batches[index], self._device))

    def _values(self, batch: Batch) -> tuple[Tensor, bool]:
        return output_of_interest(self._call(self._network, batch), batch, self._probes.pooling)

    def _run_whole(self, index: int) -> None:
        values, are_logits = self._values(to_device(self._batches[index], self._device))
        _refuse_infinite(values, self._network)
        if values.requires_grad:
            for probe, gradient in enumerate(self._directions(values, are_logits, index)):
                _backward_from(values, gradient, keep=probe + 1 < self._probes.count)

    def _directions(self, values: Tensor, are_logits: bool, index: int) -> Iterator[Tensor]:
        """Random directions in the outputs of batch ``index``."""
        for probe in range(self._probes.count):
            generator = torch.Generator(values.device)
            generator.manual_seed(derived_seed(self._probes.seed, "direction", index, probe))
            yield direction(values, are_logits, generator)

    def _run_tail(self, index: int) -> None:
        """What follows the chain."""
        last = self._leaf(len(self._chain), index)
        with self._inputs.skipped(len(self._chain), last):
            values, are_logits = self._values(to_device(self._batches[index], self._device))
        _refuse_infinite(values, self._network)
        if values.requires_grad:
            self._backward(values, last, index, list(self._directions(values, are_logits, index)))

    def _run_block(self, k: int, index: int) -> None:
        given, (args, named) = self._leaf(k, index), self._inputs.others(k, index)
        output = given_on(self._inputs.modules[k](given, *args, **named))
        if output.requires_grad and (gradients := self._gradients(index)):
            self._backward(output, given, index, gradients)

    def _run_head(self, index: int) -> None:
        """What runs before the chain."""
        heads: list[Tensor] = []

        def catch(*args: Any, **named: Any) -> Any:
            heads.append(args[0])
            raise StopPassError

        with replaced_forwards(self._inputs.modules[:1], [catch]), suppress(StopPassError):
            self._call(self._network, to_device(self._batches[index], self._device))
        if heads[0].requires_grad and (gradients := self._gradients(index)):
            self._backward(heads[0], None, index, gradients)

    def _leaf(self, k: int, index: int) -> Tensor:
        return self._inputs.given(k, index).detach().requires_grad_(torch.is_grad_enabled())

    def _gradients(self, index: int) -> list[Tensor]:
        """Those at the input of the piece that was run last, a direction each."""
        key = "gradients", index
        return self._scratch.get(key) if key in self._scratch else []

    def _backward(
        self, output: Tensor, given: Tensor | None, index: int, gradients: Sequence[Tensor]
    ) -> None:
        """Keep the gradients at the leaf ``given`` that belong to those at ``output``."""
        found: list[Tensor] = []
        for probe, gradient in enumerate(gradients):
            _backward_from(output, gradient, keep=probe + 1 < len(gradients))
            if given is not None and given.grad is not None:
                found.append(given.grad)
                given.grad = None
        self._scratch.put(("gradients", index), found)


def _backward_from(output: Tensor, gradient: Tensor, keep: bool) -> None:
    """``output.backward(gradient)``, from a scalar: given a gradient, torch imports sympy (½ s)."""
    (output * gradient).sum().backward(retain_graph=keep)


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


def _keep(totals: Mapping[_Key, Moments | _Sum], trace: Trace, probes: int, result: DensePass) -> None:
    for (kind, name), one in totals.items():
        if isinstance(one, Moments):
            result.moments.put([other for other, first in trace.same_rows.items() if first == name], one)
            continue
        if kind == "blocks":
            result.blocks.put(name, one.total)
        else:
            result.gradients.put(name, one.total / (one.rows * probes))


class _Run:
    """Hooks that accumulate over the batches of a shard."""

    index: int  # of the batch
    mask: Tensor | None

    def __init__(
        self, network: nn.Module, trace: Trace, positions: Positions, names: Sequence[str], parts: int
    ) -> None:
        self._network, self._positions = network, positions
        self._layers = [trace.layers[name] for name in names]
        first = [name for name in names if trace.same_rows[name] == name]
        self._sums = {name: LayerSums(trace.layers[name], parts=parts) for name in first}
        self._start = torch.zeros((), device=device_of(network), requires_grad=True)
        self._gradients: dict[str, ProductSum] = {}
        self._rows: dict[str, int] = {}
        self._blocks: dict[str, ProductSum] = {}

    def hooks(self, gradients: bool, blocks: Sequence[tuple[str, int]]) -> Iterator[RemovableHandle]:
        """Register hooks of layers and of blocks, each with the axis of its features."""
        for layer in self._layers:
            for path in layer.modules:
                module = self._network.get_submodule(path)
                yield module.register_forward_pre_hook(self._before(layer), with_kwargs=True)
                if gradients:
                    yield module.register_forward_hook(self._after(layer))
        for path, axis in blocks if gradients else ():
            yield self._network.get_submodule(path).register_forward_hook(self._behind(path, axis))

    def sums(self) -> dict[_Key, Moments | _Sum]:
        """The sums so far."""
        sums: dict[_Key, Moments | _Sum] = {}
        for name, layer_sums in self._sums.items():
            moments = layer_sums.moments()
            sums |= {} if moments is None else {("moments", name): moments}
        for name, products in self._gradients.items():
            sums["gradients", name] = _Sum(products.total().cpu(), self._rows[name])
        return sums | {("blocks", path): _Sum(found.total().cpu(), 0) for path, found in self._blocks.items()}

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
            mask, index = self.mask, self.index

            def add(gradient: Tensor) -> None:
                rows = as_rows(layer, gradient, mask)
                if (count := len(rows)) >= _MANY:
                    rows = rows[index % _STEP :: _STEP]
                    rows = rows * (count / len(rows)) ** 0.5
                self._gradients.setdefault(layer.name, ProductSum()).add(rows, rows)

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
                total = self._blocks.setdefault(path, ProductSum())
                if total.shape in (None, (rows.shape[-1],) * 2):  # else the axis is none of features
                    total.add(rows, rows)

            if first is not None and first.requires_grad:
                first.register_hook(add)

        return hook
