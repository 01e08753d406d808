"""A program of two processes, on CPUs: FSDP, whole, then stopped by Ctrl-C and resumed.

    torchrun --nproc-per-node 2 -m tests.train.sharded FOLDER

accelerate itself takes FSDP on accelerators only (``AcceleratorState`` looks for it under MULTI_GPU and the
like, never under MULTI_CPU) and quietly gives DDP on CPUs, so that its state is set by hand here; from there
everything is as on GPUs: accelerate's own preparation, torch's fully_shard, over gloo.
"""

from __future__ import annotations

import gc
import os
import signal
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "NO_WRAP"}

from torch.distributed import barrier, destroy_process_group
from torch.distributed.tensor import DTensor

from mpoc.runtime.distributed import is_main
from mpoc.runtime.signals import Interrupted
from mpoc.train import finetune as orchestrator
from mpoc.train.engine import make_accelerator, will_shard
from mpoc.train.finetune import finetune
from mpoc.train.monitor import TrainingEvent
from mpoc.train.settings import DataOptions, FinetuneRequest, Settings


def request(folder: Path) -> FinetuneRequest:
    """Also what the test trains in one process."""
    settings = Settings(epochs=2.0, batch=16, optimizer="sgd", lr=0.05, l2=1e-4, clip=1.0, keep_best=True)
    data = DataOptions(folder / "blobs.npz", held_out=0.2)
    source, output = folder / "net.mpo.safetensors", folder / "two.safetensors"
    return FinetuneRequest(source, data, settings, output, f"{folder / 'net.py'}:net", device="cpu")


def _forced(*options: Any) -> Any:
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

    accelerator = make_accelerator(*options)
    for state in (PartialState(), accelerator.state):
        state.distributed_type = DistributedType.FSDP
    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(fsdp_version=2)
    assert will_shard(accelerator)
    return accelerator


def main(folder: Path) -> None:
    """Write two.safetensors and again.safetensors."""
    vars(orchestrator)["make_accelerator"] = _forced
    sharded: list[bool] = []

    def stop(now: TrainingEvent) -> None:
        sharded.append(any(isinstance(found, DTensor) for found in gc.get_objects()))
        if now.step == 5:
            signal.raise_signal(signal.SIGINT)

    whole = request(folder)
    finetune(whole)
    broken = replace(whole, output=folder / "again.safetensors")
    with suppress(Interrupted):
        finetune(broken, on_event=stop)
    barrier()  # the first process writes
    assert broken.checkpoint.exists()
    assert all(sharded)
    finetune(replace(broken, resume=True))
    destroy_process_group()
    if is_main():
        print("done", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    os._exit(0)  # threads of gloo that outlive the groups now and then abort a process at its very end
