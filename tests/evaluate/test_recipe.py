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


def test_options_that_are_given_override_the_recipe():
    given = {"epochs": 7, "batch_size": 48, "lr": 0.5, "warmup_epochs": 0.0, "eval_every": 2.0}
    settings = settle(config(**given), IMAGENET, 600)
    assert given.items() <= vars(settings).items()
    assert settings.warmup_steps == 0
