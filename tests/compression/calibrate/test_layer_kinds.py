"""Every kind of layer, calibrated and by its weight alone: errors of outputs on unseen inputs."""

from __future__ import annotations

import copy
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mpoc
from mpoc.compression.calibrate.calibration_data import CalibrationRequest
from mpoc.compression.pipeline import compress_checkpoint
from mpoc.compression.recipe import make_recipe
from tests.support.architectures import tiny
from tests.support.marks import slow_except


def correlated(*shape: int, seed: int = 0, rank: int = 4) -> Tensor:
    """Numbers that lie near a few directions of the last axis."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(rank, shape[-1], generator=torch.Generator().manual_seed(99))
    return torch.randn(*shape[:-1], rank, generator=generator) @ directions + 0.3


@torch.no_grad()
def errors(network: nn.Module, seen: Tensor, unseen: Tensor, **options: Any) -> tuple[float, float, Any]:
    """Relative errors of the outputs on unseen inputs, calibrated and by weights alone, and the report."""
    found, reports = [], []
    for calibrate in (seen, None):
        small = copy.deepcopy(network)
        reports.append(mpoc.compress(small, form="svd", calibrate=calibrate, **options))
        dense, ours = network(unseen), small(unseen)
        found.append(float((ours - dense).norm() / (dense - dense.mean(0)).norm()))
    sizes = [report.manifest.rho_selected for report in reports]
    assert abs(sizes[0] - sizes[1]) < 0.03
    return found[0], found[1], reports[0]


class Recurrent(nn.Module):
    def __init__(self, kind: Any, **options: Any) -> None:
        super().__init__()
        self.body = kind(16, 24, batch_first=True, **options)
        self.head = nn.Linear(48 if options.get("bidirectional") else 24, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x)[0])


class Attention(nn.Module):
    """Over its own tokens, then over those of a memory, then an encoder layer of torch."""

    def __init__(self) -> None:
        super().__init__()
        self.own, self.other = (nn.MultiheadAttention(16, 2, batch_first=True) for _ in range(2))
        self.layer = nn.TransformerEncoderLayer(16, 2, 24, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        y = x + self.own(x, x, x)[0]
        return self.layer(y + self.other(y, x.flip(1), x.flip(1))[0])


class Direct(nn.Module):
    """Reads the weight of one layer without calling it."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(16, 24), nn.Linear(24, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.two((self.one.weight @ x.mT).mT.tanh())


class Grouped(nn.Module):
    """A depthwise convolution and one in four groups; channels of different strengths."""

    def __init__(self) -> None:
        super().__init__()
        self.depth = nn.Conv2d(16, 32, 3, groups=16, padding=1)
        self.groups = nn.Conv2d(32, 32, 3, groups=4)
        self.head = nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = (x * torch.logspace(-1, 1, 16)).movedim(-1, 1).cumsum(2).cumsum(3) / 8
        return self.head(self.groups(self.depth(x).tanh()).tanh().mean((2, 3)))


class Transposed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(16, 24, 4, stride=2, padding=1)
        self.more = nn.ConvTranspose2d(24, 8, 3, stride=2, output_padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.more(self.up(x.movedim(-1, 1)).tanh()).movedim(1, -1)


NETWORKS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "lstm": (lambda: Recurrent(nn.LSTM, num_layers=2), (12, 16)),
    "lstm in both directions": (lambda: Recurrent(nn.LSTM, bidirectional=True), (12, 16)),
    "gru": (lambda: Recurrent(nn.GRU, num_layers=2), (12, 16)),
    "convolutions with groups": (Grouped, (6, 6, 16)),
    "transposed convolutions": (Transposed, (4, 4, 16)),
    "attention": (Attention, (8, 16)),
    "weights read directly": (Direct, (8, 16)),
}


@pytest.mark.parametrize(
    "kind",
    slow_except(
        NETWORKS,
        "gru",
        "attention",
        "convolutions with groups",
        "transposed convolutions",
        "weights read directly",
    ),
)
def test_calibration_reduces_output_errors(kind: str) -> None:
    make, shape = NETWORKS[kind]
    torch.manual_seed(0)
    network = make().eval()
    names = [name for name, _ in network.named_modules()]
    ours, plain, report = errors(network, correlated(48, *shape), correlated(32, *shape, seed=1), ratio=0.5)
    assert ours < 0.9 * plain
    assert all(layer.output_error is not None for layer in report.layers if layer.form != "dense")
    assert [name for name, _ in network.named_modules()] == names


def test_groups_of_many_inputs() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(256, 8, 3, groups=2), nn.Flatten(), nn.Linear(32, 5)).eval()
    images = correlated(24, 4, 4, 256).movedim(-1, 1)
    report = mpoc.compress(network, ratio=0.5, form="svd", calibrate=images.split(8))
    assert all(layer.output_error is not None for layer in report.layers)


@pytest.mark.slow
def test_experts_that_loading_stacks_are_fitted_one_by_one(tmp_path: Path) -> None:
    """One matrix an expert on disk, one stacked weight in the network."""
    network = tiny("mixtral")
    network.save_pretrained(tmp_path / "dense")
    batches = torch.arange(2, 98)[torch.randint(0, 24, (40, 12), generator=torch.Generator().manual_seed(0))]
    options = {"ratio": 0.5, "form": "svd", "layers": ("*experts*",), "device": "cpu"}
    unseen, found = batches[20:], []
    with torch.no_grad():
        dense = network(input_ids=unseen).logits
    for name, calibrate in (
        ("calibrated", CalibrationRequest([{"input_ids": batches[:20]}])),
        ("plain", None),
    ):
        recipe = make_recipe(None, options)
        done = compress_checkpoint(tmp_path / "dense", tmp_path / name, recipe, calibrate=calibrate)
        import_module("mpoc.hf")
        small = type(network).from_pretrained(tmp_path / name)
        with torch.no_grad():
            found.append(float((small(input_ids=unseen).logits - dense).norm()))
        if calibrate is not None:
            assert all(layer.output_error is not None for layer in done.manifest.replaced)
    assert found[0] < 0.9 * found[1]
