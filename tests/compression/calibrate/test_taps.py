"""Networks whose taps are called: the outputs of torch's own functions, and the rows of each weight."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from mpoc.compression.calibrate.layer_inputs import unseen_weights
from mpoc.compression.calibrate.taps import Tap, add_taps, calling_taps, removing_taps
from mpoc.models.introspection import kinds_of


def tapped(network: nn.Module) -> list[tuple[str, Tensor]]:
    """The network with taps, and a list that gets the rows of each as they are called."""
    names = list(kinds_of(network))
    add_taps(network, unseen_weights(network, names))
    rows: list[tuple[str, Tensor]] = []
    for name, module in network.named_modules():
        if isinstance(module, Tap):
            module.register_forward_pre_hook(
                lambda _, args, name=name: rows.append((name.replace("_tap_", ""), args[0]))
            )
    return rows


def assert_close(found: Any, wanted: Any) -> None:
    """Sums of some tens of terms, in float64."""
    if isinstance(wanted, Tensor):
        assert torch.allclose(found, wanted, rtol=1e-9, atol=1e-12)
    elif wanted is None:
        assert found is None
    else:
        for one, other in zip(found, wanted, strict=True):
            assert_close(one, other)


RECURRENT: dict[str, Any] = {
    "lstm": lambda: nn.LSTM(5, 7),
    "two layers": lambda: nn.LSTM(5, 7, num_layers=2, batch_first=True),
    "both directions": lambda: nn.LSTM(5, 7, num_layers=2, bidirectional=True, bias=False),
    "projected": lambda: nn.LSTM(5, 7, proj_size=3, bidirectional=True),
    "gru": lambda: nn.GRU(5, 7, num_layers=2, bidirectional=True, batch_first=True),
    "tanh": lambda: nn.RNN(5, 7, num_layers=2),
    "relu": lambda: nn.RNN(5, 7, nonlinearity="relu", bidirectional=True),
}


@pytest.mark.parametrize("kind", RECURRENT)
@pytest.mark.parametrize("how", ["padded", "alone", "packed", "from a state"])
@torch.no_grad()
def test_recurrent_layers_give_torchs_outputs(kind: str, how: str) -> None:
    torch.manual_seed(0)
    network: Any = RECURRENT[kind]().double().eval()
    x: Any = torch.randn(4, 4, 5).double() if how != "alone" else torch.randn(6, 5).double()
    arguments: tuple[Any, ...] = (x,)
    if how == "packed":
        lengths = torch.tensor([2, 4, 1, 3])
        arguments = (pack_padded_sequence(x, lengths, network.batch_first, enforce_sorted=False),)
    elif how == "from a state":
        arguments = (x, _states(network, network(x)[1]))
    wanted = network(*arguments)
    rows = tapped(network)
    with calling_taps(network):
        found = network(*arguments)
    if how == "packed":
        wanted, found = ((pad_packed_sequence(one[0]), one[1]) for one in (wanted, found))
    assert_close(found, wanted)
    names = {name for name, _ in rows}
    assert names == {name for name, _ in network.named_parameters() if name.startswith("weight")}
    steps = 6 if how == "alone" else 4
    per_step = [given for name, given in rows if name == "weight_hh_l0"]
    assert len(per_step) == steps


def _states(network: Any, zero: Any) -> Any:
    made = [torch.randn_like(state) for state in (zero if isinstance(zero, tuple) else (zero,))]
    return tuple(made) if isinstance(zero, tuple) else made[0]


@torch.no_grad()
def test_hidden_states_are_the_rows_of_hidden_weights() -> None:
    torch.manual_seed(0)
    network = nn.LSTM(5, 7, num_layers=2, batch_first=True).double().eval()
    x = torch.randn(3, 4, 5).double()
    first = nn.LSTM(5, 7, batch_first=True).double()
    first.load_state_dict({k: v for k, v in network.state_dict().items() if k.endswith("l0")})
    below, above = first(x)[0], network(x)[0]
    rows = tapped(network)
    with calling_taps(network):
        network(x)
    by_name: dict[str, list[Tensor]] = {}
    for name, given in rows:
        by_name.setdefault(name, []).append(given)
    assert_close(by_name["weight_ih_l0"], [x])
    assert_close(by_name["weight_ih_l1"], [below])
    for name, outputs in (("weight_hh_l0", below), ("weight_hh_l1", above)):
        states = torch.cat([torch.zeros(3, 1, 7).double(), outputs[:, :-1]], dim=1)
        assert_close(by_name[name], states.unbind(1))


@pytest.mark.parametrize("kind", [nn.LSTMCell, nn.GRUCell, nn.RNNCell])
@torch.no_grad()
def test_cells_give_torchs_outputs(kind: Any) -> None:
    torch.manual_seed(0)
    cell, x = kind(5, 7).double().eval(), torch.randn(3, 5).double()
    wanted = cell(x, cell(x))
    rows = tapped(cell)
    with calling_taps(cell):
        assert_close(cell(x, cell(x)), wanted)
    assert [name for name, _ in rows] == ["weight_ih", "weight_hh"] * 2


ATTENTION: dict[str, dict[str, Any]] = {
    "plain": {},
    "batch first": {"batch_first": True},
    "no bias": {"bias": False},
    "other widths": {"kdim": 6, "vdim": 4, "batch_first": True},
    "more keys": {"add_bias_kv": True, "add_zero_attn": True},
}


@pytest.mark.parametrize("kind", ATTENTION)
@pytest.mark.parametrize("use", ["self", "cross", "three"])
@torch.no_grad()
def test_attention_gives_torchs_outputs(kind: str, use: str) -> None:
    torch.manual_seed(0)
    network = nn.MultiheadAttention(8, 2, **ATTENTION[kind]).double().eval()
    x = torch.randn(3, 5, 8).double()
    key, value = torch.randn(3, 5, network.kdim).double(), torch.randn(3, 5, network.vdim).double()
    given = {"self": (x, x, x), "cross": (x, key, key), "three": (x, key, value)}[use]
    if kind == "other widths":
        given = (x, key, value)
    keys = 3 if network.batch_first else 5
    mask = torch.zeros(keys, 8 - keys, dtype=torch.bool)
    mask[:, -1] = True
    wanted = network(*given, key_padding_mask=mask)
    rows = tapped(network)
    network.out_proj.register_forward_pre_hook(lambda _, args: rows.append(("out_proj", args[0])))
    with calling_taps(network):
        assert_close(network(*given, key_padding_mask=mask), wanted)
    different = {id(one): one for one in given}.values()
    first = next(given for name, given in rows if "proj_weight" in name)
    assert torch.equal(first, x if network.batch_first else x.transpose(0, 1))
    assert len(rows) == len(different) + 1 and rows[-1][0] == "out_proj"


@torch.no_grad()
def test_encoder_layers_do_not_bypass_their_parts() -> None:
    torch.manual_seed(0)
    network = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2).double().eval()
    x = torch.randn(3, 5, 8).double()
    wanted = network(x)
    rows, seen = tapped(network), []
    for layer in network.layers:
        layer.get_submodule("linear1").register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with calling_taps(network):
        assert_close(network(x), wanted)
    assert len(rows) == len(seen) == 2
    assert torch.backends.mha.get_fastpath_enabled()


class _Direct(nn.Module):
    """Reads weights in four ways, one transposed, which is no product with it, and a vector."""

    def __init__(self) -> None:
        super().__init__()
        self.a_weight, self.b_weight = nn.Parameter(torch.randn(6, 5)), nn.Parameter(torch.randn(4, 6))
        self.c_weight, self.d_weight = nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.randn(3, 2))
        self.e_weight, self.vector = nn.Parameter(torch.randn(4, 2)), nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.linear(x, self.a_weight, torch.ones(6).double())
        x = x @ self.b_weight.T
        x = (self.c_weight @ x.mT).mT @ self.d_weight
        return nn.functional.linear(input=x, weight=self.e_weight) @ self.vector


@torch.no_grad()
def test_weights_read_directly_are_seen() -> None:
    torch.manual_seed(0)
    network, x = _Direct().double().eval(), torch.randn(2, 7, 5).double()
    wanted = network(x)
    rows = tapped(network)
    with removing_taps(network), calling_taps(network):
        assert_close(network(x), wanted)
    assert [name for name, _ in rows] == ["a_weight", "b_weight", "c_weight", "e_weight"]
    assert rows[0][1] is x
    assert not list(network.children())
