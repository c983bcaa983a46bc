"""A teacher that is code of the user's own, from the first token to the evaluation; and no file makes that code run."""

import json
import shutil
import sys
from pathlib import Path

import pytest

import fastmae
from fastmae.cli import run

CODE = """
from pathlib import Path

import torch
from torch import nn

Path(__file__).with_suffix(".runs").open("a").write("x")


class Patches(nn.Module):
    mean, std, patch_size = (0.7, 0.5, 0.6), (0.2, 0.25, 0.3), 16

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.convolution = nn.Conv2d(3, 24, 16, 16)

    def forward(self, images):
        return self.convolution(images)


def other():
    return Patches(seed=1)
"""
SPEC = "python/code_of_the_user:Patches"
STORE = "--middle-size 96 --shard-size 8 --workers 0 --device cpu".split()
TRAINING = (
    "--encoder vit_tiny_patch16_224 --encoder-depth 2 --encoder-width 64 --encoder-heads 2 --image-size 64 "
    "--decoder-width 32 --decoder-heads 2 --batch-size 8 --warmup-epochs 0 --epochs 1 --workers 0 --device cpu"
).split()
ONE_PROCESS = "--workers 0 --device cpu".split()


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder with the user's code."""
    folder = tmp_path_factory.mktemp("work")
    (folder / "code_of_the_user.py").write_text(CODE)
    return folder


@pytest.fixture(autouse=True)
def in_the_working_folder(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(work)


@pytest.fixture(scope="module")
def store(work: Path, photos: Path) -> Path:
    """A store by that teacher. In this process, the code has been forgotten."""
    path = work / "photos.tokens"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(work)
        assert run(["tokenize", str(photos / "train"), str(path), "--teacher", SPEC, *STORE]) == 0
    forget()
    return path


@pytest.fixture(scope="module")
def trained(store: Path) -> Path:
    path = store.parent / "run"
    assert run(["pretrain", str(store), str(path), *TRAINING]) == 0
    return path


def forget() -> None:
    sys.modules.pop("code_of_the_user", None)


def files(store: Path) -> dict[str, bytes]:
    return {str(path.relative_to(store)): path.read_bytes() for path in store.rglob("*") if path.is_file()}


def test_the_store_records_the_name_and_the_digest_and_the_same_call_continues(store, photos, error_line):
    assert fastmae.inspect(store)["teacher"]["spec"] == SPEC
    before = files(store)
    call = ["tokenize", str(photos / "train"), str(store), *STORE, "--teacher"]
    assert run([*call, SPEC]) == 0
    assert files(store) == before
    changed = (store.parent / "code_of_the_user.py").read_text().replace("seed=0", "seed=2")
    (store.parent / "changed_code.py").write_text(changed)
    assert "teacher weights_sha256: " in error_line([*call, "python/changed_code:Patches"])


def test_two_processes_and_add_give_the_store_of_one(store, photos, tmp_path):
    together = tmp_path / "together.tokens"
    for rank in "01":
        call = ["tokenize", str(photos / "train"), str(together), *STORE, "--teacher", SPEC]
        assert run([*call, "--rank", rank, "--world-size", "2"]) == 0
    assert files(together) == files(store)
    assert run(["tokenize", str(photos / "val"), str(together), *STORE, "--teacher", SPEC, "--add"]) == 0
    assert len(fastmae.TokenStore(together)) == 40


def test_a_module_given_from_python_makes_the_same_tokens(store, photos, tmp_path):
    code = {"__name__": "code_of_the_user", "__file__": str(tmp_path / "code.py")}
    exec(CODE, code)
    options = {"middle_size": 96, "shard_size": 8, "workers": 0, "device": "cpu"}
    fastmae.tokenize(photos / "train", tmp_path / "given.tokens", teacher=code["Patches"](), **options)
    assert files(tmp_path / "given.tokens") == files(store)


def test_a_repair_takes_the_teacher_that_the_user_names(store, tmp_path, flip_in_record, error_line):
    damaged = tmp_path / "damaged.tokens"
    shutil.copytree(store, damaged)
    flip_in_record(damaged, 1, 2)
    repair = ["verify", str(damaged), "--repair", *ONE_PROCESS]
    assert "its teacher is code" in error_line(repair)
    assert "SHA-256 differs" in error_line([*repair, "--teacher", "python/code_of_the_user:other"])
    assert "--teacher" in error_line(["verify", str(damaged), "--teacher", SPEC])
    assert run([*repair, "--teacher", SPEC]) == 0
    assert files(damaged) == files(store)


def test_evaluation_and_the_online_target_take_it_too(store, trained, photos, tmp_path, printed_json, error_line):
    knn = ["knn", str(trained), str(photos), *ONE_PROCESS, "--json"]
    assert "--features teacher" in error_line([*knn, "--teacher", SPEC])
    assert run([*knn, "--features", "teacher", "--teacher", SPEC]) == 0
    of_the_store = printed_json()
    assert (of_the_store["dim"], of_the_store["image_size"]) == (24, 96)
    alone = fastmae.knn(SPEC, photos, image_size=96, workers=0, device="cpu")
    assert alone["top1"] == of_the_store["top1"]
    online = ["pretrain", str(store), str(tmp_path / "online"), *TRAINING, "--target", "teacher", "--teacher"]
    assert "SHA-256 differs" in error_line([*online, "python/code_of_the_user:other"])
    for _ in range(2):  # the second call continues the first one's run
        assert run([*online, SPEC, "--json"]) == 0
        assert printed_json()["loss"] == pytest.approx(fastmae_loss(trained), abs=2e-3)


def fastmae_loss(folder: Path) -> float:
    return json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])["loss"]


