"""Two processes that share out the parameters (FSDP), on CPUs; see ``sharded.py`` for how."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import distributed, nn

from mpoc.compression.pipeline import compress_checkpoint
from mpoc.compression.recipe import make_recipe
from mpoc.train.finetune import finetune
from tests.support.process import run_python
from tests.train.sharded import request
from tests.train.small import blobs

NET = """from torch import nn

def net():
    return nn.Sequential(nn.Linear(12, 24), nn.ReLU(), nn.Linear(24, 3))
"""


@pytest.mark.slow
@pytest.mark.skipif(not distributed.is_gloo_available(), reason="this torch has no gloo, which CPUs need")
def test_sharded_training_matches_one_process(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(NET)
    torch.save(
        nn.Sequential(nn.Linear(12, 24), nn.ReLU(), nn.Linear(24, 3)).state_dict(), tmp_path / "net.pt"
    )
    recipe = make_recipe(None, {"bond": 4, "sites": 2, "allow_growth": True})
    compress_checkpoint(tmp_path / "net.pt", tmp_path / "net.mpo.safetensors", recipe)
    x, y = blobs()
    np.savez(tmp_path / "blobs.npz", allow_pickle=False, x_train=x.numpy(), y_train=y.numpy())
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2)
    assert "done" in run_python(*launcher, "-m", "tests.train.sharded", tmp_path)
    done = finetune(replace(request(tmp_path), output=tmp_path / "one.safetensors"))
    two, one = (load_file(tmp_path / f"{name}.safetensors") for name in ("two", "one"))
    before = load_file(tmp_path / "net.mpo.safetensors")
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=0, atol=1e-4)
        assert float((value - before[name]).abs().max()) > 1e-3
    assert done.training["steps"] == 10
    assert (tmp_path / "two.safetensors").read_bytes() == (tmp_path / "again.safetensors").read_bytes()
