"""VGG-16 and VGG-19 on CIFAR-10: section III B 1 of Gao et al. 2020, Table I.

Two 3 × 3 convolutions of the last stage, as whole maps of 2 × 2 × 512, and the three fully connected layers:
23,633,920 parameters become 10,944.
"""

from __future__ import annotations

from mpoc.reproduce.cifar_training import CIFAR, PAPER, cosine
from mpoc.reproduce.experiment import GAO, Experiment, Layer, Published, Study

_MAP = (2, 8, 8, 8, 2)
_WIDE = (4, 4, 8, 8, 4)


def _vgg(depth: int, convolutions: tuple[str, str], dense: Published, mpo: Published) -> Study:
    name = f"vgg{depth}"
    layers = (
        *(Layer(conv, _MAP, _MAP, size=(2, 2)) for conv in convolutions),
        Layer("fc1", (4, 4, 4, 4, 2), _WIDE),
        Layer("fc2", _WIDE, _WIDE),
        Layer("fc3", _WIDE, (1, 10, 1, 1, 1)),
    )
    experiment = Experiment(
        f"VGG-{depth}", name, layers, (4,), cosine(0.05), PAPER, CIFAR, dense, {4: mpo},
        notes=("ρ counts the kernels of the convolutions, not their maps, as the paper does",),
    )  # fmt: skip
    return Study(name, f"VGG-{depth}", GAO, {name: experiment}, quick_batch=8)


VGG16 = _vgg(
    16,
    ("conv5_1", "conv5_2"),
    Published("Table I", 93.13, 0.39),
    Published("Table I", 93.76, 0.16, rho=0.0005),
)
VGG19 = _vgg(
    19,
    ("conv5_3", "conv5_4"),
    Published("Table I", 93.36, 0.26),
    Published("Table I", 93.80, 0.09, rho=0.0005),
)
