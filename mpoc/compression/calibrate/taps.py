"""Modules that stand for the uses of weights which no module of their own multiplies by.

Recurrent layers and attention hand their weights to one function that does everything, and some networks read
the weight of a layer without calling it.  A tap is a submodule beside such a weight, called in place of each
product with it, so that hooks see the rows as those of any linear layer.  Recurrent layers then run step by
step, and projections of attention outside it: the same outputs to rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

_PREFIX = "_tap_"

State = tuple[Tensor, ...]  # hidden state and, of an LSTM, cell state; (B, H) each
Product = Callable[[Tensor], Tensor]


class Tap(nn.Module):
    """Multiplies rows by a weight of another module; copied with that module, it is the copy's tap.

    Args:
        owner: the module.
        name: of its weight (N_y, N_x).
    """

    def __init__(self, owner: nn.Module, name: str) -> None:
        super().__init__()
        self._of = owner, name  # in a tuple, so that the owner is no submodule
        self.eval()

    @property
    def weight(self) -> Tensor:
        """The weight (N_y, N_x)."""
        owner, name = self._of
        weight: Tensor = getattr(owner, name)
        return weight

    def forward(self, rows: Tensor) -> Tensor:
        """Rows (…, N_x) → (…, N_y)."""
        return F.linear(rows, self.weight)


def tap_of(module: nn.Module, name: str) -> str | None:
    """The name within ``module`` of the tap of its weight ``name``; None if it has none."""
    tap = _PREFIX + name
    return tap if tap in module._modules else None


def add_taps(network: nn.Module, names: Iterable[str]) -> None:
    """Give weights taps, in place.

    Args:
        network: that has these weights (N_y, N_x).
        names: e.g. ``["lstm.weight_ih_l0"]``.
    """
    for name in names:
        path, _, own = name.rpartition(".")
        owner = network.get_submodule(path)
        owner.add_module(_PREFIX + own, Tap(owner, own))


@contextmanager
def removing_taps(network: nn.Module) -> Iterator[None]:
    """At the end the network has no taps."""
    try:
        yield
    finally:
        for module in list(network.modules()):
            for name in [name for name, part in module._modules.items() if isinstance(part, Tap)]:
                del module._modules[name]


@contextmanager
def calling_taps(network: nn.Module) -> Iterator[None]:
    """Meanwhile the taps of the network are called wherever their weights are multiplied by."""
    taps = [module for module in network.modules() if isinstance(module, Tap)]
    if not taps:
        yield
        return
    fast = torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(False)  # it takes a whole layer's weights
        with _Calls(network, {tap.weight.data_ptr(): tap for tap in taps}):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


class _Calls(TorchFunctionMode):
    """Takes the products with tapped weights out of the functions that compute them."""

    def __init__(self, network: nn.Module, taps: dict[int, Tap]) -> None:
        super().__init__()
        self._taps = taps
        heads = [m for m in network.modules() if isinstance(m, nn.MultiheadAttention)]
        self._heads = {module.out_proj.weight.data_ptr(): module.out_proj for module in heads}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in _RECURRENT and any(self._tap(weight) for weight in _tensors(args)):
            return _RECURRENT[name](self, name, *args)
        if name in _CELLS and any(self._tap(weight) for weight in args[2:]):
            return self._cell(name, *args)
        if func is F.multi_head_attention_forward:
            return self._attention(func, *args, **kwargs)
        if func is F.linear:
            given = dict(zip(("input", "weight", "bias"), args, strict=False)) | kwargs
            if self._tap(given["weight"]):
                return _plus(self.product(given["weight"])(given["input"]), given.get("bias"))
        if name in ("matmul", "__matmul__", "mm") and len(args) == 2:
            left, right = args
            if right.dim() == 2 and self._tap(right.mT):
                return self.product(right.mT)(left)
            if self._tap(left) and right.dim() > 1:
                return self.product(left)(right.mT).mT
        return func(*args, **kwargs)

    def _tap(self, weight: Any) -> Tap | None:
        """The tap of a tensor that is a tapped weight as a whole."""
        if not isinstance(weight, Tensor) or weight.dim() != 2:
            return None
        tap = self._taps.get(weight.data_ptr())
        same = tap is not None and (weight.shape, weight.stride()) == (tap.weight.shape, tap.weight.stride())
        return tap if same else None

    def product(self, weight: Tensor) -> Product:
        """Rows to their products with a weight, through its tap or module where it has one."""
        return (
            self._tap(weight) or self._heads.get(weight.data_ptr()) or (lambda rows: F.linear(rows, weight))
        )

    def _cell(self, name: str, x: Tensor, state: Any, *weights: Tensor | None) -> Any:
        """One step of a recurrent cell (B, N_x) → (B, H), or states of an LSTM's."""
        states = tuple(state) if isinstance(state, tuple | list) else (state,)
        inputs, hidden, *biases = weights
        assert inputs is not None and hidden is not None, "a cell has both weights"
        first, second = biases if biases else (None, None)
        given = _plus(self.product(inputs)(x), first)
        states = _step(_CELLS[name], given, _plus(self.product(hidden)(states[0]), second), states)
        return states if len(states) > 1 else states[0]

    def _attention(
        self, func: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **options: Any
    ) -> Any:
        """Attention whose projections are made outside it; arguments as torch takes them."""
        width, heads, weight, bias, bias_k, bias_v, add_zero, dropout, out, out_bias, *more = args
        separate = [options.pop(f"{name}_proj_weight", None) for name in "qkv"]
        given = (query, key, value)
        if options.get("use_separate_proj_weight"):
            rows = [_batch_first(self.product(w), one) for w, one in zip(separate, given, strict=True)]
        else:
            made: dict[int, Tensor] = {}
            for one in given:
                if id(one) not in made:
                    made[id(one)] = _batch_first(self.product(weight), one)
            rows = [made[id(one)].split(width, -1)[k] for k, one in enumerate(given)]
        if bias is not None:
            rows = [one + part for one, part in zip(rows, bias.split(width), strict=True)]
        same = torch.eye(width, dtype=out.dtype, device=out.device)
        options |= {f"{name}_proj_weight": same for name in "qkv"} | {"use_separate_proj_weight": True}
        outputs, weights = func(
            *rows, width, heads, None, None, bias_k, bias_v, add_zero, dropout, same, None, *more, **options
        )
        if out.data_ptr() in self._heads:
            return _batch_first(self._heads[out.data_ptr()], outputs), weights
        return F.linear(outputs, out, out_bias), weights

    def recurrent(self, name: str, *args: Any) -> Any:
        """A recurrent layer step by step: torch's arguments, for padded or packed sequences."""
        packed = isinstance(args[2], Tensor | tuple | list) and isinstance(args[1], Tensor)
        packed = packed and args[1].dim() == 1 and not args[1].is_floating_point()
        data, sizes, initial, weights, biases, layers, *_, directions = args if packed else _rows(*args)
        states = tuple(initial) if isinstance(initial, tuple | list) else (initial,)
        per = len(weights) // (layers * (2 if directions else 1))
        ends: list[State] = []
        for layer in range(layers):
            outputs = []
            for direction in range(2 if directions else 1):
                k = 2 * layer + direction if directions else layer
                start = tuple(state[k] for state in states)
                own = weights[per * k : per * (k + 1)]
                steps, end = self._direction(name, data, sizes.tolist(), start, own, biases, direction)
                outputs.append(steps)
                ends.append(end)
            data = torch.cat(outputs, -1)
        last = tuple(torch.stack(parts) for parts in zip(*ends, strict=True))
        if packed:
            return data, *last
        data = data.unflatten(0, (len(sizes), -1))
        return data.transpose(0, 1) if args[-1] else data, *last

    def _direction(
        self,
        name: str,
        data: Tensor,
        sizes: Sequence[int],
        states: State,
        weights: Sequence[Tensor],
        biases: bool,
        backward: int,
    ) -> tuple[Tensor, State]:
        """One layer in one direction.

        Args:
            name: of torch's function.
            data: rows (ΣB_t, N_x), step after step.
            sizes: B_t of each step, falling.
            states: (B_0, H) at the start.
            weights: as torch keeps them.
            biases: whether they are among them.
            backward: 1 from the last step to the first.

        Returns:
            Outputs (ΣB_t, H), and the states at the end.
        """
        first, second = (weights[2], weights[3]) if biases else (None, None)
        hidden = self.product(weights[1])
        project = self.product(weights[-1]) if len(weights) in (3, 5) else None
        rows = data.unflatten(0, (len(sizes), -1)) if sizes[0] == sizes[-1] else data
        given = _plus(_batch_first(self.product(weights[0]), rows).reshape(len(data), -1), first).split(
            list(sizes)
        )
        outputs: list[Tensor] = [data] * len(sizes)
        for step in reversed(range(len(sizes))) if backward else range(len(sizes)):
            count = sizes[step]
            own = tuple(state[:count] for state in states)
            new = _step(_CELLS[f"{name}_cell"], given[step], _plus(hidden(own[0]), second), own)
            if project is not None:
                new = project(new[0]), *new[1:]
            outputs[step] = new[0]
            states = tuple(
                torch.cat([one, state[count:]]) if count < len(state) else one
                for one, state in zip(new, states, strict=True)
            )
        return torch.cat(outputs), states


