"""Compress, load and expand a small network on a device, and compare its outputs with the original's.

The weights are random chains with the bond dimension that is asked for, so that compression loses nothing but
rounding, while every stage runs: truncated SVD, writing, reading, contraction.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from mpoc.compression.expand import expand_checkpoint
from mpoc.compression.pipeline import compress_checkpoint
from mpoc.compression.recipe import make_recipe
from mpoc.compression.recipe_syntax import ShapeRule
from mpoc.errors import MpocError
from mpoc.models.loading import load

_BOND = 3
_SHAPES = (
    ShapeRule("0", output_factors=(4, 2), input_factors=(2, 2)),
    ShapeRule("2", output_factors=(8, 4), input_factors=(16, 8)),
    ShapeRule("4", output_factors=(6, 4), input_factors=(8, 4)),
)
# Convolutions on a GPU keep 10 bits of each number (TF32); a wrong result differs by about 1.
_TOLERANCE = 1e-2


def self_test(device: str, folder: Path) -> float:
    """Run the test on one device.

    Args:
        device: as ``--device`` takes it.
        folder: an empty one, for the files.

    Returns:
        ‖y − ŷ‖ / ‖y‖ of the network's outputs y (5, 24): the larger of cores and expanded weights.

    Raises:
        MpocError: outputs differ, or as :func:`mpoc.compression.pipeline.compress_checkpoint`.
    """
    network = _network()
    torch.save(network.state_dict(), folder / "net.pt")
    inputs = torch.randn(5, 4, 4, 4, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = network(inputs)
        outputs = _outputs(device, folder, inputs)
    difference = max(float((output - expected).norm() / expected.norm()) for output in outputs)
    if not difference <= _TOLERANCE:  # NaN too
        raise MpocError(f"outputs differ by {difference:.2g} of their norm from the dense network's")
    return difference


def _outputs(device: str, folder: Path, inputs: Tensor) -> list[Tensor]:
    """Outputs through the cores, and through the weights that they are expanded to."""
    small, dense = folder / "net.mpo.safetensors", folder / "net.dense.safetensors"
    recipe = make_recipe(None, {"bond": _BOND, "shape": _SHAPES, "device": device})
    done = compress_checkpoint(folder / "net.pt", small, recipe)
    if len(done.manifest.replaced) != len(_SHAPES):
        raise MpocError(f"{len(done.manifest.replaced)} of {len(_SHAPES)} layers were compressed")
    expand_checkpoint(small, dense)
    expanded = _network()
    expanded.load_state_dict(load_file(dense))
    networks = load(small, _network()), expanded
    return [network.to(device)(inputs.to(device)).cpu() for network in networks]


def _network() -> nn.Sequential:
    """A network from 4×4 images of four channels to 24 numbers; the same at every call."""
    generator = torch.Generator().manual_seed(0)
    conv, first, second = nn.Conv2d(4, 8, 3, padding=1), nn.Linear(128, 32), nn.Linear(32, 24)
    network = nn.Sequential(conv, nn.Flatten(), first, nn.Tanh(), second).eval()
    state = network.state_dict()
    for rule in _SHAPES:
        weight, bias = state[f"{rule.pattern}.weight"], state[f"{rule.pattern}.bias"]
        weight.copy_(_chain(rule, weight[0, 0].numel(), generator).reshape(weight.shape))
        bias.normal_(0, 0.1, generator=generator)
    return network


def _chain(rule: ShapeRule, taps: int, generator: torch.Generator) -> Tensor:
    """A weight (outputs, inputs, taps) of two sites and one for the taps, whose bonds are ``_BOND``."""
    (a, b), (c, d) = rule.output_factors, rule.input_factors
    shapes = (a, c), (b, d), (taps,)
    parts = (torch.randn(_BOND, *shape, generator=generator) for shape in shapes)
    weight = torch.einsum("rac,rbd,rt->abcdt", *parts)
    return weight / (weight.std() * math.sqrt(c * d * taps))
