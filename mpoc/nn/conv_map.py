"""Convolutions as one linear map at a fixed input size, through the cores of that map (Gao et al. 2020).

The input is flattened with channels last, y = Ŵx as in a linear layer, and the bias stays one number per
channel. Such a map can differ from position to position, which a convolution cannot: once its cores are
trained, or a bond inside height or width was truncated, no kernel gives the same map.
"""

from __future__ import annotations

import math
from pathlib import Path

from torch import Tensor, nn
from torch.nn.functional import linear

from mpoc.errors import UsageError
from mpoc.nn.weight import CoreWeight
from mpoc.runtime.device import require_memory
from mpoc.tensor_networks.forms.contraction import without_autocast
from mpoc.tensor_networks.geometry import Geometry, make_geometry


class MPOConvMap(CoreWeight):
    """y = Ŵx + b, Ŵ of shape (H'·W'·C_out, H·W·C_in) given by its cores.

    Shapes: (batch, C_in, H, W) → (batch, C_out, H', W') at the one size H×W of its geometry. The batch axis
    may be absent, and there may be one or three spatial axes.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Through the cores, or from a dense map that is held.

        Raises:
            ValueError: the input has another size.
        """
        structure, geometry = self.structure, self.structure.geometry
        assert geometry is not None
        axes = len(geometry.size)
        channels = structure.shape[1] * geometry.groups
        if input.shape[-axes - 1 :] != (channels, *geometry.size) or input.dim() not in (axes + 1, axes + 2):
            raise ValueError(
                f"input of shape {tuple(input.shape)}: this convolution was compressed as one map of "
                f"(batch, {', '.join(map(str, (channels, *geometry.size)))}) and knows no other size"
            )
        flat = input.flatten(-axes).transpose(-1, -2).reshape(-1, structure.inputs)
        y = self._through_map(flat).unflatten(1, (math.prod(geometry.output_size), structure.shape[0]))
        y = y.transpose(1, 2).reshape(*input.shape[: -axes - 1], structure.shape[0], *geometry.output_size)
        if self.bias is None:
            return y
        return y + self.bias.to(y.dtype).reshape(-1, *(1,) * axes)  # under autocast the product is narrower

    def _through_map(self, x: Tensor) -> Tensor:
        """Ŵx for x of shape (batch, N_x)."""
        held = self.held_for(x)
        return self.form.apply(x) if held is None else linear(x, held)

    def dense_is_faster(self, batch: int) -> bool:
        """Whether one product with the dense map takes less time for ``batch`` vectors; not if large."""
        return not self.structure.is_large_map and self.form.dense_is_faster(batch)

    def _build(self) -> Tensor:
        """The dense map, (N_y, N_x).

        Raises:
            MpocError: the machine has less memory.
        """
        structure = self.structure
        nbytes = structure.outputs * structure.inputs * self.cores[0].element_size()
        require_memory(Path(type(self).__name__), "weight", nbytes)
        with without_autocast(self.cores[0].device):
            return self.form.to_matrix()[0]

    def dense_weight(self) -> Tensor:
        """Refuse: a whole map has no kernel.

        Raises:
            RuntimeError: always.
        """
        raise RuntimeError(
            "a convolution that was compressed as one map has no kernel; "
            "'mpoc expand --project' gives the nearest one"
        )


class MPOConvMap1d(MPOConvMap, nn.Conv1d):
    """``nn.Conv1d`` as one map."""


class MPOConvMap2d(MPOConvMap, nn.Conv2d):
    """``nn.Conv2d`` as one map."""


class MPOConvMap3d(MPOConvMap, nn.Conv3d):
    """``nn.Conv3d`` as one map."""


CONV_MAPS: dict[type[nn.Module], type[nn.Module]] = {
    nn.Conv1d: MPOConvMap1d,
    nn.Conv2d: MPOConvMap2d,
    nn.Conv3d: MPOConvMap3d,
}


def geometry_of(module: nn.Module, size: tuple[int, ...]) -> Geometry:
    """The geometry of a convolution for inputs of ``size``, e.g. (32, 32).

    Raises:
        UsageError: ``module`` is not one of torch's plain convolutions, or the size does not fit it.
    """
    if type(module) not in CONV_MAPS:
        raise UsageError(f"a {type(module).__name__} cannot be taken as one map: only plain convolutions can")
    assert isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)
    both = module._reversed_padding_repeated_twice[::-1]  # (after, before) of each axis, the first axis first
    return make_geometry(
        tuple(module.weight.shape),
        size,
        module.stride,
        tuple(both[1::2]),
        module.dilation,
        module.groups,
        module.padding_mode,
        tuple(both[0::2]),
    )


def check_geometry(module: nn.Module, geometry: Geometry) -> None:
    """Check that the map was made from a convolution like ``module``.

    Raises:
        ValueError: stride, padding, dilation, groups or padding mode differ, with both sides named.
    """
    try:
        own = geometry_of(module, geometry.size)
    except UsageError as error:
        raise ValueError(str(error)) from error
    if own != geometry:
        raise ValueError(f"the map is that of {geometry}, this {type(module).__name__} is {own}")
