"""``--arch`` from end to end."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

import mpoc
from mpoc.models.zoo import example, make
from tests.support.process import Here


@pytest.mark.parametrize("spec", ["fc2", "resnet:depth=8"])
def test_arch_is_recorded_and_used_by_report_and_load(here: Here, spec: str) -> None:
    network = make(spec).eval()
    torch.save(network.state_dict(), here.folder / "m.pt")
    done = here("compress", "m.pt", "--bond", "4", "--arch", spec)
    assert done.returncode == 0, done.stderr
    assert f"architecture {spec} (zoo)" in done.stdout
    assert "layer kinds read from the model's modules" in done.stdout
    assert f"architecture {spec} (zoo)" in here("report", "m.mpo.safetensors").stdout
    report = json.loads(here("report", "m.mpo.safetensors", "--json").stdout)
    assert report["architecture"] == {"zoo": spec}
    path = here.folder / "m.mpo.safetensors"
    x = torch.ones_like(example(spec))
    with torch.no_grad():
        torch.testing.assert_close(mpoc.load(path)(x), mpoc.load(path, network)(x))


@pytest.mark.slow
def test_a_short_name_is_recorded_in_its_long_form(here: Here) -> None:
    torch.save(make("resnet20").state_dict(), here.folder / "m.pt")
    files = []
    for arch in ("resnet20", "resnet:depth=20"):
        done = here("compress", "m.pt", "--bond", "4", "--arch", arch, "--force")
        assert done.returncode == 0, done.stderr
        files.append((here.folder / "m.mpo.safetensors").read_bytes())
    assert files[0] == files[1]


@pytest.mark.slow
def test_export_uses_the_recorded_arch(here: Here) -> None:
    torch.save(make("fc2").state_dict(), "m.pt")
    assert here("compress", "m.pt", "--bond", "4", "--arch", "fc2").returncode == 0
    done = here("export", "m.mpo.safetensors", "--onnx", "m.onnx")
    assert done.returncode == 0, done.stderr
    assert (here.folder / "m.onnx").stat().st_size > 1000


@pytest.mark.parametrize(
    ("arch", "said"),
    [
        ("fc2", "does not fit --arch fc2: tensor 'fc1.weight' is only in the network"),
        ("fc3", "did you mean 'fc2'?"),
    ],
)
def test_rejects_arch_that_does_not_match_the_checkpoint(here: Here, arch: str, said: str) -> None:
    torch.save(nn.Linear(16, 16).state_dict(), here.folder / "m.pt")
    done = here("compress", "m.pt", "--bond", "2", "--arch", arch)
    assert (done.returncode, done.stdout) == (2, "")
    assert said in done.stderr
    assert [file.name for file in here.folder.iterdir()] == ["m.pt"]
