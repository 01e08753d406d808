"""The face of the package: what ``import mpoc`` offers, and the examples in its docstrings."""

from __future__ import annotations

import doctest
import inspect
import json
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import safetensors.torch
import torch
from torch import nn

import mpoc
from mpoc.compression.pipeline import compress_checkpoint
from mpoc.demo.data import write_digits
from mpoc.demo.network import DigitsNet, load_network
from mpoc.models import zoo
from tests.support.checkpoints import mlp_state
from tests.support.process import run_python

PACKAGE = Path(mpoc.__file__).parent
WITH_EXAMPLES = [
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")
    for path in sorted(PACKAGE.rglob("*.py"))
    if ">>> " in path.read_text("utf-8")
]
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


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files that the examples name."""
    folder = tmp_path_factory.mktemp("examples")
    torch.save(load_network().state_dict(), folder / "digits-cnn.pt")
    torch.save(zoo.make("lenet5").state_dict(), folder / "lenet5.pt")
    write_digits(folder / "digits.npz")
    for name, arch in (("digits-cnn", "mpoc.demo.network:DigitsNet"), ("lenet5", "lenet5")):
        output = folder / f"{name}.mpo.safetensors"
        compress_checkpoint(folder / f"{name}.pt", output, mpoc.Recipe(bond=8), arch=arch)
    return folder


def examples(module: str) -> Iterator[doctest.DocTest]:
    """The examples of a module's docstrings."""
    names: dict[str, Any] = {
        "torch": torch,
        "nn": nn,
        "mpoc": mpoc,
        "json": json,
        "jsonschema": jsonschema,
        "safetensors": safetensors,
        "DigitsNet": DigitsNet,
    }
    home = import_module(module)
    finder = doctest.DocTestFinder(exclude_empty=True)
    yield from (test for test in finder.find(home, extraglobs=names) if test.examples)


@pytest.mark.parametrize("module", WITH_EXAMPLES)
def test_examples_run(module: str, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for file in files.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    monkeypatch.chdir(tmp_path)
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.REPORT_NDIFF)
    tests = list(examples(module))
    assert tests
    for test in tests:
        text: list[str] = []
        assert runner.run(test, out=text.append).failed == 0, "".join(text)


def test_every_public_function_has_an_example() -> None:
    for name in FUNCTIONS:
        assert ">>> " in (inspect.getdoc(getattr(mpoc, name)) or ""), name
