"""FC2 and LeNet-5 on MNIST: section III A of Gao et al. 2020, its Fig. 2 and the first row of Table I.

The recipes were chosen on a tenth of the training split.  FC2 starts from much noise (a truncated normal of
0.1): with the paper's L2 twenty epochs leave most of it in the weights, and TT-SVD spends its bonds on it;
five times that L2 removes it.  Shifts of the images help the dense FC2 and hurt small D, so it has none.
"""

from __future__ import annotations

from mpoc.reproduce.experiment import GAO, Experiment, Layer, Published, Study, Training
from mpoc.train.settings import Settings

_MNIST = "MNIST"


def _paper(lr: float) -> Training:
    """Of the paper's public code: plain SGD, the rate falling by 1 % an epoch."""
    settings = Settings(
        epochs=500, batch=100, optimizer="sgd", lr=lr, momentum=0.0, l2=1e-4, schedule="exponential"
    )
    return Training(settings, note="the paper's own")


_FC2 = Experiment(
    label="FC2",
    network="fc2",
    layers=(
        Layer("fc1", (4, 7, 7, 4), (4, 4, 4, 4)),
        Layer("fc2", (4, 4, 4, 4), (1, 1, 10, 1), bond=4),
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
        Layer("fc1", (2, 10, 10, 2), (2, 5, 6, 2), bond=4),
        Layer("fc2", (2, 5, 6, 2), (2, 3, 7, 2), bond=4),
        Layer("fc3", (2, 3, 7, 2), (1, 5, 2, 1), bond=2),
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
