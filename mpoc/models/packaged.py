"""Networks of torchvision and timm: ``torchvision:resnet18``, ``timm:vit_tiny_patch16_224,classes=10``.

A name is one of the package's own list, so a file may name it, and no code but the package's runs.  Which of
them a checkpoint fits is found by making all, on the meta device and only up to the first parameters whose
shapes it does not have: a second for a thousand of them.  Equal names and shapes are not yet one network
(blurred pooling has no parameters), so those that fit are told apart by what they compute.  The packages are
imported only here, and only where they are needed; weights are never downloaded.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from mpoc.errors import UsageError, nearest
from mpoc.runtime.packages import NETWORKS

Shapes = Mapping[str, tuple[int, ...]]

_USUAL_CLASSES = 1000
_FORM = re.compile(r"(\w+):([\w.]+?)(?:,classes=([1-9]\d{0,5}))?")
_HEAD = re.compile(r"(^|\.)(fc|heads?|classifier|last_linear|linear|output|logits)\.(.*\.)?weight$")
_SPARED = 4  # parameters of other shapes while a network is made: some are made only to be measured
_SIDE = 224  # of an image, where the package does not say
_IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
_FAILS = (ImportError, RuntimeError, ValueError, TypeError, KeyError, AttributeError, AssertionError, OSError)


class _DiffersError(Exception):
    """A network has parameters of other shapes."""


def make_packaged(arch: str) -> nn.Module:
    """Make a network of an installed package, with random weights.

    Args:
        arch: ``PACKAGE:NAME`` or ``PACKAGE:NAME,classes=K``.

    Raises:
        UsageError: another form, no such package or network, or the package fails.
    """
    package, name, classes = _parts(arch)
    try:
        known = _names(package)
    except _FAILS as error:
        said = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        what = f"--arch {arch!r}: {package} cannot be imported ({said})"
        raise UsageError(what, f"pip install {package}") from error
    if name not in known:
        raise UsageError(f"--arch {arch!r}: {package} has no network {name!r}{nearest(name, known)}")
    try:
        return _make(package, name, classes)
    except _FAILS as error:
        raise UsageError(f"--arch {arch!r}: {type(error).__name__}: {error}") from error


def image_facts(arch: str) -> dict[str, Any]:
    """The images that such a network takes: ``size`` (height, width), ``mean`` and ``std`` per channel."""
    package, name, _ = _parts(arch)
    facts = {"size": (_SIDE, _SIDE), **_IMAGENET}
    with suppress(*_FAILS):
        if package == "timm":
            config = import_module("timm").get_pretrained_cfg(name)
            return {"size": tuple(config.input_size[1:]), "mean": config.mean, "std": config.std}
        weights: Any = import_module("torchvision.models").get_model_weights(name)
        side = weights.DEFAULT.transforms.keywords["crop_size"]
        facts["size"] = (side, side)
    return facts


def fitting(shapes: Shapes, fits: Callable[[nn.Module], bool]) -> list[str]:
    """The networks of installed packages that fit a checkpoint; of those that compute the same, the first.

    Args:
        shapes: of the tensors of the checkpoint.
        fits: whether a network has exactly these.
    """
    if not any(len(shape) == 4 for shape in shapes.values()):
        return []  # both packages are of images
    found = [
        f"{package}:{name}" + ("" if classes == _USUAL_CLASSES else f",classes={classes}")
        for package in NETWORKS
        if find_spec(package) is not None
        for name, classes in _fitting_of(package, shapes, fits)
    ]
    return _distinct(found) if len(found) > 1 else found


def _parts(arch: str) -> tuple[str, str, int]:
    """Package, name and number of classes.

    Raises:
        UsageError: another form.
    """
    match = _FORM.fullmatch(arch)
    if match is None or match[1] not in NETWORKS:
        package = arch.partition(":")[0]
        raise UsageError(f"--arch {arch!r}: not of the form {package}:NAME or {package}:NAME,classes=K")
    return match[1], match[2], int(match[3] or _USUAL_CLASSES)


def _names(package: str) -> list[str]:
    """The package's own list of networks of images and classes."""
    if package == "timm":
        return list(import_module("timm").list_models())
    models: Any = import_module("torchvision.models")
    return list(models.list_models(module=models))


def _make(package: str, name: str, classes: int) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on initial weights, which are replaced
        network: nn.Module
        if package == "timm":
            network = import_module("timm").create_model(name, pretrained=False, num_classes=classes)
        else:
            network = import_module("torchvision.models").get_model(name, weights=None, num_classes=classes)
    return network


def _fitting_of(package: str, shapes: Shapes, fits: Callable[[nn.Module], bool]) -> Iterator[tuple[str, int]]:
    try:
        names = _names(package)
    except _FAILS:
        return  # a package that cannot be imported has no networks
    heads = {shape[0] for name, shape in shapes.items() if _HEAD.search(name) and len(shape) > 1}
    for classes in sorted(heads):
        for name in names:
            network = _sketch(package, name, classes, set(shapes.values()))
            if network is not None and fits(network):
                yield name, classes


def _sketch(package: str, name: str, classes: int, known: set[tuple[int, ...]]) -> nn.Module | None:
    """The network, without memory where it can be made so; None: it fails, or has other parameters."""
    for device in ("meta", "cpu"):
        try:
            with _only_of(known), torch.device(device), torch.random.fork_rng(devices=[]):
                return _make(package, name, classes)
        except _DiffersError:
            return None
        except _FAILS:
            continue  # some compute with numbers while they are made
    return None


@contextmanager
def _only_of(known: set[tuple[int, ...]]) -> Iterator[None]:
    """Stop whatever makes parameters of other shapes than these, but for a few."""
    others = 0

    def check(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        nonlocal others
        others += parameter is not None and tuple(parameter.shape) not in known
        if others > _SPARED:
            raise _DiffersError(name)

    handle = register_module_parameter_registration_hook(check)
    try:
        yield
    finally:
        handle.remove()


@torch.no_grad()
def _distinct(found: list[str]) -> list[str]:
    """Those that compute something else than the ones before them, with equal weights on one image."""
    generator = torch.Generator().manual_seed(0)
    state: dict[str, Tensor] = {}
    kept: list[tuple[str, Tensor]] = []
    for arch in found:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            network = make_packaged(arch).eval()
        if not state:
            state = {name: _stirred(value, generator) for name, value in network.state_dict().items()}
            image = torch.rand(1, 3, *image_facts(arch)["size"], generator=generator)
        network.load_state_dict(state)
        try:
            output = network(image)
        except _FAILS:
            output = torch.full((1,), torch.nan)
        if not any(output.shape == o.shape and torch.allclose(output, o, rtol=1e-3) for _, o in kept):
            kept.append((arch, output))
    return [arch for arch, _ in kept]


def _stirred(value: Tensor, generator: torch.Generator) -> Tensor:
    """Initial weights with noise, since some begin at zero and would hide what their layer does."""
    if not value.is_floating_point():
        return value
    return value + 0.02 * torch.rand(value.shape, generator=generator)
