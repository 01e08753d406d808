from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mpoc.data.arrays import Arrays
from mpoc.data.documents import Documents
from mpoc.errors import MpocError, UsageError
from mpoc.train.engine import learning_rate
from mpoc.train.loader import BatchLoader, BatchReader, ExampleOrder
from mpoc.train.monitor import TrainingEvent, TrainingMonitor
from mpoc.train.output import StoredSteps
from mpoc.train.settings import Settings
from mpoc.train.tasks import Classification
from tests.train.small import blobs, loader, perceptron, run, weights


class TestAgainstAHandWrittenLoop:
    @pytest.mark.parametrize("nesterov", [False, True])
    def test_sgd_uses_the_coupled_l2_of_eq_7(self, nesterov: bool) -> None:
        """v ← μ v + g + λ w, w ← w − η (v, or g + λ w + μ v with Nesterov), on all parameters."""
        eta, mu, lam = 0.1, 0.9, 0.01
        network, ours = perceptron(), perceptron()
        run(ours, lr=eta, momentum=mu, l2=lam, nesterov=nesterov)
        x, y = blobs()
        velocity = [torch.zeros_like(w) for w in network.parameters()]
        order = ExampleOrder(loader().examples, 16)
        for step in range(12):
            chosen = order.indices(step)[0]
            loss = nn.functional.cross_entropy(network(x[chosen]), y[chosen])
            gradients = torch.autograd.grad(loss, list(network.parameters()))
            with torch.no_grad():
                for w, v, g in zip(network.parameters(), velocity, gradients, strict=True):
                    full = g + lam * w
                    v.mul_(mu).add_(full)
                    w.sub_(eta * (full + mu * v if nesterov else v))
        torch.testing.assert_close(weights(ours), weights(network), rtol=0, atol=1e-6)

    def test_l2_is_the_gradient_of_half_the_square(self) -> None:
        """Eq. (7): one step with λ is one step on loss + (λ/2) Σ w², whatever the optimiser."""
        lam = 0.05
        for name in ("sgd", "adamw"):
            ours, network = perceptron(), perceptron()
            run(ours, optimizer=name, lr=0.01, momentum=0.0, l2=lam, steps=1)
            x, y = blobs()
            chosen = ExampleOrder(loader().examples, 16).indices(0)[0]
            square = sum(w.square().sum() for w in network.parameters())
            loss = nn.functional.cross_entropy(network(x[chosen]), y[chosen]) + lam / 2 * square
            kind = torch.optim.SGD if name == "sgd" else torch.optim.Adam
            optimizer = kind(network.parameters(), lr=0.01)
            loss.backward()
            optimizer.step()
            torch.testing.assert_close(weights(ours), weights(network), rtol=1e-5, atol=1e-7)

    def test_clips_the_data_gradient_but_not_the_l2(self) -> None:
        """w ← w − η (g · c/‖g‖ + λ w), where ‖g‖ over all parameters is above c."""
        eta, lam, c = 0.1, 0.5, 0.01
        network, ours = perceptron(), perceptron()
        run(ours, lr=eta, momentum=0.0, l2=lam, clip=c, steps=1)
        x, y = blobs()
        chosen = ExampleOrder(loader().examples, 16).indices(0)[0]
        loss = nn.functional.cross_entropy(network(x[chosen]), y[chosen])
        gradients = torch.autograd.grad(loss, list(network.parameters()))
        norm = math.sqrt(sum(float(g.square().sum()) for g in gradients))
        assert norm > c
        with torch.no_grad():
            for w, g in zip(network.parameters(), gradients, strict=True):
                w.sub_(eta * (g * c / norm + lam * w))
        torch.testing.assert_close(weights(ours), weights(network), rtol=0, atol=1e-6)

    def test_adamw_decouples_its_decay(self) -> None:
        ours, network = perceptron(), perceptron()
        run(ours, optimizer="adamw", lr=0.01, weight_decay=0.1, steps=1)
        plain = perceptron()
        run(plain, optimizer="adamw", lr=0.01, steps=1)
        for w, v, start in zip(weights(ours), weights(plain), weights(network), strict=True):
            torch.testing.assert_close(w, v - 0.01 * 0.1 * start, rtol=0, atol=1e-6)


