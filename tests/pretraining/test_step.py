from types import SimpleNamespace

import pytest
import torch

from fastmae.cli import parse
from fastmae.images.views import normalise
from fastmae.pretraining.plan import make_plan
from fastmae.pretraining.pretrain import pretraining_task
from fastmae.pretraining.step import PREFETCH_EVERY, PretrainStep, prefetching
from fastmae.tokens.format import shard_name
from fastmae.training.run import Held, StepModule, launch_processes, set_up, train_batches


class PixelsPlusOne:
    """The target of a view: its normalised pixels plus one."""

    reads_middle = False

    def __call__(self, batch, pixel_scale):
        return pixel_scale(batch.pixels) + 1


def test_a_step_compares_the_prediction_from_views_and_their_normalisation_with_the_target():
    pixels, ids_shuffle = torch.randint(0, 256, (2, 3, 4, 4), dtype=torch.uint8), torch.arange(8).view(2, 4)
    mean, std = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
    step = PretrainStep(PixelsPlusOne(), lambda *compared: {"loss": compared}, mean, std)
    batch = SimpleNamespace(pixels=pixels, ids_shuffle=ids_shuffle)
    prediction, features = step(lambda *inputs: inputs, batch)["loss"]
    assert prediction[0] is pixels
    assert prediction[1] is ids_shuffle
    assert torch.equal(prediction[2](pixels), normalise(pixels, mean, std))
    assert torch.equal(features, normalise(pixels, mean, std) + 1)


class Store:
    """A remote store that notes which shards are prefetched."""

    def __init__(self, shard_size):
        self.info, self.files, self.prefetched = SimpleNamespace(shard_size=shard_size), self, []

    def prefetch(self, names):
        self.prefetched.append(names)


@pytest.mark.parametrize("grad_accum_steps", [1, 2])
def test_the_shards_of_the_next_steps_are_prefetched_regularly(grad_accum_steps):
    first, alike, other_shards = Store(8), Store(8), Store(16)
    plan = SimpleNamespace(stores=[[first], [alike, other_shards]], shuffle_window=2)
    sampler = SimpleNamespace(
        grad_accum_steps=grad_accum_steps, start_step=5, shards_ahead=lambda step, count: range(step, step + count)
    )
    batches = range((2 * PREFETCH_EVERY + 1) * grad_accum_steps)
    assert list(prefetching(plan)(batches, sampler)) == list(batches)
    expected = [
        [shard_name(shard) for shard in range(step, step + 4)]
        for step in (5, 5 + PREFETCH_EVERY, 5 + 2 * PREFETCH_EVERY)
    ]
    assert first.prefetched == alike.prefetched == expected
    assert other_shards.prefetched == []  # its shards of these numbers hold other images


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("vit_tiny_patch16_224", []),
        ("vit_tiny_patch16_224", ["--target", "pixels", "--norm", "none"]),
        ("vit_small_patch16_dinov3", ["--precision", "bf16-mixed"]),
    ],
)
def test_student_target_and_loss_compile_as_one_graph(name, options, vit_store, tiny_student, tmp_path):
    args = [str(vit_store), str(tmp_path), *tiny_student, "--encoder", name, *options, "--workers", "0"]
    config = parse("pretrain", args)
    plan = make_plan(config)
    task = pretraining_task(config, plan)
    training_run = set_up(config, task, plan.settings, *launch_processes(config, task, plan.settings))
    batch = next(train_batches(training_run))
    module = StepModule(task.network, task.step)
    # Only traced: generating code would take minutes on a CPU.
    compiled = torch.compile(module, backend="eager", fullgraph=True)
    with training_run.fabric.autocast():
        losses = [each(Held(batch))["loss"] for each in (module, compiled)]
    torch.testing.assert_close(*losses, rtol=1e-2 if options[:1] == ["--precision"] else 1e-6, atol=0)
