"""Checkpoints of every kind behind one small interface: names, shapes, dtypes; one tensor at a time."""

from mpoc.checkpoint.base import Checkpoint
from mpoc.checkpoint.open import open_checkpoint

__all__ = ["Checkpoint", "open_checkpoint"]
