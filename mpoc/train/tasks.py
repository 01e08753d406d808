"""What is learnt: a loss, what it is a mean over, and the measures that are reported.

A task gives *sums* over a batch, so that a mean over parts, processes or a whole split is exact whatever the
sizes of the batches.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mpoc.errors import UsageError
from mpoc.models.call import Batch, first_output

Sums = dict[str, Tensor]  # scalars
Scores = dict[str, float]
IGNORED = -100  # the label of a token that is not predicted


class Task(ABC):
    """One way to train; ``metric`` is the score that chooses the best weights."""

    name: str
    metric: str
    higher_is_better: bool
    hidden = False  # whether the network is asked for its hidden states
    teacher: nn.Module | None = None  # must be where the network is

    def prepare(self, batch: Batch, generator: torch.Generator) -> Batch:
        """What is drawn anew for each batch, on the CPU; most tasks draw nothing."""
        return batch

    def prepare_each(self, batch: Batch, seeds: list[int]) -> Batch:
        """The same, drawn for each example from its own seed: it depends on no other of the batch."""
        return batch

    @abstractmethod
    def count(self, batch: Batch) -> int:
        """How many terms the loss of this batch is a sum of."""

    @abstractmethod
    def loss(self, outputs: Any, batch: Batch) -> Tensor:
        """The sum of the losses (not their mean), a scalar."""

    @abstractmethod
    def sums(self, outputs: Any, batch: Batch) -> Sums:
        """What :meth:`scores` needs of a batch, as sums; ``loss`` is one."""

    @abstractmethod
    def scores(self, sums: Scores, count: int) -> Scores:
        """Measures of a whole split, from the sums over it and the sum of the counts."""

    @abstractmethod
    def check(self, outputs: Any, batch: Batch) -> None:
        """Compare what a network gives with what the data ask for.

        Raises:
            UsageError: they do not fit.
        """

    def better(self, scores: Scores, best: Scores | None) -> bool:
        """Whether ``scores`` beat the best so far."""
        if best is None:
            return not math.isnan(scores[self.metric])
        gain = scores[self.metric] - best[self.metric]
        return gain > 0 if self.higher_is_better else gain < 0


class Classification(Task):
    """Cross entropy over classes, the first term of Eq. (7), Gao et al. 2020.

    Args:
        classes: how many the data have.
        check_labels: given how many the network scores, raises where labels are out of range.
    """

    name, metric, higher_is_better = "classification", "accuracy", True

    def __init__(self, classes: int, check_labels: Callable[[int], None] = lambda classes: None) -> None:
        self.classes, self._check_labels = classes, check_labels

    def count(self, batch: Batch) -> int:
        """Examples."""
        return len(batch["y"])

    def loss(self, outputs: Any, batch: Batch) -> Tensor:
        """−Σ log p(y)."""
        return F.cross_entropy(first_output(outputs), batch["y"], reduction="sum")

    def sums(self, outputs: Any, batch: Batch) -> Sums:
        """The loss, and how many largest logits are at their label."""
        right = first_output(outputs).argmax(-1) == batch["y"]
        return {"loss": self.loss(outputs, batch), "right": right.sum()}

    def scores(self, sums: Scores, count: int) -> Scores:
        """Mean loss (nats) and accuracy (per cent)."""
        return {"loss": sums["loss"] / count, "accuracy": 100 * sums["right"] / count}

    def check(self, outputs: Any, batch: Batch) -> None:
        """Logits must be (n, classes) with at least the data's classes."""
        shape = tuple(first_output(outputs).shape)
        if len(shape) != 2:
            raise UsageError(f"the network gives outputs of shape {shape}, which are no scores of classes")
        self._check_labels(shape[1])
        if shape[1] < self.classes:
            raise UsageError(f"the data have {self.classes} classes, the network scores {shape[1]}")


class Regression(Task):
    """Mean squared error over all entries of the targets."""

    name, metric, higher_is_better = "regression", "loss", False

    def count(self, batch: Batch) -> int:
        """Entries."""
        return batch["y"].numel()

    def loss(self, outputs: Any, batch: Batch) -> Tensor:
        """Σ (output − y)²."""
        values, y = first_output(outputs), batch["y"]
        return F.mse_loss(values.reshape(y.shape).float(), y.float(), reduction="sum")

    def sums(self, outputs: Any, batch: Batch) -> Sums:
        """The loss, Σy and Σy² for the variance."""
        y = batch["y"].double()
        return {"loss": self.loss(outputs, batch), "y": y.sum(), "y2": y.square().sum()}

    def scores(self, sums: Scores, count: int) -> Scores:
        """Mean squared error, its root, and R² (share of the variance explained, all entries together)."""
        loss = sums["loss"] / count
        variance = sums["y2"] / count - (sums["y"] / count) ** 2
        r2 = 1 - loss / variance if variance > 0 else math.nan
        return {"loss": loss, "rmse": math.sqrt(loss), "r2": r2}

    def check(self, outputs: Any, batch: Batch) -> None:
        """As many numbers an example as the targets have."""
        found, wanted = first_output(outputs)[0].numel(), batch["y"][0].numel()
        if found != wanted:
            raise UsageError(f"the data have {wanted} targets an example, the network gives {found} numbers")


