"""What transformers saves of a compressed network, before and after training."""

from __future__ import annotations

import copy
import json
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import mpoc.hf  # noqa: F401  # registers
from mpoc.io.hub_directory import GUARD, GUARD_KEY
from mpoc.io.manifest import core_prefix
from mpoc.io.manifest_reader import read_manifest
from mpoc.nn.weight import CoreWeight
from mpoc.tensor_networks.factors import parse_order
from tests.support.hub_models import AUTO, IDS, Make, answer, auto, compress_once, tiny
from tests.support.marks import slow_except
from tests.support.process import run_python

transformers: Any = import_module("transformers")  # its own types are not complete


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    return compress_once(tmp_path_factory)


def config_of(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return config


def state_of(folder: Path) -> dict[str, torch.Tensor]:
    files = sorted(folder.glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def assert_layers_are_stored(folder: Path) -> None:
    """Every layer in quantization_config has its cores in the files, and no other cores are there."""
    layers = config_of(folder)["quantization_config"]["layers"]
    cores = {
        f"{core_prefix(name)}.{site}": (left, outputs, inputs, right)
        for name, layer in layers.items()
        for site, (left, outputs, inputs, right) in enumerate(
            zip(
                layer["bonds"][:-1],
                layer["output_factors"],
                layer["input_factors"],
                layer["bonds"][1:],
                strict=True,
            )
        )
    }
    found = {name: tuple(core.shape) for name, core in state_of(folder).items() if "cores." in name}
    assert found == cores and cores


@pytest.mark.parametrize("embeddings", [False, True])
@pytest.mark.parametrize("kind", slow_except(AUTO, "gpt2"))
def test_saving_again_gives_the_same_directory(
    make: Make, tmp_path: Path, kind: str, embeddings: bool
) -> None:
    small = make(kind, embeddings=embeddings)
    model = auto(kind, small.path)
    model.save_pretrained(tmp_path)
    before, after = state_of(small.path), state_of(tmp_path)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    for key in ("quantization_config", GUARD_KEY, "architectures", "model_type"):
        assert config_of(tmp_path)[key] == config_of(small.path)[key]
    assert_layers_are_stored(tmp_path)
    assert torch.equal(answer(auto(kind, tmp_path)), answer(model))


@pytest.mark.slow
def test_input_orders_raise_the_format(make: Make, tmp_path: Path) -> None:
    plain, ordered = make("gpt2"), make("bert", order=(parse_order("morton:4x8"),))
    assert config_of(plain.path)["quantization_config"]["format"] == 1
    model = auto("bert", ordered.path)
    model.save_pretrained(tmp_path)
    for folder in (ordered.path, tmp_path):
        assert config_of(folder)["quantization_config"]["format"] == 2
        assert {layer.order for layer in read_manifest(folder).layers} == {"", "morton:4x8"}
    config = config_of(tmp_path)
    config["quantization_config"]["format"] = 1  # as before there was another
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert torch.equal(answer(auto("bert", tmp_path)), answer(model))


def test_saves_in_shards(make: Make, tmp_path: Path) -> None:
    model = auto("gpt2", make("gpt2", embeddings=True).path)
    model.save_pretrained(tmp_path, max_shard_size="10KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert torch.equal(answer(auto("gpt2", tmp_path)), answer(model))


@pytest.mark.parametrize("kind", slow_except(["bert", "gpt2", "t5", "vit", "mixtral"], "gpt2"))
def test_saves_without_its_head(make: Make, tmp_path: Path, kind: str) -> None:
    base = transformers.AutoModel.from_pretrained(make(kind).path)
    base.save_pretrained(tmp_path)
    assert_layers_are_stored(tmp_path)
    assert torch.equal(answer(transformers.AutoModel.from_pretrained(tmp_path)), answer(base))
    if kind in ("bert", "vit"):  # their heads are not tied to anything
        model, info = auto(kind, tmp_path, output_loading_info=True)
        assert torch.equal(answer(model.base_model), answer(base))
        assert {name.partition(".")[0] for name in info["missing_keys"]} <= {"cls", "classifier"}


def test_saves_with_a_new_head(make: Make, tmp_path: Path) -> None:
    base = transformers.AutoModel.from_pretrained(make("gpt2").path)
    base.save_pretrained(tmp_path / "base")
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "base", pad_token_id=0, num_labels=3
    )
    model.save_pretrained(tmp_path / "model")
    assert_layers_are_stored(tmp_path / "model")
    again = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "model")
    assert torch.equal(answer(again), answer(model))


def test_saves_the_base_model(make: Make, tmp_path: Path) -> None:
    model = auto("bert", make("bert").path)
    model.bert.save_pretrained(tmp_path)
    assert config_of(tmp_path)[GUARD_KEY] == GUARD
    assert torch.equal(answer(transformers.AutoModel.from_pretrained(tmp_path)), answer(model.bert))


@pytest.mark.slow
def test_saves_in_another_dtype(make: Make, tmp_path: Path) -> None:
    model = auto("bert", make("bert").path)
    model.half().float().bfloat16().save_pretrained(tmp_path)
    again = auto("bert", tmp_path)
    assert again.dtype == torch.bfloat16
    layers = config_of(tmp_path)["quantization_config"]["layers"].values()
    assert {layer["dtype"] for layer in layers} == {"bfloat16"}
    assert torch.equal(answer(again), answer(model))


@pytest.mark.slow
def test_saves_a_deep_copy(make: Make, tmp_path: Path) -> None:
    model = copy.deepcopy(auto("mixtral", make("mixtral").path))
    model.save_pretrained(tmp_path)
    assert torch.equal(answer(auto("mixtral", tmp_path)), answer(model))


@pytest.mark.slow
def test_loading_requires_importing_mpoc_hf(make: Make, tmp_path: Path) -> None:
    auto("bert", make("bert").path).save_pretrained(tmp_path)
    script = f"""if True:
        import transformers
        for folder in ({str(make("bert").path)!r}, {str(tmp_path)!r}):
            try:
                transformers.AutoModel.from_pretrained(folder)
            except OSError as error:
                print(error)
    """
    said = run_python("-c", script)
    assert said.count("import-mpoc.hf-before-loading") == 2


def test_dense_models_have_no_guard(tmp_path: Path) -> None:
    tiny("bert").save_pretrained(tmp_path)
    assert not {GUARD_KEY, "quantization_config"} & config_of(tmp_path).keys()


class TestTraining:
    @pytest.mark.parametrize("kind", slow_except(AUTO, "bert", "gpt2"))
    def test_gradients_reach_every_core(self, make: Make, kind: str) -> None:
        model = auto(kind, make(kind, embeddings=True).path).train()
        if kind == "vit":
            logits = model(torch.randn(2, 3, 16, 16)).logits
        else:
            more = {"decoder_input_ids": IDS} if kind == "t5" else {}
            logits = model(input_ids=IDS, **more).logits
        logits.square().sum().backward()
        layers = [module for module in model.modules() if isinstance(module, CoreWeight)]
        cores = [core for layer in layers for core in layer.cores]
        assert len(cores) > 20
        unused = ("experts", "token_type")  # no token was sent to some expert; type 1 is not among the inputs
        for name, parameter in model.named_parameters():
            if "cores." in name:
                assert parameter.grad is not None, name
                assert parameter.grad.abs().sum() > 0 or any(part in name for part in unused), name

    @pytest.mark.slow
    @pytest.mark.parametrize(("kind", "embeddings"), [("bert", False), ("gpt2", True), ("mixtral", False)])
    def test_trains_with_trainer(self, make: Make, tmp_path: Path, kind: str, embeddings: bool) -> None:
        model = auto(kind, make(kind, embeddings=embeddings).path)
        assert model.hf_quantizer.is_trainable and model.hf_quantizer.is_qat_trainable
        before = {name: parameter.clone() for name, parameter in model.named_parameters()}
        arguments = transformers.TrainingArguments(
            tmp_path / "work",
            max_steps=2,
            per_device_train_batch_size=4,
            learning_rate=1e-2,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
            logging_strategy="no",
        )
        data = [{"input_ids": row, "labels": row} for row in torch.randint(2, 90, (8, 8))]
        trainer = transformers.Trainer(model, arguments, train_dataset=data)
        first = trainer.evaluate(data)["eval_loss"]
        trainer.train()
        assert trainer.evaluate(data)["eval_loss"] < first
        cores = [name for name in before if "cores." in name]
        assert not any(torch.equal(before[name], model.get_parameter(name)) for name in cores)
        trainer.save_model(tmp_path / "tuned")
        assert_layers_are_stored(tmp_path / "tuned")
        assert config_of(tmp_path / "tuned")[GUARD_KEY] == GUARD
        assert torch.equal(answer(auto(kind, tmp_path / "tuned")), answer(model))
