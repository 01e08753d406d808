from __future__ import annotations

import torch
from torch import Tensor, nn

from mpoc.models.introspection import differing_names, kinds_of, same_tensor, tensors_of, unsaved_buffers


class Net(nn.Module):
    """A layer in two places, a tied weight, and a buffer that is not saved."""

    cache: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(8, 4)
        self.conv = nn.Conv1d(4, 4, 3)
        self.one = self.other = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)
        self.heads_norm = nn.LayerNorm([2, 4])
        self.head = nn.Linear(4, 8, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("cache", torch.zeros(3), persistent=False)


def test_kinds_are_listed_under_every_name() -> None:
    kinds = kinds_of(Net())
    assert kinds.keys() == tensors_of(Net()).keys()
    assert {name: kind for name, kind in kinds.items() if kind[0] is not None} == {
        "embed.weight": ("embedding", False),
        "conv.weight": ("conv1d", False),
        "one.weight": ("linear", False),
        "other.weight": ("linear", False),
        "head.weight": ("linear", False),
    }


class QuantEmbedding(nn.Module):
    """Of I-BERT: an embedding that is none of torch's."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(8, 4))


def test_classes_named_embedding_are_embeddings() -> None:
    assert kinds_of(QuantEmbedding()) == {"weight": ("embedding", False)}


def test_lists_names_of_a_tied_tensor() -> None:
    names = same_tensor(Net())
    assert names["head.weight"] == names["embed.weight"] == {"embed.weight", "head.weight"}
    assert names["one.bias"] == {"one.bias", "other.bias"}
    assert names["conv.bias"] == {"conv.bias"}


def test_ignores_ties_counters_and_caches() -> None:
    network = Net()
    assert unsaved_buffers(network) == {"cache"}
    offered = set(tensors_of(network)) - {"head.weight", "other.bias", "norm.num_batches_tracked"} | {"cache"}
    assert differing_names(network, offered) == ([], [])


def test_reports_differing_names_in_order() -> None:
    network = Net()
    offered = [name for name in tensors_of(network) if not name.startswith("conv")] + ["z.weight", "a.weight"]
    assert differing_names(network, offered) == (["conv.weight", "conv.bias"], ["z.weight", "a.weight"])
