"""How a network is trained, as plain data."""

from __future__ import annotations

from dataclasses import dataclass

from mpoc.errors import UsageError, nearest, shortened

OPTIMIZERS = ("sgd", "adamw")
SCHEDULES = ("cosine", "constant", "exponential")
PRECISIONS = ("fp32", "bf16", "fp16")
LEARNING_RATES = {"sgd": 0.01, "adamw": 3e-4}


_LARGEST = 1e30  # float32 has room for it and for what is made of it


@dataclass(frozen=True)
class Settings:
    """All numbers of a training run; the same settings, data and start give the same result.

    ``l2`` is the coupled L2 of Eq. (7), Gao et al. 2020: (l2/2)·Σ|w|² over *all* parameters is part of the
    loss.  ``weight_decay`` is AdamW's decoupled decay (Loshchilov and Hutter 2019), another thing.
    """

    epochs: float = 1.0  # passes over the training split
    steps: int | None = None  # optimiser steps, in the place of epochs
    batch: int = 64  # examples a step, over all processes
    accumulate: int = 1  # parts a process computes its share of a batch in, one after another
    optimizer: str = "adamw"
    lr: float | None = None  # peak learning rate; None: LEARNING_RATES
    momentum: float = 0.9  # sgd only
    nesterov: bool = False  # sgd only
    l2: float = 0.0
    weight_decay: float = 0.0  # adamw only
    betas: tuple[float, float] = (0.9, 0.999)  # adamw only
    schedule: str = "cosine"
    warmup: float = 0.0  # steps; below 1 a share of all steps
    gamma: float = 0.99  # exponential: factor
    decay_every: int = 1  # exponential: epochs from one factor to the next
    clip: float | None = None  # largest norm of the gradient, that of the l2 not counted
    dropout: float | None = None  # of all the network's dropout; None: its own
    precision: str = "fp32"  # of the arithmetic; parameters stay float32
    gradient_checkpointing: bool = False
    eval_every: int | None = None  # steps; None: once an epoch
    patience: int | None = None  # evaluations without gain after which training stops
    keep_best: bool = False  # end with the weights of the best evaluation; patience implies it
    seed: int = 0

    @property
    def peak(self) -> float:
        """The learning rate after the warm-up."""
        return LEARNING_RATES[self.optimizer] if self.lr is None else self.lr

    @property
    def keeps_best(self) -> bool:
        """Whether the weights of the best evaluation are kept."""
        return self.keep_best or self.patience is not None

    def check(self) -> None:
        """Refuse what cannot be trained with.

        Raises:
            UsageError: a value out of its range, or options of another optimiser.
        """
        for option, value, known in (
            ("--optimizer", self.optimizer, OPTIMIZERS),
            ("--schedule", self.schedule, SCHEDULES),
            ("--precision", self.precision, PRECISIONS),
        ):
            if value not in known:
                raise UsageError(f"{option} {value}: unknown{nearest(value, known)}", ", ".join(known))
        for option, number, least in (
            ("--epochs", self.epochs, 0.0),
            ("--steps", self.steps, 0),
            ("--batch", self.batch, 1),
            ("--accumulate", self.accumulate, 1),
            ("--lr", self.peak, 0.0),
            ("--l2", self.l2, 0.0),
            ("--weight-decay", self.weight_decay, 0.0),
            ("--warmup", self.warmup, 0.0),
            ("--decay-every", self.decay_every, 1),
            ("--eval-every", self.eval_every, 1),
            ("--patience", self.patience, 1),
            ("--clip", self.clip, 0.0),
        ):
            if number is not None and not least <= number <= _LARGEST:
                said = f"{number:g}" if abs(number) <= _LARGEST else shortened(number)
                raise UsageError(f"{option} {said}: must be finite and at least {least:g}")
        if not 0 <= self.momentum < 1:
            raise UsageError(f"--momentum {self.momentum:g}: must be at least 0 and below 1")
        if self.dropout is not None and not 0 <= self.dropout < 1:
            raise UsageError(f"--dropout {self.dropout:g}: must be at least 0 and below 1")
        if not 0 < self.gamma <= 1:
            raise UsageError(f"--gamma {self.gamma:g}: must be above 0 and at most 1")
        self._check_together()

    def _check_together(self) -> None:
        if self.optimizer == "sgd" and self.weight_decay:
            raise UsageError("--weight-decay is AdamW's decoupled decay", "--l2, or --optimizer adamw")
        if self.l2 and self.weight_decay:
            raise UsageError("--l2 and --weight-decay: one of them")
        if self.nesterov and (self.optimizer != "sgd" or not self.momentum):
            raise UsageError("--nesterov needs --optimizer sgd with a momentum")