class TestStraightThrough:
    STEPS = 0.4

    def network(self) -> nn.Sequential:
        """With weights, but not biases, of two bits: −0.8, −0.4, 0, 0.4."""
        network = perceptron()
        for name, weight in network.named_parameters():
            if "weight" in name:
                steps = torch.full_like(weight, self.STEPS)
                lowest = torch.full_like(weight, -2, dtype=torch.int16)
                vars(weight)["stored_steps"] = StoredSteps(steps, 1 / steps, lowest, 4)
        return network

    def rounded(self, weight: Tensor) -> Tensor:
        return torch.round(weight / self.STEPS).clamp(-2, 1) * self.STEPS

    def test_follows_the_gradient_at_the_rounded_weights(self) -> None:
        network, ours = perceptron(), self.network()
        run(ours, lr=0.1, momentum=0.0)
        x, y = blobs()
        order = ExampleOrder(loader().examples, 16)
        exact = {name: w.detach().clone() for name, w in network.named_parameters()}
        for step in range(12):
            for name, w in network.named_parameters():
                w.data = self.rounded(exact[name]) if "weight" in name else exact[name].clone()
            chosen = order.indices(step)[0]
            loss = nn.functional.cross_entropy(network(x[chosen]), y[chosen])
            gradients = torch.autograd.grad(loss, list(network.parameters()))
            for kept, g in zip(exact.values(), gradients, strict=True):
                kept.sub_(0.1 * g)
        for name, found in ours.named_parameters():
            expected = self.rounded(exact[name]) if "weight" in name else exact[name]
            torch.testing.assert_close(found.detach(), expected, rtol=0, atol=1e-6)

    def test_adam_moves_in_proportion_to_the_steps(self) -> None:
        """Its first update is the sign of each gradient: here 0.6 of a step, whatever the step."""
        network, ours = perceptron(), perceptron()
        steps = [torch.rand_like(w) + 0.01 for w in ours.parameters()]
        for ours_, theirs, step in zip(ours.parameters(), network.parameters(), steps, strict=True):
            vars(ours_)["stored_steps"] = StoredSteps(step, 1 / step)
            theirs.data = torch.round(theirs.data / step) * step
        start = weights(ours)
        run(ours, optimizer="adamw", lr=0.6 / 10, steps=1)
        x, y = blobs()
        chosen = ExampleOrder(loader().examples, 16).indices(0)[0]
        loss = nn.functional.cross_entropy(network(x[chosen]), y[chosen])
        gradients = torch.autograd.grad(loss, list(network.parameters()))
        for found, w, g, step in zip(weights(ours), start, gradients, steps, strict=True):
            sure = g.abs() > 1e-4  # smaller ones are not far above Adam's epsilon
            expected = torch.round(w / step - 0.6 * g.sign()) * step
            torch.testing.assert_close(found[sure], expected[sure], rtol=1e-5, atol=0)
            assert bool(sure.any())

    def test_keeps_and_scores_rounded_weights(self) -> None:
        """The best weights are not the last: their score is that of the network that is left."""
        network = self.network()
        outcome = run(network, epochs=4, eval_every=5, keep_best=True)
        x, y = blobs(48, seed=1)
        with torch.no_grad():
            loss = float(nn.functional.cross_entropy(network.eval()(x), y))
        assert outcome.chosen["loss"] == pytest.approx(loss, rel=1e-4)
        assert outcome.chosen["step"] < outcome.steps
        for name, weight in network.named_parameters():
            assert "bias" in name or torch.equal(weight, self.rounded(weight))

    @pytest.mark.parametrize("in_few_bits", [False, True])
    def test_batch_norms_beside_few_bits_keep_their_statistics(self, in_few_bits: bool) -> None:
        """Also after an evaluation in the midst of the training."""
        norm = nn.BatchNorm1d(12)
        network = nn.Sequential(norm, self.network() if in_few_bits else perceptron())
        run(network, steps=6, eval_every=2)
        assert torch.equal(norm.running_mean, torch.zeros(12)) == in_few_bits  # type: ignore[arg-type]
        assert int(norm.num_batches_tracked) == (0 if in_few_bits else 6)  # type: ignore[arg-type]
        assert not torch.equal(norm.weight, torch.ones(12)), "they are trained all the same"
        assert network.training and norm.training != in_few_bits


