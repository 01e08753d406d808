"""Support for transformers: ``import mpoc.hf`` lets ``from_pretrained`` load compressed directories."""

from mpoc.hf.quantizer import MpoConfig, MpoQuantizer

__all__ = ["MpoConfig", "MpoQuantizer"]
