"""Convolutions whose kernel is an MPO (Garipov et al. 2016).

A kernel is small beside the activations, so it is built from its cores and the convolution runs as it did,
with its stride, padding, padding mode, dilation and groups.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from mpoc.nn.weight import CoreWeight, bias_of


class MPOConv1d(CoreWeight, nn.Conv1d):
    """``nn.Conv1d`` with a kernel from cores."""

    def forward(self, input: Tensor) -> Tensor:
        """(batch, C_in, L) → (batch, C_out, L')."""
        return self._conv_forward(input, self.dense_weight(), bias_of(self))


class MPOConv2d(CoreWeight, nn.Conv2d):
    """``nn.Conv2d`` with a kernel from cores."""

    def forward(self, input: Tensor) -> Tensor:
        """(batch, C_in, H, W) → (batch, C_out, H', W')."""
        return self._conv_forward(input, self.dense_weight(), bias_of(self))


class MPOConv3d(CoreWeight, nn.Conv3d):
    """``nn.Conv3d`` with a kernel from cores."""

    def forward(self, input: Tensor) -> Tensor:
        """(batch, C_in, D, H, W) → (batch, C_out, D', H', W')."""
        return self._conv_forward(input, self.dense_weight(), bias_of(self))


class MPOConvTranspose1d(CoreWeight, nn.ConvTranspose1d):
    """``nn.ConvTranspose1d`` with a kernel (C_in, C_out/groups, k) from cores."""

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        """(batch, C_in, L) → (batch, C_out, L')."""
        return _transposed(self, F.conv_transpose1d, 1, input, output_size)


class MPOConvTranspose2d(CoreWeight, nn.ConvTranspose2d):
    """``nn.ConvTranspose2d`` with a kernel (C_in, C_out/groups, k, k) from cores."""

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        """(batch, C_in, H, W) → (batch, C_out, H', W')."""
        return _transposed(self, F.conv_transpose2d, 2, input, output_size)


class MPOConvTranspose3d(CoreWeight, nn.ConvTranspose3d):
    """``nn.ConvTranspose3d`` with a kernel (C_in, C_out/groups, k, k, k) from cores."""

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        """(batch, C_in, D, H, W) → (batch, C_out, D', H', W')."""
        return _transposed(self, F.conv_transpose3d, 3, input, output_size)


def _transposed(layer, function, axes: int, input: Tensor, output_size: list[int] | None) -> Tensor:  # type: ignore[no-untyped-def]
    padding = layer._output_padding(
        input, output_size, layer.stride, layer.padding, layer.kernel_size, axes, layer.dilation
    )
    return function(
        input,
        layer.dense_weight(),
        layer.bias,
        layer.stride,
        layer.padding,
        padding,
        layer.groups,
        layer.dilation,
    )
