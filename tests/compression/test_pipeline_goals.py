"""What a goal promises: size, ratio, error; and that the output is what its manifest says."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn

from mpoc.compression.expand import expand_checkpoint
from mpoc.compression.pipeline import compress_checkpoint
from mpoc.compression.recipe import make_recipe
from mpoc.errors import MpocError, UsageError
from mpoc.io.manifest_reader import read_manifest
from tests.compression.test_pipeline import compress
from tests.support.checkpoints import (
    contents,
    mlp_state,
    network_state,
    num_bytes,
    relative_error,
    save_directory,
)


def stored_tensors(output: Path) -> dict[str, Tensor]:
    files = output.glob("*.safetensors") if output.is_dir() else [output]
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


GOALS: list[dict[str, Any]] = [
    {"bond": 5},
    {"bond": 4, "embeddings": True, "dtype": "bfloat16"},
    {"ratio": 0.4},
    {"max_error": 0.5},
    {"discard": 0.2},
    {"discard": 0.2, "bond": 6},
    {"size": 40_000, "storage": "float"},
    {"bond": 10**6, "allow_growth": True},
]


@pytest.mark.parametrize("options", GOALS, ids=str)
class TestEveryGoal:
    def test_dry_run_writes_nothing_and_bounds_the_size(self, source: Path, options: Any) -> None:
        before = contents(source.parent)
        plan = compress(source, dry_run=True, **options)
        assert contents(source.parent) == before
        assert not plan.written
        done = compress(source, **options)
        assert done.written
        assert done.nbytes == num_bytes(done.output)
        assert done.nbytes <= plan.nbytes <= done.nbytes + 200 * len(done.manifest.replaced) + 100
        assert [layer.bonds for layer in plan.manifest.layers] == [
            layer.bonds for layer in done.manifest.layers
        ]

    def test_manifest_matches_the_stored_tensors(self, source: Path, options: Any) -> None:
        state = network_state()
        done = compress(source, **options)
        stored = stored_tensors(done.output)
        expected = dict(state)
        for layer in done.manifest.replaced:
            weight = expected.pop(layer.name)
            cores = [stored.pop(layer.core_name(k)) for k in range(len(layer.bonds) - 1)]
            assert [tuple(core.shape) for core in cores] == list(
                zip(layer.bonds[:-1], layer.output_factors, layer.input_factors, layer.bonds[1:], strict=True)
            )
            assert sum(core.numel() for core in cores) == layer.num_stored
            assert {str(core.dtype) for core in cores} == {f"torch.{layer.stored_dtype}"}
            assert (layer.num_original, layer.shape) == (weight.numel(), weight.shape)
        assert done.manifest.replaced
        assert stored.keys() == expected.keys()
        for name, tensor in expected.items():
            assert torch.equal(stored[name], tensor), name
        before = sum(t.numel() for t in state.values() if t.is_floating_point())
        after = sum(t.numel() for t in stored_tensors(done.output).values() if t.is_floating_point())
        assert done.manifest.source.num_parameters == before
        assert done.manifest.num_parameters == after
        assert read_manifest(done.output) == done.manifest

    @pytest.mark.slow
    def test_output_is_deterministic(self, source: Path, options: Any) -> None:
        first = compress(source, "first", **options).output
        torch.manual_seed(1)
        torch.randn(3)
        second = compress(source, "second", **options).output
        assert contents(first) == contents(second)

    def test_input_is_unchanged(self, source: Path, options: Any) -> None:
        before = contents(source)
        compress(source, **options)
        assert contents(source) == before


def test_seed_determines_the_randomised_svd(tmp_path: Path) -> None:
    """On a matrix large enough that the fit starts from random vectors."""
    torch.save({"fc.weight": torch.randn(1024, 1536)}, tmp_path / "m.pt")
    made = []
    for number, seed in enumerate((3, 3, 4)):
        torch.manual_seed(number)
        output = compress(tmp_path / "m.pt", f"out{number}", bond=4, sites=2, seed=seed).output
        made.append(load_file(output)["fc.cores.0"])
    assert torch.equal(made[0], made[1])
    assert not torch.equal(made[0], made[2])


@settings(max_examples=8, deadline=None, derandomize=True, database=None)
@given(ratio=st.floats(0.15, 0.95), sites=st.sampled_from([None, 2, 3]), directory=st.booleans())
def test_ratio_is_never_exceeded(
    tmp_path_factory: pytest.TempPathFactory, ratio: float, sites: int | None, directory: bool
) -> None:
    folder = tmp_path_factory.mktemp("ratio")
    source = folder / "m"
    if directory:
        save_directory(source, network_state())
    else:
        source = folder / "m.pt"
        torch.save(network_state(), source)
    done = compress(source, ratio=ratio, sites=sites)
    selected = {"fc1.weight", "fc2.weight", "conv.weight", "tiny.weight", "half.weight"}
    assert {layer.name for layer in done.manifest.layers} == selected
    before = sum(network_state()[name].numel() for name in selected)
    others = network_state().keys() - selected
    stored = stored_tensors(done.output)
    after = sum(tensor.numel() for name, tensor in stored.items() if name not in others)
    assert after / before <= ratio
    assert done.manifest.rho_selected == pytest.approx(after / before, abs=1e-12)
    assert after / before > ratio - 0.15  # and the budget is spent, as far as bonds allow


@settings(max_examples=8, deadline=None, derandomize=True, database=None)
@given(
    size=st.integers(30_000, 46_000),
    dtype=st.sampled_from([None, "float16", "float32"]),
    shards=st.sampled_from([0, 1, 2]),
)
def test_size_is_never_exceeded(
    tmp_path_factory: pytest.TempPathFactory, size: int, dtype: str | None, shards: int
) -> None:
    folder = tmp_path_factory.mktemp("size")
    source = folder / "m"
    if shards:
        save_directory(source, network_state(), shards)
    else:
        source = folder / "m.pt"
        torch.save(network_state(), source)
    others = [name for name in contents(source) if not name.startswith("model")] if shards else []
    copied = sum(num_bytes(source / name) for name in others)
    assert compress(source, dry_run=True, size=size, dtype=dtype).nbytes <= size + copied
    done = compress(source, size=size, dtype=dtype)
    assert num_bytes(done.output) <= size + copied
    assert num_bytes(done.output) == done.nbytes


@pytest.mark.parametrize("storage", [None, "grid"])
def test_size_without_a_form_is_met_by_rounding(tmp_path: Path, storage: str | None) -> None:
    torch.save(network_state(), source := tmp_path / "m.pt")
    done = compress(source, size=0.4, storage=storage)
    assert num_bytes(done.output) <= 0.4 * source.stat().st_size
    assert {layer.form for layer in done.manifest.layers} == {"dense"}
    assert {part["kind"] for layer in done.manifest.layers for part in layer.storage} == {storage or "coded"}
    assert "embedding" in {layer.kind for layer in done.manifest.layers}
    apart = compress(source, "apart", size=0.8, storage=storage, embeddings=False)
    assert "embedding" not in {layer.kind for layer in apart.manifest.layers}
    few = compress(source, "few", size=0.95, layers=("fc*",))
    assert all(layer.layer.startswith("fc") for layer in few.manifest.layers)
    with pytest.raises(UsageError, match=r"the fewest, the output has \d+ bytes"):
        compress(source, "other", size=0.01)


@pytest.mark.parametrize(
    "goal",
    [
        "bond = 100000",
        "max-error = 0.01",
        "max-error = 0.5",
        "discard = 0.001",
        "discard = 0.5",
        "dense = true",
    ],
)
@pytest.mark.parametrize("dtype", [None, "float16"])
@pytest.mark.parametrize(("ceiling", "values"), [("size", [38_000]), ("ratio", [0.5, 0.8])])
def test_ceiling_counts_layers_with_their_own_goal(
    tmp_path: Path, goal: str, dtype: str | None, ceiling: str, values: list[float]
) -> None:
    """Such a layer may stay dense, in its own, wider dtype."""
    torch.save(network_state(), tmp_path / "m.pt")
    (tmp_path / "recipe.toml").write_text(f"[layer.fc1]\n{goal}\n")
    for value in values:
        recipe = make_recipe(tmp_path / "recipe.toml", {ceiling: value, "dtype": dtype})
        done = compress_checkpoint(tmp_path / "m.pt", tmp_path / "out.safetensors", recipe, force=True)
        reached = done.manifest.rho_selected if ceiling == "ratio" else num_bytes(done.output)
        assert reached <= value


def test_layers_of_a_rounded_size_keep_their_own_storage(tmp_path: Path) -> None:
    torch.save(network_state(), source := tmp_path / "m.pt")
    own = "[layer.fc1]\nstorage = 'float'\n[layer.fc2]\nbits = 8\nstorage = 'grid'\n"
    (tmp_path / "recipe.toml").write_text(own)
    recipe = make_recipe(tmp_path / "recipe.toml", {"size": 0.6})
    done = compress_checkpoint(source, tmp_path / "out.safetensors", recipe)
    assert num_bytes(done.output) <= 0.6 * source.stat().st_size
    stored = {layer.layer: layer.storage_text for layer in done.manifest.layers}
    assert (stored.pop("fc1"), stored.pop("fc2")) == ("float32", "grid 8")
    assert set(stored.values()) == {"coded"}


def test_unreachable_size_or_ratio_names_the_reachable_one(source: Path) -> None:
    with pytest.raises(UsageError, match=r"--ratio 0\.001 cannot be reached") as caught:
        compress(source, ratio=0.001)
    assert caught.value.hint is not None
    reachable = float(caught.value.hint.split()[1].rstrip(","))
    assert compress(source, ratio=reachable).manifest.rho_selected <= reachable
    with pytest.raises(UsageError, match=r"--size 2000: .* the output has \d+ bytes"):
        compress(source, "other", size=2000)


@pytest.mark.parametrize("dtype", [None, "float32", "bfloat16", "float16"])
@pytest.mark.parametrize("max_error", [0.3, 0.02])
def test_error_bound_holds_for_stored_cores(tmp_path: Path, max_error: float, dtype: str | None) -> None:
    state = {name: tensor.cumsum(0).cumsum(1) for name, tensor in mlp_state().items() if tensor.dim() > 1}
    torch.save(state, tmp_path / "m.pt")
    done = compress(tmp_path / "m.pt", max_error=max_error, dtype=dtype)
    assert len(done.manifest.replaced) == 2
    expand_checkpoint(done.output, tmp_path / "dense.safetensors")
    dense = load_file(tmp_path / "dense.safetensors")
    for layer in done.manifest.replaced:
        assert layer.stored_dtype == (dtype or "float32")
        error = relative_error(state[layer.name], dense[layer.name])
        assert error <= max_error
        assert layer.relative_error == pytest.approx(error, rel=1e-3)


def test_rejects_error_bound_below_rounding(tmp_path: Path) -> None:
    torch.save({"fc.weight": torch.randn(64, 1) @ torch.randn(1, 64)}, tmp_path / "m.pt")
    with pytest.raises(
        MpocError, match=r"tensor 'fc.weight': relative error 1e-05 cannot be kept in bfloat16"
    ) as caught:
        compress(tmp_path / "m.pt", max_error=1e-5, dtype="bfloat16")
    assert "--dtype float32" in (caught.value.hint or "")
    assert list(tmp_path.iterdir()) == [tmp_path / "m.pt"]


def test_tolerance_is_used_up(tmp_path: Path) -> None:
    """A little more error would let no bond go: what is allowed is spent."""
    torch.save({"conv.weight": torch.randn(64, 64, 3, 3)}, tmp_path / "m.pt")
    (layer,) = compress(tmp_path / "m.pt", max_error=0.6).manifest.layers
    assert 0.55 < (layer.relative_error or 0) <= 0.6


def _vit() -> dict[str, Tensor]:
    block = {
        "norm1": (96,),
        "attn.qkv": (288, 96),
        "attn.proj": (96, 96),
        "mlp.fc1": (384, 96),
        "mlp.fc2": (96, 384),
    }
    shapes = {f"blocks.0.{name}.weight": shape for name, shape in block.items()}
    shapes |= {"cls_token": (1, 1, 96), "pos_embed": (1, 17, 96), "patch_embed.proj.weight": (96, 3, 8, 8)}
    return {name: torch.randn(shape) for name, shape in (shapes | {"head.weight": (10, 96)}).items()}


def _layers(**layers: nn.Module) -> dict[str, Tensor]:
    return nn.ModuleDict(layers).state_dict()


@pytest.mark.parametrize(
    "make",
    [
        lambda: _layers(
            features=nn.Sequential(nn.Conv2d(3, 32, 3), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 64, 3)),
            classifier=nn.Sequential(nn.Linear(256, 128), nn.ReLU(), nn.Dropout(), nn.Linear(128, 10)),
        ),
        _vit,
        lambda: _layers(
            embedding=nn.Embedding(400, 24),
            lstm=nn.LSTM(24, 40, bidirectional=True),
            tag=nn.Linear(80, 12),
        ),
        lambda: _layers(net=nn.Sequential(nn.Conv1d(1, 32, 80), nn.BatchNorm1d(32), nn.Conv1d(32, 512, 3))),
    ],
    ids=["vgg", "vit", "lstm tagger", "waveforms"],
)
def test_a_quarter_needs_nothing_but_the_file(make: Callable[[], dict[str, Tensor]], tmp_path: Path) -> None:
    torch.manual_seed(0)
    source = tmp_path / "m.pt"
    torch.save(make(), source)
    done = compress(source, size=0.25)
    assert done.nbytes <= source.stat().st_size / 4
    assert all(record.relative_error < 0.02 for record in done.manifest.changed)  # type: ignore[operator]
    assert len(done.manifest.changed) == len(done.manifest.layers)
