"""Make examples for a network that nobody gave data for: what its layers are fitted to then.

A causal language model writes its own text, sampled token by token (Ji et al., "Beware of calibration data
for pruning large language models", arXiv:2410.17170).  Other networks of text read the paragraphs that come
with the package, written for it in many domains.  Networks of images see dead leaves and 1/f noise, networks
of sound harmonics and noise.  What a network takes is told by the zoo, or by a directory's config.json; of
any other network it is guessed from its first layer, and what it accepts is taken.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.resources import files
from typing import Any

import torch
from torch import Generator, Tensor, nn

from mpoc.data.text import HubTokenizer
from mpoc.errors import MpocError, UsageError
from mpoc.models import noise, zoo
from mpoc.models.architecture import zoo_name
from mpoc.models.call import Batch, Call, first_output
from mpoc.models.introspection import evaluating
from mpoc.models.loading import Model
from mpoc.models.packaged import image_facts
from mpoc.models.zoo.picogpt import PicoGPT
from mpoc.runtime.device import derived_seed
from mpoc.runtime.packages import is_packaged

SELF = "self"  # in the place of a data set
_HINT = "--calibrate DATA, or none"
TEXTS = files("mpoc.models") / "texts"  # a file a domain, paragraphs apart by an empty line

_PIECE = re.compile(r".+?(?:[.!?。！？]+[\"'»”)]*\s+|\n+)")  # a sentence or a line, with what follows it
_FEWEST_WORDS, _MORE_WORDS = 2, 24.0  # of a text at least; the logarithm of their number is uniform
_BLOCK = 256  # tokens of a text at most
_SHORT = 64  # tokens drawn at random
_LARGE, _MANY_PIXELS = 64, 128 * 128  # examples of images of so many pixels or more
_LENGTHS = (16_000, 4096, 1024, 256, 128, 64)  # of signals, tried in turn
_TEMPERATURES = (0.8, 1.0, 1.2)
_AT_ONCE = 128  # texts that are sampled together
_FEWEST_WRITTEN = 8  # texts that a causal language model writes
_SIDES = (32, 28, 64, 8, 16, 48, 96, 128, 224, 299, 384)  # of images, tried in turn
_SIDE_OF_DIGITS = 8  # a linear layer of fewer inputs reads no images
_REFUSED = (RuntimeError, ValueError, TypeError, IndexError, AttributeError, AssertionError)


@dataclass(frozen=True)
class SelfMadeData:
    """Examples of a network's inputs."""

    batch: Batch  # all of them; images are pixels (n, C, H, W) uint8, texts are padded
    name: str  # for notes and reports, as "self-made images"
    domains: Tensor | None = None  # (n,) the domain of each example; None: all are of one


def make_data(model: Model, samples: int, seed: int = 0, tokens: int | None = None) -> SelfMadeData:
    """Make up to ``samples`` examples for the network of an open checkpoint; the same for the same seed.

    Args:
        model: the checkpoint and its network.
        samples: number of examples; fewer of large images.
        seed: of all that is drawn.
        tokens: that a causal language model writes at most, unless these are too few texts; None: any number.

    Raises:
        UsageError: nothing that the network takes is known, or it or its tokenizer fails.
        MpocError: the directory's tokenizer cannot be read.
    """
    try:
        return _made(model, samples, seed, tokens)
    except (MpocError, MemoryError):
        raise
    except Exception as error:  # of code that is not ours
        if "out of memory" in str(error).lower():
            raise
        said = " ".join(f"{type(error).__name__}: {error}".split())[:400]
        raise UsageError(f"{type(model.network).__name__}: no data can be made: {said}", _HINT) from error


def _made(model: Model, samples: int, seed: int, most: int | None) -> SelfMadeData:
    generator = torch.Generator().manual_seed(derived_seed(seed, "self-made data"))
    network, entry = model.network, zoo.ENTRIES.get(zoo_name(model.architecture or "") or "")
    if entry is not None and entry.images:
        return _images(entry.shape, samples, generator)
    if is_packaged(model.architecture or ""):
        return _images((3, *image_facts(model.architecture or "")["size"]), samples, generator)
    if isinstance(network, PicoGPT):
        length = len(network.positions)
        return _written(network, _texts_within(most, samples, length), length, generator)
    if getattr(network, "config", None) is not None and Call.of(network).main_input is not None:
        return _for_transformers(model, samples, generator, most)
    return _guessed(network, samples, generator)


def _images(shape: tuple[int, ...], samples: int, generator: Generator) -> SelfMadeData:
    channels, height, width = shape
    return SelfMadeData(_pixels((channels, height, width), generator, samples), "self-made images")


