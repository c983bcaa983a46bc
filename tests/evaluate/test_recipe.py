"""What the supervised tasks share: settings by the size of the data, draws by the visit alone, each image measured once."""

import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils.data import TensorDataset

from fastmae.config import FinetuneConfig
from fastmae.errors import InputError
from fastmae.evaluate.finetune import IMAGENET
from fastmae.evaluate.recipe import settle
from fastmae.training.evaluation import val_batches
from fastmae.runtime.seeding import drawn_from


def config(**options):
    return FinetuneConfig(run="", data="", **options)


def test_imagenet_gets_the_published_recipe():
    settings = settle(config(), IMAGENET, 1_281_167)
    assert (settings.epochs, settings.batch_size, settings.lr, settings.warmup_epochs) == (100, 1024, 2e-3, 5)
    assert settings.steps == -(-100 * 1_281_167 // 1024)
    half = settle(config(batch_size=512), IMAGENET, 1_281_167)
    assert half.lr == pytest.approx(1e-3)  # base rate 5e-4 for 256 images


@pytest.mark.parametrize(
    ("images", "batch", "least_epochs"), [(10, 8, 300), (600, 32, 107), (3991, 128, 100), (60_000, 1024, 100)]
)
def test_small_data_get_a_smaller_batch_and_enough_steps(images, batch, least_epochs):
    settings = settle(config(), IMAGENET, images)
    assert (settings.batch_size, settings.epochs) == (batch, least_epochs)
    assert settings.lr == pytest.approx(2e-3 * (batch / 1024) ** 0.25)
    assert settings.warmup_epochs == pytest.approx(0.05 * least_epochs)


def test_what_is_asked_for_stands():
    settings = settle(config(epochs=7, batch_size=48, lr=0.5, warmup_epochs=0.0, eval_every=2.0), IMAGENET, 600)
    assert (settings.epochs, settings.batch_size, settings.lr, settings.warmup_epochs, settings.eval_every) == (
        7,
        48,
        0.5,
        0.0,
        2.0,
    )
    assert settings.warmup_steps == 0


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"epochs": 0}, "--epochs 0: give 1"),
        ({"lr": 0.0}, "--lr 0.0: give more than 0"),
        ({"lr": float("nan")}, "--lr nan"),
        ({"layer_decay": 0.0}, "--layer-decay 0.0"),
        ({"drop_path": 1.0}, "--drop-path 1.0"),
        ({"eval_every": -1.0}, "--eval-every -1.0"),
        ({"betas": (0.9, 1.0)}, "--betas 0.9 1.0"),
        ({"micro_batch": -1}, "--micro-batch -1"),
    ],
)
def test_values_out_of_range_are_named(options, says):
    with pytest.raises(InputError, match=says):
        settle(config(**options), IMAGENET, 600)


def test_draws_follow_from_the_visit_alone_and_leave_no_trace():
    def draws():
        return random.random(), np.random.rand(), torch.rand(1).item()

    before = draws()
    with drawn_from(1, 2, 3):
        one = draws()
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    expected = draws()
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    with drawn_from(1, 2, 3):
        assert draws() == one
    assert draws() == expected
    with drawn_from(1, 2, 4):
        assert draws() not in (one, before)


@pytest.mark.parametrize("processes", [1, 3])
def test_each_image_of_val_is_in_one_processes_share(processes):
    data, seen = TensorDataset(torch.arange(10)), []
    for rank in range(processes):
        fabric = SimpleNamespace(
            global_rank=rank, world_size=processes, device=torch.device("cpu"), to_device=lambda batch: batch
        )
        seen += [place for (batch,) in val_batches(data, fabric, 4, 0) for place in batch.tolist()]
    assert sorted(seen) == list(range(10))
