from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import linear

import mpoc
from mpoc.errors import UsageError
from mpoc.nn import MPOLinear, use_weights
from mpoc.tensor_networks.forms.mpo import MPO
from tests.nn.layers import pair, with_cores
from tests.support.rounding import assert_near


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one with every dense weight that is built."""
    calls: list[int] = []
    original = MPO.to_weight

    def counted(form: MPO) -> Tensor:
        calls.append(1)
        return original(form)

    monkeypatch.setattr(MPO, "to_weight", counted)
    return calls


LAYERS = [
    lambda: (nn.Linear(24, 18), torch.randn(5, 24)),
    lambda: (nn.Conv2d(4, 6, 3), torch.randn(2, 4, 6, 6)),
    lambda: (nn.ConvTranspose1d(4, 6, 3), torch.randn(2, 4, 6)),
    lambda: (nn.Embedding(101, 24, padding_idx=1), torch.tensor([0, 1, 100])),
]


class TestView:
    def test_shape_and_dtype_do_not_build_the_weight(self, built: list[int]) -> None:
        layer = with_cores(nn.Linear(24, 18).double())
        built.clear()
        weight = layer.weight
        assert (weight.dtype, weight.device.type, weight.shape) == (torch.float64, "cpu", (18, 24))
        assert (weight.ndim, weight.dim(), weight.numel(), len(weight)) == (2, 2, 432, 18)
        assert (weight.size(), weight.size(1), weight.stride()) == ((18, 24), 24, (24, 1))
        assert weight.is_floating_point()
        assert weight.requires_grad
        assert weight.element_size() == 8
        layer.requires_grad_(False)
        assert not layer.weight.requires_grad
        assert layer.to("meta").weight.device.type == "meta"
        assert built == []

    @pytest.mark.parametrize(
        "use",
        [
            lambda w, x: linear(x, w),
            lambda w, x: x @ w.T,
            lambda w, x: torch.cat([w, w]),
            lambda w, x: torch.add(w, other=w),
            lambda w, x: w * 2 + 1 - w / 3,
            lambda w, x: 1 - (2 * w) ** 2,
            lambda w, x: -w[3:, 2],
            lambda w, x: w @ x.T,
            lambda w, x: x[:1] * w,
            lambda w, x: w.norm(),
            lambda w, x: w.float().mean(0),
            lambda w, x: torch.stack(list(w)),
            lambda w, x: 1 / w.data + abs(w) + 2**w,
            lambda w, x: (w == 0) | (w != w) | (w < 0.1) | (w >= 1),
            lambda w, x: w.data.norm(),
            lambda w, x: torch.zeros(18, 24).copy_(w.data),
            lambda w, x: torch.zeros(18, 24).add_(w),
            lambda w, x: torch.zeros(18, 24).index_put((torch.tensor(3),), w[2]),
        ],
    )
    def test_acts_as_the_dense_weight(self, use: Any) -> None:
        dense, layer = pair(nn.Linear(24, 18))
        x = torch.randn(5, 24)
        torch.testing.assert_close(use(layer.weight, x), use(dense.weight, x))

    def test_gradients_reach_the_cores(self) -> None:
        layer = with_cores(nn.Linear(24, 18))
        linear(torch.randn(5, 24), layer.weight).sum().backward()
        assert all(core.grad.abs().sum() > 0 for core in layer.cores)

    def test_rejects_another_weight(self) -> None:
        layer = with_cores(nn.Linear(24, 18))
        for weight in (nn.Parameter(torch.zeros(18, 24)), torch.zeros(18, 24)):
            with pytest.raises((AttributeError, KeyError)):
                layer.weight = weight
        with pytest.raises(TypeError):
            nn.Linear(24, 18).weight = layer.weight
        with pytest.raises(AttributeError):
            layer.weight.requires_grad = False

    @pytest.mark.parametrize("weights", ["cores", "dense"])
    @pytest.mark.parametrize(
        "write",
        [
            lambda w: w.zero_(),
            lambda w: w.data.normal_(),
            lambda w: w.copy_(torch.zeros(18, 24)),
            lambda w: w.requires_grad_(False),
            nn.init.zeros_,
            nn.init.normal_,
            nn.init.xavier_uniform_,
            lambda w: torch.add(torch.ones(18, 24), 1, out=w),
            lambda w: w.__setitem__(0, 1.0),
            lambda w: w.data.__setitem__(0, 1.0),
            lambda w: w.__iadd__(1),
            lambda w: setattr(w, "data", torch.zeros(18, 24)),
            lambda w: setattr(w, "grad", None),
        ],
    )
    def test_rejects_writes_to_a_temporary_weight(self, write: Any, weights: Any) -> None:
        layer = with_cores(nn.Linear(24, 18)).eval()
        use_weights(layer, weights)
        before = layer(torch.ones(24))
        with torch.no_grad(), pytest.raises((TypeError, AttributeError), match="weight made from cores"):
            write(layer.weight)
        assert torch.equal(layer(torch.ones(24)), before)

    def test_unknown_attributes_do_not_build_the_weight(self, built: list[int]) -> None:
        layer = with_cores(nn.Linear(24, 18))
        built.clear()
        assert getattr(layer.weight, "quant_state", None) is None
        assert not isinstance(layer.weight, nn.Parameter)
        data = layer.weight.data
        assert (data.dtype, data.shape, data.requires_grad) == (torch.float32, (18, 24), False)
        assert built == []
        assert not data.clone().requires_grad


@pytest.mark.parametrize("make", LAYERS)
class TestHeldWeight:
    @pytest.fixture(autouse=True)
    def without_gradients(self) -> Iterator[None]:
        with torch.no_grad():
            yield

    def test_builds_the_weight_once(self, make: Any, built: list[int]) -> None:
        plain, x = make()
        dense, layer = pair(plain)
        layer.eval()
        use_weights(layer, "dense")
        built.clear()
        for _ in range(2):
            assert_near(layer(x), dense(x), terms=64, depth=3)
        torch.testing.assert_close(torch.clone(layer.weight), dense.get_parameter("weight").detach())
        assert built == []
        use_weights(layer, "cores")
        assert_near(layer(x), dense(x), terms=64, depth=3)

    def test_follows_changed_cores(self, make: Any, built: list[int]) -> None:
        plain, x = make()
        layer = with_cores(plain).eval()
        use_weights(layer, "dense")
        layer(x)
        optimiser = torch.optim.AdamW(layer.parameters(), lr=0.1, weight_decay=0.1)
        for change in (
            lambda: layer.cores[0].mul_(1.5),
            lambda: stepped(layer, optimiser, x),
            lambda: layer.load_state_dict({n: v * 1.1 for n, v in layer.state_dict().items()}),
            lambda: setattr(layer.cores[0], "data", layer.cores[0] * 0.9),
            lambda: layer.cores.__setitem__(1, nn.Parameter(layer.cores[1] * 0.8)),
            lambda: setattr(layer, "cores", nn.ParameterList([core * 1.2 for core in layer.cores])),
            lambda: layer.load_state_dict(
                {n: v * 1.1 for n, v in layer.state_dict().items()}, strict=True, assign=True
            ),
        ):
            change()
            built.clear()
            found = [layer(x), layer(x)]
            assert len(built) == 1
            twin = copy.deepcopy(layer)
            use_weights(twin, "cores")
            for y in found:
                assert_near(y, twin(x), terms=64, depth=3)

    def test_training_uses_the_cores(self, make: Any) -> None:
        plain, x = make()
        layer = with_cores(plain).eval()
        use_weights(layer, "dense")
        layer.train()
        for core in layer.cores:
            core.data.zero_()
        if "bias" in layer._parameters:
            layer.bias.zero_()
        assert not layer(x).any()
        assert not layer.eval()(x).any()

    def test_gradients_reach_the_cores_in_eval_mode(self, make: Any) -> None:
        plain, x = make()
        layer = with_cores(plain).eval()
        with torch.inference_mode():
            use_weights(layer, "dense")
        with torch.enable_grad():
            x = x.requires_grad_() if x.is_floating_point() else x
            layer(x).square().sum().backward()
        assert all(core.grad.abs().sum() > 0 for core in layer.cores)
        layer.requires_grad_(False)
        with torch.enable_grad():
            assert layer(x).requires_grad == x.is_floating_point()

    def test_reading_returns_a_copy(self, make: Any) -> None:
        plain, x = make()
        layer = with_cores(plain).eval()
        use_weights(layer, "dense")
        before = layer(x)
        layer.weight[0].zero_()
        layer.weight.view(-1)[3:7].fill_(5)
        assert torch.equal(layer(x), before)

    def test_eval_builds_what_was_chosen_in_training_mode(self, make: Any, built: list[int]) -> None:
        plain, x = make()
        layer = with_cores(plain).train()
        built.clear()
        use_weights(layer, "dense")
        assert built == []
        layer.eval()
        assert len(built) == 1
        layer(x)
        assert len(built) == 1

    @pytest.mark.parametrize("change", [lambda m: m.double(), lambda m: m.to(torch.float64)])
    def test_follows_another_dtype(self, make: Any, change: Any) -> None:
        plain, x = make()
        layer = with_cores(plain).eval()
        use_weights(layer, "dense")
        change(layer)
        x = x.double() if x.is_floating_point() else x
        assert layer(x).dtype == torch.float64

    def test_state_copies_and_pickles_leave_it_out(self, make: Any) -> None:
        plain, x = make()
        layer = with_cores(plain).eval()
        names = list(layer.state_dict())
        plain_size = len(pickle.dumps(layer))
        use_weights(layer, "dense")
        assert list(layer.state_dict()) == names == [name for name, _ in layer.named_parameters()]
        assert {f"cores.{k}" for k in range(len(layer.cores))} <= set(names)
        assert len(pickle.dumps(layer)) < plain_size + 100
        again = pickle.loads(pickle.dumps(layer))
        torch.testing.assert_close(again(x), layer(x))
        assert "_weight_held" not in vars(copy.deepcopy(layer))

    def test_functional_call_uses_its_parameters(self, make: Any) -> None:
        """``torch.func`` puts tensors in the place of the parameters."""
        plain, x = make()
        layer = with_cores(plain).eval()
        use_weights(layer, "dense")
        before = layer(x)
        zeros = {name: torch.zeros_like(value) for name, value in layer.named_parameters()}
        assert not torch.func.functional_call(layer, zeros, (x,)).any()
        torch.testing.assert_close(layer(x), before)


def stepped(layer: Any, optimiser: torch.optim.Optimizer, x: Tensor) -> None:
    """One step of training in eval mode."""
    optimiser.zero_grad()
    with torch.enable_grad():
        layer(x).square().sum().backward()
    optimiser.step()


@torch.no_grad()
def test_follows_cores_whose_data_were_replaced_twice() -> None:
    """The second replacement may come to lie where the first data did."""
    network = nn.Sequential(nn.Linear(256, 256, bias=False)).eval()
    mpoc.compress(network, bond=8, form="svd")
    use_weights(network, "dense")
    layer: Any = network[0]
    core, x = layer.cores[0], torch.randn(2, 256)
    for _ in range(20):
        layer(x)
        for _ in range(2):
            core.data = core.data * -1.1
        twin = copy.deepcopy(network)
        use_weights(twin, "cores")
        torch.testing.assert_close(layer(x), twin(x))


@torch.no_grad()
@pytest.mark.parametrize("strict", [False, True])
def test_programs_keep_the_cores_of_a_layer_that_holds_its_weight(strict: bool) -> None:
    network: Any = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64)).eval()
    mpoc.compress(network, bond=2)
    use_weights(network, "dense")
    x = torch.randn(3, 64)
    y = network(x)
    program = torch.export.export(network, (x,), strict=strict)
    assert not program.constants
    assert {tuple(value.shape) for value in program.state_dict.values() if value.ndim > 1} == {
        tuple(core.shape) for layer in (network[0], network[2]) for core in layer.cores
    }
    torch.testing.assert_close(program.module()(x), y)


def test_auto_follows_the_cost_model() -> None:
    small, large = with_cores(nn.Linear(48, 64), 16, sites=3), with_cores(nn.Linear(4096, 4096), 2, sites=2)
    for batch in (1, 64, 4096):
        assert small.dense_is_faster(batch)
        assert not large.dense_is_faster(batch)
    network = nn.Sequential(small, large).eval()
    use_weights(network)
    assert ["_weight_held" in vars(layer) for layer in (small, large)] == [True, False]


@torch.no_grad()
def test_auto_chooses_in_each_call() -> None:
    """Two thin products take longer to start than one, and less time for many vectors."""
    network: Any = nn.Sequential(nn.Linear(384, 384)).eval()
    mpoc.compress(network, bond=48, form="svd")
    layer = network[0]
    use_weights(layer, "cores")
    few, many = torch.randn(3, 1, 384), torch.randn(2, 400, 384)
    expected = layer(few), layer(many)
    use_weights(layer)
    assert [layer.held_for(x) is not None for x in (few, many, few[:0])] == [True, False, True]
    for x, y in zip((few, many), expected, strict=True):
        torch.testing.assert_close(layer(x), y)
    use_weights(layer, "dense")
    assert layer.held_for(many) is layer.held_for(few)


@pytest.mark.parametrize("form", ["mpo", "tree", "mera"])
def test_dense_weights_win_for_few_vectors(form: str) -> None:
    """A call through cores starts several operations."""
    network: Any = nn.Sequential(nn.Linear(256, 256))
    mpoc.compress(network, bond=2, form=form)
    assert network[0].dense_is_faster(1)


def test_rejects_other_values() -> None:
    layer = with_cores(nn.Linear(24, 18))
    with pytest.raises(
        UsageError, match="weights='dens': not one of auto, dense, cores, packed; did you mean 'dense'"
    ):
        use_weights(layer, "dens")  # type: ignore[arg-type]


def test_deep_copy_is_independent() -> None:
    layer = with_cores(nn.Linear(24, 18)).eval()
    use_weights(layer, "dense")
    x = torch.randn(5, 24)
    twin = copy.deepcopy(layer)
    assert type(twin) is MPOLinear
    with torch.no_grad():
        torch.testing.assert_close(twin(x), layer(x))
        before = layer(x)
        for core in twin.cores:
            core.zero_()
        torch.testing.assert_close(layer(x), before)
        torch.testing.assert_close(twin(x), twin.bias.expand(5, -1))


def test_pickles_the_whole_module(tmp_path: Any) -> None:
    layer = with_cores(nn.Linear(24, 18))
    torch.save(layer, tmp_path / "layer.pt")
    again = torch.load(tmp_path / "layer.pt", weights_only=False)
    torch.testing.assert_close(again(torch.ones(24)), layer(torch.ones(24)))
