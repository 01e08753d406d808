"""The zoo: parameter counts against the papers', shapes, and specs."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import nn

from mpoc.models.zoo import ENTRIES, example, long_form, make, parse

# Of all parameters: what the papers print, and what the layers add up to here.
COUNTS = {
    "fc2": 784 * 256 + 256 * 10,  # Gao et al.: "784 × 256 and 256 × 10 elements"
    "harada": 1024 * 1024 + 1024 * 10,  # the slides: 4⁵ → 4⁵, and 1024 → 10
    "lenet5": 156 + 2_416 + 48_120 + 120 * 84 + 84 * 10,  # LeCun et al.: "60,000 trainable parameters"
    "vgg16": 28_923_850,
    "vgg19": 38_953_418,
    # Hallam et al.: 17,338,560 and 602,304, with 2,560 in the place of the last layer's 640 and 740
    "mera-cnn": 17_338_560 - 2_560 + 640,
    "mera-cnn:hidden=10,parallel=1": 602_304 - 2_560 + 740,
    "picogpt": 808_448,  # of the paper's code; its text has 1,020,224
}
# He et al., table 6; Huang et al., table 2. Both print two digits.
MILLIONS = {
    "resnet:depth=20": 0.27,
    "resnet:depth=32": 0.46,
    "resnet:depth=44": 0.66,
    "resnet:depth=56": 0.85,
    "resnet:depth=110": 1.7,
    "densenet:depth=40,growth=12": 1.0,
    "densenet:depth=100,growth=12": 7.1,  # 7.0 from 16 channels; Gao et al. start from 24
}
# Gao et al., table II: (n, m, k) and the head's inputs n + 3km.
HEADS = {
    "densenet:depth=40,growth=12": 4 * 4 * 7 * 4,
    "densenet:depth=40,growth=24": 4 * 5 * 11 * 4,
    "densenet:depth=100,growth=12": 4 * 7 * 7 * 6,
    "densenet:depth=100,growth=24": 5 * 8 * 12 * 5,
    "resnet:depth=20,width=4": 4 * 4 * 4 * 4,
    "resnet:depth=110": 64,
}
SPECS = [*COUNTS, *MILLIONS, "densenet:depth=40,growth=24", "resnet:width=4", "densenet:depth=100,growth=24"]


def on_meta(spec: str) -> Any:
    """Shapes without numbers: quick for the largest network."""
    with torch.device("meta"):
        return make(spec)


def count(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


@pytest.mark.parametrize(("spec", "expected"), COUNTS.items())
def test_parameter_counts_match_the_papers(spec: str, expected: int) -> None:
    assert count(on_meta(spec)) == expected


@pytest.mark.parametrize(("spec", "millions"), MILLIONS.items())
def test_parameter_counts_in_millions_match(spec: str, millions: float) -> None:
    assert float(f"{count(on_meta(spec)) / 1e6:.2g}") == millions


@pytest.mark.parametrize(("spec", "inputs"), HEADS.items())
def test_heads_match_the_paper(spec: str, inputs: int) -> None:
    assert tuple(on_meta(spec).linear.weight.shape) == (10, inputs)


def test_lists_weights_replaced_in_the_paper() -> None:
    lenet, vgg = on_meta("lenet5"), on_meta("vgg16")
    shapes = [tuple(layer.weight.shape) for layer in (lenet.fc1, lenet.fc2, lenet.fc3)]
    assert shapes == [(120, 400), (84, 120), (10, 84)]
    replaced = (vgg.conv5_1, vgg.conv5_2, vgg.fc1, vgg.fc2, vgg.fc3)
    assert sum(layer.weight.numel() for layer in replaced) == 23_633_920
    assert [vgg.get_submodule(f"conv{stage}_3").kernel_size for stage in (3, 4, 5)] == [(1, 1)] * 3
    convolutions = [name for name, _ in on_meta("vgg19").named_children() if name.startswith("conv")]
    assert (len(convolutions), convolutions[-1]) == (16, "conv5_4")


@pytest.mark.parametrize("spec", SPECS)
def test_forward_shapes(spec: str) -> None:
    network = on_meta(spec).eval()
    with torch.device("meta"):
        x = torch.cat([example(spec)] * 3)
    classes = (256, 65) if spec == "picogpt" else (10,)
    assert network(x).shape == (3, *classes)


@pytest.mark.parametrize("spec", ["fc2", "lenet5", "resnet:depth=8", "densenet:depth=7", "picogpt:context=9"])
def test_forward_and_backward(spec: str) -> None:
    network, x = make(spec), torch.cat([example(spec)] * 2)
    y = network(torch.randn_like(x) if x.is_floating_point() else x)
    assert y.isfinite().all()
    assert y.std() > 0
    y.square().sum().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())


@pytest.mark.parametrize("name", ["vgg16", "vgg19"])
def test_vgg_layers_are_in_order(name: str) -> None:
    """Every convolution is followed by its batch norm, and pooling halves the image five times."""
    network = on_meta(name).eval()
    seen: list[tuple[str, int]] = []
    for place, module in network.named_children():
        module.register_forward_hook(
            lambda _, inputs, __, place=place: seen.append((place, inputs[0].shape[-1]))
        )
    with torch.device("meta"):
        network(example(name))
    layers = [place for place, _ in seen if place != "dropout"]
    assert layers == [place for place, _ in network.named_children() if place != "dropout"]
    sizes = {place[4]: width for place, width in seen if place.startswith("conv")}
    assert sizes == {"1": 32, "2": 16, "3": 8, "4": 4, "5": 2}


def test_resnet_stages_start_with_zero_padded_shortcuts() -> None:
    network: Any = make("resnet:depth=8,width=4")
    block, x = network.layer2[0], torch.randn(2, 64, 8, 8)
    y = block.shortcut(x)
    assert y.shape == (2, 128, 4, 4)
    assert torch.equal(y[:, 32:96], x[:, :, ::2, ::2])
    assert not y[:, :32].any()
    assert not y[:, 96:].any()


def test_picogpt_is_causal_and_counts_positions() -> None:
    network = make("picogpt:vocab=11,context=8").eval()
    ids = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])
    with torch.no_grad():
        whole, changed = network(ids), network(torch.cat([ids[:, :5], ids[:, 5:].flip(1)], 1))
        torch.testing.assert_close(changed[:, :5], whole[:, :5], rtol=1e-5, atol=1e-6)
        assert not torch.allclose(changed[:, 5:], whole[:, 5:])
        same = network(torch.full((1, 8), 7))[0]
        assert not torch.allclose(same[0], same[-1])  # by their positions alone
    with pytest.raises(ValueError, match="9 tokens, but the context has 8"):
        network(torch.zeros(1, 9, dtype=torch.int64))
    assert "positions" not in network.state_dict()


def test_positions_are_sinusoidal() -> None:
    positions: Any = make("picogpt").positions
    assert positions.shape == (256, 128)
    for place, column in ((0, 0), (7, 0), (200, 1), (31, 64), (255, 127)):
        angle = torch.tensor(place / 10000 ** (2 * (column // 2) / 128))
        expected = angle.cos() if column % 2 else angle.sin()
        torch.testing.assert_close(positions[place, column], expected, rtol=1e-4, atol=1e-4)


def test_initialisation_is_seeded() -> None:
    def weight(seed: int) -> Any:
        torch.manual_seed(seed)
        return make("fc2").state_dict()["fc1.weight"]

    assert torch.equal(weight(3), weight(3))
    assert not torch.equal(weight(3), weight(4))


@pytest.mark.parametrize("name", ENTRIES)
def test_every_entry_names_paper_and_input(name: str) -> None:
    entry = ENTRIES[name]
    assert re.search(r"(19|20)\d\d|arXiv", entry.paper)
    assert parse(name) == (name, entry.options)
    if entry.images:
        assert entry.images.keys() == {"mean", "std", "pad", "flip"}
        assert len(entry.images["mean"]) == len(entry.images["std"]) == entry.shape[0]
    assert example(name).shape == (1, *entry.shape)


def test_parses_specs() -> None:
    assert parse("resnet:depth=56") == ("resnet", {"depth": 56, "width": 1})
    assert parse("resnet:width=4,depth=20") == ("resnet", {"depth": 20, "width": 4})
    assert example("picogpt:context=64").shape == (1, 64)


def test_short_names_stand_for_specs() -> None:
    assert parse("resnet56") == parse("resnet:depth=56")
    assert parse("resnet20:width=4") == parse("resnet:depth=20,width=4")
    assert [long_form(spec) for spec in ("resnet110", "vgg16")] == ["resnet:depth=110", "vgg16"]
    with pytest.raises(ValueError, match="did you mean 'resnet56'"):
        parse("resnet57")


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("resnt", "no network 'resnt' in the zoo (densenet, fc2, harada, lenet5, mera-cnn, picogpt, resnet, "
         "vgg16, vgg19); did you mean 'resnet'?"),
        ("", "no network ''"),
        ("resnet:", "resnet has no option '', only depth and width"),
        ("resnet:dept=20", "resnet has no option 'dept', only depth and width; did you mean 'depth'?"),
        ("fc2:depth=3", "fc2 has no option 'depth', none at all"),
        ("resnet:depth=twenty", "resnet: depth=twenty: not a whole number from 1"),
        ("resnet:depth", "resnet: depth=: not a whole number from 1"),
        ("resnet:depth=0", "depth=0: not a whole number"),
        ("resnet:depth=-8", "depth=-8: not a whole number"),
        ("resnet:depth=20,depth=32", "resnet: option depth is given twice"),
        ("resnet:depth=21", "resnet: depth=21: 6n + 2 from 8 to 1202, as 20, 32, 44, 56 or 110"),
        ("resnet:depth=2", "depth=2: 6n + 2"),
        ("resnet:depth=600002", "depth=600002: 6n + 2 from 8 to 1202"),
        ("densenet:depth=41", "densenet: depth=41: 3m + 4 from 7 to 250, as 40 or 100"),
        ("densenet:depth=4", "depth=4: 3m + 4"),
        ("mera-cnn:parallel=2", "mera-cnn: parallel=2: 0 or 1"),
        ("picogpt:vocab=1000000", "vocab=1000000: not a whole number from 1 to 999999"),
    ],
)  # fmt: skip
def test_rejects_malformed_specs(spec: str, said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        make(spec)
