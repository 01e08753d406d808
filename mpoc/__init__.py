"""mpoc: compress trained networks with matrix product operators and other tensor networks.

    report = mpoc.compress(model, bond=4)                  # in memory, in place
    mpoc.save(model, "model.mpo.safetensors")              # as a file that every command reads
    model = mpoc.load("model.mpo.safetensors", model)      # into the dense network
    model = mpoc.load("bert-mpo")                          # where the file or directory names its network

Files: :func:`compress_checkpoint`, :func:`expand_checkpoint` and :func:`read_report`. A name is imported when
it is first used, so that ``import mpoc`` and :func:`read_report` do not import torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mpoc.compression.expand import expand_checkpoint
    from mpoc.compression.in_memory import compress
    from mpoc.compression.pipeline import compress_checkpoint
    from mpoc.compression.recipe import LayerRule, Recipe
    from mpoc.errors import MpocError, UsageError
    from mpoc.models.loading import load
    from mpoc.models.saving import save
    from mpoc.reporting.summary import Report, read_report

__version__ = "0.2.0"
__all__ = [
    "LayerRule",
    "MpocError",
    "Recipe",
    "Report",
    "UsageError",
    "__version__",
    "compress",
    "compress_checkpoint",
    "expand_checkpoint",
    "load",
    "read_report",
    "save",
]
_HOMES = {
    "LayerRule": "mpoc.compression.recipe",
    "MpocError": "mpoc.errors",
    "Recipe": "mpoc.compression.recipe",
    "Report": "mpoc.reporting.summary",
    "UsageError": "mpoc.errors",
    "compress": "mpoc.compression.in_memory",
    "compress_checkpoint": "mpoc.compression.pipeline",
    "expand_checkpoint": "mpoc.compression.expand",
    "load": "mpoc.models.loading",
    "read_report": "mpoc.reporting.summary",
    "save": "mpoc.models.saving",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'mpoc' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
