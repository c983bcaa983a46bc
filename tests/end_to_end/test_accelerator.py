"""The commands on a simulated accelerator: they compute there what they compute on the CPU, and nearly that in bf16."""

import json

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from PIL import Image

from fastmae.cli import run
from fastmae.runs.folder import read_metrics
from fastmae.tokens.format import shard_path

pytestmark = pytest.mark.accelerator

STUDENT_SIZES = "--image-size 64 --batch-size 8 --warmup-epochs 1 --base-lr 0.02 --epochs 0.5"
STUDENT = f"""--encoder vit_tiny_patch16_224 --encoder-depth 2 --encoder-width 64 --encoder-heads 2 --decoder-width 32
    --decoder-heads 2 {STUDENT_SIZES}"""
TRAINING = {
    "pretrain, stored tokens": f"pretrain {{small_store}} {{out}} {STUDENT} --norm store",
    "pretrain, two teachers": f"pretrain {{vit_store}} {{small_store}} {{out}} {STUDENT}",
    "pretrain, an online teacher": f"pretrain {{vit_store}} {{out}} {STUDENT} --target teacher",
    "pretrain, pixels": f"pretrain {{vit_store}} {{out}} {STUDENT} --target pixels",
    "pretrain, HOG": f"pretrain {{vit_store}} {{out}} {STUDENT} --target hog",
    "pretrain, a CNN": f"pretrain {{vit_store}} {{out}} {STUDENT_SIZES} --encoder resnet10t "
    "--mask-ratio 0 --decoder-depth 0 --ema 0.9 --clip-grad 1",
    "linear": "linear {tiny_run} {photos} --out {out} --batch-size 8 --epochs 1",
    "finetune": "finetune {tiny_run} {photos} --out {out} --batch-size 8 --epochs 1",
    "segment": "segment {tiny_run} {shapes} --out {out} --batch-size 2 --epochs 1 --head-channels 16 --pictures 1",
    "detect": "detect {tiny_run} {shapes} --out {out} --batch-size 2 --epochs 1 --head-channels 16 "
    "--pictures 1 --image-size 64",
}
"""Name -> a command that trains, with the names of fixtures in the places of its inputs."""


@pytest.fixture(scope="session")
def shapes(tmp_path_factory):
    """Photos with one bright rectangle each, four for training and one for validation, for `segment` and `detect`."""
    root, random = tmp_path_factory.mktemp("shapes"), np.random.default_rng(0)
    (root / "classes.json").write_text(json.dumps({"classes": {"0": "ground", "1": "box"}, "ignore_index": 255}))
    for split, count in (("train", 4), ("val", 1)):
        photos, masks, objects = root / "images" / split, root / "masks" / split, root / f"coco_{split}"
        for folder in (photos, masks, objects):
            folder.mkdir(parents=True)
        (objects / "images").symlink_to(photos)
        coco = {"images": [], "annotations": [], "categories": [{"id": 1, "name": "box"}]}
        for number in range(count):
            left, top = (int(edge) for edge in random.integers(4, 30, 2))
            mask = np.zeros((72, 80), np.uint8)
            mask[top : top + 30, left : left + 40] = 1
            pixels = random.integers(60, 90, (72, 80, 3)) + 140 * mask[..., None]
            Image.fromarray(pixels.astype(np.uint8)).save(photos / f"{number}.png")
            Image.fromarray(mask).save(masks / f"{number}.png")
            corners = [left, top, left + 40, top, left + 40, top + 30, left, top + 30]
            coco["images"].append({"id": number, "file_name": f"{number}.png", "width": 80, "height": 72})
            coco["annotations"].append(
                {"id": number + 1, "image_id": number, "category_id": 1, "iscrowd": 0, "area": 1200}
                | {"bbox": [left, top, 40, 30], "segmentation": [corners]}
            )
        (objects / "annotations.json").write_text(json.dumps(coco))
    return root


@pytest.fixture(scope="module")
def losses_on_cpu():
    """Name in `TRAINING` -> the losses of its steps on the CPU, as far as they are known."""
    return {}


@pytest.fixture
def losses(request, tmp_path):
    """(name in `TRAINING`, options) -> the losses of its steps."""

    def train(name, *options):
        out = tmp_path / "_".join(options[:2]) / "run"
        words = [*TRAINING[name].split(), *"--workers 0 --log-every 1".split(), *options]
        inputs = [word[1:-1] for word in words if word.startswith("{") and word != "{out}"]
        places = {name: request.getfixturevalue(name) for name in inputs} | {"out": out}
        assert run([word.format(**places) for word in words]) == 0
        return [entry["loss"] for entry in read_metrics(out)]

    return train


@pytest.mark.parametrize("name", TRAINING)
def test_a_run_has_the_same_losses_as_on_the_cpu(name, losses, losses_on_cpu):
    losses_on_cpu[name] = losses(name, "--device", "cpu")
    assert losses_on_cpu[name]
    assert losses(name, "--device", "sim", "--precision", "32-true") == pytest.approx(losses_on_cpu[name], rel=1e-4)


