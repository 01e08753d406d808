"""The dense pass against rows collected by hand and gradients taken one example at a time."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mpoc.compression.calibrate.cache import DensePass
from mpoc.compression.calibrate.dense_pass import Probes, dense_pass
from mpoc.compression.calibrate.layer_inputs import ALL, Positions
from mpoc.compression.calibrate.moments import Accumulator
from mpoc.compression.calibrate.output_of_interest import Pooling, direction, output_of_interest
from mpoc.compression.calibrate.paired_pass import PairedPass, Replay
from mpoc.compression.calibrate.trace import Trace, trace
from mpoc.compression.run_context import Progress, RunContext
from mpoc.errors import MpocError
from mpoc.io.keyed_store import Scratch
from mpoc.models.call import Batch, Call
from mpoc.runtime.device import derived_seed
from tests.compression.calibrate.networks import (
    GUIDES,
    Stopped,
    damaged,
    encoder,
    guided,
    images,
    resnet20,
    second,
    texts,
    weights,
    windowed,
)
from tests.support.architectures import tiny
from tests.support.rounding import assert_near


def passed(
    network: nn.Module, batches: list[Batch], count: int = 1, positions: Positions = ALL, **options: Any
) -> tuple[Trace, DensePass]:
    """With ``count`` probes."""
    call = Call.of(network)
    found = trace(network, call, batches[0], weights(network))
    return found, dense_pass(network, call, batches, found, Probes(count, **options), positions)


def perceptron() -> nn.Sequential:
    torch.manual_seed(4)
    return nn.Sequential(nn.Linear(5, 7), nn.ReLU(inplace=True), nn.Linear(7, 3)).eval()


def test_collects_rows_of_texts() -> None:
    network, batches = encoder(), [texts(), texts((3, 8), seed=1)]
    _, found = passed(network, batches, count=0)
    rows: list[Tensor] = []

    def see(_: nn.Module, args: tuple[Tensor]) -> None:
        rows.append(args[0][batches[len(rows)]["attention_mask"].bool()])

    network.encoder.layer[1].intermediate.dense.register_forward_pre_hook(see)
    with torch.no_grad():
        for batch in batches:
            network(**batch)
    moments = found.moments["encoder.layer.1.intermediate.dense.weight"]
    assert moments.rows == 19 + 11
    assert torch.allclose(moments.second, second(torch.cat(rows)), rtol=1e-5, atol=1e-7)
    assert moments.cross is moments.second and found.gradients == {}
    words = found.moments["embeddings.word_embeddings.weight"]
    ids = torch.cat([batch["input_ids"][batch["attention_mask"].bool()] for batch in batches])
    assert torch.equal(words.second * 30, torch.bincount(ids, minlength=50).double())


def test_ignores_padding() -> None:
    network = encoder()
    batch, other = texts(), texts()
    other["input_ids"] = torch.where(batch["attention_mask"].bool(), batch["input_ids"], 7)
    _, found = passed(network, [batch], count=2)
    _, again = passed(network, [other], count=2)
    for name, moments in found.moments.items():
        assert torch.allclose(again.moments[name].second, moments.second, rtol=1e-5, atol=1e-7), name
        assert torch.allclose(again.gradients[name], found.gradients[name], rtol=1e-4, atol=1e-7), name


def test_layers_with_one_input_share_their_moments() -> None:
    _, found = passed(encoder(), [texts()], count=0)
    self_ = "encoder.layer.0.attention.self"
    seconds = [found.moments[f"{self_}.{part}.weight"].second for part in ("query", "value")]
    assert torch.equal(*seconds)


def test_matches_gradients_of_single_examples() -> None:
    """Fisher's information from one backward pass an example, the same labels drawn."""
    network, batches = perceptron(), [{"x": torch.randn(6, 5)}, {"x": torch.randn(4, 5)}]
    _, found = passed(network, batches, count=3, seed=5)
    hidden, last = torch.zeros(7, 7, dtype=torch.float64), torch.zeros(3, 3, dtype=torch.float64)
    for index, batch in enumerate(batches):
        p = network(batch["x"]).softmax(-1).detach()
        for probe in range(3):
            generator = torch.Generator().manual_seed(derived_seed(5, "direction", index, probe))
            drawn = torch.multinomial(p, 1, generator=generator).flatten()
            for x, label in zip(batch["x"], drawn, strict=True):
                inner = network[0](x[None])
                logits = network[2](inner.clone().relu())
                log_p = logits.log_softmax(-1)[0, label]
                g, g_last = torch.autograd.grad(log_p, [inner, logits])
                hidden += g.double().T @ g.double()
                last += g_last.double().T @ g_last.double()
    assert torch.allclose(found.gradients["0.weight"], hidden / 30, rtol=1e-5, atol=1e-9)
    assert torch.allclose(found.gradients["2.weight"], last / 30, rtol=1e-5, atol=1e-9)


