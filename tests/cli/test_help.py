from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import mpoc
from mpoc.cli.guide import read_page
from mpoc.cli.options import RENAMED
from mpoc.compression.pipeline import compress_checkpoint
from mpoc.compression.recipe import make_recipe
from mpoc.models import zoo
from mpoc.train.settings import Settings
from tests.reproduce.images import write_digits
from tests.support.architectures import tiny
from tests.support.checkpoints import mlp_state, network_state, save_directory
from tests.support.examples import COMMANDS, PAGES, help_examples, mpoc_arguments
from tests.support.process import Here


@pytest.mark.parametrize("command", COMMANDS)
class TestEveryCommand:
    def test_has_help_with_an_example_and_all_its_options(self, here: Here, command: str) -> None:
        done = here(command, "--help")
        assert (done.returncode, done.stderr) == (0, "")
        assert f"mpoc {command} " in done.stdout
        flat = re.sub(r"[\s│]+", " ", done.stdout)
        for example in help_examples(command):
            assert example in flat
        for parameter in COMMANDS[command].params:
            for option in parameter.opts:
                assert option.lstrip("-") in done.stdout.lower() or parameter.param_type_name == "argument"
            if parameter.param_type_name == "option":
                assert getattr(parameter, "help", ""), f"{parameter.name} has no help"

    @pytest.mark.slow
    def test_examples_work(self, here: Here, command: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("mpoc.cli.demo.SETTINGS", Settings(epochs=1.0, lr=0.01))
        make_what_the_examples_name(compressed=command != "compress")
        for example in help_examples(command):
            result = here(*mpoc_arguments(example))
            assert result.returncode == 0, f"{example}: {result.stderr}"

    def test_is_in_the_guide(self, command: str) -> None:
        assert any(f"mpoc {command}" in page.read_text("utf-8") for page in PAGES)


def test_help_of_options_is_short() -> None:
    for name, command in COMMANDS.items():
        for parameter in command.params:
            words = (getattr(parameter, "help", "") or "").split()
            assert 0 < len(words) < 15, f"mpoc {name}: {parameter.name}: {' '.join(words)}"


def test_help_of_compress_fits_three_screens(here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    lines = here("compress", "--help").stdout.splitlines()
    assert max(map(len, lines)) <= 100
    assert len(lines) <= 3 * 40
    panels = [line.strip("╭─╮ ") for line in lines if line.startswith("╭")]
    goal = "Goal (exactly one; --bond may cap --discard, --bits go with any)"
    assert panels == ["Arguments", goal, "Common options", "Advanced: which layers", "Advanced"]


@pytest.mark.parametrize(
    ("command", "old", "new"), [(c, old, new) for c, table in RENAMED.items() for old, new in table.items()]
)
def test_renamed_options_answer_with_their_new_name(here: Here, command: str, old: str, new: str) -> None:
    known = {option for parameter in COMMANDS[command].params for option in parameter.opts}
    assert new in known and old not in known
    for words in ([old, "32x32"], [f"{old}=32x32"]):
        done = here(command, "m.pt", "--data", "d", *words)
        assert (done.returncode, done.stderr) == (2, f"error: {old} is now {new}\n")


def test_help_lists_every_command_by_the_first_paragraph_of_its_help(here: Here) -> None:
    listed = re.sub(r"[\s│]+", " ", here("--help").stdout)
    for name, command in COMMANDS.items():
        summary = (command.help or "").partition("\n\n")[0]
        assert f" {name} {summary} " in listed


# The network of ``mlp_state``, as --arch names it.
RESNET = """
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(48, 64), nn.Linear(64, 32)

    def forward(self, x):
        return self.fc2(self.fc1(x.flatten(1)[:, :48]))

def resnet56():
    return Net()
"""


def make_what_the_examples_name(compressed: bool) -> None:
    Path("resnet.py").write_text(RESNET)
    state = network_state()
    for name in ("resnet56.th", "vgg.pt"):
        torch.save(state, name)
    save_directory(Path("bert"), {"pooler.dense.weight": torch.randn(32, 32), **state})
    Path("cifar10").mkdir()
    for name, rows in (("data_batch_1.bin", 40), ("test_batch.bin", 20)):
        labelled = [bytes([k % 10]) + bytes([k] * 3072) for k in range(rows)]
        (Path("cifar10") / name).write_bytes(b"".join(labelled))
    write_digits(Path("mnist"), train=60, test=20)
    torch.save(mlp_state(), "dense.pt")
    torch.save(zoo.make("fc2").state_dict(), "fc2.pt")
    if compressed:
        torch.save(mlp_state(), "mlp.pt")
        for name in ("resnet56", "mlp"):
            output = Path(f"{name}.mpo.safetensors")
            compress_checkpoint(Path("mlp.pt"), output, make_recipe(None, {"bond": 4}))
        tiny("bert").save_pretrained("tiny-bert")
        factors = make_recipe(None, {"bond": 4, "form": "svd"})
        compress_checkpoint(Path("tiny-bert"), Path("bert-mpo"), factors)


def test_the_guide_s_table_of_finetune_names_its_options() -> None:
    """Every option in the table is one of the command, and every one of the command is in the table."""
    page = read_page("fine-tuning")
    table = page.partition("| option |")[2].partition("\n\n")[0]
    parameters = [each for each in COMMANDS["finetune"].params if each.param_type_name == "option"]
    known = {option for parameter in parameters for option in parameter.opts}
    assert (named := set(re.findall(r"--[a-z][a-z0-9-]*", table))) <= known
    assert len(named) > 25
    common = {
        "--data",
        "--format",
        "--arch",
        "--seed",
        "--device",
        "--output",
        "--force",
    }
    assert known - named - common - {"-o", "--quiet", "--max-shard-size", "--help"} == set()


def test_no_arguments_print_the_help(here: Here) -> None:
    done = here()
    assert done.returncode in (0, 2)  # typer's choice, by version
    assert "Usage:" in done.stdout + done.stderr


def test_version_is_the_package_version(here: Here) -> None:
    done = here("--version")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"mpoc {mpoc.__version__}\n", "")
