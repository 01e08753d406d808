"""Layers whose weight is made from cores: cores are the parameters, the dense weight is built when used.

In eval mode a layer may hold its dense weight, built once: :func:`use_weights` chooses. A held weight is a
plain attribute, not part of the state dict, of copies or of pickles. It is used where no gradients of the
cores are asked for, and built again once they have changed: each call compares the parameters and torch's
version counters of their data with those it was built from.

That comparison takes 2 to 3 µs where a small layer takes ten, most of it to read objects that the rest of
the network has pushed out of the caches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, is_grad_enabled, nn
from torch._C import _is_tracing
from torch.compiler import is_compiling, is_dynamo_compiling

from mpoc.errors import UsageError, nearest
from mpoc.tensor_networks.forms.contraction import without_autocast
from mpoc.tensor_networks.forms.form import Form, form_of
from mpoc.tensor_networks.structure import Structure

Weights = Literal["auto", "dense", "cores", "packed"]
# Vectors in a call (images or tokens) for which "auto" compares the costs; a call takes the nearest choice.
_BATCHES = (1, 8, 64, 512, 4096)
_HELD = ("_held", "_made_of")  # ends of the names of attributes

_SIZES = ("ndim", "dim", "size", "stride", "numel", "element_size", "nbytes", "is_floating_point")
_WRITE_INSTEAD = "change the layer's cores, or make it dense first (mpoc expand)"
# Python looks operators up in the class, never through __getattr__.
_READING = (
    "add radd sub rsub mul rmul truediv rtruediv floordiv mod pow rpow matmul rmatmul "
    "neg abs eq ne lt le gt ge getitem iter contains array"
)
_WRITING = "setitem iadd isub imul itruediv ipow"


def build_weight(cores: Sequence[Tensor], structure: Structure) -> Tensor:
    """The dense weight in the cores' dtype, under autocast too: then it is what a dense layer would hold."""
    with without_autocast(cores[0].device):
        return form_of(cores, structure, check=False).to_weight()


def use_weights(model: nn.Module, weights: Weights = "auto") -> None:
    """Choose what the compressed layers of ``model`` compute from in eval mode; training uses the cores.

        >>> network = nn.Sequential(nn.Linear(784, 300), nn.ReLU(), nn.Linear(300, 10))
        >>> report = mpoc.compress(network.eval(), bond=4)
        >>> mpoc.nn.use_weights(network, "dense")
        >>> with torch.no_grad():
        ...     network(torch.rand(5, 784)).shape
        torch.Size([5, 10])

    A dense weight is built once, now or with the next ``eval()``, and again after its cores were changed: by
    an optimiser, ``load_state_dict``, ``to``, or any operation in place. After writing through ``core.data``,
    and in networks compiled by ``torch.compile``, call ``eval()`` for that. Where gradients are enabled and
    cores require them, and in programs of ``torch.export`` and ``torch.jit``, layers use their cores.

    Args:
        model: changed in place.
        weights: ``"cores"``: compute through the cores. ``"dense"``: from the dense weight, which takes as
            much memory as before compression. ``"auto"``: from the dense weight in the calls in which that is
            faster, by a cost model for 1 to 4,096 vectors. Layers that are faster through their cores for any
            number of vectors hold no dense weight. Kernels of convolutions, embeddings, LSTMs, GRUs and
            attention do, since they are built in every call otherwise. Layers that hold codes
            (:func:`mpoc.load` with ``"packed"``) get parameters again.

    Raises:
        UsageError: another value, or ``"packed"``, which needs the codes of a file.
    """
    check_weights(weights)
    if weights == "packed":
        raise UsageError(
            'weights="packed": codes are in the file, not in the network',
            'mpoc.load("out.safetensors", model, weights="packed")',
        )
    for module in list(model.modules()):
        _unpack(module)
        if isinstance(module, CoreWeight) or hasattr(module, "_rebuilt"):
            module.__dict__["_weights"] = weights
            renew(module)


def _unpack(module: Any) -> None:
    """Turn codes that a module holds, of its weight or its cores, into parameters."""
    for name, child in list(module._modules.items()):
        if hasattr(child, "unpacked"):
            setattr(module, name, child.unpacked())
    if hasattr(module, "unpack"):
        module.unpack()


def check_weights(weights: str) -> None:
    """Refuse what :func:`use_weights` does not know.

    Raises:
        UsageError: another value than "auto", "dense", "cores" and "packed".
    """
    known = get_args(Weights)
    if weights not in known:
        raise UsageError(f"weights={weights!r}: not one of {', '.join(known)}{nearest(weights, known)}")


