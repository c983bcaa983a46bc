"""Every command says what it does and how far it is, in a log too: its phases, each with its total where it has one."""

import re
import shutil

import pytest

from fastmae.cli import parse
from fastmae.config.commands import COMMANDS
from fastmae.errors import FailedCheckError
from fastmae.runtime import progress

STEP = (
    "--encoder vit_tiny_patch16_224 --encoder-width 48 --encoder-depth 2 --encoder-heads 3 --image-size 64 "
    "--middle-size 96 --batch-size 4 --teachers vit_tiny_patch16_224 --rows mae --rounds 1 --warmup 2 --device cpu"
)
SMALL_BENCH = "--middle-size 96 --rounds 1 --workers 0 --device cpu"
STUDY = """
title: Two norms
base: {epochs: 1, encoder_depth: 2, encoder_width: 64, encoder_heads: 2, decoder_width: 32, decoder_heads: 2,
  batch_size: 8}
teachers: {cnn: efficientnet-lite0}
arms: {patch: {norm: patch}, channel: {norm: channel}}
"""


@pytest.fixture
def lines(caplog, monkeypatch):
    """(command, arguments) -> the lines of its log, with one for each unit of work that is counted."""
    monkeypatch.setattr(progress, "LOG_EVERY", 0.0)

    def run(command, *args):
        caplog.clear()
        COMMANDS[command].run(parse(command, [str(arg) for arg in args]))
        return caplog.messages

    return run


def assert_shown(lines, *patterns):
    for pattern in patterns:
        assert any(re.search(pattern, line) for line in lines), (pattern, lines)
    assert not any("0/0" in line for line in lines)


def test_tokenizing(lines, photos, vit_teacher, tmp_path):
    options = [*vit_teacher, *"--middle-size 96 --shard-size 8 --workers 0 --batch-size 8 --codec auto".split()]
    call = [photos / "train", tmp_path / "s", *options]
    assert_shown(lines("tokenize", *call, "--dry-run"), r"^list", r"^measure 96 px  1/\d batches")
    shown = lines("tokenize", *call)
    assert_shown(shown, r"^list", r"^sample tokens  8/\d+ images", r"^choose a codec .*trying pq", r"groups")
    assert_shown(shown, r"^estimate the disk space", r"^tokenize  8/30 images", r"^finish the store  1/4 shards")
    assert_shown(shown, r"^look at the store  1/30 images")


def test_inspecting_verifying_and_repairing(lines, vit_store, flip_in_record, tmp_path):
    assert_shown(lines("inspect", vit_store, "--quality"), r"^look at the store  1/30 images")
    store = tmp_path / "s"
    shutil.copytree(vit_store, store)
    flip_in_record(store, 1, 2)
    with pytest.raises(FailedCheckError):
        lines("verify", store)
    shown = lines("verify", store, "--repair", "--workers", "0")
    assert_shown(shown, r"^compare the images  1/1 batches", r"^repair  8/8 images")
    assert sum(line.startswith("verify  4/4 shards") for line in shown) >= 2


def test_pretraining(lines, vit_store, tiny_student, tmp_path):
    call = [vit_store, tmp_path / "run", *tiny_student, "--epochs", "1", "--workers", "0"]
    assert_shown(lines("pretrain", *call, "--profile"), r"^profile  1/\d steps")
    shown = lines("pretrain", *call, "--knn-every", "1")
    assert_shown(shown, r"^pretrain  1/4 steps", r"^pretrain  4/4 steps .*\(k-NN features  \d+/\d+ images")


def test_probing_and_embedding(lines, tiny_run, photos, tmp_path):
    small = ["--workers", "0", "--device", "cpu"]
    shown = lines("knn", tiny_run, photos, *small)
    assert_shown(shown, r"^list", r"^features train  30/30 images", r"^k-NN, search  1/1", r"^k-NN, votes  1/1")
    assert "top-1" in shown[-1] and "top-5" not in shown[-1]  # of two classes
    shown = lines("linear", tiny_run, photos, *small, "--epochs", "2")
    assert_shown(shown, r"^features val  10/10 images", r"^linear  1/\d+ steps")
    assert not any("top5" in line or "top-5" in line for line in shown)
    shown = lines("linear", tiny_run, photos, *small, "--solver", "logistic")
    assert_shown(shown, r"^logistic regression")
    shown = lines("finetune", tiny_run, photos, *small, "--out", tmp_path / "ft", "--epochs", "1", "--augment", "crop")
    assert_shown(shown, r"^finetune  1/\d+ steps", r"^finetune .*\(evaluate  1/\d+ batches")
    assert_shown(lines("features", tiny_run, photos, tmp_path / "f.safetensors", *small), r"^features  40/40 images")


def test_exporting_and_reporting(lines, tiny_run, tmp_path):
    assert_shown(lines("export", tiny_run, tmp_path / "e"), r"^export .*writing for timm", r"^export .*reading it back")
    shown = lines("report", tiny_run, "--out", tmp_path / "report.html")
    assert_shown(shown, r"^report .*drawing predictions", r"^report .*\(neighbours  \d+/30 images")


def test_benches(lines, photos, vit_teacher):
    shown = lines("bench step", *STEP.split())
    assert_shown(shown, r"^bench step, memory  0/1 rows .* MAE", r"^bench step, count operations  1/1 rows")
    assert_shown(shown, r"^bench step, warm up  1/5 turns", r"^bench step  \d+/10 turns  left .* MAE, round 1 of 1")
    shown = lines("bench loader", photos, *vit_teacher, *SMALL_BENCH.split(), *"--image-size 64 --sample 8".split())
    assert_shown(shown, r"^check the images  1/8 images", r"^bench loader  1/\d+ turns", r"views, round 1 of 1")


@pytest.mark.slow
def test_the_bench_of_stores(lines, photos, vit_teacher):
    options = [*vit_teacher, *SMALL_BENCH.split(), "--codecs", "fp16,pq16", "--jpeg-qualities", "90,60"]
    shown = lines("bench store", photos, *options)
    assert_shown(shown, r"^learn  \d+/\d+ images", r"^cluster for pq16  1/16 groups", r"^measure  \d+/30 images")
    assert_shown(shown, r"^JPEG quality 60  1/\d", r"^time the codecs  1/8 turns", r"^time the host  1/4 turns")
    assert_shown(shown, r"^time the building  1/4 turns")


@pytest.mark.slow
def test_comparisons_say_beforehand_how_long_they_take(lines, photos, tmp_path):
    small = ["--device", "cpu", "--workers", "0"]
    (tmp_path / "study.yaml").write_text(STUDY)
    shown = lines("ablate", tmp_path / "study.yaml", photos, "--out", tmp_path / "out", "--seeds", "2", *small)
    assert_shown(shown, r"^time the arms  \d/4 timings", r"^Two norms: about \d+ s here: 2 arms x 2 seeds; 4 of 4 runs")
    assert_shown(shown, r"^ablate  [123]/4 runs  left .*cnn/patch/seed[01]")
    call = "--minutes 0.05 --recipe visible_tiny_cpu --no-distillation --fractions 1/5 --points 1".split()
    shown = lines("bench accuracy", photos, "--out", tmp_path / "acc", *call, *small)
    assert_shown(shown, r"^about \d+ s here: 2 of 2 runs to do, with 2 measurements", r"^measure the untrained encoder")
    assert_shown(shown, r"^bench accuracy  [01]/2 runs  left .*\(pretrain  \d+/\d+ steps")
    assert not any("next:" in line for line in shown)