def _for_transformers(model: Model, samples: int, generator: Generator, most: int | None) -> SelfMadeData:
    """By what the configuration says of a network of transformers.

    Raises:
        UsageError: an input of another kind.
    """
    network: Any = model.network
    config, main = network.config, network.main_input_name
    if main == "pixel_values":
        size = getattr(config, "image_size", None) or 224
        height, width = (size, size) if isinstance(size, int) else tuple(size)[-2:]
        return _images((getattr(config, "num_channels", 3), height, width), samples, generator)
    if main == "input_ids":
        block = min(_BLOCK, getattr(config, "max_position_embeddings", None) or _BLOCK)
        is_causal = network.can_generate() and not config.is_encoder_decoder
        if is_causal:
            return _written(network, _texts_within(most, samples, block), block, generator)
        if _has_tokenizer(model):
            return _package_text(HubTokenizer(model.path), samples, block, generator)
        batch = _tokens(config.vocab_size, min(block, _SHORT), generator, samples)
        return SelfMadeData(batch, "tokens drawn at random, a guess")
    if main == "input_values" and isinstance(_first_layer(network), nn.Conv1d):
        signals = noise.waveforms(min(samples, _LARGE), _LENGTHS[0], generator)
        return SelfMadeData({"x": signals}, "self-made sounds, a guess")
    raise UsageError(f"{type(network).__name__}: no data can be made for its {main}", _HINT)


def _has_tokenizer(model: Model) -> bool:
    names = ("tokenizer.json", "tokenizer_config.json")
    return model.path.is_dir() and any((model.path / name).is_file() for name in names)


def paragraphs() -> dict[str, list[str]]:
    """The package's text: domain → paragraphs."""
    found = sorted((entry for entry in TEXTS.iterdir() if entry.name.endswith(".txt")), key=lambda f: f.name)
    texts = {entry.name.removesuffix(".txt"): entry.read_text("utf-8") for entry in found}
    return {
        name: [part.strip() for part in text.split("\n\n") if part.strip()] for name, text in texts.items()
    }


def _package_text(tokenizer: HubTokenizer, samples: int, block: int, generator: Generator) -> SelfMadeData:
    """Texts of the package, padded to the longest."""
    texts = list(_texts(paragraphs(), samples, generator))
    encoded = tokenizer.encode_documents([text for text, _ in texts], block)
    longest = max(map(len, encoded))
    tokens = torch.full((len(encoded), longest), tokenizer.pad_id)
    mask = torch.zeros_like(tokens)
    for row, ids in enumerate(encoded):
        tokens[row, : len(ids)], mask[row, : len(ids)] = torch.tensor(ids), 1
    domains = torch.tensor([domain for _, domain in texts])
    return SelfMadeData({"input_ids": tokens, "attention_mask": mask}, "the package's text", domains)


def _texts(known: dict[str, list[str]], samples: int, generator: Generator) -> Iterator[tuple[str, int]]:
    """``samples`` texts, each with the number of its domain.

    Paragraphs take turns.  A text begins at any sentence or line, has a few words to a hundred, as the texts
    that people embed, and goes on in another paragraph of its domain where one ends.
    """
    by_domain = [[_PIECE.findall(f"{text}\n") for text in texts] for texts in known.values()]
    every = [(pieces, domain) for domain, texts in enumerate(by_domain) for pieces in texts]
    order = torch.randperm(len(every), generator=generator).tolist()
    for number in range(samples):
        pieces, domain = every[order[number % len(every)]]
        pieces, others = pieces[_drawn(len(pieces), generator) :], by_domain[domain]
        words, text = _FEWEST_WORDS * _MORE_WORDS ** float(torch.rand((), generator=generator)), ""
        while len(text.split()) < words:
            if not pieces:
                pieces = others[_drawn(len(others), generator)]
            text, pieces = text + pieces[0], pieces[1:]
        yield text.strip(), domain


def _drawn(count: int, generator: Generator) -> int:
    return int(torch.randint(count, (), generator=generator))


