from __future__ import annotations

import re
import sys
from collections.abc import Callable
from contextlib import chdir
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import mpoc
from mpoc.compression.pipeline import compress_checkpoint
from mpoc.compression.recipe import make_recipe
from mpoc.errors import MpocError, UsageError
from mpoc.models.architecture import make_network
from mpoc.models.export import InputSpec, export_network, parse_input_spec
from mpoc.models.loading import open_network
from tests.support.architectures import tiny
from tests.support.checkpoints import contents
from tests.support.marks import slow_except
from tests.support.process import run_python
from tests.support.programs import run_onnx

# What --arch names in these tests: a file with a factory for each network.
FACTORIES = """
from torch import nn

def mlp():
    return nn.Sequential(nn.Linear(96, 128), nn.ReLU(), nn.Linear(128, 64, bias=False))

def convolutions():
    return nn.Sequential(
        nn.Conv2d(16, 32, 3, stride=(2, 1), padding=1, groups=2), nn.BatchNorm2d(32), nn.ReLU(),
        nn.Conv2d(32, 32, 3, padding=1, padding_mode="reflect"), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(32, 40),
    )

def tokens():
    return nn.Sequential(nn.Embedding(1009, 32, padding_idx=0), nn.Linear(32, 48))

class Mixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.conv = nn.Embedding(500, 64), nn.Conv1d(64, 32, 3)
        self.fc, self.out = nn.Linear(64, 128), nn.Linear(128, 64, bias=False)
        self.head = nn.Linear(32, 96)

    def forward(self, x):
        y = self.out(self.fc(self.embed(x)).relu())
        return self.head(self.conv(y.transpose(1, 2)).relu().mean(-1))

def mixed():
    return Mixed()

def kernels():
    return nn.Sequential(
        nn.Conv2d(16, 64, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 10, bias=False),
    )

class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(64, 64)
        self.embed = nn.Embedding(60, 64)

    def forward(self, x, indices):
        return self.fc(x), self.embed(indices).sum(1)

def two():
    return Two()

class Fixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(64, 64)

    def forward(self, x):
        return self.fc(x.reshape(2, 64))

def fixed():
    return Fixed()

number = 3

def none():
    return None
"""
INPUTS: dict[str, Callable[[int], tuple[Tensor, ...]]] = {
    "mlp": lambda batch: (torch.randn(batch, 96),),
    "convolutions": lambda batch: (torch.randn(batch, 16, 8, 7),),
    "tokens": lambda batch: (torch.randint(0, 1009, (batch, 5)),),
    "two": lambda batch: (torch.randn(batch, 64), torch.randint(0, 60, (batch, 3))),
}
SPECS = {
    "mlp": ["1x96"],
    "convolutions": ["1x16x8x7"],
    "tokens": ["1x5:int64"],
    "two": ["4x64", "4x3:int64"],
}


