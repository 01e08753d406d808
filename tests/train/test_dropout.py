"""Dropout set everywhere it is kept."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import pytest
import torch
from torch import nn

from mpoc.train.engine import set_dropout
from tests.compression.calibrate.networks import encoder, texts

transformers: Any = import_module("transformers")


def varies(network: nn.Module, **given: torch.Tensor) -> bool:
    network.train()
    with torch.no_grad():
        first, second = (network(**given) for _ in range(2))
    value = getattr(first, "last_hidden_state", first)
    return not torch.equal(value, getattr(second, "last_hidden_state", second))


def test_removes_all_dropout_from_a_transformer() -> None:
    network = encoder(2)
    assert varies(network, **texts())
    set_dropout(network, 0.0)
    assert not varies(network, **texts())


def test_removes_dropout_given_as_numbers() -> None:
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        attention_dropout=0.4,
    )  # fmt: skip
    network = transformers.LlamaModel(config)
    assert varies(network, **texts())
    set_dropout(network, 0.0)
    assert not varies(network, **texts())


@pytest.mark.parametrize("probability", [0.0, 0.5])
def test_sets_dropout_in_every_module(probability: float) -> None:
    network = nn.Sequential(nn.Dropout(0.3), nn.Dropout2d(0.2), nn.TransformerEncoderLayer(8, 2, dropout=0.1))
    set_dropout(network, probability)
    found = [m.p for m in network.modules() if hasattr(m, "p")]
    assert set(found) == {probability}
    assert {m.dropout for m in network.modules() if isinstance(m, nn.MultiheadAttention)} == {probability}
