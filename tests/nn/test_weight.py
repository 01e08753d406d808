from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from mpoc.nn import MPOLinear
from mpoc.tensor_networks.forms.mpo import MPO
from tests.nn.layers import pair, with_cores


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

    @pytest.mark.parametrize("materialized", [False, True])
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
    def test_rejects_writes_to_a_temporary_weight(self, write: Any, materialized: bool) -> None:
        layer = with_cores(nn.Linear(24, 18)).eval()
        if materialized:
            layer.materialize()
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
class TestMaterialize:
    def test_builds_the_weight_once(self, make: Any, built: list[int]) -> None:
        plain, x = make()
        dense, layer = pair(plain)
        layer.eval()
        layer.materialize()
        built.clear()
        for _ in range(2):
            torch.testing.assert_close(layer(x), dense(x), rtol=0, atol=1e-5)
        torch.testing.assert_close(torch.clone(layer.weight), dense.get_parameter("weight").detach())
        assert built == []
        layer.materialize(on=False)
        assert layer._dense is None
        torch.testing.assert_close(layer(x), dense(x), rtol=0, atol=1e-5)

    def test_is_used_in_eval_mode(self, make: Any) -> None:
        plain, x = make()
        layer = with_cores(plain).eval()
        before = layer(x)
        layer.materialize()
        with torch.no_grad():
            layer.cores[0].zero_()
        torch.testing.assert_close(layer(x), before, rtol=0, atol=1e-5)  # a snapshot

    def test_ends_with_training(self, make: Any) -> None:
        plain, x = make()
        layer = with_cores(plain).eval()
        layer.materialize()
        layer.train()
        with torch.no_grad():
            layer.cores[0].zero_()
            if "bias" in layer._parameters:
                layer.bias.zero_()
        assert not layer(x).any()
        assert not layer.eval()(x).any()

    def test_rejects_training_mode(self, make: Any) -> None:
        layer = with_cores(make()[0]).train()
        with pytest.raises(RuntimeError, match="eval"):
            layer.materialize()
        assert layer._dense is None

    def test_cached_weight_passes_gradients(self, make: Any) -> None:
        plain, x = make()
        layer = with_cores(plain).eval()
        with torch.inference_mode():
            layer.materialize()
        x = x.requires_grad_() if x.is_floating_point() else x
        (layer(x) * 2).square().sum()

    def test_reading_returns_a_copy(self, make: Any) -> None:
        plain, x = make()
        layer = with_cores(plain).eval()
        layer.materialize()
        before = layer(x)
        with torch.no_grad():
            layer.weight[0].zero_()
            layer.weight.view(-1)[3:7].fill_(5)
        assert torch.equal(layer(x), before)

    def test_ends_with_load_state_dict(self, make: Any) -> None:
        plain, x = make()
        other = with_cores(make()[0], seed=1).eval()
        network: Any = nn.Sequential(with_cores(plain)).eval()
        network[0].materialize()
        network.load_state_dict({f"0.{name}": value for name, value in other.state_dict().items()})
        torch.testing.assert_close(network(x), other(x))

    @pytest.mark.parametrize("change", [lambda m: m.double(), lambda m: m.to(torch.float64)])
    def test_ends_with_another_dtype_or_device(self, make: Any, change: Any) -> None:
        plain, x = make()
        layer = with_cores(plain).eval()
        layer.materialize()
        change(layer)
        x = x.double() if x.is_floating_point() else x
        assert layer(x).dtype == torch.float64

    def test_leaves_nothing_in_the_state(self, make: Any) -> None:
        layer = with_cores(make()[0]).eval()
        names = list(layer.state_dict())
        layer.materialize()
        assert list(layer.state_dict()) == names == [name for name, _ in layer.named_parameters()]
        assert {f"cores.{k}" for k in range(len(layer.cores))} <= set(names)


@pytest.mark.parametrize("materialized", [False, True])
def test_deep_copy_is_independent(materialized: bool) -> None:
    layer = with_cores(nn.Linear(24, 18)).eval()
    if materialized:
        layer.materialize()
    x = torch.randn(5, 24)
    twin = copy.deepcopy(layer)
    assert type(twin) is MPOLinear
    torch.testing.assert_close(twin(x), layer(x))
    before = layer(x)
    with torch.no_grad():
        for core in twin.cores:
            core.zero_()
    twin.materialize(on=False)
    torch.testing.assert_close(layer(x), before)
    torch.testing.assert_close(twin(x), twin.bias.expand(5, -1))


def test_pickles_the_whole_module(tmp_path: Any) -> None:
    layer = with_cores(nn.Linear(24, 18))
    torch.save(layer, tmp_path / "layer.pt")
    again = torch.load(tmp_path / "layer.pt", weights_only=False)
    torch.testing.assert_close(again(torch.ones(24)), layer(torch.ones(24)))
