"""A network made ready to be trained: checked against the data, then handed to accelerate."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import nn

from mpoc.train.dropout import set_dropout
from mpoc.train.engine import will_shard
from mpoc.train.feed import Feed
from mpoc.train.probe import probe
from mpoc.train.recompute import Undo, recompute_activations
from mpoc.train.schedule import make_optimizer
from mpoc.train.settings import Settings
from mpoc.train.tasks import Task


class Prepared(NamedTuple):
    """What a step works with."""

    model: Any  # the network, wrapped where there are several processes
    optimizer: Any  # of accelerate
    stepper: Any  # what takes the step
    undo: Undo  # of gradient checkpointing


def prepare(network: nn.Module, task: Task, feed: Feed, settings: Settings, accelerator: Any) -> Prepared:
    """Check ``network`` against the data, and wrap it; it and the task's teacher go to the device.

    Args:
        network: in training mode afterwards.
        task: that is learnt.
        feed: the training split.
        settings: how.
        accelerator: of :func:`mpoc.train.engine.make_accelerator`.

    Raises:
        UsageError: data and network do not fit.
    """
    if not will_shard(accelerator):
        network.to(accelerator.device)
    if task.teacher is not None:
        task.teacher.to(accelerator.device)
    where = next((p.device for p in network.parameters()), accelerator.device)
    unused = probe(network, task, feed, where)
    if settings.dropout is not None:
        set_dropout(network, settings.dropout)
    undo: Undo = lambda: None  # noqa: E731
    if settings.gradient_checkpointing:
        undo = recompute_activations(network)
    if accelerator.num_processes > 1 and unused:
        from accelerate import DistributedDataParallelKwargs

        accelerator.ddp_handler = DistributedDataParallelKwargs(find_unused_parameters=True)
    optimizer = make_optimizer(network.parameters(), settings)
    model, optimizer = accelerator.prepare(network.train(), optimizer)
    # accelerate's wrapper looks for an optional package in every step (0.5 ms); only fp16 needs it.
    return Prepared(model, optimizer, optimizer if accelerator.scaler else optimizer.optimizer, undo)
