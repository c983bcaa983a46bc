"""What follows from the options and the stores before anything is trained."""

import math

import pytest

from fastmae.cli import parse, run
from fastmae.config import PretrainConfig
from fastmae.errors import InputError
from fastmae.pretraining.plan import make_plan, open_stores
from fastmae.runs.folder import RunFolder


@pytest.fixture
def config(vit_store, tiny_student, tmp_path):
    """(options, stores) -> the options of `pretrain` for the small student."""

    def build(options="", stores=(vit_store,)):
        return parse("pretrain", [*map(str, stores), str(tmp_path / "run"), *tiny_student, *options.split()])

    return build


@pytest.fixture(scope="module")
def tokenize(vit_teacher, tmp_path_factory):
    """(images, options) -> a new store by the ViT teacher."""

    def call(images, options):
        store = tmp_path_factory.mktemp("stores") / "other.tokens"
        args = ["tokenize", str(images), str(store), *vit_teacher, *options.split(), "--workers", "0"]
        assert run(args) == 0
        return store

    return call


def test_the_sizes_come_from_the_store_and_the_learning_rate_from_the_batch(config):
    plan = make_plan(config("--epochs 6 --warmup-epochs 2"))
    assert (plan.patch_size, plan.channels, plan.target_dim) == (16, 3, 192)
    settings = plan.settings
    assert (settings.images, settings.epochs, settings.batch_size, settings.warmup_epochs) == (30, 6, 8, 2)
    assert settings.lr == pytest.approx(0.02 * 8 / 256)
    assert settings.eval_every == math.inf
    assert make_plan(config("--knn-every 2")).settings.eval_every == 2


def test_norm_auto_is_patch_for_a_vit_store_for_a_cnn_and_none_for_pixels(config, vit_store, cnn_store):
    assert make_plan(config(stores=(vit_store, cnn_store))).norms == ["patch", "store"]
    assert make_plan(config("--target pixels")).norms == ["none"]
    assert make_plan(config("--target hog")).norms == ["none"]
    assert make_plan(config("--norm channel", stores=(vit_store, cnn_store))).norms == ["channel", "channel"]


def test_loss_auto_is_smooth_l1_for_a_vit_cosine_for_a_cnn_and_mse_for_pixels_and_hog(config, vit_store, cnn_store):
    assert make_plan(config(stores=(vit_store, cnn_store))).losses == ("smooth-l1", "cosine")
    assert make_plan(config("--target pixels")).losses == ("mse",)
    assert make_plan(config("--target hog --loss auto")).losses == ("mse",)
    assert make_plan(config("--loss mse", stores=(vit_store, cnn_store))).losses == ("mse", "mse")


def test_each_stores_loss_has_the_weight_one_unless_it_is_given(config, vit_store, cnn_store):
    assert make_plan(config(stores=(vit_store, cnn_store))).loss_weights == (1.0, 1.0)
    assert make_plan(config("--store-weights 1,0.5", stores=(vit_store, cnn_store))).loss_weights == (1.0, 0.5)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ("--store-weights 1,2", "--store-weights 1,2"),
        ("--store-weights a", "--store-weights a"),
        ("--store-weights 0", "--store-weights 0"),
        ("--store-weights inf", "--store-weights inf"),
        ("--image-size 112", "--image-size 112"),
        ("--image-size 60", "--image-size 60"),
        ("--target hog --norm store", "--norm store"),
        ("--encoder resnet18", "--encoder resnet18"),
        ("--relation-weight 1 --relation-layers 99", "--relation-layers 99"),
    ],
)
def test_options_that_do_not_fit_the_store_are_named(options, named, config):
    with pytest.raises(InputError, match=named):
        make_plan(config(options))


def test_a_store_is_needed():
    with pytest.raises(InputError, match="STORE"):
        open_stores(PretrainConfig(stores=(), run="run"))


@pytest.mark.parametrize(
    ("split", "middle_size", "difference"), [("val", 96, "other images"), ("train", 64, "middle_size 64")]
)
def test_a_store_of_other_images_or_of_another_size_is_named(
    split, middle_size, difference, config, photos, vit_store, tokenize
):
    other = tokenize(photos / split, f"--middle-size {middle_size}")
    with pytest.raises(InputError, match=f"{other}.*{difference}"):
        make_plan(config(stores=(vit_store, other)))


def test_a_store_of_several_sizes_trains_but_neither_online_nor_beside_one_of_a_single_size(
    config, photos, vit_store, tokenize
):
    several_sizes = tokenize(photos / "train", "--middle-size 64,96")
    plan = make_plan(config(stores=(several_sizes,)))
    assert [store.info.middle_size for store in plan.stores[0]] == [64, 96]
    with pytest.raises(InputError, match="--target teacher"):
        make_plan(config("--target teacher", stores=(several_sizes,)))
    with pytest.raises(InputError, match="--middle-size"):
        make_plan(config(stores=(vit_store, several_sizes)))


def test_an_epoch_is_shuffled_as_a_whole_if_the_store_fits_into_memory_or_the_cache(config, vit_store, tmp_path):
    assert make_plan(config()).shuffle_window == 0
    assert make_plan(config("--shuffle-window 3")).shuffle_window == 3
    url = f"file://{vit_store}"
    cache = f"--cache {tmp_path / 'cache'}"
    assert make_plan(config(cache, stores=(url,))).shuffle_window == 0
    gigabytes = sum(path.stat().st_size for path in vit_store.rglob("*") if path.is_file()) / 1e9
    assert make_plan(config(f"{cache} --cache-size {gigabytes}", stores=(url,))).shuffle_window == 1


def test_a_continued_run_keeps_its_shuffle_window(config, tmp_path):
    RunFolder(tmp_path / "run", {"task": "pretrain", "options": {"shuffle_window": 5}}, resume=True)
    assert make_plan(config()).shuffle_window == 5
    assert make_plan(config("--no-resume")).shuffle_window == 0
