"""Prepare a training on accelerate: device, precision, optimiser, learning rate, and the network itself.

The learning rate is a pure function of the step, so that a resumed training needs no state of a schedule.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.utils.checkpoint import checkpoint

from mpoc.errors import MpocError, UsageError
from mpoc.runtime.device import choose_device
from mpoc.runtime.distributed import num_processes
from mpoc.train.evaluate import probe
from mpoc.train.loader import BatchLoader
from mpoc.train.settings import Settings
from mpoc.train.tasks import Task

Undo = Callable[[], None]
_PRECISIONS = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}


def set_dropout(network: nn.Module, probability: float) -> None:
    """Set the probability of all dropout modules, and of attributes such as ``attention_dropout``.

    Args:
        network: changed in place; its config is not.
        probability: from 0 to 1.
    """
    for module in network.modules():
        if isinstance(module, _DropoutNd):
            module.p = probability
        for name, value in list(vars(module).items()):
            if name.endswith(("dropout", "dropout_prob", "dropout_p")) and isinstance(value, float):
                setattr(module, name, probability)


def can_train() -> bool:
    """Whether accelerate is installed, which the extra ``train`` brings."""
    try:
        import accelerate  # noqa: F401
    except ImportError:
        return False
    return True


def make_accelerator(device: str = "auto", precision: str = "fp32") -> Any:
    """Set up an ``accelerate.Accelerator``.

    Args:
        device: ``auto``, ``cpu``, ``cuda``, …; with several processes each takes one device of this kind.
        precision: precision of the arithmetic: fp32, bf16 or fp16.

    Raises:
        MpocError: accelerate is not installed.
        UsageError: the device is missing, or cannot compute in that precision.
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
        # accelerate holds one state per process; another training may ask for another device.
        AcceleratorState._reset_state(reset_partial_state=True)
    elif chosen.type == "cuda":
        chosen = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    if chosen.type == "cuda" and chosen.index is not None:
        torch.cuda.set_device(chosen)
    accelerator = Accelerator(cpu=chosen.type == "cpu", mixed_precision=_PRECISIONS[precision])
    PartialState().wait_for_everyone()
    return accelerator