@pytest.fixture(autouse=True)
def _at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a folder with ``nets.py``."""
    (tmp_path / "nets.py").write_text(FACTORIES)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "nets", raising=False)


def compressed(name: str, dtype: torch.dtype = torch.float32, **goal: Any) -> Path:
    """One of the networks, compressed."""
    torch.save(make_network(f"nets.py:{name}").to(dtype).state_dict(), f"{name}.pt")
    path = Path(f"{name}.mpo.safetensors")
    recipe = make_recipe(None, {"embeddings": True, **(goal or {"bond": 4})})
    compress_checkpoint(Path(f"{name}.pt"), path, recipe)
    return path


@dataclass(frozen=True)
class Exported:
    """One of the networks, compressed, and as a program of each kind."""

    source: Path
    files: dict[str, Path]
    inputs: list[InputSpec]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Exported]:
    """``exported("mlp")``: made once for all tests."""
    folder = tmp_path_factory.mktemp("exported")
    (folder / "nets.py").write_text(FACTORIES)

    @cache
    def make(name: str) -> Exported:
        files = {kind: folder / f"{name}.{kind}" for kind in ("onnx", "pt2")}
        specs = [parse_input_spec(text) for text in SPECS[name]]
        with chdir(folder):
            source = folder / compressed(name)
            made = export_network(source, files, specs, f"nets.py:{name}")
            return Exported(source, files, made.inputs)

    return make


def outputs_of(network: Any, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    with torch.no_grad():
        y = network(*inputs)
    return list(y) if isinstance(y, tuple) else [y]


@pytest.mark.slow
@pytest.mark.parametrize("name", slow_except(INPUTS, "mlp"))
def test_program_computes_like_the_network(exported: Callable[[str], Exported], name: str) -> None:
    made = exported(name)
    assert [spec.dtype for spec in made.inputs] == [x.dtype for x in INPUTS[name](1)]
    network = open_network(made.source, f"nets.py:{name}")
    program = torch.export.load(made.files["pt2"]).module()
    for batch in (1, 2, 7):
        inputs = INPUTS[name](batch)
        expected = outputs_of(network, inputs)
        for found in (run_onnx(made.files["onnx"], inputs), outputs_of(program, inputs)):
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_onnx_file_keeps_the_cores(exported: Callable[[str], Exported]) -> None:
    made = exported("mlp")
    source, file = made.source, made.files["onnx"]
    model = onnx.load(file)
    onnx.checker.check_model(model)
    sizes = [int(torch.tensor(value.dims).prod()) for value in model.graph.initializer]
    largest_core = max(value.numel() for value in load_file(source).values())
    assert max(sizes) == largest_core
    dense = source.with_name("mlp.pt")
    assert file.stat().st_size < 2 * source.stat().st_size < dense.stat().st_size
    (given,), (answer,) = model.graph.input, model.graph.output
    assert (given.name, answer.name) == ("input", "output")
    assert [axis.dim_param or axis.dim_value for axis in given.type.tensor_type.shape.dim] == ["batch", 96]
    assert [axis.dim_param or axis.dim_value for axis in answer.type.tensor_type.shape.dim] == ["batch", 64]


@pytest.mark.slow
def test_pt2_file_runs_without_mpoc(exported: Callable[[str], Exported]) -> None:
    made = exported("tokens")
    program = made.files["pt2"].read_bytes()
    assert str(Path(__file__).resolve().parents[2]).encode() not in program
    Path("p.pt2").write_bytes(program)
    (x,) = INPUTS["tokens"](3)
    save_file({"x": x}, "x.safetensors")
    script = """if True:
        import sys
        sys.modules["mpoc"] = None
        import torch
        from safetensors.torch import load_file, save_file
        y = torch.export.load("p.pt2").module()(load_file("x.safetensors")["x"])
        save_file({"y": y.detach()}, "y.safetensors")
    """
    run_python("-c", script)
    expected = outputs_of(open_network(made.source, "nets.py:tokens"), (x,))
    torch.testing.assert_close([load_file("y.safetensors")["y"]], expected, rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("goal", [{"bond": 4}, {"bits": 4}])
def test_exports_half_precision(goal: dict[str, Any]) -> None:
    source = compressed("mlp", torch.float16, **goal)
    files = {"onnx": Path("p.onnx")}
    Path("halves.py").write_text("import nets\n\ndef mlp():\n    return nets.mlp().half()\n")
    (spec,) = export_network(source, files, [parse_input_spec("1x96")], "halves.py:mlp").inputs
    assert spec.dtype == torch.float16
    x = torch.randn(3, 96).half()
    expected = outputs_of(open_network(source, "halves.py:mlp"), (x,))
    torch.testing.assert_close(run_onnx(files["onnx"], (x,)), expected, rtol=0.02, atol=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["bert", "vit"])
def test_exports_a_hugging_face_directory(architecture: str) -> None:
    tiny(architecture, layers=1).save_pretrained("model")
    recipe = make_recipe(None, {"bond": 4, "embeddings": True, "allow_growth": True})
    compress_checkpoint(Path("model"), Path("model-mpo"), recipe)
    before = contents(Path("model-mpo"))
    shape = "1x9" if architecture == "bert" else "1x3x16x16"
    files = {"onnx": Path("p.onnx"), "pt2": Path("p.pt2")}
    specs = export_network(Path("model-mpo"), files, [parse_input_spec(shape)]).inputs
    assert contents(Path("model-mpo")) == before
    network: Any = open_network(Path("model-mpo"), None)
    if architecture == "bert":
        assert type(network).__name__ == "BertForMaskedLM"  # with its head
        assert specs == [InputSpec((1, 9), torch.int64, free=(1,))] * 2
        mask = torch.ones(3, 13, dtype=torch.int64)
        mask[1, 5:] = 0
        inputs: tuple[Tensor, ...] = (torch.randint(0, 99, (3, 13)), mask)
        with torch.no_grad():
            expected = network(input_ids=inputs[0], attention_mask=mask).logits
    else:
        assert specs == [InputSpec((1, 3, 16, 16), torch.float32)]
        inputs = (torch.randn(3, 3, 16, 16),)
        with torch.no_grad():
            expected = network(*inputs).logits
    program = torch.export.load("p.pt2").module()
    for found in (run_onnx(files["onnx"], inputs), outputs_of(program, inputs)):
        torch.testing.assert_close(found, [expected], rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["gpt2", "llama", "qwen2"])
def test_length_of_a_language_model_is_free(architecture: str) -> None:
    tiny(architecture, layers=1).save_pretrained("model")
    compress_checkpoint(Path("model"), Path("model-mpo"), make_recipe(None, {"bits": 4}))
    made = export_network(Path("model-mpo"), {"onnx": Path("p.onnx")}, [parse_input_spec("1x9")])
    assert [str(spec) for spec in made.inputs] == ["batch×any"] * 2
    shapes = [value.type.tensor_type.shape.dim for value in onnx.load("p.onnx").graph.input]
    assert [[axis.dim_param for axis in axes] for axes in shapes] == [["batch", "size_1"]] * 2
    network: Any = open_network(Path("model-mpo"), None)
    for batch, length in ((1, 1), (3, 7), (2, 31)):
        mask = torch.ones(batch, length, dtype=torch.int64)
        mask[-1, length // 2 + 1 :] = 0
        tokens = torch.randint(0, 90, (batch, length))
        with torch.no_grad():
            expected = network(input_ids=tokens, attention_mask=mask).logits
        torch.testing.assert_close(
            run_onnx(Path("p.onnx"), (tokens, mask), decoded=True), [expected], rtol=0, atol=1e-5
        )


@pytest.mark.slow
def test_a_plus_frees_an_axis() -> None:
    source = compressed("tokens")
    files = {"onnx": Path("p.onnx"), "pt2": Path("p.pt2")}
    made = export_network(source, files, [parse_input_spec("1x5+:int64")], "nets.py:tokens")
    assert [str(spec) for spec in made.inputs] == ["batch×any"]
    network, program = open_network(source, "nets.py:tokens"), torch.export.load("p.pt2").module()
    for length in (1, 2, 12):
        inputs = (torch.randint(0, 1009, (2, length)),)
        for found in (run_onnx(files["onnx"], inputs), outputs_of(program, inputs)):
            torch.testing.assert_close(found, outputs_of(network, inputs), rtol=0, atol=1e-5)


@pytest.mark.slow
def test_weights_above_the_limit_lie_beside_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a file of their own, whose name the ONNX file holds; an existing one stays without --force."""
    source = compressed("mlp", bits=4)
    monkeypatch.setattr("mpoc.models.export._LARGEST_ONNX", 5000)
    request = {"onnx": Path("p.onnx")}, [parse_input_spec("1x96")], "nets.py:mlp"
    Path("p.onnx.data").write_text("mine")
    with pytest.raises(UsageError, match=r"p\.onnx\.data: exists already"):
        export_network(source, *request)
    assert Path("p.onnx.data").read_text() == "mine"
    assert not Path("p.onnx").exists()
    assert export_network(source, *request, force=True).files == [Path("p.onnx.data"), Path("p.onnx")]
    assert Path("p.onnx").stat().st_size < 9000 < Path("p.onnx.data").stat().st_size
    onnx.checker.check_model("p.onnx")
    Path("elsewhere").mkdir()
    for name in ("p.onnx", "p.onnx.data"):
        Path(name).rename(Path("elsewhere") / name)
    x = torch.randn(3, 96)
    found = run_onnx(Path("elsewhere/p.onnx"), (x,), decoded=True)
    torch.testing.assert_close(
        found, outputs_of(open_network(source, "nets.py:mlp"), (x,)), rtol=0, atol=1e-5
    )


