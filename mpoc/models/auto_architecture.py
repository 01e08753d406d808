"""Tell the network of a checkpoint from the names and shapes of its tensors: what ``--arch auto`` does.

A network of the zoo is found by a tensor that only it has; the arguments of its constructor follow from
shapes.  It is made without memory, on the meta device, and taken only if it has all tensors of the
checkpoint, in their shapes, and no others.  Then those of torchvision and timm are tried, where these are
installed.  Nothing is guessed: where several fit, none is taken.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial

import torch
from torch import nn

from mpoc.io.checkpoint import Checkpoint
from mpoc.models import packaged, zoo
from mpoc.models.architecture import first_difference, shapes_of

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class ToldArchitecture:
    """What the tensors of a checkpoint tell."""

    arch: str | None  # as --arch takes it; None: no network fits, or several
    note: str = ""  # for the user


def tell_architecture(checkpoint: Checkpoint, asked: str | None) -> ToldArchitecture:
    """The network that was asked for; else, of a dense file, the one of the zoo that it fits exactly."""
    if asked is not None or checkpoint.is_directory:
        return ToldArchitecture(asked)
    shapes = shapes_of(checkpoint)
    fitting = [spec for spec in _specs(shapes) if _fits(spec, shapes)]
    fitting = fitting or list(_packaged(tuple(shapes.items())))
    if len(fitting) > 1:
        return ToldArchitecture(None, f"its tensors fit {' and '.join(fitting)}: name one with --arch")
    if not fitting:
        return ToldArchitecture(None)
    [spec] = fitting
    said = f"--arch {spec}, told by the names and shapes of all tensors"
    if spec.startswith("picogpt"):
        said += " (the context is the usual one: no tensor tells it)"
    return ToldArchitecture(spec, said)


def _specs(shapes: Shapes) -> list[str]:
    """Networks of the zoo whose own tensor is there, with the first option and others that are not usual."""
    found = []
    for name, (own, options) in _MARKS.items():
        if own not in shapes:
            continue
        try:
            told = options(shapes)
        except (KeyError, IndexError):
            continue
        first, usual = next(iter(told), ""), zoo.ENTRIES[name].options
        rest = [f"{key}={value}" for key, value in told.items() if key == first or value != usual[key]]
        found.append(":".join([name, *([",".join(rest)] if rest else ())]))
    return found


def _fits(spec: str, shapes: Shapes) -> bool:
    try:
        with torch.device("meta"), torch.random.fork_rng(devices=[]):
            network: nn.Module = zoo.make(spec)
    except ValueError:
        return False
    return _has_all(network, shapes)


@cache  # a file is opened more than once
def _packaged(shapes: tuple[tuple[str, tuple[int, ...]], ...]) -> tuple[str, ...]:
    return tuple(packaged.fitting(dict(shapes), partial(_has_all, shapes=dict(shapes))))


def _has_all(network: nn.Module, shapes: Shapes) -> bool:
    return first_difference(network, dict(shapes)) == ("", [])


def _count(shapes: Shapes, pattern: str) -> int:
    """How many tensors there are of the names ``pattern.format(0)``, ``pattern.format(1)``, …"""
    count = 0
    while pattern.format(count) in shapes:
        count += 1
    return count


def _densenet(shapes: Shapes) -> dict[str, int]:
    own = "block1.{}.conv.weight"
    return {"depth": 3 * _count(shapes, own) + 4, "growth": shapes[own.format(0)][0]}


def _mera_cnn(shapes: Shapes) -> dict[str, int]:
    return {"hidden": shapes["fc1.weight"][0], "parallel": int(shapes["head.weight"][1] != 64)}


def _picogpt(shapes: Shapes) -> dict[str, int]:
    return {"vocab": shapes["embedding.weight"][0]}


def _resnet(shapes: Shapes) -> dict[str, int]:
    own = "layer1.{}.conv1.weight"
    return {"depth": 6 * _count(shapes, own) + 2, "width": shapes[own.format(0)][0] // 16}


def _nothing(shapes: Shapes) -> dict[str, int]:
    return {}


# Network → a tensor that it has, and what shapes tell of its options.
_MARKS: dict[str, tuple[str, Callable[[Shapes], dict[str, int]]]] = {
    "densenet": ("block1.0.conv.weight", _densenet),
    "fc2": ("fc1.weight", _nothing),
    "harada": ("fc1.weight", _nothing),
    "lenet5": ("fc3.weight", _nothing),
    "mera-cnn": ("conv6.weight", _mera_cnn),
    "picogpt": ("layers.0.attention.query.weight", _picogpt),
    "resnet": ("layer1.0.conv1.weight", _resnet),
    "vgg16": ("conv5_3.weight", _nothing),
    "vgg19": ("conv5_4.weight", _nothing),
}