def renew(module: Any) -> None:
    """Decide whether a module holds its dense weights, where it is now, and build them in eval mode."""
    release(module)
    weights = getattr(module, "_weights", "cores")
    by_dense = [weights == "dense" or (weights == "auto" and module.dense_is_faster(n)) for n in _BATCHES]
    module.__dict__.update(_holds=any(by_dense), _by_dense=None if all(by_dense) else by_dense)
    hold(module)


def hold(module: Any) -> None:
    """Build the dense weights that a module in eval mode computes from."""
    if module.training or not getattr(module, "_holds", False):
        return
    for name, build in module.builders().items():
        cores = cores_of(module, name)
        if not any(core.is_meta for core in cores):
            _hold(module, name, cores, build)


def release(module: nn.Module) -> None:
    """Drop the dense weights that a module holds."""
    for name in list(vars(module)):
        if name.endswith(_HELD):
            del vars(module)[name]


def cores_of(module: nn.Module, name: str) -> list[Tensor]:
    """The cores of the weight ``name`` of a module."""
    every: Any = module._modules["cores" if name == "weight" else f"{name}_cores"]
    return list(every._parameters.values())  # much faster than to go through a ParameterList


def held_weight(module: nn.Module, name: str, build: Callable[[], Tensor]) -> Tensor | None:
    """The dense weight that this call computes from; None: it goes through the cores."""
    if module.training or not getattr(module, "_holds", False):
        return None
    if torch.jit.is_tracing() or torch.compiler.is_exporting():  # type: ignore[attr-defined, no-untyped-call]
        return None
    cores = cores_of(module, name)
    if is_grad_enabled() and any(core.requires_grad for core in cores):
        return None
    if is_compiling():  # a graph cannot ask for the versions of tensors
        return module.__dict__.get(f"_{name}_held")
    made_of: _MadeOf | None = module.__dict__.get(f"_{name}_made_of")
    if made_of is not None and (held := made_of.current(module.__dict__)) is not None:
        return held
    if not all(type(core) is nn.Parameter for core in cores):  # in a transform of torch.func
        return None
    return _hold(module, name, cores, build)


def _hold(module: nn.Module, name: str, cores: Sequence[Tensor], build: Callable[[], Tensor]) -> Tensor:
    """Build a dense weight, without gradients, and keep it."""
    with torch.inference_mode(False), torch.no_grad():
        weight = build()
    if type(weight) is Tensor:  # none of a fake mode, which shows shapes only
        vars(module).update({f"_{name}_held": weight, f"_{name}_made_of": _MadeOf(module, name, weight)})
    return weight


class _MadeOf:
    """A dense weight, its cores, where their data lie, and torch's counts of changes."""

    def __init__(self, module: nn.Module, name: str, weight: Tensor) -> None:
        self.name = "cores" if name == "weight" else f"{name}_cores"
        self.every = module._modules[self.name]
        self.parameters: dict[str, Tensor] = vars(self.every)["_parameters"]
        self.each: list[Any] = []  # the data is kept so that no other comes to lie there
        for core in self.parameters.values():
            self.each += [core, core.data_ptr(), None if core.is_inference() else core._version, core.data]
        self.weight, self.written = weight, weight._version

    def current(self, own: dict[str, Any]) -> Tensor | None:
        """The weight, if a module of attributes ``own`` may take it: it is in eval mode, nothing is traced,
        no gradients of the cores are asked for, they are the same tensors (``torch.export`` has others), and
        neither they nor the weight have changed.
        """
        if own["training"] or is_dynamo_compiling() or _is_tracing():
            return None
        cores, each, at = self.parameters.values(), self.each, 0
        known = own["_modules"][self.name] is self.every and 4 * len(cores) == len(each)
        if not known or (is_grad_enabled() and any(core.requires_grad for core in cores)):
            return None
        for core in cores:
            if core is not each[at] or core.data_ptr() != each[at + 1]:
                return None
            if each[at + 2] is not None and core._version != each[at + 2]:
                return None
            at += 4
        return self.weight if self.weight._version == self.written else None


def bias_of(module: Any) -> Tensor | None:
    """``module.bias``, without the microsecond that ``nn.Module`` takes to find it."""
    return module._parameters["bias"] if "bias" in module._parameters else module.bias  # noqa: SIM401


def without_held(state: Any) -> Any:
    """The state that is copied or pickled: without dense weights."""
    return {key: value for key, value in state.items() if not key.endswith(_HELD)}


