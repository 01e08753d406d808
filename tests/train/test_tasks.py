from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, log_loss, r2_score
from torch import nn

from mpoc.data.arrays import Arrays
from mpoc.data.documents import Documents
from mpoc.errors import MpocError
from mpoc.train.evaluate import evaluate
from mpoc.train.loader import BatchLoader
from mpoc.train.tasks import IGNORED, CausalLM, Classification, Distillation, MaskedLM, Regression
from tests.train.small import CLASSES, blobs, loader, perceptron, run

CPU = torch.device("cpu")


@pytest.mark.parametrize("batch", [1, 7, 96, 1000])
def test_classification_matches_scikit_learn(batch: int) -> None:
    network = perceptron().eval()
    x, y = blobs()
    with torch.no_grad():
        p = network(x).double().softmax(1).numpy()
    scores = evaluate(network, Classification(CLASSES), loader(), batch, CPU).scores
    assert scores["accuracy"] == pytest.approx(100 * accuracy_score(y, p.argmax(1)))
    assert scores["loss"] == pytest.approx(log_loss(y, p), rel=1e-5)


def test_regression_matches_scikit_learn() -> None:
    x, _ = blobs()
    y = x[:, :2] + 0.1
    network = nn.Linear(12, 2)
    with torch.no_grad():
        found = network(x)
    scores = evaluate(network, Regression(), BatchLoader(Arrays([x], y)), 10, CPU).scores
    assert scores["loss"] == pytest.approx(float(np.mean((found - y).numpy() ** 2)), rel=1e-5)
    assert scores["rmse"] == pytest.approx(math.sqrt(scores["loss"]))
    flat = r2_score(y.flatten(), found.flatten())
    assert scores["r2"] == pytest.approx(flat, rel=1e-4)


def documents() -> Documents:
    """Lengths 5, 3 and 9 over 11 tokens."""
    tokens = torch.randint(1, 11, (17,), generator=torch.Generator().manual_seed(2), dtype=torch.int32)
    return Documents(tokens, torch.tensor([0, 5, 8, 17]), 0, None)


class Bigram(nn.Module):
    """Logits of the next token from this one."""

    def __init__(self, width: int = 11) -> None:
        super().__init__()
        self.table = nn.Embedding(11, width)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.table(ids)
        return logits


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_causal_lm_counts_each_token_once(batch: int) -> None:
    network, data = Bigram(), documents()
    losses = []
    for k in range(3):
        ids = data.batch([k])["input_ids"][0]
        log_p = network.table.weight.detach().double().log_softmax(1)
        losses += [-float(log_p[a, b]) for a, b in pairwise(ids)]
    scores = evaluate(network, CausalLM(), BatchLoader(data), batch, CPU).scores
    assert len(losses) == 4 + 2 + 8
    assert scores["loss"] == pytest.approx(np.mean(losses), rel=1e-5)
    assert scores["perplexity"] == pytest.approx(math.exp(np.mean(losses)), rel=1e-5)


def test_rejects_texts_of_one_token() -> None:
    tokens = torch.arange(5, dtype=torch.int32)
    data = Documents(tokens, torch.arange(6), 0, None)
    with pytest.raises(MpocError, match="causal-lm: nothing to predict in 5 examples"):
        evaluate(Bigram(), CausalLM(), BatchLoader(data), 2, CPU)


def test_masks_fifteen_per_cent_as_80_10_10() -> None:
    task = MaskedLM(mask_id=1, vocabulary=1000, special=(2, 3))
    ids = torch.randint(4, 1000, (400, 100))
    ids[:, 0], ids[:, -1] = 2, 3
    mask = torch.ones_like(ids)
    mask[:, 90:] = 0
    batch = {"input_ids": ids, "attention_mask": mask}
    found = task.prepare(batch, torch.Generator().manual_seed(0))
    chosen = found["labels"] != IGNORED
    assert not chosen[:, 0].any()
    assert not chosen[:, 90:].any()
    assert torch.equal(found["labels"][chosen], ids[chosen])
    assert torch.equal(found["input_ids"][~chosen], ids[~chosen])
    assert float(chosen[:, 1:90].float().mean()) == pytest.approx(0.15, abs=0.01)
    shown = found["input_ids"][chosen]
    assert float((shown == 1).float().mean()) == pytest.approx(0.8, abs=0.03)
    assert float((shown == ids[chosen]).float().mean()) == pytest.approx(0.1, abs=0.03)
    again = task.prepare(batch, torch.Generator().manual_seed(0))
    assert all(torch.equal(found[name], again[name]) for name in found)


@pytest.mark.parametrize("batch", [1, 2, 5, 40])
def test_evaluation_masks_do_not_depend_on_the_batch(batch: int) -> None:
    lengths = torch.randint(3, 30, (40,), generator=torch.Generator().manual_seed(3))
    starts = torch.tensor([0, *lengths.tolist()]).cumsum(0)
    tokens = torch.randint(2, 11, (int(starts[-1]),), dtype=torch.int32)
    network, task = Bigram(), MaskedLM(mask_id=1, vocabulary=11, special=(2,))
    found = evaluate(network, task, BatchLoader(Documents(tokens, starts, 0, None)), batch, CPU).scores
    other = evaluate(network, task, BatchLoader(Documents(tokens, starts, 0, None)), 7, CPU).scores
    assert found == pytest.approx(other, rel=1e-6)


def test_masks_are_seeded_per_example() -> None:
    task = MaskedLM(mask_id=1, vocabulary=1000)
    ids = torch.randint(4, 1000, (300, 60))
    mask = (torch.arange(60) < torch.arange(300)[:, None] % 41 + 20).long()
    found = task.prepare_each({"input_ids": ids, "attention_mask": mask}, list(range(300)))
    chosen = found["labels"] != IGNORED
    assert not (chosen & (mask == 0)).any()
    assert chosen.any(1).all()
    assert float(chosen.sum() / mask.sum()) == pytest.approx(0.15, abs=0.01)
    assert torch.equal(found["input_ids"][~chosen], ids[~chosen])
    rows = chosen[:, :20].float()
    assert len(rows.unique(dim=0)) > 250


class TestDistillation:
    def test_distillation_loss_is_kl_at_a_temperature(self) -> None:
        student, teacher, t = perceptron(), nn.Linear(12, CLASSES), 3.0
        x, _ = blobs()
        with torch.no_grad():
            p, q = ((net.eval()(x).double() / t).softmax(1) for net in (teacher, student))
            expected = t**2 * float((p * (p / q).log()).sum(1).mean())
            agree = 100 * float((p.argmax(1) == q.argmax(1)).double().mean())
        scores = evaluate(student, Distillation(teacher, t), loader(), 10, CPU).scores
        assert scores["loss"] == pytest.approx(expected, rel=1e-4)
        assert scores["agreement"] == pytest.approx(agree)

    @pytest.mark.slow
    def test_student_learns_without_labels(self) -> None:
        from mpoc.train.engine import make_accelerator
        from mpoc.train.loop import train
        from mpoc.train.settings import Settings

        teacher = perceptron()
        run(teacher, epochs=6)
        student = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, CLASSES))
        x, _ = blobs()
        unlabelled = BatchLoader(Arrays([x], None))
        before = [w.clone() for w in teacher.parameters()]
        done = train(
            student, Distillation(teacher), unlabelled, Settings(epochs=20, lr=0.02, batch=16), unlabelled,
            accelerator=make_accelerator("cpu"),
        )  # fmt: skip
        assert done.chosen["agreement"] > 95
        assert all(torch.equal(a, b) for a, b in zip(before, teacher.parameters(), strict=True))