def _texts_within(most: int | None, samples: int, length: int) -> int:
    """How many texts of a length a network writes: of ``most`` tokens in all."""
    return samples if most is None else min(samples, max(_FEWEST_WRITTEN, most // length))


def _written(network: nn.Module, samples: int, length: int, generator: Generator) -> SelfMadeData:
    """Text that a causal language model samples, each from a token drawn at random."""
    with evaluating(network), torch.no_grad():
        one = first_output(network(torch.zeros(1, 1, dtype=torch.int64, device=_device(network))))
        counts = [min(_AT_ONCE, samples - start) for start in range(0, samples, _AT_ONCE)]
        tokens = torch.cat([sample(network, count, length, one.shape[-1], generator) for count in counts])
    return SelfMadeData(
        {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}, "text of its own writing"
    )


def sample(network: nn.Module, count: int, length: int, vocabulary: int, generator: Generator) -> Tensor:
    """Token ids (count, length) that a causal language model samples; temperatures take turns.

    Raises:
        UsageError: the network's logits are not finite.
    """
    heat = torch.tensor(_TEMPERATURES).repeat(count)[:count, None]
    tokens = torch.randint(vocabulary, (count, 1), generator=generator)
    step = _stepper(network)
    while tokens.shape[1] < length:
        logits = step(tokens).float().cpu() / heat
        if not bool(logits.isfinite().all()):
            raise UsageError("the network's own text cannot be sampled: its logits are not finite")
        drawn = torch.multinomial(logits.softmax(-1), 1, generator=generator)
        tokens = torch.cat([tokens, drawn], 1)
    return tokens


def _stepper(network: Any) -> Callable[[Tensor], Tensor]:
    """A function of all tokens (n, T) so far that gives the next one's logits (n, vocabulary)."""
    device, past = _device(network), None
    if isinstance(network, PicoGPT):
        own: list[Any] = [[] for _ in network.layers]
        return lambda tokens: network(tokens[:, -1:].to(device), own)[:, -1]
    known = inspect.signature(network.forward).parameters
    cache = next((name for name in ("cache", "past_key_values") if name in known), "")

    def step(tokens: Tensor) -> Tensor:
        nonlocal past
        kept: dict[str, Any] = {} if past is None else {cache: past}
        output = network(input_ids=(tokens[:, -1:] if kept else tokens).to(device), use_cache=True, **kept)
        past = getattr(output, cache, None)
        logits: Tensor = output.logits[:, -1]
        return logits

    return step


def _device(network: nn.Module) -> torch.device:
    return next(network.parameters()).device


def _guessed(network: nn.Module, samples: int, generator: Generator) -> SelfMadeData:
    """The first inputs that a network takes, of those that fit its first layer.

    Raises:
        UsageError: it takes none of them.
    """
    call = Call.of(network)
    for name, make in _candidates(_first_layer(network), generator):
        try:
            with evaluating(network), torch.no_grad():
                output = first_output(call(network, _as_floats(make(2), network)))
        except (UsageError, *_REFUSED):
            continue
        if len(output) == 2 and bool(output.isfinite().all()):
            return SelfMadeData(make(samples), f"{name}, a guess")
    kind = type(network).__name__
    raise UsageError(f"{kind}: what it takes cannot be guessed", _HINT)


def _first_layer(network: nn.Module) -> nn.Module | None:
    layers = (nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Linear, nn.RNNBase)
    return next((module for module in network.modules() if isinstance(module, layers)), None)


def _as_floats(batch: Batch, network: nn.Module) -> Batch:
    """A batch for a trial, on the network's device."""
    device = _device(network)
    return {
        name: (values / 255 if values.dtype == torch.uint8 else values).to(device)
        for name, values in batch.items()
    }


Maker = Callable[[int], Batch]


def _candidates(first: nn.Module | None, generator: Generator) -> Iterator[tuple[str, Maker]]:
    """Kinds of inputs for a first layer, likely ones first: a name, and what makes so many of them."""
    if isinstance(first, nn.Embedding):
        for length in (_SHORT, _SHORT // 4):
            yield "tokens drawn at random", partial(_tokens, first.num_embeddings, length, generator)
    elif isinstance(first, nn.Conv2d):
        wide = max(first.kernel_size) >= 7  # as of networks for ImageNet
        for side in sorted(_SIDES, key=lambda side: side != 224) if wide else _SIDES:
            yield "self-made images", partial(_pixels, (first.in_channels, side, side), generator)
    elif isinstance(first, nn.Conv1d):
        for length in _LENGTHS:
            yield "self-made sounds", partial(_signals, (first.in_channels, length), generator)
    elif isinstance(first, nn.RNNBase) and first.batch_first:
        yield "self-made sequences", partial(_sequences, (first.input_size, _SHORT), generator)
    elif isinstance(first, nn.Linear):
        for channels in (1, 3):
            side = math.isqrt(first.in_features // channels)
            if channels * side * side == first.in_features and side >= _SIDE_OF_DIGITS:
                yield "self-made images", partial(_pixels, (channels, side, side), generator)
        yield "random vectors", partial(_vectors, first.in_features, generator)


def _tokens(vocabulary: int, length: int, generator: Generator, count: int) -> Batch:
    return {"input_ids": torch.randint(vocabulary, (count, length), generator=generator)}


def _pixels(shape: tuple[int, int, int], generator: Generator, count: int) -> Batch:
    many = shape[1] * shape[2] >= _MANY_PIXELS
    return {"x": noise.noise_images(min(count, _LARGE) if many else count, shape, generator)}


def _signals(shape: tuple[int, int], generator: Generator, count: int) -> Batch:
    channels, length = shape
    return {"x": noise.waveforms(count * channels, length, generator).view(count, channels, length)}


def _sequences(shape: tuple[int, int], generator: Generator, count: int) -> Batch:
    return {"x": noise.spectral(count, shape, generator).transpose(1, 2)}


def _vectors(width: int, generator: Generator, count: int) -> Batch:
    return {"x": torch.randn(count, width, generator=generator)}
