"""A run read back: its weights or their average, its student, its encoder."""

import pytest
import torch

from fastmae.errors import InputError
from fastmae.runs.checkpoint import load_checkpoint, write_checkpoint
from fastmae.runs.load import encoder_of, load_run, load_student, options_of_run, weights_below


def test_a_run_is_loaded_from_its_folder_or_its_checkpoint(tiny_run):
    description, weights = load_run(tiny_run)
    assert description["task"] == "pretrain"
    by_file = load_run(tiny_run / "checkpoint.pt")
    assert by_file[0] == description
    assert all(torch.equal(by_file[1][name], tensor) for name, tensor in weights.items())


def test_a_folder_that_holds_no_run_is_named(tmp_path):
    with pytest.raises(InputError, match=str(tmp_path)):
        load_run(tmp_path)


def test_the_moving_average_is_loaded_if_there_is_one(tmp_path):
    model, average = ({"weight": torch.full((2,), value)} for value in (1.0, 2.0))
    write_checkpoint(tmp_path / "a.pt", {"model": model, "run": {"task": "pretrain"}})
    write_checkpoint(tmp_path / "b.pt", {"model": model, "ema": average, "run": {"task": "pretrain"}})
    assert torch.equal(load_run(tmp_path / "a.pt")[1]["weight"], model["weight"])
    assert torch.equal(load_run(tmp_path / "b.pt")[1]["weight"], average["weight"])


def test_the_options_of_a_run_are_those_it_was_trained_with(tiny_run):
    options = options_of_run(tiny_run, load_run(tiny_run)[0])
    assert (options.run, options.stores) == (tiny_run, ())
    assert (options.encoder_depth, options.image_size, options.epochs, options.batch_size) == (2, 64, 2, 8)


def test_the_student_has_all_weights_of_the_checkpoint(tiny_run):
    _, student = load_student(tiny_run)
    saved = load_checkpoint(tiny_run / "checkpoint.pt")["model"]
    assert student.state_dict().keys() == saved.keys()
    assert all(torch.equal(tensor, saved[name]) for name, tensor in student.state_dict().items())
    assert not student.training


def test_the_encoder_has_the_students_weights_or_random_ones(tiny_run):
    description, weights = load_run(tiny_run)
    trained = encoder_of(description, weights, trained=True, extra={}).state_dict()
    random = encoder_of(description, weights, trained=False, extra={}).state_dict()
    assert all(torch.equal(tensor, weights[f"encoder.{name}"]) for name, tensor in trained.items())
    assert trained.keys() == random.keys()
    assert not torch.allclose(trained["blocks.0.mlp.fc1.weight"], random["blocks.0.mlp.fc1.weight"])


def test_a_run_without_an_encoder_is_refused():
    with pytest.raises(InputError, match="fastmae linear"):
        encoder_of({"task": "linear"}, {}, trained=True, extra={})


def test_the_weights_below_a_prefix_lose_it():
    one, two = torch.tensor(1), torch.tensor(2)
    weights = {"encoder.norm.weight": one, "decoder.norm.weight": two}
    assert weights_below("encoder.", weights) == {"norm.weight": one}
    assert weights_below("", weights) == weights
