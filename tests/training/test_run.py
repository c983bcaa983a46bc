"""How a batch is divided, and how a run is set up."""

import pytest

from fastmae.cli import parse
from fastmae.pretraining.plan import make_plan
from fastmae.pretraining.pretrain import pretraining_task
from fastmae.training.run import grad_accum_steps, launch_processes, set_up


@pytest.mark.parametrize(
    ("share", "micro_batch", "steps"), [(8, 0, 1), (8, 8, 1), (8, 3, 4), (6, 4, 2), (7, 3, 7), (4096, 256, 16)]
)
def test_a_share_is_cut_into_the_fewest_equal_batches_that_fit(share, micro_batch, steps):
    assert grad_accum_steps(share, micro_batch) == steps


def test_parameters_with_fewer_than_two_dimensions_get_no_weight_decay(vit_store, tiny_student, tmp_path):
    config = parse("pretrain", [str(vit_store), str(tmp_path / "run"), *tiny_student])
    plan = make_plan(config)
    task = pretraining_task(config, plan)
    state = set_up(config, task, plan.settings, *launch_processes(config, task, plan.settings)).state
    decayed, exempt = (
        {id(p) for group in state.optimizer.param_groups if (group["weight_decay"] > 0) is has for p in group["params"]}
        for has in (True, False)
    )
    trainable = {name: p for name, p in state.network.named_parameters() if p.requires_grad}
    assert decayed | exempt == {id(p) for p in trainable.values()}
    for name, parameter in trainable.items():
        assert (id(parameter) in exempt) == (parameter.ndim <= 1), name
    assert state.optimizer.param_groups[0]["betas"] == (0.9, 0.95)
