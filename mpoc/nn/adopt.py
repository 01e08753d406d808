"""Turn a dense module into its counterpart with cores, in place.

The module stays the same object: hooks, training mode, references from elsewhere and every attribute
(``in_features``, ``stride``, ``padding_idx``) stay. Its class becomes the one with cores, and its dense
weight is removed. A weight of any other module (an LSTM, ``MultiheadAttention``, a subclass with its own
``forward``) becomes a property that builds it from cores whenever it is read, as torch's parametrizations do.
Cores keep the names they have in the file.

Mixtures of experts read one stacked weight (experts, outputs, inputs), e.g. ``gate_up_proj``, while their
checkpoints store a matrix for each expert, ``3.w1.weight`` and ``3.w3.weight``, and cores are made of those.
:func:`unstack` gives each matrix a linear layer of its own. The ``eager`` experts of transformers, which take
the weight of one expert after the other, then call these layers. For all others the stacked weight is put
together whenever it is read; the trade-off is one copy of it in a forward pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mpoc.nn.conv import (
    MPOConv1d,
    MPOConv2d,
    MPOConv3d,
    MPOConvTranspose1d,
    MPOConvTranspose2d,
    MPOConvTranspose3d,
)
from mpoc.nn.conv_map import CONV_MAPS, check_geometry
from mpoc.nn.embedding import MPOEmbedding
from mpoc.nn.linear import MPOConv1D, MPOLinear
from mpoc.nn.weight import (
    CoreWeight,
    build_weight,
    cores_of,
    held_weight,
    hold,
    release,
    without_held,
)
from mpoc.tensor_networks.forms.form import form_of
from mpoc.tensor_networks.forms.layout import input_order
from mpoc.tensor_networks.structure import Structure

_COUNTERPARTS: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: MPOLinear,
    nn.Conv1d: MPOConv1d,
    nn.Conv2d: MPOConv2d,
    nn.Conv3d: MPOConv3d,
    nn.ConvTranspose1d: MPOConvTranspose1d,
    nn.ConvTranspose2d: MPOConvTranspose2d,
    nn.ConvTranspose3d: MPOConvTranspose3d,
    nn.Embedding: MPOEmbedding,
}


def unstack(module: nn.Module, name: str, sources: tuple[str, ...]) -> None:
    """Replace the stacked weight ``name`` by one ``nn.Linear`` for each expert and source.

    Args:
        module: holds the weight; changed in place. It gains the modules ``0.w1``, ``0.w3``, ``1.w1``, ….
        name: name of a weight (experts, outputs, inputs), e.g. (8, 28672, 4096).
        sources: the matrices of an expert, e.g. ``("w1", "w3")``, which its weight holds one below the other.

    Raises:
        ValueError: the weight does not have three axes, or its outputs do not divide among the sources.
    """
    dense = module.get_parameter(name)
    if dense.dim() != 3 or dense.shape[1] % len(sources):
        raise ValueError(
            f"weight {name!r} has shape {tuple(dense.shape)}: no stack of {' and '.join(sources)}"
        )
    for expert, matrix in enumerate(dense.detach()):
        if str(expert) not in module._modules:
            module.add_module(str(expert), nn.Module())
        for source, rows in zip(sources, matrix.chunk(len(sources)), strict=True):
            linear = nn.Linear(rows.shape[1], rows.shape[0], bias=False, device="meta")
            linear.weight = nn.Parameter(rows.clone(), requires_grad=dense.requires_grad)
            module.get_submodule(str(expert)).add_module(source, linear)
    delattr(module, name)
    module.__class__ = _stacking(type(module), name, sources, len(dense))  # type: ignore[arg-type]


@cache
def _stacking(cls: type[nn.Module], name: str, sources: tuple[str, ...], experts: int) -> type[nn.Module]:
    """A subclass of ``cls`` whose attribute ``name`` is stacked from the experts whenever it is read."""

    def read(module: nn.Module) -> Any:
        every = [
            ExpertWeight([module.get_submodule(f"{expert}.{source}") for source in sources])
            for expert in range(experts)
        ]
        eager = getattr(getattr(module, "config", None), "_experts_implementation", None) == "eager"
        return every if eager else torch.stack([expert.dense() for expert in every])

    return type(f"MPO{cls.__name__.removeprefix('MPO')}", (cls,), {name: property(read)})


class ExpertWeight:
    """The weight of one expert (outputs, inputs); ``F.linear`` of it calls the layers that it is stored as.

    Args:
        linears: without bias; the weight holds theirs one below the other.
    """

    def __init__(self, linears: list[nn.Module]) -> None:
        self.linears = linears

    def dense(self) -> Tensor:
        """The weight as a tensor."""
        return torch.cat([_weight(linear) for linear in self.linears])

    def __getattr__(self, name: str) -> Any:
        """Whatever else a tensor has."""
        return getattr(self.dense(), name)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear and len(args) == 2 and not kwargs and isinstance(args[1], ExpertWeight):
            return torch.cat([linear(args[0]) for linear in args[1].linears], dim=-1)
        dense = [arg.dense() if isinstance(arg, ExpertWeight) else arg for arg in args]
        return func(*dense, **(kwargs or {}))


def _weight(linear: nn.Module) -> Tensor:
    return linear.dense_weight() if isinstance(linear, CoreWeight) else linear.get_parameter("weight")


def adopt(module: nn.Module, name: str, cores: Sequence[Tensor], structure: Structure) -> None:
    """Replace the dense weight ``name`` of ``module`` by cores.

    Args:
        module: holds the weight; changed in place.
        name: name of the weight within the module, as ``"weight"`` or ``"weight_ih_l0"``.
        cores: in the order of ``structure.cores``; those that are parameters already (tied layers) are
            shared.
        structure: whose shape is the weight's.

    Raises:
        ValueError: the weight has another shape, the cores do not fit the structure, or they make a whole
            map and the module is no such convolution.
    """
    dense = getattr(module, name)
    if tuple(dense.shape) != structure.shape:
        raise ValueError(f"weight {name!r} has shape {tuple(dense.shape)}, its cores make {structure.shape}")
    form_of(cores, structure)  # raises where the cores do not fit
    if structure.geometry is not None:
        check_geometry(module, structure.geometry)
    trained = dense.requires_grad
    parameters = nn.ParameterList(
        core if isinstance(core, nn.Parameter) else nn.Parameter(core, requires_grad=trained)
        for core in cores
    )
    delattr(module, name)
    counterpart = _counterpart(module, structure) if name == "weight" else None
    if structure.geometry is not None:
        counterpart = CONV_MAPS[type(module)]
    if counterpart is None:
        module.__class__ = _rebuilding(type(module), name)  # type: ignore[arg-type]
        setattr(module, f"{name}_cores" if name != "weight" else "cores", parameters)
        module.__dict__[f"_{name}_structure"] = structure
    else:
        module.__class__ = counterpart
        module.cores = parameters
        module.__dict__.update(structure=structure, order=input_order(structure, "cpu"))


def adopt_everywhere(
    model: nn.Module, names: Sequence[str], cores: Sequence[Tensor], structure: Structure
) -> None:
    """Replace a weight that is known by several names; all places then share its cores.

    The cores take the device, dtype and ``requires_grad`` of the weight.
    """
    dense = model.get_parameter(names[0])
    own = [core.to(dense.device, dense.dtype).contiguous() for core in cores]
    parameters = [nn.Parameter(core, requires_grad=dense.requires_grad) for core in own]
    adopted = set()
    for name in names:
        path, _, weight = name.rpartition(".")
        module = model.get_submodule(path)
        if (module, weight) not in adopted:  # a module in two places has two names
            adopt(module, weight, parameters, structure)
        adopted.add((module, weight))


def compressed_weights(model: nn.Module) -> Iterator[tuple[str, Structure, list[Tensor]]]:
    """Name, structure and cores of every weight made from cores; a shared weight by each of its names."""
    for path, module in model.named_modules(remove_duplicate=False):
        prefix = f"{path}." if path else ""
        if isinstance(module, CoreWeight):
            yield f"{prefix}weight", module.structure, list(module.cores)
        for name in getattr(module, "_rebuilt", (None, ()))[1]:
            yield prefix + name, module.__dict__[f"_{name}_structure"], cores_of(module, name)


def _counterpart(module: nn.Module, structure: Structure) -> type[nn.Module] | None:
    """The class with cores; None where ``forward`` is not known, or reads the weight the other way round."""
    cls = type(module)
    if cls.__module__ == "transformers.pytorch_utils" and cls.__name__ == "Conv1D":
        return MPOConv1D if structure.transposed else None
    if structure.transposed and cls in (nn.Linear, nn.Embedding):
        return None
    if isinstance(module, nn.Embedding) and (module.max_norm is not None or module.scale_grad_by_freq):
        return None
    return _COUNTERPARTS.get(cls)


@cache
def _rebuilding(cls: type[nn.Module], name: str) -> type[nn.Module]:
    """A subclass of ``cls`` whose attribute ``name`` is built from cores whenever it is read."""
    plain, names = getattr(cls, "_rebuilt", (cls, ()))
    names = (*names, name)

    def build(module: nn.Module, name: str = name) -> Tensor:
        return build_weight(cores_of(module, name), module.__dict__[f"_{name}_structure"])

    def read(module: nn.Module) -> Tensor:
        held = held_weight(module, name, partial(build, module))
        return build(module) if held is None else held

    def train(module: nn.Module, mode: bool = True) -> nn.Module:
        cls.train(module, mode)
        release(module)
        hold(module)
        return module

    @torch.no_grad()
    def state(module: nn.Module) -> Any:
        # Of recurrent layers: the weights, which must not bring a graph.
        return without_held(cls.__getstate__(module))

    def pickled(module: nn.Module, _: Any) -> Any:
        return _blank, (plain, names), state(module)

    members = {
        name: property(read),
        "builders": lambda module: {name: partial(build, module, name) for name in names},
        "dense_is_faster": lambda *_: True,  # the weight is built in each call otherwise
        "train": train,
        "__getstate__": state,
        "__reduce_ex__": pickled,  # pickle does not find a class made here
        "_rebuilt": (plain, names),
    }
    return type(f"MPO{cls.__name__.removeprefix('MPO')}", (cls,), members)


def _blank(cls: type[nn.Module], names: tuple[str, ...]) -> nn.Module:
    """A module without its state, whose weights ``names`` are rebuilt."""
    for name in names:
        cls = _rebuilding(cls, name)  # type: ignore[arg-type]
    return cls.__new__(cls)
