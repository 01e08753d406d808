"""Score a network on a split: by its task, by its distance from a reference, and by its latency."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mpoc.errors import MpocError, UsageError
from mpoc.models.call import Batch, Call, first_output, has_logits, rows, to_device
from mpoc.models.introspection import evaluating
from mpoc.runtime.device import derived_seed
from mpoc.train.loader import BatchLoader, cut
from mpoc.train.tasks import Scores, Task, kl_of_rows

LATENCY_SECONDS = 1.0  # of each measurement of a latency
_WARM_UP = 3  # calls


def probe(network: nn.Module, task: Task, loader: BatchLoader, device: torch.device) -> set[str]:
    """Run two examples forward and backward in eval mode, before step 1; the network is not changed.

    Returns:
        Names of the trained parameters that the loss does not depend on.

    Raises:
        UsageError: the network does not take the batch, or the task does not take its outputs.
    """
    generator = torch.Generator().manual_seed(derived_seed("probe"))
    indices = torch.arange(min(2, len(loader)))
    batch = to_device(task.prepare(loader.read(indices, generator), generator), device)
    with evaluating(network):
        outputs = try_call(Call.of(network, task.hidden), network, batch)
        with torch.no_grad():
            task.check(outputs, batch)
        task.loss(outputs, batch).backward()
    unused = {n for n, p in network.named_parameters() if p.requires_grad and p.grad is None}
    for parameter in network.parameters():
        parameter.grad = None
    return unused


def try_call(call: Call, network: nn.Module, batch: Batch) -> Any:
    """Call ``network`` with ``batch``.

    Raises:
        UsageError: the network does not take the batch; names shapes and dtypes.
    """
    try:
        return call(network, batch)
    except (RuntimeError, ValueError, TypeError, AttributeError, LookupError, AssertionError) as error:
        if "out of memory" in str(error).lower():
            raise
        raise UsageError(f"the network does not take {_shapes(batch)}: {_first_line(error)}") from error


def _shapes(batch: Batch) -> str:
    inputs = {name: values for name, values in batch.items() if name not in ("y", "labels")}
    return ", ".join(
        f"{name} of shape {tuple(values.shape)} {str(values.dtype).removeprefix('torch.')}"
        for name, values in inputs.items()
    )


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@dataclass(frozen=True)
class Evaluation:
    """Scores over a whole split."""

    scores: Scores
    examples: int
    rate: float  # examples per second, over all processes, reading included

    def rounded(self) -> Scores:
        """The scores to six significant digits, as files store them."""
        return {name: float(f"{value:.6g}") for name, value in self.scores.items()}


def evaluate(
    network: nn.Module,
    task: Task,
    loader: BatchLoader,
    batch: int,
    device: torch.device,
    call: Call | None = None,
    accelerator: Any = None,
) -> Evaluation:
    """Score ``network`` on every example of a split, each counted once.

    Masks that a task draws depend on the example alone, so they are the same in every evaluation and for any
    batch size.

    Args:
        network: network on ``device``, wrapped for several processes or not. Its training mode is kept.
        task: defines the scores.
        loader: the split.
        batch: number of examples in a call, in each process.
        device: device of the network.
        call: how the network is called; None: inferred from a network that is not wrapped.
        accelerator: accelerate's object, for several processes or mixed precision.

    Raises:
        MpocError: the split has nothing to score, e.g. texts of one token.
    """
    call = Call.of(network, task.hidden) if call is None else call
    totals: dict[str, Tensor] = {}
    count, start = 0, time.perf_counter()
    with evaluating(network):
        for part, weight in _batches(task, loader, batch, accelerator):
            count += weight * task.count(part)
            for name, value in _sums(network, call, task, to_device(part, device), accelerator).items():
                totals[name] = totals.get(name, 0) + weight * value.double()
    sums, count = _over_processes(totals, count, accelerator)
    seconds = time.perf_counter() - start
    if count == 0:
        raise MpocError(
            f"{task.name}: nothing to predict in {len(loader):,} examples",
            "use longer text, or another --block",
        )
    return Evaluation(task.scores(sums, count), len(loader), len(loader) / seconds)


def _batches(task: Task, loader: BatchLoader, batch: int, accelerator: Any) -> Iterator[tuple[Batch, int]]:
    """The batches that this process scores, each with its weight.

    Sharded networks need equally many calls in every process: a process without a share repeats an example
    with weight 0. Texts of similar length come together, with little padding.
    """
    rank, processes = 0, 1
    if accelerator is not None:
        rank, processes = accelerator.process_index, accelerator.num_processes
    lengths = loader.examples.lengths()
    order = torch.arange(len(loader)) if lengths is None else lengths.argsort(stable=True)
    for chunk in order.split(batch * processes):
        share = cut(chunk, rank, processes)
        scored = share if len(share) else chunk[:1]
        seeds = [derived_seed(0, "evaluation", index) for index in scored.tolist()]
        yield task.prepare_each(loader.read(scored), seeds), int(len(share) > 0)


@torch.no_grad()
def _sums(network: nn.Module, call: Call, task: Task, part: Batch, accelerator: Any) -> dict[str, Tensor]:
    if accelerator is None:
        return task.sums(call(network, part), part)
    with accelerator.autocast():
        return task.sums(call(network, part), part)


def _over_processes(totals: dict[str, Tensor], count: int, accelerator: Any) -> tuple[Scores, int]:
    names = list(totals)
    values = torch.stack([totals[name] for name in names])
    values = torch.cat([values, values.new_tensor([count])])
    if accelerator is not None and accelerator.num_processes > 1:
        values = accelerator.reduce(values, "sum")
    *sums, counted = values.tolist()
    return dict(zip(names, sums, strict=True)), round(counted)


@torch.no_grad()
def fidelity(
    network: nn.Module, reference: nn.Module, loader: BatchLoader, batch: int, device: torch.device
) -> Evaluation:
    """Compare the outputs of ``network`` with those of ``reference``, both on ``device``.

    Means over tokens or examples: ``cosine`` of the outputs, ``relative_error`` ‖y − y_ref‖/‖y_ref‖, and for
    logits ``kl`` = KL(reference ‖ network) in nats and ``agreement`` of the largest logit in %.

    Raises:
        UsageError: outputs of different shapes, or a network that does not take the data.
    """
    call, call_reference = Call.of(network), Call.of(reference)
    network.eval()
    reference.eval()
    totals: dict[str, float] = {}
    count, start = 0, time.perf_counter()
    for chunk in torch.arange(len(loader)).split(batch):
        part = to_device(loader.read(chunk), device)
        outputs = try_call(call, network, part)
        expected = try_call(call_reference, reference, part)
        shapes = [tuple(first_output(o).shape) for o in (outputs, expected)]
        if shapes[0] != shapes[1]:
            raise UsageError(
                f"the network gives outputs of shape {shapes[0]}, the reference of shape {shapes[1]}"
            )
        ours, theirs = (rows(first_output(o).float(), part) for o in (outputs, expected))
        sums = {
            "cosine": F.cosine_similarity(ours, theirs, dim=-1).sum(),
            "relative_error": ((ours - theirs).norm(dim=-1) / theirs.norm(dim=-1)).sum(),
        }
        if has_logits(outputs) and ours.shape[-1] > 1:
            sums["kl"] = kl_of_rows(ours, theirs).sum()
            sums["agreement"] = 100 * (ours.argmax(-1) == theirs.argmax(-1)).sum()
        for name, value in sums.items():
            totals[name] = totals.get(name, 0.0) + float(value)
        count += len(ours)
    seconds = time.perf_counter() - start
    return Evaluation(
        {name: value / count for name, value in totals.items()}, len(loader), len(loader) / seconds
    )


def latency(network: nn.Module, part: Batch, device: torch.device) -> float:
    """Median seconds of one call with this batch, in eval mode, after a warm-up."""
    call, part = Call.of(network), to_device(part, device)
    network.eval()
    times: list[float] = []
    with torch.inference_mode():
        begin = time.perf_counter()
        while len(times) < _WARM_UP + 2 or time.perf_counter() - begin < LATENCY_SECONDS:
            start = time.perf_counter()
            call(network, part)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            times.append(time.perf_counter() - start)
    return statistics.median(times[_WARM_UP:])


def repeated(part: Batch, count: int) -> Batch:
    """``count`` examples: those of ``part``, repeated."""
    length = len(next(iter(part.values())))
    chosen = torch.arange(count) % length
    return {name: values[chosen] for name, values in part.items()}
