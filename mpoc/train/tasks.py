"""Tasks: a loss, the number of terms in it, and the scores that are reported.

A task gives *sums* over a batch, so that a mean over parts, processes or a whole split is exact, whatever the
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
from mpoc.models.call import Batch, Call, first_output, has_logits, hidden_states, num_rows, rows

Sums = dict[str, Tensor]  # scalars
Scores = dict[str, float]
IGNORED = -100  # label of a token without prediction


class Task(ABC):
    """A loss and its scores; ``metric`` is the score that chooses the best weights."""

    name: str
    metric: str
    higher_is_better: bool
    hidden = False  # whether the network must return its hidden states
    teacher: nn.Module | None = None  # on the device of the network

    def prepare(self, batch: Batch, generator: torch.Generator) -> Batch:
        """Draw what differs by batch, on the CPU; most tasks draw nothing."""
        return batch

    def prepare_each(self, batch: Batch, seeds: list[int]) -> Batch:
        """Draw for each example from its own seed, whatever the other examples of the batch."""
        return batch

    @abstractmethod
    def count(self, batch: Batch) -> int:
        """Number of terms in the sum of the losses."""

    @abstractmethod
    def loss(self, outputs: Any, batch: Batch) -> Tensor:
        """The sum of the losses (not their mean), a scalar."""

    @abstractmethod
    def sums(self, outputs: Any, batch: Batch) -> Sums:
        """The sums over a batch that :meth:`scores` needs; ``loss`` is one."""

    @abstractmethod
    def scores(self, sums: Scores, count: int) -> Scores:
        """Scores of a whole split, from its sums and its count."""

    @abstractmethod
    def check(self, outputs: Any, batch: Batch) -> None:
        """Check that the outputs of a network fit the data.

        Raises:
            UsageError: they do not.
        """

    def better(self, scores: Scores, best: Scores | None) -> bool:
        """Whether ``scores`` are better than the best so far."""
        if best is None:
            return not math.isnan(scores[self.metric])
        gain = scores[self.metric] - best[self.metric]
        return gain > 0 if self.higher_is_better else gain < 0


class Classification(Task):
    """Cross entropy over classes, the first term of Eq. (7), Gao et al. 2020.

    Args:
        classes: number of classes of the data.
        check_labels: called with the number of classes of the network; raises where labels are out of range.
    """

    name, metric, higher_is_better = "classification", "accuracy", True

    def __init__(self, classes: int, check_labels: Callable[[int], None] = lambda classes: None) -> None:
        self.classes, self._check_labels = classes, check_labels

    def count(self, batch: Batch) -> int:
        """Number of examples."""
        return len(batch["y"])

    def loss(self, outputs: Any, batch: Batch) -> Tensor:
        """−Σ log p(y)."""
        return F.cross_entropy(first_output(outputs), batch["y"], reduction="sum")

    def sums(self, outputs: Any, batch: Batch) -> Sums:
        """The loss, and the number of right answers."""
        right = first_output(outputs).argmax(-1) == batch["y"]
        return {"loss": self.loss(outputs, batch), "right": right.sum()}

    def scores(self, sums: Scores, count: int) -> Scores:
        """Mean loss (nats) and accuracy (per cent)."""
        return {"loss": sums["loss"] / count, "accuracy": 100 * sums["right"] / count}

    def check(self, outputs: Any, batch: Batch) -> None:
        """Check that logits are (n, classes), with at least the classes of the data."""
        shape = tuple(first_output(outputs).shape)
        if len(shape) != 2:
            raise UsageError(f"the network gives outputs of shape {shape}, not (n, classes)")
        self._check_labels(shape[1])
        if shape[1] < self.classes:
            raise UsageError(f"the data have {self.classes} classes, but the network {shape[1]}")


class Regression(Task):
    """Mean squared error over all entries of the targets."""

    name, metric, higher_is_better = "regression", "loss", False

    def count(self, batch: Batch) -> int:
        """Number of entries of the targets."""
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
        """Mean squared error, its root, and R² (share of the variance of all entries that is explained)."""
        loss = sums["loss"] / count
        variance = sums["y2"] / count - (sums["y"] / count) ** 2
        r2 = 1 - loss / variance if variance > 0 else math.nan
        return {"loss": loss, "rmse": math.sqrt(loss), "r2": r2}

    def check(self, outputs: Any, batch: Batch) -> None:
        """Check that the network gives as many numbers per example as there are targets."""
        outputs_each, targets_each = first_output(outputs)[0].numel(), batch["y"][0].numel()
        if outputs_each != targets_each:
            raise UsageError(
                f"the data have {targets_each} targets per example, the network gives {outputs_each}"
            )


class _Tokens(Task):
    """Cross entropy over tokens; subclasses define which output predicts which token."""

    metric, higher_is_better = "loss", False

    @abstractmethod
    def _predicted(self, outputs: Any, batch: Batch) -> tuple[Tensor, Tensor]:
        """Logits (n, t, vocabulary) and the labels (n, t) they are scored against."""

    def loss(self, outputs: Any, batch: Batch) -> Tensor:
        """−Σ log p(token)."""
        logits, labels = self._predicted(outputs, batch)
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum")

    def sums(self, outputs: Any, batch: Batch) -> Sums:
        """The loss, and the number of tokens with the largest logit."""
        logits, labels = self._predicted(outputs, batch)
        right = (logits.argmax(-1) == labels).sum()
        return {"loss": self.loss(outputs, batch), "right": right}

    def scores(self, sums: Scores, count: int) -> Scores:
        """Mean loss per token (nats), perplexity, and token accuracy (per cent)."""
        loss = sums["loss"] / count
        perplexity = math.exp(loss) if loss < 700 else math.inf
        return {"loss": loss, "perplexity": perplexity, "accuracy": 100 * sums["right"] / count}

    def check(self, outputs: Any, batch: Batch) -> None:
        """Check that logits are (n, T, vocabulary)."""
        shape, ids = tuple(first_output(outputs).shape), batch["input_ids"]
        if len(shape) != 3 or shape[:2] != tuple(ids.shape):
            raise UsageError(f"the network gives outputs of shape {shape}, not (n, tokens, vocabulary)")


class CausalLM(_Tokens):
    """Predict each token from those before it."""

    name = "causal-lm"

    def count(self, batch: Batch) -> int:
        """Number of tokens after the first, without padding."""
        mask = batch.get("attention_mask")
        following = batch["input_ids"][:, 1:]
        return following.numel() if mask is None else int(mask[:, 1:].sum())

    def _predicted(self, outputs: Any, batch: Batch) -> tuple[Tensor, Tensor]:
        labels, mask = batch["input_ids"][:, 1:], batch.get("attention_mask")
        if mask is not None:
            labels = labels.masked_fill(mask[:, 1:] == 0, IGNORED)
        return first_output(outputs)[:, :-1], labels


class MaskedLM(_Tokens):
    """Predict 15 % of the tokens; of these 80 % are masked, 10 % replaced by random ones, 10 % kept.

    Source: Devlin et al. 2019 (BERT), section 3.1.

    Args:
        mask_id: id of the mask token.
        vocabulary: number of tokens.
        special: ids that are never predicted ([CLS], [SEP], …).
        share: share of the tokens that are predicted.
    """

    name = "masked-lm"

    def __init__(self, mask_id: int, vocabulary: int, special: tuple[int, ...] = (), share: float = 0.15):
        self.mask_id, self.vocabulary, self.share = mask_id, vocabulary, share
        self._special = torch.tensor(special, dtype=torch.int64)

    def prepare(self, batch: Batch, generator: torch.Generator) -> Batch:
        """Choose and mask tokens, at least one; ``labels`` holds the original ids of those chosen."""
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
        """Mask each example as if it were alone, without its padding."""
        ids = batch["input_ids"]
        shown, labels = ids.clone(), torch.full_like(ids, IGNORED)
        mask = batch.get("attention_mask", torch.ones_like(ids))
        for row, (seed, length) in enumerate(zip(seeds, mask.sum(1).tolist(), strict=True)):
            alone = {"input_ids": ids[row : row + 1, :length]}
            drawn = self.prepare(alone, torch.Generator().manual_seed(seed))
            shown[row, :length], labels[row, :length] = drawn["input_ids"][0], drawn["labels"][0]
        return {**batch, "input_ids": shown, "labels": labels}

    def count(self, batch: Batch) -> int:
        """Number of chosen tokens."""
        return int((batch["labels"] != IGNORED).sum())

    def _predicted(self, outputs: Any, batch: Batch) -> tuple[Tensor, Tensor]:
        return first_output(outputs), batch["labels"]


class Distillation(Task):
    """Reproduce the outputs of another network; no labels are needed.

        L = T² · KL(softmax(t/T) ‖ softmax(s/T)) + λ · mean over layers of ‖h_s − h_t‖² / ‖h_t‖²

    with logits s and t (Hinton et al. 2015) and, where both networks give as many hidden states of the same
    widths, the states h of every layer. Both terms are means over tokens, or over examples where there are
    none.

    Args:
        teacher: on the device of the training; set to eval mode, its parameters are not trained.
        temperature: T.
        hidden_weight: λ; 0 ignores hidden states.
    """

    name, metric, higher_is_better = "distillation", "loss", False

    def __init__(self, teacher: nn.Module, temperature: float = 2.0, hidden_weight: float = 1.0) -> None:
        if temperature <= 0 or hidden_weight < 0:
            raise UsageError("--temperature must be above 0, --hidden-weight at least 0")
        self.teacher: nn.Module = teacher.eval().requires_grad_(False)
        self.temperature, self.hidden_weight = temperature, hidden_weight
        self.hidden = hidden_weight > 0
        self._call = Call.of(teacher, self.hidden)
        self._per_token = False

    def count(self, batch: Batch) -> int:
        """Tokens without padding, or examples."""
        return num_rows(batch, self._per_token)

    def loss(self, outputs: Any, batch: Batch) -> Tensor:
        """Both terms, summed over tokens or examples."""
        return self._loss(outputs, self._teach(batch), batch)

    def sums(self, outputs: Any, batch: Batch) -> Sums:
        """Sums of loss and cosine, and counts of agreement and, with labels, of right answers."""
        taught = self._teach(batch)
        ours, theirs = (rows(first_output(o).float(), batch) for o in (outputs, taught))
        sums = {
            "loss": self._loss(outputs, taught, batch),
            "cosine": F.cosine_similarity(ours, theirs, dim=-1).sum(),
        }
        if has_logits(outputs):
            sums["agree"] = (ours.argmax(-1) == theirs.argmax(-1)).sum()
            labels = batch.get("y")
            if labels is not None and labels.dtype == torch.int64 and not self._per_token:
                sums["right"] = (first_output(outputs).argmax(-1) == labels).sum()
        return sums

    def scores(self, sums: Scores, count: int) -> Scores:
        """Mean loss and cosine; agreement with the teacher and, with labels, accuracy, in per cent."""
        scores = {"loss": sums["loss"] / count, "cosine": sums["cosine"] / count}
        if "agree" in sums:
            scores["agreement"] = 100 * sums["agree"] / count
        if "right" in sums:
            scores["accuracy"] = 100 * sums["right"] / count
        return scores

    def check(self, outputs: Any, batch: Batch) -> None:
        """Check that teacher and student give outputs of the same shape."""
        taught = self._teach(batch)
        ours, theirs = tuple(first_output(outputs).shape), tuple(first_output(taught).shape)
        if ours != theirs:
            raise UsageError(f"the teacher gives outputs of shape {theirs}, the network of shape {ours}")
        self._per_token = "input_ids" in batch and len(ours) == 3
        if not (has_logits(outputs) or self._pairs(outputs, taught)):
            raise UsageError("neither logits nor hidden states to learn from", "--hidden-weight 1")

    @torch.no_grad()
    def _teach(self, batch: Batch) -> Any:
        return self._call(self.teacher, batch)

    def _loss(self, outputs: Any, taught: Any, batch: Batch) -> Tensor:
        total = first_output(outputs).new_zeros((), dtype=torch.float32)
        if has_logits(outputs):
            total = total + self._divergence(first_output(outputs), first_output(taught), batch)
        pairs = self._pairs(outputs, taught)
        for ours, theirs in pairs:
            h_s, h_t = (rows(h.float(), batch, self._per_token) for h in (ours, theirs))
            norms = h_t.square().sum(-1).clamp(min=torch.finfo(torch.float32).tiny)
            distance = ((h_s - h_t).square().sum(-1) / norms).sum()
            total = total + self.hidden_weight / len(pairs) * distance
        return total

    def _divergence(self, ours: Tensor, theirs: Tensor, batch: Batch) -> Tensor:
        t = self.temperature
        log_q = F.log_softmax(rows(ours.float(), batch) / t, dim=-1)
        log_p = F.log_softmax(rows(theirs.float(), batch) / t, dim=-1)
        return t * t * F.kl_div(log_q, log_p, log_target=True, reduction="sum")

    def _pairs(self, outputs: Any, taught: Any) -> list[tuple[Tensor, Tensor]]:
        """Hidden states of both, layer by layer; [] where their numbers or shapes differ."""
        ours, theirs = hidden_states(outputs), hidden_states(taught)
        if not self.hidden_weight or [h.shape for h in ours] != [h.shape for h in theirs]:
            return []
        return list(zip(ours, theirs, strict=True))


def kl_of_rows(ours: Tensor, theirs: Tensor) -> Tensor:
    """KL(theirs ‖ ours) in nats of each row (rows, classes) of logits."""
    log_q, log_p = F.log_softmax(ours, dim=-1), F.log_softmax(theirs, dim=-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)
