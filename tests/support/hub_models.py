"""Tiny models of transformers on disk: as they were, compressed, and expanded again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mpoc.compression.expand import expand_checkpoint
from mpoc.compression.pipeline import compress_checkpoint
from mpoc.compression.recipe import make_recipe
from tests.support import architectures

transformers: Any = import_module("transformers")  # its own types are not complete
AUTO = {**architectures.AUTO, "t5": architectures.ALL["t5"]}
IDS = torch.arange(2, 18).reshape(2, 8)
tiny = architectures.tiny


def auto(kind: str, folder: Path, **options: Any) -> Any:
    """Loaded with the head that it was saved with."""
    return getattr(transformers, AUTO[kind]).from_pretrained(folder, **options)


def answer(model: Any) -> Tensor:
    """Logits (hidden states where there is no head) on an input that is always the same."""
    model.eval()
    kind = model.config.model_type
    with torch.no_grad():
        if kind == "vit":
            pixels = torch.linspace(-1, 1, 2 * 3 * 16 * 16).reshape(2, 3, 16, 16)
            return model(pixels.to(model.dtype))[0]
        if kind == "t5":
            return model(input_ids=IDS, decoder_input_ids=IDS[:, :3])[0]
        return model(input_ids=IDS)[0]


@dataclass(frozen=True)
class Compressed:
    """A directory that ``mpoc compress`` wrote, in a folder of its own."""

    folder: Path

    @property
    def path(self) -> Path:
        return self.folder / "compressed"

    @cached_property
    def expanded(self) -> Path:
        expand_checkpoint(self.path, self.folder / "expanded")
        return self.folder / "expanded"


def compress(model: Any, folder: Path, **options: Any) -> Compressed:
    """Save a model and compress it, to bond 6 where nothing else is said."""
    model.save_pretrained(folder / "original")
    return compress_saved(folder, **options)


def compress_saved(folder: Path, **options: Any) -> Compressed:
    """Compress what lies in ``folder / "original"``."""
    recipe = make_recipe(None, {"bond": 6} | options)
    compress_checkpoint(folder / "original", folder / "compressed", recipe)
    return Compressed(folder)


Make = Callable[..., Compressed]


def compress_once(factory: pytest.TempPathFactory) -> Make:
    """``make("gpt2", embeddings=True)``: a tiny model compressed, each only once."""
    return cache(lambda kind, **options: compress(tiny(kind), factory.mktemp(kind), **options))
