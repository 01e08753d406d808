"""Build, train and evaluate one network of a study, and store the result.

The result of each trained network is a small JSON file, named by everything that it depends on, so that an
interrupted or extended study trains only what is missing. The weights of networks that others start from are
an item of the keyed store (io/keyed_store) beside it.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mpoc.io.atomic import write_text
from mpoc.io.keyed_store import damaged, open_item, put_item
from mpoc.io.safetensors_writer import Entry
from mpoc.models import zoo
from mpoc.reproduce.experiment import (
    CONTROL,
    DENSE,
    DENSE_STARTS,
    FROM_DENSE,
    RANDOM,
    Experiment,
    PaperData,
    ReplacedLayer,
)
from mpoc.reproduce.networks import FULL_BOND, choose_bonds, core_forms, replace_layers
from mpoc.runtime.device import derived_seed
from mpoc.runtime.formatting import rounded
from mpoc.tensor_networks.forms.form import Form
from mpoc.tensor_networks.forms.mpo import MPO
from mpoc.train.engine import make_accelerator
from mpoc.train.evaluate import evaluate
from mpoc.train.loop import train
from mpoc.train.monitor import OnEvent, Outcome, TrainingEvent, TrainingMonitor
from mpoc.train.settings import Settings

_FORMAT = 2  # incremented when stored results of earlier versions become invalid

_MEASURED_SECONDS = 1.0  # of training, to know its speed

Key = tuple[str, str, int, int]
Weights = dict[str, Tensor]


@dataclass(frozen=True)
class Result:
    """The result of one trained network."""

    parameters: int  # number in the whole network
    start: float  # accuracy before training in per cent, as are the next two
    final: float
    best: float
    seconds: float  # time of factorisation, training and evaluations
    steps: int
    device: str
    curve: list[dict[str, float]]  # step, epoch, accuracy, and validation where it chooses the weights
    milliseconds: float | None = None  # time of a training step
    # For each replaced layer, at its inner bonds; {} for a dense network.
    bonds: dict[str, list[int]] = field(default_factory=dict)
    entropies: dict[str, list[float]] = field(default_factory=dict)


class Store:
    """The folder of a study: ``NAME-KEY.json`` of each trained network, and weights that others start from.

    Args:
        folder: the folder; created if it does not exist.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def find(self, name: str, identity: dict[str, Any]) -> Result | None:
        """The stored result of a network with this identity; None if there is none.

        Raises:
            MpocError: the file is damaged.
        """
        path = self._path(name, identity, "json")
        if not path.exists():
            return None
        try:
            return Result(**json.loads(path.read_text("utf-8"))["result"])
        except (ValueError, KeyError, TypeError) as error:
            raise damaged(path, "it holds no result") from error

    def put(
        self, name: str, identity: dict[str, Any], result: Result, weights: Weights | None = None
    ) -> None:
        """Store a result, and before it the network's weights if other networks start from them."""
        if weights:
            entries = [Entry.of(key, tensor) for key, tensor in weights.items()]
            put_item(self._path(name, identity, "safetensors"), {"identity": identity}, entries=entries)
        record = {"identity": identity, "result": asdict(result)}
        write_text(self._path(name, identity, "json"), json.dumps(record, indent=1) + "\n")

    def weights(self, name: str, identity: dict[str, Any]) -> Weights | None:
        """The stored weights of a network; None if there are none.

        Raises:
            MpocError: the file is damaged.
        """
        path = self._path(name, identity, "safetensors")
        return open_item(path).read_all() if path.exists() else None

    def _path(self, name: str, identity: dict[str, Any], kind: str) -> Path:
        key = json.dumps([_FORMAT, identity], sort_keys=True)
        digest = hashlib.blake2b(key.encode(), digest_size=6).hexdigest()
        return self.folder / f"{name}-{digest}.{kind}"


