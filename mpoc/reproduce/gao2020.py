"""Experiments of Gao et al., Phys. Rev. Research 2, 023300 (2020), on MNIST and CIFAR-10.

- FC2 and LeNet-5 on MNIST: section III A, Fig. 2 and the first row of Table I. The recipes were chosen on a
  tenth of the training split. FC2 starts from strong noise (a truncated normal of 0.1): with the paper's L2,
  twenty epochs leave most of it in the weights and TT-SVD spends its bonds on it; five times that L2 removes
  it. Shifts of the images help the dense FC2 and hurt small D, so FC2 is trained without.
- VGG-16 and VGG-19: section III B 1, Table I. Two 3 × 3 convolutions of the last stage, as whole maps of
  2 × 2 × 512, and the three fully connected layers: 23,633,920 parameters become 10,944. At this ρ five
  layers of TT-SVD in a row can pass nearly nothing on, so the study also starts from rescaled ones.
- ResNets of width k = 4: section III B 2, Fig. 3, and its ResUnit pair.  The figure compares dense
  network and MPO-Net over the depth; the paper does not print its numbers.  Those of k = 1 are ours.
- DenseNets: section III B 3, Table II, and one convolution.
"""

from __future__ import annotations

from mpoc.reproduce.experiment import GAO, STARTS, Experiment, Published, ReplacedLayer, Study, Training
from mpoc.train.settings import Settings

CIFAR = "CIFAR-10"

# The recipe of the paper's public code, with images standardised by channel instead of by pixel.
PAPER = Training(
    Settings(
        epochs=325, batch=100, optimizer="sgd", lr=0.1, momentum=0.9, nesterov=True, l2=2e-4,
        schedule="exponential", gamma=10**-0.5, decay_every=50,
    ),
    pad=4, flip=True, note="the paper's own, images standardised by channel",
)  # fmt: skip


def cosine(lr: float = 0.1, epochs: float = 60) -> Training:
    """The paper's recipe on a cosine, in fewer epochs, with a warm-up and a bound on the gradient.

    The two are for cores from TT-SVD, whose gradients begin larger than those of the dense weight.
    """
    settings = Settings(
        epochs=epochs, batch=100, optimizer="sgd", lr=lr, momentum=0.9, nesterov=True, l2=5e-4, warmup=0.05,
        clip=1.0,
    )  # fmt: skip
    return Training(settings, pad=4, flip=True)


# FC2 and LeNet-5 on MNIST: section III A.
_MNIST = "MNIST"


def _paper(lr: float) -> Training:
    """The recipe of the paper's public code: plain SGD whose rate falls by 1 % per epoch."""
    settings = Settings(
        epochs=500, batch=100, optimizer="sgd", lr=lr, momentum=0.0, l2=1e-4, schedule="exponential"
    )
    return Training(settings, note="the paper's own")


_FC2 = Experiment(
    label="FC2",
    network="fc2",
    layers=(
        ReplacedLayer("fc1", (4, 7, 7, 4), (4, 4, 4, 4)),
        ReplacedLayer("fc2", (4, 4, 4, 4), (1, 1, 10, 1), bond=4),
    ),
    bonds=(2, 4, 8, 16),
    training=Training(
        Settings(
            epochs=20, batch=100, optimizer="sgd", lr=0.1, momentum=0.9, nesterov=True, l2=5e-4,
            warmup=0.05, clip=1.0,
        )
    ),
    paper_training=_paper(0.8),
    data=_MNIST,
    dense=Published("Fig. 2", 98.35, 0.2),
    published={
        2: Published("Fig. 2", words="already very good"),
        16: Published("Fig. 2", 98.35, rho=0.08),
    },
)  # fmt: skip

_LENET5 = Experiment(
    label="LeNet-5",
    network="lenet5",
    layers=(
        ReplacedLayer("fc1", (2, 10, 10, 2), (2, 5, 6, 2), bond=4),
        ReplacedLayer("fc2", (2, 5, 6, 2), (2, 3, 7, 2), bond=4),
        ReplacedLayer("fc3", (2, 3, 7, 2), (1, 5, 2, 1), bond=2),
    ),
    bonds=(),
    training=Training(
        Settings(
            epochs=20, batch=100, optimizer="sgd", lr=0.05, momentum=0.9, nesterov=True, l2=2e-4,
            warmup=0.05, clip=1.0,
        ),
        pad=1,
    ),
    paper_training=_paper(0.01),
    data=_MNIST,
    dense=Published("Table I", 99.17, 0.04),
    published={0: Published("Table I", 99.17, 0.08, rho=0.05)},
    notes=("the last convolution sees 5 × 5 pixels with a 5 × 5 kernel: a fully connected 400 → 120",),
)  # fmt: skip

FC2 = Study("fc2", "FC2", GAO, {"fc2": _FC2}, quick_batch=100)
LENET5 = Study("lenet5", "LeNet-5", GAO, {"lenet5": _LENET5}, quick_batch=50)


