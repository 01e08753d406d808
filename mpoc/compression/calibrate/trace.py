"""Trace one forward pass: the order of weights, layers that share an input, and chains of blocks.

A chain is a row of modules of which each is given exactly what the one before it gave: the same tensor, not
changed since, and all other arguments those of the chain's first block.  A pass that needs the inputs of
block k can then keep them, and need not run the blocks before k again.

The trace also finds the batch norms that alone take a layer's output: their running means can correct the
mean of its error.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.hooks import RemovableHandle

from mpoc.compression.calibrate.layer_inputs import (
    ConvInputs,
    ObservedLayer,
    device_of,
    eval_mode,
    find_layer,
    first_argument,
    hooked,
)
from mpoc.models.call import Batch, Call, main_input, to_device

_PLAIN = (type(None), bool, int, float, str, torch.dtype)

EXAMPLES = 4  # that are watched: all activations of the pass are held


@dataclass(frozen=True)
class ChainBlock:
    """One module of a chain."""

    module: str
    nbytes: int  # of its input in the pass that was watched
    is_kept_whole: bool  # nothing changes its input in place


Chain = tuple[ChainBlock, ...]


def identity(tensor: Tensor) -> Hashable:
    """A key that is equal for two tensors of the same memory and version, as long as both are held."""
    return tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor._version


def signature(value: Any) -> Hashable:
    """A key that is equal for the same arguments; what is neither tensor nor plain equals nothing."""
    if isinstance(value, Tensor):
        return identity(value)
    if isinstance(value, _PLAIN):
        return type(value).__name__, value
    if isinstance(value, tuple | list):
        return tuple(map(signature, value))
    if isinstance(value, dict):
        return tuple((key, signature(entry)) for key, entry in value.items())
    return _Unlike()


class _Unlike:
    """Equal to nothing but itself."""


def next_input(output: Any) -> Tensor | None:
    """What a block hands to the next: its output, or the first of several outputs."""
    first = output[0] if isinstance(output, tuple) and output else output
    return first if isinstance(first, Tensor) else None


def features(values: Tensor, mask: Tensor | None, axis: int) -> Tensor:
    """The output of a block as rows (rows, width), without padding.

    Args:
        values: tokens (n, T, width), or any shape.
        mask: (n, T), 0 where a token is padding.
        axis: of the features.
    """
    if mask is not None and mask.dim() == 2 and values.shape[:2] == mask.shape and values.dim() > 2:
        return values[mask.bool()].flatten(0, -2)
    return values.movedim(axis, -1).flatten(0, -2)


@dataclass
class _Call:
    module: str
    within: int | None  # the call that this one is a part of
    given: Tensor | None
    taken: Hashable  # identity of what was given
    others: Hashable
    output: Any = None
    gave: Hashable = None


@dataclass
class ChainTracer:
    """Observes the children of every ``ModuleList`` and ``Sequential`` in one forward pass."""

    calls: list[_Call] = field(default_factory=list)
    open: list[int] = field(default_factory=list)  # calls that have not returned, outermost first
    _seen: list[Any] = field(default_factory=list)  # all arguments: no two tensors may share memory by chance

    def watch(self, network: nn.Module) -> list[RemovableHandle]:
        """Register hooks, to be removed after the pass."""
        handles = []
        for path, container in network.named_modules():
            if isinstance(container, nn.ModuleList | nn.Sequential):
                for name, child in container.named_children():
                    handles += self._hooks(f"{path}.{name}" if path else name, child)
        return handles

    def _hooks(self, path: str, module: nn.Module) -> list[RemovableHandle]:
        def begin(_: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
            given = args[0] if args and isinstance(args[0], Tensor) else None
            taken: Hashable = _Unlike() if given is None else identity(given)
            within = self.open[-1] if self.open else None
            self._seen += [args, named]
            self.open.append(len(self.calls))
            self.calls.append(_Call(path, within, given, taken, signature((args[1:], named))))

        def end(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            call = self.calls[self.open.pop()]
            first = next_input(output)
            call.output, call.gave = output, _Unlike() if first is None else identity(first)

        return [
            module.register_forward_pre_hook(begin, with_kwargs=True),
            module.register_forward_hook(end),
        ]

    def chains(self) -> tuple[list[Chain], dict[int, tuple[int, int]]]:
        """The chains and, for each call of a block, its chain and position."""
        blocks = self._refined(None)
        often = [call.module for call in self.calls]
        chains: list[list[int]] = []
        for number in blocks:
            call = self.calls[number]
            if often.count(call.module) > 1:
                continue
            last = self.calls[chains[-1][-1]] if chains else None
            if last is None or last.gave != call.taken or last.others != call.others:
                chains.append([])
            chains[-1].append(number)
        positions = {n: (c, p) for c, chain in enumerate(chains) for p, n in enumerate(chain)}
        return [tuple(self._block(number) for number in chain) for chain in chains], positions

    def _block(self, number: int) -> ChainBlock:
        call = self.calls[number]
        if call.given is None:
            return ChainBlock(call.module, 0, False)
        whole = identity(call.given) == call.taken
        return ChainBlock(call.module, call.given.numel() * call.given.element_size(), whole)

    def _refined(self, within: int | None) -> list[int]:
        """The calls inside the call ``within``, each replaced by its own parts where these are a chain."""
        calls: list[int] = []
        for number, call in enumerate(self.calls):
            if call.within != within:
                continue
            parts = [k for k, part in enumerate(self.calls) if part.within == number]
            calls += self._refined(number) if self._are_all_of(call, parts) else [number]
        return calls

    def _are_all_of(self, call: _Call, parts: list[int]) -> bool:
        if not parts or isinstance(call.output, tuple):
            return False
        taken = [self.calls[k].taken for k in parts] + [call.gave]
        gave = [call.taken] + [self.calls[k].gave for k in parts]
        return taken == gave


@dataclass(frozen=True)
class Trace:
    """What one forward pass tells about the weights that were asked for."""

    layers: dict[str, ObservedLayer]  # by weight, in the order of their first use
    groups: tuple[
        tuple[str, ...], ...
    ]  # weights that are given the same tensor, in order of the first of them
    calls: dict[str, int]  # how often each is used
    same_rows: dict[str, str]  # weight → the first one whose rows are the same; itself where there is none
    norms: dict[str, str]  # weight → module of the batch norm that alone takes the layer's output
    reasons: dict[str, str]  # weight → why nothing is known of it
    chains: tuple[Chain, ...]
    positions: dict[
        str, tuple[int, int]
    ]  # weight → chain, block of its first use; all its uses are in that chain
    numbers: int  # in the input of the pass

    def axis(self, position: tuple[int, int]) -> int:
        """The feature axis of a block's output: the channels (1) for convolutions, else the last (-1)."""
        here = (name for name, position_of in self.positions.items() if position_of == position)
        return 1 if any(isinstance(self.layers[name].inputs, ConvInputs) for name in here) else -1


