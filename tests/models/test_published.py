"""The published CIFAR-10 checkpoints in the zoo's network."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import mpoc
from mpoc.compression.pipeline import compress_checkpoint
from mpoc.compression.recipe import make_recipe
from mpoc.models.zoo import ENTRIES, make

# Correct among the first 300 test images, counted with the network of the checkpoint's own authors.
CORRECT = 249


def published(data: Path, depth: int) -> nn.Module:
    """The network with the weights of the one checkpoint of this depth."""
    (file,) = (data / "checkpoints").glob(f"resnet{depth}-*.th")
    state = torch.load(file, map_location="cpu", weights_only=True)["state_dict"]
    network = make(f"resnet:depth={depth}")
    names = [name.removeprefix("module.") for name in state]
    # They are older than the batch norms' counters.
    assert names == [name for name in network.state_dict() if not name.endswith("num_batches_tracked")]
    network.load_state_dict(dict(zip(names, state.values(), strict=True)), strict=True)
    return network.eval()


def first_images(data: Path, count: int) -> tuple[Tensor, Tensor]:
    """Images (count, 3, 32, 32), normalised as the zoo says, and labels (count,)."""
    parquet, image = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("PIL.Image")
    numpy = pytest.importorskip("numpy")
    table = parquet.read_table(data / "cifar10" / "test.parquet").slice(0, count)
    column = "img" if "img" in table.column_names else "image"
    files = [io.BytesIO(row["bytes"]) for row in table[column].to_pylist()]
    pixels = numpy.stack([numpy.asarray(image.open(file).convert("RGB")) for file in files])
    x = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    mean, std = (torch.tensor(ENTRIES["resnet"].images[key])[:, None, None] for key in ("mean", "std"))
    return (x - mean) / std, torch.tensor(table["label"].to_pylist())


def test_resnet56_reaches_its_published_accuracy(data: Path) -> None:
    network, (images, labels) = published(data, 56), first_images(data, 300)
    with torch.inference_mode():
        predicted = torch.cat([network(part).argmax(1) for part in images.split(100)])
    assert int((predicted == labels).sum()) == CORRECT


def test_resnet20_loads_without_a_model(data: Path, tmp_path: Path) -> None:
    (file,) = (data / "checkpoints").glob("resnet20-*.th")
    output, recipe = tmp_path / "m.safetensors", make_recipe(None, {"bond": 10**6, "allow_growth": True})
    compress_checkpoint(file, output, recipe, arch="resnet:depth=20")
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        found, expected = mpoc.load(output)(x), published(data, 20)(x)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
