"""What a stranger may have written into a run: each is refused in one line that names the file."""

import copy

import pytest
import torch

from fastmae.errors import InputError
from fastmae.runs.description import check_description
from fastmae.runs.encoder import load_encoder
from fastmae.runs.folder import read_run

pytestmark = pytest.mark.promise("networks")


@pytest.fixture(scope="module")
def saved(tiny_run):
    return torch.load(tiny_run / "checkpoint.pt", weights_only=True)


def changed(value, path, new):
    value = copy.deepcopy(value)
    *keys, last = path
    part = value
    for key in keys:
        part = part[key]
    if new is None:
        del part[last]
    else:
        part[last] = new
    return value


def test_the_description_of_a_run_passes_as_it_is(tiny_run):
    description = read_run(tiny_run)
    assert check_description(description, "run.json") is description


@pytest.mark.parametrize(
    ("path", "new", "cause"),
    [
        (("run",), [1], "Expected `object`"),
        (("run", "options"), 3, "Expected `object`"),
        (("run", "options", "image_size"), None, "lacks the option --image-size"),
        (("run", "options", "encoder_depth"), 10**8, "--encoder-depth 100000000: give 1 to 256"),
        (("run", "options", "encoder_width"), 65536, "a network of .* weights, more than"),
        (("run", "options", "encoder"), "hf-hub:user/name", "timm has no network"),
        (("run", "options", "image_size"), 65, "not a multiple"),
        (("run", "store", "patch_size"), 0, "patch_size"),
        (("run", "store", "patch_size"), None, "patch_size"),
        (("run", "store", "normalisation"), [[0.5], [0.5]], "mean and std of 1 and 1 channels, not 3"),
        (("run", "store", "normalisation"), [[0.5] * 3, [0.0] * 3], "can't be used"),
        (("run", "store", "teachers"), [], "teachers"),
        (("model",), [1], "'model' holds other things than weights"),
        (("model", "encoder.norm.weight"), None, "lacks norm.weight"),
        (("model", "encoder.norm.weight"), torch.ones(3), r"norm.weight has shape \[3\]"),
        (("model", "encoder.norm.weight"), torch.full((64,), torch.nan), "norm.weight holds NaN"),
        (("step",), "x", "step"),
    ],
)
def test_a_checkpoint_that_can_not_be_used_is_refused(path, new, cause, saved, tmp_path):
    torch.save(changed(saved, path, new), tmp_path / "a.pt")
    with pytest.raises(InputError, match=cause) as caught:
        load_encoder(tmp_path / "a.pt")
    assert str(caught.value).startswith(f"{tmp_path}/a.pt: ")
    assert "\n" not in str(caught.value)


def test_a_run_that_names_neither_a_task_nor_a_store_is_refused(tmp_path, error_line):
    (tmp_path / "run.json").write_text('{"images": 3}')
    assert f"{tmp_path / 'run.json'}: the run's description names no task" in error_line(["report", str(tmp_path)])


@pytest.mark.parametrize("argument", ["pretrained", "checkpoint_path", "pretrained_cfg"])
def test_arguments_that_shape_no_network_are_refused_in_a_run_on_labels(argument, tmp_path):
    encoder = {
        "architecture": "vit_tiny_patch16_224",
        "arguments": {"num_classes": 2, argument: "x"},
        "prefix": "",
        "image_size": 64,
        "patch_size": 16,
        "channels": 3,
        "mean": [0.5] * 3,
        "std": [0.5] * 3,
        "resize": "whole",
        "source": "x",
        "weights_sha256": "x",
    }
    torch.save({"model": {"a": torch.ones(1)}, "run": {"task": "finetune", "encoder": encoder}}, tmp_path / "a.pt")
    with pytest.raises(InputError, match=rf"a\.pt: gives timm the argument '{argument}'"):
        load_encoder(tmp_path / "a.pt")


def test_a_run_does_not_continue_from_what_is_no_state_of_it(
    tiny_run, vit_store, tiny_student, saved, tmp_path, error_line
):
    for name, (path, new, cause) in {
        "a": (("optimizer",), None, "holds no optimizer"),
        "b": (("optimizer",), {"state": 3}, "optimizer's state does not fit"),
        "c": (("model", "mask_token"), None, "lacks mask_token"),
    }.items():
        run = tmp_path / name
        run.mkdir()
        (run / "run.json").write_bytes((tiny_run / "run.json").read_bytes())
        torch.save(changed(saved, path, new), run / "checkpoint.pt")
        args = ["pretrain", str(vit_store), str(run), *tiny_student, "--epochs", "2", "--workers", "0"]
        assert cause in error_line(args)