@pytest.mark.parametrize("name", TRAINING)
def test_a_run_is_in_bf16_by_default_and_its_first_loss_near_that_in_fp32(name, losses, losses_on_cpu):
    in_bf16 = losses(name, "--device", "sim")
    in_fp32 = losses_on_cpu.get(name) or losses(name, "--device", "cpu")
    assert in_bf16 != in_fp32
    assert in_bf16[0] == pytest.approx(in_fp32[0], rel=0.02)


@pytest.mark.parametrize("options", ["--codec fp32 --pixels raw", "--codec pq16 --precision 32-true"])
def test_tokenize_makes_nearly_the_same_tokens_as_on_the_cpu(options, photos, vit_teacher, tmp_path, request):
    store = tmp_path / "sim.tokens"
    args = ["tokenize", str(photos / "train"), str(store), *vit_teacher, *options.split(), "--device", "sim"]
    assert run([*args, *"--middle-size 96 --patch-size 16 --shard-size 8 --workers 0".split()]) == 0
    on_cpu = request.getfixturevalue("vit_store" if "fp32" in options else "small_store")
    ours, theirs = (safetensors.torch.load_file(shard_path(folder, 0))["tokens"] for folder in (store, on_cpu))
    if "fp32" in options:
        assert F.cosine_similarity(ours, theirs, dim=-1).min() > 0.999
    else:
        assert (ours == theirs).float().mean() > 0.9


@pytest.mark.parametrize("features", ["encoder", "teacher"])
def test_knn_finds_the_same_neighbours(features, tiny_run, photos, printed_json):
    accuracies = []
    for device in ("cpu", "sim"):
        args = ["knn", str(tiny_run), str(photos), "--features", features, "--workers", "0", "--json"]
        assert run([*args, "--device", device]) == 0
        accuracies.append(printed_json()["top1"])
    assert accuracies[0] == accuracies[1] > 50


def test_features_are_nearly_the_same(tiny_run, photos, tmp_path):
    files = [tmp_path / f"{device}.safetensors" for device in ("cpu", "sim")]
    for file in files:
        args = ["features", str(tiny_run), str(photos / "val"), str(file), "--dense", "--workers", "0"]
        assert run([*args, "--device", file.stem]) == 0
    on_cpu, on_sim = (safetensors.torch.load_file(file) for file in files)
    assert on_cpu.keys() == on_sim.keys()
    for name, expected in on_cpu.items():
        if expected.is_floating_point():
            assert F.cosine_similarity(on_sim[name], expected, dim=-1).min() > 0.999


def test_a_run_that_began_on_the_accelerator_continues_on_the_cpu_and_has_a_report(vit_store, tmp_path):
    folder = tmp_path / "run"
    args = ["pretrain", str(vit_store), str(folder), *STUDENT.split(), "--workers", "0", "--log-every", "1"]
    assert run([*args, "--device", "sim", "--ema", "0.9"]) == 0
    checkpoint = torch.load(folder / "checkpoint.pt", weights_only=True)
    assert {tensor.device.type for tensor in checkpoint["ema"].values()} == {"cpu"}
    assert run([*args, "--device", "cpu", "--ema", "0.9"]) == 0
    assert run(["report", str(folder), "--images", "2"]) == 0
    assert (folder / "report.html").stat().st_size > 1000


def test_profile_times_the_stages_on_the_accelerator(vit_store, tmp_path, printed_json):
    args = ["pretrain", str(vit_store), str(tmp_path / "run"), *STUDENT.split(), "--profile", "--workers", "0"]
    assert run([*args, "--device", "sim", "--json"]) == 0
    assert sum(printed_json()["shares"].values()) == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ("--device sim:1", "not available"),
        ("--device sim --devices 2", "this machine has 1 (sim)"),
        ("--device simulated", "unknown"),
    ],
)
def test_what_the_accelerator_does_not_have_is_refused_in_one_line(options, reason, vit_store, tmp_path, error_line):
    assert reason in error_line(["pretrain", str(vit_store), str(tmp_path / "run"), *STUDENT.split(), *options.split()])


@pytest.mark.slow
def test_bench_step_measures_the_accelerator(tmp_path, printed_json):
    sizes = """--encoder vit_tiny_patch16_224 --encoder-width 48 --encoder-depth 1 --encoder-heads 3 --image-size 32
        --middle-size 48 --batch-size 2 --teachers vit_tiny_patch16_224 --rounds 1 --warmup 1 --rows offline"""
    args = ["bench", "step", *sizes.split(), "--out", str(tmp_path / "step.md"), "--device", "sim", "--json"]
    assert run(args) == 0
    result = printed_json()
    assert (result["settings"]["device"], result["settings"]["precision"]) == ("simulated accelerator", "bf16-mixed")
    assert [row["memory_mb"] for row in result["rows"]] == [1]  # what the device says, not the process