# VGG on CIFAR-10: section III B 1.
_MAP = (2, 8, 8, 8, 2)
_WIDE = (4, 4, 8, 8, 4)


def _vgg(depth: int, convolutions: tuple[str, str], dense: Published, mpo: Published) -> Study:
    name = f"vgg{depth}"
    layers = (
        *(ReplacedLayer(conv, _MAP, _MAP, size=(2, 2)) for conv in convolutions),
        ReplacedLayer("fc1", (4, 4, 4, 4, 2), _WIDE),
        ReplacedLayer("fc2", _WIDE, _WIDE),
        ReplacedLayer("fc3", _WIDE, (1, 10, 1, 1, 1)),
    )
    experiment = Experiment(
        f"VGG-{depth}", name, layers, (4,), cosine(0.05), PAPER, CIFAR, dense, {4: mpo},
        notes=("ρ counts the kernels of the convolutions, not their maps, as the paper does",),
    )  # fmt: skip
    return Study(name, f"VGG-{depth}", GAO, {name: experiment}, quick_batch=8, control=True, starts=STARTS)


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


# ResNets on CIFAR-10: section III B 2.
DEPTHS = (20, 32, 44, 56, 110)
_SAME = Published("Fig. 3", rho=0.11, words="as dense")
_UNITS = {  # by width k: factors of 8 × 8 × 64 k
    1: (2, 4, 4, 4, 4, 4, 2),
    4: (2, 4, 4, 4, 4, 4, 4, 2),  # the paper's text prints one 4 too few
}


def _resnet_experiment(depth: int, width: int, unit: bool) -> Experiment:
    blocks, factors = (depth - 2) // 6, _UNITS[width]
    convolutions = (f"layer3.{blocks - 1}.conv{k}" for k in (1, 2))
    pair = tuple(ReplacedLayer(conv, factors, factors, bond=4, size=(8, 8)) for conv in convolutions)
    head = ReplacedLayer("linear", (4, 4, 4, width), (1, 5, 2, 1), bond=3)
    drawn = Published("Fig. 3", words="drawn, not printed")
    published = Published("section III B 2", words="as dense") if unit else _SAME
    if width != 4:
        drawn = published = Published("the paper", words="k = 4 alone")
    return Experiment(
        f"depth {depth}{', ResUnit' if unit else ''}",
        f"resnet:depth={depth},width={width}",
        (*(pair if unit else ()), head),
        (),
        cosine(),
        PAPER,
        CIFAR,
        drawn,
        {0: published},
        x=depth,
        series="last ResUnit" if unit else "",
        notes=(f"the two convolutions of the last ResUnit are whole maps of 8 × 8 × {64 * width}",)
        if unit
        else (),
    )


def _resnets(name: str, width: int) -> Study:
    variants = {str(depth): _resnet_experiment(depth, width, False) for depth in DEPTHS}
    variants |= {f"{depth}-resunit": _resnet_experiment(depth, width, True) for depth in DEPTHS}
    title = f"ResNet, k = {width}"
    return Study(name, title, GAO, variants, quick_batch=4, axis="depth", control=True)


RESNET = _resnets("resnet", 4)
NARROW_RESNET = _resnets("resnet-narrow", 1)  # not the paper's: that of its figure in a sixteenth of the work


# DenseNets on CIFAR-10: section III B 3.
_WHERE = "Table II"
# (n, m, k) → input factors of n + 3mk, dense and MPO accuracy with σ, ρ.
_TABLE = {
    (16, 12, 12): ((4, 4, 7, 4), (93.56, 0.26), (93.59, 0.13), 0.129),
    (16, 12, 24): ((4, 5, 11, 4), (95.12, 0.15), (95.13, 0.13), 0.089),
    (24, 32, 12): ((4, 7, 7, 6), (95.36, 0.15), (95.58, 0.07), 0.070),
    (96, 32, 24): ((5, 8, 12, 5), (95.74, 0.09), (96.09, 0.07), 0.044),
}


def _head(inputs: tuple[int, ...]) -> ReplacedLayer:
    return ReplacedLayer("linear", inputs, (1, 5, 2, 1), bond=4)


def _densenet_experiment(shape: tuple[int, int, int]) -> Experiment:
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
    convolution = ReplacedLayer(
        "block3.11.conv", (4, 5, 8, 11, 4, 4), (2, 4, 4, 3, 4, 2), bond=20, size=(8, 8)
    )
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
            "the paper's factors give 28,160 inputs; the 27,904 of the convolution are padded with zeros",
            "its ρ of 0.497 is not that of its factors and D = 20, which is in the table",
        ),
    )


_DENSENET_VARIANTS = {"-".join(map(str, shape)): _densenet_experiment(shape) for shape in _TABLE}
_DENSENET_VARIANTS["convolution"] = _convolution()
DENSENET = Study("densenet", "DenseNet", GAO, _DENSENET_VARIANTS, quick_batch=4, control=True)
