"""`pretrain --profile`: the stages of a step compute its gradient, and the advice names the option to change."""

import json

import pytest
import torch

from fastmae.cli import parse, run
from fastmae.pretraining.plan import make_plan
from fastmae.pretraining.pretrain import pretraining_task
from fastmae.pretraining.profile import STAGES, StageClock, advise, forward_and_backward
from fastmae.training.run import launch_processes, set_up, train_batches


@pytest.mark.parametrize(
    "options",
    [
        ["--fusion"],
        ["--target", "pixels"],
        ["--relation-weight", "1", "--relation-layers", "all"],
        ["--mask-ratio", "0", "--no-all-layers", "--relation-weight", "1"],
    ],
)
def test_the_gradient_computed_in_stages_equals_the_gradient_of_the_step(options, vit_store, tiny_student, tmp_path):
    config = parse("pretrain", [str(vit_store), str(tmp_path / "run"), *tiny_student, *options, "--workers", "0"])
    plan = make_plan(config)
    task = pretraining_task(config, plan)
    fabric, grad_accum_steps = launch_processes(config, task, plan.settings)
    training_run = set_up(config, task, plan.settings, fabric, grad_accum_steps)
    student = training_run.state.network
    batch = next(train_batches(training_run))
    forward_and_backward(student, task.step, batch, fabric, StageClock(torch.device("cpu")))
    in_stages = {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}
    student.zero_grad()
    task.step(student, batch)["loss"].backward()
    at_once = {name: p.grad for name, p in student.named_parameters() if p.grad is not None}
    assert in_stages.keys() == at_once.keys()
    errors = {name: ((in_stages[name] - at_once[name]).norm() / at_once[name].norm()).item() for name in at_once}
    assert max(errors.values()) < 1e-4, errors


def test_the_profile_gives_each_stages_share_of_the_time_and_writes_nothing(vit_store, tiny_student, tmp_path, capsys):
    args = ["pretrain", str(vit_store), str(tmp_path / "run"), *tiny_student, "--profile", "--epochs", "6", "--json"]
    assert run(args) == 0
    captured = capsys.readouterr()
    result = json.loads(captured.out.splitlines()[-1])
    assert list(result["shares"]) == list(STAGES)
    assert sum(result["shares"].values()) == pytest.approx(1, abs=1e-3)
    assert result["shares"]["encoder"] > 0.05
    assert result["advice"] in captured.err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("shares", "advice"),
    [
        ({"loader": 0.4}, "--workers 5 (now 1)"),
        ({"copy": 0.2}, "--codec pq48"),
        ({"optimiser": 0.3}, "--batch-size"),
        ({"decoder": 0.8}, "--decoder-depth 1"),
        ({"encoder": 0.8}, "--precision bf16-mixed"),
    ],
)
def test_the_advice_names_the_option_that_shortens_the_longest_stage(shares, advice):
    config = parse("pretrain", ["a", "b", "--workers", "1"])
    assert advice in advise({**dict.fromkeys(STAGES, 0.01), **shares}, config)
