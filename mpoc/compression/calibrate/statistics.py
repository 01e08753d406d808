"""What takes up the mean of a layer's error: its bias, or the running mean of the batch norm behind it.

A dense network on calibration data: what is known of its layers, before any is compressed and then.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mpoc.compression.calibrate.cache import cached_or_measured, calibration_fingerprint
from mpoc.compression.calibrate.calibration_data import TOKENS, CalibrationData, open_calibration
from mpoc.compression.calibrate.dense_pass import DensePass, StageCallback, dense_pass
from mpoc.compression.calibrate.layer_inputs import eval_mode
from mpoc.compression.calibrate.moments import Moments, Positions
from mpoc.compression.calibrate.objective import EmbeddingObjective, LayerObjective, Objective
from mpoc.compression.calibrate.paired_pass import PairedPass
from mpoc.compression.calibrate.trace import Example, Trace, trace
from mpoc.models.call import Batch, to_device
from mpoc.models.introspection import same_tensor
from mpoc.models.loading import open_model
from mpoc.runtime.distributed import SINGLE_PROCESS, ProcessGroup
from mpoc.train.evaluate import try_call
from mpoc.train.settings import DataOptions

_WIDEST = 12_288  # outputs or inputs: the second moments are squares of that, in float64
_PROBES = 2  # random directions in the output, a batch
_TOKENS_TO_REFINE = 512  # of a batch: more steps are worth more than wide ones
_POSITIONS = 64  # of a convolution, an example: more are nearly the same rows again


@dataclass(frozen=True)
class MeanCorrection:
    """The tensor of the checkpoint that takes up the mean of a layer's error."""

    name: str
    sign: int  # 1: a bias; -1: the running mean of a batch norm


def mean_corrections(
    network: nn.Module, trace: Trace, weights: Mapping[str, str], places: Mapping[str, str]
) -> dict[str, MeanCorrection]:
    """By the weight's name in the checkpoint, where there is such a tensor that no other layer uses.

    Args:
        network: that runs.
        trace: of this network.
        weights: those of interest, from the place in the network to the name in the checkpoint.
        places: of all tensors, from the name in the checkpoint to the place in the network.
    """
    named = {place: name for name, place in places.items()}
    found, tied = {}, same_tensor(network)
    for weight, name in weights.items():
        bias = weight.removesuffix("weight") + "bias"
        norm = trace.norms.get(weight)
        layer = trace.layers.get(weight)
        if layer is None or len(layer.modules) > 1:
            continue
        if weight.endswith("weight") and bias in named and len(tied[bias]) == 1:
            found[name] = MeanCorrection(named[bias], 1)
        elif norm is not None and f"{norm}.running_mean" in named:
            found[name] = MeanCorrection(named[f"{norm}.running_mean"], -1)
    return found


@dataclass(frozen=True)
class CalibrationRequest:
    """On what to calibrate."""

    data: Path
    samples: int = 512
    refine: bool = False  # the layers of each block together, once all are fitted
    moments: Path | None = None  # file to keep what is measured of the dense network in
    folder: Path | None = None  # to keep what is found before layers are fitted, and go on from it


