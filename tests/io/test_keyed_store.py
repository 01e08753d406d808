from __future__ import annotations

import torch

from mpoc.io.atomic import digest


def test_digest_depends_on_names_shapes_dtypes_and_values() -> None:
    tensors = {"a": torch.arange(6.0), "b": torch.zeros(0), "c": torch.tensor(1)}
    same = digest(tensors.items())
    assert digest(reversed(tensors.items())) == same
    assert digest({**tensors, "a": torch.arange(12.0)[::2] / 2}.items()) == same  # wherever they lie
    others = [
        {**tensors, "a": torch.arange(6.0).reshape(2, 3)},
        {**tensors, "a": torch.arange(6.0) + 2**-20},
        {**tensors, "a": torch.arange(6.0).view(torch.int32)},
        {"a": tensors["a"], "b": tensors["b"], "d": tensors["c"]},
        {"a": tensors["a"], "c": tensors["c"]},
    ]
    found = {digest(other.items()) for other in others} | {digest(tensors.items(), "words")}
    assert len(found) == len(others) + 1 and same not in found
