"""mpoc: compress trained networks by matrix product operators and other tensor networks.

    report = mpoc.compress(model, bond=4)                    # in memory, in place
    model = mpoc.load("model.mpo.safetensors", model)        # a file that ``mpoc compress`` wrote
    model = mpoc.load("resnet20.mpo.safetensors")            # where the file names a network of the zoo

Both import torch when they are first used, so that ``mpoc report`` need not.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mpoc.compression.in_memory import compress
    from mpoc.models.loading import load

__version__ = "0.2.0"
__all__ = ["__version__", "compress", "load"]
_HOMES = {"compress": "mpoc.compression.in_memory", "load": "mpoc.models.loading"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'mpoc' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
