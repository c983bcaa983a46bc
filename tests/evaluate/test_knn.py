"""k-NN against its formula written out in plain loops, and what RUN may be."""

import json
import math

import pytest
import torch

from fastmae.cli import run
from fastmae.probes.neighbours import knn_accuracy


def plain_knn(train, labels, query, classes, k, temperature):
    """Classes of one query, best first: the k nearest by cosine vote with exp(cosine / T)."""
    cosine = [float(torch.dot(query, t) / (query.norm() * t.norm())) for t in train]
    nearest = sorted(range(len(train)), key=lambda i: -cosine[i])[:k]
    votes = [0.0] * classes
    for i in nearest:
        votes[labels[i]] += math.exp(cosine[i] / temperature)
    return sorted(range(classes), key=lambda c: -votes[c])


def test_accuracy_equals_the_formula_in_loops():
    generator = torch.Generator().manual_seed(0)
    train, val = torch.randn(60, 5, generator=generator), torch.randn(40, 5, generator=generator)
    labels, truth = torch.randint(0, 8, (60,), generator=generator), torch.randint(0, 8, (40,), generator=generator)
    ranked = [plain_knn(train, labels.tolist(), query, 8, 7, 0.07) for query in val]
    top1 = 100 * sum(r[0] == t for r, t in zip(ranked, truth.tolist(), strict=True)) / 40
    top5 = 100 * sum(t in r[:5] for r, t in zip(ranked, truth.tolist(), strict=True)) / 40
    assert knn_accuracy(train, labels, val, truth, 8, 7, 0.07) == pytest.approx((top1, top5))
    assert 0 < top1 < top5 < 100


def test_features_do_not_depend_on_their_length_and_identical_ones_are_found():
    train, labels = torch.eye(6), torch.arange(6)
    assert knn_accuracy(train, labels, 3.0 * train, labels, 6, 1, 0.07) == (100.0, 100.0)
    assert knn_accuracy(train, labels, train, (labels + 1) % 6, 6, 1, 0.07)[0] == 0.0


def test_more_neighbours_than_training_images_and_fewer_than_five_classes():
    train, labels = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 1])
    assert knn_accuracy(train, labels, train, labels, 2, 20, 0.07) == (100.0, 100.0)


def top1(capsys, *args):
    assert run(["knn", *args, "--json", "--workers", "0", "--device", "cpu"]) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_a_bare_timm_name_and_a_teacher_by_name(photos, vit_weights, capsys):
    random = top1(capsys, "timm/vit_tiny_patch16_224", str(photos), "--no-pretrained", "--image-size", "32")
    assert (random["train"], random["val"], random["classes"], random["dim"]) == (30, 10, 2, 192)
    given = top1(
        capsys,
        "timm/vit_tiny_patch16_224",
        str(photos),
        "--weights",
        str(vit_weights),
        "--image-size",
        "32",
        "--pool",
        "class",
    )
    assert given["dim"] == 192
    teacher = top1(capsys, "efficientnet-lite0", str(photos))
    assert teacher["dim"] == 320
    assert teacher["top1"] == 100.0  # cut-outs of a temple and of a flower
    assert 0 <= random["top1"] <= 100


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["efficientnet-lite0", "--pool", "class"], "no class token"),
        (["timm/vit_tiny_patch16_224", "--features", "teacher"], "goes with a run"),
        (["timm/vit_tiny_patch16_224", "--no-pretrained", "--block", "12"], "blocks 0 to 11"),
        (["no-such-run"], "no such run; give a run's folder"),
        (["efficientnet-lite0", "--k", "0"], "--k 0"),
    ],
)
def test_what_does_not_go_together_is_one_line(args, says, photos, capsys):
    assert run(["knn", args[0], str(photos), *args[1:]]) == 2
    err = capsys.readouterr().err
    assert says in err.splitlines()[-1]
    assert "Traceback" not in err


def test_bad_data_are_named(photos, tmp_path, capsys):
    import shutil

    data = tmp_path / "data"
    shutil.copytree(photos, data)
    shutil.copytree(data / "val" / "china", data / "val" / "zebra")
    assert run(["knn", "efficientnet-lite0", str(data)]) == 2
    assert "zebra: a class that train/ does not have" in capsys.readouterr().err
    shutil.rmtree(data / "val" / "zebra")
    (data / "val" / "china" / "broken.jpg").write_bytes(b"<html>")
    assert run(["knn", "efficientnet-lite0", str(data), "--workers", "0"]) == 2
    assert "broken.jpg: not an image" in capsys.readouterr().err
