"""Which packages mpoc asks for, by its own metadata, and which are there.  Imports none of them."""

from __future__ import annotations

import platform
import re
from dataclasses import dataclass
from importlib import metadata

from mpoc.versions import is_within

_REQUIREMENT = re.compile(r"([\w.-]+)[^;<>=!~]*([^;]*)(?:;.*extra\s*==\s*['\"]([\w-]+)['\"])?")
# Extras that a user chooses, in the order in which they are told.
EXTRAS = ("hf", "train", "plot", "onnx")
PYTHON = "Python"


@dataclass(frozen=True)
class Package:
    """One that mpoc needs, or that an extra brings."""

    name: str
    version: str | None  # None: not installed
    needs: str  # as ">=2.6,<2.14"
    extra: str | None = None  # None: needed always

    @property
    def is_right(self) -> bool:
        """Whether it is there, in a version that mpoc is made for."""
        return self.version is not None and is_within(self.version, self.needs)

    @property
    def mend(self) -> str:
        """What brings one that is right."""
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
    """Python itself, what is needed always, and what extras bring, in the order of the metadata.

    Raises:
        importlib.metadata.PackageNotFoundError: mpoc runs from a folder, and is not installed.
    """
    about = metadata.metadata("mpoc").json
    found = [Package(PYTHON, platform.python_version(), str(about.get("requires_python", "")))]
    for line in metadata.requires("mpoc") or ():
        match = _REQUIREMENT.fullmatch(line)
        if match is not None and match[3] in (None, *EXTRAS):
            found.append(Package(match[1], _version(match[1]), _in_order(match[2].strip()), match[3]))
    return found


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _in_order(bounds: str) -> str:
    """``<2.14,>=2.6`` → ``>=2.6,<2.14``."""
    return ",".join(sorted(filter(None, bounds.split(",")), reverse=True))
