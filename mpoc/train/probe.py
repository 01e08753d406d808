"""Before step 1: does the network take the data, and does the task take what it gives?"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from mpoc.errors import UsageError
from mpoc.train.call import Batch, Call, to_device
from mpoc.train.feed import Feed
from mpoc.train.settings import derived_seed
from mpoc.train.tasks import Task


def probe(network: nn.Module, task: Task, feed: Feed, device: torch.device) -> set[str]:
    """Run two examples through ``network`` and back, in evaluation mode; nothing is changed.

    Returns:
        Names of the trained parameters that the loss does not depend on.

    Raises:
        UsageError: the network does not take such a batch, or the task does not take its outputs.
    """
    generator = torch.Generator().manual_seed(derived_seed("probe"))
    indices = torch.arange(min(2, len(feed)))
    batch = to_device(task.prepare(feed.read(indices, generator), generator), device)
    was_training = network.training
    network.eval()
    outputs = try_call(Call.of(network, task.hidden), network, batch)
    with torch.no_grad():
        task.check(outputs, batch)
    task.loss(outputs, batch).backward()
    unused = {n for n, p in network.named_parameters() if p.requires_grad and p.grad is None}
    for parameter in network.parameters():
        parameter.grad = None
    network.train(was_training)
    return unused


def try_call(call: Call, network: nn.Module, batch: Batch) -> Any:
    """What the network gives, or a message where it does not take the batch.

    Raises:
        UsageError: it does not.
    """
    try:
        return call(network, batch)
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        if "out of memory" in str(error).lower():
            raise
        raise UsageError(f"the network does not take {_shapes(batch)}: {_first_line(error)}") from error


def _shapes(batch: Batch) -> str:
    given = {n: v for n, v in batch.items() if n not in ("y", "labels")}
    return ", ".join(
        f"{name} of shape {tuple(values.shape)} {str(values.dtype).removeprefix('torch.')}"
        for name, values in given.items()
    )


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
