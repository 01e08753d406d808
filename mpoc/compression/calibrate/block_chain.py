"""Run a network along a chain of blocks: keep what blocks are given and what modules give, and begin there.

A pass that needs the inputs of block k can keep them, and need not run the blocks before k again.  A chain
cuts the network in pieces where nothing else of what a block gives, and nothing that layers before the chain
give, is used further on.  A forward and a backward pass can then go through it block by block.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mpoc.compression.calibrate.chain_tracer import (
    Arguments,
    Chain,
    next_input,
    refuse_missing,
    replaced_forwards,
    tensors_in,
)
from mpoc.compression.calibrate.layer_inputs import hooked
from mpoc.io.keyed_store import Scratch

_OUTPUT_BYTES = 64 * 1024**2  # of layers' outputs, of each network


@dataclass(frozen=True)
class Example:
    """A batch at one block: what it is given, and what it is to give."""

    given: Tensor  # first argument
    args: tuple[Any, ...]  # the others
    named: dict[str, Any]
    target: Tensor  # what the block is to give
    mask: Tensor | None  # (n, T), 0 where a token is padding
    axis: int = -1  # of the target's features


def given_on(output: Any) -> Tensor:
    """What a block of a chain hands to the next."""
    first = next_input(output)
    assert first is not None, "it gave a tensor when it was traced"
    return first


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


class ChainInputs:
    """What the blocks of a chain are given in each batch, and passes that begin there.

    The chain must cut the network: :class:`CutCheck`.

    Args:
        network: that holds the blocks.
        chain: of its blocks; () keeps nothing.
        scratch: for the inputs.
    """

    def __init__(self, network: nn.Module, chain: Chain, scratch: Scratch) -> None:
        self._paths = [block.module for block in chain]
        self.modules = [network.get_submodule(path) for path in self._paths]
        self._scratch = scratch
        self._others: dict[tuple[int, int], Arguments] = {}  # block, batch → its further arguments
        self._rests: dict[int, Any] = {}  # block → what it gives beside a tensor; None: a tensor alone

    @contextmanager
    def recorded(self, index: int) -> Iterator[None]:
        """Meanwhile a pass over batch ``index`` keeps each block's input, and what the last one gives.

        Raises:
            MpocError: it does not reach all blocks.
        """

        def keep(_: nn.Module, args: Any, named: Any, k: int) -> None:
            self._scratch.put(self._key(k, index), [args[0].clone()])  # it may be changed
            self._others[k, index] = args[1:], named

        def leave(_: nn.Module, args: Any, output: Any, k: int) -> None:
            self._rests[k] = output[1:] if isinstance(output, tuple) else None
            if k == len(self.modules) - 1:
                self._scratch.put(self._key(k + 1, index), [given_on(output).clone()])

        with ExitStack() as handles:
            for k, block in enumerate(self.modules):
                before = block.register_forward_pre_hook(partial(keep, k=k), with_kwargs=True)
                handles.callback(before.remove)
                handles.callback(block.register_forward_hook(partial(leave, k=k)).remove)
            yield
        refuse_missing(path for k, path in enumerate(self._paths) if (k, index) not in self._others)

    def given(self, k: int, index: int) -> Tensor:
        """The input of block k in batch ``index``; what the last block gave where there is no block k."""
        return self._scratch.get(self._key(k, index))[0]

    def others(self, k: int, index: int) -> Arguments:
        """The further arguments of block k in batch ``index``."""
        return self._others[k, index]

    def drop(self, k: int, index: int) -> None:
        """Forget the input of block k."""
        self._scratch.drop(self._key(k, index))
        self._others.pop((k, index), None)

    @contextmanager
    def skipped(self, k: int, given: Tensor) -> Iterator[None]:
        """Meanwhile a pass of the network skips the blocks before block k, which gets ``given``."""

        def skip(passed: Tensor, *_: Any, number: int, **__: Any) -> Any:
            first, rest = given.clone() if number == k - 1 else passed, self._rests[number]
            return first if rest is None else (first, *rest)

        with replaced_forwards(self.modules[:k], [partial(skip, number=number) for number in range(k)]):
            yield

    def _key(self, k: int, index: int) -> Hashable:
        return id(self), k, index


class ModuleOutputs:
    """What modules of a network gave in each batch, as long as their tensors are what they were.

    Of a module that is kept those inside it are not: they do not run then.  What is larger than the input of
    the block, as inside an MLP, is not kept either: one product finds it again.

    Args:
        network: that holds the modules.
    """

    def __init__(self, network: nn.Module) -> None:
        self._network = network
        self._kept: dict[tuple[str, int], tuple[Tensor, tuple[Any, ...] | None]] = {}
        self._versions: dict[str, list[int]] = {}
        self._room = _OUTPUT_BYTES

    def clear(self) -> None:
        """Forget all outputs."""
        self._kept, self._versions, self._room = {}, {}, _OUTPUT_BYTES

    @contextmanager
    def used(self, index: int, paths: Sequence[str], given: Tensor) -> Iterator[None]:
        """Meanwhile modules give what they gave before in batch ``index``, or it is kept if there is room.

        Args:
            index: of the batch.
            paths: of modules inside a block.
            given: input of that block.
        """
        modules = {path: self._network.get_submodule(path) for path in paths}
        modules = {path: module for path, module in modules.items() if "forward" not in module.__dict__}
        versions = {path: _versions(module) for path, module in modules.items()}
        if any(self._versions.get(path, now) != now for path, now in versions.items()):
            self.clear()
        self._versions |= versions
        known = [path for path in modules if (path, index) in self._kept]
        forwards = [
            partial(copied, kept=kept, rest=rest)
            for kept, rest in (self._kept[path, index] for path in known)
        ]
        keep = partial(self._keep, index=index, most=_nbytes(given))
        with replaced_forwards([modules[path] for path in known], forwards), hooked() as handles:
            for path in modules.keys() - known:
                handles.append(modules[path].register_forward_hook(partial(keep, path=path)))
            yield

    def _keep(self, _: nn.Module, args: Any, output: Any, path: str, index: int, most: int) -> None:
        first, rest = next_input(output), output[1:] if isinstance(output, tuple) else None
        if first is None or _nbytes(first) > most or any(True for _ in tensors_in(rest)):
            return
        inside = [key for key in self._kept if key[0].startswith(f"{path}.") and key[1] == index]
        freed = sum(_nbytes(self._kept[key][0]) for key in inside)
        if _nbytes(first) <= self._room + freed:
            for key in inside:
                del self._kept[key]
            self._room += freed - _nbytes(first)
            self._kept[path, index] = first.clone(), rest  # what comes later may change it


def _versions(module: nn.Module) -> list[int]:
    return [tensor._version for tensors in (module.parameters(), module.buffers()) for tensor in tensors]


def _nbytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def copied(*_: Any, kept: Tensor, rest: tuple[Any, ...] | None = None, **__: Any) -> Any:
    """A forward that gives ``kept``, and ``rest`` beside it where there is one."""
    return kept.clone() if rest is None else (kept.clone(), *rest)


class CutCheck:
    """Whether a chain cuts a network: gradients flow from block to block alone.

    Each block is given its input anew, without a history, and so is what follows the last block.

    Args:
        network: in evaluation mode, no parameter requires a gradient.
        chain: of its blocks.
        before: modules of layers in front of the chain.
    """

    def __init__(self, network: nn.Module, chain: Chain, before: Sequence[str]) -> None:
        self._network = network
        self._blocks = [network.get_submodule(block.module) for block in chain]
        self._before = [network.get_submodule(path) for path in before]
        self._whole = all(block.is_kept_whole for block in chain)
        self._starts: list[Tensor] = []  # of pieces: in front of the chain, each block
        self._others = False  # a block is given a further tensor with a history, or gives one

    def holds(self, run: Callable[[], Tensor]) -> bool:
        """Whether it cuts it.

        Args:
            run: the network on some examples; gives its outputs.
        """
        handles = [module.register_forward_hook(self._mark) for module in self._before]
        for block in self._blocks:
            handles.append(block.register_forward_pre_hook(self._enter, with_kwargs=True))
            handles.append(block.register_forward_hook(self._leave))
        try:
            with torch.enable_grad():
                values = run()
        finally:
            for handle in handles:
                handle.remove()
        if self._others or not self._whole or not values.requires_grad:
            return False
        used = torch.autograd.grad(values.sum(), self._starts, allow_unused=True)
        return all(gradient is None for gradient in used[:-1])

    def _mark(self, _: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if not isinstance(output, Tensor) or not output.is_floating_point():
            return output
        self._starts.append(torch.zeros((), device=output.device, requires_grad=True))
        return output + self._starts[-1].to(output.dtype)

    def _enter(self, _: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> Any:
        self._others |= any(one.requires_grad for one in tensors_in((args[1:], named)))
        self._starts.append(args[0].detach().requires_grad_(True))
        return (self._starts[-1].clone(), *args[1:]), named  # which may be changed in place

    def _leave(self, block: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        first = given_on(output)
        self._others |= any(one is not first for one in tensors_in(output))
        if block is not self._blocks[-1]:
            return output
        self._starts.append(first.detach().requires_grad_(True))
        last = self._starts[-1].clone()
        return (last, *output[1:]) if isinstance(output, tuple) else last
