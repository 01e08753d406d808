from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import nn

from mpoc.compression.pipeline import compress_checkpoint
from mpoc.compression.recipe import make_recipe
from mpoc.models.loading import open_network
from tests.support.architectures import tiny
from tests.support.checkpoints import contents
from tests.support.process import Here, Mpoc

NET = """from torch import nn

def net():
    return nn.Sequential(nn.Linear(48, 64), nn.ReLU(), nn.Linear(64, 32))
"""


@pytest.fixture
def compressed(tmp_path: Path) -> Path:
    network = nn.Sequential(nn.Linear(48, 64), nn.ReLU(), nn.Linear(64, 32))
    torch.save(network.state_dict(), tmp_path / "m.pt")
    output = tmp_path / "m.mpo.safetensors"
    compress_checkpoint(tmp_path / "m.pt", output, make_recipe(None, {"bond": 4}))
    return output


def test_writes_onnx_and_pt2(run: Mpoc, compressed: Path) -> None:
    (run.folder / "net.py").write_text(NET)
    shape = ("--input-shape", "1x48")
    done = run("export", compressed, "--arch", "net:net", *shape, "--onnx", "m.onnx", "--pt2", "m.pt2")
    assert (done.returncode, done.stdout) == (0, "")
    lines = done.stderr.splitlines()
    assert len(lines) == 2, done.stderr  # nothing of torch's
    assert lines[0].startswith("wrote m.onnx: ")
    assert lines[1].startswith("wrote m.pt2: ")
    assert lines[1].endswith("kB, inputs batch×48 float32")
    written = {name for name in contents(run.folder) if not name.startswith("__pycache__")}
    assert written == {"net.py", "m.onnx", "m.pt2"}
    network = open_network(compressed, f"{run.folder / 'net.py'}:net")
    x = torch.randn(5, 48)
    program = torch.export.load(run.folder / "m.pt2").module()
    torch.testing.assert_close(program(x), network(x), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (["--arch", "net.py:net", "--input-shape", "1x48"], 2, "nothing to write"),
        (["--arch", "net.py:net", "--pt2", "m.pt2"], 2, "the shape of the input is needed"),
        (["--input-shape", "1x48", "--pt2", "m.pt2"], 2, "holds tensors, not the network's code"),
        (
            ["--arch", "net.py:net", "--input-shape", "48,1", "--pt2", "m.pt2"],
            2,
            "not a shape with its batch",
        ),
        (["--arch", "net.py:ner", "--input-shape", "1x48", "--pt2", "m.pt2"], 2, "did you mean 'net'?"),
        (["--arch", "net.py:net", "--input-shape", "1x47", "--pt2", "m.pt2"], 2, "batch×47 fails: "),
        (["--arch", "net.py:net", "--input-shape", "1x48", "--pt2", "old.pt2"], 2, "exists already"),
        (["--arch", "net.py:net", "--hf", "h"], 2, "--arch and --input-shape apply to --onnx and --pt2"),
        (["--multiple", "16", "--pt2", "m.pt2"], 2, "--coded and --multiple apply to --hf"),
    ],
)
def test_rejects_bad_arguments(
    here: Here, compressed: Path, arguments: list[str], status: int, said: str
) -> None:
    Path("net.py").write_text(NET)
    Path("old.pt2").write_text("mine")
    before = contents(Path())
    result = here("export", compressed, *arguments)
    assert result.returncode == status, result.stderr
    assert said in result.stderr
    assert {k: v for k, v in contents(Path()).items() if "__pycache__" not in k} == before


def test_tells_what_a_directory_adds(here: Here) -> None:
    """Padding, bytes of codes, and the error of rounding to 4 bits."""
    tiny("llama", layers=1).save_pretrained("llama")
    Path("recipe.toml").write_text('[layer."*mlp*"]\nform = "svd"\nbond = 6\n')
    recipe = make_recipe(Path("recipe.toml"), {"min_params": 1, "bits": 4, "storage": "coded"})
    compress_checkpoint(Path("llama"), Path("out"), recipe)
    done = here("export", "out", "--hf", "hf", "--coded", "4", "--multiple", "16")
    assert done.returncode == 0, done.stderr
    first, second, third = done.stderr.splitlines()[:3]
    # 3 pairs of 32 and 48 numbers a rank, in float32 but for two factors of 16 rows of 32.
    assert "; 3 layers as pairs of linear layers (7.04 kB of them zeros), 7 with codes" in first
    rows = (32, 16, 16, 32, 97, 16, 16)  # of one group each
    nbytes = sum(16 * n + 4 * n + 4 * -(-n // 8) + 16 for n in rows)
    assert f"compressed-tensors ({nbytes / 1000:.3g} kB, " in first
    said = re.fullmatch(
        r"7 coded layers rounded to 4 bits: relative error (\S+) on average, (\S+) at most \(.*\)", second
    )
    assert said and 0.03 < float(said[1]) <= float(said[2]) < 0.12
    assert third == "to load codes: pip install compressed-tensors"


@pytest.mark.slow
def test_quiet_and_force(here: Here, compressed: Path) -> None:
    Path("net.py").write_text(NET)
    Path("m.pt2").write_text("old")
    options = ("--arch", "net.py:net", "--input-shape", "1x48", "--pt2", "m.pt2", "--force", "--quiet")
    result = here("export", compressed, *options)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    assert torch.export.load("m.pt2").module()(torch.ones(3, 48)).shape == (3, 32)
