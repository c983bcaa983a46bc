"""The options of a study's runs, and which runs of an earlier call a study may read back."""

from dataclasses import replace

import pytest

from fastmae.errors import InputError
from fastmae.studies.study_runs import Variant

SMALL = "base: {encoder_depth: 2, encoder_width: 64, encoder_heads: 2, image_size: 64, epochs: 10}\n"
ARM = Variant("photos", "vit", "a", 0)


def test_warm_up_is_at_most_a_fifth_of_a_run_unless_the_file_sets_it(runs_of):
    runs = runs_of(f"{SMALL}arms: {{a: {{}}, b: {{options: {{warmup_epochs: 4}}, share: 0.5}}}}")
    assert runs.options(ARM, 0).warmup_epochs == 1  # the recipe's
    own = runs.options(replace(ARM, arm="b"), 0)
    assert (own.epochs, own.warmup_epochs) == (5, 4)
    runs = runs_of(f"{SMALL.replace('epochs: 10', 'epochs: 2')}arms: {{a: {{}}}}")
    assert runs.options(ARM, 0).warmup_epochs == pytest.approx(0.4)


def test_the_share_of_an_arm_is_of_its_data_sets_epochs(runs_of):
    runs = runs_of(f"{SMALL}data: {{photos: {{base: {{epochs: 6}}}}}}\narms: {{a: {{share: 0.5}}, b: {{epochs: 3}}}}")
    assert runs.options(ARM, 0).epochs == 3
    assert runs.options(replace(ARM, arm="b"), 0).epochs == 3


def test_a_run_of_another_store_is_not_read_back(runs_of, cnn_store, small_store):
    text = f"{SMALL}arms: {{a: {{}}}}"
    runs = runs_of(text)
    runs.write_job(ARM, 0, "val")
    runs_of(text).check_begun()
    for other in (cnn_store, small_store):  # another teacher; the same one with another codec
        with pytest.raises(InputError, match=f"arm a: .*seed0 was trained on another store than {other}"):
            runs_of(text, other).check_begun()


def test_a_run_with_other_options_is_not_read_back(runs_of):
    runs_of(f"{SMALL}arms: {{a: {{}}}}").write_job(ARM, 0, "val")
    for change, named in (("{loss: cosine}", "--loss auto, not cosine"), ("{share: 0.5}", "--epochs 10.0, not 5.0")):
        with pytest.raises(InputError, match=named):
            runs_of(f"{SMALL}arms: {{a: {change}}}").check_begun()


def test_with_seconds_the_epochs_of_a_begun_run_are_kept(runs_of):
    text = f"seconds: 75\n{SMALL.replace(', epochs: 10', '')}arms: {{a: {{}}}}"
    first = runs_of(text)
    first.epochs[ARM] = 3.21
    first.write_job(ARM, 0, "val")
    later = runs_of(text)
    later.check_begun()
    assert later.epochs == {ARM: 3.21}
    with pytest.raises(InputError, match="begun with 75 s, not 60 s"):
        runs_of(text.replace("75", "60")).check_begun()
    twice = runs_of(text)
    twice.config = replace(twice.config, jobs=2)
    with pytest.raises(InputError, match="begun with --jobs 1, not 2, at another speed"):
        twice.check_begun()
    with pytest.raises(InputError, match="begun with 75 s, not no set time"):
        runs_of(f"{SMALL}arms: {{a: {{}}}}").check_begun()


def test_arms_that_come_to_the_same_training_are_named_before_the_runs(runs_of, cnn_store, vit_store, caplog):
    text = f"{SMALL}arms: {{a: {{}}, b: {{loss: cosine}}, c: {{options: {{loss: cosine}}, share: 0.5}}}}"
    runs_of(text, cnn_store)
    same = "arm b is the same training as arm a"
    assert [same in message for message in caplog.messages] == [True]  # a CNN's `--loss auto` is cosine; c is shorter
    caplog.clear()
    runs_of(text, vit_store)
    assert not caplog.messages