class _Tokens(Task):
    """Cross entropy over tokens; subclasses say which output predicts which token."""

    metric, higher_is_better = "loss", False

    @abstractmethod
    def _predicted(self, outputs: Any, batch: Batch) -> tuple[Tensor, Tensor]:
        """Logits (n, t, vocabulary) and the labels (n, t) they are scored against."""

    def loss(self, outputs: Any, batch: Batch) -> Tensor:
        """−Σ log p(token)."""
        logits, labels = self._predicted(outputs, batch)
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum")

    def sums(self, outputs: Any, batch: Batch) -> Sums:
        """The loss, and how many tokens are the most likely one."""
        logits, labels = self._predicted(outputs, batch)
        right = (logits.argmax(-1) == labels).sum()
        return {"loss": self.loss(outputs, batch), "right": right}

    def scores(self, sums: Scores, count: int) -> Scores:
        """Mean loss a token (nats), perplexity, and token accuracy (per cent)."""
        loss = sums["loss"] / count
        perplexity = math.exp(loss) if loss < 700 else math.inf
        return {"loss": loss, "perplexity": perplexity, "accuracy": 100 * sums["right"] / count}

    def check(self, outputs: Any, batch: Batch) -> None:
        """Logits must be (n, T, vocabulary)."""
        shape, ids = tuple(first_output(outputs).shape), batch["input_ids"]
        if len(shape) != 3 or shape[:2] != tuple(ids.shape):
            raise UsageError(f"the network gives outputs of shape {shape}, which are no scores of tokens")


class CausalLM(_Tokens):
    """Each token is predicted from those before it."""

    name = "causal-lm"

    def count(self, batch: Batch) -> int:
        """Tokens that have one before them and are no padding."""
        mask = batch.get("attention_mask")
        following = batch["input_ids"][:, 1:]
        return following.numel() if mask is None else int(mask[:, 1:].sum())

    def _predicted(self, outputs: Any, batch: Batch) -> tuple[Tensor, Tensor]:
        labels, mask = batch["input_ids"][:, 1:], batch.get("attention_mask")
        if mask is not None:
            labels = labels.masked_fill(mask[:, 1:] == 0, IGNORED)
        return first_output(outputs)[:, :-1], labels


class MaskedLM(_Tokens):
    """Of 15 % of the tokens 80 % are masked, 10 % replaced by any, 10 % kept; all of them are predicted.

    Source: Devlin et al. 2019 (BERT), section 3.1.

    Args:
        mask_id: of the mask token.
        vocabulary: number of tokens.
        special: ids that are never chosen ([CLS], [SEP], …).
        share: of the tokens that are chosen.
    """

    name = "masked-lm"

    def __init__(self, mask_id: int, vocabulary: int, special: tuple[int, ...] = (), share: float = 0.15):
        self.mask_id, self.vocabulary, self.share = mask_id, vocabulary, share
        self._special = torch.tensor(special, dtype=torch.int64)

    def prepare(self, batch: Batch, generator: torch.Generator) -> Batch:
        """Choose and mask; ``labels`` holds the chosen tokens as they were. At least one is chosen."""
        ids = batch["input_ids"]
        mask = batch.get("attention_mask", torch.ones_like(ids)).bool()
        allowed = mask & ~torch.isin(ids, self._special)
        draw = torch.rand(ids.shape, generator=generator)
        chosen = (draw < self.share) & allowed
        if not bool(chosen.any()):
            chosen = allowed & (draw == draw[allowed].min()) if bool(allowed.any()) else allowed
        labels = ids.masked_fill(~chosen, IGNORED)
        fate = torch.rand(ids.shape, generator=generator)
        other = torch.randint(self.vocabulary, ids.shape, generator=generator)
        shown = torch.where(chosen & (fate < 0.8), self.mask_id, ids)
        shown = torch.where(chosen & (fate >= 0.8) & (fate < 0.9), other, shown)
        return {**batch, "input_ids": shown, "labels": labels}

    def prepare_each(self, batch: Batch, seeds: list[int]) -> Batch:
        """Each example is masked as if it were alone, without its padding."""
        ids = batch["input_ids"]
        shown, labels = ids.clone(), torch.full_like(ids, IGNORED)
        mask = batch.get("attention_mask", torch.ones_like(ids))
        for row, (seed, length) in enumerate(zip(seeds, mask.sum(1).tolist(), strict=True)):
            one = {"input_ids": ids[row : row + 1, :length]}
            drawn = self.prepare(one, torch.Generator().manual_seed(seed))
            shown[row, :length], labels[row, :length] = drawn["input_ids"][0], drawn["labels"][0]
        return {**batch, "input_ids": shown, "labels": labels}

    def count(self, batch: Batch) -> int:
        """Chosen tokens."""
        return int((batch["labels"] != IGNORED).sum())

    def _predicted(self, outputs: Any, batch: Batch) -> tuple[Tensor, Tensor]:
        return first_output(outputs), batch["labels"]
