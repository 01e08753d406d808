from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mpoc.io.checkpoint import strip_wrappers
from mpoc.io.open_checkpoint import open_checkpoint
from mpoc.io.safetensors_header import TensorInfo


@pytest.mark.parametrize(
    ("names", "clean"),
    [
        (["a.weight", "b"], ["a.weight", "b"]),
        (["module.a", "module.b"], ["a", "b"]),
        (["module.module.a", "module.module.b"], ["a", "b"]),
        (["_orig_mod.a", "_orig_mod.b"], ["a", "b"]),
        (["module._orig_mod.a", "module._orig_mod.b"], ["a", "b"]),
        (["_orig_mod.module.a"], ["a"]),
        (["body._orig_mod.a", "head.b"], ["body.a", "head.b"]),
        (["module.a", "head.b"], ["module.a", "head.b"]),  # a submodule that is called so
        (["_orig_mod.a", "a"], ["_orig_mod.a", "a"]),  # two would become one
        ([], []),
    ],
)
def test_strips_wrapper_prefixes(names: list[str], clean: list[str]) -> None:
    assert strip_wrappers(names) == dict(zip(names, clean, strict=True))


def test_parameters_exclude_statistics_and_integers(tmp_path: Path) -> None:
    state = {
        "conv.weight": torch.randn(3, 5),
        "bn.running_mean": torch.randn(7),
        "bn.running_var": torch.randn(7),
        "bn.num_batches_tracked": torch.tensor(2),
        "head": torch.randn(11, dtype=torch.bfloat16),
    }
    save_file(state, tmp_path / "m.safetensors")
    assert open_checkpoint(tmp_path / "m.safetensors").num_parameters == 15 + 11


def test_counts_tied_tensors_once(tmp_path: Path) -> None:
    shared = torch.randn(6, 4)
    torch.save({"embed.weight": shared, "head.weight": shared}, tmp_path / "m.pt")
    checkpoint = open_checkpoint(tmp_path / "m.pt")
    assert checkpoint.num_parameters == 24
    assert checkpoint.weight_files == [tmp_path / "m.pt"]
    assert checkpoint.nbytes_on_disk == (tmp_path / "m.pt").stat().st_size


def test_fingerprint_depends_on_names_shapes_and_dtypes(tmp_path: Path) -> None:
    save_file({"a": torch.randn(2, 3), "b": torch.randn(4)}, tmp_path / "m.safetensors")
    checkpoint = open_checkpoint(tmp_path / "m.safetensors")
    a, b = checkpoint.infos.values()

    def fingerprint(*infos: TensorInfo) -> str:
        return dataclasses.replace(checkpoint, infos={info.name: info for info in infos}).fingerprint()

    assert fingerprint(b, a) == fingerprint(a, b)  # the order is no part of it
    others = [
        fingerprint(a),
        fingerprint(dataclasses.replace(a, name="c"), b),
        fingerprint(dataclasses.replace(a, shape=(3, 2)), b),
        fingerprint(dataclasses.replace(a, dtype="float16"), b),
    ]
    assert len({fingerprint(a, b), *others}) == 5
