"""List the packages that mpoc needs and that are installed, without importing them, and compare versions.

The requirements are those of mpoc's own metadata.  Versions compare by their release numbers; suffixes
(``+cpu``, ``rc1``) do not count.
"""

from __future__ import annotations

import operator
import platform
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mpoc
from mpoc.errors import MpocError, shortened

_RELEASE = re.compile(r"(\d{1,9}(?:\.\d{1,9}){0,5})(?:(?:[+-]|\.?[a-z])[\w.+-]{0,40})?")
_BOUND = re.compile(r"(>=|<=|==|!=|>|<)\s*([\w.+]+)")
_COMPARE: dict[str, Callable[[tuple[int, ...], tuple[int, ...]], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    "==": operator.eq,
    "!=": operator.ne,
    ">": operator.gt,
    "<": operator.lt,
}

_REQUIREMENT = re.compile(r"([\w.-]+)[^;<>=!~]*([^;]*)(?:;.*extra\s*==\s*['\"]([\w-]+)['\"])?")
# Extras that a user chooses, in the order of the output.
EXTRAS = ("hf", "train", "plot", "onnx")
PYTHON = "Python"
NETWORKS = ("torchvision", "timm")  # packages whose networks --arch names, as torchvision:resnet18


def is_packaged(arch: str) -> bool:
    """Whether ``arch`` names a network of such a package."""
    return arch.partition(":")[0] in NETWORKS and ":" in arch


def release(version: str) -> tuple[int, ...] | None:
    """``2.13.0+cpu`` → (2, 13), trailing zeros left out; None if it is not a version."""
    match = _RELEASE.fullmatch(version)
    return tuple(map(int, re.sub(r"(\.0+)+$", "", match[1]).split("."))) if match else None


def is_later(version: str, than: str) -> bool:
    """Whether both are versions and the first comes after the second."""
    first, second = release(version), release(than)
    return first is not None and second is not None and first > second


def is_within(version: str, bounds: str) -> bool:
    """Whether ``2.13.0`` keeps ``>=2.6,<2.14``; False if it is not a version."""
    own = release(version)
    pairs = ((_COMPARE[sign], release(bound)) for sign, bound in _BOUND.findall(bounds))
    return own is not None and all(bound is not None and keeps(own, bound) for keeps, bound in pairs)


def unreadable(path: Path, tool: Any, error: Exception) -> MpocError:
    """The error for a manifest that is damaged, or that a later mpoc wrote with fields unknown to this one.

    Args:
        path: path of the file.
        tool: what the manifest says of its writer, ``"mpoc 0.2.0"``; unchecked.
        error: of reading it.
    """
    writer = tool.removeprefix("mpoc ") if isinstance(tool, str) else ""
    if is_later(writer, mpoc.__version__):
        return MpocError(
            f"{path}: written by mpoc {writer}, this is mpoc {mpoc.__version__}: {error}",
            "pip install --upgrade mpoc",
        )
    return MpocError(f"{path}: damaged manifest ({shortened(error)})")


@dataclass(frozen=True)
class Package:
    """A package that mpoc needs, or that one of its extras installs."""

    name: str
    version: str | None  # None: not installed
    needs: str  # as ">=2.6,<2.14"
    extra: str | None = None  # None: needed always

    @property
    def is_right(self) -> bool:
        """Whether it is installed in a version within mpoc's bounds."""
        return self.version is not None and is_within(self.version, self.needs)

    @property
    def remedy(self) -> str:
        """The command that installs a version within the bounds."""
        if self.extra is not None:
            return install(self.extra)
        return (
            f"install Python {self.needs}"
            if self.name == PYTHON
            else f"pip install '{self.name}{self.needs}'"
        )


def install(extra: str) -> str:
    """``pip install 'mpoc[hf]'``."""
    return f"pip install 'mpoc[{extra}]'"


def packages() -> list[Package]:
    """Python itself, required packages and those of extras, in the order of the metadata.

    Raises:
        importlib.metadata.PackageNotFoundError: mpoc runs from a folder, and is not installed.
    """
    from importlib import metadata

    about = metadata.metadata("mpoc").json
    listed = [Package(PYTHON, platform.python_version(), str(about.get("requires_python", "")))]
    for line in metadata.requires("mpoc") or ():
        match = _REQUIREMENT.fullmatch(line)
        if match is not None and match[3] in (None, *EXTRAS):
            listed.append(Package(match[1], _version(match[1]), _in_order(match[2].strip()), match[3]))
    return listed


def _version(name: str) -> str | None:
    from importlib import metadata

    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _in_order(bounds: str) -> str:
    """``<2.14,>=2.6`` → ``>=2.6,<2.14``."""
    return ",".join(sorted(filter(None, bounds.split(",")), reverse=True))
