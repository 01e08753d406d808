"""The face of the package: what ``import mpoc`` offers, and the examples in its docstrings."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
import torch

import mpoc
from mpoc.compression.pipeline import compress_checkpoint
from tests.support.checkpoints import mlp_state
from tests.support.process import run_python

FUNCTIONS = [name for name in mpoc.__all__ if inspect.isfunction(getattr(mpoc, name))]


def test_dir_lists_all_that_is_public() -> None:
    assert set(mpoc.__all__) <= set(dir(mpoc))
    assert sorted(mpoc.__all__) == mpoc.__all__
    assert all(getattr(mpoc, name) is not None for name in mpoc.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'compres'"):
        _ = mpoc.compres


@pytest.mark.parametrize("name", FUNCTIONS)
def test_signatures_are_explicit_and_typed(name: str) -> None:
    signature = inspect.signature(getattr(mpoc, name))
    for parameter in signature.parameters.values():
        assert parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
        assert parameter.annotation is not parameter.empty
    assert signature.return_annotation is not signature.empty


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_parameter_is_documented(name: str) -> None:
    function = getattr(mpoc, name)
    text = inspect.getdoc(function) or ""
    for parameter in inspect.signature(function).parameters:
        assert f"\n    {parameter}: " in text or f", {parameter}: " in text, parameter
    assert "Raises:" in text


def test_a_report_is_read_without_torch(tmp_path: Path) -> None:
    torch.save(mlp_state(), tmp_path / "m.pt")
    output = tmp_path / "out.safetensors"
    done = compress_checkpoint(tmp_path / "m.pt", output, mpoc.Recipe(bond=2))
    assert repr(done.report) == repr(mpoc.read_report(output))
    text = run_python(
        "-c",
        f"import sys, mpoc; dir(mpoc); mpoc.Recipe(bond=2); mpoc.UsageError; "
        f"print(mpoc.read_report({str(output)!r})); "
        "print({'torch', 'numpy', 'safetensors'} & sys.modules.keys())",
    )
    assert "Report: ρ = " in text
    assert text.splitlines()[-1] == "set()"
