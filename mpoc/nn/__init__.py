"""Layers that compute through cores, and the functions that put them into a network."""

from mpoc.nn.adopt import adopt
from mpoc.nn.conv import (
    MPOConv1d,
    MPOConv2d,
    MPOConv3d,
    MPOConvTranspose1d,
    MPOConvTranspose2d,
    MPOConvTranspose3d,
)
from mpoc.nn.conv_map import MPOConvMap1d, MPOConvMap2d, MPOConvMap3d
from mpoc.nn.embedding import MPOEmbedding
from mpoc.nn.linear import MPOLinear
from mpoc.nn.weight import use_weights

__all__ = [
    "MPOConv1d",
    "MPOConv2d",
    "MPOConv3d",
    "MPOConvMap1d",
    "MPOConvMap2d",
    "MPOConvMap3d",
    "MPOConvTranspose1d",
    "MPOConvTranspose2d",
    "MPOConvTranspose3d",
    "MPOEmbedding",
    "MPOLinear",
    "adopt",
    "use_weights",
]