def _rows(
    x: Tensor, states: Any, weights: Sequence[Tensor], biases: bool, layers: int, *options: Any
) -> tuple[Any, ...]:
    """Padded sequences as packed ones; ``options``: dropout, train, both directions, batch first."""
    steps = x.transpose(0, 1) if options[-1] else x
    sizes = torch.full((steps.shape[0],), steps.shape[1])
    return steps.flatten(0, 1), sizes, states, weights, biases, layers, *options[:-1]


def _batch_first(product: Product, rows: Tensor) -> Tensor:
    """Products of (T, n, N_x), taken as the (n, T, N_x) that a mask of padding belongs to."""
    return product(rows.transpose(0, 1)).transpose(0, 1) if rows.dim() == 3 else product(rows)


def _plus(rows: Tensor, bias: Tensor | None) -> Tensor:
    return rows if bias is None else rows + bias


def _tensors(args: Sequence[Any]) -> Iterator[Any]:
    """The tensors in the lists among the arguments of a function."""
    for arg in args:
        yield from arg if isinstance(arg, list | tuple) else ()


def _step(kind: str, given: Tensor, hidden: Tensor, states: State) -> State:
    """One step of a recurrence.

    Args:
        kind: of the cell.
        given: W x + b (B, gates · H).
        hidden: W h + b, likewise.
        states: (B, H) each.
    """
    if kind == "gru":
        (r, z, n), (r_h, z_h, n_h) = given.chunk(3, -1), hidden.chunk(3, -1)
        reset, update = (r + r_h).sigmoid(), (z + z_h).sigmoid()
        new = (n + reset * n_h).tanh()
        return (new + update * (states[0] - new),)
    if kind == "lstm":
        i, f, g, o = (given + hidden).chunk(4, -1)
        cell = f.sigmoid() * states[1] + i.sigmoid() * g.tanh()
        return o.sigmoid() * cell.tanh(), cell
    return ((given + hidden).tanh() if kind == "tanh" else (given + hidden).relu(),)


_CELLS = {"lstm_cell": "lstm", "gru_cell": "gru", "rnn_tanh_cell": "tanh", "rnn_relu_cell": "relu"}
_RECURRENT = dict.fromkeys(("lstm", "gru", "rnn_tanh", "rnn_relu"), _Calls.recurrent)
