"""The command line of ``mpoc finetune`` as plain data."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from mpoc.cli.data_options import data_options
from mpoc.errors import UsageError

if TYPE_CHECKING:
    from mpoc.train.finetune import Request

_SETTINGS = (
    "steps", "batch", "accumulate", "optimizer", "lr", "momentum", "nesterov", "l2", "weight_decay",
    "schedule", "warmup", "gamma", "decay_every", "clip", "dropout", "precision", "gradient_checkpointing",
    "eval_every", "patience", "seed",
)  # fmt: skip
_REQUEST = (
    "output", "arch", "task", "teacher", "teacher_arch", "temperature", "hidden_weight", "runs", "device",
    "force", "resume", "log", "plot",
)  # fmt: skip


def training_request(values: dict[str, Any]) -> Request:
    """The options of ``mpoc finetune`` as plain data.

    Raises:
        UsageError: a value that cannot be read, or options that do not go together.
    """
    from mpoc.option_text import parse_size
    from mpoc.train.finetune import Request
    from mpoc.train.settings import Settings

    every = re.fullmatch(r"([1-9]\d{0,14})(s?)", values["checkpoint_every"])
    if not every:
        raise UsageError(f"--checkpoint-every {values['checkpoint_every']}: not as 500 (steps) or 60s")
    when: dict[str, Any] = {"save_seconds": float(every[1])}
    if not every[2]:
        when = {"save_seconds": float("inf"), "save_steps": int(every[1])}
    if values["steps"] is not None and values["epochs"] is not None:
        raise UsageError("--steps and --epochs: one of them")
    if values["dropout"] is None and values["teacher"] is not None:
        values = values | {"dropout": 0.0}  # noise in the answers is nothing to learn from
    settings = Settings(**{name: values[name] for name in _SETTINGS}, keep_best=values["best"])
    return Request(
        values["model"],
        data_options(values["data"], values),
        settings if values["epochs"] is None else replace(settings, epochs=values["epochs"]),
        **{name: values[name] for name in _REQUEST},
        **when,
        max_shard_size=parse_size(values["max_shard_size"]),
    )
