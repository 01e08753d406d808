"""What all layers with cores share: the cores as parameters, and a weight that is built only when used."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mpoc.tensor_networks.forms.contraction import without_autocast
from mpoc.tensor_networks.forms.form import Form, form_of
from mpoc.tensor_networks.structure import Structure

_SIZES = ("ndim", "dim", "size", "stride", "numel", "element_size", "nbytes", "is_floating_point")
_WRITE_INSTEAD = "change the layer's cores, or make it dense first (mpoc expand)"
# Python looks operators up in the class, never through __getattr__.
_READING = (
    *(
        "add",
        "radd",
        "sub",
        "rsub",
        "mul",
        "rmul",
        "truediv",
        "rtruediv",
        "floordiv",
        "mod",
        "pow",
        "rpow",
        "matmul",
        "rmatmul",
    ),
    *("neg", "abs", "eq", "ne", "lt", "le", "gt", "ge", "getitem", "iter", "contains", "array"),
)
_WRITING = ("setitem", "iadd", "isub", "imul", "itruediv", "ipow")


def build_weight(cores: Sequence[Tensor], structure: Structure) -> Tensor:
    """The dense weight in the cores' dtype, under autocast too: then it is what a dense layer would hold."""
    with without_autocast(cores[0].device):
        return form_of(cores, structure, check=False).to_weight()


class CoreWeight(nn.Module):
    """A module whose ``weight`` is made from cores. Made by :func:`mpoc.nn.adopt.adopt` from a dense module.

    ``cores``, of an MPO or of one and a low-rank part, are the parameters.  ``weight`` answers for dtype,
    device and shape without building anything, and becomes the dense weight where a torch function gets it.
    """

    cores: nn.ParameterList
    structure: Structure
    order: Tensor | None = None  # of the inputs, on the CPU wherever the cores are
    bias: Any
    _dense: Tensor | None

    weight: Any = property(lambda layer: WeightView(layer))

    @property
    def form(self) -> Form:
        """The cores as the tensor network that they are; they were checked when they were adopted."""
        return form_of(list(self.cores), self.structure, check=False)

    def dense_weight(self) -> Tensor:
        """The weight in its own shape, built from the cores, or as cached by :meth:`materialize`."""
        if self._dense is not None and not self.training:
            return self._dense
        return build_weight(list(self.cores), self.structure)

    def materialize(self, on: bool = True) -> None:
        """Keep the dense weight for evaluation: as fast as dense, and as large. Off gives it up.

        The cache is a snapshot without gradients.  Training mode, a change of device or dtype and
        ``load_state_dict`` end it; call again then, and after cores were changed in any other way.

        Raises:
            RuntimeError: in training mode, which changes the cores.
        """
        if on and self.training:
            raise RuntimeError("materialize() is for evaluation: call eval() first")
        with torch.inference_mode(False), torch.no_grad():
            self._dense = build_weight(list(self.cores), self.structure) if on else None

    def train(self, mode: bool = True) -> Any:
        """Training changes the cores and so ends the cache."""
        self._dense = None if mode else self._dense
        return super().train(mode)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._dense = None
        super()._load_from_state_dict(*args, **kwargs)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """A change of device or dtype ends the cache."""
        self._dense = None
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]

    def extra_repr(self) -> str:
        """The dense module's, with factors and bonds."""
        return ", ".join(filter(None, [super().extra_repr(), self.form.summary()]))