@pytest.mark.parametrize("parts", [2, 4])
def test_accumulation_matches_one_large_batch(parts: int) -> None:
    """Also for the last batch of an epoch, which is smaller."""
    whole, cut = perceptron(), perceptron()
    run(whole, loader(90))
    run(cut, loader(90), accumulate=parts)
    torch.testing.assert_close(weights(cut), weights(whole), rtol=0, atol=1e-6)


def test_is_seeded() -> None:
    found = []
    for seed in (3, 3, 4):
        network = perceptron(dropout=0.3)
        run(network, seed=seed)
        found.append(weights(network))
    assert all(torch.equal(a, b) for a, b in zip(found[0], found[1], strict=True))
    assert not torch.equal(found[0][0], found[2][0])


class TestOrder:
    def test_epoch_visits_every_example_once(self) -> None:
        examples = loader(90).examples
        whole = ExampleOrder(examples, 16, seed=1)
        shares = [ExampleOrder(examples, 16, 2, rank, 2, seed=1) for rank in range(2)]
        for step in range(2 * whole.steps_per_epoch):
            together = torch.cat([part for order in shares for part in order.indices(step)])
            assert torch.equal(together, whole.indices(step)[0])
        first = torch.cat([whole.indices(step)[0] for step in range(whole.steps_per_epoch)])
        assert sorted(first.tolist()) == list(range(90))

    def test_batches_texts_of_similar_length(self) -> None:
        generator = torch.Generator().manual_seed(0)
        lengths = torch.randint(1, 200, (330,), generator=generator)
        starts = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
        documents = Documents(torch.ones(int(lengths.sum()), dtype=torch.int32), starts, 0, None)
        order = ExampleOrder(documents, 16, seed=1)
        batches = [order.indices(step)[0] for step in range(2 * order.steps_per_epoch)]
        for epoch in (batches[: len(batches) // 2], batches[len(batches) // 2 :]):
            assert sorted(torch.cat(epoch).tolist()) == list(range(330))
            assert [len(batch) for batch in epoch] == [16] * 20 + [10]
        padding = [1 - lengths[batch].double().mean() / lengths[batch].max() for batch in batches]
        assert sum(padding) / len(padding) < 0.15
        means = torch.stack([lengths[batch].double().mean() for batch in batches[:16]])
        assert not torch.equal(means, means.sort().values)
        assert not torch.equal(batches[0], batches[21])
        again = ExampleOrder(documents, 16, seed=1)
        assert torch.equal(again.indices(30)[0], batches[30])

    def test_drops_a_last_batch_smaller_than_its_parts(self) -> None:
        examples = loader(34).examples
        assert ExampleOrder(examples, 16).steps_per_epoch == 3
        assert ExampleOrder(examples, 16, 2).steps_per_epoch == 2

    def test_augmentation_depends_on_the_step_only(self) -> None:
        x, y = blobs()

        def noisy(
            batch: dict[str, torch.Tensor], generator: torch.Generator | None
        ) -> dict[str, torch.Tensor]:
            return {**batch, "x": batch["x"] + torch.rand(batch["x"].shape, generator=generator)}

        data = BatchLoader(Arrays([x], y), noisy)
        readers = [
            BatchReader(data, ExampleOrder(data.examples, 16), Classification(3), False) for _ in range(2)
        ]
        straight = [readers[0].take(step)[0]["x"] for step in range(5)]
        assert torch.equal(readers[1].take(4)[0]["x"], straight[4])
        assert not torch.equal(straight[3], straight[4])


class TestSchedules:
    def test_cosine_schedule_with_warm_up(self) -> None:
        settings = Settings(lr=2.0, warmup=0.1)
        rates = [learning_rate(settings, step, 100, 10) for step in range(100)]
        assert rates[:10] == pytest.approx([0.2 * (k + 1) for k in range(10)])
        assert rates[55] == pytest.approx(1.0)
        assert rates == sorted(rates[:10]) + sorted(rates[10:], reverse=True)
        assert 0 < rates[-1] < 1e-3

    def test_exponential_schedule_decays_at_epochs(self) -> None:
        settings = Settings(lr=0.8, schedule="exponential", gamma=0.5, decay_every=2)
        rates = [learning_rate(settings, step, 60, 10) for step in range(60)]
        assert rates == [0.8] * 20 + [0.4] * 20 + [0.2] * 20


class TestEvaluationsOnTheWay:
    def test_early_stopping_restores_the_best_weights(self) -> None:
        """A rate so large that it gets worse after a while."""
        network = perceptron()
        done = run(network, epochs=40, lr=1.5, momentum=0.95, patience=3)
        accuracies = [e["accuracy"] for e in done.evaluations]
        assert done.steps < 40 * 6
        assert done.chosen["accuracy"] == max(accuracies)
        assert len(accuracies) - 1 - accuracies.index(max(accuracies)) == 3
        x, y = blobs(48, seed=1)
        right = float((network.eval()(x).argmax(1) == y).float().mean()) * 100
        assert right == pytest.approx(done.chosen["accuracy"], abs=1e-3)

    def test_reports_training_events(self) -> None:
        told: list[TrainingEvent] = []
        done = run(perceptron(), monitor=TrainingMonitor(on_event=told.append), epochs=3)
        assert [t.step for t in told if t.scores is not None] == [0, 6, 12, 18]
        assert told[-1].steps == 18
        assert told[-1].seconds_left == 0
        assert done.rate > 0
        assert done.evaluations[-1]["accuracy"] > done.evaluations[0]["accuracy"] + 20


class TestWhatStopsIt:
    def test_non_finite_loss_names_step_and_rate(self) -> None:
        with pytest.raises(
            MpocError, match=r"the loss is (nan|infinite) at step \d+ \(learning rate 1e\+0?30"
        ):
            run(perceptron(), lr=1e30, epochs=5)

    def test_rejects_networks_for_other_inputs(self) -> None:
        network = nn.Linear(5, 3)
        with pytest.raises(UsageError, match=r"does not take x of shape \(2, 12\) float32: .*12"):
            run(network)

    def test_rejects_networks_for_fewer_classes(self) -> None:
        with pytest.raises(UsageError, match="the data have 3 classes, but the network 2"):
            run(nn.Linear(12, 2))

    @pytest.mark.parametrize(
        ("settings", "said"),
        [
            ({"lr": -1.0}, "--lr -1"),
            ({"lr": math.nan}, "--lr nan"),
            ({"epochs": math.inf}, "--epochs inf"),
            ({"schedule": "cosin"}, "did you mean 'cosine'"),
            ({"momentum": 1.0}, "--momentum 1"),
            ({"weight_decay": 0.1}, "AdamW's decoupled decay"),
            ({"batch": 2, "accumulate": 4}, "fewer examples than"),
        ],
    )
    def test_rejects_settings_out_of_range(self, settings: dict[str, Any], said: str) -> None:
        with pytest.raises(UsageError, match=said):
            run(perceptron(), **settings)
