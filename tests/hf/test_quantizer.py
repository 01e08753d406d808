"""Compressed directories through transformers' own ``from_pretrained``."""

from __future__ import annotations

import json
import shutil
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import mpoc.hf  # noqa: F401  # registers
from mpoc.compression.pipeline import compress_checkpoint
from mpoc.compression.recipe import make_recipe
from mpoc.errors import MpocError
from mpoc.io.manifest_reader import read_manifest
from mpoc.models.loading import load, open_model
from mpoc.nn import MPOEmbedding, MPOLinear
from mpoc.tensor_networks.forms.form import Form
from tests.robustness.transformers_classes import outcome
from tests.support.hub_models import (
    AUTO,
    IDS,
    Compressed,
    Make,
    answer,
    auto,
    compress,
    compress_once,
    compress_saved,
    tiny,
)
from tests.support.marks import slow_except

transformers: Any = import_module("transformers")  # its own types are not complete
CANNOT_TAKE = ("vit", "mixtral")  # their names or shapes on disk are not those of the network


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    return compress_once(tmp_path_factory)


@pytest.mark.parametrize("embeddings", [False, True])
@pytest.mark.parametrize("kind", slow_except(AUTO, "gpt2"))
class TestEveryArchitecture:
    @pytest.mark.slow
    def test_computes_like_the_expanded_directory(self, make: Make, kind: str, embeddings: bool) -> None:
        small = make(kind, embeddings=embeddings)
        logits = answer(auto(kind, small.path))
        assert logits.std() > 1e-2
        torch.testing.assert_close(logits, answer(auto(kind, small.expanded)), rtol=0, atol=1e-5)
        assert (logits - answer(tiny(kind))).abs().max() > 1e-3  # it is the compressed network

    def test_matches_mpoc_load_bit_by_bit(self, make: Make, kind: str, embeddings: bool) -> None:
        small = make(kind, embeddings=embeddings)
        if kind in CANNOT_TAKE:
            pytest.skip("mpoc.load does not rename or stack tensors")
        assert torch.equal(
            answer(auto(kind, small.path)), answer(load(small.path, tiny(kind), weights="cores"))
        )

    def test_holds_the_cores_and_nothing_dense_beside_them(
        self, make: Make, kind: str, embeddings: bool
    ) -> None:
        small = make(kind, embeddings=embeddings)
        model, info = auto(kind, small.path, output_loading_info=True)
        assert not any(info.values()), info
        assert model.num_parameters() == read_manifest(small.path).num_parameters
        assert all(parameter.requires_grad for parameter in model.parameters())

    def test_builds_no_dense_weight_while_loading(
        self, make: Make, kind: str, embeddings: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        small = make(kind, embeddings=embeddings)
        monkeypatch.delattr(Form, "to_weight")
        auto(kind, small.path)

    def test_loads_without_its_head(self, make: Make, kind: str, embeddings: bool) -> None:
        small = make(kind, embeddings=embeddings)
        model = transformers.AutoModel.from_pretrained(small.path)
        dense = transformers.AutoModel.from_pretrained(small.expanded)
        torch.testing.assert_close(answer(model), answer(dense), rtol=0, atol=1e-5)


class TestHeads:
    @pytest.fixture
    def classifier(self, tmp_path: Path) -> Compressed:
        config = tiny("bert").config
        config.num_labels = 16
        return compress(transformers.BertForSequenceClassification(config), tmp_path / "classifier")

    def test_loads_with_and_without_its_head(self, classifier: Compressed) -> None:
        names = json.loads((classifier.path / "config.json").read_text())["quantization_config"]["layers"]
        assert "classifier.weight" in names and "bert.pooler.dense.weight" in names
        model = transformers.AutoModelForSequenceClassification.from_pretrained(classifier.path)
        dense = transformers.BertForSequenceClassification(model.config)
        assert torch.equal(answer(model), answer(load(classifier.path, dense, weights="cores")))
        base, info = transformers.AutoModel.from_pretrained(classifier.path, output_loading_info=True)
        assert torch.equal(answer(base), answer(model.bert))
        assert not info["missing_keys"]
        assert {name.partition(".")[0] for name in info["unexpected_keys"]} == {"classifier"}

    def test_headless_directory_gets_a_new_head(self, tmp_path: Path) -> None:
        small = compress(tiny("bert").bert, tmp_path)
        base = transformers.AutoModel.from_pretrained(small.path)
        model, info = transformers.AutoModelForSequenceClassification.from_pretrained(
            small.path, output_loading_info=True
        )
        assert torch.equal(answer(base), answer(model.bert))
        new = {"classifier.weight", "classifier.bias", "bert.pooler.dense.weight", "bert.pooler.dense.bias"}
        assert info["missing_keys"] == new
        assert isinstance(model.classifier, nn.Linear) and model.classifier.weight.std() > 0

    def test_reinitialises_a_head_of_another_size_where_allowed(
        self, classifier: Compressed, tmp_path: Path
    ) -> None:
        auto_class = transformers.AutoModelForSequenceClassification
        with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
            auto_class.from_pretrained(classifier.path, num_labels=3)
        model = auto_class.from_pretrained(classifier.path, num_labels=3, ignore_mismatched_sizes=True)
        assert type(model.classifier) is nn.Linear and model.classifier.weight.shape == (3, 32)
        model.save_pretrained(tmp_path / "saved")
        assert torch.equal(answer(auto_class.from_pretrained(tmp_path / "saved")), answer(model))


@pytest.mark.slow
class TestTiedHeads:
    @pytest.mark.parametrize("kind", ["gpt2", "t5", "bert"])
    def test_head_shares_the_cores_of_the_embedding(self, make: Make, kind: str) -> None:
        model = auto(kind, make(kind, embeddings=True).path)
        for _ in range(2):
            embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
            assert type(embedding) is MPOEmbedding and type(head) is MPOLinear
            assert [id(core) for core in embedding.cores] == [id(core) for core in head.cores]
            model.tie_weights()

    def test_head_with_its_own_cores_is_not_tied(self, make: Make) -> None:
        model = auto("llama", make("llama", embeddings=True).path)
        assert model.lm_head.cores[0] is not model.model.embed_tokens.cores[0]

    @pytest.mark.parametrize("embeddings", [False, True])
    @pytest.mark.parametrize("equal", [False, True])
    def test_a_stored_head_is_tied_where_it_is_a_copy(
        self, tmp_path: Path, embeddings: bool, equal: bool
    ) -> None:
        tiny("gpt2").save_pretrained(tmp_path / "original")
        file = tmp_path / "original" / "model.safetensors"
        state = load_file(file)
        state["lm_head.weight"] = state["transformer.wte.weight"] * (1 if equal else 2)
        save_file(state, file, {"format": "pt"})
        small = compress_saved(tmp_path, embeddings=embeddings)
        first = min(read_manifest(small.path).tied.values(), default=None)
        assert (first is not None) is equal
        model = auto("gpt2", small.path)
        assert (type(model.lm_head) is MPOLinear) is (embeddings or not equal)
        assert (type(model.transformer.wte) is MPOEmbedding) is embeddings
        if equal:
            own, other = (list(part.parameters()) for part in (model.lm_head, model.transformer.wte))
            assert all(one is two for one, two in zip(own, other, strict=True))
        torch.testing.assert_close(answer(model), answer(auto("gpt2", small.expanded)), rtol=0, atol=1e-5)

    @pytest.mark.parametrize("kept", [("lm_head",), ("encoder.embed_tokens",), ("shared", "lm_head")])
    @pytest.mark.parametrize("embeddings", [False, True])
    def test_any_names_of_a_tied_weight_may_be_stored(
        self, tmp_path: Path, embeddings: bool, kept: tuple[str, ...]
    ) -> None:
        tiny("t5").save_pretrained(tmp_path / "original")
        file = tmp_path / "original" / "model.safetensors"
        state = load_file(file)
        weight = state.pop("shared.weight")
        save_file(state | {f"{name}.weight": weight.clone() for name in kept}, file, {"format": "pt"})
        small = compress_saved(tmp_path, embeddings=embeddings)
        dense, model = answer(auto("t5", small.expanded)), auto("t5", small.path)
        torch.testing.assert_close(answer(model), dense, rtol=0, atol=1e-5)
        torch.testing.assert_close(answer(load(small.path, tiny("t5"))), dense, rtol=0, atol=1e-5)
        model.save_pretrained(tmp_path / "again")
        torch.testing.assert_close(answer(auto("t5", tmp_path / "again")), dense, rtol=0, atol=1e-5)


@pytest.mark.slow
class TestExperts:
    def test_mixes_dense_and_compressed_experts(self, make: Make, tmp_path: Path) -> None:
        exclude = ("*.0.*.experts.2.w1", "*.experts.3.*")
        small = make("mixtral", exclude=exclude)
        model = auto("mixtral", small.path)
        experts = model.model.layers[0].mlp.experts
        assert experts.gate_up_proj.shape == (4, 96, 32)
        assert type(experts.get_submodule("2.w1")) is nn.Linear
        assert type(experts.get_submodule("2.w3")) is MPOLinear
        torch.testing.assert_close(answer(model), answer(auto("mixtral", small.expanded)), rtol=0, atol=1e-5)
        model.save_pretrained(tmp_path)
        before, after = (load_file(path / "model.safetensors") for path in (small.path, tmp_path))
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)

    def test_loads_experts_stacked_on_disk(self, tmp_path: Path) -> None:
        tiny("mixtral").save_pretrained(tmp_path / "original", save_original_format=False)
        small = compress_saved(tmp_path)
        assert "experts" in {layer.kind for layer in read_manifest(small.path).replaced}
        model = auto("mixtral", small.path)
        torch.testing.assert_close(answer(model), answer(auto("mixtral", small.expanded)), rtol=0, atol=1e-5)
        assert torch.equal(answer(model), answer(load(small.path, tiny("mixtral"), weights="cores")))

    @pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
    def test_every_expert_implementation_agrees(self, make: Make, implementation: str) -> None:
        path = make("mixtral").path
        model = auto("mixtral", path, experts_implementation=implementation)
        torch.testing.assert_close(answer(model), answer(auto("mixtral", path)), rtol=0, atol=1e-5)

    def test_leaves_alone_what_is_split_while_loading(self, tmp_path: Path) -> None:
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
        model = transformers.NomicBertModel(transformers.NomicBertConfig(vocab_size=99, **sizes)).eval()
        small = compress(model, tmp_path, bond=99, allow_growth=True)
        left = read_manifest(small.path).left_alone
        (reason,) = (why for name, why in left.items() if "Wqkv" in name)
        assert reason == "converted by transformers while loading"
        torch.testing.assert_close(
            answer(transformers.AutoModel.from_pretrained(small.path)), answer(model), rtol=0, atol=1e-5
        )

    def test_rejects_cores_of_what_is_split_while_loading(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
        config = transformers.NomicBertConfig(vocab_size=99, **sizes)
        monkeypatch.setattr("mpoc.compression.source.with_config", lambda checkpoint: checkpoint)
        small = compress(transformers.NomicBertModel(config), tmp_path)  # as where transformers is missing
        with pytest.raises(MpocError, match=r"k_proj, .* of '.*Wqkv.weight'") as caught:
            transformers.AutoModel.from_pretrained(small.path)
        assert caught.value.hint == f"mpoc expand {small.path}"
        assert not hasattr(transformers.AutoModel.from_pretrained(small.expanded), "hf_quantizer")


class TestFilling:
    """Every tensor of a directory's network comes from its files, or the network is refused."""

    def test_computes_buffers_beside_an_embedding(self, tmp_path: Path) -> None:
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "head_dim": 8}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
        config = transformers.Gemma3TextConfig(vocab_size=99, pad_token_id=0, **sizes, **heads)
        model = transformers.Gemma3ForCausalLM(config).eval()
        small = compress(model, tmp_path, embeddings=True, bond=99, allow_growth=True)
        torch.testing.assert_close(answer(load(small.path)), answer(model), rtol=1e-5, atol=1e-5)

    def test_takes_the_class_that_the_tensors_fill(self, tmp_path: Path) -> None:
        tiny("bert").bert.save_pretrained(tmp_path / "original")  # without the pooler
        change(tmp_path / "original", architectures=["BertForSequenceClassification"])
        with pytest.raises(MpocError, match=r"BertForSequenceClassification needs tensors .*: bert\.pooler"):
            open_model(tmp_path / "original", None)
        transformers.BertModel(tiny("bert").config).save_pretrained(tmp_path / "original")
        change(tmp_path / "original", architectures=["BertForMaskedLM"])
        recipe = make_recipe(None, {"bond": 6})
        notes = compress_checkpoint(tmp_path / "original", tmp_path / "compressed", recipe).notes
        said = "config.json names BertForMaskedLM, which the tensors do not fill: taken as BertModel"
        assert said in notes and said in open_model(tmp_path / "compressed", None).notes
        assert type(load(tmp_path / "compressed")).__name__ == "BertModel"

    @pytest.mark.parametrize(
        ("changes", "said"),
        [
            ({"num_hidden_layers": 3}, r"needs tensors that are not stored: model\.layers\.2.* more"),
            ({"vocab_size": 200}, r"tensor '.*' is \(97, 32\), \(200, 32\) in a LlamaForCausalLM"),
            ({"architectures": ["Trainer"]}, r"config.json names Trainer, which is no network"),
            ({"num_attention_heads": 5}, r"transformers cannot make this network: .*\.py, line \d+: "),
        ],
    )
    def test_refuses_what_would_stay_random_in_one_message(
        self, make: Make, tmp_path: Path, changes: dict[str, Any], said: str
    ) -> None:
        shutil.copytree(make("llama").path, tmp_path / "changed")
        change(tmp_path / "changed", **changes)
        with pytest.raises(MpocError, match=said):
            load(tmp_path / "changed")

    def test_kinds_come_from_the_modules(self, tmp_path: Path) -> None:
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
        config = transformers.ElectraConfig(vocab_size=99, embedding_size=24, **sizes)
        small = compress(transformers.ElectraModel(config), tmp_path)
        kinds = {layer.layer: layer.kind for layer in read_manifest(small.path).layers}
        assert kinds["embeddings_project"] == "linear"


