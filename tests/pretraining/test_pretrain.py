"""The task of `pretrain` for the training driver."""

import pytest

from fastmae.cli import parse
from fastmae.pretraining.plan import make_plan
from fastmae.pretraining.pretrain import as_planned, pretrain, pretraining_task
from fastmae.runs.folder import read_evaluations
from fastmae.training.run import launch_processes, set_up


@pytest.fixture
def config(vit_store, tiny_student, tmp_path):
    """(options) -> the options of `pretrain` for the small student on `vit_store`."""

    def build(options=""):
        args = [str(vit_store), str(tmp_path / "run"), *tiny_student, "--workers", "0", *options.split()]
        return parse("pretrain", args)

    return build


def test_parameters_with_fewer_than_two_dimensions_get_no_weight_decay(config):
    options = config()
    plan = make_plan(options)
    task = pretraining_task(options, plan)
    state = set_up(options, task, plan.settings, *launch_processes(options, task, plan.settings)).state
    weight_decay = {id(p): group["weight_decay"] for group in state.optimizer.param_groups for p in group["params"]}
    trainable = {name: p for name, p in state.network.named_parameters() if p.requires_grad}
    assert len(weight_decay) == len(trainable)
    for name, parameter in trainable.items():
        assert (weight_decay[id(parameter)] == 0) == (parameter.ndim <= 1), name
    assert state.optimizer.param_groups[0]["betas"] == (0.9, 0.95)


def test_the_same_seed_gives_the_same_initial_weights(config):
    def first_weights(options):
        return pretraining_task(options, make_plan(options)).network.encoder.blocks[0].mlp.fc1.weight

    assert first_weights(config()).equal(first_weights(config()))
    assert not first_weights(config()).equal(first_weights(config("--seed 1")))


def test_the_description_records_what_the_plan_has_chosen(config):
    options = config("--norm auto")
    planned = as_planned(options, make_plan(options))
    assert (planned.norm, planned.shuffle_window) == ("patch", 0)
    task = pretraining_task(planned, make_plan(planned))
    store = task.description["store"]
    assert (store["images"], store["middle_sizes"], store["patch_size"], store["codec"]) == (30, [96], 16, "fp32")
    assert task.description["target_dims"] == [192]
    assert task.inputs == {"stores": list(options.stores)}


def test_a_callers_own_measure_replaces_the_k_nn_accuracy(config, tmp_path):
    pretrain(config("--epochs 2 --knn-every 1"), measure=lambda student: {"depth": len(student.encoder.blocks)})
    evaluations = read_evaluations(tmp_path / "run")
    assert [(entry["step"], entry["depth"]) for entry in evaluations] == [(4, 2), (8, 2)]
