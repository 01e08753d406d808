"""The layout: imports point from higher levels to lower ones, and what starts quickly keeps doing so."""

from __future__ import annotations

import ast
import sys
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mpoc.compression.pipeline import compress_checkpoint
from mpoc.compression.recipe import make_recipe
from tests.support.checkpoints import mlp_state
from tests.support.process import run_python

PACKAGE = Path(__file__).resolve().parent.parent / "mpoc"
FILES = {
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}
# A module imports from lower levels and from its own package.
LEVELS = {
    "mpoc.errors": 1,
    "mpoc.runtime": 2,
    "mpoc.quantize": 2,
    "mpoc.data": 2,
    "mpoc.tensor_networks": 3,
    "mpoc.io": 4,
    "mpoc.nn": 4,
    "mpoc.hf": 5,
    "mpoc.reporting": 5,
    "mpoc.models": 6,
    "mpoc.demo": 6,
    "mpoc.train": 7,
    "mpoc.compression": 8,
    "mpoc.reproduce": 8,
    "mpoc.cli": 9,
    "mpoc.__main__": 10,
    "mpoc": 10,
}
MOST_MODULES = 199
WITHOUT_TORCH = (
    "errors",
    "runtime.formatting",
    "runtime.signals",
    "io.atomic",
    "io.validation",
    "io.safetensors_header",
    "io.manifest",
    "io.manifest_reader",
    "reporting.remarks",
    "reporting.summary",
    "reporting.schemas",
    "quantize.storage",
    "tensor_networks.structure",
    "tensor_networks.factors",
    "tensor_networks.topology",
    "tensor_networks.geometry",
    "compression.recipe",
    "compression.recipe_syntax",
    "compression.selection",
)
# Which modules may import a library, by the library.
USERS = {
    "typer": ("mpoc.cli",),
    "rich": ("mpoc.cli",),
    "click": (),  # typer ships its own
    "transformers": ("mpoc.hf", "mpoc.data.text", "mpoc.models.architecture"),
    "matplotlib": ("mpoc.reporting.plots", "mpoc.reproduce.figures"),
    "accelerate": ("mpoc.train.engine",),
    "torchvision": (),  # by name, in mpoc.models.packaged
    "timm": (),
}


@cache
def imports(module: str) -> frozenset[str]:
    """Every module that a module imports, also inside functions, ``mpoc``'s own by their full names.

    What stands under ``if TYPE_CHECKING`` never runs and does not count.
    """
    tree = ast.parse(FILES[module].read_text("utf-8"))
    found: set[str] = set()
    todo: list[ast.AST] = [tree]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{module}: imports are absolute"
            base = node.module or ""
            names = {f"{base}.{alias.name}" for alias in node.names}
            found |= {name if name in FILES else base for name in names}
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            todo += node.orelse
        else:
            todo += ast.iter_child_nodes(node)
    return frozenset(found)


def top(name: str) -> str:
    return name.partition(".")[0]


def package(module: str) -> str:
    """``mpoc.io.manifest`` → ``mpoc.io``."""
    return ".".join(module.split(".")[:2])


def with_packages(name: str) -> set[str]:
    """A module of mpoc and the packages above it, which Python imports first."""
    parts = name.split(".")
    return {".".join(parts[:k]) for k in range(1, len(parts) + 1)} & FILES.keys()


def reached(module: str) -> set[str]:
    """Everything that importing and using a module can import, through mpoc's own modules.

    The face of mpoc imports lazily, and only what is asked of it.
    """
    seen: set[str] = set()
    todo = with_packages(module) - {"mpoc"}
    while todo:
        current = todo.pop()
        seen.add(current)
        for name in imports(current):
            todo |= with_packages(name) - seen - {"mpoc"}
            seen |= set() if top(name) == "mpoc" else {name}
    return seen


def test_finds_imports_inside_functions() -> None:
    assert "mpoc.compression.pipeline" in imports("mpoc.cli.compress")
    assert "torch" in reached("mpoc.compression.pipeline")
    assert "torch" not in reached("mpoc.errors")


def test_every_package_has_a_level() -> None:
    assert {package(module) for module in FILES} == LEVELS.keys()


@pytest.mark.parametrize("module", FILES)
def test_imports_point_to_lower_levels(module: str) -> None:
    own = package(module)
    others = {package(name) for name in imports(module) & FILES.keys()} - {own, "mpoc"}
    assert [other for other in others if LEVELS[other] >= LEVELS[own]] == []


def test_imports_have_no_cycle() -> None:
    graph = {module: (imports(module) & FILES.keys()) - {module, "mpoc"} for module in FILES}
    try:
        list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(f"import cycle: {' → '.join(error.args[1])}")


@pytest.mark.parametrize("module", WITHOUT_TORCH)
def test_imports_without_torch(module: str) -> None:
    assert {top(name) for name in reached(f"mpoc.{module}")} - sys.stdlib_module_names == {"mpoc"}


@pytest.mark.parametrize("library", USERS)
def test_libraries_have_their_places(library: str) -> None:
    users = {module for module in FILES if library in {top(name) for name in imports(module)}}
    assert [user for user in users if not user.startswith(USERS[library] or ("-",))] == []


def test_zoo_needs_torch_only() -> None:
    for module in FILES:
        if module.startswith("mpoc.models.zoo"):
            others = {name for name in imports(module) if not name.startswith("mpoc.models.zoo")}
            tops = {name if top(name) == "mpoc" else top(name) for name in others}
            assert tops - sys.stdlib_module_names <= {"torch", "mpoc.errors"}, module


def test_private_names_stay_in_their_module() -> None:
    for module, path in FILES.items():
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.ImportFrom) and top(node.module or "") == "mpoc":
                assert not [alias.name for alias in node.names if alias.name.startswith("_")], module


def test_modules_are_few_and_of_readable_length() -> None:
    lengths = {module: len(path.read_text("utf-8").splitlines()) for module, path in FILES.items()}
    assert len(lengths) <= MOST_MODULES
    assert {module: length for module, length in lengths.items() if length > 420} == {}


def test_public_class_names_have_one_meaning() -> None:
    seen: dict[str, str] = {}
    for module, path in FILES.items():
        for node in ast.parse(path.read_text("utf-8")).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                assert node.name not in seen, f"{node.name}: in {seen[node.name]} and in {module}"
                seen[node.name] = module


def test_help_and_report_start_without_torch(tmp_path: Path) -> None:
    torch.save(mlp_state(), tmp_path / "m.pt")
    dense = tmp_path / "dense.safetensors"
    save_file(mlp_state(), dense)
    output = tmp_path / "out.safetensors"
    compress_checkpoint(tmp_path / "m.pt", output, make_recipe(None, {"bond": 2}))
    script = f"""if True:
        import contextlib, sys
        from mpoc.cli.app import app
        both = ["report", {str(output)!r}], ["inspect", {str(dense)!r}]
        for arguments in (["--help"], ["compress", "--help"], ["--version"], *both):
            with contextlib.suppress(SystemExit):
                app(arguments)
        heavy = {{"torch", "numpy", "safetensors", "transformers", "mpoc.models.zoo"}} & sys.modules.keys()
        print("heavy:", *heavy)
    """
    said = run_python("-c", script)
    assert "ρ = " in said and "compressible: 2 tensors" in said
    assert said.splitlines()[-1].strip() == "heavy:"
