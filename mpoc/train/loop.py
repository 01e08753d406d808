"""The losses of steps that nobody has looked at yet: looking makes a GPU wait.

The training loop, on accelerate: one process or many, any device, exact to resume.

A step takes the same examples for any number of processes and parts, and its gradient is that of the mean
loss over all of them: sums are divided by the count over everything, not averaged share by share.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from mpoc.errors import MpocError, UsageError
from mpoc.models.call import Call, to_device
from mpoc.runtime.device import derived_seed
from mpoc.runtime.formatting import rounded
from mpoc.runtime.signals import Interrupted, StopSignals
from mpoc.train.engine import (
    learning_rate,
    make_accelerator,
    prepare_training,
    seed_generators,
    set_learning_rate,
)
from mpoc.train.evaluate import Evaluation, evaluate
from mpoc.train.loader import BatchLoader, BatchReader, ExampleOrder
from mpoc.train.monitor import Outcome, TrainingEvent, TrainingMonitor
from mpoc.train.settings import Settings
from mpoc.train.tasks import Scores, Task
from mpoc.train.training_checkpoint import (
    SavedTraining,
    TrainingProgress,
    gather,
    scatter,
    set_weights,
    whole_weights,
)

_TELL_EVERY = 0.5  # seconds; looking at the loss makes a GPU wait
_MOST_UNSEEN = 500  # steps between two looks at the loss


class DivergedError(MpocError):
    """The loss is not finite."""


class Losses:
    """Of one step after another."""

    def __init__(self) -> None:
        self._sums: list[Tensor] = []  # of this process
        self._counts: list[int] = []

    def __len__(self) -> int:
        return len(self._sums)

    def add(self, summed: Tensor, count: int) -> None:
        """Those of one step: this process's sum (scalar), and how many all processes have together."""
        self._sums.append(summed)
        self._counts.append(count)

    def take(self, accelerator: Any, step: int, lr: Callable[[int], float]) -> list[float]:
        """The mean loss of each step, and forget them.

        Args:
            accelerator: of :func:`mpoc.train.engine.make_accelerator`.
            step: how many steps are done.
            lr: the learning rate of a step, counted from 0.

        Raises:
            DivergedError: one is not finite: with its step, learning rate and a hint.
        """
        sums = torch.stack(self._sums)
        if accelerator.num_processes > 1:
            sums = accelerator.reduce(sums, "sum")
        means = [summed / count for summed, count in zip(sums.tolist(), self._counts, strict=True)]
        for k, loss in enumerate(means, start=step - len(means)):
            if not math.isfinite(loss):
                what = "nan" if math.isnan(loss) else "infinite"
                raise DivergedError(
                    f"the loss is {what} at step {k + 1} (learning rate {lr(k):.3g})",
                    "a smaller --lr, --warmup 0.1, or --clip 1",
                )
        self._sums, self._counts = [], []
        return means


def train(
    network: nn.Module,
    task: Task,
    loader: BatchLoader,
    settings: Settings,
    validation: BatchLoader | None = None,
    monitor: TrainingMonitor | None = None,
    accelerator: Any = None,
    resume: SavedTraining | None = None,
) -> Outcome:
    """Train ``network`` in place.

    Args:
        network: dense or compressed, in float32; moved to the accelerator's device.
        task: loss and measures.
        loader: the training split.
        settings: how.
        validation: scored before step 1 and at intervals; None: the training loss alone is known.
        monitor: who looks on.
        accelerator: of :func:`make_accelerator`; None: the default device, this process alone.
        resume: a checkpoint of the same training.

    Raises:
        UsageError: settings out of range, or data and network do not fit.
        DivergedError: the loss is not finite: with its step, learning rate and a hint.
        Interrupted: Ctrl-C or SIGTERM, after everything is saved.
    """
    settings.check()
    accelerator = accelerator or make_accelerator("auto", settings.precision)
    trainer = _Trainer(network, task, loader, settings, validation, monitor or TrainingMonitor(), accelerator)
    try:
        with warnings.catch_warnings():
            # Of the gradients of cores with sizes of 1, whose strides there mean nothing.
            warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides", UserWarning)
            # Of FSDP, where outputs are views; nothing here writes to outputs.
            warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view", UserWarning)
            return trainer.run(resume)
    finally:
        trainer.close()


