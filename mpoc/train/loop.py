"""The training loop, on accelerate: one process or many, any device, exact to resume.

A step takes the same examples for any number of processes and of parts of a batch, and its gradient is that
of the mean loss over all of them: sums are divided by the count over everything, not averaged share by share.
Losses stay on the device for a while, since reading one makes a GPU wait.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from mpoc.errors import MpocError, UsageError
from mpoc.models.call import Call, to_device
from mpoc.runtime.device import derived_seed
from mpoc.runtime.formatting import rounded
from mpoc.runtime.signals import Interrupted, StopRequest, catch_stop_signals
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

_REPORT_EVERY = 0.5  # seconds between two readings of the loss
_MOST_UNREAD = 500  # steps between two readings of the loss
# Adam moves a number of few bits by this many of its own steps where it would move another by 1.
_STEPS_PER_MOVE = 10.0


class DivergedError(MpocError):
    """The loss became infinite or NaN."""


class Losses:
    """The losses of the steps since the last reading."""

    def __init__(self) -> None:
        self._sums: list[Tensor] = []  # of this process
        self._counts: list[int] = []

    def __len__(self) -> int:
        return len(self._sums)

    def add(self, summed: Tensor, count: int) -> None:
        """Add a step: the sum over this process's examples (scalar), and the count over all processes."""
        self._sums.append(summed)
        self._counts.append(count)

    def take(self, accelerator: Any, step: int, lr: Callable[[int], float]) -> list[float]:
        """Return the mean loss of each step, and start over.

        Args:
            accelerator: from :func:`mpoc.train.engine.make_accelerator`.
            step: number of finished steps.
            lr: the learning rate of a step, counted from 0.

        Raises:
            DivergedError: a loss is not finite; names its step and learning rate.
        """
        sums = torch.stack(self._sums)
        if accelerator.num_processes > 1:
            sums = accelerator.reduce(sums, "sum")
        means = [summed / count for summed, count in zip(sums.tolist(), self._counts, strict=True)]
        for k, loss in enumerate(means, start=step - len(means)):
            if not math.isfinite(loss):
                value = "nan" if math.isnan(loss) else "infinite"
                raise DivergedError(
                    f"the loss is {value} at step {k + 1} (learning rate {lr(k):.3g})",
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
) -> Outcome:
    """Train ``network`` in place.

    Args:
        network: dense or compressed, in float32; moved to the accelerator's device.
        task: gives the loss and the scores.
        loader: the training split.
        settings: the settings of the training.
        validation: scored before step 1 and at intervals; None: only the training loss is recorded.
        monitor: log, checkpoints and callback, and the checkpoint to resume from.
        accelerator: from :func:`make_accelerator`; None: the default device, this process alone.

    Raises:
        UsageError: settings out of range, or data and network do not fit.
        DivergedError: the loss is not finite.
        Interrupted: Ctrl-C or SIGTERM, after a checkpoint was saved.
    """
    settings.check()
    accelerator = accelerator or make_accelerator("auto", settings.precision)
    trainer = _Trainer(network, task, loader, settings, validation, monitor or TrainingMonitor(), accelerator)
    try:
        with warnings.catch_warnings():
            # Gradients of cores with sizes of 1, whose strides have no meaning.
            warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides", UserWarning)
            # FSDP warns where outputs are views; nothing here writes to outputs.
            warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view", UserWarning)
            return trainer.run()
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
        # Sharded parameters have lost their steps, and are rounded at the end.
        self.rounded = [
            (parameter, parameter.stored_steps)
            for parameter in self.model.parameters()
            if hasattr(parameter, "stored_steps") and parameter.requires_grad
        ]
        self.mixed = accelerator.autocast if settings.precision != "fp32" else nullcontext
        self.progress, self.best = TrainingProgress(), dict[str, Tensor]()
        self.losses = Losses()
        self.busy, self.begun = 0.0, 0  # seconds of training since step ``begun``
        self.read_at = self.saved_at = time.monotonic()
        self.loss = math.nan  # mean of the last reading

    def run(self) -> Outcome:
        if self.monitor.resume is not None:
            self._restore(self.monitor.resume)
        self.begun = self.progress.step
        with catch_stop_signals() as request:
            if not self.progress.evaluations:
                self._evaluate()
            while self.progress.step < self.steps and not self._out_of_patience():
                self._step(request)
                if self.progress.step % self.eval_every == 0 or self.progress.step == self.steps:
                    self._read_losses()
                    self._evaluate()
        self._read_losses()
        with torch.no_grad():
            for parameter, steps in self.rounded:
                parameter.copy_(steps.nearest(parameter))
        chosen = self.progress.evaluations[-1]
        if self.settings.keeps_best and self.progress.best is not None:
            set_weights(self.accelerator, self.model, self.best)
            chosen = next(e for e in self.progress.evaluations if e["step"] == self.progress.best_step)
        weights = whole_weights(self.accelerator, self.model)
        return Outcome(weights, self.progress.evaluations, chosen, self.progress.step, self._rate())

    def close(self) -> None:
        """Stop reading ahead, and undo what was done to the network's modules."""
        self.reader.close()
        self.undo()

    @contextmanager
    def _as_stored(self) -> Iterator[None]:
        """Compute with the nearest numbers that the file can hold.

        Gradients found in here are applied to the numbers before rounding (a straight-through estimator:
        Bengio et al. 2013, arXiv 1308.3432), so that small steps add up until a code changes.
        """
        with torch.no_grad():
            exact = [parameter.clone() for parameter, _ in self.rounded]
            for parameter, steps in self.rounded:
                parameter.copy_(steps.nearest(parameter))
        try:
            yield
        finally:
            with torch.no_grad():
                for (parameter, _), before in zip(self.rounded, exact, strict=True):
                    parameter.copy_(before)

    def _out_of_patience(self) -> bool:
        patience = self.settings.patience
        return patience is not None and self.progress.waiting >= patience

    def _step(self, request: StopRequest) -> None:
        """One step; before it a reading of the loss, a checkpoint or an interruption, where due."""
        step, begin = self.progress.step, time.perf_counter()
        parts = self.reader.take(step)
        self.busy += time.perf_counter() - begin
        count, read, save, stop = self._agree(sum(map(self.task.count, parts)), request.signum)
        if read:
            self._read_losses()
        if save or stop:
            self._save()
        if stop:
            raise Interrupted(stop, step, self.monitor.checkpoint is not None)
        begin = time.perf_counter()
        seed_generators(derived_seed(self.settings.seed, "step", step, self.order.rank), self.device)
        set_learning_rate(self.optimizer, self._lr(step))
        with self._as_stored():
            losses = self._backward(parts, max(1, count))
        if self.settings.clip is not None:
            self.accelerator.clip_grad_norm_(self.model.parameters(), self.settings.clip)
        self._update()
        self.stepper.zero_grad()
        self.losses.add(sum(losses[1:], start=losses[0]), max(1, count))
        self.progress.step += 1
        self.busy += time.perf_counter() - begin

    @torch.no_grad()
    def _update(self) -> None:
        """Let the optimiser step.

        Adam moves all parameters alike, whatever their gradients, but the steps of numbers in few bits differ
        by layer, row and column: those numbers move in proportion to their steps.
        """
        in_steps = self.rounded if self.settings.optimizer == "adamw" else []
        before = [parameter.clone() for parameter, _ in in_steps]
        self.stepper.step()
        for (parameter, steps), start in zip(in_steps, before, strict=True):
            parameter.sub_(start).mul_(steps.steps).mul_(_STEPS_PER_MOVE).add_(start)

    def _backward(self, parts: list[Any], count: int) -> list[Tensor]:
        """Add the gradient of the mean loss over ``count`` examples; the losses, summed over each part."""
        losses = []
        for k, part in enumerate(parts, start=1):
            part = to_device(part, self.device)
            with nullcontext() if k == len(parts) else self.accelerator.no_sync(self.model):
                with self.mixed():
                    loss = self.task.loss(self.call(self.model, part), part)
                self.accelerator.backward(loss * (self.world / count))
            losses.append(loss.detach())
        return losses

    def _agree(self, count: int, signum: int) -> tuple[int, bool, bool, int]:
        """The count over all processes, and what all do before this step, decided by the main process."""
        now, monitor, step = time.monotonic(), self.monitor, self.progress.step
        read = now - self.read_at > _REPORT_EVERY or len(self.losses) >= _MOST_UNREAD
        save = now - self.saved_at > monitor.save_seconds and step > self.begun
        save = save or (
            monitor.save_steps is not None and step > self.begun and step % monitor.save_steps == 0
        )
        if self.world == 1:
            return count, read, save, signum
        main = self.accelerator.is_main_process
        own = torch.tensor([count, main and read, main and save, signum], device=self.device)
        of_all = self.accelerator.gather(own[None])  # (processes, 4)
        counts, reads, saves, signums = of_all.unbind(1)
        return int(counts.sum()), bool(reads.any()), bool(saves.any()), int(signums.max())

    def _lr(self, step: int) -> float:
        return learning_rate(self.settings, step, self.steps, self.order.steps_per_epoch)

    def _read_losses(self) -> None:
        """Read the losses since the last time, log them and report.

        Raises:
            DivergedError: a loss is not finite.
        """
        self.read_at = time.monotonic()
        if not self.losses:
            return
        begin = time.perf_counter()
        means = self.losses.take(self.accelerator, self.progress.step, self._lr)
        self.busy += time.perf_counter() - begin  # includes the wait for a GPU
        for loss in means:
            self.progress.loss_sum += loss
        self.progress.loss_steps += len(means)
        self.loss = sum(means) / len(means)
        event = self._event()
        if self.accelerator.is_main_process:
            self.monitor.log.write(
                step=event.step, epoch=rounded(event.epoch), loss=rounded(event.loss), lr=rounded(event.lr),
                examples_per_second=rounded(event.rate),
            )  # fmt: skip
        self._notify(event)

    def _evaluate(self) -> None:
        """Score the validation split, and keep the best weights."""
        progress = self.progress
        evaluation: Evaluation | None = None
        if self.validation is not None:
            with self._as_stored():
                evaluation = evaluate(
                    self.model, self.task, self.validation, self._eval_batch(), self.device, self.call,
                    self.accelerator,
                )  # fmt: skip
                self._compare(evaluation.scores)
        record: dict[str, Any] = {"step": progress.step, "epoch": rounded(self._epoch())}
        if progress.loss_steps:
            record["train_loss"] = rounded(progress.loss_sum / progress.loss_steps)
            progress.loss_sum, progress.loss_steps = 0.0, 0
        if evaluation is not None:
            record |= evaluation.rounded()
        progress.evaluations.append(record)
        if self.accelerator.is_main_process:
            self.monitor.log.write(split=self.monitor.split if evaluation else "train", **record)
        self._notify(self._event(evaluation.scores if evaluation else {}))
        self.read_at = time.monotonic()

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
        steps = self.progress.step - self.begun
        return steps * self.order.batch / self.busy if self.busy else 0.0

    def _event(self, scores: Scores | None = None) -> TrainingEvent:
        step = self.progress.step
        left = (self.steps - step) * self.busy / max(1, step - self.begun)
        lr = self._lr(max(0, step - 1))
        return TrainingEvent(step, self.steps, self._epoch(), self.loss, lr, self._rate(), left, scores)

    def _notify(self, event: TrainingEvent) -> None:
        if self.monitor.on_event is not None and self.accelerator.is_main_process:
            self.monitor.on_event(event)

    def _save(self) -> None:
        """Save a checkpoint; the main process writes it."""
        checkpoint = self.monitor.checkpoint
        if checkpoint is None:
            return
        self._read_losses()
        tensors = gather(self.accelerator, self.model, self.optimizer)
        scaler = self.accelerator.scaler
        if self.accelerator.is_main_process:
            checkpoint.extra["log"] = self.monitor.log.position
            checkpoint.save(self.progress, tensors, self.best, scaler.state_dict() if scaler else {})
        self.saved_at = time.monotonic()

    def _restore(self, saved: SavedTraining) -> None:
        scatter(self.accelerator, self.model, self.optimizer, saved.tensors)
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(saved.extra["scaler"])
        self.progress, self.best = saved.progress, saved.best
