"""How a batch is cut into micro-batches, and one step over their accumulated gradients."""

import itertools

import pytest
import torch

from fastmae.training.run import grad_accum_steps, launch_processes, set_up, train_batches, train_step


@pytest.mark.parametrize(
    ("share", "micro_batch", "steps"), [(8, 0, 1), (8, 8, 1), (8, 3, 4), (6, 4, 2), (7, 3, 7), (4096, 256, 16)]
)
def test_a_share_is_cut_into_the_fewest_equal_micro_batches_that_fit(share, micro_batch, steps):
    assert grad_accum_steps(share, micro_batch) == steps


def first_step(config, task, settings):
    """Scalars and weights after the first step."""
    run = set_up(config, task, settings, *launch_processes(config, task, settings))
    scalars = train_step(run, itertools.islice(train_batches(run), run.grad_accum_steps))
    return scalars, task.network.weight.detach()


def test_accumulated_micro_batches_give_the_step_of_the_whole_batch(sums_task, options, settings):
    whole, weight = first_step(options(), sums_task(), settings)
    accumulated, accumulated_weight = first_step(options(micro_batch=1), sums_task(), settings)
    assert whole.keys() == accumulated.keys() == {"loss", "grad_norm"}
    for name, value in whole.items():
        assert accumulated[name].item() == pytest.approx(value.item(), rel=1e-5)
    assert torch.allclose(accumulated_weight, weight, atol=1e-6)


def test_the_tasks_own_optimizer_is_used_if_it_has_one(sums_task, options, settings):
    task = sums_task(optimizer=lambda groups, lr: torch.optim.SGD(groups, lr=lr))
    run = set_up(options(), task, settings, *launch_processes(options(), task, settings))
    assert isinstance(run.state.optimizer.optimizer, torch.optim.SGD)
    assert run.state.optimizer.param_groups[0]["initial_lr"] == settings.lr


def test_adamw_gets_the_options_betas(sums_task, options, settings):
    config, task = options(betas=(0.8, 0.9)), sums_task()
    run = set_up(config, task, settings, *launch_processes(config, task, settings))
    assert run.state.optimizer.param_groups[0]["betas"] == (0.8, 0.9)
