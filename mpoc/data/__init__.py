"""Data sets in common formats: recognised, checked, read a batch at a time."""

from mpoc.data.base import Batch, Data, Examples, Subset, shuffled
from mpoc.data.images import ImageOptions, prepare_images
from mpoc.data.open import check_fits, hold_out, open_data
from mpoc.data.recognise import FORMATS
from mpoc.data.text import CharacterTokenizer, HubTokenizer, TextOptions, Tokenizer, tokenizer_from_state

__all__ = [
    "FORMATS",
    "Batch",
    "CharacterTokenizer",
    "Data",
    "Examples",
    "HubTokenizer",
    "ImageOptions",
    "Subset",
    "TextOptions",
    "Tokenizer",
    "check_fits",
    "hold_out",
    "open_data",
    "prepare_images",
    "shuffled",
    "tokenizer_from_state",
]