class TestArchitecture:
    def test_accepts_an_installed_module(self) -> None:
        assert isinstance(make_network("mpoc.demo.network:DigitsNet"), nn.Module)

    def test_accepts_a_module_in_the_current_directory(self) -> None:
        before = list(sys.path)
        assert len(list(make_network("nets:mlp").children())) == 3
        assert sys.path == before

    def test_accepts_a_file_with_local_imports(self, tmp_path: Path) -> None:
        (tmp_path / "folder").mkdir()
        (tmp_path / "folder" / "sizes_of_mine.py").write_text("WIDTH = 5\n")
        (tmp_path / "folder" / "net.py").write_text(
            "from sizes_of_mine import WIDTH\nfrom torch import nn\nnet = lambda: nn.Linear(WIDTH, 1)\n"
        )
        network: Any = make_network("folder/net.py:net")
        assert network.in_features == 5

    def test_accepts_a_class(self) -> None:
        assert type(make_network("nets.py:Two")).__name__ == "Two"

    @pytest.mark.parametrize(
        ("arch", "said"),
        [
            ("nets.py", "not of the form package.module:factory or file.py:factory"),
            ("nets.py:", "not of the form"),
            ("absent.py:mlp", "no such file"),
            ("absent_package.nets:mlp", "No module named 'absent_package'"),
            ("nets.py:mpl", "nets.py has no 'mpl' to call; did you mean 'mlp'?"),
            ("nets.py:number", "nets.py has no 'number' to call"),
            ("nets.py:none", "none() returns a NoneType, not an nn.Module"),
        ],
    )
    def test_rejects_bad_specs(self, arch: str, said: str) -> None:
        with pytest.raises(UsageError, match=re.escape(said)):
            make_network(arch)

    @pytest.mark.parametrize(
        ("code", "said"),
        [
            ("import a_package_that_is_not_there\n", "line 1: ModuleNotFoundError: No module named 'a_pack"),
            ("def net(): return 1 / 0\n", "line 1: ZeroDivisionError: division by zero"),
            ("def net(:\n", "line 1: SyntaxError: invalid syntax"),
            ("from torch import nn\ndef net():\n    return nn.Linear('a', 2)\n", "line 3: TypeError: "),
        ],
    )
    @pytest.mark.parametrize("arch", ["broken.py:net", "broken:net"])
    def test_errors_of_user_code_are_one_message(self, arch: str, code: str, said: str) -> None:
        name = f"broken{len(code)}"  # Python keeps a module that it has imported
        Path(f"{name}.py").write_text(code)
        with pytest.raises(UsageError, match=rf"--arch '{name}.*': .*{name}\.py, {said}"):
            make_network(arch.replace("broken", name))

    def test_imports_only_the_named_module(self) -> None:
        Path("config.json").write_text("{}")
        with pytest.raises(UsageError, match="holds tensors, not the network's code"):
            open_network(compressed("mlp"), None)


