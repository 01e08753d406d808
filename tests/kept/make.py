"""Made the files here with mpoc 0.1.0, once: later versions must read them.

``format-1.safetensors`` is a calibrated network with one layer of each form; ``format-1/`` a directory with a
whole map, a padded and tied embedding, and cores in bfloat16.  ``format-1.json`` has what they must give.

    python -m tests.kept.make FOLDER        (in the repository's folder)

The numbers in the JSON are computed here, in float64 and by the formulas of the guide, without mpoc.  A later
format gets files of its own; these stay as they are.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from typer.testing import CliRunner

from mpoc.cli.app import app
from tests.support.checkpoints import save_directory

RECIPE = """
ratio = 0.6
exclude = ["alone.weight"]

[layer.conv]
form = "mpo"
bond = 4

[layer.sum]
form = "svd+mpo"

[layer.chain]
form = "mpo"
sites = 3
bond = 5

[layer.rank]
form = "svd"

[layer.head]
dense = true
"""


IDS = [0, 7, 52]


class Net(nn.Module):
    """8×8 images of two channels to four classes; one layer for each form."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 8, 3, padding=1, stride=2)
        self.sum, self.chain = nn.Linear(128, 16), nn.Linear(16, 24)
        self.rank, self.head = nn.Linear(24, 16), nn.Linear(16, 4)
        self.alone = nn.Linear(4, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Scores (n, 4) of images (n, 2, 8, 8)."""
        x = torch.tanh(self.sum(torch.tanh(self.conv(x)).flatten(1)))
        x = torch.tanh(self.rank(torch.tanh(self.chain(x))))
        found: Tensor = self.alone(self.head(x))
        return found


class Parts(nn.Module):
    """A convolution, and an embedding tied to a head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 3, padding=1)
        self.embed, self.head = nn.Embedding(53, 12), nn.Linear(12, 53, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Of images (n, 2, 4, 4) and of rows (n,)."""
        rows: Tensor = self.embed(ids)
        return self.conv(x), self.head(rows)


def images(count: int) -> Tensor:
    """(count, 2, 8, 8), the same wherever they are made."""
    numbers = torch.arange(count * 128, dtype=torch.float64)
    return ((numbers * 0.7391 + (numbers % 97).square() * 0.013) % 2 - 1).float().reshape(count, 2, 8, 8)


def weights(stored: dict[str, Tensor]) -> dict[str, Tensor]:
    """The dense weights of the cores, float64, each entry by the product in the guide."""
    cores = {name: core.double() for name, core in stored.items() if ".cores." in name}
    chain = {
        name: [core for key, core in cores.items() if key.startswith(f"{name}.cores.")]
        for name in ("conv", "sum", "chain", "rank")
    }
    low_rank = product(chain["sum"][-2:])
    conv = product(chain["conv"])  # (8, taps · 2): the tap's site comes first
    return {
        "conv.weight": conv.reshape(8, 3, 3, 2).permute(0, 3, 1, 2),
        "sum.weight": product(chain["sum"][:-2]) + low_rank,
        "chain.weight": product(chain["chain"]),
        "rank.weight": product(chain["rank"]),
    }


def product(cores: list[Tensor]) -> Tensor:
    """(outputs, inputs) of a chain, multiplied entry by entry."""
    outputs = [core.shape[1] for core in cores]
    inputs = [core.shape[2] for core in cores]
    found = torch.zeros(int(np.prod(outputs)), int(np.prod(inputs)), dtype=torch.float64)
    for row in range(found.shape[0]):
        for column in range(found.shape[1]):
            value = torch.ones(1, 1, dtype=torch.float64)
            for core, j, i in zip(
                cores, np.unravel_index(row, outputs), np.unravel_index(column, inputs), strict=True
            ):
                value = value @ core[:, j, i]
            found[row, column] = value.item()
    return found


def expected(path: Path) -> dict[str, Any]:
    """What every later version must find in the file at ``path``."""
    stored = load_file(path)
    dense = weights(stored)
    state = {name: tensor.double() for name, tensor in stored.items() if ".cores." not in name} | dense
    network = Net().double()
    network.load_state_dict(state)
    with torch.no_grad():
        answers = network(images(3).double())
    return {
        "weights": {name: short(weight.flatten()[::7]) for name, weight in dense.items()},
        "outputs": short(answers.flatten()),
    }


def expected_of_directory(path: Path) -> dict[str, Any]:
    """The same of the directory: the map by its matrix, channels last; embedding and head."""
    stored = {name: tensor.double() for name, tensor in load_file(path / "model.safetensors").items()}
    conv, embed = (
        product([core for key, core in stored.items() if key.startswith(f"{name}.cores.")])
        for name in ("conv", "embed")
    )
    x = images(1).double()[0, 0, :4].reshape(1, 2, 4, 4)
    mapped = (conv @ x.permute(0, 2, 3, 1).flatten()).reshape(4, 4, 3).permute(2, 0, 1)
    table = embed[:53, :12]
    return {
        "padded": list(embed.shape),
        "map": short((mapped + stored["conv.bias"][:, None, None]).flatten()),
        "scores": short((table[IDS] @ table.T).flatten()[::5]),
    }


def short(numbers: Tensor) -> list[float]:
    """Nine significant digits of each."""
    return [float(f"{number:.9g}") for number in numbers.tolist()]


def main() -> None:
    """Write the files into the folder that is named."""
    folder = Path(sys.argv[1])
    torch.manual_seed(0)
    torch.save(Net().state_dict(), folder / "net.pt")
    np.savez(folder / "images.npz", x=images(64).numpy())
    (folder / "recipe.toml").write_text(RECIPE)
    calibrated = (
        f"--recipe {folder}/recipe.toml --arch tests/kept/make.py:Net --calibrate {folder}/images.npz"
    )
    compress(folder / "net.pt", folder / "format-1.safetensors", calibrated)
    source = save_directory(folder / "parts", dict(Parts().state_dict()), suffix=".bin")
    options = "--bond 4 --dtype bfloat16 --embeddings --allow-growth --conv map --input-shape conv=4x4"
    compress(source, folder / "format-1", options)
    found = expected(folder / "format-1.safetensors")
    found["directory"] = expected_of_directory(folder / "format-1")
    (folder / "format-1.json").write_text(json.dumps(found, indent=1) + "\n")


def compress(source: Path, output: Path, options: str) -> None:
    """By ``mpoc compress``."""
    words = ["compress", str(source), "-o", str(output), "--device", "cpu", *options.split()]
    print(CliRunner().invoke(app, words).output)


if __name__ == "__main__":
    main()
