"""The commands on a simulated accelerator: each runs, and computes what it computes on the CPU."""

from pathlib import Path

import pytest

from fastmae.cli import run

pytestmark = pytest.mark.accelerator

ON_SIM = ["--device", "sim", "--workers", "0"]
SHORT = "--epochs 1 --batch-size 8 --log-every 1".split()


@pytest.fixture(scope="module")
def sim_store(photos, vit_teacher, tmp_path_factory):
    """A store of train/ whose tokens the accelerator has computed."""
    store = tmp_path_factory.mktemp("sim") / "fp16.tokens"
    options = "--middle-size 96 --patch-size 16 --shard-size 8".split()
    assert run(["tokenize", str(photos / "train"), str(store), *vit_teacher, *options, *ON_SIM]) == 0
    return store


@pytest.fixture(scope="module")
def pretrain(tiny_student, tmp_path_factory):
    """(stores, options) -> the folder of a run of one epoch on the accelerator."""

    def train(*options):
        folder = tmp_path_factory.mktemp("runs") / "run"
        args = ["pretrain", *map(str, options[:-1]), str(folder)]
        args = [
            "pretrain",
            *(str(o) for o in options if isinstance(o, Path)),
            str(folder),
            *tiny_student,
            "--epochs",
            "1",
            "--workers",
            "0",
            "--device",
            "sim",
        ]
        args += [o for o in options if not isinstance(o, Path)]
        assert run(args) == 0
        return folder

    return train


@pytest.fixture(scope="module")
def sim_run(sim_store, pretrain):
    return pretrain(sim_store)


def test_tokenize(sim_store):
    pass


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("options", ["", "--target teacher", "--target pixels", "--target hog"])
def test_pretrain(sim_store, pretrain, precision, options):
    pretrain(sim_store, "--precision", precision, *options.split())


def test_pq(photos, vit_teacher, tmp_path, pretrain):
    store = tmp_path / "pq.tokens"
    options = "--middle-size 96 --patch-size 16 --shard-size 8 --codec pq16".split()
    assert run(["tokenize", str(photos / "train"), str(store), *vit_teacher, *options, *ON_SIM]) == 0
    pretrain(store)


def test_knn(sim_run, photos, printed_json):
    for features in ("encoder", "teacher"):
        assert run(["knn", str(sim_run), str(photos), "--features", features, "--json", *ON_SIM]) == 0
        print(printed_json())


def test_linear(sim_run, photos, tmp_path):
    assert run(["linear", str(sim_run), str(photos), "--out", str(tmp_path / "x"), *SHORT, *ON_SIM]) == 0


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_finetune(sim_run, photos, tmp_path, precision):
    assert (
        run(
            [
                "finetune",
                str(sim_run),
                str(photos),
                "--out",
                str(tmp_path / "x"),
                *SHORT,
                *ON_SIM,
                "--precision",
                precision,
            ]
        )
        == 0
    )


def test_features(sim_run, photos, tmp_path):
    assert (
        run(["features", str(sim_run), str(photos / "val"), str(tmp_path / "x.safetensors"), "--dense", *ON_SIM]) == 0
    )


def test_report(sim_run):
    assert run(["report", str(sim_run), "--images", "3"]) == 0


def test_profile(sim_store, tmp_path, tiny_student):
    assert (
        run(["pretrain", str(sim_store), str(tmp_path / "r"), *tiny_student, *ON_SIM, "--profile", "--epochs", "1"])
        == 0
    )


def test_bench_step(tmp_path):
    small = "--encoder vit_tiny_patch16_224 --encoder-width 48 --encoder-depth 2 --encoder-heads 3 --image-size 64 --middle-size 96 --batch-size 4 --teachers vit_tiny_patch16_224 --device sim --rounds 1 --warmup 1 --rows mae,offline,online".split()
    assert run(["bench", "step", *small, "--out", str(tmp_path / "x.md")]) == 0
