"""An experiment of a paper as plain data: network, replaced layers, training, published results.

The papers write a structure as M(I_1,…,I_n → J_1,…,J_n)(D), Eq. (8) of Gao et al. 2020.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from mpoc.reproduce.image_states import ORDERS
from mpoc.train.settings import Settings

_ORDERS = {**ORDERS, "channels": "channels-first order"}
_NAMES = {"mpo": "M", "tree": "tree", "mera": "MERA"}
GAO = "Gao et al., Phys. Rev. Research 2, 023300 (2020)"


@dataclass(frozen=True)
class ReplacedLayer:
    """A layer that is replaced, and the structure of its cores."""

    name: str  # of the module in the zoo's network
    inputs: tuple[int, ...]  # I
    outputs: tuple[int, ...]  # J
    bond: int | None = None  # None: the D of the experiment
    size: tuple[int, ...] = ()  # of a convolution that becomes one whole map: (height, width) of its input
    # In which the cores take the inputs: of pixels.ORDERS, of a square image; or "channels" first.
    order: str = "raster"
    form: str = "mpo"  # of mpoc.tensor_networks.forms.FORMS

    def notation(self, bond: int | None = None) -> str:
        """``fc1 M(4,7,7,4→4,4,4,4)(D)``."""
        sides = "→".join(",".join(map(str, side)) for side in (self.inputs, self.outputs))
        order = "" if self.order == "raster" else f", inputs in {_ORDERS[self.order]}"
        return f"{self.name} {_NAMES[self.form]}({sides})({self.bond or bond or 'D'}){order}"


@dataclass(frozen=True)
class Published:
    """A result that the paper reports."""

    where: str  # "Table I"
    accuracy: float | None = None  # per cent; None: the paper draws or says it, and prints no number
    sigma: float | None = None
    rho: float | None = None
    words: str = ""  # what it says where it prints no number
    parameters: tuple[int, int] = (0, 0)  # of the fully connected layers, and of all

    def __str__(self) -> str:
        if self.accuracy is None:
            return f"{self.words} ({self.where})"
        sigma = "" if self.sigma is None else f" ± {self.sigma:.2f}"
        return f"{self.accuracy:.2f}{sigma} ({self.where})"


@dataclass(frozen=True)
class Training:
    """A training, the same for the dense network and for every start of the MPO-Net."""

    settings: Settings
    pad: int = 0  # pixels: shifts drawn at random
    flip: bool = False
    note: str = ""  # where it departs from the paper's own, or from what a reader would expect

    def words(self) -> str:
        """The training in one line, for tables."""
        s = self.settings
        long = f"{s.epochs:g} epochs" if s.steps is None else f"{s.steps:,} steps"
        momentum = f" momentum {s.momentum:g}" if s.optimizer == "sgd" and s.momentum else ""
        nesterov = " (Nesterov)" if s.nesterov else ""
        schedule = s.schedule
        if s.schedule == "exponential":
            schedule = f"×{s.gamma:.4g} every {s.decay_every} epoch(s)"
        optimizer = "adam" if s.optimizer == "adamw" and not s.weight_decay else s.optimizer
        parts = [long, f"batch {s.batch}", f"{optimizer}{momentum}{nesterov}", f"lr {s.peak:g} {schedule}"]
        parts += [f"warm-up {s.warmup:g}"] if s.warmup else []
        parts += [f"L2 {s.l2:g}" if s.l2 else "no L2"]
        parts += [f"random shifts of {self.pad} pixels"] if self.pad else []
        parts += ["random flips"] if self.flip else []
        if s.patience is not None:
            every = f"one every {s.eval_every} steps" if s.eval_every else "one per epoch"
            parts.append(f"stopped after {s.patience} evaluations ({every}) without improvement")
        return ", ".join(parts)


@dataclass(frozen=True)
class Experiment:
    """One network with one set of replaced layers, at one or more D."""

    label: str  # of this variant in tables, as "depth 56"
    network: str  # of the zoo, as "resnet:depth=56,width=4"
    layers: tuple[ReplacedLayer, ...]
    bonds: tuple[int, ...]  # the D's; () where every layer has a bond of its own
    training: Training
    paper_training: Training | None  # None: the source has none
    data: str  # what the paper trained on
    dense: Published
    published: dict[int, Published] = field(default_factory=dict)  # by D; 0 where there are no D's
    x: float = 0.0  # place in a figure over something else than D
    notes: tuple[str, ...] = ()  # on the structure
    # Above 0 each bond is the smallest that discards at most this share of the weight's squared norm: of the
    # dense weight, or of random cores trained at D before.
    discard: float = 0.0
    starts: tuple[str, ...] = ("ttsvd", "random")  # those it is done from
    with_dense: bool = True  # whether its dense network is trained too; else another variant is that
    series: str = ""  # what is joined by a line in a figure over parameters


@dataclass(frozen=True)
class Study:
    """The experiments of one name of ``mpoc reproduce``."""

    name: str
    title: str
    source: str
    variants: dict[str, Experiment]
    quick_batch: int  # of --quick
    axis: str = "D"  # what a figure runs over: D, parameters, or the x of the experiments
    shown: tuple[str, ...] = ()  # the variants that are done unless asked otherwise; (): the first
    held_out: float = 0.0  # share of the training split that chooses the weights, unless asked otherwise
    baseline: str = ""  # the variant with whose fully connected layers the paper compares those of all others
    head: int = 0  # what the paper then counts for the last layer
