"""accelerate, set up: one process or many, on whatever device, in whichever precision."""

from __future__ import annotations

import os
from typing import Any

import torch

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


def is_sharded(accelerator: Any) -> bool:
    """Whether the parameters lie in pieces on several processes (FSDP)."""
    return str(accelerator.distributed_type).endswith("FSDP")


def seed_generators(seed: int, device: torch.device) -> None:
    """Seed what networks draw from (dropout) on the CPU and on ``device``.

    As ``torch.manual_seed``, which takes a millisecond where CUDA is not in use: it notes a traceback.
    """
    torch.default_generator.manual_seed(seed)
    if device.type != "cpu":
        getattr(torch, device.type).manual_seed(seed)
