"""Input sizes learned from one sample."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from mpoc.errors import UsageError
from mpoc.models.introspection import trace_geometries
from mpoc.nn.conv_map import geometry_of


class Twice(nn.Module):
    """One convolution at one size or at two, and one that is never reached."""

    def __init__(self, pooled: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.unused = nn.Conv2d(4, 4, 3)
        self.pooled = pooled

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return torch.as_tensor(self.conv(y[..., ::2, ::2] if self.pooled else y))


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, stride=2, padding=1),
        nn.BatchNorm2d(4),
        nn.Dropout(0.5),
        nn.Conv2d(4, 8, (1, 3), groups=2),
    )


def test_traces_input_sizes_of_convolutions() -> None:
    model = network()
    found = trace_geometries(model, ["0.weight", "3.weight"], (2, 3, 12, 16))
    assert found["0.weight"] == geometry_of(model[0], (12, 16))
    assert found["3.weight"] == geometry_of(model[3], (6, 8))
    assert (found["3.weight"].output_size, found["3.weight"].groups) == ((6, 6), 2)


def test_leaves_the_network_unchanged() -> None:
    model = network()
    model[2].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trace_geometries(model, ["0.weight"], (2, 3, 12, 16))
    assert [module.training for module in model] == [True, True, False, True]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_accepts_repeated_use_at_one_size() -> None:
    found = trace_geometries(Twice(pooled=False), ["conv.weight"], (1, 4, 6, 6))
    assert found["conv.weight"].size == (6, 6)


@pytest.mark.parametrize(
    ("model", "name", "shape", "said"),
    [
        (network(), "0.weight", None, r"needs the shape of one input, as input_shape=\(1, 3, 32, 32\)"),
        (network(), "0.weight", (1, 5, 8, 8), r"input_shape \(1, 5, 8, 8\): Sequential fails"),
        (
            Twice(pooled=True),
            "conv.weight",
            (1, 4, 6, 6),
            r"conv: gets inputs .* \[\(3, 3\), \(6, 6\)\]",
        ),
        (Twice(pooled=True), "unused.weight", (1, 4, 6, 6), "unused: the network did not reach it"),
        (nn.Sequential(nn.ConvTranspose2d(4, 4, 3)), "0.weight", (1, 4, 6, 6), "ConvTranspose2d cannot"),
    ],
)
def test_reports_untraceable_shapes(
    model: nn.Module, name: str, shape: tuple[int, ...] | None, said: str
) -> None:
    with pytest.raises(UsageError, match=said):
        trace_geometries(model, [name], shape)
    assert model.training


def test_traces_keyword_inputs() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.conv(input=x)
            return y

    assert trace_geometries(Named(), ["conv.weight"], (1, 3, 5, 6))["conv.weight"].size == (5, 6)
