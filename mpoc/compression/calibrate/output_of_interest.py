"""What the fit keeps of a network's outputs: the output of interest.

Where outputs are logits of classes or tokens, that is their distribution, and random directions in it are
gradients of log p of labels drawn from it (their second moment is Fisher's information).  Where outputs are
embeddings, it is the vector that users compare, pooled and normalised as the directory of a
sentence-transformers model says, else the vector of every token.  Of any other output it is each number.
Directions in both of these are random signs.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mpoc.errors import MpocError
from mpoc.models.call import Batch, first_output, has_logits, rows


@dataclass(frozen=True)
class Pooling:
    """How token vectors become one vector of a text."""

    mode: str  # "mean" or "cls"
    normalize: bool

    def __call__(self, states: Tensor, batch: Batch) -> Tensor:
        """One vector (n, width) from the vectors of tokens (n, T, width)."""
        mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
        if self.mode == "cls":
            pooled = states[torch.arange(len(states)), mask.argmax(1)]
        else:
            weights = mask[:, :, None].to(states.dtype)
            pooled = (states * weights).sum(1) / weights.sum(1).clamp(min=1e-9)
        return F.normalize(pooled, dim=-1) if self.normalize else pooled


def read_pooling(path: Path) -> Pooling | None:
    """The pooling of a sentence-transformers directory; None if it has none, or one that is not supported.

    Raises:
        MpocError: its ``modules.json`` or pooling configuration cannot be read.
    """
    file = path / "modules.json"
    if not file.is_file():
        return None
    modules = _read(file)
    try:
        kinds = [str(module["type"]).rpartition(".")[2] for module in modules]
        if kinds not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]):
            return None
        config = dict(_read(path / modules[1]["path"] / "config.json"))
    except (KeyError, TypeError, ValueError) as error:
        raise MpocError(f"{file}: damaged ({error!r})") from error
    chosen = [key for key, value in config.items() if key.startswith("pooling_mode_") and value is True]
    modes = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls"}
    mode = modes.get(chosen[0]) if len(chosen) == 1 else None
    return None if mode is None else Pooling(mode, "Normalize" in kinds)


def _read(file: Path) -> Any:
    try:
        return json.loads(file.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise MpocError(f"{file}: cannot be read ({error})") from error


def output_of_interest(outputs: Any, batch: Batch, pooling: Pooling | None = None) -> tuple[Tensor, bool]:
    """The output of interest as rows (rows, width), and whether it is logits.

    Args:
        outputs: of the network on ``batch``.
        batch: tokens that are padding give no row.
        pooling: for a network that gives the vectors of tokens.
    """
    values = first_output(outputs).float()
    tokens = "input_ids" in batch and values.dim() == 3 and values.shape[:2] == batch["input_ids"].shape
    targets = batch.get("y")
    scores = has_logits(outputs) and (tokens or values.dim() == 2) and values.shape[-1] > 1
    if scores and not (targets is not None and targets.is_floating_point()):
        return rows(values, batch), True
    if pooling is not None and tokens:
        return pooling(values, batch), False
    return rows(values, batch), False


@torch.no_grad()
def direction(values: Tensor, are_logits: bool, generator: torch.Generator) -> Tensor:
    """A direction (rows, width): the gradient of Σ log p(drawn label) by the logits, or random signs."""
    if not are_logits:
        signs = torch.randint(0, 2, values.shape, generator=generator, device=values.device)
        return signs.to(values.dtype) * 2 - 1
    p = values.softmax(-1)
    drawn = torch.multinomial(p, 1, generator=generator)
    return p.neg_().scatter_add_(1, drawn, torch.ones_like(drawn, dtype=p.dtype))
