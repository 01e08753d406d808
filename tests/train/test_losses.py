from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from mpoc.train.loop import DivergedError, Losses

ALONE = SimpleNamespace(num_processes=1)
TWO = SimpleNamespace(num_processes=2, reduce=lambda sums, how: {"sum": 2 * sums}[how])


@pytest.mark.parametrize(("accelerator", "expected"), [(ALONE, [3.0, 0.5]), (TWO, [6.0, 1.0])])
def test_averages_each_step_once(accelerator: SimpleNamespace, expected: list[float]) -> None:
    losses = Losses()
    losses.add(torch.tensor(6.0), 2)
    losses.add(torch.tensor(2.0), 4)
    assert len(losses) == 2
    assert losses.take(accelerator, 2, lambda step: 0.1) == expected
    assert len(losses) == 0


@pytest.mark.parametrize(("loss", "said"), [(math.nan, "nan"), (-math.inf, "infinite")])
def test_names_the_diverging_step(loss: float, said: str) -> None:
    losses = Losses()
    for value in (1.0, loss, 1.0):
        losses.add(torch.tensor(value), 1)
    with pytest.raises(
        DivergedError, match=rf"the loss is {said} at step 12 \(learning rate 0.011\)"
    ) as found:
        losses.take(ALONE, 13, lambda step: step / 1000)
    assert "--lr" in str(found.value.hint)