def leave(together: bool) -> None:
    """Destroy the process group; at the end of Python, its threads may abort the process.

    Args:
        together: wait for all processes; False where one may have failed.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        if together:
            torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def will_shard(accelerator: Any) -> bool:
    """Whether accelerate will shard the parameters over the processes (FSDP); called before it prepares.

    accelerate shards on accelerators only; elsewhere ``--use_fsdp`` gives DDP.
    """
    return str(accelerator.distributed_type).endswith("FSDP")


def describe(accelerator: Any) -> str:
    """Device and processes, for messages; tells where FSDP was requested and accelerate does not use it."""
    if accelerator.num_processes == 1:
        return f"device {accelerator.device}"
    how = "parameters sharded (FSDP)" if will_shard(accelerator) else "each with all parameters"
    if os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true" and not will_shard(accelerator):
        how += ", since accelerate uses FSDP on accelerators only"
    return f"device {accelerator.device}, {accelerator.num_processes} processes, {how}"


def is_sharded(model: nn.Module) -> bool:
    """Whether the parameters of a prepared network are sharded over several processes.

    The network is asked, since the state of accelerate changes while it prepares an optimiser.
    """
    pieces = any(hasattr(parameter, "full_tensor") for parameter in model.parameters())
    return pieces or type(model).__name__ == "FullyShardedDataParallel"


def seed_generators(seed: int, device: torch.device) -> None:
    """Seed the generators of dropout and the like, on the CPU and on ``device``.

    ``torch.manual_seed`` would take a millisecond where CUDA is not in use, since it notes a traceback.
    """
    torch.default_generator.manual_seed(seed)
    if device.type != "cpu":
        getattr(torch, device.type).manual_seed(seed)


def make_optimizer(parameters: Iterable[nn.Parameter], settings: Settings) -> torch.optim.Optimizer:
    """SGD, AdamW, or with an L2 term Adam, in which torch couples it.

    All parameters form one group: Eq. (7) of Gao et al. 2020 sums over biases and norms too.
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
    """The learning rate of step ``step`` (from 0) of ``steps``: a pure function of the step.

    Warm-up is linear and reaches the peak in its last step.  Cosine falls from there and would be 0 one step
    after the last (Loshchilov and Hutter 2017); exponential multiplies by gamma every ``decay_every`` epochs.
    """
    warmup = settings.warmup * steps if settings.warmup < 1 else settings.warmup
    if step + 1 < warmup:
        return settings.peak * (step + 1) / warmup
    if settings.schedule == "cosine":
        share = (step - warmup) / max(1.0, steps - warmup)
        return settings.peak * 0.5 * (1 + math.cos(math.pi * min(1.0, max(0.0, share))))
    if settings.schedule == "exponential":
        return settings.peak * settings.gamma ** (step // steps_per_epoch // settings.decay_every)
    return settings.peak


def set_learning_rate(optimizer: Any, lr: float) -> None:
    """Set the learning rate of the next step."""
    for group in optimizer.param_groups:
        group["lr"] = lr


class Prepared(NamedTuple):
    """Network and optimiser as accelerate prepared them."""

    model: Any  # the network, wrapped where there are several processes
    optimizer: Any  # of accelerate
    stepper: Any  # takes the step: ``optimizer``, or the torch optimiser within
    undo: Undo  # disables gradient checkpointing


def prepare_training(
    network: nn.Module, task: Task, loader: BatchLoader, settings: Settings, accelerator: Any
) -> Prepared:
    """Check ``network`` against the data, move it and the task's teacher to the device, and wrap it.

    Args:
        network: in training mode afterwards.
        task: that is trained.
        loader: the training split.
        settings: settings of the training.
        accelerator: from :func:`mpoc.train.engine.make_accelerator`.

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
    model, optimizer = accelerator.prepare(_in_training_mode(network), optimizer)
    # accelerate's wrapper looks for an optional package in every step (0.5 ms); only fp16 needs it.
    return Prepared(model, optimizer, optimizer if accelerator.scaler else optimizer.optimizer, undo)


def _in_training_mode(network: nn.Module) -> nn.Module:
    """The network in training mode; batch norms beside layers in few bits keep their statistics.

    Those were found for the codes, which hardly move; noisy ones of small batches cost more than a short
    training gains.
    """
    network.train()
    if any(hasattr(parameter, "stored_steps") for parameter in network.parameters()):
        for module in network.modules():
            if isinstance(module, _BatchNorm):
                module.eval()
    return network


# Gradient checkpointing: activations are recomputed in the backward pass, not stored (Chen et al. 2016).
# Stored are the inputs of blocks: of the modules of a ModuleList, of about √n runs of modules of a
# Sequential of n, or of the children of a network that has neither. The price is a second forward pass.
# Dropout draws the same again. Buffers that a module updates (running statistics of batch norm) are updated
# once: recomputing works on copies. Networks of transformers use their own implementation, which knows of
# their caches.


def enable_gradient_checkpointing(network: nn.Module) -> Undo:
    """Let ``network`` recompute activations in the backward pass.

    Returns:
        A function that disables it again.

    Raises:
        UsageError: the network is a single layer.
    """
    if getattr(network, "supports_gradient_checkpointing", False) and not _has_running_statistics(network):
        own: Any = network
        own.activation_checkpointing_enable()
        undo_own: Undo = own.activation_checkpointing_disable
        return undo_own
    lists = _outermost_lists(network)
    chains = [module for module in lists if isinstance(module, nn.Sequential)]
    blocks = [block for module in lists if module not in chains for block in _trained(module)]
    if not lists:
        blocks = _trained(network)
    if not chains and not blocks:
        raise UsageError(f"--gradient-checkpointing: {type(network).__name__} is one layer, not several")
    for chain in chains:
        chain.forward = _in_runs(chain)  # type: ignore[method-assign]
    for block in blocks:
        block.forward = _recomputed(block.forward, [block])

    def undo() -> None:
        for module in (*chains, *blocks):
            module.__dict__.pop("forward", None)

    return undo


def _outermost_lists(module: nn.Module) -> list[nn.Module]:
    """Every outermost ModuleList or plain Sequential of at least two trained modules."""
    plain = type(module).forward is nn.Sequential.forward
    if (isinstance(module, nn.ModuleList) or plain) and len(_trained(module)) > 1:
        return [module]
    return [inner for child in module.children() for inner in _outermost_lists(child)]


def _trained(module: nn.Module) -> list[nn.Module]:
    return [child for child in module.children() if any(p.requires_grad for p in child.parameters())]


def _has_running_statistics(network: nn.Module) -> bool:
    return any(getattr(module, "running_mean", None) is not None for module in network.modules())


def _recomputed(forward: Callable[..., Any], modules: list[nn.Module]) -> Callable[..., Any]:
    """Wrap ``forward``, which calls ``modules``, so that its activations are recomputed."""

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), _copied_buffers(modules)

    def run(*values: Any, **named: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*values, **named)
        return checkpoint(forward, *values, use_reentrant=False, context_fn=contexts, **named)

    return run


def _in_runs(chain: nn.Sequential) -> Callable[[Tensor], Tensor]:
    """The forward of a Sequential, recomputed in runs of modules."""

    def forward(x: Tensor) -> Tensor:
        modules = list(chain)  # read at every call, since FSDP replaces them
        longest = math.ceil(len(modules) / math.ceil(math.sqrt(len(modules))))
        for start in range(0, len(modules), longest):
            part = modules[start : start + longest]
            x = _recomputed(nn.Sequential(*part).forward, part)(x)
        return x

    return forward


@contextmanager
def _copied_buffers(modules: list[nn.Module]) -> Iterator[None]:
    """Discard what this context writes to the buffers."""
    owners = [owner for module in modules for owner in module.modules() if owner._buffers]
    kept = [dict(owner._buffers) for owner in owners]
    for owner in owners:
        for name, value in owner._buffers.items():
            owner._buffers[name] = None if value is None else value.clone()
    try:
        yield
    finally:
        for owner, buffers in zip(owners, kept, strict=True):
            owner._buffers.update(buffers)
