from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

import mpoc
from mpoc.nn import MPOLinear, adopt
from mpoc.tensor_networks.forms.mpo import MPO
from mpoc.tensor_networks.structure import make_structure
from tests.nn.layers import NETWORKS, Halved, gradients, pair, structure_of, with_cores
from tests.support.weights import random_cores


class TestTheModuleStays:
    def test_keeps_the_object_and_its_attributes(self) -> None:
        layer: Any = nn.Linear(24, 18)
        layer.extra = "mine"
        bias = layer.bias
        holder: Any = nn.Sequential(layer)
        with_cores(layer)
        assert holder[0] is layer
        assert layer.bias is bias
        assert (holder[0].in_features, layer.out_features, layer.extra) == (24, 18, "mine")

    def test_keeps_hooks(self) -> None:
        layer = nn.Linear(24, 18)
        seen: list[str] = []
        layer.register_forward_pre_hook(lambda *_: seen.append("before"))
        layer.register_forward_hook(lambda *_: seen.append("after"))
        layer.register_full_backward_hook(lambda *_: seen.append("backward"))
        with_cores(layer)(torch.randn(2, 24, requires_grad=True)).sum().backward()
        assert seen == ["before", "after", "backward"]

    @pytest.mark.parametrize("training", [True, False])
    def test_keeps_the_training_mode(self, training: bool) -> None:
        assert with_cores(nn.Linear(24, 18).train(training)).training is training

    @pytest.mark.parametrize("trained", [True, False])
    def test_frozen_weight_gives_frozen_cores(self, trained: bool) -> None:
        layer: Any = nn.Linear(24, 18)
        layer.weight.requires_grad_(trained)
        with_cores(layer)
        assert {core.requires_grad for core in layer.cores} == {trained}
        assert layer.bias.requires_grad

    def test_removes_the_dense_weight(self) -> None:
        layer = with_cores(nn.Linear(24, 18))
        cores = [f"cores.{k}" for k in range(len(layer.cores))]
        assert [name for name, _ in layer.named_parameters()] == ["bias", *cores]
        assert list(layer.state_dict()) == [name for name, _ in layer.named_parameters()]


class TestErrors:
    def test_rejects_another_shape(self) -> None:
        structure = make_structure("linear", (18, 24))
        layer = nn.Linear(18, 24)
        with pytest.raises(ValueError, match=r"'weight' has shape \(24, 18\), its cores make \(18, 24\)"):
            adopt(layer, "weight", random_cores(structure, 3), structure)
        assert type(layer) is nn.Linear
        assert layer.weight.shape == (24, 18)

    def test_rejects_cores_that_do_not_fit(self) -> None:
        structure = make_structure("linear", (18, 24))
        cores = random_cores(structure, 3)
        for wrong in (cores[:-1], cores[::-1], [cores[0][..., :1], *cores[1:]]):
            layer = nn.Linear(24, 18)
            with pytest.raises(ValueError, match=r"cores of shapes|bonds do not meet"):
                adopt(layer, "weight", wrong, structure)
            assert type(layer) is nn.Linear


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(
    "make", [lambda: nn.Linear(16, 16), partial(Conv1D, 16, 16), lambda: nn.Embedding(16, 16)]
)
def test_computes_the_same_whichever_way_the_weight_was_read(
    make: Callable[[], nn.Module], transposed: bool
) -> None:
    dense = make().double()
    layer: Any = copy.deepcopy(dense)
    structure = make_structure("linear", (16, 16), transposed, order="morton:4x4")
    adopt(layer, "weight", random_cores(structure, 4, 0), structure)
    with torch.no_grad():
        dense.get_parameter("weight").copy_(torch.clone(layer.weight))
    x = torch.arange(5) if isinstance(dense, nn.Embedding) else torch.randn(3, 16).double()
    torch.testing.assert_close(layer.train()(x), dense(x))


def test_tied_layers_share_cores() -> None:
    embedding: Any = nn.Embedding(60, 16)
    head: Any = nn.Linear(16, 60, bias=False)
    structure = structure_of(embedding)
    cores = [nn.Parameter(core.float()) for core in random_cores(structure, 3)]
    adopt(embedding, "weight", cores, structure)
    adopt(head, "weight", cores, structure)
    assert all(one is other for one, other in zip(embedding.cores, head.cores, strict=True))
    network = nn.Sequential(embedding, head)
    assert len(list(network.parameters())) == len(cores)
    table = MPO(cores, structure).to_weight().detach()
    indices = torch.tensor([3, 59])
    torch.testing.assert_close(network(indices), table[indices] @ table.T, rtol=1e-4, atol=1e-4)


