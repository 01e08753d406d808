"""Pass a batch to a network and read its output: a tensor, a tuple, or an output of transformers."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mpoc.errors import UsageError

Batch = dict[str, Tensor]

_LABELS = frozenset({"y", "label", "labels", "target", "targets"})


@dataclass(frozen=True)
class Call:
    """Calls a network with the tensors of a batch that it takes.

    A network of transformers is called by keyword, any other with ``x`` or ``input_ids`` alone.
    """

    main_input: str | None  # name of the input in transformers; None: it is passed by position
    hidden: bool = False  # ask for the hidden states of all layers
    keywords: tuple[str, ...] = ("attention_mask",)  # further tensors, passed by name where a batch has them

    @classmethod
    def of(cls, network: nn.Module, hidden: bool = False) -> Call:
        """The call of an unwrapped ``network``."""
        name = getattr(network, "main_input_name", None)
        return cls(name if isinstance(name, str) else None, hidden)

    def __call__(self, network: nn.Module, batch: Batch) -> Any:
        """The network's own output."""
        inputs = main_input(batch)
        if self.main_input is None:
            return network(inputs)
        keywords: dict[str, Any] = {self.main_input: inputs}
        keywords |= {name: batch[name] for name in self.keywords if name in batch}
        if self.hidden:
            keywords["output_hidden_states"] = True
        return network(**keywords)


class BatchConverter:
    """Converts what a data loader yields to batches of a network, each with the call that takes it.

    A tensor is the network's input, and so is the first entry of a tuple. The other entries are labels,
    unless ``forward`` requires several arguments. A dict is passed by keyword, without the labels and
    without the names that ``forward`` does not have. Integers (n, T) are tokens.
    """

    def __init__(self, network: nn.Module) -> None:
        parameters = inspect.signature(network.forward).parameters.values()
        named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        self.names = [parameter.name for parameter in named]
        self._required = [p.name for p in named if p.default is p.empty]
        self._takes_any = not named and any(p.kind is p.VAR_KEYWORD for p in parameters)
        self._main = Call.of(network).main_input
        floating = (p.dtype for p in network.parameters() if p.is_floating_point())
        self._dtype = next(floating, torch.float32)

    def __call__(self, given: Any) -> tuple[Batch, Call]:
        """Convert one item of a data loader to a batch on the CPU and the call that takes it.

        Raises:
            UsageError: the item is not a batch, or ``forward`` does not take it.
        """
        if isinstance(given, Tensor):
            return self._batch({"": given}, [""]), Call(self._main)
        if isinstance(given, Mapping):
            return self._by_name(given)
        if isinstance(given, list | tuple) and given:
            first, *labels = given
            if isinstance(first, Mapping):
                return self._by_name({**first, **dict(zip(["labels"], labels, strict=False))})
            if len(self._required) > 1 and len(given) >= len(self._required):
                return self._by_name(dict(zip(self._required, given, strict=False)))
            if isinstance(first, Tensor):
                entries = dict(zip(("", "labels"), given, strict=False))
                return self._batch(entries, [""]), Call(self._main)
        raise UsageError(
            f"a batch is a {type(given).__name__}: it must be a tensor, a tuple that begins with one, or a "
            "dict of tensors"
        )

    def _by_name(self, given: Mapping[str, Any]) -> tuple[Batch, Call]:
        inputs = [name for name in given if name not in _LABELS or name in self._required]
        taken = [name for name in inputs if name in self.names or self._takes_any]
        first = [self._main, "input_ids", "x", *self.names]
        if taken:
            main, *others = sorted(taken, key=lambda n: first.index(n) if n in first else len(first))
            keywords = [*others, "attention_mask"] if "attention_mask" in self.names else others
            call = Call(main, keywords=tuple(dict.fromkeys(keywords)))
            return self._batch(given, [main, *others]), call
        alone = [name for name in inputs if name in ("input_ids", "x")] or inputs
        others = [name for name in inputs if name == "attention_mask"]
        if len(alone) != 1:
            held, taken = ", ".join(map(str, given)) or "nothing", self.names
            raise UsageError(f"a batch holds {held}, and forward takes {', '.join(taken) or 'no names'}")
        return self._batch(given, [alone[0], *others]), Call(None)

    def _batch(self, given: Mapping[str, Any], names: list[str]) -> Batch:
        """The tensors of these names, the main input first, with the targets of a regression as ``y``."""
        main = given[names[0]]
        count = len(main) if isinstance(main, Tensor) and main.dim() else 0
        for name in names:
            tensor = given[name]
            if not isinstance(tensor, Tensor) or tensor.shape[:1] != (count,):
                what = f"of shape {tuple(tensor.shape)}" if isinstance(tensor, Tensor) else repr(tensor)
                raise UsageError(f"a batch of {count} examples holds {name or 'an input'} {what}")
        tokens = main.dim() == 2 and not main.is_floating_point()
        batch = {"input_ids" if tokens else "x": main} | {name: given[name] for name in names[1:]}
        targets = next((given[name] for name in given if name in _LABELS and name not in names), None)
        if isinstance(targets, Tensor) and targets.is_floating_point() and targets.shape[:1] == (count,):
            batch["y"] = targets
        return {name: self._converted(tensor) for name, tensor in batch.items()}

    def _converted(self, tensor: Tensor) -> Tensor:
        tensor = tensor.detach().cpu()
        return tensor.to(self._dtype) if tensor.is_floating_point() else tensor


