"""What a network's modules say of its tensors: kinds, names that are one tensor, what differs from a file."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from torch import Tensor, nn


def kinds_of(model: nn.Module) -> dict[str, tuple[str, bool]]:
    """Name of the weight → (kind, transposed), of every linear map, told from its module."""
    return dict(_kinds(model))


def _kinds(model: nn.Module) -> Iterator[tuple[str, tuple[str, bool]]]:
    for place, module in model.named_modules(remove_duplicate=False):
        prefix = f"{place}." if place else ""
        for name, parameter in module.named_parameters(recurse=False):
            kind = _kind(module, name, parameter)
            if kind is not None:
                yield prefix + name, (kind, type(module).__name__ == "Conv1D")


def _kind(module: nn.Module, name: str, parameter: Tensor) -> str | None:
    if name == "weight" and isinstance(module, nn.Embedding | nn.EmbeddingBag):
        return "embedding"
    if name == "weight" and isinstance(module, nn.modules.conv._ConvNd):
        return f"conv{parameter.dim() - 2}d"
    if parameter.dim() == 3 and "expert" in type(module).__name__.lower() and "bias" not in name:
        return "experts"
    if parameter.dim() == 2 and ("weight" in name) and not name.startswith("bias"):
        return "linear"
    return None


def same_tensor(model: nn.Module) -> dict[str, set[str]]:
    """For each name, all names of the same parameter or buffer."""
    places: dict[int, set[str]] = {}
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    for name, tensor in named:
        places.setdefault(id(tensor), set()).add(name)
    return {name: names for names in places.values() for name in names}


def unsaved_buffers(model: nn.Module) -> set[str]:
    """Buffers that the network makes itself; older checkpoints hold some, as BERT's ``position_ids``."""
    return {name for name, _ in model.named_buffers()} - model.state_dict().keys()


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """The network's state without what is no tensor."""
    return {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}


def differing_names(model: nn.Module, offered: Collection[str]) -> tuple[list[str], list[str]]:
    """The names only in the model, and those only among ``offered``; tied ones count as there."""
    state, known = tensors_of(model), same_tensor(model)
    # Batch norms saved before torch 0.4.1 do not count their batches; torch lets that pass too.
    expected = [name for name in state if not name.endswith("num_batches_tracked")]
    missing = [n for n in expected if n not in offered and known.get(n, set()).isdisjoint(offered)]
    ignored = unsaved_buffers(model)
    return missing, [name for name in offered if name not in state and name not in ignored]