class TestRebuiltWeights:
    """Modules whose forward is their own: the weight is built whenever it is read."""

    def test_subclass_keeps_its_forward(self) -> None:
        dense, layer = pair(Halved(24, 18))
        assert isinstance(layer, Halved)
        assert not isinstance(layer, MPOLinear)
        assert list(layer.state_dict())[-1].startswith("cores.")
        x = torch.randn(5, 24)
        torch.testing.assert_close(layer(x), dense(x))

    def test_handles_several_weights_of_one_module(self) -> None:
        lstm = nn.LSTM(8, 12)
        for name in ("weight_ih_l0", "weight_hh_l0"):
            with_cores(lstm, name=name)
        names = [name for name, _ in lstm.named_parameters()]
        assert "weight_ih_l0_cores.0" in names
        assert "weight_hh_l0_cores.0" in names
        assert not {"weight_ih_l0", "weight_hh_l0"} & set(names)
        assert lstm.weight_ih_l0.shape == (48, 8)
        assert isinstance(lstm, nn.LSTM)

    @pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
    def test_recurrent_layer_follows_its_cores(self, kind: str) -> None:
        layer = getattr(nn, kind)(8, 12, 2)
        dense = copy.deepcopy(layer)
        for name, parameter in list(layer.named_parameters()):
            if parameter.dim() == 2:
                with_cores(layer, name=name)
        x = torch.randn(5, 2, 8)
        for _ in range(2):  # training steps
            state = {name: torch.clone(getattr(layer, name)) for name in dense.state_dict()}
            dense.load_state_dict(state)
            torch.testing.assert_close(layer(x), dense(x))
            layer(x)[0].square().sum().backward()
            with torch.no_grad():
                for parameter in layer.parameters():
                    parameter -= 0.1 * parameter.grad
        torch.testing.assert_close(copy.deepcopy(layer)(x), layer(x))

    @pytest.mark.parametrize(
        ("plain", "x"),
        [
            (lambda: nn.EmbeddingBag(60, 16), torch.arange(12).reshape(3, 4)),
            (lambda: nn.Embedding(60, 16, max_norm=1.0), torch.arange(12)),
            (lambda: nn.LSTMCell(8, 12), torch.linspace(-1, 1, 40).reshape(5, 8)),
            (lambda: nn.Conv2d(4, 6, 3), torch.linspace(-1, 1, 64).reshape(1, 4, 4, 4)),
        ],
    )
    def test_autocast_matches_a_dense_layer(self, plain: Any, x: Tensor) -> None:
        layer = plain()
        dense = copy.deepcopy(layer)
        mpoc.compress(layer, bond=10**6, allow_growth=True, embeddings=True)
        with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
            for name, weight in dense.named_parameters():
                torch.testing.assert_close(torch.clone(getattr(layer, name)), weight, rtol=0, atol=1e-5)
            expected, found = dense(x), layer(x)
        torch.testing.assert_close(found, expected, rtol=0.02, atol=0.02)

    @pytest.mark.parametrize("kind", ["lstm", "attention", "embedding bag"])
    def test_pickles_the_whole_module(self, kind: str, tmp_path: Path) -> None:
        network, x = NETWORKS[kind]()
        mpoc.compress(network.eval(), bond=3, embeddings=True, allow_growth=True)
        torch.save(network, tmp_path / "network.pt")
        again = torch.load(tmp_path / "network.pt", weights_only=False)
        assert torch.equal(again(x), network(x))
        assert [type(module) for module in again.modules()] == [type(m) for m in network.modules()]

    @pytest.mark.parametrize("grad", [True, False])
    def test_transformer_layer_matches_in_eval_mode(self, grad: bool) -> None:
        layer = nn.TransformerEncoderLayer(16, 4, 24, batch_first=True).eval()
        dense = copy.deepcopy(layer)
        mpoc.compress(layer, bond=4)
        with torch.no_grad():
            for place, module in dense.named_modules():
                for name, parameter in module.named_parameters(recurse=False):
                    parameter.copy_(getattr(layer.get_submodule(place), name))
        x = torch.randn(2, 5, 16)
        mask = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
        with torch.set_grad_enabled(grad):
            torch.testing.assert_close(layer(x), dense(x), rtol=0, atol=1e-5)
            padded, expected = (m(x, src_key_padding_mask=mask)[~mask] for m in (layer, dense))
            torch.testing.assert_close(padded, expected, rtol=0, atol=1e-5)
            stack, expected_stack = (nn.TransformerEncoder(m, 2).eval() for m in (layer, dense))
            torch.testing.assert_close(stack(x), expected_stack(x), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", NETWORKS)
def test_every_kind_trains(kind: str) -> None:
    network, x = NETWORKS[kind]()
    mpoc.compress(network, bond=3, embeddings=True, allow_growth=True)
    assert not [name for name, parameter in network.named_parameters() if name.endswith("weight")] or (
        "transformer" in kind  # its norms
    )
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-4)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        losses.append(network(x).square().sum())
        losses[-1].backward()
        assert all(parameter.grad is not None for parameter in network.parameters())
        optimizer.step()
    assert losses[2] < losses[1] < losses[0]


