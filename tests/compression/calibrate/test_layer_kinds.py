"""Every kind of layer: calibrated, outputs on unseen inputs are nearer to the dense ones than by weights."""

from __future__ import annotations

import copy
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import mpoc
from mpoc.compression.calibrate.calibration_data import CalibrationRequest
from mpoc.compression.pipeline import compress_checkpoint
from mpoc.compression.recipe import make_recipe
from tests.support.architectures import tiny


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
    assert abs(reports[0].rho - reports[1].rho) < 0.03
    return found[0], found[1], reports[0]


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
