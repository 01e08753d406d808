"""Distillation: train a network to reproduce the outputs of another one. No labels are needed.

    L = T² · KL(softmax(t/T) ‖ softmax(s/T)) + λ · mean over layers of ‖h_s − h_t‖² / ‖h_t‖²

with logits s and t (Hinton et al. 2015) and, where both networks give as many hidden states of the same
widths, the states h of every layer.  Both terms are means over tokens, or over examples where there are none.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mpoc.errors import UsageError
from mpoc.models.call import Batch, Call, first_output, has_logits, hidden_states, num_rows, rows
from mpoc.train.tasks import Scores, Sums, Task


class Distillation(Task):
    """The distillation loss of the module's equation.

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
