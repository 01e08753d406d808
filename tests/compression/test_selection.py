"""Which tensors are linear maps, and the reason for every other one."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mpoc.compression.selection import LinearMap, Selection, matches, select
from mpoc.errors import UsageError
from mpoc.io.checkpoint import Checkpoint
from mpoc.io.safetensors_header import TensorInfo

SOME = settings(max_examples=100, deadline=None, derandomize=True)

NAMES = {
    "conv1.weight": (16, 3, 3, 3),
    "bn1.weight": (16,),
    "bn1.running_mean": (16,),
    "layer1.0.conv1.weight": (16, 16, 3, 3),
    "layer1.0.conv2.weight": (16, 16, 3, 3),
    "wte.weight": (1009, 32),
    "fc.weight": (10, 64),
    "fc.bias": (10,),
}


def checkpoint(
    shapes: dict[str, tuple[int, ...]],
    dtypes: dict[str, str] | None = None,
    config: dict[str, Any] | None = None,
    tied: dict[str, str] | None = None,
) -> Checkpoint:
    dtypes = dtypes or {}
    infos = {name: TensorInfo(name, dtypes.get(name, "float32"), shape) for name, shape in shapes.items()}
    return Checkpoint(Path("m.pt"), infos, tied or {}, lambda name: torch.zeros(0), {}, config)


def names(selection: Selection) -> list[str]:
    return [map.layer for map in selection.chosen]


def only(name: str, shape: tuple[int, ...], config: dict[str, Any] | None = None) -> LinearMap:
    """How the one tensor is classified."""
    (found,) = select(checkpoint({name: shape}, config=config), embeddings=True).chosen
    return found


@pytest.mark.parametrize(
    ("name", "shape", "kind"),
    [
        ("fc.weight", (10, 64), "linear"),
        ("weight", (10, 64), "linear"),
        ("attn.in_proj_weight", (96, 32), "linear"),
        ("lstm.weight_ih_l0", (256, 64), "linear"),
        ("lstm.weight_hh_l1_reverse", (256, 64), "linear"),
        ("time_embedding.linear_1.weight", (320, 1280), "linear"),
        ("conv.weight", (8, 4, 3), "conv1d"),
        ("patch_embed.proj.weight", (768, 3, 16, 16), "conv2d"),
        ("conv.weight", (8, 1, 3, 3, 3), "conv3d"),
        ("transformer.wte.weight", (50257, 768), "embedding"),
        ("model.embed_tokens.weight", (50257, 768), "embedding"),
        ("bert.embeddings.word_embeddings.weight", (30522, 384), "embedding"),
        ("embedding.weight", (1009, 32), "embedding"),
        ("shared.weight", (32128, 512), "embedding"),
        ("block.0.relative_attention_bias.weight", (32, 8), "embedding"),
        ("src_embed.0.lut.weight", (1009, 32), "embedding"),
        ("w.weight", (1009, 32), "embedding"),
        ("mlp.experts.gate_up_proj", (8, 64, 32), "experts"),
        ("mlp.experts.down_proj.weight", (8, 32, 64), "experts"),
    ],
)
def test_infers_kinds_from_names_and_shapes(name: str, shape: tuple[int, ...], kind: str) -> None:
    found = only(name, shape)
    assert found == LinearMap(name, kind, shape, "float32", False)
    assert found.layer == name.removesuffix(".weight")


@pytest.mark.parametrize(
    ("name", "shape", "dtype", "reason"),
    [
        ("fc.bias", (10,), "float32", "vector (bias, norm)"),
        ("scale.weight", (), "float32", "vector (bias, norm)"),
        ("pos_embed", (1, 197, 768), "float32", "not recognised as a linear map"),
        ("conv.filters", (8, 8, 3, 3), "float32", "not recognised as a linear map"),
        ("mlp.experts.gate_up_proj_bias", (8, 2, 64), "float32", "not recognised as a linear map"),
        ("table.weight", (2, 2, 2, 2, 2, 2), "float32", "not recognised as a linear map"),
        ("fc.weight", (10, 64), "int8", "not a floating dtype (int8)"),
        ("fc.weight", (10, 64), "complex64", "not a floating dtype (complex64)"),
        ("steps", (), "int64", "not a floating dtype (int64)"),
        ("fc.weight", (10, 64), "float8_e4m3fn", "already quantised (float8_e4m3fn)"),
        ("fc.weight", (0, 64), "float32", "empty"),
    ],
)
def test_gives_reasons_for_skipped_tensors(
    name: str, shape: tuple[int, ...], dtype: str, reason: str
) -> None:
    selection = select(checkpoint({name: shape}, {name: dtype}))
    assert (selection.chosen, selection.left) == ([], {name: reason})


ROUTER, EMA = "router of experts", "moving average of another weight"
DIVIDED = "the network divides it in place"
RECOMPUTED, NORM = "the network recomputes its weight", "it scales elementwise"


@pytest.mark.parametrize(
    ("name", "beside", "reason"),
    [
        ("mlp.router.weight", {}, ROUTER),
        ("h.0.ffn.router.classifier.weight", {}, ROUTER),
        ("mlp.gate.wg.weight", {}, ROUTER),
        ("mlp.shared_expert_gate.weight", {}, ROUTER),
        ("moe.gate.weight", {"moe.experts.0.w1.weight": (8, 8)}, ROUTER),
        ("gates.1.weight", {"experts.0.0.weight": (8, 8)}, ROUTER),
        ("attention.output.weight", {"attention.receptance.weight": (8, 8)}, DIVIDED),
        ("feed_forward.value.weight", {"feed_forward.receptance.weight": (8, 8)}, DIVIDED),
        ("attention.value.weight", {"attention.receptance.weight": (8, 8)}, ""),
        ("attention.output.weight", {"attention.query.weight": (8, 8)}, ""),
        ("moe.router_weight", {}, ROUTER),
        ("moe.gate_weight", {"moe.experts.0.w1.weight": (8, 8)}, ROUTER),
        ("moe.gate_logits.weight", {"moe.experts.0.w1.weight": (8, 8)}, ROUTER),
        ("moe.routing.weight", {"moe.experts.0.w1.weight": (8, 8)}, ROUTER),
        ("mlp.gate_proj.weight", {"mlp.experts.0.w1.weight": (8, 8)}, ""),
        ("gate.weight", {"up.weight": (8, 8)}, ""),
        ("mlp.shared_experts.gate_proj.weight", {"mlp.experts.0.w1.weight": (8, 8)}, ""),
        ("norm.weight", {}, NORM),
        ("self_attn.q_norm.weight", {}, NORM),
        ("encoder.layer_norm.weight", {}, NORM),
        ("0.weight", {"0.bias": (8, 6)}, NORM),
        ("0.weight", {"0.bias": (8,)}, ""),
        ("norm1.linear.weight", {}, ""),
        ("fc.weight", {"fc.weight_u": (8,), "fc.weight_orig": (8, 6)}, RECOMPUTED),
        ("fc.weight", {"fc.weight_g": (8, 1), "fc.weight_v": (8, 6)}, RECOMPUTED),
        ("fc.weight", {"fc.weight_fake_quant.scale": (1,)}, RECOMPUTED),
        ("lstm.weight_hh_l0", {"lstm.weight_hh_l0_raw": (8, 6)}, RECOMPUTED),
        ("lstm.weight_hh_l0_raw", {}, RECOMPUTED),
        ("fc.parametrizations.weight.original0", {}, RECOMPUTED),
        ("model_ema.fcweight", {"model.fc.weight": (8, 6)}, EMA),
        ("net.ema.fc.weight", {"net.online.fc.weight": (8, 6)}, EMA),
        ("ema_model.fc.weight", {"ema_model.fc.bias": (8,), "initted": ()}, ""),
        ("schema.fc.weight", {"model.fc.weight": (8, 6)}, ""),
        ("embed.proj.weight", {"embed.proj.bias": (8,)}, ""),
        ("embedding_hidden_mapping_in.weight", {"embedding_hidden_mapping_in.bias": (8,)}, ""),
    ],
)
def test_leaves_alone_what_is_not_understood(
    name: str, beside: dict[str, tuple[int, ...]], reason: str
) -> None:
    told = checkpoint({name: (8, 6), **beside})
    selection = select(told)
    assert selection.left.get(name, "").partition(" (")[0].removeprefix("norm: ")[: len(reason)] == reason
    assert (name in {map.name for map in selection.chosen}) is not bool(reason)
    asked = {map.name for map in select(told, [name]).chosen}
    assert asked == ({name} if reason in ("", ROUTER, EMA) else set())


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({}, "embedding (--embeddings includes it)"),
        ({"layers": ["fc"]}, "not matched by --layers"),
        ({"layers": ["wte"], "exclude": ["w*"]}, "matched by --exclude"),
        ({"embeddings": True, "min_params": 10**6}, "fewer than 1000000 parameters (--min-params)"),
    ],
)
def test_gives_reasons_for_excluded_tensors(options: dict[str, Any], reason: str) -> None:
    assert select(checkpoint(NAMES), **options).left["wte.weight"] == reason


@pytest.mark.parametrize(
    ("options", "chosen"),
    [
        ({}, ["conv1", "layer1.0.conv1", "layer1.0.conv2", "fc"]),
        ({"embeddings": True}, ["conv1", "layer1.0.conv1", "layer1.0.conv2", "wte", "fc"]),
        ({"layers": ["wte"]}, ["wte"]),
        ({"layers": ["layer1.*", "fc.weight"]}, ["layer1.0.conv1", "layer1.0.conv2", "fc"]),
        ({"layers": [r"re:conv1(\.weight)?$"]}, ["conv1", "layer1.0.conv1"]),
        ({"exclude": ["re:^layer", "conv1"]}, ["fc"]),
        ({"layers": ["layer1.*"], "exclude": ["*.conv2"]}, ["layer1.0.conv1"]),
        ({"min_params": 641}, ["layer1.0.conv1", "layer1.0.conv2"]),
        ({"min_params": 640}, ["layer1.0.conv1", "layer1.0.conv2", "fc"]),
    ],
)
def test_options_select_tensors(options: dict[str, Any], chosen: list[str]) -> None:
    assert names(select(checkpoint(NAMES), **options)) == chosen


@SOME
@given(st.sets(st.sampled_from(sorted(NAMES))), st.sets(st.sampled_from(sorted(NAMES))), st.booleans())
def test_every_tensor_is_selected_or_has_a_reason(
    layers: set[str], exclude: set[str], embeddings: bool
) -> None:
    selection = select(checkpoint(NAMES), sorted(layers), sorted(exclude), embeddings)
    chosen = [map.name for map in selection.chosen]
    assert sorted(chosen + list(selection.left)) == sorted(NAMES)
    assert all(selection.left.values())
    assert not set(chosen) & exclude and (not layers or set(chosen) <= layers)


@pytest.mark.parametrize("model", ["gpt2", "openai-gpt", "imagegpt", "decision_transformer"])
def test_gpt2_like_models_store_transposed_weights(model: str) -> None:
    gpt2 = {"model_type": model}
    for name in ("h.0.attn.c_attn.weight", "h.0.attn.c_proj.weight", "h.3.mlp.c_fc.weight"):
        assert only(name, (64, 192), gpt2).transposed
        assert not only(name, (64, 192)).transposed
    assert not only("lm_head.weight", (1009, 64), gpt2).transposed


@pytest.mark.parametrize("model", ["gpt_oss", "llama4", "llama4_text", "aria", "aria_text"])
def test_some_models_store_experts_transposed(model: str) -> None:
    shape = (8, 64, 32)
    assert only("mlp.experts.down_proj", shape, {"model_type": model}).transposed
    assert not only("mlp.experts.down_proj", shape, {"model_type": "mixtral"}).transposed
    assert not only("fc.weight", (64, 32), {"model_type": model}).transposed


def test_records_where_kinds_come_from() -> None:
    assert select(checkpoint(NAMES)).source == "names and shapes"
    told = checkpoint(NAMES, config={"model_type": "bert"})
    assert select(told).source == "names and shapes"
    told.kinds = {}
    assert select(told).source == "config.json (bert)"
    told.architecture = {"factory": "net.py:net"}
    assert select(told).source == "the model's modules"


def test_module_kinds_override_names() -> None:
    told = checkpoint(NAMES, config={"model_type": "gpt2"})
    told.kinds = dict.fromkeys(NAMES, (None, False))
    told.kinds |= {"fc.weight": ("embedding", False), "conv1.weight": ("conv2d", True)}
    told.left = {"layer1.0.conv2.weight": "not used by the network"}
    selection = select(told, embeddings=True)
    assert [(m.layer, m.kind, m.transposed) for m in selection.chosen] == [
        ("conv1", "conv2d", True),
        ("fc", "embedding", False),
    ]
    assert selection.left["wte.weight"] == "not recognised as a linear map"
    assert selection.left["layer1.0.conv2.weight"] == "not used by the network"


def test_tied_names_follow_the_first() -> None:
    tied = {"lm_head.weight": "wte.weight"}
    selection = select(checkpoint(NAMES, tied=tied), embeddings=True)
    assert selection.left["lm_head.weight"] == "tied to wte.weight"
    assert names(selection).count("wte") == 1 and "lm_head" not in names(selection)


@pytest.mark.parametrize(
    "name", ["embed_tokens.0.weight", "emb_l.3.weight", "emb_g.weight", "char_embs.weight", "emb1.weight"]
)
def test_embeddings_go_by_many_names(name: str) -> None:
    assert only(name, (100, 8)).kind == "embedding"
    assert select(checkpoint({name: (100, 8), name.replace("weight", "bias"): (100,)})).chosen


@pytest.mark.parametrize(
    ("alias", "reason"), [("fc.weight", ""), ("ema.other.weight", EMA), ("router.weight", ROUTER)]
)
def test_further_names_of_a_tensor_count(alias: str, reason: str) -> None:
    told = checkpoint({"ema.fc.weight": (8, 6), "up.weight": (8, 8)}, tied={alias: "ema.fc.weight"})
    left = select(told).left
    assert left.get("ema.fc.weight", "").partition(" (")[0] == reason


def test_a_head_that_is_an_embedding_too_is_one() -> None:
    selection = select(checkpoint({"lm_head.weight": (8, 6)}, tied={"wte.weight": "lm_head.weight"}))
    assert selection.left["lm_head.weight"] == "embedding (--embeddings includes it)"


def test_notes_a_tied_head_of_a_compressed_embedding() -> None:
    tied = checkpoint(NAMES, config={"tie_word_embeddings": True})
    assert select(tied).notes == []
    (note,) = select(tied, embeddings=True).notes
    assert "tied to the embedding" in note


@pytest.mark.parametrize("option", ["layers", "exclude"])
@pytest.mark.parametrize(
    ("pattern", "said"),
    [
        ("layer1.0.conv3", r"matches no tensor; did you mean 'layer1.0.conv[12]'\?"),
        ("zzz*", "matches no tensor(?m:$)"),
        ("re:(", "not a regular expression"),
        ("FC", "matches no tensor"),
    ],
)
def test_rejects_patterns_without_a_match(option: str, pattern: str, said: str) -> None:
    patterns: dict[str, Any] = {option: ["fc", pattern]}
    with pytest.raises(UsageError, match=f"--{option} .*{said}"):
        select(checkpoint(NAMES), **patterns)


@pytest.mark.parametrize(
    ("pattern", "name", "expected"),
    [
        ("fc", "fc.weight", True),
        ("fc.weight", "fc.weight", True),
        ("fc", "fc.bias", False),
        ("fc", "fc1.weight", False),
        ("fc?", "fc1.weight", True),
        ("layer[12].*", "layer2.0.conv.weight", True),
        ("layer[12].*", "layer3.0.conv.weight", False),
        ("*.conv1", "layer2.0.conv1.weight", True),
        ("re:conv1$", "layer2.0.conv1.weight", True),
        ("re:^conv1", "layer2.0.conv1.weight", False),
        ("re:weight_ih", "lstm.weight_ih_l0", True),
    ],
)
def test_globs_match_whole_names_and_regexes_any_part(pattern: str, name: str, expected: bool) -> None:
    assert matches(pattern, name) is expected


def test_selection_is_deterministic_and_ordered() -> None:
    first, second = (select(checkpoint(NAMES), embeddings=True) for _ in range(2))
    assert first == second
    assert [map.name for map in first.chosen] == [name for name in NAMES if name in set(_chosen(first))]


def _chosen(selection: Selection) -> list[str]:
    return [map.name for map in selection.chosen]
