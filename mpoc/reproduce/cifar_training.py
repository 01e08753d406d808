"""How the networks for CIFAR-10 are trained: for some epochs, and as the paper does."""

from __future__ import annotations

from mpoc.reproduce.experiment import Training
from mpoc.train.settings import Settings

CIFAR = "CIFAR-10"

# Of the paper's public code, but for its per-pixel standardisation: it is by channel here.
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
