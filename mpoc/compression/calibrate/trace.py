"""Trace one forward pass: the order of weights, layers that share an input, and chains of blocks.

The trace also finds the batch norms that alone take a layer's output: their running means can correct the
mean of its error.  And it finds layers whose rows are chosen by the network itself, as a mixture of experts
routes tokens: a compressed network chooses others.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakTensorKeyDictionary

from mpoc.compression.calibrate.calibration_data import glimpse
from mpoc.compression.calibrate.chain_tracer import Chain, ChainTracer, Found, lies_between
from mpoc.compression.calibrate.layer_inputs import (
    ALL,
    ConvInputs,
    EmbeddingInputs,
    ObservedLayer,
    Positions,
    device_of,
    eval_mode,
    find_layer,
    first_argument,
    hooked,
)
from mpoc.compression.calibrate.moments import ROWS_FROM
from mpoc.compression.run_context import Kind, LayerWork
from mpoc.models.call import Batch, Call, main_input, num_examples, to_device

UNREACHED = "the network does not reach it"


@dataclass(frozen=True)
class Pieces:
    """The pieces of a network along a chain: what runs before it (-1), its blocks (0, 1, …), and the rest."""

    chain: Chain
    of: dict[str, int]  # weight → the piece that alone uses it

    def names(self, piece: int) -> list[str]:
        """The weights of one piece."""
        return [name for name, own in self.of.items() if own == piece]


@dataclass(frozen=True)
class Trace:
    """What one forward pass tells about the weights that were asked for."""

    layers: dict[str, ObservedLayer]  # by weight, in the order of their first use
    groups: tuple[tuple[str, ...], ...]  # weights that are given the same tensor, in order of the first
    calls: dict[str, int]  # how often each is used
    rows: dict[str, int]  # how many rows each is given
    same_rows: dict[str, str]  # weight → the first one whose rows are the same; itself where there is none
    norms: dict[str, str]  # weight → module of the batch norm that alone takes the layer's output
    reasons: dict[str, str]  # weight → why nothing is known of it
    chains: tuple[Chain, ...]
    positions: dict[str, tuple[int, int]]  # weight → chain, block of its first use; all are in that chain
    numbers: int  # in the input of the pass
    families: dict[str, str]  # weight whose rows the network chooses → what it shares with its siblings
    pieces: Pieces | None  # along the longest chain; None where a weight is used in several of them

    def share_of(self, batches: Iterable[Batch]) -> float:
        """Numbers in the inputs of batches over those of the pass."""
        return sum(main_input(batch).numel() for batch in batches) / self.numbers

    def work(
        self, network: nn.Module, batches: Sequence[Batch], positions: Positions = ALL
    ) -> dict[str, LayerWork]:
        """The work of each layer's fit."""
        works, share = {}, self.share_of(batches)
        most = (positions.most or math.inf) * sum(map(num_examples, batches))  # rows of convolutions
        for name, layer in self.layers.items():
            weight, inputs = network.get_parameter(name), layer.inputs.features
            is_table, is_conv = (isinstance(layer.inputs, kind) for kind in (EmbeddingInputs, ConvInputs))
            has_taps, rows = is_conv and weight.shape[2:].numel() > 1, share * self.rows[name]
            rows = min(rows, most) if is_conv else rows
            kind = Kind.TABLE if is_table else Kind.KERNEL if has_taps else Kind.MATRIX
            works[name] = LayerWork(weight.numel() // inputs, inputs, rows, kind)
        return works

    def has_few_outputs(self, network: nn.Module, name: str) -> bool:
        """Whether E[(W x) yᵀ] of a weight is at most half as large as E[x yᵀ] of its inputs."""
        inputs = self.layers[name].inputs
        outputs = network.get_parameter(name).numel() // inputs.features
        return inputs.have_one_moment and 2 * outputs <= inputs.features < ROWS_FROM

    def axis(self, position: tuple[int, int]) -> int:
        """The feature axis of a block's output: the channels (1) for convolutions, else the last (-1)."""
        here = (name for name, position_of in self.positions.items() if position_of == position)
        return 1 if any(isinstance(self.layers[name].inputs, ConvInputs) for name in here) else -1

    def modules_before(self, names: Sequence[str], start: tuple[int, int] | None) -> list[str]:
        """Modules of layers from block ``start`` to these, called once, and those around no other layers."""
        if start is None:
            return []
        earlier: list[str] = []
        for group in self.groups:
            if not set(group).isdisjoint(names):
                break
            earlier += [name for name in group if self.calls[name] == 1]
        positions = self.positions
        inside = [name for name in earlier if name in positions and positions[name] >= start]
        paths = {name: self.layers[name].modules[0] for name in inside}
        final = [path for name, path in paths.items() if name == f"{path}.weight"]
        others = [path for layer in self.layers.values() for path in layer.modules if path not in final]
        around = dict.fromkeys(path[:k] for path in final for k, letter in enumerate(path) if letter == ".")
        return final + [path for path in around if not any(other.startswith(f"{path}.") for other in others)]

    def last_block(self, names: list[str]) -> int | None:
        """The last block that uses layers which are used in one block each; None if that is not known."""
        positions = [self.positions.get(name) for name in names if self.calls[name] == 1]
        blocks = [position[1] for position in positions if position is not None]
        return max(blocks) if len(blocks) == len(names) else None


def trace(network: nn.Module, call: Call, batch: Batch, names: Iterable[str]) -> Trace:
    """Trace the weights ``names`` while the network runs on one batch.

    Args:
        network: dense, in evaluation mode; left as it is.
        call: how it is called.
        batch: any.
        names: of weights, as the network names them.

    Raises:
        MpocError: the network has no such weight.
    """
    observed = {name: find_layer(network, name) for name in names}
    layers = {name: layer for name, layer in observed.items() if isinstance(layer, ObservedLayer)}
    reasons = {name: reason for name, reason in observed.items() if isinstance(reason, str)}
    tracer = _Tracer(network, layers)
    given = to_device(batch, device_of(network))
    with eval_mode(network), torch.no_grad():
        with hooked() as handles, ExitStack() as stack:
            handles += tracer.watch()
            if any(map(_is_norm, network.modules())):
                stack.enter_context(_Uses(tracer))
            call(network, given)
        uses = [(use.within, use.after) for uses in tracer.given.values() for use in uses]
        found = tracer.blocks.find(network, lambda: call(network, given), uses)
    reasons |= {name: UNREACHED for name in layers if name not in tracer.given}
    return tracer.result(reasons, batch, found)


def trace_batches(network: nn.Module, call: Call, batches: Sequence[Batch], names: Iterable[str]) -> Trace:
    """Trace the first batch, and further ones as long as they reach weights that none before them did.

    Args:
        network: as :func:`trace` takes it.
        call: how it is called.
        batches: of calibration data.
        names: of weights.
    """
    result = trace(network, call, glimpse(batches[0]), names)
    missing = {name for name, why in result.reasons.items() if why == UNREACHED}
    for batch in batches if missing else ():
        if called := _called(network, call, batch, missing):
            more = trace(network, call, batch, [*result.layers, *called])
            result = _joined(result, more)
            missing -= called
    return result


def _called(network: nn.Module, call: Call, batch: Batch, names: Iterable[str]) -> set[str]:
    """Those of the weights that the network uses in a batch."""
    called: set[str] = set()
    with eval_mode(network), torch.no_grad(), hooked() as handles:
        for name in names:
            layer = find_layer(network, name)
            for path in layer.modules if isinstance(layer, ObservedLayer) else ():
                module = network.get_submodule(path)
                handles.append(module.register_forward_pre_hook(lambda *_, name=name: called.add(name)))
        call(network, to_device(batch, device_of(network)))
    return called


def _joined(one: Trace, other: Trace) -> Trace:
    """The trace ``one`` with the weights that only ``other`` reached, in their place in the order."""
    groups: list[tuple[str, ...]] = list(one.groups)
    after = -1
    for group in other.groups:
        new = tuple(name for name in group if name not in one.layers)
        known = [k for k, ours in enumerate(groups) if set(group) & set(ours)]
        if known:
            after = max(after, *known)
            groups[known[0]] += new
        else:
            after += 1
            groups.insert(after, new)
    blocks = {block.module: (c, p) for c, chain in enumerate(one.chains) for p, block in enumerate(chain)}
    there = {name: other.chains[c][p].module for name, (c, p) in other.positions.items()}
    positions = {name: blocks[path] for name, path in there.items() if path in blocks}
    layers, families = other.layers | one.layers, other.families | one.families
    pieces = [trace.pieces for trace in (other, one) if trace.pieces is not None]
    alike = len(pieces) == 2 and [b.module for b in pieces[0].chain] == [b.module for b in pieces[1].chain]
    return replace(
        one,
        layers={name: layers[name] for group in groups for name in group},
        groups=tuple(groups),
        calls=other.calls | one.calls,
        rows={name: rows * one.numbers // other.numbers for name, rows in other.rows.items()} | one.rows,
        same_rows=other.same_rows | one.same_rows,
        norms=other.norms | one.norms,
        reasons={name: why for name, why in one.reasons.items() if name not in other.layers},
        positions=_outside(positions | one.positions, one.chains, families),
        families=families,
        pieces=Pieces(pieces[1].chain, pieces[0].of | pieces[1].of) if alike else None,
    )


def _outside(
    positions: Mapping[str, tuple[int, int]], chains: Sequence[Chain], families: Mapping[str, str]
) -> dict[str, tuple[int, int]]:
    """The positions, but for blocks inside an expert, which a batch may not reach."""
    prefixes = {name: family.partition("*")[0] for name, family in families.items()}
    return {
        name: (c, p)
        for name, (c, p) in positions.items()
        if name not in prefixes or not chains[c][p].module.startswith(prefixes[name])
    }


def _families(network: nn.Module, rows: dict[str, int]) -> dict[str, str]:
    """The layers among siblings that are given different numbers of rows, or of which one is not called.

    Args:
        network: that holds them.
        rows: how many each layer was given, 0 where it was not called.
    """
    families: dict[tuple[str, torch.Size], list[str]] = {}
    for name in rows:
        families.setdefault((_family(network, name), network.get_parameter(name).shape), []).append(name)
    return {
        name: family
        for (family, _), names in families.items()
        if len({rows[name] for name in names}) > 1
        for name in names
    }


def _family(network: nn.Module, name: str) -> str:
    """The name with ``*`` for the number of the innermost module whose siblings stand beside it."""
    parts = name.split(".")
    for k in reversed(range(1, len(parts))):
        container = network.get_submodule(".".join(parts[:k]))
        if re.fullmatch(r"\d+", parts[k]) and not isinstance(container, nn.Sequential):
            return ".".join([*parts[:k], "*", *parts[k + 1 :]])
    return name


@dataclass(frozen=True)
class _Use:
    """One call of a layer."""

    rows: int
    length: int  # of the first axis of what it was given
    identity: Hashable
    within: list[int]  # the calls that had not returned, outermost first
    after: int  # how many calls had begun


def _piece(use: _Use, blocks: Mapping[int, int]) -> int:
    """The piece that a call lies in; ``blocks``: number of a block's call → its position."""
    inside = [blocks[number] for number in use.within if number in blocks]
    return inside[0] if inside else -1 if use.after <= min(blocks) else len(blocks)


class _Tracer:
    """Hooks of one traced pass, and what they record."""

    def __init__(self, network: nn.Module, layers: dict[str, ObservedLayer]) -> None:
        self._network, self._layers = network, layers
        self.blocks = ChainTracer()
        self.given: dict[str, list[_Use]] = {}
        self._outputs = WeakTensorKeyDictionary()  # what a layer gave → number of the output
        self._givers: list[str] = []  # output → the layer
        self._used_elsewhere: set[int] = set()  # outputs that go elsewhere than into a batch norm
        self._normed: dict[str, list[int | None]] = {}  # batch norm → outputs that it is given
        self._in_norm = False

    def watch(self) -> list[RemovableHandle]:
        """Register hooks; those of blocks first, so that a layer that is a block lies within itself."""
        handles = self.blocks.watch(self._network)
        for layer in self._layers.values():
            for path in layer.modules:
                handles += self._watch_layer(layer.name, self._network.get_submodule(path))
        for path, module in self._network.named_modules():
            if _is_norm(module):
                handles += self._watch_norm(path, module)
        return handles

    def _watch_layer(self, name: str, module: nn.Module) -> list[RemovableHandle]:
        def before(_: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
            given = first_argument(args, named)
            rows, length = self._layers[name].inputs.count(given, None), given.shape[:1].numel()
            key = self.blocks.identities.of(given)
            use = _Use(rows, length, key, list(self.blocks.open), len(self.blocks.calls))
            self.given.setdefault(name, []).append(use)

        def after(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if isinstance(output, Tensor):
                self._outputs[output] = len(self._givers)
                self._givers.append(name)

        return [
            module.register_forward_pre_hook(before, with_kwargs=True),
            module.register_forward_hook(after),
        ]

    def _watch_norm(self, path: str, module: nn.Module) -> list[RemovableHandle]:
        def before(_: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
            self._normed.setdefault(path, []).append(self._outputs.get(first_argument(args, named)))
            self._in_norm = True

        def after(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            self._in_norm = False

        return [
            module.register_forward_pre_hook(before, with_kwargs=True),
            module.register_forward_hook(after),
        ]

    def use(self, value: Any) -> None:
        """Record that an operation takes ``value``."""
        if isinstance(value, tuple | list):
            for entry in value:
                self.use(entry)
        elif not self._in_norm and isinstance(value, Tensor) and value in self._outputs:
            self._used_elsewhere.add(self._outputs[value])

    def result(self, reasons: dict[str, str], batch: Batch, found: Found) -> Trace:
        """The trace, layers in the order of their first use."""
        calls = {name: len(given) for name, given in self.given.items()}
        groups: dict[Any, list[str]] = {}
        for name, given in self.given.items():
            key = given[0].identity if calls[name] == 1 else name
            groups.setdefault(key, []).append(name)
        same: dict[str, str] = {}
        for group in groups.values():
            first: dict[Any, str] = {}
            for name in group:
                same[name] = first.setdefault(self._layers[name].inputs.key, name)
        chains, blocks = found
        families = _families(self._network, self._row_counts())
        return Trace(
            {name: self._layers[name] for name in self.given}, tuple(map(tuple, groups.values())), calls,
            self._rows(), same, self._norms(calls), reasons, tuple(chains),
            _outside(self._positions_of(blocks), chains, families), main_input(batch).numel(), families,
            self._pieces(chains, blocks),
        )  # fmt: skip

    def _rows(self) -> dict[str, int]:
        """How many rows each layer was given."""
        return {name: sum(use.rows for use in given) for name, given in self.given.items()}

    def _row_counts(self) -> dict[str, int]:
        """The length of what each layer was given first; 0 for layers that were not called."""
        counts = dict.fromkeys(self._layers, 0)
        return counts | {name: given[0].length for name, given in self.given.items()}

    def _norms(self, calls: dict[str, int]) -> dict[str, str]:
        norms, taken = {}, Counter(number for numbers in self._normed.values() for number in numbers)
        for path, (output, *further) in self._normed.items():
            alone = not further and taken[output] == 1 and output not in self._used_elsewhere
            if output is not None and alone and calls[self._givers[output]] == 1:
                norms[self._givers[output]] = path
        return norms

    def _pieces(self, chains: Sequence[Chain], blocks: dict[int, tuple[int, int]]) -> Pieces | None:
        """The pieces along the longest chain."""
        longest = max(range(len(chains)), key=lambda c: len(chains[c]), default=None)
        if longest is None or len(chains[longest]) < 2:
            return None
        numbers = {n: position for n, (chain, position) in blocks.items() if chain == longest}
        pieces: dict[str, int] = {}
        for name, given in self.given.items():
            own = {_piece(use, numbers) for use in given}
            if len(own) > 1 or any(lies_between(use.within, use.after, numbers) for use in given):
                return None
            pieces[name] = own.pop()
        return Pieces(chains[longest], pieces)

    def _positions_of(self, blocks: dict[int, tuple[int, int]]) -> dict[str, tuple[int, int]]:
        positions = {}
        for name, given in self.given.items():
            places = [next((blocks[n] for n in use.within if n in blocks), None) for use in given]
            chains = {None if position is None else position[0] for position in places}
            if len(chains) == 1 and places[0] is not None:
                positions[name] = places[0]
        return positions


class _Uses(TorchDispatchMode):
    """Reports every argument of every operation to the tracer."""

    def __init__(self, tracer: _Tracer) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._tracer = tracer

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._tracer.use([*args, *(kwargs or {}).values()])
        return func(*args, **(kwargs or {}))


def _is_norm(module: nn.Module) -> bool:
    return isinstance(module, _BatchNorm) and not module.training and module.running_mean is not None
