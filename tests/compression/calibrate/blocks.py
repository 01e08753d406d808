"""Small networks of blocks, with their checkpoints and data in a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import mpoc
from mpoc.compression.calibrate.calibration_data import open_calibration
from mpoc.compression.calibrate.statistics import CalibrationRequest
from mpoc.compression.pipeline import compress_checkpoint
from mpoc.compression.recipe import make_recipe
from mpoc.compression.write import Compression
from mpoc.models.loading import open_model
from mpoc.train.settings import DataOptions

NET = """
import torch
from torch import nn

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(16), nn.Linear(16, 32), nn.Linear(32, 16)
    def forward(self, x):
        return x + self.down(self.up(self.norm(x)).relu())

class Convolutions(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = (nn.Conv2d(8, 8, 3, padding=1, bias=False) for _ in range(2))
        self.norm_one, self.norm_two = (nn.BatchNorm2d(8, momentum=1.0) for _ in range(2))
    def forward(self, x):
        y = self.norm_one(self.one(x)).relu_()
        return (x + self.norm_two(self.two(y))).relu()

def blocks():
    torch.manual_seed(4)
    return nn.Sequential(Block(), Block(), nn.Linear(16, 6))

def shared():
    net = blocks()
    net[1].up = net[0].up
    return net

def convolutions():
    torch.manual_seed(4)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 1), Convolutions(), Convolutions(), nn.AvgPool2d(8), nn.Flatten(), nn.Linear(8, 6)
    )
    net(torch.rand(64, 3, 8, 8).cumsum(2) / 9)
    return net

def grouped():  # the inputs of the convolution in groups are not looked at
    torch.manual_seed(4)
    return nn.Sequential(
        nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, padding=1, groups=2), nn.ReLU(), nn.AvgPool2d(8), nn.Flatten(),
        nn.Linear(8, 24), nn.ReLU(), nn.Linear(24, 6),
    )

def plain():
    torch.manual_seed(4)
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 6))
"""


class Case:
    """A network, its checkpoint and data in a folder."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder, self.name = folder, name
        (folder / "net.py").write_text(NET)
        self.network = self.fresh().eval()
        torch.save(self.network.state_dict(), folder / "m.pt")
        generator = torch.Generator().manual_seed(0)
        self.images = name in ("convolutions", "grouped")
        if self.images:
            self.x = (torch.rand(192, 3, 8, 8, generator=generator).cumsum(2) * 15).byte()
        else:
            self.x = torch.randn(800, 16, generator=generator) * torch.logspace(0, -1, 16) + 0.3
        half = len(self.x) // 2
        np.savez(folder / "data.npz", x_train=self.x[:half].numpy(), y_train=np.zeros(half, np.int64))

    def fresh(self) -> nn.Module:
        space: dict[str, Any] = {}
        exec(NET, space)
        network: nn.Module = space[self.name]()
        return network

    @property
    def arch(self) -> str:
        return f"{self.folder}/net.py:{self.name}"

    def compress(
        self,
        refine: bool = True,
        out: str = "o",
        resume: bool = False,
        tell: Any = None,
        force: bool = False,
        **options: Any,
    ) -> Compression:
        recipe = make_recipe(None, {"device": "cpu", **options})
        request = CalibrationRequest(self.folder / "data.npz", 400, refine)
        path = self.folder / f"{out}.safetensors"
        return compress_checkpoint(
            self.folder / "m.pt",
            path,
            recipe,
            force,
            progress=tell,
            arch=self.arch,
            calibration=request,
            resume=resume,
        )

    def loaded(self, done: Compression) -> nn.Module:
        return mpoc.load(done.output, self.fresh()).eval()

    @torch.no_grad()
    def error(self, done: Compression) -> float:
        """Relative, of outputs on inputs that the calibration has not seen."""
        x = self.x[len(self.x) // 2 :].float() / (255 if self.images else 1)
        ours, dense = self.loaded(done)(x), self.network(x)
        return float((ours - dense).norm() / (dense - dense.mean(0)).norm())

    def parts(self) -> tuple[list[dict[str, Tensor]], list[dict[str, Tensor]]]:
        """Batches of the fit, and held out."""
        data = open_calibration(
            DataOptions(self.folder / "data.npz"), open_model(self.folder / "m.pt", self.arch), 400
        )
        return data.batches, data.held_out
