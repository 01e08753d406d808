"""Find chains of blocks in a pass: rows of modules, each given exactly what the one before it gave.

That is the same tensor, not changed since.  Their further arguments, as masks, are those of the chain's first
block, or do not depend on its blocks: they are the same where each block only gives on what it is given.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Container, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.hooks import RemovableHandle

from mpoc.compression.calibrate.layer_inputs import hooked
from mpoc.errors import MpocError

_PLAIN = (type(None), bool, int, float, str, torch.dtype)
_FILLS = math.nan, 0.0, 1e4, -1e4  # in place of what blocks give
Arguments = tuple[tuple[Any, ...], dict[str, Any]]  # of a call after the first, positional and named


@dataclass(frozen=True)
class ChainBlock:
    """One module of a chain."""

    module: str
    nbytes: int  # of its input in the pass that was watched
    is_kept_whole: bool  # it does not change its input in place
    takes_more: bool  # than one argument
    passes: bool  # it could give on its input: it gives such a tensor, and no other
    rest: tuple[Any, ...] | None  # what it gives beside the tensor, if it passes; None: a tensor alone


Chain = tuple[ChainBlock, ...]
Found = tuple[list[Chain], dict[int, tuple[int, int]]]  # with the chain and position of calls, by number


class Identities:
    """Tells the tensors of one pass apart, and what they were when, without holding their numbers."""

    def __init__(self) -> None:
        self._seen: dict[int, StorageWeakRef] = {}  # keeps the address, not the memory behind it

    def of(self, tensor: Tensor) -> Hashable:
        """A key that is equal for two tensors of the same memory and version; of a sparse one for none."""
        if tensor.layout != torch.strided:
            return _Unlike()
        storage = tensor.untyped_storage()
        place = storage._cdata
        if place not in self._seen:
            self._seen[place] = StorageWeakRef(storage)
        shape = tensor.storage_offset(), tuple(tensor.shape), tensor.stride()
        return place, *shape, tensor.dtype, tensor._version

    def of_arguments(self, value: Any) -> Hashable:
        """A key that is equal for the same arguments; what is neither tensor nor plain equals nothing."""
        if isinstance(value, Tensor):
            return self.of(value)
        if isinstance(value, _PLAIN):
            return type(value).__name__, value
        if isinstance(value, tuple | list):
            return tuple(map(self.of_arguments, value))
        if isinstance(value, dict):
            return tuple((key, self.of_arguments(entry)) for key, entry in value.items())
        return _Unlike()


class _Unlike:
    """Equal to nothing but itself."""


def next_input(output: Any) -> Tensor | None:
    """What a block hands to the next: its output, or the first of several outputs."""
    first = output[0] if isinstance(output, tuple) and output else output
    return first if isinstance(first, Tensor) else None


@dataclass
class _Call:
    module: str
    within: int | None  # the call that this one is a part of
    nbytes: int  # of what was given
    taken: Hashable  # its identity
    others: Hashable
    takes_more: bool
    gave: Hashable = None
    is_kept_whole: bool = False
    passes: bool = False
    gives_more: bool = False  # a tuple
    rest: tuple[Any, ...] | None = None


@dataclass
class ChainTracer:
    """Observes the children of every ``ModuleList`` and ``Sequential`` in one forward pass."""

    calls: list[_Call] = field(default_factory=list)
    open: list[int] = field(default_factory=list)  # calls that have not returned, outermost first
    identities: Identities = field(default_factory=Identities)

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
            nbytes = 0 if given is None else given.numel() * given.element_size()
            others = self.identities.of_arguments((args[1:], named))
            within = self.open[-1] if self.open else None
            self.open.append(len(self.calls))
            takes_more = len(args) > 1 or bool(named)
            self.calls.append(_Call(path, within, nbytes, self._key(given), others, takes_more))

        def end(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            call, first = self.calls[self.open.pop()], next_input(output)
            call.gave, call.gives_more = self._key(first), isinstance(output, tuple)
            rest = output[1:] if isinstance(output, tuple) else None
            if first is not None and args and isinstance(args[0], Tensor):
                call.is_kept_whole = self._key(args[0]) == call.taken
                call.passes = _are_alike(args[0], first) and first.is_floating_point() and _is_plain(rest)
                call.rest = rest if call.passes else None

        return [
            module.register_forward_pre_hook(begin, with_kwargs=True),
            module.register_forward_hook(end),
        ]

    def _key(self, value: Any) -> Hashable:
        return self.identities.of(value) if isinstance(value, Tensor) else _Unlike()

    def find(
        self, network: nn.Module, run: Callable[[], object], uses: Collection[tuple[Sequence[int], int]]
    ) -> Found:
        """The chains, by further passes where blocks are given different arguments.

        Args:
            network: that was watched.
            run: the pass, once more.
            uses: of layers, as :func:`lies_between` takes them: what is given a block must not follow from
                layers behind the first one.
        """
        found, (loose, positions) = self.chains(), self.chains(any_arguments=True)
        strict = {block.module: chain for chain in found[0] for block in chain}
        longer = [
            chain
            for k, chain in enumerate(loose)
            if len(chain) > len(strict[chain[0].module])
            and not any(lies_between(*use, [n for n, (c, _) in positions.items() if c == k]) for use in uses)
        ]
        independent = independent_blocks(network, longer, run)
        return self.chains(independent) if independent else found

    def chains(self, independent: Container[str] = (), any_arguments: bool = False) -> Found:
        """The chains and, for each call of a block, its chain and position.

        Args:
            independent: modules whose further arguments do not depend on the blocks before them.
            any_arguments: whether further arguments need not be those of the block before.
        """
        blocks = self._refined(None)
        often = [call.module for call in self.calls]
        chains: list[list[int]] = []
        for number in blocks:
            call = self.calls[number]
            if often.count(call.module) > 1:
                continue
            last = self.calls[chains[-1][-1]] if chains else None
            fits = any_arguments or call.module in independent
            if last is None or last.gave != call.taken or not (fits or last.others == call.others):
                chains.append([])
            chains[-1].append(number)
        positions = {n: (c, p) for c, chain in enumerate(chains) for p, n in enumerate(chain)}
        return [tuple(self._block(number) for number in chain) for chain in chains], positions

    def _block(self, number: int) -> ChainBlock:
        call = self.calls[number]
        return ChainBlock(
            call.module, call.nbytes, call.is_kept_whole, call.takes_more, call.passes, call.rest
        )

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
        if not parts or call.gives_more:
            return False
        taken = [self.calls[k].taken for k in parts] + [call.gave]
        gave = [call.taken] + [self.calls[k].gave for k in parts]
        return taken == gave


class StopPassError(Exception):
    """Stops a forward pass once all that is asked for is there."""


@contextmanager
def replaced_forwards(modules: Sequence[nn.Module], forwards: Sequence[Callable[..., Any]]) -> Iterator[None]:
    """Meanwhile modules compute something else."""
    own = [module.__dict__.get("forward") for module in modules]  # as accelerate's hooks set it
    try:
        for module, forward in zip(modules, forwards, strict=True):
            module.__dict__["forward"] = forward
        yield
    finally:
        for module, before in zip(modules, own, strict=True):
            module.__dict__.pop("forward", None)
            if before is not None:
                module.__dict__["forward"] = before


@contextmanager
def _giving_on(network: nn.Module, blocks: Sequence[ChainBlock], fill: float | None = None) -> Iterator[None]:
    """Meanwhile blocks give on what they are given, or a tensor like it that is ``fill`` everywhere."""

    def forward_of(block: ChainBlock) -> Callable[..., Any]:
        def give_on(given: Tensor, /, *_: Any, **__: Any) -> Any:
            given = given if fill is None else torch.full_like(given, fill)
            return given if block.rest is None else (given, *block.rest)

        return give_on

    modules = [network.get_submodule(block.module) for block in blocks]
    with replaced_forwards(modules, list(map(forward_of, blocks))):
        yield


@contextmanager
def _seen(
    network: nn.Module, blocks: Sequence[ChainBlock], see: Callable[[str, Tensor, Arguments], None]
) -> Iterator[None]:
    """Meanwhile ``see`` gets the module and the arguments of each call of a block."""

    def before(_: nn.Module, args: Any, named: Any, path: str) -> None:
        see(path, args[0], (args[1:], named))

    with hooked() as handles:
        for block in blocks:
            module, hook = network.get_submodule(block.module), partial(before, path=block.module)
            handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
        yield


def arguments_along(
    network: nn.Module, blocks: Sequence[ChainBlock], run: Callable[[], object]
) -> tuple[Tensor, list[Arguments]]:
    """The first argument of the first of some blocks of a chain, and the further ones of each.

    Where all blocks could only give on what they are given they do so.  Where none takes more than one
    argument the pass ends at the first.

    Args:
        network: that holds the blocks.
        blocks: neighbours.
        run: a pass of the network.

    Raises:
        MpocError: the pass does not reach one of them.
    """
    found: dict[str, tuple[Tensor, Arguments]] = {}
    passes, is_alone = all(b.passes for b in blocks), not any(b.takes_more for b in blocks)
    last = blocks[0 if is_alone else -1].module

    def see(path: str, given: Tensor, others: Arguments) -> None:
        found[path] = given if passes or is_alone or found else given.clone(), others
        if path == last:
            raise StopPassError

    with (
        _giving_on(network, blocks if passes else ()),
        _seen(network, blocks, see),
        suppress(StopPassError),
    ):
        run()
    refuse_missing(block.module for block in blocks[: 1 if is_alone else None] if block.module not in found)
    first = found[blocks[0].module]
    return first[0], [found.get(block.module, first)[1] for block in blocks]


def refuse_missing(paths: Iterable[str]) -> None:
    """Refuse blocks that a batch does not reach.

    Raises:
        MpocError: there are any.
    """
    for path in paths:
        raise MpocError(
            f"{path}: the network runs this block on some of the calibration data and not on all",
            "calibrate on examples that all blocks run on",
        )


def independent_blocks(network: nn.Module, chains: Sequence[Chain], run: Callable[[], object]) -> set[str]:
    """The blocks of chains whose further arguments do not depend on the blocks before them.

    These are the same whether blocks give no numbers, zeros or large ones of either sign; nothing changes
    them later; and they are no larger together than what a block is given.

    Args:
        network: that holds the blocks.
        chains: of blocks with any further arguments.
        run: a pass of the network.
    """
    found: set[str] = set()
    for chain in chains:
        if not all(block.passes for block in chain):
            continue
        real, nbytes = _copied_arguments(network, chain, run)
        if nbytes <= max(block.nbytes for block in chain) and all(
            _are_equal(real, _arguments_if(network, chain, run, fill)) for fill in _FILLS
        ):
            found |= {block.module for block in chain}
    return found


def _arguments_if(
    network: nn.Module, chain: Chain, run: Callable[[], object], fill: float
) -> dict[str, Arguments]:
    """The further arguments where all blocks give ``fill``; none where the network cannot go on from that."""
    before = [(buffer, buffer._version, buffer.clone()) for buffer in network.buffers()]
    try:
        with _giving_on(network, chain, fill):
            return _copied_arguments(network, chain, run)[0]
    except Exception:  # a network may refuse such numbers in any way
        return {}
    finally:
        for buffer, version, value in before:
            if buffer._version != version:  # a network may renew it, as a range that it has seen
                buffer.copy_(value)


def _copied_arguments(
    network: nn.Module, chain: Chain, run: Callable[[], object]
) -> tuple[dict[str, Arguments], float]:
    """Copies of the further arguments of blocks in a pass; their bytes, infinite if one is changed later."""
    copies: dict[str, Arguments] = {}
    known: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}  # by identity and version: itself, and its copy

    def copied(value: Any) -> Any:
        if isinstance(value, Tensor):
            key = id(value), value._version
            if key not in known:
                known[key] = value, value.clone()
            return known[key][1]
        if isinstance(value, dict):
            return {key: copied(entry) for key, entry in value.items()}
        return tuple(map(copied, value)) if isinstance(value, tuple | list) else value

    with _seen(network, chain, lambda path, _, others: copies.update({path: copied(others)})):
        run()
    is_changed = any(tensor._version != version for (_, version), (tensor, _) in known.items())
    return copies, math.inf if is_changed else sum(
        copy.numel() * copy.element_size() for _, copy in known.values()
    )


def _are_alike(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and one.dtype == other.dtype and one.device == other.device


def _are_equal(one: Any, other: Any) -> bool:
    """Whether arguments are the same numbers; what is neither dense tensor nor plain equals nothing."""
    if type(one) is not type(other):
        return False
    if isinstance(one, Tensor):
        return one.layout == torch.strided and _are_alike(one, other) and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_are_equal(one[key], other[key]) for key in one)
    if isinstance(one, tuple):
        return len(one) == len(other) and all(map(_are_equal, one, other))
    return isinstance(one, _PLAIN) and bool(one == other)


def _is_plain(value: Any) -> bool:
    return all(map(_is_plain, value)) if isinstance(value, tuple) else isinstance(value, _PLAIN)


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The floating-point tensors in tuples, lists and dicts."""
    if isinstance(value, Tensor):
        yield from [value] if value.is_floating_point() else []
    elif isinstance(value, tuple | list | dict):
        for entry in value.values() if isinstance(value, dict) else value:
            yield from tensors_in(entry)


def lies_between(within: Iterable[int], after: int, blocks: Collection[int]) -> bool:
    """Whether a call, inside some calls and after so many began, lies between blocks but in none of them."""
    return min(blocks) < after <= max(blocks) and set(blocks).isdisjoint(within)
