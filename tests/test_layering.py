"""Imports point one way, and what is quick to start stays so."""

from __future__ import annotations

import ast
import sys
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
import torch

from mpoc.compression.pipeline import compress_checkpoint
from mpoc.compression.recipe import make_recipe
from tests.checkpoints import mlp_state
from tests.process import run_python

PACKAGE = Path(__file__).resolve().parent.parent / "mpoc"
FILES = {
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}
WITHOUT_TORCH = [
    f"mpoc.{name}" for name in ("errors", "header", "structure", "manifest", "report", "schemas")
]
WITH_TRANSFORMERS = {"mpoc.hf", "mpoc.hf.names", "mpoc.data.text", "mpoc.models.architecture"}


@cache
def imports(module: str, at_import: bool = False) -> frozenset[str]:
    """Every module that a module imports, ``mpoc``'s own by their full names.

    With ``at_import`` only what runs when it is itself imported, without what functions import.
    What stands under ``if TYPE_CHECKING`` never runs and never counts.
    """
    tree = ast.parse(FILES[module].read_text("utf-8"))
    package = module if FILES[module].name == "__init__.py" else module.rpartition(".")[0]
    found: set[str] = set()
    todo: list[ast.AST] = [tree]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                upper = package.split(".")[: len(package.split(".")) + 1 - node.level]
                base = ".".join([*upper, *filter(None, [base])])
            names = {f"{base}.{alias.name}" for alias in node.names}
            found |= {name if name in FILES else base for name in names}
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            todo += node.orelse
        elif not (at_import and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)):
            todo += ast.iter_child_nodes(node)
    return frozenset(found)


def top(name: str) -> str:
    return name.partition(".")[0]


def with_packages(name: str) -> set[str]:
    """A module of mpoc and the packages above it, which Python imports first."""
    parts = name.split(".")
    return {".".join(parts[:k]) for k in range(1, len(parts) + 1)} & FILES.keys()


def reached(module: str) -> set[str]:
    """Everything that importing and using a module can import, through mpoc's own modules."""
    seen: set[str] = set()
    todo = with_packages(module)
    while todo:
        current = todo.pop()
        seen.add(current)
        for name in imports(current):
            todo |= with_packages(name) - seen
            seen |= set() if top(name) == "mpoc" else {name}
    return seen


def test_there_is_something_to_check() -> None:
    assert {
        "mpoc",
        "mpoc.compression.pipeline",
        "mpoc.cli.app",
        "mpoc.tensor_networks.forms.mpo",
    } <= FILES.keys()
    assert "mpoc.compression.plan" in imports("mpoc.compression.pipeline", at_import=True)
    assert "mpoc.compression.pipeline" in imports("mpoc.cli.compress")
    assert "mpoc.compression.pipeline" not in imports("mpoc.cli.compress", at_import=True)
    assert "torch" in reached("mpoc.compression.pipeline")


@pytest.mark.parametrize("module", WITHOUT_TORCH)
def test_a_report_needs_no_torch(module: str) -> None:
    assert {top(name) for name in reached(module)} - sys.stdlib_module_names == {"mpoc"}


def test_forms_know_torch_and_structures_only() -> None:
    allowed = {
        "torch",
        "mpoc.tensor_networks.structure",
        "mpoc.tensor_networks.topology",
        "mpoc.tensor_networks.geometry",
        *sys.stdlib_module_names,
    }
    for module in FILES:
        if module.startswith("mpoc.tensor_networks.forms"):
            others = {name for name in imports(module) if not name.startswith("mpoc.tensor_networks.forms")}
            assert {name if top(name) == "mpoc" else top(name) for name in others} <= allowed, module


def test_the_command_line_and_its_libraries_stay_in_its_folder() -> None:
    for module in FILES:
        tops = {top(name) for name in imports(module)}
        assert "click" not in tops, f"{module}: typer ships a click of its own"
        if module.startswith("mpoc.cli") or module == "mpoc.__main__":
            continue
        assert not tops & {"typer", "rich"}, module
        assert not [name for name in imports(module) if name.startswith("mpoc.cli")], module


def test_the_zoo_is_plain_torch() -> None:
    for module in FILES:
        if module.startswith("mpoc.models.zoo"):
            others = {name for name in imports(module) if not name.startswith("mpoc.models.zoo")}
            known = {"torch", "mpoc.errors"} if module == "mpoc.models.zoo" else {"torch"}
            tops = {name if top(name) == "mpoc" else top(name) for name in others}
            assert tops - sys.stdlib_module_names <= known, module


def test_transformers_has_its_place() -> None:
    users = {module for module in FILES if "transformers" in {top(name) for name in imports(module)}}
    assert users <= WITH_TRANSFORMERS


def test_no_module_takes_another_s_privates() -> None:
    for module, path in FILES.items():
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.ImportFrom) and top(node.module or "") == "mpoc":
                assert not [alias.name for alias in node.names if alias.name.startswith("_")], module


def test_no_module_grows_much_past_300_lines() -> None:
    lengths = {module: len(path.read_text("utf-8").splitlines()) for module, path in FILES.items()}
    assert {module: length for module, length in lengths.items() if length > 330} == {}


def test_no_cycles() -> None:
    graph = {module: imports(module, at_import=True) & FILES.keys() - {module} for module in FILES}
    try:
        list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(f"import cycle: {' → '.join(error.args[1])}")


def test_help_and_report_start_without_torch(tmp_path: Path) -> None:
    torch.save(mlp_state(), tmp_path / "m.pt")
    output = tmp_path / "out.safetensors"
    compress_checkpoint(tmp_path / "m.pt", output, make_recipe(None, {"bond": 2}))
    script = f"""if True:
        import contextlib, sys
        from mpoc.cli.app import app
        for arguments in (["--help"], ["compress", "--help"], ["--version"], ["report", {str(output)!r}]):
            with contextlib.suppress(SystemExit):
                app(arguments)
        heavy = {{"torch", "numpy", "safetensors", "transformers", "mpoc.models.zoo"}} & sys.modules.keys()
        print("heavy:", *heavy)
    """
    said = run_python("-c", script)
    assert "ρ = " in said
    assert said.splitlines()[-1].strip() == "heavy:"
