from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from mpoc.data import Batch, open_data, shuffled
from tests.data.samples import pixels, png, write_parquet


def unchanged(batch: Any) -> Batch:
    return batch


def test_loader_reads_whole_batches(tmp_path: Path) -> None:
    x = pixels(10, 4, 4)
    np.savez(tmp_path / "m.npz", x=x, y=np.arange(10))
    train = open_data(tmp_path / "m.npz").splits["train"]
    batches = list(DataLoader(train, batch_size=4, collate_fn=unchanged))
    assert [len(batch["y"]) for batch in batches] == [4, 4, 2]
    np.testing.assert_array_equal(torch.cat([batch["x"] for batch in batches])[:, 0].numpy(), x)
    assert train[3]["y"] == 3
    assert train[3]["x"].shape == (1, 4, 4)


def test_data_on_disk_can_be_pickled(tmp_path: Path) -> None:
    images = [{"bytes": image} for image in map(png, pixels(6, 3, 3))]
    file = write_parquet(tmp_path / "t.parquet", {"image": images, "label": [0, 1, 2, 0, 1, 2]}, 2)
    train = open_data(file, limit=0).splits["train"]
    sent = pickle.loads(pickle.dumps(train))
    assert torch.equal(sent.batch([5, 0])["x"], train.batch([5, 0])["x"])


def test_shuffle_is_a_seeded_permutation(tmp_path: Path) -> None:
    np.savez(tmp_path / "m.npz", x=pixels(50, 2, 2))
    train = open_data(tmp_path / "m.npz").splits["train"]
    order = shuffled(train, torch.Generator().manual_seed(5))
    assert sorted(order.tolist()) == list(range(50))
    assert torch.equal(order, shuffled(train, torch.Generator().manual_seed(5)))
    assert not torch.equal(order, shuffled(train, torch.Generator().manual_seed(6)))


def test_describes_a_data_set_in_one_line(tmp_path: Path) -> None:
    np.savez(tmp_path / "m.npz", x=np.zeros((5, 3, 2), np.float32), y=np.zeros(5))
    assert open_data(tmp_path / "m.npz").announce() == f"{tmp_path}/m.npz: npz; train 5; arrays 3×2"