class CalibrationStatistics:
    """Weights and tensors go by their names in the checkpoint.

    Args:
        source: the checkpoint.
        arch: its network, as ``--arch`` names it; None where the checkpoint says it.
        request: on what to calibrate.
        names: of the weights that are to be fitted.
        seed: of the examples drawn, and of output probes.
        device: to compute on.
        unseen: weights that are not looked at, and why.
        tell: called as the work goes on.
        processes: the processes that share the work, with the same arguments.

    Raises:
        UsageError: no architecture is known, or the network does not take such data.
        MpocError: bad data, a network that gives numbers that are not finite, or a damaged file of moments.
    """

    def __init__(
        self,
        source: Path,
        arch: str | None,
        request: CalibrationRequest,
        names: Iterable[str],
        seed: int,
        device: torch.device,
        unseen: Mapping[str, str] | None = None,
        tell: StageCallback | None = None,
        processes: ProcessGroup = SINGLE_PROCESS,
    ) -> None:
        self._request, self._seed = request, seed
        self.refines, self.tell, self.device, self.processes = request.refine, tell, device, processes
        self._positions = Positions(_POSITIONS, seed)
        with processes.all_or_raise():
            self._open(source, arch, list(names), unseen or {})
        self.notes = list(self.data.notes)
        self._dense = self._kept_pass()
        self._held_out = self._pass(self.data.held_out, 0)
        self.means = mean_corrections(self.network, self._trace, self._named, self.places)
        self._compressed: nn.Module | None = None  # which the passes are of
        self.kept: dict[Any, Any] = {}  # what is told from it and holds for every budget
        self._passes: list[PairedPass] = []

    def _open(self, source: Path, arch: str | None, names: list[str], unseen: Mapping[str, str]) -> None:
        """Network, data, and which weight is used where."""
        model = open_model(source, arch)
        self.places = model.places  # name in the checkpoint → in the network
        self.network = model.network.to(self.device)
        self.data: CalibrationData = open_calibration(
            DataOptions(self._request.data),
            model,
            self._request.samples,
            seed=self._seed,
            tokens=_TOKENS_TO_REFINE if self.refines else TOKENS,
        )
        self._reasons = {name: why for name in names if (why := unseen.get(name) or self._why_not(name))}
        self._named = {self.places[name]: name for name in names if name not in self._reasons}
        first = {name: values[:1] for name, values in self.data.batches[0].items()}
        with eval_mode(self.network), torch.no_grad():
            try_call(self.data.call, self.network, to_device(first, self.device))
        self._trace: Trace = trace(self.network, self.data.call, self.data.batches[0], self._named)

    def facts(self) -> dict[str, Any]:
        """What it was calibrated on, for the manifest."""
        return {
            "data": {"name": self._request.data.resolve().name},
            "samples": _count(self.data.batches),
            "held_out": _count(self.data.held_out),
        }

    def _why_not(self, name: str) -> str:
        """Why a weight is not looked at; empty where it is."""
        parameters = dict(self.network.named_parameters(remove_duplicate=False))
        if self.places.get(name) not in parameters:
            return "not in the network"
        shape = parameters[self.places[name]].shape
        outputs, inputs = shape[0], shape[1:].numel()
        module = self.network.get_submodule(self.places[name].rpartition(".")[0])
        widest = inputs if isinstance(module, nn.Embedding) else max(outputs, inputs)
        return f"wider than {_WIDEST:,}" if widest > _WIDEST else ""

    @property
    def groups(self) -> list[list[str]]:
        """Weights whose inputs are known, those of one input together, in the order of the network."""
        known = ([self._named[w] for w in group if self._is_known(w)] for group in self._trace.groups)
        return [group for group in known if group]

    @property
    def reasons(self) -> dict[str, str]:
        """Weight → why nothing is known of its inputs."""
        found = self._reasons | {self._named[weight]: why for weight, why in self._trace.reasons.items()}
        for weight, moments in self._dense.moments.items():
            if moments.second.dim() > 2:
                found[self._named[weight]] = "groups"
            elif not self._is_known(weight):
                found[self._named[weight]] = "no gradient of the output reaches it"
        return found

    def dense_evidence(self, name: str) -> Objective:
        """Of the dense network's inputs alone."""
        weight = self.places[name]
        return self._evidence(name, self._dense.moments[weight], self._held_out.moments[weight])

    def evidence(self, compressed: nn.Module, group: Sequence[str]) -> dict[str, Objective]:
        """Of the inputs that ``compressed`` gives, beside those that the dense network gives.

        Args:
            compressed: final in all that runs before the group; another one than before begins anew.
            group: one of :attr:`groups`, in their order.
        """
        if self._is_table(self.places[group[0]]):
            return {name: self.dense_evidence(name) for name in group}
        passes = self._pair(compressed)
        weights = [self.places[name] for name in group]
        seen = passes[0].moments(weights, self._dense.moments)
        others = passes[1].moments(weights, self._held_out.moments)
        return {
            name: self._evidence(name, seen[weight], others[weight])
            for name, weight in zip(group, weights, strict=True)
        }

    def home(self, weight: str) -> tuple[int, int] | None:
        """Chain and position of the block that alone uses a weight, once, and keeps its input as it is."""
        place = self._trace.homes.get(weight)
        if place is None or self._trace.calls[weight] > 1:
            return None
        return place if self._trace.chains[place[0]][place[1]].is_kept_whole else None

    def block(self, place: tuple[int, int]) -> str:
        """The module that is there."""
        return self._trace.chains[place[0]][place[1]].module

    def metric(self, place: tuple[int, int]) -> Tensor | None:
        """G (width, width) of what a block gives, to a factor; None where it is not known."""
        found = self._dense.blocks.get(self.block(place))
        return None if found is None else found.to(self.device)

    def examples(
        self, compressed: nn.Module, place: tuple[int, int]
    ) -> tuple[Sequence[Example], Sequence[Example]]:
        """What a block is given in ``compressed`` and what it gives in the dense network; also held out.

        Args:
            compressed: as of :meth:`evidence`.
            place: of the block.
        """
        seen, held_out = (one.examples(place) for one in self._pair(compressed))
        return seen, held_out

    def _pair(self, compressed: nn.Module) -> list[PairedPass]:
        if compressed is not self._compressed:
            self._compressed, self._passes = compressed, []  # what was kept of the other one goes first
            parts = (self.data.batches, self.data.held_out)
            self._passes = [
                PairedPass(
                    self.network,
                    compressed,
                    self.data.call,
                    batches,
                    self._trace,
                    self._positions,
                    processes=self.processes,
                    keeps_all=self.refines and self.processes.is_main,  # who refines
                )
                for batches in parts
            ]
        return self._passes

    @property
    def folder(self) -> Path | None:
        """Where to keep what is found before layers are fitted."""
        return self._request.folder

    @cached_property
    def fingerprint(self) -> dict[str, str]:
        """What all that is told here depends on; with several processes, as the first sees it."""
        return self.processes.on_main(lambda: self._fingerprint([*self.data.batches, *self.data.held_out]))

    def _fingerprint(self, batches: Sequence[Batch]) -> dict[str, str]:
        return calibration_fingerprint(
            self.network,
            self.data.call,
            batches,
            self.data.pooling,
            names=list(self._named),
            probes=_PROBES,
            positions=self._positions,
            seed=self._seed,
            blocks=self.refines,
        )

    def _kept_pass(self) -> DensePass:
        """Of the examples of the fit; from a file of moments where one is named, and fits."""
        batches, path = self.data.batches, self._request.moments
        if path is None and self.folder is not None:
            path = self.folder / "moments.safetensors"

        def measure() -> DensePass:
            return self._pass(batches, _PROBES, self.tell)

        if path is None:
            return measure()
        parts = self.processes.on_main(lambda: self._fingerprint(batches))
        own = self._request.moments is None
        found, said = cached_or_measured(path, parts, self.network, self._trace, measure, self.processes, own)
        if not own:
            self.notes.append(f"moments: {_count(batches):,} examples {said}")
        return found

    def _pass(self, batches: Sequence[Batch], probes: int, tell: StageCallback | None = None) -> DensePass:
        return dense_pass(
            self.network,
            self.data.call,
            batches,
            self._trace,
            probes,
            self.data.pooling,
            self._positions,
            self._seed,
            self.refines,
            tell,
            self.processes,
        )

    def _is_known(self, weight: str) -> bool:
        moments = self._dense.moments.get(weight)
        if moments is None or moments.second.dim() > 2:
            return False
        return not self._is_table(weight) or weight in self._dense.gradients

    def _is_table(self, weight: str) -> bool:
        return self._dense.moments[weight].second.dim() == 1

    def _evidence(self, name: str, moments: Moments, held_out: Moments) -> Objective:
        outputs = self._dense.gradients.get(self.places[name])
        outputs = None if outputs is None else outputs.to(self.device)
        both = _on(self.device, moments), _on(self.device, held_out)
        if self._is_table(self.places[name]):
            assert outputs is not None, "else it is fitted by its weight alone"
            return EmbeddingObjective(*both, outputs)
        return LayerObjective(*both, outputs, name in self.means)


def _count(batches: Iterable[Batch]) -> int:
    """Examples."""
    return sum(len(next(iter(batch.values()))) for batch in batches)


def _on(device: torch.device, moments: Moments) -> Moments:
    if device.type == "cpu":
        return moments
    tensors = {f.name: getattr(moments, f.name).to(device) for f in fields(moments) if f.name != "rows"}
    return replace(moments, **tensors)
