"""All studies by name, those of PicoGPT and of Harada, and the requested experiments of one study."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from mpoc.errors import UsageError, nearest
from mpoc.reproduce.experiment import (
    FROM_DENSE,
    RANDOM,
    TTSVD,
    Experiment,
    Published,
    ReplacedLayer,
    Study,
    Training,
    length_of,
    whole_or_float,
)
from mpoc.reproduce.gao2020 import DENSENET, FC2, LENET5, NARROW_RESNET, RESNET, VGG16, VGG19
from mpoc.reproduce.hallam2017 import MERA
from mpoc.reproduce.image_states import ORDERS
from mpoc.train.settings import Settings

# PicoGPT on tiny Shakespeare ("PicoGPT-MPO", arXiv:2603.28534): every linear layer of attention, feed-forward
# and head is an MPO of two or three sites at one D.  The paper's text and its public code count differently;
# the numbers here are the code's, run: all parameters of the network, embedding (8,320), norms (2,304) and
# biases (3,072) included, at nominal bonds:
# 13,696 + 4·(4·320 D + 2·(96 D + 32 D²)) + 248 D  =  42,336, 79,168, 177,408, 472,192 at D = 4, 8, 16, 32.
_PICOGPT_SOURCE = "arXiv:2603.28534"
_SQUARE = (8, 16)
_WIDE, _NARROW = (8, 8, 8), (4, 4, 8)  # 512 and 128
PARAMETERS = {0: 808_448, 4: 42_336, 8: 79_168, 16: 177_408, 32: 472_192}  # of the whole network; 0: dense


_PAPER = Settings(steps=2000, batch=32, optimizer="adamw", lr=3e-4, weight_decay=0.01, schedule="constant")
_OURS = replace(_PAPER, lr=2e-3, schedule="cosine", warmup=0.05, clip=1.0, eval_every=250)


def _layers() -> tuple[ReplacedLayer, ...]:
    layers: list[ReplacedLayer] = []
    for k in range(4):
        names = (f"layers.{k}.attention.{name}" for name in ("query", "key", "value", "out"))
        layers += [ReplacedLayer(name, _SQUARE, _SQUARE) for name in names]
        layers += [
            ReplacedLayer(f"layers.{k}.up", _NARROW, _WIDE),
            ReplacedLayer(f"layers.{k}.down", _WIDE, _NARROW),
        ]
    return (*layers, ReplacedLayer("head", _SQUARE, (5, 13)))


_PICOGPT = Experiment(
    label="PicoGPT",
    network="picogpt:vocab=65,context=256",
    layers=_layers(),
    bonds=(4, 8, 16, 32),
    training=Training(_OURS),
    paper_training=Training(replace(_PAPER, eval_every=250), note="the paper's own"),
    data="tiny Shakespeare",
    dense=Published("its text", 52.8),
    published={
        d: Published("its text", accuracy) for d, accuracy in ((4, 36.8), (8, 46.8), (16, 51.6), (32, 52.4))
    },
    notes=("accuracy is that of the next character, on the last 10 % of the text",),
)

PICOGPT = Study("picogpt", "PicoGPT", _PICOGPT_SOURCE, {"picogpt": _PICOGPT}, quick_batch=4)

# Harada's network of one MPO on MNIST, at fixed bonds and at bonds that its spectra choose (slides, 2022).
# The slides draw the effective components of the trained weight and print no accuracy, no bond and no
# training.  Their automatic bonds (Asoshina and Harada, JPS 2022) are announced, not described; here each
# bond is the smallest that discards at most a share of the weight's squared norm, and training then goes on.
# Images are taken in raster order and in the coarse-grained one of Latorre, arXiv:quant-ph/0510031.
_HARADA_SOURCE = "Harada, slides of 24 Nov 2022, 'Observation of effective components in weight matrix'"
_SLIDES = "slides"
_SITES = (4, 4, 4, 4, 4)
# A dense weight spreads over many more Schmidt values than trained cores: below 0.3 its bonds compress.
_DISCARDS = {TTSVD: (0.5, 0.3), RANDOM: (0.3, 0.1, 0.03)}
_HARADA_TRAINING = Training(
    Settings(
        epochs=5, batch=100, optimizer="sgd", lr=0.1, momentum=0.9, nesterov=True, l2=1e-3, warmup=0.05,
        clip=1.0,
    )
)  # fmt: skip
_FROM = {TTSVD: "dense", RANDOM: "random"}
_NOTES = {
    TTSVD: "automatic from dense: bonds chosen from the trained dense weight, then trained again",
    RANDOM: "automatic from random: bonds chosen from random cores trained at D = 16 or at --bonds, then "
    "trained again",
}
_RULE = "each bond is the smallest that discards at most this share of the squared norm of the weight"


def _fixed(order: str) -> Experiment:
    label = ORDERS[order]
    return Experiment(
        label=label,
        network="harada",
        layers=(ReplacedLayer("fc1", _SITES, _SITES, order=order),),
        bonds=(2, 4, 8, 16),
        training=_HARADA_TRAINING,
        paper_training=None,
        data="MNIST",
        dense=Published(_SLIDES, words="drawn, not printed"),
        published={0: Published(_SLIDES, words="not printed")},
        series=label,
    )


def _automatic(order: str, start: str, discard: float) -> Experiment:
    series = f"{ORDERS[order]}, automatic from {_FROM[start]}"
    notes = (_NOTES[start], _RULE)
    label = f"{series}, {discard:g}"
    return replace(
        _fixed(order), label=label, bonds=(16,), notes=notes, discard=discard, starts=(start,), series=series
    )


def _harada() -> dict[str, Experiment]:
    found: dict[str, Experiment] = {}
    for order in reversed(ORDERS):
        found[order] = _fixed(order)
        for start, discards in _DISCARDS.items():
            for discard in discards:
                found[f"{order}-{_FROM[start]}-{discard:g}"] = _automatic(order, start, discard)
    return found


_HARADA = _harada()
HARADA = Study(
    "harada", "MPO + FC", _HARADA_SOURCE, _HARADA, quick_batch=50, axis="parameters", shown=tuple(_HARADA)
)

_WARMUP = 0.1  # share of a training of one cycle

_ALL = (FC2, LENET5, VGG16, VGG19, NARROW_RESNET, RESNET, DENSENET, PICOGPT, HARADA, MERA)
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
    one_cycle: bool = False  # a warm-up and a cosine over all of the training, which nothing ends early
    precision: str = "fp32"
    control: bool = False  # as of a Training


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
        if choice.control and (experiment.discard or not set(FROM_DENSE) & set(experiment.starts)):
            raise UsageError(f"--control: {experiment.label} has no start from a dense network", "omit it")
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
    if choice.paper and choice.control:
        raise UsageError("--control divides a training, and --paper's rates are for all of it", "omit one")
    training = experiment.paper_training if choice.paper else experiment.training
    if training is None:
        raise UsageError(f"--paper: the source of {experiment.label} gives no training", "omit --paper")
    settings = training.settings
    if choice.epochs is not None:
        settings = replace(settings, epochs=whole_or_float(choice.epochs), steps=None)
    if choice.steps is not None:
        settings = replace(settings, steps=choice.steps)
    if not choice.l2:
        settings = replace(settings, l2=0.0, weight_decay=0.0)
    if choice.one_cycle:
        every = None if settings.patience else settings.eval_every
        warmup = settings.warmup or _WARMUP
        settings = replace(settings, schedule="cosine", warmup=warmup, patience=None, eval_every=every)
    settings = replace(settings, precision=choice.precision)
    shortened = _shortened(settings, experiment)
    if choice.control and not shortened:
        shortened = f"{length_of(settings)} for dense network and TT-SVD together"
    return replace(training, settings=settings, shortened=shortened, control=choice.control)


def _shortened(settings: Settings, experiment: Experiment) -> str:
    """By how much a training is shorter than the paper's, or than ours where the paper's is unknown."""
    full = (experiment.paper_training or experiment.training).settings
    whose = "the paper's" if experiment.paper_training else "the recipe's"
    if full.patience:  # it ends by itself; the epochs of both are limits
        is_cut = settings.steps is not None or settings.epochs < experiment.training.settings.epochs
        is_cut = is_cut or not settings.patience
        return f"{length_of(settings)} in place of {whose} early stopping" if is_cut else ""
    ours, theirs = (s.epochs if s.steps is None else s.steps for s in (settings, full))
    is_shorter = ours < theirs or (settings.steps is None) != (full.steps is None)
    return f"{length_of(settings)} in place of {whose} {length_of(full)}" if is_shorter else ""


def _reshaped(experiment: Experiment, text: str, shapes: Shapes) -> Experiment:
    """The experiment with other factors in some layers."""
    names = [layer.name for layer in experiment.layers]
    for name in shapes:
        if name not in names:
            raise UsageError(
                f"--shape {text}: {name} is not replaced{nearest(name, names)}", ", ".join(names)
            )
    layers = tuple(_reshape(layer, shapes) for layer in experiment.layers)
    return replace(experiment, label=f"{experiment.label}, {text}", layers=layers, published={})


def _reshape(layer: ReplacedLayer, shapes: Shapes) -> ReplacedLayer:
    if layer.name not in shapes:
        return layer
    outputs, inputs = shapes[layer.name]
    return replace(layer, inputs=inputs, outputs=outputs)
