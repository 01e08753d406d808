"""How a batch goes into a network, and what comes out: tensors, tuples, or transformers' outputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Call:
    """Calls a network with the tensors of a batch that it takes.

    A network of transformers is called by keyword; any other with ``x``, or with ``input_ids``, alone.
    """

    main_input: str | None  # transformers' name of the input; None: any other network
    hidden: bool = False  # ask for the hidden states of all layers

    @classmethod
    def of(cls, network: nn.Module, hidden: bool = False) -> Call:
        """How ``network`` is called; ask before it is wrapped."""
        name = getattr(network, "main_input_name", None)
        return cls(name if isinstance(name, str) else None, hidden)

    def __call__(self, network: nn.Module, batch: Batch) -> Any:
        """The network's own output."""
        given = batch["input_ids"] if "input_ids" in batch else batch["x"]
        if self.main_input is None:
            return network(given)
        keywords: dict[str, Any] = {self.main_input: given}
        if "attention_mask" in batch:
            keywords["attention_mask"] = batch["attention_mask"]
        if self.hidden:
            keywords["output_hidden_states"] = True
        return network(**keywords)


def first_output(outputs: Any) -> Tensor:
    """Logits, or the last hidden states of a network without a head."""
    if isinstance(outputs, Tensor):
        return outputs
    logits = getattr(outputs, "logits", None)
    if isinstance(logits, Tensor):
        return logits
    first = outputs[0]
    assert isinstance(first, Tensor)
    return first


def has_logits(outputs: Any) -> bool:
    """Whether the first output scores classes or tokens; of transformers' networks without a head not."""
    return not hasattr(outputs, "last_hidden_state")


def hidden_states(outputs: Any) -> tuple[Tensor, ...]:
    """The hidden states that an output holds, (n, T, width) or (n, …) each; () where there are none."""
    states = getattr(outputs, "hidden_states", None)
    if states:
        return tuple(states)
    last = getattr(outputs, "last_hidden_state", None)
    return () if last is None else (last,)


def rows(values: Tensor, batch: Batch, per_token: bool = True) -> Tensor:
    """(rows, width): one row a token that is no padding, or one row an example.

    Args:
        values: (n, T, width) of a text batch; else (n, …).
        batch: that they were computed from.
        per_token: rows are tokens where they can be; else examples, with padding as zeros.
    """
    if "input_ids" not in batch or values.shape[:2] != batch["input_ids"].shape or values.ndim != 3:
        return values.flatten(1)
    mask = batch.get("attention_mask")
    if not per_token:
        return (values if mask is None else values * mask[:, :, None]).flatten(1)
    return values.flatten(0, 1) if mask is None else values[mask.bool()]


def num_rows(batch: Batch, per_token: bool) -> int:
    """How many rows :func:`rows` gives."""
    if per_token and "input_ids" in batch:
        mask = batch.get("attention_mask")
        return batch["input_ids"].numel() if mask is None else int(mask.sum())
    return len(next(iter(batch.values())))


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch there; from pinned memory without waiting."""
    if device.type == "cpu":
        return batch
    return {name: values.to(device, non_blocking=True) for name, values in batch.items()}
