"""Where an option's value comes from, and that flags, YAML and Python answer alike."""

import os
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated

import numpy as np
import pytest

from fastmae.cli import as_yaml, parse
from fastmae.config import FinetuneConfig, KnnConfig, PretrainConfig, TokenizeConfig
from fastmae.config.ranges import Range
from fastmae.config.recipes import load_recipe
from fastmae.config.resolve import numbers
from fastmae.errors import InputError


def pretraining(**given):
    return PretrainConfig(**{"stores": "a.tokens", "run": "run", **given})


def test_a_recipe_is_resolved_by_the_constructor():
    config = pretraining(recipe="vit_tiny_cpu", epochs=1)
    assert load_recipe("vit_tiny_cpu").items() <= {**vars(config), "epochs": 30}.items()
    assert config.epochs == 1
    assert (config.stores, config.run) == (("a.tokens",), Path("run"))


def test_each_source_goes_over_the_one_before(tmp_path):
    file = tmp_path / "options.yaml"
    file.write_text("target: pixels\nepochs: 7\nbatch-size: 64\n")
    config = pretraining(recipe="vit_tiny_cpu", config=file, batch_size=8)
    assert config.weight_decay == 0.05  # the default
    assert (config.decoder_depth, config.loss) == (8, "mse")  # what the target implies, over the recipe's own target
    assert config.encoder_width == load_recipe("vit_tiny_cpu")["encoder_width"]  # the recipe
    assert config.epochs == 7  # the file, over the recipe
    assert config.batch_size == 8  # the caller, over the file


def test_the_sizes_of_a_recipe_are_those_of_its_own_encoder():
    sizes = ("encoder_width", "encoder_depth", "encoder_heads")
    recipe = load_recipe("vit_tiny_cpu")
    own = pretraining(recipe="vit_tiny_cpu", encoder=recipe["encoder"])
    assert [getattr(own, size) for size in sizes] == [recipe[size] for size in sizes]
    other = pretraining(recipe="vit_tiny_cpu", encoder="vit_small_patch16_224", encoder_depth=3)
    assert [getattr(other, size) for size in sizes] == [None, 3, None]


def test_another_target_takes_the_relations_of_a_recipe_away():
    assert pretraining(recipe="visible_tiny_cpu").relation_weight == 1
    assert pretraining(recipe="visible_tiny_cpu", target="pixels").relation_weight == 0
    assert pretraining(recipe="visible_tiny_cpu", target="pixels", relation_weight=2).relation_weight == 2


def test_hog_takes_its_own_norm_and_loss_beside_a_recipe_that_sets_others():
    config = pretraining(recipe="visible_tiny_cpu", target="hog")
    assert (config.norm, config.loss) == ("none", "mse")
    assert pretraining(recipe="visible_tiny_cpu", target="hog", norm="patch").norm == "patch"


def test_replacing_an_option_keeps_the_resolved_values():
    config = pretraining(recipe="mae_tiny_cpu")
    assert replace(config, epochs=3) == pretraining(recipe="mae_tiny_cpu", epochs=3)


BAD_VALUES = [
    ("epochs", 0, "more than 0 to 1000000"),
    ("epochs", "many", "number"),
    ("batch_size", 1.5, "whole number"),
    ("batch_size", "many", "whole number"),
    ("base_lr", "nan", "more than 0"),
    ("base_lr", "inf", "more than 0"),
    ("min_lr", "inf", "0 to 10000"),
    ("min_lr", "nan", "0 to 10000"),
    ("min_lr", 1e300, "0 to 10000"),
    ("epochs", 10**300, "more than 0 to 1000000"),
    ("decoder_width", 4_000_000_000, "1 to 65536"),
    ("batch_size", 100_000_000, "1 to 16777216"),
    ("encoder_depth", 100_000_000, "1 to 256"),
    ("ema", 1.0, "0 to less than 1"),
    ("mask_ratio", 1.0, "0 to less than 1"),
    ("norm", "patc", "did you mean 'patch'"),
    ("seed", -1, "0 to less than"),
    ("seed", 10**400, "0 to less than"),
    ("target", ["tokens"], "'teacher'"),
    ("workers", -2, "-1 to 1024"),
]


@pytest.mark.parametrize(("name", "value", "way_out"), BAD_VALUES, ids=[f"{n} {str(v)[:9]}" for n, v, _ in BAD_VALUES])
def test_flags_yaml_and_python_refuse_a_bad_value_with_the_same_words(name, value, way_out, tmp_path):
    file = tmp_path / "options.yaml"
    file.write_text(f"{name}: {value}\n")
    flag = f"--{name.replace('_', '-')}"
    messages = []
    for attempt in (
        lambda: parse("pretrain", ["a.tokens", "run", flag, str(value)]),
        lambda: parse("pretrain", ["a.tokens", "run", "--config", str(file)]),
        lambda: pretraining(**{name: value}),
        lambda: pretraining(**{name: str(value)}),
    ):
        with pytest.raises(InputError) as error:
            attempt()
        messages.append(str(error.value).removeprefix(f"{file}: "))
    assert (
        len({message.replace(f"{float(value)}" if isinstance(value, float) else "", "") for message in messages}) == 1
    )
    assert flag in messages[0]
    assert way_out in messages[0]


@pytest.mark.promise("numbers")
@pytest.mark.parametrize(
    "number", ["9" * 5000, 10**5000, 16**5000, "0x" + "f" * 5000], ids=["text", "10^", "16^", "hex"]
)
def test_a_number_of_thousands_of_digits_is_refused_in_a_short_line(number):
    with pytest.raises(InputError, match=r"^--batch-size .{,100}: give") as caught:
        pretraining(batch_size=number)
    assert len(str(caught.value)) < 200


