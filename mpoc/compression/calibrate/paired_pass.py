"""Passes over a dense network and its compressed copy: moments of what each layer is given in both.

Both networks run on the same batches until the last layer that is asked for has its input.  Where blocks form
a chain (:mod:`mpoc.compression.calibrate.trace`), the inputs of the present block are kept for all batches in
both networks.  Only that block then runs again, and the next block's inputs are computed from them.  Within
the block, a layer whose group was asked for before gives what it gave then.  What follows a chain that cuts
the network runs from what the last block gave.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from mpoc.compression.calibrate.block_chain import (
    Example,
    ModuleOutputs,
    copied,
    given_on,
)
from mpoc.compression.calibrate.chain_tracer import (
    Arguments,
    Chain,
    StopPassError,
    arguments_along,
    replaced_forwards,
)
from mpoc.compression.calibrate.layer_inputs import (
    ALL,
    Positions,
    device_of,
    eval_mode,
    first_argument,
    hooked,
)
from mpoc.compression.calibrate.moments import LayerSums, Moments, merge
from mpoc.compression.calibrate.trace import Trace
from mpoc.io.keyed_store import Scratch
from mpoc.models.call import Batch, Call, to_device
from mpoc.runtime.distributed import SINGLE_PROCESS, BatchShards, ProcessGroup

_KEPT_BYTES = 2 * 1024**3
Matrices: TypeAlias = Mapping[str, Callable[[], Tensor]]  # weights as matrices (N_y, N_x) float64, by name


@dataclass
class _State:
    """The first argument of a block, and the further ones of it and of those behind it."""

    given: Tensor
    others: Sequence[Arguments]


class _Runner:
    """Runs one network on the batches, from its start or from a block on."""

    def __init__(
        self,
        network: nn.Module,
        call: Call,
        batches: Sequence[Batch],
        mine: Sequence[int],
        trace: Trace,
        scratch: Scratch,
    ) -> None:
        self._scratch = scratch
        self.network, self._call, self._batches, self._trace = network, call, batches, trace
        self._device = device_of(network)
        self._mine = mine
        self._at: tuple[int, int] | None = None
        self._others: dict[int, Sequence[Arguments]] = {}  # batch → further ones of the kept block and on
        self._outputs = ModuleOutputs(network)
        self._rests: dict[str, Any] = {}  # block → what it gives beside a tensor; None: a tensor alone
        self.final: Sequence[str] = ()  # modules behind the kept inputs that, and all before them, are final

    def move(self, position: tuple[int, int] | None) -> None:
        """Keep the inputs of the block at (chain, position) for this process's batches; None: of no block.

        Behind the last block stands what it gave, once :meth:`can_reach_the_end`.
        """
        if position == self._at:
            return
        old, self._at = self._at, None
        if position is not None and old is not None and old[0] == position[0] and old[1] < position[1]:
            chain = self._trace.chains[position[0]][old[1] : position[1]]
            for number in self._mine:
                kept = self._kept(number)
                with self._outputs.used(number, self.final, kept.given):
                    self._scratch.put(self._key(number), [self._through(chain, kept)])
                self._others[number] = kept.others[len(chain) :]
        else:
            self._others.clear()
            for number in self._mine:
                self._scratch.drop(self._key(number))
                if position is not None:
                    state = self._caught(self._batches[number], position)
                    self._scratch.put(self._key(number), [state.given])
                    self._others[number] = state.others
        self._at, self.final = position, ()
        self._outputs.clear()

    def _key(self, index: int) -> tuple[int, int]:
        return id(self), index

    def _kept(self, index: int) -> _State:
        return _State(self._scratch.get(self._key(index))[0], self._others[index])

    def run(self, index: int, last: int | None = None) -> None:
        """Run batch ``index`` until a hook stops it: as a whole, or from the kept block to block ``last``."""
        with suppress(StopPassError):
            if self._at is None:
                self._call(self.network, to_device(self._batches[index], self._device))
                return
            chain, position = self._trace.chains[self._at[0]], self._at[1]
            end = None if last is None else last + 1
            if position == len(chain):
                self._run_tail(chain, index)
            kept = self._kept(index)
            with self._outputs.used(index, self.final, kept.given):
                self._through(chain[position:end], kept)

    def _run_tail(self, chain: Chain, index: int) -> None:
        """Run the network with every block giving what the last one gave, which alone is used further on."""
        given, rests = self._kept(index).given, [self._rests[block.module] for block in chain]
        blocks = [self.network.get_submodule(block.module) for block in chain]
        forwards = [partial(copied, kept=given, rest=rest) for rest in rests]
        with replaced_forwards(blocks, forwards):
            self._call(self.network, to_device(self._batches[index], self._device))

    def can_reach_the_end(self, number: int) -> bool:
        """Whether all blocks of chain ``number`` in front of the kept inputs have run."""
        if self._at is None or self._at[0] != number:
            return False
        return all(block.module in self._rests for block in self._trace.chains[number][: self._at[1]])

    def state(self, index: int, position: tuple[int, int]) -> _State:
        """The arguments of a block in batch ``index``: kept, or computed again from the start."""
        kept = self._at == position and index in self._others
        return self._kept(index) if kept else self._caught(self._batches[index], position)

    def output(self, index: int, position: tuple[int, int]) -> Tensor:
        """The output of that block."""
        block = self._trace.chains[position[0]][position[1]]
        return self._through((block,), self.state(index, position))

    def _through(self, chain: Chain, state: _State) -> Tensor:
        given = state.given
        for block, (args, named) in zip(chain, state.others, strict=False):
            output = self.network.get_submodule(block.module)(given, *args, **named)
            self._rests[block.module] = output[1:] if isinstance(output, tuple) else None
            given = given_on(output)
        return given

    def _caught(self, batch: Batch, position: tuple[int, int]) -> _State:
        """The arguments of a block and of those behind it, computed from the start of the network."""
        blocks = self._trace.chains[position[0]][position[1] :]
        given = to_device(batch, self._device)
        return _State(*arguments_along(self.network, blocks, lambda: self._call(self.network, given)))


@dataclass(frozen=True)
class Replay:
    """Which inputs of blocks are kept, so that a pass need not begin at the start of the network."""

    enabled: bool = True  # where blocks form a chain
    kept_bytes: int = _KEPT_BYTES  # of both networks together, at most; else nothing is kept in memory alone
    all_batches: bool = False  # also those of other processes, for :meth:`PairedPass.examples`
    scratch: Scratch | None = None  # that holds them; None: memory
    cuts: bool = False  # the longest chain cuts the network


class PairedPass:
    """Passes of a dense network and of one that is being compressed, group by group.

    Groups are asked for in the trace's order.  Of the compressed network whatever runs before a group must be
    final by then, since inputs of blocks are kept from it.

    Args:
        networks: the dense one in evaluation mode, left as it is, and the compressed one: the same but for
            weights that were replaced, on any device.
        call: how both are called.
        batches: of calibration data.
        trace: of the dense network.
        positions: of convolutions.
        replay: which inputs of blocks are kept.
        group: the processes that share the batches, and ask for the same groups of layers.
    """

    def __init__(
        self,
        networks: tuple[nn.Module, nn.Module],
        call: Call,
        batches: Sequence[Batch],
        trace: Trace,
        positions: Positions = ALL,
        replay: Replay = Replay(),
        group: ProcessGroup = SINGLE_PROCESS,
    ) -> None:
        self._trace, self._batches, self._positions, self._replay = trace, batches, positions, replay
        self._shards = BatchShards(len(batches), group)
        mine = range(len(batches)) if replay.all_batches else self._shards.mine
        scratch = replay.scratch or Scratch()
        self._runners = [_Runner(network, call, batches, mine, trace, scratch) for network in networks]
        self._device = device_of(networks[1])

    def moments(
        self,
        group: Sequence[str],
        dense: Mapping[str, Moments] | None = None,
        matrices: Matrices | None = None,
    ) -> dict[str, Moments]:
        """Moments of the inputs of a group of weights, in both networks.

        Where the network chooses a layer's rows, or both give it different ones, those of the compressed
        network stand for both: the layer then does for them what its weight did.

        Args:
            group: of weights, one of ``trace.groups`` or a part of one.
            dense: by weight, of the dense network on the same batches and positions: E[xxᵀ] is taken from
                there in the place of being summed again.
            matrices: the weights, where E[(W x) x̃ᵀ] is enough if outputs are few.

        Returns:
            Moments by weight; none of a weight that the data give no rows in the compressed network.
        """
        first = {name: self._trace.same_rows[name] for name in group}
        names = sorted(set(first.values()), key=list(self._trace.layers).index)
        paired = [name for name in names if name not in self._trace.families]
        alone = [name for name, rows in first.items() if list(first.values()).count(rows) == 1]
        few = [name for name in alone if self._trace.has_few_outputs(self._runners[0].network, name)]
        weights = {name: matrix() for name, matrix in (matrices or {}).items() if name in few}
        sums = self._summed(paired, both=True, dense_second=dense is None, weights=weights)
        total = {name: moments for name, moments in sums.items() if moments is not None}
        if dense is not None:
            total = {
                name: replace(m, dense_second=dense[name].dense_second) if isinstance(m.second, Tensor) else m
                for name, m in total.items()
            }
        rest = self._summed([name for name in names if name not in total], both=False)
        total |= {name: moments for name, moments in rest.items() if moments is not None}
        return {name: total[first[name]] for name in group if first[name] in total}

    def _summed(
        self,
        names: Sequence[str],
        both: bool,
        dense_second: bool = True,
        weights: Mapping[str, Tensor] = {},
    ) -> dict[str, Moments | None]:
        """Moments over all batches, in both networks or in the compressed one.

        Args:
            names: of weights that are not given the same rows.
            both: whether the dense network runs too.
            dense_second: whether its second moments are wanted.
            weights: those that alone multiply their rows, as matrices.

        Returns:
            By weight; None where the networks give it different numbers of rows.
        """
        if not names:
            return {}
        position = self._start_position(list(names))
        final = self._trace.modules_before(names, position)

        def measure(part: range) -> dict[str, Moments | None]:
            layers, parts = self._trace.layers, len(self._shards.every)
            sums = {name: LayerSums(layers[name], dense_second, parts, weights.get(name)) for name in names}
            unlike: set[str] = set()
            with torch.no_grad(), eval_mode(self._runners[0].network), eval_mode(self._runners[1].network):
                for runner in self._runners:
                    runner.move(position)
                    runner.final = final
                for index in part:
                    unlike |= self._add(index, sums, both)
            moments = {name: layer_sums.moments() for name, layer_sums in sums.items()}
            known: dict[str, Moments | None] = {n: one for n, one in moments.items() if one is not None}
            return known | dict.fromkeys(unlike)

        def both_parts(one: Moments | None, other: Moments | None) -> Moments | None:
            return None if one is None or other is None else merge(one, other, dense_second=dense_second)

        return self._shards.total(measure, both_parts)

    def examples(self, position: tuple[int, int]) -> Sequence[Example]:
        """The batches at a block: its input in the compressed network, its output in the dense one.

        All are kept if with the targets they take at most ``kept_bytes``; else each is found when it is
        asked for, from the start of the networks.

        Args:
            position: chain and position of a block whose input nothing changes; what runs before it is final.
        """
        dense, compressed = self._runners
        examples = _Examples(dense, compressed, self._batches, position, self._trace.axis(position))
        kept = self._replay.enabled and self._fits(position, 3)
        with torch.no_grad(), eval_mode(dense.network), eval_mode(compressed.network):
            for runner in self._runners:
                runner.move(position if kept else None)
        return list(examples) if kept else examples

    def forget(self) -> None:
        """Drop the inputs of blocks that are kept."""
        for runner in self._runners:
            runner.move(None)

    def _fits(self, position: tuple[int, int], copies: int) -> bool:
        share = self._trace.share_of(self._batches)
        block = self._trace.chains[position[0]][: position[1] + 1][-1]
        nbytes, scratch = int(copies * block.nbytes * share), self._replay.scratch
        return nbytes <= self._replay.kept_bytes or (scratch is not None and scratch.has_room(nbytes))

    def _add(self, index: int, sums: dict[str, LayerSums], both: bool) -> set[str]:
        """Add the inputs in one batch; return the layers to which the networks give different numbers."""
        compressed = self._inputs(self._runners[1], index, list(sums))
        original = self._inputs(self._runners[0], index, list(sums)) if both else {}
        mask = self._batches[index].get("attention_mask")
        mask = None if mask is None else mask.to(self._device)
        sample, unlike = self._positions.of(index), set()
        for name, layer_sums in sums.items():
            dense: Sequence[Tensor | None] = original.get(name, [None] * len(compressed[name]))
            if both and [_shape(one) for one in dense] != [_shape(one) for one in compressed[name]]:
                unlike.add(name)
                continue
            for given, other in zip(compressed[name], dense, strict=True):
                layer_sums.add(given, mask, sample, None if other is None else other.to(self._device))
        return unlike

    def _inputs(self, runner: _Runner, index: int, names: list[str]) -> dict[str, list[Tensor]]:
        """The inputs of each layer in one network and batch, call by call."""
        inputs: dict[str, list[Tensor]] = {name: [] for name in names}
        left = sum(self._trace.calls[name] for name in names)
        often = any(name in self._trace.families or self._trace.calls[name] > 1 for name in names)

        def hook(name: str) -> Callable[..., None]:
            def see(_: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
                nonlocal left
                inputs[name].append(first_argument(args, named).clone())  # what comes later may change it
                left -= 1
                if left == 0 and not often:  # else other batches may call a layer more often, or less
                    raise StopPassError

            return see

        with hooked() as handles:
            for name in names:
                for path in self._trace.layers[name].modules:
                    module = runner.network.get_submodule(path)
                    handles.append(module.register_forward_pre_hook(hook(name), with_kwargs=True))
            runner.run(index, self._trace.last_block(names))
        return inputs

    def _start_position(self, names: list[str]) -> tuple[int, int] | None:
        """The block to start from: the last one at or before the layers whose input can be kept."""
        positions = [self._trace.positions.get(name) for name in names]
        known = [position_of for position_of in positions if position_of is not None]
        if not known and self._replay.enabled and self._replay.cuts:
            return self._end(names)
        if not self._replay.enabled or len(known) < len(names) or len({chain for chain, _ in known}) > 1:
            return None
        chain, position = min(known)
        for k in range(position, -1, -1):
            if self._trace.chains[chain][k].is_kept_whole:
                return (chain, k) if self._fits((chain, k), 2) else None
        return None

    def _end(self, names: Sequence[str]) -> tuple[int, int] | None:
        """Behind the last block of the longest chain, where all of these layers follow it."""
        pieces = self._trace.pieces
        if pieces is None or any(pieces.of.get(name) != len(pieces.chain) for name in names):
            return None
        end = self._trace.chains.index(pieces.chain), len(pieces.chain)
        reached = all(runner.can_reach_the_end(end[0]) for runner in self._runners)
        return end if reached and self._fits(end, 2) else None


def _shape(tensor: Tensor | None) -> torch.Size | None:
    return None if tensor is None else tensor.shape


class _Examples(Sequence[Example]):
    """Examples that are computed when they are asked for."""

    def __init__(
        self,
        dense: _Runner,
        compressed: _Runner,
        batches: Sequence[Batch],
        position: tuple[int, int],
        axis: int,
    ) -> None:
        self._dense, self._compressed, self._batches = dense, compressed, batches
        self._start_position, self._axis = position, axis

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, index: Any) -> Any:
        mask = self._batches[index].get("attention_mask")
        device = device_of(self._compressed.network)
        with torch.no_grad(), eval_mode(self._dense.network), eval_mode(self._compressed.network):
            target = self._dense.output(index, self._start_position)
            state = self._compressed.state(index, self._start_position)
        mask = None if mask is None else mask.to(device)
        return Example(state.given, *state.others[0], target, mask, self._axis)
