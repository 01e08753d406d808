"""Statistics of a dense network on calibration data: what fits of its layers are made from.

The dense network is measured once, whatever the goal and the number of trials.  For each layer there is then
an objective: second moments of its inputs, and of gradients at its outputs.  As layers are compressed, the
statistics run the compressed network beside the dense one, and give the inputs that a layer really gets.

The mean of a layer's error costs nothing to correct: its bias takes it up, or the running mean of the batch
norm right behind it, where no other layer uses that tensor.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, reduce
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from mpoc.compression.calibrate.block_chain import ChainInputs, Example
from mpoc.compression.calibrate.cache import DensePass, cached_or_measured, calibration_fingerprint
from mpoc.compression.calibrate.calibration_data import CalibrationData, CalibrationRequest
from mpoc.compression.calibrate.chain_tracer import Chain
from mpoc.compression.calibrate.dense_pass import Probes, cutting_chain, dense_pass
from mpoc.compression.calibrate.layer_inputs import (
    ConvInputs,
    EmbeddingInputs,
    ObservedLayer,
    Positions,
    TransposedInputs,
    eval_mode,
    unseen_weights,
)
from mpoc.compression.calibrate.moments import Moments, merge, shrunk, with_seconds
from mpoc.compression.calibrate.objective import (
    EmbeddingObjective,
    GroupedObjective,
    LayerObjective,
    Objective,
    TransposedObjective,
)
from mpoc.compression.calibrate.paired_pass import Matrices, PairedPass, Replay
from mpoc.compression.calibrate.taps import add_taps
from mpoc.compression.calibrate.trace import UNREACHED, Trace, trace_batches
from mpoc.compression.run_context import Progress, RunContext, Workload, runs_again
from mpoc.models.call import Batch, first_output, num_examples, to_device
from mpoc.models.introspection import copy_sharing_parameters, same_tensor, set_tensors, state_of
from mpoc.runtime.device import release_freed_memory
from mpoc.train.evaluate import try_call

_WIDEST = 12_288  # outputs: the second moment of gradients there is the square of that, in float64
_PROBES = 2  # random directions in the output, a batch
_KEPT_BYTES = 256 * 1024**2  # of the inputs of blocks in held-out batches
_POSITIONS = 64  # of a convolution, an example: more are nearly the same rows again
_WIDE = 1024  # inputs from which on passes leave much memory behind


@dataclass(frozen=True)
class MeanCorrection:
    """The tensor of the checkpoint that corrects the mean of a layer's error."""

    name: str
    sign: int  # 1: a bias; -1: the running mean of a batch norm


def mean_corrections(
    network: nn.Module, trace: Trace, weights: Mapping[str, str], places: Mapping[str, str]
) -> dict[str, MeanCorrection]:
    """The corrections of those weights that have a tensor for it which no other layer uses.

    Args:
        network: dense.
        trace: of this network.
        weights: those to be fitted: name in the network → in the checkpoint.
        places: of all tensors: name in the checkpoint → in the network.

    Returns:
        Corrections by the weight's name in the checkpoint.
    """
    named = {inner: name for name, inner in places.items()}
    corrections, tied = {}, same_tensor(network)
    for weight, name in weights.items():
        path, _, own = weight.rpartition(".")
        bias = f"{path}.{own.replace('weight', 'bias')}".lstrip(".")
        norm = trace.norms.get(weight)
        layer = trace.layers.get(weight)
        if layer is None or len(layer.modules) > 1:
            continue
        if (
            bias != weight
            and bias in named
            and len(tied[bias]) == 1
            and _has_own_bias(own, trace.calls[weight])
        ):
            corrections[name] = MeanCorrection(named[bias], 1)
        elif norm is not None and f"{norm}.running_mean" in named:
            corrections[name] = MeanCorrection(named[f"{norm}.running_mean"], -1)
    return corrections


def _has_own_bias(weight: str, calls: int) -> bool:
    """Whether all of a bias is added wherever its weight is used: one of attention may be used in parts."""
    return weight != "in_proj_weight" or calls == 1


