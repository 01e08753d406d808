"""What one forward pass shows of a network."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mpoc.compression.calibrate.chain_tracer import ChainTracer, arguments_along
from mpoc.compression.calibrate.layer_inputs import Positions
from mpoc.compression.calibrate.trace import Trace, trace, trace_batches
from mpoc.compression.run_context import Kind, LayerWork, Workload
from mpoc.errors import MpocError
from mpoc.models.call import Batch, Call
from tests.compression.calibrate.networks import (
    Guided,
    Routed,
    Stopped,
    encoder,
    guided,
    images,
    resnet20,
    rows_for,
    texts,
    weights,
    windowed,
)
from tests.support.architectures import tiny

Conv1D: Any = import_module("transformers.pytorch_utils").Conv1D


def traced(network: nn.Module, batch: Batch, names: list[str] | None = None) -> Trace:
    return trace(network, Call.of(network), batch, names or weights(network))


def test_groups_query_key_and_value() -> None:
    found = traced(encoder(), texts())
    assert len(found.groups) == 3 + 3 * 4
    self_ = "encoder.layer.1.attention.self"
    group = (f"{self_}.query.weight", f"{self_}.key.weight", f"{self_}.value.weight")
    assert found.groups[7] == group
    assert [found.same_rows[name] for name in group] == [group[0]] * 3
    assert [name for names in found.groups for name in names] == list(found.layers)
    assert found.reasons == {} and found.norms == {}


def test_orders_layers_by_use() -> None:
    class Backwards(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.second, self.first = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x).relu())

    found = traced(Backwards().eval(), {"x": torch.randn(2, 4)}, ["second.weight", "first.weight"])
    assert found.groups == (("first.weight",), ("second.weight",))


def test_input_changed_in_place_splits_a_group() -> None:
    class Changing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = x * 1.0
            y = self.a(x)
            x.relu_()
            return y + self.b(x)

    found = traced(Changing().eval(), {"x": torch.randn(2, 4)})
    assert found.groups == (("a.weight",), ("b.weight",))


def test_kernels_of_different_geometry_are_not_grouped() -> None:
    class Shortcut(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wide, self.short = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.wide(x) + self.short(x)

    found = traced(Shortcut().eval(), images(2, size=6))
    assert found.groups == (("wide.weight", "short.weight"),)
    assert found.same_rows == {"wide.weight": "wide.weight", "short.weight": "short.weight"}


def test_finds_norms_after_convolutions() -> None:
    network = resnet20()
    found = traced(network, images(2))
    assert len(found.norms) == 19
    assert found.norms["layer2.0.conv2.weight"] == "layer2.0.bn2"
    network.train()
    network.get_submodule("conv1").eval()
    with pytest.raises(AssertionError, match="evaluation mode"):
        traced(network, images(2))


class _Normed(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.conv, self.norm, self.other = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        if self.how == "alone":
            return self.norm(y)
        if self.how == "added":
            return self.norm(y) + y
        if self.how == "shape":
            return self.norm(y) * y.shape[0]
        if self.how == "twice":
            return self.norm(y) + self.other(y)
        if self.how == "shared":
            return self.norm(y) + self.norm(y.relu())
        return self.norm(y.relu())


@pytest.mark.parametrize("how", ["alone", "added", "shape", "twice", "shared", "relu"])
def test_norm_counts_only_as_sole_consumer(how: str) -> None:
    found = traced(_Normed(how).eval(), images(2, size=4))
    assert found.norms == ({"conv.weight": "norm"} if how in ("alone", "shape") else {})


def test_flags_weights_used_repeatedly_or_never() -> None:
    found = traced(Stopped().eval(), {"x": torch.randn(2, 4)})
    assert found.calls == {"body.weight": 1, "late.weight": 2}
    assert found.groups == (("body.weight",), ("late.weight",))
    assert found.reasons == {"never.weight": "the network does not reach it"}


class _Indexed(nn.Module):
    """Looks one row up, by an index without axes."""

    def __init__(self) -> None:
        super().__init__()
        self.task = nn.Embedding(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.task(torch.tensor(1))


def test_an_index_may_have_no_axes() -> None:
    found = traced(_Indexed().eval(), {"x": torch.randn(2, 4)}, ["task.weight"])
    assert found.calls == {"task.weight": 1}


def test_rejects_unknown_weights() -> None:
    with pytest.raises(MpocError, match="has no weight"):
        traced(encoder(1), texts(), ["pooler.dense.weight"])


def test_finds_blocks_of_transformers() -> None:
    found = traced(encoder(), texts())
    (chain,) = found.chains
    assert [block.module for block in chain] == [f"encoder.layer.{k}" for k in range(3)]
    assert all(block.is_kept_whole for block in chain)
    assert found.positions["encoder.layer.2.output.dense.weight"] == (0, 2)
    assert "embeddings.word_embeddings.weight" not in found.positions


@pytest.mark.parametrize(
    ("kind", "blocks"), [("gpt2", "transformer.h"), ("llama", "model.layers"), ("vit", "vit.layers")]
)
def test_finds_blocks_of_other_networks(kind: str, blocks: str) -> None:
    network = tiny(kind)
    cached = getattr(network.config, "use_cache", None)
    batch = {"x": torch.randn(2, 3, 16, 16)} if kind == "vit" else texts()
    (chain,) = traced(network, batch).chains
    assert [block.module for block in chain] == [f"{blocks}.0", f"{blocks}.1"]
    assert getattr(network.config, "use_cache", None) == cached
    assert all(parameter.requires_grad for parameter in network.parameters())


def test_splits_stages() -> None:
    (chain,) = traced(resnet20(), images(2)).chains
    assert [block.module for block in chain] == [f"layer{k}.{i}" for k in (1, 2, 3) for i in range(3)]
    nested = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.ReLU(inplace=True), nn.Linear(4, 4)), nn.Tanh())
    (chain,) = traced(nested.eval(), {"x": torch.randn(2, 4)}).chains
    assert [block.module for block in chain] == ["0", "1.0", "1.1", "2"]
    assert [block.is_kept_whole for block in chain] == [True, False, True, True]


@pytest.mark.parametrize("index", [0, 1])
def test_blocks_may_be_given_masks_of_their_own(index: int) -> None:
    """Masks follow from the tokens alone, so windows of attention need not split a decoder."""
    network: Any
    network, batches = windowed()
    (chain,) = traced(network, batches[index]).chains
    assert [block.module for block in chain] == [f"model.layers.{k}" for k in range(3)]
    state = arguments_along(network, chain, lambda: Call.of(network)(network, batches[index]))
    masks = [named["attention_mask"] for _, named in state[1]]
    assert torch.equal(state[0], network.model.embed_tokens(batches[index]["input_ids"]))
    assert masks == [None] * 3 if index == 0 else masks[1] is masks[2] and not torch.equal(*masks[:2])


class _Blocks(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(_Block() for _ in range(3))
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        shared = x + 1
        for k, block in enumerate(self.blocks):
            if self.how == "between" and k == 2:
                x = x * 2
            if self.how == "in place" and k == 2:
                x.mul_(2)
            other = {"own": x + k, "state": object(), "number": k}.get(self.how, shared)
            x = block(x, other if self.how != "again" else shared)
        return self.blocks[0](x, shared) if self.how == "again" else x


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor, other: object) -> Tensor:
        return self.linear(x) * (1 if isinstance(other, Tensor) else 2)


@pytest.mark.parametrize(
    ("how", "lengths"),
    [
        ("plain", [3]),
        ("between", [2, 1]),
        ("in place", [2, 1]),
        ("own", [1, 1, 1]),
        ("state", [1, 1, 1]),
        ("number", [3]),
        ("again", [2]),
    ],
)
def test_splits_chains_at_irregular_blocks(how: str, lengths: list[int]) -> None:
    found = traced(_Blocks(how).eval(), {"x": torch.randn(2, 4)})
    assert [len(chain) for chain in found.chains] == lengths


def test_later_batches_reach_further_experts() -> None:
    """Expert k takes the rows whose first number is k; expert 3 gets none."""
    network = Routed().eval()
    batches = [{"x": rows_for(*experts)} for experts in ([0, 0, 0, 1], [0, 2], [1, 0])]
    names = [f"experts.{k}.{n}.weight" for k in range(4) for n in (0, 2)]
    found = trace_batches(network, Call.of(network), batches, ["gate.weight", *names, "head.weight"])
    assert list(found.layers) == ["gate.weight", *names[:2], *names[4:6], *names[2:4], "head.weight"]
    assert found.groups == tuple((name,) for name in found.layers)
    assert found.reasons == dict.fromkeys(names[6:], "the network does not reach it")
    assert found.families == {name: f"experts.*.{name.split('.')[2]}.weight" for name in names}
    rows = [found.rows[name] for name in (names[0], names[2], names[4])]
    assert rows == [3, 1, 2]  # the one of expert 2 is half of a batch, as two are of the first
    assert not found.positions.keys() & set(names)  # a batch may not reach the blocks inside an expert


def test_leaves_the_ranges_that_a_network_has_seen() -> None:
    network, batches = guided("range")
    first: Any = network.get_buffer("seen").clone()
    (chain,) = traced(network, batches[0]).chains
    assert len(chain) == 3 and not torch.equal(network.get_buffer("seen"), first)
    assert network.get_buffer("seen").isfinite().all() and network.get_buffer("seen").max() < 1e3


def test_traces_a_layer_that_gives_two_tensors() -> None:
    network = nn.Sequential(_Both(4, 4)).eval()
    assert list(traced(network, {"x": torch.randn(2, 4)}).layers) == ["0.weight"]


class _Both(nn.Linear):
    def forward(self, input: Tensor) -> Any:
        output = super().forward(input)
        return output, output


def test_leaves_a_forward_that_was_set_on_a_block() -> None:
    network = Guided("beside logits").eval()
    block = network.blocks[0]
    block.forward = own = block.forward  # as accelerate's hooks do
    traced(network, {"x": torch.randn(5, 4)})
    assert block.forward is own


def test_removes_hooks_when_the_network_fails() -> None:
    network = nn.Sequential(nn.Linear(4, 4), nn.Linear(5, 4)).eval()
    with pytest.raises(RuntimeError):
        traced(network, {"x": torch.randn(2, 4)})
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in network.modules())
    assert ChainTracer().chains() == ([], {})


def test_work_follows_shapes_rows_and_effort() -> None:
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8 * 4 * 4, 10)).eval()
    batches = [{"x": torch.randn(2, 3, 6, 6)}] * 3
    found = trace(network, Call.of(network), batches[0], ["0.weight", "2.weight"])
    works = found.work(network, batches)
    assert works["0.weight"] == LayerWork(8, 27, 3 * 2 * 4 * 4, Kind.KERNEL)
    assert found.work(network, batches, Positions(5))["0.weight"].rows == 3 * 2 * 5
    assert works["2.weight"] == LayerWork(10, 128, 3 * 2, Kind.MATRIX)
    pointwise = nn.Sequential(nn.Conv2d(3, 8, 1)).eval()
    work = traced(pointwise, batches[0], ["0.weight"]).work(pointwise, batches)
    assert work["0.weight"].kind is Kind.MATRIX
    later = [
        Workload(works, effort, n).after_reading()
        for effort, n in (("fast", 1), ("balanced", 1), ("fast", 9))
    ]
    assert later[2].seconds < later[0].seconds < later[1].seconds
    more = found.work(network, batches * 2)
    assert all(more[name].fitted("fast") > works[name].fitted("fast") for name in works)


def test_work_knows_weights_that_are_stored_transposed() -> None:
    network = nn.Sequential(Conv1D(30, 4)).eval()  # weight (4, 30)
    found = traced(network, {"x": torch.randn(2, 4)}, ["0.weight"])
    assert found.work(network, [{"x": torch.randn(2, 4)}])["0.weight"] == LayerWork(30, 4, 2, Kind.MATRIX)


@pytest.mark.parametrize(
    ("layer", "given", "few"),
    [
        (nn.Linear(12, 6), (12,), True),
        (nn.Linear(12, 7), (12,), False),
        (Conv1D(6, 12), (12,), True),
        (nn.Conv2d(4, 18, 3), (4, 3, 3), True),
        (nn.Conv2d(4, 8, 3, groups=2), (4, 3, 3), False),  # moments of groups are several
        (nn.ConvTranspose2d(12, 2, 1), (12, 3, 3), False),
        (nn.Linear(8191, 1), (8191,), True),
        (nn.Linear(8192, 1), (8192,), False),  # whose inputs are kept as rows
    ],
)
def test_few_outputs(layer: nn.Module, given: tuple[int, ...], few: bool) -> None:
    network = nn.Sequential(layer).eval()
    found = traced(network, {"x": torch.randn(2, *given)}, ["0.weight"])
    assert found.has_few_outputs(network, "0.weight") == few
