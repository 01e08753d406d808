"""Small networks of blocks, with their checkpoints and data in a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import mpoc
from mpoc.compression.calibrate.calibration_data import CalibrationRequest, open_calibration
from mpoc.compression.pipeline import compress_checkpoint
from mpoc.compression.recipe import make_recipe
from mpoc.compression.run_context import Progress
from mpoc.compression.write import Compression
from tests.compression.calibrate.toy_networks import arch, make


class Case:
    """A network, its checkpoint and data in a folder."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder, self.name = folder, name
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
        return make(self.name)

    @property
    def arch(self) -> str:
        return arch(self.name)

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
            force=force,
            progress=Progress(tell),
            arch=self.arch,
            calibrate=request,
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
        request = CalibrationRequest(self.folder / "data.npz", 400)
        data = open_calibration(self.folder / "m.pt", self.arch, request)
        return data.batches, data.held_out
