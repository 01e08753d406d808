"""mpoc: compress trained networks with matrix product operators and other tensor networks.

    report = mpoc.compress(model, bond=4)                  # in memory, in place
    mpoc.save(model, "model.mpo.safetensors")              # as a file that every command reads
    model = mpoc.load("model.mpo.safetensors", model)      # into the dense network
    model = mpoc.load("bert-mpo")                          # where the file or directory names its network

For files there are :func:`compress_checkpoint`, :func:`expand_checkpoint`, :func:`read_report`,
:func:`evaluate`, :func:`finetune` and :func:`export`. A name is imported when it is first used, so that
``import mpoc`` and :func:`read_report` do not import torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mpoc.compression.expand import expand_checkpoint
    from mpoc.compression.in_memory import compress
    from mpoc.compression.pipeline import compress_checkpoint
    from mpoc.compression.recipe import LayerRule, Recipe
    from mpoc.errors import MpocError, UsageError
    from mpoc.models.loading import load
    from mpoc.models.saving import save
    from mpoc.reporting.summary import Report, read_report
    from mpoc.train.evaluate_file import FileEvaluation
    from mpoc.train.finetune import Finetuned
    from mpoc.train.settings import DataOptions, Settings

__version__ = "0.15.0"
__all__ = [
    "DataOptions",
    "LayerRule",
    "MpocError",
    "Recipe",
    "Report",
    "Settings",
    "UsageError",
    "__version__",
    "compress",
    "compress_checkpoint",
    "evaluate",
    "expand_checkpoint",
    "export",
    "finetune",
    "load",
    "read_report",
    "save",
]
_HOMES = {
    "DataOptions": "mpoc.train.settings",
    "LayerRule": "mpoc.compression.recipe",
    "MpocError": "mpoc.errors",
    "Recipe": "mpoc.compression.recipe",
    "Report": "mpoc.reporting.summary",
    "Settings": "mpoc.train.settings",
    "UsageError": "mpoc.errors",
    "compress": "mpoc.compression.in_memory",
    "compress_checkpoint": "mpoc.compression.pipeline",
    "expand_checkpoint": "mpoc.compression.expand",
    "load": "mpoc.models.loading",
    "read_report": "mpoc.reporting.summary",
    "save": "mpoc.models.saving",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'mpoc' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def evaluate(
    path: str | PathLike[str],
    data: str | PathLike[str] | DataOptions | None = None,
    *,
    arch: str | None = None,
    split: str | None = None,
    task: str | None = None,
    reference: str | PathLike[str] | None = None,
    latency: bool = False,
    batch: int = 256,
    device: str = "auto",
    say: Callable[[str], None] | None = None,
) -> FileEvaluation:
    """Measure a network, dense or compressed, on a data set.

        >>> arch = "mpoc.demo.network:DigitsNet"
        >>> result = mpoc.evaluate("digits-cnn.mpo.safetensors", "digits.npz", arch=arch)
        >>> sorted(result.scores)
        ['accuracy', 'loss']
        >>> result.split, result.examples
        ('test', 539)

    Args:
        path: a compressed file or directory, or a dense checkpoint.
        data: a file or folder of examples, or :class:`DataOptions` with its preprocessing; None: examples
            that are made for the network, to compare it with ``reference`` on.
        arch: the network: one of the zoo, as ``"resnet:depth=56"``, or ``"file.py:function"`` or
            ``"package.module:function"``, which is run; required if the file does not name it.
        split: ``"train"``, ``"validation"`` or ``"test"``; None: test, else validation, else train.
        task: ``"classification"``, ``"regression"``, ``"causal-lm"`` or ``"masked-lm"``; None: inferred from
            data and network.
        reference: measure the similarity to this network instead, without labels.
        latency: also measure the time of a call, for one example and for ``batch``.
        batch: number of examples in a call.
        device: ``"auto"``, ``"cpu"``, ``"cuda"``, ``"cuda:1"``, ….
        say: called with messages about what is read and chosen.

    Returns:
        The result: ``scores`` by name (accuracies in per cent), ``metric`` (the score that counts),
        ``examples``, ``rate`` (examples per second) and ``latencies`` (milliseconds).

    Raises:
        UsageError: no network is known, there is no such split, or network and data do not fit.
        MpocError: the data or the checkpoint are damaged.
    """
    from mpoc.train.evaluate_file import evaluate_file
    from mpoc.train.settings import EvaluationRequest

    request = EvaluationRequest(
        Path(path),
        _data_options(data),
        split=split,
        arch=arch,
        task=task,
        reference=None if reference is None else Path(reference),
        latency=latency,
        batch=batch,
        device=device,
    )
    return evaluate_file(request, say or _say_nothing)


def finetune(
    path: str | PathLike[str],
    data: str | PathLike[str] | DataOptions | None = None,
    *,
    output: str | PathLike[str] | None = None,
    arch: str | None = None,
    task: str | None = None,
    teacher: str | PathLike[str] | None = None,
    settings: Settings | None = None,
    epochs: float | None = None,
    steps: int | None = None,
    batch: int | None = None,
    lr: float | None = None,
    seed: int | None = None,
    device: str = "auto",
    force: bool = False,
    resume: bool = False,
    say: Callable[[str], None] | None = None,
) -> Finetuned:
    """Train all parameters of a network, cores included, and write it as a file of the same kind.

        >>> arch = "mpoc.demo.network:DigitsNet"
        >>> tuned = mpoc.finetune("digits-cnn.mpo.safetensors", "digits.npz", arch=arch, steps=3, batch=16)
        >>> str(tuned.output)
        'digits-cnn.tuned.safetensors'
        >>> tuned.training["steps"]
        3

    Args:
        path: a compressed file or directory, or a dense checkpoint.
        data: a file or folder of examples with a training split, or :class:`DataOptions`; None: examples
            that are made for the network, to learn the teacher's outputs on.
        output: a file or directory; None: ``<name>.tuned.safetensors`` or ``<name>-tuned`` in the current
            directory. A training log (``.jsonl``) is written beside it.
        arch: the network, as :func:`evaluate` takes it.
        task: as :func:`evaluate` takes it, or ``"distillation"``; None: inferred from data and network.
        teacher: learn the outputs of this network instead of labels (distillation).
        settings: all settings of the training; None: the defaults. The next five arguments override them.
        epochs: passes over the training split.
        steps: optimiser steps, instead of epochs.
        batch: number of examples per step.
        lr: peak learning rate.
        seed: seed of everything that training draws.
        device: ``"auto"``, ``"cpu"``, ``"cuda"``, ``"cuda:1"``, ….
        force: replace an existing output, log and checkpoint.
        resume: continue an interrupted training from the checkpoint beside the output.
        say: called with messages about what is read and chosen.

    Returns:
        The result: ``output``, ``training`` (settings, evaluations and scores as the file keeps them),
        ``rate`` (examples per second) and ``manifest``.

    Raises:
        UsageError: an output exists, options do not fit, or the checkpoint is of another training.
        MpocError: the data or the checkpoint are damaged, the loss is not finite, or a package is missing.
        OSError: reading or writing failed.
    """
    from dataclasses import replace

    from mpoc.train.finetune import finetune as train
    from mpoc.train.settings import FinetuneRequest, Settings

    given = {"epochs": epochs, "steps": steps, "batch": batch, "lr": lr, "seed": seed}
    chosen: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    request = FinetuneRequest(
        Path(path),
        _data_options(data),
        settings=replace(settings or Settings(), **chosen),
        output=None if output is None else Path(output),
        arch=arch,
        task=task,
        teacher=None if teacher is None else Path(teacher),
        device=device,
        force=force,
        resume=resume,
    )
    return train(request, say or _say_nothing)


def export(
    path: str | PathLike[str],
    *,
    onnx: str | PathLike[str] | None = None,
    pt2: str | PathLike[str] | None = None,
    inputs: Sequence[Sequence[int] | str] = (),
    arch: str | None = None,
    force: bool = False,
) -> None:
    """Write a compressed network as a program that runs without mpoc; it keeps the cores.

        >>> arch = "mpoc.demo.network:DigitsNet"
        >>> mpoc.export("digits-cnn.mpo.safetensors", pt2="digits.pt2", inputs=[(1, 1, 8, 8)], arch=arch)
        >>> program = torch.export.load("digits.pt2").module()
        >>> program(torch.rand(5, 1, 8, 8)).shape
        torch.Size([5, 10])

    Args:
        path: a compressed file or directory.
        onnx: file to write ONNX to, for onnxruntime and others.
        pt2: file to write a program for ``torch.export.load`` to.
        inputs: shapes of the inputs with their batch axis, as (1, 3, 32, 32), in order; as text where the
            dtype is not the network's, as ``"1x128:int64"``. Empty: what a network of the zoo takes. The
            batch size stays free, all other sizes are fixed.
        arch: the network, as :func:`evaluate` takes it.
        force: replace existing files.

    Raises:
        UsageError: no file is asked for, a file exists, or the network does not take such inputs.
        MpocError: a package is missing, the file does not fit the network, or it cannot be traced.
    """
    from mpoc.models.export import export_network, parse_input_spec

    files = {kind: Path(file) for kind, file in (("onnx", onnx), ("pt2", pt2)) if file is not None}
    texts = [shape if isinstance(shape, str) else "x".join(map(str, shape)) for shape in inputs]
    export_network(Path(path), files, [parse_input_spec(text) for text in texts], arch, force)


def _data_options(data: str | PathLike[str] | DataOptions | None) -> DataOptions:
    from mpoc.train.settings import DataOptions

    return data if isinstance(data, DataOptions) else DataOptions(None if data is None else Path(data))


def _say_nothing(text: str) -> None:
    """Drop a message."""
