"""Harada's network of one MPO on MNIST, at fixed bonds and at bonds that its spectra choose (slides, 2022).

The slides draw the effective components of the trained weight and print no accuracy, no bond and no training.
Their automatic bonds (Asoshina and Harada, JPS 2022) are announced, not described; here each bond is the
smallest that discards at most a share of the weight's squared norm, and training then goes on.  Images are
taken in raster order and in the coarse-grained one of Latorre, arXiv:quant-ph/0510031.
"""

from __future__ import annotations

from dataclasses import replace

from mpoc.reproduce.experiment import Experiment, Published, ReplacedLayer, Study, Training
from mpoc.reproduce.image_states import ORDERS
from mpoc.train.settings import Settings

_SOURCE = "Harada, slides of 24 Nov 2022, 'Observation of effective components in weight matrix'"
_WHERE = "slides"
_SITES = (4, 4, 4, 4, 4)
# A dense weight spreads over many more Schmidt values than trained cores: below 0.3 its bonds compress.
_DISCARDS = {"ttsvd": (0.5, 0.3), "random": (0.3, 0.1, 0.03)}
_TRAINING = Training(
    Settings(
        epochs=5, batch=100, optimizer="sgd", lr=0.1, momentum=0.9, nesterov=True, l2=1e-3, warmup=0.05,
        clip=1.0,
    )
)  # fmt: skip
_FROM = {"ttsvd": "dense", "random": "random"}
_NOTES = {
    "ttsvd": "automatic from dense: bonds chosen from the trained dense weight, then trained again",
    "random": "automatic from random: bonds chosen from random cores trained at D = 16 or at --bonds, then "
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
        training=_TRAINING,
        paper_training=None,
        data="MNIST",
        dense=Published(_WHERE, words="drawn, not printed"),
        published={0: Published(_WHERE, words="not printed")},
        series=label,
    )


def _automatic(order: str, start: str, discard: float) -> Experiment:
    series = f"{ORDERS[order]}, automatic from {_FROM[start]}"
    notes = (_NOTES[start], _RULE)
    label = f"{series}, {discard:g}"
    return replace(
        _fixed(order), label=label, bonds=(16,), notes=notes, discard=discard, starts=(start,), series=series
    )


def _variants() -> dict[str, Experiment]:
    found: dict[str, Experiment] = {}
    for order in reversed(ORDERS):
        found[order] = _fixed(order)
        for start, discards in _DISCARDS.items():
            for discard in discards:
                found[f"{order}-{_FROM[start]}-{discard:g}"] = _automatic(order, start, discard)
    return found


_VARIANTS = _variants()
HARADA = Study(
    "harada", "MPO + FC", _SOURCE, _VARIANTS, quick_batch=50, axis="parameters", shown=tuple(_VARIANTS)
)