@pytest.mark.promise("files")
def test_yaml_that_stands_for_more_than_it_says_is_refused(tmp_path):
    file = tmp_path / "options.yaml"
    file.write_text("a: &a [x, x]\nb: [*a, *a]\n")
    with pytest.raises(InputError, match=r"options\.yaml: .*alias"):
        pretraining(config=file)


@pytest.mark.promise("files")
def test_options_that_come_out_of_a_pipe_are_refused_instead_of_waited_for(tmp_path):
    os.mkfifo(tmp_path / "options.yaml")
    with pytest.raises(InputError, match=r"options\.yaml: is a named pipe"):
        pretraining(config=tmp_path / "options.yaml")


@pytest.mark.promise("numbers")
@pytest.mark.parametrize("text", ["", "1,,2", "1,x", "inf", "nan", "0", "1e300", "9" * 5000])
def test_numbers_within_a_text_have_a_range_too(text):
    with pytest.raises(InputError, match=r"^--store-weights .{,100}: give"):
        numbers(Annotated[float, Range(gt=0, le=100)], text, "--store-weights")
    assert numbers(Annotated[float, Range(gt=0, le=100)], "1, 0.5", "--store-weights") == (1, 0.5)


@pytest.mark.parametrize(
    "given",
    [{"flip": "no"}, {"flip": 1}, {"epochs": True}, {"betas": (0.9,)}, {"betas": (0.9, 1.0)}, {"init": ["a"]}],
    ids=str,
)
def test_a_python_value_of_another_type_names_its_option(given):
    with pytest.raises(InputError, match=f"--{next(iter(given))}"):
        pretraining(**given)


def test_values_are_converted_but_not_rounded():
    config = pretraining(epochs="3", base_lr="1e-3", betas=[0.8, 0.9], knn_data="photos", stores=["a", "b"])
    assert (config.epochs, config.base_lr, config.betas) == (3, 1e-3, (0.8, 0.9))
    assert (config.knn_data, config.stores) == (Path("photos"), ("a", "b"))
    assert TokenizeConfig(images="a", store="b", middle_size=96).middle_size == "96"
    assert KnnConfig(run=Path("run"), data="b").run == "run"
    assert FinetuneConfig(run="a", data="b", image_size=None).image_size is None
    assert pretraining(epochs=np.int64(3), base_lr=np.float32(0.5), run=2024, recipe="None").run == Path("2024")


def test_an_unknown_option_and_a_missing_one_are_named():
    with pytest.raises(InputError, match="did you mean 'epochs'"):
        pretraining(epcohs=3)
    with pytest.raises(InputError, match="RUN and DATA"):
        KnnConfig()


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"decoder_width": 10, "decoder_heads": 3}, "--decoder-heads"),
        ({"target": "pixels", "all_layers": True}, "--no-all-layers"),
        ({"target": "hog", "store_weights": "1,2"}, "--store-weights"),
        ({"strategy": "fsdp", "ema": 0.9}, "--ema"),
    ],
)
def test_options_that_contradict_each_other_are_named(given, named):
    with pytest.raises(InputError, match=named):
        pretraining(**given)


@pytest.mark.parametrize(
    ("typed", "value"),
    [
        ([], "auto"),
        (["--value-range", "file"], "file"),
        (["--value-range", "-1000", "400"], (-1000.0, 400.0)),
        (["--value-range", "-1e3", "4e2"], (-1000.0, 400.0)),
        (["--value-range=-1000 400"], (-1000.0, 400.0)),
        (["--value_range", "0", "4095"], (0.0, 4095.0)),
    ],
)
def test_an_option_takes_a_word_or_two_numbers_before_and_after_the_arguments(typed, value):
    for words in (["images", "a.tokens", *typed], [*typed, "images", "a.tokens"], ["images", *typed, "a.tokens"]):
        config = parse("tokenize", words)
        assert (config.value_range, config.images) == (value, Path("images"))


def test_a_word_or_two_numbers_come_from_python_and_yaml_too(tmp_path):
    tokenizing = partial(TokenizeConfig, images="images", store="a.tokens")
    assert tokenizing(value_range=(-1000, 400)).value_range == (-1000.0, 400.0)
    for text in ("value-range: [-1000, 400]", "value_range: -1000 400"):
        (tmp_path / "options.yaml").write_text(text)
        assert tokenizing(config=tmp_path / "options.yaml").value_range == (-1000.0, 400.0)
    config = tokenizing(value_range=[0, 4095])
    (tmp_path / "options.yaml").write_text(as_yaml(config))
    assert tokenizing(config=tmp_path / "options.yaml").value_range == (0.0, 4095.0)


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        (["fiel"], "--value-range fiel: give auto, file, set, or 2 numbers; did you mean 'file'?"),
        (["5"], "--value-range 5: give auto, file, set, or 2 numbers"),
        (["400", "-1000"], "--value-range 400 -1000: give the smaller one first"),
        (["1", "1"], "--value-range 1 1: give the smaller one first"),
        (["0", "inf"], "--value-range 0.0 inf: give -1000000000000 to 1000000000000"),
        (["nan", "1"], "--value-range nan 1.0: give -1000000000000 to 1000000000000"),
    ],
)
def test_what_is_neither_a_word_nor_two_numbers_in_order_is_refused(value, problem):
    with pytest.raises(InputError) as refused:
        parse("tokenize", ["images", "a.tokens", "--value-range", *value])
    assert str(refused.value) == problem
    with pytest.raises(InputError, match="needs a value"):
        TokenizeConfig(images="images", store="a.tokens", value_range=None)
