"""Forms, the tensor networks that stand for a weight, and their registry. Without torch.

A form is a subclass of :class:`mpoc.tensor_networks.forms.form.Form`. To add one, write its class and a
function that fits it to a weight, and add a line to ``FORMS``. The registry names both instead of importing
them, so that reading a manifest does not import torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from typing import TYPE_CHECKING, Any

from mpoc.tensor_networks.topology import CHAIN, MERA, TREE, Topology

if TYPE_CHECKING:
    from mpoc.tensor_networks.forms.form import Form


@dataclass(frozen=True)
class FormInfo:
    """The entry of a form in the registry."""

    name: str  # the name in manifests and on the command line
    title: str  # the name in messages
    topology: Topology  # for a sum, that of its first part
    implementation: str  # "module:class", a Form
    fit: str  # "module:function", called as mpoc.tensor_networks.fit.tt_svd.tt_svd
    # The weight is one matrix: the taps of a kernel belong to the inputs, experts to the outputs.
    one_matrix: bool = False
    parts: tuple[str, ...] = ()  # the forms that a sum adds up

    @property
    def can_truncate(self) -> bool:
        """Whether bonds can be truncated to an error, by the weight's spectra."""
        return not self.topology.has_loops

    @property
    def takes_whole_maps(self) -> bool:
        """Whether it can represent a convolution as one linear map at a given input size."""
        return self.topology is CHAIN and not self.one_matrix and not self.parts

    @cached_property
    def form_class(self) -> type[Form]:
        """The class, imported at first use."""
        loaded: type[Form] = _load(self.implementation)
        return loaded

    @cached_property
    def fit_function(self) -> Any:
        """The function that fits this form, imported at first use."""
        return _load(self.fit)


def _load(name: str) -> Any:
    module, _, attribute = name.partition(":")
    return getattr(import_module(module), attribute)


_FORM, _FIT = "mpoc.tensor_networks.forms", "mpoc.tensor_networks.fit"
FORMS: dict[str, FormInfo] = {
    info.name: info
    for info in (
        FormInfo("mpo", "MPO", CHAIN, f"{_FORM}.mpo:MPO", f"{_FIT}.conv_map:fit_mpo"),
        FormInfo("svd", "SVD", CHAIN, f"{_FORM}.mpo:MPO", f"{_FIT}.tt_svd:tt_svd", one_matrix=True),
        FormInfo("tree", "tree", TREE, f"{_FORM}.tree:Tree", f"{_FIT}.tt_svd:tree_svd"),
        FormInfo("mera", "MERA", MERA, f"{_FORM}.mera:Mera", f"{_FIT}.mera:fit_mera"),
        FormInfo("svd+mpo", "sum", CHAIN, f"{_FORM}.sum:Sum", f"{_FIT}.tt_svd:fit_sum", parts=("mpo", "svd")),
    )
}