class CoreWeight(nn.Module):
    """A module whose ``weight`` is made from cores. Made by :func:`mpoc.nn.adopt.adopt` from a dense module.

    ``cores``, of an MPO or of one and a low-rank part, are the parameters.  ``weight`` answers for dtype,
    device and shape without building anything, and becomes the dense weight where a torch function gets it.
    """

    cores: nn.ParameterList
    structure: Structure
    order: Tensor | None = None  # of the inputs, on the CPU wherever the cores are
    bias: Any

    weight: Any = property(lambda layer: WeightView(layer))

    @property
    def form(self) -> Form:
        """The cores as the tensor network that they are; they were checked when they were adopted."""
        return form_of(list(self.cores), self.structure, check=False)

    def dense_weight(self) -> Tensor:
        """The weight in its own shape: the one that is held, or built from the cores."""
        held = self.held_weight()
        return self._build() if held is None else held

    def held_weight(self) -> Tensor | None:
        """The dense weight that this call computes from; None: it goes through the cores."""
        own = self.__dict__
        made_of: _MadeOf | None = own.get("_weight_made_of")
        held = None if made_of is None else made_of.current(own)
        return held_weight(self, "weight", self._build) if held is None else held

    def held_for(self, x: Tensor) -> Tensor | None:
        """The same for inputs (…, N_x); some layers hold their weight for few vectors or many only."""
        by_dense: list[bool] | None = self.__dict__.get("_by_dense")
        if by_dense is not None and not (is_compiling() or _is_tracing()):  # a graph serves other batches too
            vectors = x.numel() // self.structure.inputs
            if not by_dense[min(((vectors - 1).bit_length() + 1) // 3, len(by_dense) - 1)]:
                return None
        return self.held_weight()

    def dense_is_faster(self, batch: int) -> bool:
        """Whether ``batch`` vectors take less time from a held dense weight than through the cores."""
        return True

    def builders(self) -> dict[str, Callable[[], Tensor]]:
        """The function that builds each dense weight, by the weight's name."""
        return {"weight": self._build}

    def _build(self) -> Tensor:
        return build_weight(list(self.cores), self.structure)

    def train(self, mode: bool = True) -> Any:
        """Training changes the cores: a dense weight is given up then, and built again by ``eval()``."""
        super().train(mode)
        release(self)
        hold(self)
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        release(self)
        super()._load_from_state_dict(*args, **kwargs)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        renew(self)
        return self

    def __getstate__(self) -> Any:
        return without_held(self.__dict__)

    def extra_repr(self) -> str:
        """The dense module's, with factors and bonds."""
        return ", ".join(filter(None, [super().extra_repr(), self.form.summary()]))


class WeightView:
    """A weight that is built when torch computes with it, but not when its dtype or shape is read.

    It can only be read. What is written to a weight made from cores would be lost, so writing raises
    AttributeError or TypeError; writing to a part of it, as ``weight[0].zero_()``, is lost without an error.
    """

    _layer: CoreWeight
    _detached: bool

    def __init__(self, layer: CoreWeight, detached: bool = False) -> None:
        vars(self).update(_layer=layer, _detached=detached)

    def __setattr__(self, name: str, value: Any) -> None:
        """Refuse to set an attribute.

        Raises:
            AttributeError: always.
        """
        raise AttributeError(f"{name!r} of a weight made from cores cannot be set: {_WRITE_INSTEAD}")

    @property
    def data(self) -> WeightView:
        """The same weight without gradients; it cannot be written to either."""
        return WeightView(self._layer, detached=True)

    @property  # type: ignore[misc]
    def __class__(self) -> type[Tensor]:  # type: ignore[override]
        """T5 and others ask ``isinstance(weight, torch.Tensor)`` before they read its dtype."""
        return Tensor

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the cores."""
        return self._layer.cores[0].dtype

    @property
    def device(self) -> torch.device:
        """The device of the cores."""
        return self._layer.cores[0].device

    @property
    def shape(self) -> torch.Size:
        """The shape of the dense weight."""
        return torch.Size(self._layer.structure.shape)

    @property
    def requires_grad(self) -> bool:
        """Whether any core requires gradients."""
        return not self._detached and any(core.requires_grad for core in self._layer.cores)

    def __getattr__(self, name: str) -> Any:
        """Ask the dense weight for whatever else a tensor can do, and a tensor without data for sizes."""
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
        """A weight built for the caller, who may keep a view of it; never the one that the layer holds."""
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
        """Call the function with the dense weight.

        Raises:
            TypeError: the function writes to the weight.
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


for _name in _READING.split():
    setattr(WeightView, f"__{_name}__", _operator(f"__{_name}__"))
for _name in _WRITING.split():
    setattr(WeightView, f"__{_name}__", _refusal(f"__{_name}__"))


def _dense(value: Any) -> Any:
    if type(value) in (list, tuple):
        return type(value)(map(_dense, value))
    return value._dense() if isinstance(value, WeightView) else value
