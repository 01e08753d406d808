"""Checkpoints of a training: one safetensors file with everything that an exact resume needs.

Parameters, buffers and the optimiser's state are tensors; step, scores and the position of the log are JSON
in the header.  No random state is stored: random draws, the order of the examples and the learning rate are
functions of seed, step and process.  The file is replaced atomically, and reading it runs no code.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mpoc.errors import MpocError, UsageError
from mpoc.io.keyed_store import open_item, put_item
from mpoc.io.safetensors_writer import Entry
from mpoc.train.engine import is_sharded
from mpoc.train.tasks import Scores

FORMAT = "mpoc.training/3"  # 2 was no item of io/keyed_store
Tensors = dict[str, Tensor]
_MODEL, _OPTIMIZER, _BEST = "model/", "optimizer/", "best/"


@dataclass
class TrainingProgress:
    """Step, losses and scores of a training; plain data."""

    step: int = 0
    loss_sum: float = 0.0  # of the steps since the last evaluation
    loss_steps: int = 0
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    best: Scores | None = None
    best_step: int = 0
    waiting: int = 0  # evaluations since the best one


@dataclass
class SavedTraining:
    """The contents of a checkpoint."""

    progress: TrainingProgress
    extra: dict[str, Any]
    tensors: Tensors
    best: Tensors


class CheckpointFile:
    """The checkpoint file of a training.

    Args:
        path: path of the file.
        identity: model, data, task and options, which a resumed training must share; plain JSON data.
    """

    def __init__(self, path: Path, identity: dict[str, Any]) -> None:
        self.path = path
        self.identity: dict[str, Any] = json.loads(json.dumps(identity))
        self.extra: dict[str, Any] = {}  # of the caller: finished runs, position of the log

    def save(
        self, progress: TrainingProgress, tensors: Tensors, best: Tensors, scaler: dict[str, Any]
    ) -> None:
        """Replace the file atomically."""
        named = {**tensors, **{_BEST + name: tensor for name, tensor in best.items()}}
        state = {
            "format": FORMAT,
            "identity": self.identity,
            "progress": asdict(progress),
            "extra": {**self.extra, "scaler": scaler},
        }
        put_item(self.path, state, entries=[Entry.of(name, tensor) for name, tensor in named.items()])

    def load(self) -> SavedTraining:
        """Read the file.

        Raises:
            MpocError: not a checkpoint, or a damaged one.
            UsageError: it is of a training with other options.
        """
        try:
            item = open_item(self.path)
            if not isinstance(item.record, dict) or item.record.get("format") != FORMAT:
                raise MpocError(f"{self.path}: not a checkpoint of mpoc finetune")
            state, tensors = item.record, item.read_all()
        except MpocError as error:
            raise MpocError(str(error), "--force starts over") from error
        for group, values in self.identity.items():
            _check_identity(self.path, group, state["identity"].get(group), values)
        best = {n.removeprefix(_BEST): t for n, t in tensors.items() if n.startswith(_BEST)}
        rest = {n: t for n, t in tensors.items() if not n.startswith(_BEST)}
        return SavedTraining(TrainingProgress(**state["progress"]), state["extra"], rest, best)

    def remove(self) -> None:
        """Delete the file."""
        self.path.unlink(missing_ok=True)


def _check_identity(path: Path, group: str, stored: Any, current: Any) -> None:
    if stored == current:
        return
    if isinstance(stored, dict) and isinstance(current, dict):
        keys = [key for key in current | stored if current.get(key) != stored.get(key)]
        differences = ", ".join(f"{key} {stored.get(key)} there, {current.get(key)} here" for key in keys)
    else:
        differences = f"{stored} there, {current} here"
    raise UsageError(
        f"{path}: a checkpoint of a training with another {group}: {differences}",
        "give the options it began with, or start over with --force",
    )


def own_tensors(network: nn.Module) -> Tensors:
    """Parameters and buffers by name, each once; non-persistent buffers too."""
    return {n: t.detach() for n, t in (*network.named_parameters(), *network.named_buffers())}


def whole_weights(accelerator: Any, model: nn.Module) -> Tensors:
    """All parameters and buffers; if they are sharded, a collective call gathers them."""
    if not is_sharded(model):
        return own_tensors(accelerator.unwrap_model(model))
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    gathered: Any = get_model_state_dict(model, options=options)
    return dict(gathered)


def set_weights(accelerator: Any, model: nn.Module, weights: Tensors) -> None:
    """Set all parameters and buffers; the inverse of :func:`whole_weights`."""
    if not is_sharded(model):
        with torch.no_grad():
            for name, tensor in own_tensors(accelerator.unwrap_model(model)).items():
                tensor.copy_(weights[name])
        return
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    # Rank 0 alone has the gathered weights.
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(model, dict[str, Any](weights), options=options)


def gather(accelerator: Any, model: nn.Module, optimizer: Any) -> Tensors:
    """Weights and optimiser state under flat names; a collective call where they are sharded."""
    weights = whole_weights(accelerator, model)
    tensors = {_MODEL + name: tensor for name, tensor in weights.items()}
    for name, values in _optimizer_state(accelerator, model, optimizer).items():
        for key, value in values.items():
            if value is not None:
                # torch 2.13 leaves the momentum of SGD sharded in the full state.
                whole = value.full_tensor().cpu() if hasattr(value, "full_tensor") else torch.as_tensor(value)
                tensors[f"{_OPTIMIZER}{name}/{key}"] = whole
    return tensors


def scatter(accelerator: Any, model: nn.Module, optimizer: Any, tensors: Tensors) -> None:
    """Set weights and optimiser state; the inverse of :func:`gather`."""
    weights = {n.removeprefix(_MODEL): t for n, t in tensors.items() if n.startswith(_MODEL)}
    set_weights(accelerator, model, weights)
    state: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if name.startswith(_OPTIMIZER):
            parameter, _, key = name.removeprefix(_OPTIMIZER).rpartition("/")
            state.setdefault(parameter, {})[key] = tensor
    if is_sharded(model):
        _set_sharded_optimizer(model, optimizer, state)
        return
    names = _trained_names(accelerator, model)
    inner = optimizer.optimizer
    numbered = {k: state[name] for k, name in enumerate(names) if name in state}
    inner.load_state_dict({"state": numbered, "param_groups": inner.state_dict()["param_groups"]})


def _optimizer_state(accelerator: Any, model: nn.Module, optimizer: Any) -> dict[str, dict[str, Any]]:
    if is_sharded(model):
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict

        options = StateDictOptions(full_state_dict=True)  # on every process
        sharded: Any = get_optimizer_state_dict(model, optimizer.optimizer, options=options)
        return dict(sharded["state"])
    state = optimizer.optimizer.state_dict()["state"]
    return {name: state[k] for k, name in enumerate(_trained_names(accelerator, model)) if k in state}


def _set_sharded_optimizer(model: nn.Module, optimizer: Any, state: dict[str, dict[str, Tensor]]) -> None:
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_optimizer_state_dict,
        set_optimizer_state_dict,
    )

    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    groups = get_optimizer_state_dict(model, optimizer.optimizer, options=options)["param_groups"]
    whole: Any = {"state": state, "param_groups": groups}
    set_optimizer_state_dict(model, optimizer.optimizer, whole, options=options)


def _trained_names(accelerator: Any, model: nn.Module) -> list[str]:
    """Names of the trained parameters, in the order of the optimiser."""
    named = accelerator.unwrap_model(model).named_parameters()
    return [name for name, parameter in named if parameter.requires_grad]