class _Trainer:
    def __init__(
        self,
        network: nn.Module,
        task: Task,
        loader: BatchLoader,
        settings: Settings,
        validation: BatchLoader | None,
        monitor: TrainingMonitor,
        accelerator: Any,
    ) -> None:
        if settings.keeps_best and validation is None:
            raise UsageError("the best weights are chosen on a validation split, and there is none")
        self.task, self.settings, self.validation = task, settings, validation
        self.monitor, self.accelerator = monitor, accelerator
        self.device, self.world = accelerator.device, accelerator.num_processes
        self.order = ExampleOrder(
            loader.examples, settings.batch, settings.accumulate, accelerator.process_index, self.world,
            settings.seed,
        )  # fmt: skip
        if self.order.batch < settings.accumulate * self.world:
            raise UsageError(
                f"--batch {self.order.batch}: fewer examples than {self.world} processes × "
                f"--accumulate {settings.accumulate}"
            )
        self.steps = self.order.steps(settings.epochs) if settings.steps is None else settings.steps
        self.eval_every = settings.eval_every or self.order.steps_per_epoch
        self.reader = BatchReader(loader, self.order, task, ahead=self.device.type != "cpu")
        self.call = Call.of(network, task.hidden)
        self.model, self.optimizer, self.stepper, self.undo = prepare_training(
            network, task, loader, settings, accelerator
        )
        self.mixed = accelerator.autocast if settings.precision != "fp32" else nullcontext
        self.progress, self.best = TrainingProgress(), dict[str, Tensor]()
        self.losses = Losses()  # since the last look
        self.busy, self.begun = 0.0, 0  # seconds of training, and the step they are counted from
        self.looked = self.saved = time.monotonic()
        self.now = math.nan  # last mean loss

    def run(self, resume: SavedTraining | None) -> Outcome:
        if resume is not None:
            self._restore(resume)
        self.begun = self.progress.step
        with StopSignals() as signals:
            if not self.progress.evaluations:
                self._evaluate()
            while self.progress.step < self.steps and not self._is_enough():
                self._step(signals)
                if self.progress.step % self.eval_every == 0 or self.progress.step == self.steps:
                    self._look()
                    self._evaluate()
        self._look()
        chosen = self.progress.evaluations[-1]
        if self.settings.keeps_best and self.progress.best is not None:
            set_weights(self.accelerator, self.model, self.best)
            chosen = next(e for e in self.progress.evaluations if e["step"] == self.progress.best_step)
        weights = whole_weights(self.accelerator, self.model)
        return Outcome(weights, self.progress.evaluations, chosen, self.progress.step, self._rate())

    def close(self) -> None:
        """Stop reading ahead, and leave the network as it was handed over."""
        self.reader.close()
        self.undo()

    def _is_enough(self) -> bool:
        patience = self.settings.patience
        return patience is not None and self.progress.waiting >= patience

    def _step(self, signals: StopSignals) -> None:
        """One step, and before it what is due: a look at the loss, a checkpoint, an end."""
        step, begin = self.progress.step, time.perf_counter()
        parts = self.reader.take(step)
        self.busy += time.perf_counter() - begin
        count, look, save, stop = self._agree(sum(map(self.task.count, parts)), signals.received)
        if look:
            self._look()
        if save or stop:
            self._save()
        if stop:
            raise Interrupted(stop, step, self.monitor.checkpoint is not None)
        begin = time.perf_counter()
        seed_generators(derived_seed(self.settings.seed, "step", step, self.order.rank), self.device)
        set_learning_rate(self.optimizer, self._lr(step))
        losses = []
        for k, part in enumerate(parts, start=1):
            part = to_device(part, self.device)
            with nullcontext() if k == len(parts) else self.accelerator.no_sync(self.model):
                with self.mixed():
                    loss = self.task.loss(self.call(self.model, part), part)
                self.accelerator.backward(loss * (self.world / max(1, count)))
            losses.append(loss.detach())
        if self.settings.clip is not None:
            self.accelerator.clip_grad_norm_(self.model.parameters(), self.settings.clip)
        self.stepper.step()
        self.stepper.zero_grad()
        self.losses.add(sum(losses[1:], start=losses[0]), max(1, count))
        self.progress.step += 1
        self.busy += time.perf_counter() - begin

    def _agree(self, count: int, signum: int) -> tuple[int, bool, bool, int]:
        """The count over all processes, and what all do before this step, by the main one's clock."""
        now, monitor, step = time.monotonic(), self.monitor, self.progress.step
        look = now - self.looked > _TELL_EVERY or len(self.losses) >= _MOST_UNSEEN
        save = now - self.saved > monitor.save_seconds and step > self.begun
        save = save or (
            monitor.save_steps is not None and step > self.begun and step % monitor.save_steps == 0
        )
        if self.world == 1:
            return count, look, save, signum
        main = self.accelerator.is_main_process
        said = torch.tensor([count, main and look, main and save, signum], device=self.device)
        said = self.accelerator.gather(said[None])
        return int(said[:, 0].sum()), bool(said[:, 1].any()), bool(said[:, 2].any()), int(said[:, 3].max())

    def _lr(self, step: int) -> float:
        return learning_rate(self.settings, step, self.steps, self.order.steps_per_epoch)

    def _look(self) -> None:
        """Look at the losses since the last time, log and tell.

        Raises:
            DivergedError: one is not finite.
        """
        self.looked = time.monotonic()
        if not self.losses:
            return
        begin = time.perf_counter()
        means = self.losses.take(self.accelerator, self.progress.step, self._lr)
        self.busy += time.perf_counter() - begin  # a GPU was waited for
        for loss in means:
            self.progress.loss_sum += loss
        self.progress.loss_steps += len(means)
        self.now = sum(means) / len(means)
        event = self._event()
        if self.accelerator.is_main_process:
            self.monitor.log.write(
                step=event.step, epoch=rounded(event.epoch), loss=rounded(event.loss), lr=rounded(event.lr),
                examples_per_second=rounded(event.rate),
            )  # fmt: skip
        self._notify(event)

    def _evaluate(self) -> None:
        """Score the validation split, keep the best."""
        progress = self.progress
        found: Evaluation | None = None
        if self.validation is not None:
            found = evaluate(
                self.model, self.task, self.validation, self._eval_batch(), self.device, self.call,
                self.accelerator,
            )  # fmt: skip
        record: dict[str, Any] = {"step": progress.step, "epoch": rounded(self._epoch())}
        if progress.loss_steps:
            record["train_loss"] = rounded(progress.loss_sum / progress.loss_steps)
            progress.loss_sum, progress.loss_steps = 0.0, 0
        if found is not None:
            record |= found.rounded()
            self._compare(found.scores)
        progress.evaluations.append(record)
        if self.accelerator.is_main_process:
            self.monitor.log.write(split="validation" if found else "train", **record)
        self._notify(self._event(found.scores if found else {}))
        self.looked = time.monotonic()

    def _compare(self, scores: Scores) -> None:
        progress = self.progress
        if self.task.better(scores, progress.best):
            progress.best, progress.best_step, progress.waiting = scores, progress.step, 0
            if self.settings.keeps_best:
                weights = whole_weights(self.accelerator, self.model)
                self.best = {name: tensor.detach().cpu().clone() for name, tensor in weights.items()}
        else:
            progress.waiting += 1

    def _eval_batch(self) -> int:
        return max(1, self.order.batch // (self.settings.accumulate * self.world))

    def _epoch(self) -> float:
        return self.progress.step / self.order.steps_per_epoch

    def _rate(self) -> float:
        done = self.progress.step - self.begun
        return done * self.order.batch / self.busy if self.busy else 0.0

    def _event(self, scores: Scores | None = None) -> TrainingEvent:
        step = self.progress.step
        done = max(1, step - self.begun)
        left = (self.steps - step) * self.busy / done
        lr = self._lr(max(0, step - 1))
        return TrainingEvent(step, self.steps, self._epoch(), self.now, lr, self._rate(), left, scores)

    def _notify(self, event: TrainingEvent) -> None:
        if self.monitor.on_event is not None and self.accelerator.is_main_process:
            self.monitor.on_event(event)

    def _save(self) -> None:
        """A checkpoint of this moment, by the main process."""
        checkpoint = self.monitor.checkpoint
        if checkpoint is None:
            return
        self._look()
        tensors = gather(self.accelerator, self.model, self.optimizer)
        scaler = self.accelerator.scaler
        if self.accelerator.is_main_process:
            checkpoint.extra["log"] = self.monitor.log.position
            checkpoint.save(self.progress, tensors, self.best, scaler.state_dict() if scaler else {})
        self.saved = time.monotonic()

    def _restore(self, saved: SavedTraining) -> None:
        scatter(self.accelerator, self.model, self.optimizer, saved.tensors)
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(saved.extra["scaler"])
        self.progress, self.best = saved.progress, saved.best
