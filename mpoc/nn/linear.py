"""Fully connected layers that compute through cores: ``nn.Linear``, and the ``Conv1D`` of transformers."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.functional import linear

from mpoc.nn.weight import CoreWeight, bias_of


class MPOLinear(CoreWeight, nn.Linear):
    """y = Ŵx + b, Ŵ of shape (N_y, N_x) given by its cores (Eqs. 2 and 5 of Gao et al. 2020).

    Shapes: (…, in_features) → (…, out_features), as ``nn.Linear``.
    """

    def forward(self, input: Tensor) -> Tensor:
        """(…, in_features) → (…, out_features), through the cores or from a dense weight that is held."""
        held = self.held_for(input)
        if held is not None:
            return linear(input, held, bias_of(self))
        return through_cores(self, input)

    def dense_is_faster(self, batch: int) -> bool:
        """Whether one product with the dense weight takes less time for ``batch`` vectors."""
        return self.form.dense_is_faster(batch)


class MPOConv1D(CoreWeight):
    """transformers' ``Conv1D``, a linear layer that stores its weight as (inputs, outputs)."""

    def forward(self, x: Tensor) -> Tensor:
        """(…, nx) → (…, nf)."""
        held = self.held_for(x)
        if held is not None:
            return linear(x, held.T, bias_of(self))
        return through_cores(self, x)

    def dense_is_faster(self, batch: int) -> bool:
        """Whether one product with the dense weight takes less time for ``batch`` vectors."""
        return self.form.dense_is_faster(batch)


def through_cores(layer: CoreWeight, x: Tensor) -> Tensor:
    """Ŵx + b for x of shape (…, N_x)."""
    structure = layer.structure
    if x.shape[-1] != structure.inputs:
        raise RuntimeError(f"input has {x.shape[-1]} features, the layer takes {structure.inputs}")
    flat = x.reshape(-1, structure.inputs)
    if layer.order is not None:
        flat = flat[:, layer.order]
    y = layer.form.apply(flat)
    if layer.bias is not None:
        y = y + layer.bias.to(y.dtype)  # under autocast the product is narrower
    return y.reshape(*x.shape[:-1], structure.outputs)
