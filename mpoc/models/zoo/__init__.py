"""The papers' networks by name, so that a file can say which one its tensors belong to.

    network = make("resnet:depth=56")

A spec is a name and, after a colon, options: ``resnet:depth=20,width=4``. An option that is not given keeps
the value in ``ENTRIES``; those never change, since compressed files hold specs.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mpoc.errors import nearest
from mpoc.models.zoo.cifar import MeraCNN, densenet, resnet, vgg16, vgg19
from mpoc.models.zoo.mnist import FC2, Harada, LeNet5
from mpoc.models.zoo.picogpt import PicoGPT

_GAO = "Gao et al., Phys. Rev. Research 2, 023300 (2020)"
_HARADA = "Harada, 'Compressing neural networks by tensor networks', slides, 24 Nov 2022"
_VGG = f"Simonyan and Zisserman, arXiv:1409.1556; {_GAO}"
# Images run from 0 to 1, then (x − mean) / std; in training padded with zeros, cropped, mirrored at random.
_DIGITS = {"mean": (0.0,), "std": (1.0,), "pad": 0, "flip": False}
_CIFAR = {"mean": (0.4914, 0.4824, 0.4467), "std": (0.2471, 0.2435, 0.2616), "pad": 4, "flip": True}
# Centred, not scaled, as Hallam et al. do.
_CENTRED = _CIFAR | {"std": (1.0, 1.0, 1.0)}
# Of the published CIFAR-10 checkpoints with these key names.
_PUBLISHED = _CIFAR | {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


__all__ = ["ENTRIES", "SHORT_NAMES", "ZooEntry", "example", "long_form", "make", "parse"]


@dataclass(frozen=True)
class ZooEntry:
    """A network of the zoo."""

    factory: Callable[..., nn.Module]
    paper: str
    shape: tuple[int, ...]  # of one sample: (C, H, W), or (tokens,)
    options: dict[str, int] = field(default_factory=dict)  # with their defaults
    images: dict[str, Any] = field(default_factory=dict)  # mean, std, pad and flip; {}: takes token ids


ENTRIES = {
    "densenet": ZooEntry(
        densenet, f"Huang et al., CVPR 2017; {_GAO}", (3, 32, 32), {"depth": 40, "growth": 12}, _CIFAR
    ),
    "fc2": ZooEntry(FC2, _GAO, (1, 28, 28), {}, _DIGITS),
    "harada": ZooEntry(Harada, _HARADA, (1, 28, 28), {}, _DIGITS),
    "lenet5": ZooEntry(LeNet5, f"LeCun et al., Proc. IEEE 86, 2278 (1998); {_GAO}", (1, 28, 28), {}, _DIGITS),
    "mera-cnn": ZooEntry(
        MeraCNN, "Hallam et al., arXiv:1711.03357", (3, 32, 32), {"hidden": 4096, "parallel": 0}, _CENTRED
    ),
    "picogpt": ZooEntry(PicoGPT, "arXiv:2603.28534", (256,), {"vocab": 65, "context": 256}),
    "resnet": ZooEntry(
        resnet, f"He et al., CVPR 2016; {_GAO}", (3, 32, 32), {"depth": 20, "width": 1}, _PUBLISHED
    ),
    "vgg16": ZooEntry(vgg16, _VGG, (3, 32, 32), {}, _CIFAR),
    "vgg19": ZooEntry(vgg19, _VGG, (3, 32, 32), {}, _CIFAR),
}
# The names that people type; files record the long form.
SHORT_NAMES = {f"resnet{depth}": f"resnet:depth={depth}" for depth in (20, 32, 44, 56, 110)}


def make(spec: str) -> nn.Module:
    """The untrained network that ``spec`` names, drawn from torch's global generator.

    Raises:
        ValueError: an unknown name or option, or a value that the network does not take.
    """
    name, options = parse(spec)
    try:
        return ENTRIES[name].factory(**options)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def parse(spec: str) -> tuple[str, dict[str, int]]:
    """Name and all options of a spec: ``"resnet:depth=56"`` → ``("resnet", {"depth": 56, "width": 1})``.

    Raises:
        ValueError: an unknown name or option, an option given twice, or no whole number.
    """
    name, colon, rest = long_form(spec).partition(":")
    if name not in ENTRIES:
        close = nearest(name, [*ENTRIES, *SHORT_NAMES])
        raise ValueError(f"no network {name!r} in the zoo ({', '.join(ENTRIES)}){close}")
    defaults, given = ENTRIES[name].options, dict[str, int]()
    for pair in rest.split(",") if colon else ():
        key, _, value = pair.partition("=")
        if key not in defaults:
            known = f"only {' and '.join(defaults)}" if defaults else "none at all"
            raise ValueError(f"{name} has no option {key!r}, {known}{nearest(key, [*defaults])}")
        if key in given:
            raise ValueError(f"{name}: option {key} is given twice")
        if not re.fullmatch(r"[1-9][0-9]{0,5}", value):
            raise ValueError(f"{name}: {key}={value}: not a whole number from 1 to 999999")
        given[key] = int(value)
    return name, defaults | given


def long_form(spec: str) -> str:
    """The spec without a short name: ``"resnet56"`` → ``"resnet:depth=56"``; others as they are."""
    name, _, options = spec.partition(":")
    if name not in SHORT_NAMES:
        return spec
    return ",".join(filter(None, (SHORT_NAMES[name], options)))


def example(spec: str) -> Tensor:
    """An input of one sample: zeros (1, C, H, W), or token ids (1, context) of dtype int64.

    Raises:
        ValueError: as :func:`parse`.
    """
    name, options = parse(spec)
    if ENTRIES[name].images:
        return torch.zeros(1, *ENTRIES[name].shape)
    return torch.zeros(1, options["context"], dtype=torch.int64)