@pytest.mark.parametrize(
    ("text", "shape", "dtype"),
    [
        ("1x3x32x32", (1, 3, 32, 32), None),
        ("8", (8,), None),
        (" 1x128:int64 ", (1, 128), torch.int64),
        ("2x4:bfloat16", (2, 4), torch.bfloat16),
        ("2x4+x5", (2, 4, 5), None),
    ],
)
def test_parses_input_shapes(text: str, shape: tuple[int, ...], dtype: torch.dtype | None) -> None:
    assert parse_input_spec(text) == InputSpec(shape, dtype, (1,) if "+" in text else ())


@pytest.mark.parametrize("text", ["", "x3", "1x", "0x3", "1,3", "1x3:", "1x3:nn", "-1x3", "1x03", "1+x3"])
def test_rejects_malformed_input_shapes(text: str) -> None:
    with pytest.raises(UsageError, match="not a shape with its batch"):
        parse_input_spec(text)


class TestErrors:
    @pytest.mark.parametrize(
        ("change", "said"),
        [
            ({"files": {}}, "nothing to write"),
            ({"inputs": []}, "the shape of the input is needed"),
            ({"inputs": ["1x64", "2x3"]}, "inputs of different batch sizes"),
            ({"files": {"onnx": Path("p.pt2")}}, r"p\.pt2: the name of a program for --onnx ends in \.onnx"),
            ({"files": {"pt2": Path("old.pt2")}}, r"old\.pt2: exists already"),
            ({"inputs": ["1x95"]}, "Sequential with inputs batch×95 fails: "),
            ({"inputs": ["1x96", "1x96"]}, "Sequential with inputs batch×96, batch×96 fails: "),
            ({"inputs": ["1x96:int64"]}, "Sequential with inputs batch×96 fails: "),
            ({"arch": "nets.py:two"}, "does not fit this Two"),
            ({"arch": None}, "holds tensors, not the network's code"),
        ],
    )
    def test_failure_writes_nothing(self, change: dict[str, Any], said: str) -> None:
        source = compressed("mlp")
        Path("old.pt2").write_text("mine")
        before = {name for name in contents(Path()) if "__pycache__" not in name}
        request: dict[str, Any] = {
            "files": {"onnx": Path("p.onnx"), "pt2": Path("p.pt2")},
            "inputs": ["1x96"],
            "arch": "nets.py:mlp",
        } | change
        specs = [parse_input_spec(text) for text in request["inputs"]]
        with pytest.raises(MpocError, match=said):
            export_network(source, request["files"], specs, request["arch"])
        assert {name for name in contents(Path()) if "__pycache__" not in name} == before
        assert Path("old.pt2").read_text() == "mine"

    def test_fixes_the_batch_size_where_required(self) -> None:
        source = compressed("fixed")
        with pytest.raises(MpocError, match=r"Fixed with inputs batch×64 cannot be traced"):
            export_network(source, {"pt2": Path("p.pt2")}, [parse_input_spec("1x64")], "nets.py:fixed")
        assert not Path("p.pt2").exists()

    def test_names_a_missing_package_first(self, monkeypatch: pytest.MonkeyPatch) -> None:
        source = compressed("mlp")
        monkeypatch.setattr("mpoc.models.export.find_spec", lambda name: None)
        with pytest.raises(MpocError, match="--onnx needs onnx and onnxscript") as caught:
            export_network(source, {"onnx": Path("p.onnx")}, [parse_input_spec("1x96")], "nets.py:absent")
        assert caught.value.hint == "pip install 'mpoc[onnx]'"

    def test_never_runs_code_for_uncompressed_files(self) -> None:
        Path("evil.py").write_text("raise SystemExit('ran')\n")
        save_file({"a": torch.ones(1)}, "m.safetensors")
        with pytest.raises(MpocError, match="not compressed by mpoc"):
            export_network(
                Path("m.safetensors"), {"pt2": Path("p.pt2")}, [parse_input_spec("1x96")], "evil.py:net"
            )

    @pytest.mark.slow
    def test_force_replaces_the_output(self) -> None:
        source = compressed("mlp")
        Path("p.pt2").write_text("old")
        specs = [parse_input_spec("1x96")]
        export_network(source, {"pt2": Path("p.pt2")}, specs, "nets.py:mlp", force=True)
        assert torch.export.load("p.pt2").module()(torch.ones(3, 96)).shape == (3, 64)

    def test_never_replaces_the_source(self) -> None:
        source = compressed("mlp")
        before = source.read_bytes()
        source.rename("m.pt2")
        with pytest.raises(MpocError):
            export_network(
                Path("m.pt2"), {"pt2": Path("m.pt2")}, [parse_input_spec("1x96")], "nets.py:mlp", force=True
            )
        assert Path("m.pt2").read_bytes() == before


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stored", "bits"),
    [
        ({"bits": 3}, 4),
        ({"bits": 4, "storage": "coded"}, 8),
        ({"bits": 8, "storage": "coded"}, 16),
        ({"bond": 24, "form": "svd", "bits": 6}, 8),
    ],
)
def test_onnx_keeps_codes(stored: dict[str, Any], bits: int) -> None:
    """Tables (8 bits or more), kernels, matrices and factors: the layers' numbers, in the bytes of codes."""
    torch.manual_seed(0)
    network = make_network("nets.py:mixed").eval()
    mpoc.compress(network, embeddings=True, **stored)
    mpoc.save(network, "mixed.safetensors")
    file, specs = Path("mixed.onnx"), [parse_input_spec("1x7:int64")]
    export_network(Path("mixed.safetensors"), {"onnx": file}, specs, "nets.py:mixed")
    onnx.checker.check_model(onnx.load(file))
    table, others = 500 * 64, 64 * 32 * 3 + 2 * 64 * 128 + 32 * 96
    assert file.stat().st_size < 1.1 * (table * max(bits, 8) + others * bits) / 8 + 14_000
    x = torch.randint(0, 500, (5, 7))
    with torch.no_grad():
        expected = mpoc.load("mixed.safetensors", make_network("nets.py:mixed")).eval()(x)
    (exact,), (fast,) = (run_onnx(file, (x,), decoded) for decoded in (True, False))
    torch.testing.assert_close(exact, expected, rtol=1e-5, atol=1e-5)
    assert (fast - expected).norm() < 0.02 * expected.norm()