@pytest.mark.parametrize("reentrant", [True, False])
def test_supports_gradient_checkpointing(reentrant: bool) -> None:
    layer = with_cores(nn.Linear(24, 18))
    x = torch.randn(5, 24)
    plain, again = gradients(layer, x), gradients(Checkpointed(layer, reentrant), x)
    torch.testing.assert_close(plain[0], again[0])
    torch.testing.assert_close(plain[1], {n.removeprefix("layer."): g for n, g in again[1].items()})
    torch.testing.assert_close(plain[2], again[2])


class Checkpointed(nn.Module):
    """Recomputes its layer in the backward pass."""

    def __init__(self, layer: nn.Module, reentrant: bool) -> None:
        super().__init__()
        self.layer = layer
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = checkpoint(self.layer, x, use_reentrant=self.reentrant)
        return y


COMPILED: dict[str, Callable[[], tuple[Any, Tensor, Tensor]]] = {
    "linear": lambda: (nn.Linear(24, 18), torch.randn(5, 24), torch.randn(11, 24)),
    "linear, padded": lambda: (nn.Linear(53, 29), torch.randn(5, 53), torch.randn(11, 53)),
    "conv2d": lambda: (
        nn.Conv2d(8, 12, 3, stride=(2, 1), padding=1, groups=2, padding_mode="reflect"),
        torch.randn(2, 8, 7, 7),
        torch.randn(5, 8, 7, 7),
    ),
    "embedding": lambda: (
        nn.Embedding(1009, 24, padding_idx=3),
        torch.randint(0, 1009, (2, 4)),
        torch.randint(0, 1009, (5, 4)),
    ),
}
CLASSES = {"linear": "MPOLinear", "conv2d": "MPOConv2d", "embedding": "MPOEmbedding"}


@pytest.mark.slow
@pytest.mark.parametrize("kind", COMPILED)
class TestCompiled:
    @pytest.mark.slow
    def test_compiles_to_one_graph(self, kind: str) -> None:
        plain, x, more = COMPILED[kind]()
        layer = with_cores(plain.double())
        assert type(layer).__name__ == CLASSES[kind.partition(",")[0]]
        torch._dynamo.reset()
        compiled: Any = torch.compile(layer, fullgraph=True, backend="aot_eager")
        for batch in (x, more):  # the second with a symbolic batch dimension
            batch = batch.double() if batch.is_floating_point() else batch
            expected, found = gradients(layer, batch), gradients(compiled, batch)
            torch.testing.assert_close(found[0], expected[0])
            unwrapped = {name.removeprefix("_orig_mod."): value for name, value in found[1].items()}
            torch.testing.assert_close(unwrapped, expected[1])
            torch.testing.assert_close(found[2], expected[2])

    @pytest.mark.parametrize("strict", [True, False])
    def test_exports_with_a_dynamic_batch(self, kind: str, strict: bool) -> None:
        plain, x, more = COMPILED[kind]()
        layer = with_cores(plain).eval()
        batch = torch.export.Dim("batch", min=1, max=4096)
        program = torch.export.export(layer, (x,), dynamic_shapes=({0: batch},), strict=strict)
        assert {name for name in program.state_dict if "cores" in name} == {
            name for name in layer.state_dict() if "cores" in name
        }
        for example in (x, more, more[:1]):
            torch.testing.assert_close(program.module()(example), layer(example))
