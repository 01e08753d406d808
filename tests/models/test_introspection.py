from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from mpoc.io.keyed_store import Scratch
from mpoc.models.introspection import (
    compute_in_float32,
    copy_sharing_parameters,
    differing_names,
    kinds_of,
    same_tensor,
    set_tensors,
    state_of,
    tensors_of,
    unsaved_buffers,
)


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


def test_a_copy_shares_memory_until_it_is_set() -> None:
    first, last = nn.Linear(3, 3), nn.Linear(3, 3)
    last.weight = first.weight
    network = nn.Sequential(first, nn.BatchNorm1d(3), nn.LSTM(3, 3), last)
    copied = copy_sharing_parameters(network)
    x, before = torch.randn(5, 3), {name: value.clone() for name, value in state_of(network).items()}
    for name, parameter in copied.named_parameters():
        assert parameter.data_ptr() == network.get_parameter(name).data_ptr(), name
    copied[1](x)  # counts in buffers of its own
    versions = [parameter._version for parameter in copied.parameters()]
    held = set_tensors(
        copied, {"0.weight": torch.ones(3, 3, dtype=torch.float64), "2.bias_ih_l0": torch.ones(12)}
    )
    assert versions != [parameter._version for parameter in copied.parameters()], "caches notice it"
    tied = [copied.get_parameter(name) for name in ("0.weight", "3.weight")]
    assert tied[0] is tied[1] and torch.equal(tied[0], torch.ones(3, 3))
    assert tied[0].dtype == torch.float32
    assert not torch.equal(copied[2](x)[0], network[2](x)[0]), "recurrent layers hold lists of their weights"
    assert all(torch.equal(value, before[name]) for name, value in state_of(network).items())
    with pytest.raises(NotImplementedError):
        set_tensors(copied, {"0.weight": torch.zeros(3, 3), "0.bias": torch.empty(3, device="meta")})
    assert torch.equal(tied[0], torch.ones(3, 3)), "all are set or none"
    set_tensors(copied, held)
    assert torch.equal(copied[0](x), network[0](x)) and torch.equal(copied[2](x)[0], network[2](x)[0])


@pytest.mark.parametrize("in_files", [False, True])
def test_half_precision_is_computed_in_float32(tmp_path: Path, in_files: bool) -> None:
    network = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).to(torch.bfloat16)
    wanted = {name: value.float() for name, value in state_of(network).items()}
    assert compute_in_float32(network, Scratch(tmp_path, limit=0) if in_files else None)
    assert (str(tmp_path) in Path("/proc/self/maps").read_text()) == in_files
    for name, value in state_of(network).items():
        torch.testing.assert_close(value.float(), wanted[name].float(), rtol=0, atol=0)
        assert value.dtype == torch.float32 or not value.is_floating_point()
    assert not compute_in_float32(network)
