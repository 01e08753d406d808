"""Examples that a network gets where nobody gave any: of the right kind, and the same for one seed."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from mpoc.errors import UsageError
from mpoc.models import zoo
from mpoc.models.loading import Model, open_model
from mpoc.models.self_made_data import make_data, paragraphs, sample
from mpoc.models.zoo.picogpt import PicoGPT
from tests.data.samples import write_tokenizer
from tests.support.architectures import tiny


def held(network: nn.Module, path: Path = Path("net")) -> Model:
    """As a network in memory is opened."""
    return Model(path, network.eval(), None, None, None, {})  # type: ignore[arg-type]


def of_zoo(spec: str, folder: Path) -> Model:
    save_file(zoo.make(spec).state_dict(), folder / "net.safetensors")
    return open_model(folder / "net.safetensors", spec)


def test_images_of_the_zoo_have_its_shape_and_are_deterministic(tmp_path: Path) -> None:
    model = of_zoo("resnet:depth=8", tmp_path)
    first, again, other = make_data(model, 5), make_data(model, 5), make_data(model, 5, seed=1)
    assert first.name == "self-made images"
    assert (first.batch["x"].shape, first.batch["x"].dtype) == ((5, 3, 32, 32), torch.uint8)
    assert torch.equal(first.batch["x"], again.batch["x"])
    assert not torch.equal(first.batch["x"], other.batch["x"])


def test_a_token_at_a_time_gives_the_logits_of_the_whole_text() -> None:
    torch.manual_seed(0)
    network = PicoGPT(11, 12).double().eval()
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.3)
    tokens = torch.randint(11, (3, 12))
    past: list[list[Tensor]] = [[] for _ in network.layers]
    with torch.no_grad():
        steps = torch.cat([network(tokens[:, [k]], past) for k in range(12)], 1)
        torch.testing.assert_close(steps, network(tokens))
    with pytest.raises(ValueError, match="13 tokens, but the context has 12"):
        network(tokens[:, :1], past)


class Bigram(nn.Module):
    """A causal model as transformers calls it, whose next token depends on the last one alone."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, input_ids: Tensor, cache: Any = None, use_cache: bool = False) -> Any:
        assert input_ids.shape[1] == 1 and use_cache
        return SimpleNamespace(logits=self.logits[input_ids], cache="kept")


def test_sampled_text_has_the_law_of_the_model() -> None:
    """Counts of pairs against softmax, averaged over the temperatures that take turns."""
    torch.manual_seed(0)
    logits = torch.randn(4, 4)
    tokens = sample(Bigram(logits), 600, 60, 4, torch.Generator().manual_seed(0))
    for k, heat in enumerate((0.8, 1.0, 1.2)):
        own = tokens[k::3]
        counts = torch.zeros(4, 4).index_put_((own[:, :-1].flatten(), own[:, 1:].flatten()),
                                              torch.tensor(1.0), accumulate=True)  # fmt: skip
        frequencies = counts / counts.sum(1, keepdim=True)
        torch.testing.assert_close(frequencies, (logits / heat).softmax(1), atol=0.04, rtol=0)


def test_causal_models_write_their_own_text(tmp_path: Path) -> None:
    model = of_zoo("picogpt:vocab=7,context=10", tmp_path)
    found = make_data(model, 4)
    assert found.name == "text of its own writing"
    assert found.batch["input_ids"].shape == (4, 10) and int(found.batch["input_ids"].max()) < 7
    assert torch.equal(found.batch["input_ids"], make_data(model, 4).batch["input_ids"])
    tiny("gpt2").save_pretrained(tmp_path / "gpt2")
    found = make_data(open_model(tmp_path / "gpt2", None), 3)
    assert found.name == "text of its own writing" and found.domains is None
    counts = [len(make_data(model, 20, tokens=most).batch["input_ids"]) for most in (None, 150, 1)]
    assert counts == [20, 15, 8]  # of ten tokens
    broken = PicoGPT(7, 10)
    nn.init.constant_(broken.head.weight, math.nan)
    with pytest.raises(UsageError, match="logits are not finite"):
        make_data(held(broken), 2)


def test_encoders_read_the_package_text(tmp_path: Path) -> None:
    tiny("bert").save_pretrained(tmp_path / "bert")
    found = make_data(open_model(tmp_path / "bert", None), 3)
    assert found.name == "tokens drawn at random, a guess"
    write_tokenizer(tmp_path / "bert", ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "##s"])
    found = make_data(open_model(tmp_path / "bert", None), 500)
    tokens, mask = found.batch["input_ids"], found.batch["attention_mask"]
    assert found.name == "the package's text" and found.domains is not None
    assert tokens.shape == mask.shape and len(tokens) == len(found.domains) == 500
    assert set(found.domains.tolist()) == set(range(len(paragraphs())))
    lengths = mask.sum(1).float()
    assert lengths.min() < 10 and 20 < lengths.mean() < 30  # few fill the context of 32


def test_package_text_is_varied() -> None:
    """Domains, lengths, words; no paragraph twice."""
    texts = paragraphs()
    every = [text for domain in texts.values() for text in domain]
    assert len(texts) >= 12 and len(every) >= 300 and len(set(every)) == len(every)
    lengths = sorted(len(text.split()) for text in every)
    assert lengths[len(every) // 10] < 25 and lengths[-len(every) // 10] > 60
    words = {word.strip(".,;:!?\"'()").lower() for text in every for word in text.split()}
    assert len(words) > 4000


class Tagger(nn.Module):
    """A recurrent network of vectors."""

    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        self.lstm = nn.LSTM(6, 5, batch_first=batch_first)

    def forward(self, x: Tensor) -> Tensor:
        """The last state."""
        y: Tensor = self.lstm(x)[0][:, -1]
        return y


@pytest.mark.parametrize(
    ("network", "shape", "name"),
    [
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 14 * 14, 2)), (3, 16, 16), "images"),
        (nn.Sequential(nn.Flatten(), nn.Linear(784, 3)), (1, 28, 28), "images"),
        (nn.Sequential(nn.Linear(11, 3)), (11,), "vectors"),
        (nn.Sequential(nn.Conv1d(1, 2, 5), nn.Flatten(), nn.Linear(2 * 252, 2)), (1, 256), "sounds"),
        (nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 9)), (64,), "tokens"),
        (Tagger(batch_first=True), (64, 6), "sequences"),
    ],
    ids=["conv2d", "digits", "vectors", "conv1d", "tokens", "lstm"],
)
def test_guesses_what_an_unknown_network_takes(network: nn.Module, shape: tuple[int, ...], name: str) -> None:
    found = make_data(held(network), 3)
    values = next(iter(found.batch.values()))
    assert values.shape == (3, *shape)
    assert name in found.name and found.name.endswith("a guess")


def test_refuses_a_network_that_it_cannot_guess() -> None:
    for network in (Tagger(batch_first=False), nn.Bilinear(3, 3, 2)):
        with pytest.raises(UsageError, match="cannot be guessed") as caught:
            make_data(held(network), 3)
        assert "--calibrate DATA" in str(caught.value.hint)


def test_what_network_or_tokenizer_raise_is_one_message() -> None:
    network: Any = nn.Linear(3, 3)
    network.main_input_name, network.can_generate = "input_ids", lambda: False
    network.config = SimpleNamespace(is_encoder_decoder=False)  # as that of two networks in one
    with pytest.raises(UsageError, match=r"Linear: no data can be made: AttributeError: .*vocab_size"):
        make_data(held(network), 3)
