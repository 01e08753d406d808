"""ResNets of width k = 4 on CIFAR-10: section III B 2 of Gao et al. 2020, Fig. 3, and its ResUnit pair.

The figure compares dense and MPO-Net over the depth; the paper prints none of its numbers.
"""

from __future__ import annotations

from mpoc.reproduce.cifar_training import CIFAR, PAPER, cosine
from mpoc.reproduce.experiment import GAO, Experiment, Layer, Published, Study

_WIDTH = 4
DEPTHS = (20, 32, 44, 56, 110)
_HEAD = Layer("linear", (4, 4, 4, _WIDTH), (1, 5, 2, 1), bond=3)
_UNIT = (2, 4, 4, 4, 4, 4, 4, 2)  # of 8 × 8 × 256; the paper's text prints one 4 too few
_SAME = Published("Fig. 3", rho=0.11, words="as dense")


def _experiment(depth: int, unit: bool) -> Experiment:
    blocks = (depth - 2) // 6
    convolutions = (f"layer3.{blocks - 1}.conv{k}" for k in (1, 2))
    pair = tuple(Layer(conv, _UNIT, _UNIT, bond=4, size=(8, 8)) for conv in convolutions)
    return Experiment(
        f"depth {depth}{', ResUnit' if unit else ''}",
        f"resnet:depth={depth},width={_WIDTH}",
        (*(pair if unit else ()), _HEAD),
        (),
        cosine(),
        PAPER,
        CIFAR,
        Published("Fig. 3", words="drawn, not printed"),
        {0: Published("section III B 2", words="as dense") if unit else _SAME},
        x=depth,
        notes=("the two convolutions of the last ResUnit are whole maps of 8 × 8 × 256",) if unit else (),
    )


_VARIANTS = {str(depth): _experiment(depth, False) for depth in DEPTHS}
_UNITS = {f"{depth}-resunit": _experiment(depth, True) for depth in DEPTHS}
RESNET = Study("resnet", "ResNet, k = 4", GAO, _VARIANTS | _UNITS, quick_batch=4, axis="depth")
