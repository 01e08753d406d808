"""DenseNets on CIFAR-10: section III B 3 of Gao et al. 2020, Table II, and one convolution."""

from __future__ import annotations

from mpoc.reproduce.cifar_training import CIFAR, PAPER, cosine
from mpoc.reproduce.experiment import GAO, Experiment, Layer, Published, Study

_WHERE = "Table II"
# (n, m, k) → input factors of n + 3mk, dense and MPO accuracy with σ, ρ.
_TABLE = {
    (16, 12, 12): ((4, 4, 7, 4), (93.56, 0.26), (93.59, 0.13), 0.129),
    (16, 12, 24): ((4, 5, 11, 4), (95.12, 0.15), (95.13, 0.13), 0.089),
    (24, 32, 12): ((4, 7, 7, 6), (95.36, 0.15), (95.58, 0.07), 0.070),
    (96, 32, 24): ((5, 8, 12, 5), (95.74, 0.09), (96.09, 0.07), 0.044),
}


def _head(inputs: tuple[int, ...]) -> Layer:
    return Layer("linear", inputs, (1, 5, 2, 1), bond=4)


def _experiment(shape: tuple[int, int, int]) -> Experiment:
    (_, m, k), (inputs, dense, mpo, rho) = shape, _TABLE[shape]
    return Experiment(
        f"(n, m, k) = {shape}",
        f"densenet:depth={3 * m + 4},growth={k}",
        (_head(inputs),),
        (),
        cosine(),
        PAPER,
        CIFAR,
        Published(_WHERE, *dense),
        {0: Published(_WHERE, *mpo, rho=rho)},
    )


def _convolution() -> Experiment:
    """The head and the last convolution, 8 × 8 × 436 → 8 × 8 × 12; 4·5·8·11·4·4 = 8 · 8 · 440 inputs."""
    where = "section III B 3"
    convolution = Layer("block3.11.conv", (4, 5, 8, 11, 4, 4), (2, 4, 4, 3, 4, 2), bond=20, size=(8, 8))
    return Experiment(
        "(n, m, k) = (16, 12, 12), convolution",
        "densenet:depth=40,growth=12",
        (convolution, _head((4, 4, 7, 4))),
        (),
        cosine(),
        PAPER,
        CIFAR,
        Published(_WHERE, 93.56, 0.26),
        {0: Published(where, 93.52, 0.40, rho=0.497)},
        notes=(
            "the paper's factors make 28,160 inputs of the convolution's 27,904: zeros follow them",
            "its ρ of 0.497 is not that of its factors and D = 20, which is in the table",
        ),
    )


_VARIANTS = {"-".join(map(str, shape)): _experiment(shape) for shape in _TABLE}
_VARIANTS["convolution"] = _convolution()
DENSENET = Study("densenet", "DenseNet", GAO, _VARIANTS, quick_batch=4)