def change(folder: Path, **values: Any) -> None:
    """Change entries of a directory's config.json."""
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


@pytest.mark.slow
class TestWaysToLoad:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("kind", slow_except(AUTO, "bert", "gpt2"))
    def test_loads_in_half_precision(self, make: Make, kind: str, dtype: torch.dtype) -> None:
        small = make(kind, embeddings=True)
        model, dense = auto(kind, small.path, dtype=dtype), auto(kind, small.expanded, dtype=dtype)
        assert model.dtype == dtype
        assert {p.dtype for p in model.parameters()} == {p.dtype for p in dense.parameters()}
        torch.testing.assert_close(answer(model).float(), answer(dense).float(), rtol=0.05, atol=0.05)

    def test_loads_cores_stored_in_half_precision(self, make: Make) -> None:
        small = make("llama", dtype="bfloat16")
        model = auto("llama", small.path, dtype=torch.float32)
        assert model.model.layers[0].mlp.up_proj.cores[0].dtype == torch.float32
        assert torch.equal(answer(model), answer(load(small.path, tiny("llama"), weights="cores")))

    @pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}])
    def test_accepts_a_device_map(self, make: Make, device_map: Any) -> None:
        for kind, embeddings in (("gpt2", True), ("mixtral", False)):
            small = make(kind, embeddings=embeddings)
            model = auto(kind, small.path, device_map=device_map).cpu()
            assert torch.equal(answer(model), answer(auto(kind, small.path)))

    def test_rejects_offloading(self, make: Make, tmp_path: Path) -> None:
        device_map = {"transformer": "cpu", "transformer.h.1": "disk", "lm_head": "cpu"}
        with pytest.raises(MpocError, match="cannot be offloaded"):
            auto("gpt2", make("gpt2").path, device_map=device_map, offload_folder=tmp_path)

    @pytest.mark.slow
    @pytest.mark.parametrize("kind", ["bert", "mixtral"])
    def test_loads_shards(self, make: Make, kind: str) -> None:
        shards = make(kind, max_shard_size=20_000)
        assert len(list(shards.path.glob("*.safetensors"))) > 2
        assert torch.equal(answer(auto(kind, shards.path)), answer(auto(kind, make(kind).path)))

    def test_ignores_position_ids_of_older_checkpoints(self, make: Make, tmp_path: Path) -> None:
        tiny("bert").save_pretrained(tmp_path / "original")
        file = tmp_path / "original" / "model.safetensors"
        positions = {"bert.embeddings.position_ids": torch.arange(32)[None]}
        save_file(load_file(file) | positions, file, {"format": "pt"})
        small = compress_saved(tmp_path)
        model, info = auto("bert", small.path, output_loading_info=True)
        assert not any(info.values()), info
        assert torch.equal(answer(model), answer(auto("bert", make("bert").path)))
        assert torch.equal(answer(model), answer(load(small.path, tiny("bert"), weights="cores")))

    @pytest.mark.parametrize("kind", ["gpt2", "llama", "t5"])
    def test_generates(self, make: Make, kind: str) -> None:
        small = make(kind, embeddings=True)
        mask = torch.ones_like(IDS)
        options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "attention_mask": mask}
        model, dense = auto(kind, small.path), auto(kind, small.expanded)
        tokens = model.generate(IDS, **options)
        assert tokens.shape[1] > 1
        assert torch.equal(tokens, dense.generate(IDS, **options))


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_rejects_resizing_cores(make: Make, kind: str) -> None:
    model = auto(kind, make(kind, embeddings=True).path)
    with pytest.raises(AttributeError, match="make it dense first"):
        model.resize_token_embeddings(110)
    assert model.get_input_embeddings().num_embeddings == len(model.get_input_embeddings().weight)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("LlamaForCausalLM", "causal-lm"),
        ("GraniteMoeForCausalLM", "causal-lm"),
        ("DeepseekV3ForCausalLM", "causal-lm"),
        ("Gemma3ForCausalLM", "causal-lm"),
        ("CTRLLMHeadModel", "causal-lm"),
        ("NomicBertForMaskedLM", "encoder"),
        ("YosoForMaskedLM", "encoder"),
        ("T5GemmaForConditionalGeneration", "encoder-decoder"),
        ("ViTForImageClassification", "vision"),
        ("Data2VecAudioForSequenceClassification", "audio"),
    ],
)
def test_classes_of_transformers(name: str, kind: str) -> None:
    assert outcome(name, kind) == ("right", "")
