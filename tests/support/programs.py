"""Exported programs run, and compared with the network that they were made of."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mpoc
from mpoc.models.export import export_network, parse_input_spec


def run_onnx(path: Path, inputs: tuple[Tensor, ...], decoded: bool = False) -> list[Tensor]:
    """On one thread of the CPU; ``decoded``: codes become floats when the session is made."""
    onnxruntime: Any = pytest.importorskip("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.add_session_config_entry("session.disable_quant_qdq", str(int(decoded)))
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    named = {node.name: x.numpy() for node, x in zip(session.get_inputs(), inputs, strict=True)}
    return [torch.from_numpy(y) for y in session.run(None, named)]


def assert_exports_alike(path: Path, network: Callable[[], nn.Module], folder: Path) -> None:
    """A compressed file of ``network``, a function of a test module whose modules take 24 features."""
    pytest.importorskip("onnxruntime")
    (folder / "nets.py").write_text(f"from {network.__module__} import {network.__name__}")
    program, arch = folder / "p.onnx", f"{folder / 'nets.py'}:{network.__name__}"
    export_network(path, {"onnx": program}, [parse_input_spec("1x24")], arch)
    x = torch.randn(5, 24)
    (found,) = run_onnx(program, (x,))
    expected = mpoc.load(path, network())(x)
    torch.testing.assert_close(found, expected.detach(), rtol=1e-4, atol=1e-4)