def num_examples(batch: Batch) -> int:
    """Number of examples in a batch."""
    return len(next(iter(batch.values())))


def main_input(batch: Batch) -> Tensor:
    """The network's first input: tokens (n, T), or else (n, …)."""
    return batch["input_ids"] if "input_ids" in batch else batch["x"]


def first_output(outputs: Any) -> Tensor:
    """The logits, or the last hidden states of a network without a head.

    Raises:
        UsageError: the output is not a tensor and does not begin with one.
    """
    if isinstance(outputs, Tensor):
        return outputs
    logits = getattr(outputs, "logits", None)
    if isinstance(logits, Tensor):
        return logits
    first = (
        outputs[0] if hasattr(outputs, "to_tuple") or (isinstance(outputs, Sequence) and outputs) else None
    )
    if not isinstance(first, Tensor):
        raise UsageError(
            f"the network returns a {type(outputs).__name__}: mpoc needs a tensor, a tuple that begins with "
            "one, or an output of transformers"
        )
    return first


def has_logits(outputs: Any) -> bool:
    """Whether the first output scores classes or tokens: not so for a transformers network without a head."""
    return not hasattr(outputs, "last_hidden_state")


def hidden_states(outputs: Any) -> tuple[Tensor, ...]:
    """The hidden states in an output, (n, T, width) or (n, …) each; () if it holds none."""
    states = getattr(outputs, "hidden_states", None)
    if states:
        return tuple(states)
    last = getattr(outputs, "last_hidden_state", None)
    return () if last is None else (last,)


def rows(values: Tensor, batch: Batch, per_token: bool = True) -> Tensor:
    """Flatten values to (rows, width), with one row per token, padding excluded, or one row per example.

    Args:
        values: (n, T, width) of a text batch, or else (n, …).
        batch: the batch that they were computed from.
        per_token: make one row per token of a text batch; False: one row per example, with padding as zeros.
    """
    if "input_ids" not in batch or values.shape[:2] != batch["input_ids"].shape or values.ndim != 3:
        return values.flatten(1)
    mask = batch.get("attention_mask")
    if not per_token:
        return (values if mask is None else values * mask[:, :, None]).flatten(1)
    return values.flatten(0, 1) if mask is None else values[mask.bool()]


def num_rows(batch: Batch, per_token: bool) -> int:
    """Number of rows that :func:`rows` returns."""
    if per_token and "input_ids" in batch:
        mask = batch.get("attention_mask")
        return batch["input_ids"].numel() if mask is None else int(mask.sum())
    return num_examples(batch)


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Move the batch to ``device``, asynchronously from pinned memory."""
    if device.type == "cpu":
        return batch
    return {name: values.to(device, non_blocking=True) for name, values in batch.items()}