class WeightView:
    """A weight's dtype, device and shape; the weight itself where torch computes with it.

    It can be read, and nothing else: what is written to a weight made from cores would be lost, so writing
    raises AttributeError or TypeError.  (Writing to a part of it, as ``weight[0].zero_()``, is lost.)
    """

    _layer: CoreWeight
    _detached: bool

    def __init__(self, layer: CoreWeight, detached: bool = False) -> None:
        vars(self).update(_layer=layer, _detached=detached)

    def __setattr__(self, name: str, value: Any) -> None:
        """Refuse.

        Raises:
            AttributeError: always.
        """
        raise AttributeError(f"{name!r} of a weight made from cores cannot be set: {_WRITE_INSTEAD}")

    @property
    def data(self) -> WeightView:
        """The same without gradients; as little to be written to."""
        return WeightView(self._layer, detached=True)

    @property  # type: ignore[misc]
    def __class__(self) -> type[Tensor]:  # type: ignore[override]
        """T5 and others ask ``isinstance(weight, torch.Tensor)`` before they read its dtype."""
        return Tensor

    @property
    def dtype(self) -> torch.dtype:
        """Of the cores."""
        return self._layer.cores[0].dtype

    @property
    def device(self) -> torch.device:
        """Of the cores."""
        return self._layer.cores[0].device

    @property
    def shape(self) -> torch.Size:
        """Of the dense weight."""
        return torch.Size(self._layer.structure.shape)

    @property
    def requires_grad(self) -> bool:
        """Of the cores."""
        return not self._detached and any(core.requires_grad for core in self._layer.cores)

    def __getattr__(self, name: str) -> Any:
        """Anything else a tensor can do is asked of the dense weight, sizes of one without data."""
        if name in _SIZES:
            return getattr(torch.empty(self.shape, dtype=self.dtype, device="meta"), name)
        if name == "_is_hf_initialized":  # transformers' mark on what needs no random start
            return getattr(self._layer.cores[0], name, False)
        if not hasattr(Tensor, name):  # nothing is built to say no
            raise AttributeError(f"a weight made from cores has no attribute {name!r}")
        _refuse_writing(name)
        return getattr(self._own(), name)

    def __repr__(self) -> str:
        return f"<weight {tuple(self.shape)} made from cores, {self.dtype}, {self.device}>"

    def __format__(self, how: str) -> str:
        return format(repr(self), how)

    def _own(self) -> Tensor:
        """Built anew: the caller may keep a view of it, and must not get at the layer's cache."""
        dense = build_weight(list(self._layer.cores), self._layer.structure)
        return dense.detach() if self._detached else dense

    def _dense(self) -> Tensor:
        dense = self._layer.dense_weight()
        return dense.detach() if self._detached else dense

    def __len__(self) -> int:
        return self.shape[0]

    @classmethod
    def __torch_function__(
        cls,
        function: Callable[..., Any],
        types: Iterable[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Give torch the dense weight.

        Raises:
            TypeError: the function writes to it.
        """
        written = next(iter((*args, *(kwargs or {}).values())), None)  # what functions in place change
        if isinstance(written, WeightView):
            _refuse_writing(getattr(function, "__name__", ""))
        if isinstance((kwargs or {}).get("out"), WeightView):
            raise TypeError(f"out= a weight made from cores: {_WRITE_INSTEAD}")
        dense = [_dense(argument) for argument in args]
        return function(*dense, **{key: _dense(value) for key, value in (kwargs or {}).items()})


def _operator(name: str) -> Callable[..., Any]:
    def apply(view: WeightView, *others: Any) -> Any:
        return getattr(view._own(), name)(*map(_dense, others))

    return apply


def _refusal(name: str) -> Callable[..., Any]:
    def apply(*_: Any) -> Any:
        raise TypeError(f"{name} would write to a weight made from cores: {_WRITE_INSTEAD}")

    return apply


def _refuse_writing(name: str) -> None:
    """Torch names whatever works in place with an underscore at the end.

    Raises:
        TypeError: this is such a name.
    """
    if name.endswith("_") and not name.endswith("__"):
        _refusal(name)()


for _name in _READING:
    setattr(WeightView, f"__{_name}__", _operator(f"__{_name}__"))
for _name in _WRITING:
    setattr(WeightView, f"__{_name}__", _refusal(f"__{_name}__"))


def _dense(value: Any) -> Any:
    if type(value) in (list, tuple):
        return type(value)(map(_dense, value))
    return value._dense() if isinstance(value, WeightView) else value