def trace(network: nn.Module, call: Call, batch: Batch, names: Iterable[str]) -> Trace:
    """Trace the weights ``names`` while the network runs on one batch.

    Args:
        network: dense, in evaluation mode; left as it is.
        call: how it is called.
        batch: any; its first examples are enough.
        names: of weights, as the network names them.

    Raises:
        MpocError: the network has no such weight.
    """
    observed = {name: find_layer(network, name) for name in names}
    layers = {name: layer for name, layer in observed.items() if isinstance(layer, ObservedLayer)}
    reasons = {name: reason for name, reason in observed.items() if isinstance(reason, str)}
    tracer = _Tracer(network, layers)
    with eval_mode(network), torch.no_grad(), hooked() as handles, ExitStack() as stack:
        handles += tracer.watch()
        if tracer.has_norms:
            stack.enter_context(_Uses(tracer))
        batch = {name: values[:EXAMPLES] for name, values in batch.items()}
        call(network, to_device(batch, device_of(network)))
    reasons |= {name: "the network does not reach it" for name in layers if name not in tracer.given}
    return tracer.result(reasons, batch)


class _Tracer:
    """Hooks of one traced pass, and what they record."""

    def __init__(self, network: nn.Module, layers: dict[str, ObservedLayer]) -> None:
        self._network, self._layers = network, layers
        self._chains = ChainTracer()
        self.given: dict[str, list[tuple[Tensor, Any, list[int]]]] = {}  # input, identity, open blocks
        self.outputs: dict[int, tuple[str, Tensor]] = {}  # id of a tensor → the layer that gave it
        self.other_uses: set[int] = set()  # ids of outputs that go elsewhere than into a batch norm
        self._normed: dict[str, list[int]] = {}  # batch norm → ids of its inputs
        self._in_norm = False

    @property
    def has_norms(self) -> bool:
        """Whether the network has a batch norm with running statistics."""
        return any(_is_norm(module) for module in self._network.modules())

    def watch(self) -> list[RemovableHandle]:
        """Register hooks; those of blocks first, so that a layer that is a block lies within itself."""
        handles = self._chains.watch(self._network)
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
            self.given.setdefault(name, []).append((given, identity(given), list(self._chains.open)))

        def after(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            self.outputs[id(output)] = name, output

        return [
            module.register_forward_pre_hook(before, with_kwargs=True),
            module.register_forward_hook(after),
        ]

    def _watch_norm(self, path: str, module: nn.Module) -> list[RemovableHandle]:
        def before(_: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
            self._normed.setdefault(path, []).append(id(first_argument(args, named)))
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
        elif not self._in_norm and id(value) in self.outputs:
            self.other_uses.add(id(value))

    def result(self, reasons: dict[str, str], batch: Batch) -> Trace:
        """The trace, layers in the order of their first use."""
        calls = {name: len(given) for name, given in self.given.items()}
        groups: dict[Any, list[str]] = {}
        for name, given in self.given.items():
            key = given[0][1] if calls[name] == 1 else name
            groups.setdefault(key, []).append(name)
        same: dict[str, str] = {}
        for group in groups.values():
            first: dict[Any, str] = {}
            for name in group:
                same[name] = first.setdefault(self._layers[name].inputs.key, name)
        chains, blocks = self._chains.chains()
        return Trace(
            {name: self._layers[name] for name in self.given}, tuple(map(tuple, groups.values())), calls,
            same, self._norms(calls), reasons, tuple(chains), self._positions_of(blocks),
            main_input(batch).numel(),
        )  # fmt: skip

    def _norms(self, calls: dict[str, int]) -> dict[str, str]:
        norms = {}
        for path, inputs in self._normed.items():
            name = self.outputs[inputs[0]][0] if inputs[0] in self.outputs else None
            takers = sum(taken.count(inputs[0]) for taken in self._normed.values())
            alone = len(inputs) == 1 and takers == 1 and inputs[0] not in self.other_uses
            if name is not None and alone and calls[name] == 1:
                norms[name] = path
        return norms

    def _positions_of(self, blocks: dict[int, tuple[int, int]]) -> dict[str, tuple[int, int]]:
        positions = {}
        for name, given in self.given.items():
            places = [next((blocks[n] for n in within if n in blocks), None) for _, _, within in given]
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


@dataclass(frozen=True)
class Example:
    """A batch at one block: what it is given, and what it is to give."""

    given: Tensor  # first argument
    args: tuple[Any, ...]  # the others
    named: dict[str, Any]
    target: Tensor  # what the block is to give
    mask: Tensor | None  # (n, T), 0 where a token is padding
    axis: int = -1  # of the target's features
