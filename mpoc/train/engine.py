"""Dropout of a network, wherever it keeps its probability.

accelerate, set up: one process or many, on whatever device, in whichever precision.

The optimiser, and the learning rate of each step as a pure function of the step.

A network made ready to be trained: checked against the data, then handed to accelerate.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.modules.dropout import _DropoutNd

from mpoc.errors import MpocError, UsageError
from mpoc.runtime.device import choose_device
from mpoc.runtime.distributed import num_processes
from mpoc.train.evaluate import probe
from mpoc.train.gradient_checkpointing import Undo, enable_gradient_checkpointing
from mpoc.train.loader import BatchLoader
from mpoc.train.settings import Settings
from mpoc.train.tasks import Task

_PRECISIONS = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}


def set_dropout(network: nn.Module, probability: float) -> None:
    """Give all dropout one probability: of dropout modules, and of modules that hold a number of that name.

    Args:
        network: changed; its config is not.
        probability: from 0 to 1.
    """
    for module in network.modules():
        if isinstance(module, _DropoutNd):
            module.p = probability
        for name, value in list(vars(module).items()):
            if name.endswith(("dropout", "dropout_prob", "dropout_p")) and isinstance(value, float):
                setattr(module, name, probability)


def can_train() -> bool:
    """Whether accelerate is installed; the extra ``train`` has it."""
    try:
        import accelerate  # noqa: F401
    except ImportError:
        return False
    return True


def make_accelerator(device: str = "auto", precision: str = "fp32") -> Any:
    """An ``accelerate.Accelerator``.

    Args:
        device: ``auto``, ``cpu``, ``cuda``, …; with several processes each takes one of its sort.
        precision: fp32, bf16 or fp16 arithmetic.

    Raises:
        MpocError: accelerate is not installed.
        UsageError: the device is not there, or cannot compute in that precision.
    """
    try:
        from accelerate import Accelerator
        from accelerate.state import AcceleratorState, PartialState
    except ImportError as error:
        raise MpocError(f"training needs accelerate ({error})", "pip install 'mpoc[train]'") from error
    chosen = choose_device(device)
    if precision == "fp16" and chosen.type == "cpu":
        raise UsageError("--precision fp16 needs a GPU", "--precision bf16")
    if num_processes() == 1:
        # accelerate holds one state a process; another training here may ask for another device.
        AcceleratorState._reset_state(reset_partial_state=True)
    elif chosen.type == "cuda":
        chosen = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    if chosen.type == "cuda" and chosen.index is not None:
        torch.cuda.set_device(chosen)
    accelerator = Accelerator(cpu=chosen.type == "cpu", mixed_precision=_PRECISIONS[precision])
    PartialState().wait_for_everyone()
    return accelerator


def leave(together: bool) -> None:
    """End what connects this process to others; left to Python's end, its threads may abort the process.

    Args:
        together: wait until all have come here; not where one may have failed.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        if together:
            torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def will_shard(accelerator: Any) -> bool:
    """Whether accelerate will share the parameters out over the processes (FSDP); asked before it prepares.

    accelerate does so on accelerators only; elsewhere ``--use_fsdp`` gives DDP.
    """
    return str(accelerator.distributed_type).endswith("FSDP")


def describe(accelerator: Any) -> str:
    """Device and processes in words; also where FSDP was asked for and accelerate does not give it."""
    if accelerator.num_processes == 1:
        return f"device {accelerator.device}"
    how = "parameters shared out (FSDP)" if will_shard(accelerator) else "each with all parameters"
    if os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true" and not will_shard(accelerator):
        how += ", as accelerate has FSDP on accelerators only"
    return f"device {accelerator.device}, {accelerator.num_processes} processes, {how}"


def is_sharded(model: nn.Module) -> bool:
    """Whether a prepared network's parameters lie in pieces on several processes.

    Asked of the network: what accelerate's state says of it changes while it prepares an optimiser.
    """
    pieces = any(hasattr(parameter, "full_tensor") for parameter in model.parameters())
    return pieces or type(model).__name__ == "FullyShardedDataParallel"


def seed_generators(seed: int, device: torch.device) -> None:
    """Seed what networks draw from (dropout) on the CPU and on ``device``.

    As ``torch.manual_seed``, which takes a millisecond where CUDA is not in use: it notes a traceback.
    """
    torch.default_generator.manual_seed(seed)
    if device.type != "cpu":
        getattr(torch, device.type).manual_seed(seed)


def make_optimizer(parameters: Iterable[nn.Parameter], settings: Settings) -> torch.optim.Optimizer:
    """SGD, AdamW, or Adam where the L2 of Eq. (7) is asked for: torch's Adam has it coupled.

    Every parameter is in one group: Eq. (7) sums over all of them, biases and norms too.
    """
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    if settings.optimizer == "sgd":
        return torch.optim.SGD(
            trained,
            lr=settings.peak,
            momentum=settings.momentum,
            nesterov=settings.nesterov,
            weight_decay=settings.l2,
        )
    if settings.l2:
        return torch.optim.Adam(trained, lr=settings.peak, betas=settings.betas, weight_decay=settings.l2)
    return torch.optim.AdamW(
        trained, lr=settings.peak, betas=settings.betas, weight_decay=settings.weight_decay
    )


def learning_rate(settings: Settings, step: int, steps: int, steps_per_epoch: int) -> float:
    """Of step ``step`` (from 0) of ``steps``.

    Warm-up is linear and reaches the peak in its last step.  Cosine falls from there and is 0 only behind the
    last step (Loshchilov and Hutter 2017); exponential multiplies by gamma every ``decay_every`` epochs.
    """
    warmup = settings.warmup * steps if settings.warmup < 1 else settings.warmup
    if step + 1 < warmup:
        return settings.peak * (step + 1) / warmup
    if settings.schedule == "cosine":
        done = (step - warmup) / max(1.0, steps - warmup)
        return settings.peak * 0.5 * (1 + math.cos(math.pi * min(1.0, max(0.0, done))))
    if settings.schedule == "exponential":
        return settings.peak * settings.gamma ** (step // steps_per_epoch // settings.decay_every)
    return settings.peak


def set_learning_rate(optimizer: Any, lr: float) -> None:
    """For the step that comes."""
    for group in optimizer.param_groups:
        group["lr"] = lr


class Prepared(NamedTuple):
    """What a step works with."""

    model: Any  # the network, wrapped where there are several processes
    optimizer: Any  # of accelerate
    stepper: Any  # what takes the step
    undo: Undo  # of gradient checkpointing


def prepare_training(
    network: nn.Module, task: Task, loader: BatchLoader, settings: Settings, accelerator: Any
) -> Prepared:
    """Check ``network`` against the data, and wrap it; it and the task's teacher go to the device.

    Args:
        network: in training mode afterwards.
        task: that is learnt.
        loader: the training split.
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
    unused = probe(network, task, loader, where)
    if settings.dropout is not None:
        set_dropout(network, settings.dropout)
    undo: Undo = lambda: None  # noqa: E731
    if settings.gradient_checkpointing:
        undo = enable_gradient_checkpointing(network)
    if accelerator.num_processes > 1 and unused:
        from accelerate import DistributedDataParallelKwargs

        accelerator.ddp_handler = DistributedDataParallelKwargs(find_unused_parameters=True)
    optimizer = make_optimizer(network.parameters(), settings)
    model, optimizer = accelerator.prepare(network.train(), optimizer)
    # accelerate's wrapper looks for an optional package in every step (0.5 ms); only fp16 needs it.
    return Prepared(model, optimizer, optimizer if accelerator.scaler else optimizer.optimizer, undo)