def test_of_several_stores_the_one_whose_teacher_is_code_takes_it(store, vit_store, tmp_path, printed_json):
    call = ["pretrain", str(store), str(vit_store), str(tmp_path / "both"), *TRAINING, "--target", "teacher"]
    assert run([*call, "--teacher", SPEC, "--json"]) == 0
    assert printed_json()["loss"] > 0


def test_it_is_no_encoder(photos, error_line):
    assert "`fastmae knn` measures it" in error_line(["linear", SPEC, str(photos), *ONE_PROCESS])


@pytest.mark.promise("files")
def test_no_store_run_study_or_file_of_options_makes_code_run(
    store, trained, photos, tmp_path, flip_in_record, record_property, error_line
):
    runs = store.parent / "code_of_the_user.runs"
    runs.unlink(missing_ok=True)
    forget()
    damaged = tmp_path / "damaged.tokens"
    shutil.copytree(store, damaged)
    flip_in_record(damaged, 0, 0)
    options, study = tmp_path / "options.yaml", tmp_path / "study.yaml"
    options.write_text(f"teacher: {SPEC}\n")
    study.write_text(f"arms: {{a: {{}}}}\nteachers: {{mine: {{teacher: {SPEC}}}}}\n")
    labelled, out = str(photos), str(tmp_path / "out")
    refused = [
        ["knn", str(trained), labelled, "--features", "teacher", *ONE_PROCESS],
        ["pretrain", str(store), out, *TRAINING, "--target", "teacher"],
        ["verify", str(damaged), "--repair", *ONE_PROCESS],
        ["tokenize", labelled, out, "--config", str(options)],
        ["pretrain", str(store), out, *TRAINING, "--target", "teacher", "--config", str(options)],
        ["bench", "store", labelled, "--config", str(options)],
        ["ablate", str(study), labelled, "--out", out, "--config", str(options)],
        ["ablate", str(study), labelled, "--out", out],
    ]
    for call in refused:
        assert "is code" in error_line(call), call
    read = [
        ["inspect", str(store)],
        ["verify", str(store)],
        ["pretrain", str(store), str(tmp_path / "run"), *TRAINING],
        ["knn", str(trained), labelled, *ONE_PROCESS],
        ["report", str(trained), "--out", str(tmp_path / "page.html"), "--device", "cpu"],
        ["export", str(trained), str(tmp_path / "exported")],
    ]
    for call in read:
        assert run(call) == 0, call
    assert not runs.exists()
    assert "code_of_the_user" not in sys.modules
    record_property("cases", len(refused) + len(read))
