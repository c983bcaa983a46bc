from types import SimpleNamespace

import pytest
import torch
from torch.utils.data import TensorDataset

from fastmae.training.evaluation import val_batches


@pytest.mark.parametrize("processes", [1, 3])
def test_each_image_of_val_is_in_exactly_one_processs_share(processes):
    dataset, images = TensorDataset(torch.arange(10)), []
    for rank in range(processes):
        fabric = SimpleNamespace(
            global_rank=rank,
            is_global_zero=rank == 0,
            world_size=processes,
            device=torch.device("cpu"),
            to_device=lambda batch: batch,
        )
        images += [image for (batch,) in val_batches(dataset, fabric, 4, 0) for image in batch.tolist()]
    assert sorted(images) == list(range(10))