@pytest.mark.slow
def test_sampled_labels_give_the_fisher_information() -> None:
    """Of the logits it is diag(p) − ppᵀ, exactly, in the mean over draws."""
    logits = torch.randn(1, 4)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.stack([direction(logits, True, generator)[0] for _ in range(4000)])
    p = logits.softmax(-1)[0].double()
    assert torch.allclose(second(drawn), torch.diag(p) - torch.outer(p, p), atol=0.02)


@pytest.mark.slow
def test_handles_pooled_embeddings() -> None:
    """G of signs, averaged, is the mean over tokens of JᵀJ, J the embedding's Jacobian at a token."""
    network, batch, pooling = encoder(1), texts((4, 2)), Pooling("mean", normalize=True)
    name = "encoder.layer.0.output.dense.weight"
    _, found = passed(network, [batch], count=300, pooling=pooling)
    caught: list[Tensor] = []
    network.encoder.layer[0].output.dense.register_forward_hook(lambda *given: caught.append(given[2]))
    values, are_logits = output_of_interest(network(**batch), batch, pooling)
    assert not are_logits and values.shape == (2, 16)
    wanted = torch.zeros(16, 16, dtype=torch.float64)
    for entry in values.flatten():
        (g,) = torch.autograd.grad(entry, caught[0], retain_graph=True)
        rows = g[batch["attention_mask"].bool()].double()
        wanted += rows.T @ rows / 6
    result = found.gradients[name]
    assert (result - wanted).norm() < 0.2 * wanted.norm()
    assert float(result.trace()) == pytest.approx(float(wanted.trace()), rel=0.02)