class CalibrationStatistics:
    """Statistics of the layers of a dense network on calibration data.

    Weights and tensors go by their names in the checkpoint.

    Args:
        data: the network and the batches.
        request: what is to be done with them.
        names: of the weights that are to be fitted.
        context: the device, and the processes that share the work, with the same arguments.
        seed: of output probes and of positions of convolutions.
        skipped: weights that are not measured, and why.

    Raises:
        UsageError: the network does not take such data.
        MpocError: a network that gives numbers that are not finite, or a damaged file of moments.
    """

    def __init__(
        self,
        data: CalibrationData,
        request: CalibrationRequest,
        names: Iterable[str],
        context: RunContext,
        seed: int = 0,
        skipped: Mapping[str, str] | None = None,
    ) -> None:
        self.data, self._request, self.context, self._seed = data, request, context, seed
        self.network, self.places = data.network.to(context.device), data.places
        self.refines, self.notes = request.refine, list(data.notes)
        self._positions, self.scratch = Positions(_POSITIONS, seed), request.make_scratch()
        with context.group.all_or_raise():
            self._find_layers(list(names), skipped or {})
        self._dense, start = self._kept_pass(), perf_counter()
        self._held_out = self._pass(
            data.held_out, Probes(0, pooling=data.pooling), replace(context, progress=Progress())
        )
        counts = [sum(map(num_examples, part)) for part in (data.batches, data.held_out)]
        # Of a forward pass of the dense network over all examples, with the moments of inputs
        self.pass_seconds = (perf_counter() - start) * sum(counts) / counts[1]
        self.means = mean_corrections(self.network, self._trace, self._named, self.places)
        self._compressed: nn.Module | None = None  # the network of the paired passes
        self.kept: dict[Any, Any] = {}  # what follows from the statistics and holds for every budget
        self._passes: list[PairedPass] = []

    def _find_layers(self, names: list[str], skipped: Mapping[str, str]) -> None:
        """Run the network once, to trace which weight is used where."""
        self._reasons = {name: why for name in names if (why := skipped.get(name) or self._why_not(name))}
        self._named = {self.places[name]: name for name in names if name not in self._reasons}
        add_taps(self.network, unseen_weights(self.network, self._named))
        first = {name: values[:1] for name, values in self.data.batches[0].items()}
        with eval_mode(self.network), torch.no_grad():
            first_output(try_call(self.data.call, self.network, to_device(first, self.context.device)))
        self._trace: Trace = trace_batches(self.network, self.data.call, self.data.batches, self._named)
        unreached = [name for name, why in self._trace.reasons.items() if why == UNREACHED]
        if uncalled := [name for name in unreached if self.network.get_parameter(name).dim() == 2]:
            add_taps(self.network, uncalled)  # of layers whose weight is read in the place of calling them
            self._trace = trace_batches(self.network, self.data.call, self.data.batches, self._named)

    @cached_property
    def workload(self) -> Workload:
        """The work of the fits, by the shapes of all layers and the rows that they take."""
        works = self._trace.work(self.network, self.data.batches, self._positions)
        named = {self._named[weight]: work for weight, work in works.items()}
        pieces = self._trace.positions if self._trace.pieces is None else self._trace.pieces.of
        again = runs_again(self._trace.groups, pieces.get)
        again = {self._named[weight]: share for weight, share in again.items()}
        return Workload(named, self._request.effort, self.context.group.size, again)

    def network_to_compress(self) -> nn.Module:
        """A copy of the network; it shares the dense weights until :meth:`set` gives it others."""
        return copy_sharing_parameters(self.network)

    def set(self, compressed: nn.Module, tensors: Mapping[str, Tensor]) -> None:
        """Set tensors of a network to compress, by names in the checkpoint; in scratch files if it may."""
        new = {self.places[name]: tensor for name, tensor in tensors.items() if name in self.places}
        state = state_of(compressed)
        held = {place: tensor.detach().to(state[place]) for place, tensor in new.items()}
        set_tensors(compressed, {place: self.scratch.mapped(tensor) for place, tensor in held.items()})

    @property
    def scratch_bytes(self) -> int:
        """Bytes that a scratch folder would hold at most."""
        between = max((block.nbytes for chain in self._trace.chains for block in chain), default=0)
        return self.scratch.most + int(2 * between * self._trace.share_of(self.data.batches))  # of both

    def facts(self) -> dict[str, Any]:
        """What it was calibrated on, for the manifest."""
        return {
            "data": {"name": self.data.name},
            "samples": sum(map(num_examples, self.data.batches)),
            "held_out": sum(map(num_examples, self.data.held_out)),
            "unseen": sum(map(num_examples, self.data.unseen)),
        }

    def _why_not(self, name: str) -> str:
        """Why a weight is not measured; empty if it is."""
        parameters = dict(self.network.named_parameters(remove_duplicate=False))
        if self.places.get(name) not in parameters:
            return "not in the network"
        shape = parameters[self.places[name]].shape
        outputs, inputs = shape[0], shape[1:].numel()
        module = self.network.get_submodule(self.places[name].rpartition(".")[0])
        widest = inputs if isinstance(module, nn.Embedding) else max(outputs, inputs)
        if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d):
            widest = outputs  # moments of wide inputs are kept as rows
        return f"wider than {_WIDEST:,}" if widest > _WIDEST else ""

    @property
    def groups(self) -> list[list[str]]:
        """Weights whose inputs are known, those of one input together, in the order of the network."""
        known = ([self._named[w] for w in group if self._is_known(w)] for group in self._trace.groups)
        return [group for group in known if group]

    @property
    def reasons(self) -> dict[str, str]:
        """Weight → why nothing is known of its inputs."""
        reasons = self._reasons | {self._named[weight]: why for weight, why in self._trace.reasons.items()}
        for weight in self._trace.layers:
            if weight not in self._dense.moments:
                reasons[self._named[weight]] = "the calibration data give it no rows"
            elif not self._is_known(weight):
                reasons[self._named[weight]] = "no gradient of the output reaches it"
        return reasons

    def dense_objective(self, name: str) -> Objective:
        """The objective of a layer on the dense network's inputs alone."""
        weight = self.places[name]
        return self._objective(name, self._dense.moments[weight], self._held_out_moments(weight))

    def objectives(
        self, compressed: nn.Module | None, group: Sequence[str], matrices: Matrices | None = None
    ) -> dict[str, Objective]:
        """The objectives of a group of layers, on the inputs that ``compressed`` gives them.

        Args:
            compressed: final in all that runs before the group; another network than before starts over.
                None: the dense network stands for it.
            group: one of :attr:`groups`, in their order.
            matrices: of the layers, if their objectives are for no other weights.
        """
        if compressed is None or self._is_table(self.places[group[0]]):
            return {name: self.dense_objective(name) for name in group}
        release_freed_memory()  # of the group before
        passes = self._pair(compressed)
        weights = [self.places[name] for name in group]
        known = {self.places[name]: matrix for name, matrix in (matrices or {}).items()}
        fit = passes[0].moments(weights, self._dense.moments, known)
        held_out = passes[1].moments(weights, self._held_out.moments, known)
        for weight in weights:
            if weight not in fit:
                fit[weight] = self._dense.moments[weight]
            if weight not in held_out:
                held_out[weight] = self._held_out_moments(weight)
        if any(moments.mean.shape[-1] > _WIDE for moments in fit.values()):
            fit = with_seconds(fit, self.scratch.mapped)
            release_freed_memory()  # of the passes
        pairs = zip(group, weights, strict=True)
        return {name: self._objective(name, fit[weight], held_out[weight]) for name, weight in pairs}

    def _held_out_moments(self, weight: str) -> Moments:
        """Moments of held-out inputs in the dense network; those of the fit where there are none."""
        known = self._held_out if weight in self._held_out.moments else self._dense
        return known.moments[weight]

    def position_of(self, weight: str) -> tuple[int, int] | None:
        """Chain and position of the block that alone uses a weight, once, and leaves its input unchanged."""
        position = self._trace.positions.get(weight)
        if position is None or self._trace.calls[weight] > 1:
            return None
        return position if self._trace.chains[position[0]][position[1]].is_kept_whole else None

    def block(self, position: tuple[int, int]) -> str:
        """The module at a position of a chain."""
        return self._trace.chains[position[0]][position[1]].module

    def metric(self, position: tuple[int, int]) -> Tensor | None:
        """G (width, width) at the output of a block, to a factor; None where it is not known."""
        gradients = self._dense.blocks.get(self.block(position))
        return None if gradients is None else gradients.to(self.context.device)

    def examples(
        self, compressed: nn.Module, position: tuple[int, int]
    ) -> tuple[Sequence[Example], Sequence[Example]]:
        """What a block is given in ``compressed`` and what it gives in the dense network; also held out.

        Args:
            compressed: as :meth:`objectives` takes it.
            position: of the block.
        """
        fit, held_out = self._pair(compressed)
        return fit.examples(position), held_out.examples(position)

    def held_out_inputs(self) -> tuple[ChainInputs, dict[str, int]]:
        """Where the inputs of a chain's blocks in held-out batches are kept, and the block of each layer.

        Without a chain that cuts the network, or without room for the inputs, there are no blocks.
        """
        data, pieces, chain = self.data, self._trace.pieces, self._chain
        nbytes = int(sum(block.nbytes for block in chain) * self._trace.share_of(data.held_out))
        if nbytes > _KEPT_BYTES and not self.scratch.has_room(nbytes):
            chain = ()
        blocks = pieces.of if pieces is not None and chain else {}
        own = {self._named[weight]: block for weight, block in blocks.items()}
        return ChainInputs(self.network, chain, self.scratch), own

    @cached_property
    def _chain(self) -> Chain:
        data = self.data
        return cutting_chain(self.network, data.call, data.held_out, self._trace, data.pooling)

    def _pair(self, compressed: nn.Module) -> list[PairedPass]:
        if compressed is not self._compressed:
            for passes in self._passes:  # what was kept of the other one goes first
                passes.forget()
            self._compressed, self._passes = compressed, []
            parts, networks = (self.data.batches, self.data.held_out), (self.network, compressed)
            refines = self.refines and self.context.group.is_main  # who refines needs all
            replay = Replay(all_batches=refines, scratch=self.scratch, cuts=bool(self._chain))
            how = self._positions, replay, self.context.group
            self._passes = [
                PairedPass(networks, self.data.call, batches, self._trace, *how) for batches in parts
            ]
        return self._passes

    @property
    def folder(self) -> Path | None:
        """Where to keep intermediate results, to resume from; None: nowhere."""
        return self._request.folder

    @cached_property
    def fingerprint(self) -> dict[str, str]:
        """Digests of all that these statistics depend on, as the main process computes them."""
        return self.context.group.on_main(
            lambda: self._fingerprint([*self.data.batches, *self.data.held_out, *self.data.unseen])
        )

    def _fingerprint(self, batches: Sequence[Batch]) -> dict[str, str]:
        return calibration_fingerprint(
            self.network, self.data.call, batches, self.data.pooling, names=list(self._named),
            probes=_PROBES, positions=self._positions, seed=self._seed, blocks=self.refines,
        )  # fmt: skip

    def _kept_pass(self) -> DensePass:
        """The dense pass over the examples of the fit, from a file of moments if one fits."""
        batches, path = self.data.batches, self._request.moments
        if path is None and self.folder is not None:
            path = self.folder / "moments.safetensors"

        def measure() -> DensePass:
            probes = Probes(_PROBES, self._seed, self.refines, self.data.pooling)
            context = replace(self.context, later=self.workload.after_reading())
            return self._pass(batches, probes, context)

        if path is None:
            return measure()
        parts = self.context.group.on_main(lambda: self._fingerprint(batches))
        own = self._request.moments is None
        dense, note = cached_or_measured(
            path, parts, self.network, self._trace, measure, self.context.group, own, self.scratch
        )
        if not own:
            self.notes.append(f"moments: {sum(map(num_examples, batches)):,} examples {note}")
        return dense

    def _pass(self, batches: Sequence[Batch], probes: Probes, context: RunContext) -> DensePass:
        call = self.data.call
        return dense_pass(
            self.network, call, batches, self._trace, probes, self._positions, context, self.scratch
        )

    def _shrunk(self, weight: str, moments: Moments) -> Moments:
        """The moments of an expert, moved towards those of all experts the more the fewer rows it has."""
        family = self._trace.families.get(weight)
        if family is None:
            return moments
        siblings = [name for name, other in self._trace.families.items() if other == family]
        known = [self._dense.moments[name] for name in siblings if name in self._dense.moments]
        return shrunk(moments, reduce(merge, known))

    def _is_known(self, weight: str) -> bool:
        if weight not in self._dense.moments:
            return False
        needs_gradients = self._is_table(weight) or self._is_transposed(weight)
        return not needs_gradients or weight in self._dense.gradients

    def _is_transposed(self, weight: str) -> bool:
        return isinstance(self._trace.layers[weight].inputs, TransposedInputs)

    def _is_table(self, weight: str) -> bool:
        return isinstance(self._trace.layers[weight].inputs, EmbeddingInputs)

    def _objective(self, name: str, moments: Moments, held_out: Moments) -> Objective:
        outputs = self._dense.gradients.get(self.places[name])
        outputs = None if outputs is None else outputs.to(self.context.device)
        moments = self._shrunk(self.places[name], moments)
        both = moments.on(self.context.device), held_out.on(self.context.device)
        if self._is_table(self.places[name]):
            assert outputs is not None, "else it is fitted by its weight alone"
            return EmbeddingObjective(*both, outputs)
        if self._is_transposed(self.places[name]):
            assert outputs is not None, "else it is fitted by its weight alone"
            return TransposedObjective(*both, outputs)
        if _has_groups(self._trace.layers[self.places[name]]):
            known = len(self.network.get_parameter(self.places[name])) if outputs is None else outputs
            return GroupedObjective.of(*both, known, name in self.means)
        return LayerObjective(*both, outputs, name in self.means)


def _has_groups(layer: ObservedLayer) -> bool:
    return isinstance(layer.inputs, ConvInputs) and layer.inputs.groups > 1