@pytest.mark.slow
@pytest.mark.parametrize("bits", [4, 8])
def test_onnxruntime_decodes_nothing_in_calls(bits: int) -> None:
    """Linear layers in groups, with and without a bias, multiply with codes; all else is decoded once.

    Batch norms are multiplied into the kernels by the session, and the file keeps the codes.
    """
    onnxruntime: Any = pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    network = make_network("nets.py:kernels").eval()
    mpoc.compress(network, bits=bits)
    mpoc.save(network, "kernels.safetensors")
    file = Path("kernels.onnx")
    export_network(
        Path("kernels.safetensors"), {"onnx": file}, [parse_input_spec("1x16x8x8")], "nets.py:kernels"
    )
    codes = (64 * 144 + 96 * 64 + 10 * 96) * bits // 8
    assert codes < file.stat().st_size < 1.2 * codes + 12_000
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = "optimized.onnx"
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    operations = [node.op_type for node in onnx.load("optimized.onnx").graph.node]
    assert operations.count("MatMulNBits") == 2
    assert not {"DequantizeLinear", "Cast", "Sub", "Mul", "BatchNormalization"} & set(operations)
    x = torch.randn(3, 16, 8, 8)
    with torch.no_grad():
        expected = mpoc.load("kernels.safetensors", make_network("nets.py:kernels")).eval()(x)
    torch.testing.assert_close(run_onnx(file, (x,), decoded=True), [expected], rtol=1e-5, atol=1e-5)
