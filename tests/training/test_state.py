"""A state that is saved and restored into a fresh network continues as if it had not been interrupted."""

import pytest
import torch
from timm.utils import ModelEmaV3
from torch import nn

from fastmae.runs.folder import RunFolder
from fastmae.training.state import TrainState


@pytest.fixture
def new_state(fabric):
    """() -> the state of a new run, with other initial weights each time."""

    def build():
        network = nn.Linear(3, 1)
        optimizer = torch.optim.AdamW(network.parameters(), lr=0.1)
        model = fabric.setup_module(network)
        return TrainState(network, model, fabric.setup_optimizers(optimizer), ModelEmaV3(network, 0.9))

    return build


def take_steps(state, fabric, count):
    for step in range(count):
        images = torch.randn(4, 3, generator=torch.Generator().manual_seed(step))
        fabric.backward(state.model(images).square().mean())
        state.optimizer.step()
        state.optimizer.zero_grad()
        state.step += 1
        state.ema.update(state.network, state.step)


def test_a_restored_state_continues_as_the_saved_one(new_state, fabric, tmp_path):
    folder = RunFolder(tmp_path / "run", {"task": "pretrain"}, resume=True)
    state, restored = new_state(), new_state()
    take_steps(state, fabric, 3)
    state.seconds, state.sums, state.summed_steps, state.best = 7.5, {"loss": 2.0}, 3, 81.0
    state.save(fabric, folder)
    restored.restore(fabric, folder)
    counters = ("step", "seconds", "sums", "summed_steps", "best")
    assert [getattr(restored, name) for name in counters] == [getattr(state, name) for name in counters]
    assert torch.equal(restored.evaluated_network.weight, state.evaluated_network.weight)
    for each in (state, restored):
        take_steps(each, fabric, 2)
    assert torch.equal(restored.network.weight, state.network.weight)
    assert torch.equal(restored.evaluated_network.weight, state.evaluated_network.weight)


def test_without_a_checkpoint_the_state_stays_new(new_state, fabric, tmp_path):
    state = new_state()
    weight = state.network.weight.detach().clone()
    state.restore(fabric, RunFolder(tmp_path / "run", {"task": "pretrain"}, resume=True))
    assert state.step == 0
    assert torch.equal(state.network.weight, weight)


@pytest.mark.parametrize(("clip_grad", "norm_after"), [(0.0, 5.0), (1.0, 1.0), (100.0, 5.0)])
def test_gradients_are_clipped_to_a_norm_and_their_norm_before_is_returned(clip_grad, norm_after, new_state, fabric):
    state = new_state()
    state.network.weight.grad = torch.tensor([[3.0, 4.0, 0.0]])
    state.network.bias.grad = torch.zeros(1)
    assert state.clip_gradients(fabric, clip_grad).item() == pytest.approx(5.0)
    assert state.network.weight.grad.norm().item() == pytest.approx(norm_after, rel=1e-4)
