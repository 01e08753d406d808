from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from mpoc.nn.adopt import adopt, unstack
from mpoc.tensor_networks.structure import make_structure
from tests.support.weights import random_cores


class Experts(nn.Module):
    """Reads its stacked weight as transformers' mixtures do."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(3, 8, 6))  # (experts, outputs, inputs)
        self.down_proj = nn.Parameter(torch.randn(3, 6, 4), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = torch.einsum("ni,eji->enj", x, self.gate_up_proj).chunk(2, dim=-1)
        return torch.einsum("enj,eij->ni", gate * up, self.down_proj)


def unstacked() -> Experts:
    module = Experts()
    unstack(module, "gate_up_proj", ("w1", "w3"))
    unstack(module, "down_proj", ("w2",))
    return module


def test_unstacks_to_one_matrix_per_expert() -> None:
    module = Experts()
    x, stacked = torch.randn(5, 6), module.gate_up_proj.detach().clone()
    expected = module(x)
    unstack(module, "gate_up_proj", ("w1", "w3"))
    unstack(module, "down_proj", ("w2",))
    assert torch.equal(module(x), expected)
    assert torch.equal(module.gate_up_proj, stacked)
    assert torch.equal(module.get_parameter("1.w1.weight"), stacked[1, :4])
    assert torch.equal(module.get_parameter("2.w3.weight"), stacked[2, 4:])
    names = {f"{expert}.{source}.weight" for expert in range(3) for source in ("w1", "w2", "w3")}
    assert module.state_dict().keys() == names
    assert {name for name, p in module.named_parameters() if not p.requires_grad} == {
        f"{expert}.w2.weight" for expert in range(3)
    }


def test_single_matrices_can_have_cores() -> None:
    module = unstacked()
    structure = make_structure("linear", (4, 6), sites=2)
    cores = [core.float() for core in random_cores(structure, 3)]
    dense = module.gate_up_proj.detach().clone()
    adopt(module.get_submodule("1.w3"), "weight", cores, structure)
    weight = module.gate_up_proj
    assert torch.equal(weight[1, 4:], module.get_submodule("1.w3").dense_weight())  # type: ignore[operator]
    others = torch.ones(3, 8, dtype=torch.bool)
    others[1, 4:] = False
    assert torch.equal(weight[others], dense[others])
    module(torch.randn(5, 6)).sum().backward()
    assert all(p.grad is not None for p in module.parameters() if p.requires_grad)


class _Eager(Experts):
    """Takes the weight of one expert after the other, as transformers' ``eager`` experts do."""

    config = SimpleNamespace(_experts_implementation="eager")

    def forward(self, x: Tensor) -> Tensor:
        every = []
        for expert in torch.arange(3):
            gate, up = nn.functional.linear(x, self.gate_up_proj[expert]).chunk(2, dim=-1)
            every.append((gate * up) @ self.down_proj[expert].T)
        return torch.stack(every).sum(0)


def test_eager_experts_call_the_layers_of_each_matrix() -> None:
    module, x, calls = _Eager(), torch.randn(5, 6), []
    expected = module(x)
    unstack(module, "gate_up_proj", ("w1", "w3"))
    unstack(module, "down_proj", ("w2",))
    for name, part in module.named_modules():
        if isinstance(part, nn.Linear):
            part.register_forward_pre_hook(lambda _, args, name=name: calls.append((name, args[0])))
    assert torch.allclose(module(x), expected, atol=1e-5)
    assert [name for name, _ in calls] == [f"{k}.{source}" for k in range(3) for source in ("w1", "w3")]
    assert all(torch.equal(given, x) for _, given in calls)


@pytest.mark.parametrize(("name", "sources"), [("gate_up_proj", ("a", "b", "c")), ("flat", ("a",))])
def test_rejects_other_modules(name: str, sources: tuple[str, ...]) -> None:
    module = Experts()
    module.flat = nn.Parameter(torch.randn(8, 6))
    with pytest.raises(ValueError, match=f"weight '{name}' has shape"):
        unstack(module, name, sources)
    assert set(dict(module.named_parameters())) == {"gate_up_proj", "down_proj", "flat"}
