"""accelerate, set up: one process or many, on whatever device, in whichever precision."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import nn

from mpoc.errors import MpocError, UsageError
from mpoc.pipeline import choose_device
from mpoc.processes import num_processes

_PRECISIONS = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}


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