@dataclass(frozen=True)
class Cell:
    """One network of a study: its experiment, start, bond dimension and seed."""

    experiment: Experiment
    start: str  # "dense", "control" (dense, of another length), "ttsvd", "rescaled" or "random"
    bond: int  # D of random cores, or cap of TT-SVD; 0 for a dense network or if each layer has its own
    seed: int

    @property
    def name(self) -> str:
        """A readable name, also for files: ``fc2-ttsvd-D16-seed0``."""
        network = self.experiment.network.replace(":", "-").replace(",", "-").replace("=", "")
        bond = f"-D{self.bond}" if self.bond else ""
        start = DENSE if self.start in DENSE_STARTS else self.start
        return f"{network}-{start}{bond}-seed{self.seed}"

    @property
    def key(self) -> Key:
        """Label, start, D and seed: unique within a study."""
        return self.experiment.label, self.start, self.bond, self.seed

    @property
    def settings(self) -> Settings:
        """The training's, for this start and seed."""
        return replace(self.experiment.training.of(self.start).settings, seed=self.seed)

    def origin(self) -> Cell | None:
        """The trained network of the same seed that this one starts from."""
        if self.start in FROM_DENSE:
            return replace(self, start=DENSE, bond=0)
        if self.start == RANDOM and self.experiment.discard:
            return replace(self, experiment=replace(self.experiment, discard=0.0))
        return None

    def identity(self, material: PaperData) -> dict[str, Any]:
        """Everything that the result depends on; labels and the paper's numbers are not part of it."""
        settings = asdict(self.settings)
        training = self.experiment.training
        identity: dict[str, Any] = {
            "network": self.experiment.network,
            "settings": {**settings, "betas": list(settings["betas"])},
            "augmentation": {"pad": training.pad, "flip": training.flip},
            "data": material.identity,
            "start": DENSE if self.start in DENSE_STARTS else self.start,
        }
        if self.start not in DENSE_STARTS:
            identity["layers"] = [_layer_identity(layer, self.bond) for layer in self.experiment.layers]
            if self.experiment.discard:
                identity["discard"] = self.experiment.discard
        origin = self.origin()
        if origin is not None and origin.settings != self.settings:
            identity["origin"] = {"epochs": origin.settings.epochs, "steps": origin.settings.steps}
        return identity


def cells_of(experiments: list[Experiment], starts: tuple[str, ...], seed: int) -> Iterator[Cell]:
    """The networks of one seed in the order of the table, each dense network once."""
    dense: set[str] = set()
    for experiment in experiments:
        if experiment.with_dense and experiment.network not in dense:
            yield Cell(experiment, DENSE, 0, seed)
            dense.add(experiment.network)
            if experiment.training.control:
                yield Cell(experiment, CONTROL, 0, seed)
        for bond in experiment.bonds or (0,):
            for start in (start for start in starts if start in experiment.starts):
                yield Cell(experiment, start, bond, seed)


def _layer_identity(layer: ReplacedLayer, bond: int) -> dict[str, Any]:
    """Plain data without raster order and the form ``mpo``, which the first results did not name."""
    identity = {"name": layer.name, "bond": layer.bond or bond}
    identity |= {key: list(getattr(layer, key)) for key in ("inputs", "outputs", "size")}
    identity |= {} if layer.order == "raster" else {"order": layer.order}
    return identity if layer.form == "mpo" else {**identity, "network": layer.form}


def run_cell(
    cell: Cell, material: PaperData, device: str, origin: Weights | None, on_event: OnEvent = None
) -> tuple[Result, Weights]:
    """Build, train and evaluate a network.

    Args:
        cell: the network.
        material: its data.
        device: ``auto``, ``cpu``, …
        origin: weights of the cell's origin, if it has one.
        on_event: called while training runs.

    Returns:
        The result and the final weights, on the CPU.

    Raises:
        UsageError: factors do not fit.
        MpocError: the loss is not finite.
        Interrupted: Ctrl-C or SIGTERM.
    """
    begin = time.perf_counter()
    accelerator = make_accelerator(device, cell.settings.precision)
    network = _in_fastest_layout(_network(cell, origin), accelerator.device)
    outcome, curve = _train(cell, network, material, accelerator, on_event)
    chosen = next(point for point in curve if point["step"] == outcome.chosen["step"])
    result = Result(
        parameters=sum(p.numel() for p in network.parameters()),
        start=curve[0]["accuracy"],
        final=chosen["accuracy"],
        best=max(point["accuracy"] for point in curve),
        seconds=rounded(time.perf_counter() - begin),
        steps=outcome.steps,
        device=str(accelerator.device),
        curve=curve,
        milliseconds=_step_time(cell, outcome),
        **_spectra(cell, network),
    )
    return result, {name: tensor.detach().cpu() for name, tensor in network.state_dict().items()}


