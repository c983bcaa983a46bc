"""`pretrain --profile`: the two-stage gradient is the gradient, the shares are a whole, the advice names the loudest part."""

import json

import pytest
import torch

from fastmae.cli import parse, run
from fastmae.images.views import normalise
from fastmae.pretraining.plan import plan
from fastmae.pretraining.profile import PARTS, Clock, _step_of, advise
from fastmae.pretraining.step import launch_for, view_loader
from fastmae.student.loss import StudentLoss
from fastmae.student.student import build_student


@pytest.mark.parametrize("target", [["--fusion"], ["--target", "pixels"]])
def test_the_gradient_in_two_stages_is_the_gradient(target, vit_store, tiny_student, tmp_path):
    config = parse("pretrain", [str(vit_store), str(tmp_path / "run"), *tiny_student, *target, "--workers", "0"])
    made, fabric = plan(config), launch_for(config)
    student = build_student(config, made.patch_size, made.target_dim, made.channels)
    batch = next(iter(view_loader(config, made, 0, fabric)))
    _step_of(config, made, fabric, student)(batch, Clock(torch.device("cpu")))
    found = {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}
    student.zero_grad()
    images = normalise(batch.pixels, *made.stores[0][-1].normalisation)
    loss = StudentLoss(config.loss, config.all_layers_weight, made.target.dims, (1.0,))
    loss(student(images, batch.ids_shuffle), made.target(batch, images), batch.ids_shuffle)["loss"].backward()
    expected = {name: p.grad for name, p in student.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys()
    worst = {name: ((found[name] - expected[name]).norm() / expected[name].norm()).item() for name in found}
    assert max(worst.values()) < 1e-4, worst


def test_the_command_says_where_the_time_goes_and_leaves_nothing(vit_store, tiny_student, tmp_path, capsys):
    assert (
        run(["pretrain", str(vit_store), str(tmp_path / "run"), *tiny_student, "--profile", "--epochs", "6", "--json"])
        == 0
    )
    captured = capsys.readouterr()
    result = json.loads(captured.out.splitlines()[-1])
    assert tuple(result["shares"]) == PARTS
    assert sum(result["shares"].values()) == pytest.approx(1, abs=1e-3)
    assert result["shares"]["encoder"] > 0.05
    assert result["advice"] in captured.err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("loud", "says"),
    [
        ({"loader": 0.4}, "the loader is 40 % of a step: give --workers 5 (now 1)"),
        ({"copy": 0.2}, "--codec pq48"),
        ({"optimiser": 0.3}, "--batch-size"),
        ({"decoder": 0.8}, "--decoder-depth 1"),
        ({"encoder": 0.8}, "where the time should go"),
    ],
)
def test_the_advice_names_the_part_to_change(loud, says):
    config = parse("pretrain", ["a", "b", "--workers", "1"])
    assert says in advise({**dict.fromkeys(PARTS, 0.01), **loud}, config)
