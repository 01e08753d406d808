"""One network of a study: built, trained, measured."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from mpoc import zoo
from mpoc.forms.form import Form
from mpoc.forms.mpo import MPO
from mpoc.reproduce.experiment import Experiment, Layer
from mpoc.reproduce.material import Material
from mpoc.reproduce.networks import FULL_BOND, choose_bonds, compress, core_forms
from mpoc.reproduce.store import Result
from mpoc.train.engine import make_accelerator
from mpoc.train.evaluate import evaluate
from mpoc.train.loop import train
from mpoc.train.settings import derived_seed
from mpoc.train.watch import Outcome, Told, Watch, short

DENSE = "dense"
Key = tuple[str, str, int, int]


@dataclass(frozen=True)
class Cell:
    """Which network."""

    experiment: Experiment
    start: str  # "dense", "ttsvd" or "random"
    bond: int  # D, of random cores and caps; 0 where every layer has its own, and of a dense network
    seed: int

    @property
    def name(self) -> str:
        """For people and for file names: ``fc2-ttsvd-D16-seed0``."""
        network = self.experiment.network.replace(":", "-").replace(",", "-").replace("=", "")
        bond = f"-D{self.bond}" if self.bond else ""
        return f"{network}-{self.start}{bond}-seed{self.seed}"

    @property
    def key(self) -> Key:
        """Label, start, D and seed: different for any two of a study."""
        return self.experiment.label, self.start, self.bond, self.seed

    def origin(self) -> Cell | None:
        """The trained network of the same seed that this one starts from."""
        if self.start == "ttsvd":
            return replace(self, start=DENSE, bond=0)
        if self.start == "random" and self.experiment.discard:
            return replace(self, experiment=replace(self.experiment, discard=0.0))
        return None

    def identity(self, material: Material) -> dict[str, Any]:
        """All that the result depends on; labels and the paper's numbers are not part of it."""
        settings = asdict(replace(self.experiment.training.settings, seed=self.seed))
        training = self.experiment.training
        found: dict[str, Any] = {
            "network": self.experiment.network,
            "settings": {**settings, "betas": list(settings["betas"])},
            "augmentation": {"pad": training.pad, "flip": training.flip},
            "data": material.identity,
            "start": self.start,
        }
        if self.start != DENSE:
            found["layers"] = [_layer_identity(layer, self.bond) for layer in self.experiment.layers]
            if self.experiment.discard:
                found["discard"] = self.experiment.discard
        return found


def _layer_identity(layer: Layer, bond: int) -> dict[str, Any]:
    """As plain data; raster order and a chain go without saying, as in results before there were others."""
    found = {"name": layer.name, "bond": layer.bond or bond}
    found |= {key: list(getattr(layer, key)) for key in ("inputs", "outputs", "size")}
    found |= {} if layer.order == "raster" else {"order": layer.order}
    return found if layer.network == "chain" else {**found, "network": layer.network}


def run_cell(
    cell: Cell,
    material: Material,
    device: str,
    origin: dict[str, Tensor] | None,
    told: Callable[[Told], None] | None = None,
) -> tuple[Result, dict[str, Tensor]]:
    """Build, train and measure a network.

    Args:
        cell: which.
        material: its data.
        device: ``auto``, ``cpu``, …
        origin: the weights of the cell's origin, where it has one.
        told: called while training runs.

    Returns:
        The result, and the weights that count, on the CPU.

    Raises:
        UsageError: factors that do not fit.
        MpocError: the loss is not finite.
        Interrupted: Ctrl-C or SIGTERM.
    """
    begin = time.perf_counter()
    network = _network(cell, origin)
    accelerator = make_accelerator(device)
    outcome, curve = _train(cell, network, material, accelerator, told)
    chosen = next(point for point in curve if point["step"] == outcome.chosen["step"])
    result = Result(
        parameters=sum(p.numel() for p in network.parameters()),
        start=curve[0]["accuracy"],
        final=chosen["accuracy"],
        best=max(point["accuracy"] for point in curve),
        seconds=short(time.perf_counter() - begin),
        steps=outcome.steps,
        device=str(accelerator.device),
        curve=curve,
        milliseconds=_step_time(cell, outcome),
        **_spectra(cell, network),
    )
    return result, {name: tensor.detach().cpu() for name, tensor in network.state_dict().items()}


def _step_time(cell: Cell, outcome: Outcome) -> float | None:
    return short(1000 * cell.experiment.training.settings.batch / outcome.rate) if outcome.rate else None


def _spectra(cell: Cell, network: nn.Module) -> dict[str, dict[str, list[Any]]]:
    """Bonds and entropies of the replaced layers."""
    if cell.start == DENSE:
        return {}
    forms = core_forms(network, cell.experiment.layers)
    return {
        "bonds": {name: list(_inner(form)) for name, form in forms.items()},
        "entropies": {name: list(map(short, form.entropies())) for name, form in forms.items()},
    }


def _inner(form: Form) -> tuple[int, ...]:
    return form.bonds[1:-1] if isinstance(form, MPO) else form.bonds


def _network(cell: Cell, origin: dict[str, Tensor] | None) -> nn.Module:
    """As it is before training. All starts of a seed draw the same parameters outside the replaced layers."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derived_seed(cell.seed, "network"))
        network = zoo.make(cell.experiment.network)
    if cell.start == DENSE:
        return network
    layers, discard = cell.experiment.layers, cell.experiment.discard
    bond = cell.bond
    if cell.start == "ttsvd":
        assert origin is not None
        network.load_state_dict(origin)
        bond = FULL_BOND if discard else bond
    compress(network, layers, bond, cell.start, cell.seed)
    if discard:
        if cell.start == "random":
            assert origin is not None
            network.load_state_dict(origin)
        choose_bonds(network, layers, discard)
    return network


def dense_sizes(experiment: Experiment) -> tuple[int, int]:
    """Parameters of the whole dense network, and N_ori of the layers that are replaced."""
    with torch.device("meta"):
        network = zoo.make(experiment.network)
    weights = (network.get_submodule(layer.name).get_parameter("weight") for layer in experiment.layers)
    return sum(p.numel() for p in network.parameters()), sum(weight.numel() for weight in weights)


def _train(
    cell: Cell, network: nn.Module, material: Material, accelerator: Any, told: Callable[[Told], None] | None
) -> tuple[Outcome, list[dict[str, float]]]:
    """The outcome, and the accuracy at every evaluation on the split that is reported."""
    training = cell.experiment.training
    settings = replace(training.settings, seed=cell.seed, keep_best=material.chooses)
    measured = material.split(material.measured)
    curve: list[dict[str, float]] = []

    def note(now: Told) -> None:
        if now.scores is not None:
            point = {"step": now.step, "epoch": short(now.epoch)}
            scores = now.scores
            if material.chooses:
                point["validation"] = short(scores["accuracy"])
                device = accelerator.device
                scores = evaluate(network, material.task, measured, settings.batch, device).scores
            curve.append({**point, "accuracy": short(scores["accuracy"])})
        if told is not None:
            told(now)

    validation = material.split("validation") if material.chooses else measured
    feed = material.train(training)
    outcome = train(network, material.task, feed, settings, validation, Watch(told=note), accelerator)
    return outcome, curve