def measure_rate(cell: Cell, material: PaperData, device: str) -> float:
    """Examples per second of a cell's training, over about a second after a first step."""
    training = cell.experiment.training
    start = DENSE if cell.start in DENSE_STARTS else RANDOM  # cores from TT-SVD take the same time
    plain = replace(cell, start=start, experiment=replace(cell.experiment, discard=0.0))
    accelerator = make_accelerator(device, training.settings.precision)
    network = _in_fastest_layout(_network(plain, None), accelerator.device)
    rate, loader = 0.0, material.train(training)
    for seconds in (0.0, _MEASURED_SECONDS):
        steps = max(1, math.ceil(seconds * rate / training.settings.batch))
        settings = replace(training.settings, steps=steps, patience=None)
        rate = train(network, material.task, loader, settings, accelerator=accelerator).rate
    return rate


def _in_fastest_layout(network: nn.Module, device: torch.device) -> nn.Module:
    """The network, with kernels channels last on a CPU, where that trains faster: see tests/benchmarks."""
    if device.type == "cpu":
        for module in network.modules():
            if type(module) is nn.Conv2d:
                module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return network


def _step_time(cell: Cell, outcome: Outcome) -> float | None:
    return rounded(1000 * cell.settings.batch / outcome.rate) if outcome.rate else None


def _spectra(cell: Cell, network: nn.Module) -> dict[str, dict[str, list[Any]]]:
    """Bonds and entropies of the replaced layers."""
    if cell.start in DENSE_STARTS:
        return {}
    forms = core_forms(network, cell.experiment.layers)
    return {
        "bonds": {name: list(_inner(form)) for name, form in forms.items()},
        "entropies": {name: list(map(rounded, form.entropies())) for name, form in forms.items()},
    }


def _inner(form: Form) -> tuple[int, ...]:
    return form.bonds[1:-1] if isinstance(form, MPO) else form.bonds


def _network(cell: Cell, origin: Weights | None) -> nn.Module:
    """The untrained network. All starts of a seed draw the same parameters outside the replaced layers."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derived_seed(cell.seed, "network"))
        network = zoo.make(cell.experiment.network)
    if cell.start in DENSE_STARTS:
        return network
    layers, discard = cell.experiment.layers, cell.experiment.discard
    bond = cell.bond
    if cell.start in FROM_DENSE:
        assert origin is not None
        network.load_state_dict(origin)
        bond = FULL_BOND if discard else bond
    replace_layers(network, layers, bond, cell.start, cell.seed)
    if discard:
        if cell.start == RANDOM:
            assert origin is not None
            network.load_state_dict(origin)
        choose_bonds(network, layers, discard)
    return network


def dense_sizes(experiment: Experiment) -> tuple[int, int]:
    """Number of parameters of the whole dense network, and N_ori of the layers that are replaced."""
    with torch.device("meta"):
        network = zoo.make(experiment.network)
    weights = (network.get_submodule(layer.name).get_parameter("weight") for layer in experiment.layers)
    return sum(p.numel() for p in network.parameters()), sum(weight.numel() for weight in weights)


def _train(
    cell: Cell,
    network: nn.Module,
    material: PaperData,
    accelerator: Any,
    on_event: OnEvent,
) -> tuple[Outcome, list[dict[str, float]]]:
    """Train the network; also return its accuracy on the reported split at every evaluation."""
    training = cell.experiment.training
    settings = replace(cell.settings, keep_best=material.chooses)
    measured = material.split(material.measured)
    curve: list[dict[str, float]] = []

    def note(event: TrainingEvent) -> None:
        if event.scores is not None:
            point = {"step": event.step, "epoch": rounded(event.epoch)}
            scores = event.scores
            if material.chooses:
                point["validation"] = rounded(scores["accuracy"])
                device = accelerator.device
                scores = evaluate(network, material.task, measured, settings.batch, device).scores
            curve.append({**point, "accuracy": rounded(scores["accuracy"])})
        if on_event is not None:
            on_event(event)

    validation = material.split("validation") if material.chooses else measured
    loader = material.train(training)
    outcome = train(
        network, material.task, loader, settings, validation, TrainingMonitor(on_event=note), accelerator
    )
    return outcome, curve