@pytest.mark.slow
def test_handles_convolutions() -> None:
    network, batches = resnet20(), [images(2, size=16), images(2, seed=1, size=16)]
    found, result = passed(network, batches)
    name = "layer2.0.conv2.weight"
    accumulator = Accumulator()
    gradients: list[Tensor] = []

    def see(_: nn.Module, args: tuple[Tensor]) -> None:
        unfolded = nn.functional.unfold(args[0], 3, padding=1)  # (n, C · taps, positions)
        accumulator.add(unfolded.unflatten(1, (-1, 9)).permute(0, 3, 2, 1).flatten(2).flatten(0, 1))

    conv = network.get_submodule("layer2.0.conv2")
    conv.register_forward_pre_hook(see)

    def catch(_: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
        output.register_hook(gradients.append)

    conv.register_forward_hook(catch)
    for index, batch in enumerate(batches):
        logits = network(batch["x"])
        generator = torch.Generator().manual_seed(derived_seed(0, "direction", index, 0))
        logits.backward(direction(logits, True, generator))
    wanted = accumulator.moments()
    assert result.moments[name].rows == 4 * 8 * 8
    assert torch.allclose(result.moments[name].second, wanted.second, rtol=1e-5, atol=2e-6)
    rows = torch.cat(gradients).movedim(1, -1).flatten(0, -2)
    assert torch.allclose(result.gradients[name], second(rows), rtol=1e-4, atol=1e-9)
    assert result.moments.keys() == result.gradients.keys() == found.layers.keys()


@pytest.mark.slow
def test_samples_positions() -> None:
    network, batches = resnet20(), [images(4)]
    _, whole = passed(network, batches, count=0)
    _, found = passed(network, batches, count=0, positions=Positions(400))
    name = "layer1.0.conv1.weight"
    assert found.moments[name].rows == whole.moments[name].rows == 4 * 1024
    exact = whole.moments[name].second
    assert 0 < (found.moments[name].second - exact).norm() / exact.norm() < 0.1


def test_draw_depends_on_probes_and_seed() -> None:
    network, batches = perceptron(), [{"x": torch.randn(6, 5)}]
    results = [
        passed(network, batches, count, seed=seed)[1] for count, seed in ((1, 0), (1, 0), (1, 1), (2, 0))
    ]
    first, again, *others = (found.gradients["0.weight"] for found in results)
    assert torch.equal(first, again)
    assert not any(torch.allclose(first, other) for other in others)


def test_handles_layers_without_gradients() -> None:
    network, batch = Stopped().eval(), {"x": torch.randn(5, 4)}
    _, found = passed(network, [batch])
    assert found.moments.keys() == {"body.weight", "late.weight"}
    assert found.gradients.keys() == {"late.weight"}
    assert found.moments["late.weight"].rows == 10
    x = network.body(batch["x"]).detach()
    rows = torch.cat([x, network.late(x).relu().detach()])
    assert torch.allclose(found.moments["late.weight"].second, second(rows), rtol=1e-5)


@pytest.mark.slow
def test_leaves_the_network_unchanged() -> None:
    network = resnet20()
    network.get_parameter("conv1.weight").requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    passed(network, [images(2)])
    trained = {name for name, parameter in network.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, _ in network.named_parameters()} - {"conv1.weight"}
    assert all(parameter.grad is None for parameter in network.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in network.modules())


def test_rejects_data_without_rows() -> None:
    batch = texts()
    network = encoder(1)
    found = trace(network, Call.of(network), batch, weights(network))
    with pytest.raises(MpocError, match="all tokens of the calibration data are padding"):
        empty = {**batch, "attention_mask": torch.zeros_like(batch["attention_mask"])}
        dense_pass(network, Call.of(network), [empty], found, Probes(0))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_matches_on_a_gpu() -> None:
    _, found = passed(encoder(), [texts()], count=0)
    _, other = passed(encoder().to("cuda"), [texts()], count=2)
    for name, moments in found.moments.items():
        assert torch.allclose(other.moments[name].second, moments.second, rtol=1e-3, atol=1e-5)
        assert other.gradients[name].device.type == "cpu"


@pytest.mark.slow
def test_gradients_after_a_block_match_its_last_layer() -> None:
    """The last layer takes the mean over what the last block gives: G there is Wᵀ E[g gᵀ] W to a factor."""
    network, batches = resnet20(), [images(3, size=12)]
    found = trace(network, Call.of(network), batches[0], weights(network))
    done = dense_pass(network, Call.of(network), batches, found, Probes(3, blocks=True))
    path = found.chains[0][-1].module
    weight = network.get_parameter("linear.weight").detach().double()
    wanted = weight.T @ done.gradients["linear.weight"] @ weight
    ours = done.blocks[path]
    assert torch.allclose(ours / ours.norm(), wanted / wanted.norm(), atol=1e-5)
    assert not dense_pass(network, Call.of(network), batches, found, Probes(3)).blocks


class Skips(nn.Module):
    """A chain of two blocks, of which something else is used further on."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 6), nn.Linear(6, 6)
        self.blocks = nn.ModuleList(Extra() for _ in range(2))
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        before = self.first(x)
        middle = self.blocks[0](before, before if self.how == "argument" else None)
        after = self.blocks[1](middle, before if self.how == "argument" else None)
        used = {"over a block": middle, "over all": before, "argument": 0.0, "none": 0.0}
        if self.how == "twice":
            return self.first(after)
        return self.last(after + used[self.how])


class Extra(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, x: Tensor, more: Tensor | None) -> Tensor:
        return x + self.linear(x if more is None else x * more).tanh()


def _skips(how: str) -> tuple[nn.Module, list[Batch]]:
    torch.manual_seed(0)
    return Skips(how).eval(), [{"x": torch.randn(n, 6)} for n in (5, 3)]


PIECES: dict[str, tuple[Any, bool]] = {
    "bert": (lambda: (encoder(), [texts(), texts((3, 8), seed=1)]), True),
    "gpt2": (lambda: (tiny("gpt2"), [texts(), texts((3, 8), seed=1)]), True),
    "llama": (lambda: (tiny("llama"), [texts(), texts((3, 8), seed=1)]), True),
    "windowed": (windowed, True),
    **{how: (partial(guided, how), False) for how in GUIDES if how != "refilled"},  # no gradients of that
    "resnet": (lambda: (resnet20(), [images(2, size=12), images(1, seed=1, size=12)]), True),
    **{
        how: (partial(_skips, how), how == "none")
        for how in ("over a block", "over all", "argument", "twice", "none")
    },
}


@pytest.mark.parametrize("kind", PIECES)
def test_pieces_give_what_the_whole_network_gives(kind: str) -> None:
    make, cuts = PIECES[kind]
    network, batches = make()
    found = trace(network, Call.of(network), batches[0], weights(network))
    steps: list[tuple[int, int]] = []
    progress = Progress(stage=lambda _, number, count, later: steps.append((number, count)))
    context = RunContext(torch.device("cpu"), progress=progress)
    probes = Probes(2, seed=3, blocks=True)
    one = dense_pass(network, Call.of(network), batches, found, probes, context=context)
    whole = dense_pass(network, Call.of(network), batches, replace(found, pieces=None), probes)
    pieces = len(found.chains[0]) + 2 if cuts else 1
    assert steps == [(k, pieces * len(batches)) for k in range(1, pieces * len(batches) + 1)]
    assert one.moments.keys() == whole.moments.keys() == found.layers.keys()
    assert one.gradients.keys() == whole.gradients.keys() and one.blocks.keys() == whole.blocks.keys()
    assert len(one.gradients) >= 3
    for name, moments in whole.moments.items():
        assert torch.equal(moments.second, one.moments[name].second)
    for ours, theirs in ((one.gradients, whole.gradients), (one.blocks, whole.blocks)):
        for name, gradient in theirs.items():
            assert_near(ours[name], gradient, terms=64, depth=len(found.layers))


class Peak(TorchDispatchMode):
    """Counts the largest sum of bytes of the tensors that live at one time, of those made meanwhile."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._live: dict[int, tuple[StorageWeakRef, int]] = {}
        self.bytes = self._sum = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        old = {
            tensor.untyped_storage()._cdata
            for tensor in tree_leaves((args, kwargs))
            if isinstance(tensor, Tensor)
        }
        for tensor in tree_leaves(result):
            storage = tensor.untyped_storage() if isinstance(tensor, Tensor) else None
            if storage is not None and storage._cdata not in old:
                self._live[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
                self._sum += storage.nbytes()
        if self._sum > self.bytes:
            self._live = {key: one for key, one in self._live.items() if not one[0].expired()}
            self._sum = sum(nbytes for _, nbytes in self._live.values())
            self.bytes = max(self.bytes, self._sum)
        return result


def test_leaves_no_inputs_of_blocks_in_the_scratch() -> None:
    network, batches = encoder(), [texts(seed=k) for k in range(2)]
    call, scratch = Call.of(network), Scratch()
    found = trace(network, call, batches[0], weights(network))
    dense = dense_pass(network, call, batches, found, Probes(2), scratch=scratch)
    pair = PairedPass((network, damaged(network)), call, batches, found, replay=Replay(scratch=scratch))
    kept = scratch.nbytes
    owners = set(map(id, vars(dense).values()))
    parts = [part for key, part in scratch._held.items() if isinstance(key, tuple) and key[0] in owners]
    assert kept == sum(tensor.nbytes for part in parts for tensor in part)
    pair.moments(found.groups[4])
    assert scratch.nbytes > kept
    pair.forget()
    assert scratch.nbytes == kept


def _peak(layers: int, folder: Path | None) -> int:
    """Of both passes through an encoder whose statistics lie in files."""
    network, batches = encoder(layers), [texts(seed=k) for k in range(2)]
    found = trace(network, Call.of(network), batches[0], weights(network))
    call, scratch, copy = Call.of(network), Scratch(folder, limit=0), damaged(network)
    with Peak() as peak:
        dense = dense_pass(network, call, batches, found, Probes(2), scratch=scratch)
        pair = PairedPass((network, copy), call, batches, found, replay=Replay(scratch=scratch))
        for group in found.groups:
            pair.moments(group, dense.moments)
    return peak.bytes


@pytest.mark.slow
def test_memory_does_not_grow_with_depth(tmp_path: Path) -> None:
    few, many = _peak(4, tmp_path), _peak(12, tmp_path)
    held_few, held_many = _peak(4, None), _peak(12, None)
    assert held_many > 2 * held_few > 2 * few  # where all is held it does
    assert many - few < 0.06 * (held_many - held_few)
