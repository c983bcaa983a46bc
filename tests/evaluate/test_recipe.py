"""The settings that follow from a published recipe and the size of the data."""

import pytest

from fastmae.config import FinetuneConfig
from fastmae.evaluate.finetune import IMAGENET
from fastmae.evaluate.recipe import settle


def config(**options):
    return FinetuneConfig(run="", data="", **options)


def test_imagenet_gets_the_published_recipe():
    settings = settle(config(), IMAGENET, 1_281_167)
    assert (settings.epochs, settings.batch_size, settings.lr, settings.warmup_epochs) == (100, 1024, 2e-3, 5)
    assert settings.steps == -(-100 * 1_281_167 // 1024)


def test_on_imagenet_the_learning_rate_is_proportional_to_the_batch_size():
    half_batch = settle(config(batch_size=512), IMAGENET, 1_281_167)
    assert half_batch.lr == pytest.approx(1e-3)  # base learning rate 5e-4 for 256 images


@pytest.mark.parametrize(
    ("images", "batch_size", "epochs"), [(10, 8, 300), (600, 32, 107), (3991, 128, 100), (60_000, 1024, 100)]
)
def test_small_data_get_smaller_batches_and_enough_steps(images, batch_size, epochs):
    settings = settle(config(), IMAGENET, images)
    assert (settings.batch_size, settings.epochs) == (batch_size, epochs)
    assert settings.lr == pytest.approx(2e-3 * (batch_size / 1024) ** 0.25)
    assert settings.warmup_epochs == pytest.approx(0.05 * epochs)


def test_given_options_override_the_recipe():
    options = {"epochs": 7, "batch_size": 48, "lr": 0.5, "warmup_epochs": 0.0, "eval_every": 2.0}
    settings = settle(config(**options), IMAGENET, 600)
    assert options.items() <= vars(settings).items()
    assert settings.warmup_steps == 0
