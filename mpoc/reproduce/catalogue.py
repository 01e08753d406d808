"""All studies by name, and the experiments of one study that were requested."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from mpoc.errors import UsageError, nearest
from mpoc.reproduce.experiment import Experiment, ReplacedLayer, Study, Training
from mpoc.reproduce.gao2020 import DENSENET, FC2, LENET5, RESNET, VGG16, VGG19
from mpoc.reproduce.hallam2017 import MERA
from mpoc.reproduce.harada2022 import HARADA
from mpoc.reproduce.picogpt import PICOGPT

_ALL = (FC2, LENET5, VGG16, VGG19, RESNET, DENSENET, PICOGPT, HARADA, MERA)
STUDIES = {study.name: study for study in _ALL}

UNTRAINED = ("mps-images",)  # of another kind: mps_images.py

Shapes = dict[str, tuple[tuple[int, ...], tuple[int, ...]]]  # layer → (outputs, inputs)


@dataclass(frozen=True)
class StudyChoice:
    """The requested variants and changes of a study; None and (): as the study defines."""

    variants: tuple[str, ...] = ()
    bonds: tuple[int, ...] = ()
    shapes: tuple[tuple[str, Shapes], ...] = ()  # each with its text on the command line
    paper: bool = False  # the paper's own training
    epochs: float | None = None
    steps: int | None = None
    l2: bool = True


def find_study(name: str) -> Study:
    """The study of that name.

    Raises:
        UsageError: an unknown name.
    """
    if name not in STUDIES:
        known = [*STUDIES, *UNTRAINED]
        raise UsageError(f"no experiment {name!r}{nearest(name, known)}", ", ".join(known))
    return STUDIES[name]


def choose_studies(study: Study, choice: StudyChoice) -> list[Experiment]:
    """The requested experiments, each with its training and bonds.

    Raises:
        UsageError: an unknown variant or layer, a bond below 1, or no training of the paper's.
    """
    names = choice.variants or study.shown or (next(iter(study.variants)),)
    unknown = [name for name in names if name not in study.variants]
    if unknown:
        known = [*study.variants]
        raise UsageError(
            f"{study.name} has no variant {unknown[0]!r}{nearest(unknown[0], known)}", ", ".join(known)
        )
    if min(choice.bonds, default=1) < 1:
        raise UsageError(f"--bonds {min(choice.bonds)}: must be at least 1")
    experiments: list[Experiment] = []
    for name in dict.fromkeys(names):
        experiment = _with_bonds(study.variants[name], choice.bonds)
        experiment = replace(experiment, training=_training(experiment, choice))
        experiments += [experiment, *(_reshaped(experiment, *shape) for shape in choice.shapes)]
    return experiments


def _with_bonds(experiment: Experiment, bonds: Sequence[int]) -> Experiment:
    """The experiment at these D, which replace bonds of single layers."""
    if not bonds:
        return experiment
    layers = experiment.layers
    if not experiment.bonds:
        layers = tuple(replace(layer, bond=None) for layer in layers)
    return replace(experiment, bonds=tuple(sorted(set(bonds))), layers=layers)


def _training(experiment: Experiment, choice: StudyChoice) -> Training:
    training = experiment.paper_training if choice.paper else experiment.training
    if training is None:
        raise UsageError(f"--paper: the source of {experiment.label} gives no training", "omit --paper")
    settings = training.settings
    if choice.epochs is not None:
        settings = replace(settings, epochs=choice.epochs, steps=None)
    if choice.steps is not None:
        settings = replace(settings, steps=choice.steps)
    if not choice.l2:
        settings = replace(settings, l2=0.0, weight_decay=0.0)
    return replace(training, settings=settings)


def _reshaped(experiment: Experiment, words: str, shapes: Shapes) -> Experiment:
    """The experiment with other factors in some layers."""
    names = [layer.name for layer in experiment.layers]
    for name in shapes:
        if name not in names:
            raise UsageError(
                f"--shape {words}: {name} is not replaced{nearest(name, names)}", ", ".join(names)
            )
    layers = tuple(_reshape(layer, shapes) for layer in experiment.layers)
    return replace(experiment, label=f"{experiment.label}, {words}", layers=layers, published={})


def _reshape(layer: ReplacedLayer, shapes: Shapes) -> ReplacedLayer:
    if layer.name not in shapes:
        return layer
    outputs, inputs = shapes[layer.name]
    return replace(layer, inputs=inputs, outputs=outputs)
