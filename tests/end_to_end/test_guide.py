"""What the README and the guide show is run as it stands there, in the order of each page, on tiny photos.

A command keeps its words. What follows it makes it small (a student of two blocks, an epoch) and gives the teacher's weights, which
the hub would give; names of data sets and placeholders stand for the tiny data. SLURM's srun and sbatch are a script that starts two tasks.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastmae.cli import run
from fastmae.config.commands import COMMANDS

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
CPU = ["--device", "cpu"]
ALONE = [*CPU, "--workers", "0"]
WIDTH = ["--encoder-depth", "2", "--encoder-width", "64", "--encoder-heads", "2"]
STUDENT = [
    *WIDTH,
    "--decoder-width",
    "32",
    "--decoder-heads",
    "2",
    "--decoder-depth",
    "1",
    "--batch-size",
    "8",
    "--epochs",
    "1",
]
SUPERVISED = ("linear", "finetune", "segment", "detect")
SHORT = [*ALONE, "--epochs", "1", "--batch-size", "4"]
TEACHER = ["--teacher", "timm/vit_tiny_patch16_224"]
SMALL = {
    "tokenize": [*ALONE, *TEACHER, "--shard-size", "8", "--codec-images", "4"],
    "pretrain": [*ALONE, *STUDENT, "--warmup-epochs", "0"],
    "knn": ALONE,
    "linear": SHORT,
    "finetune": SHORT,
    "segment": [*SHORT, "--crop-size", "96", "--short-side", "96", "--head-channels", "16"],
    "detect": [*SHORT, "--image-size", "64", "--head-channels", "16"],
    "features": ALONE,
    "report": CPU,
    "ablate": [*ALONE, "--epochs", "1"],
    "bench store": [
        *ALONE,
        *TEACHER,
        "--middle-size",
        "96",
        "--codecs",
        "fp16,pq16",
        "--rounds",
        "1",
        "--codec-images",
        "16",
    ],
    "bench step": [
        *[
            *CPU,
            *WIDTH,
            "--image-size",
            "64",
            "--middle-size",
            "96",
            "--batch-size",
            "2",
            "--rounds",
            "1",
            "--warmup",
            "1",
        ],
        *["--encoder", "vit_tiny_patch16_224", "--teachers", "vit_tiny_patch16_224"],
    ],
    "bench loader": [
        *[*ALONE, *TEACHER, "--codecs", "fp16,pq16", "--sample", "16", "--rounds", "1", "--batch-size", "8"],
        *["--image-size", "64", "--middle-size", "96"],
    ],
    "bench accuracy": [*ALONE, "--points", "1", "--minutes", "0.02"],
}
NAMES = {
    "STORE": "photos.tokens",
    "RUN": "runs/photos",
    "DATA": "photos-labelled",
    "FOLDER": "photos",
    "SPEC": "runs/earlier",
    "DIR": "more",
    "SHARE": "share",
    "~/": "",
    "/data/": "",
    "timm/NAME": "timm/vit_tiny_patch16_224",
    "timm/vit_base_patch16_224.dino": "timm/vit_tiny_patch16_224",
    "A,B": "efficientnet-lite0,efficientnet-lite2",
    "s3://bucket/": "file://",
}
DATA = {"segment": "ADEChallengeData2016", "detect": "coco"}
"""What DATA is for those that want no folders of classes."""


def shown(page: Path) -> list[str]:
    """The commands of a page in their order: lines of code blocks, and those between backticks that name what they work on."""
    found, inside = [], False
    for line in page.read_text(encoding="utf-8").splitlines():
        if line.startswith("```"):
            inside = not inside
        elif inside and re.match(r"(fastmae|torchrun|srun|sbatch) ", line):
            found.append(line.split("  #")[0].rstrip())
        elif not inside:
            found += [text for text in re.findall(r"`(fastmae [^`]+)`", line) if _arguments(text)]
    return found


def _arguments(text: str) -> list[str]:
    """What follows the command's name; nothing where the text only speaks of a command."""
    words = shlex.split(text)[1:]
    return [] if words[0] == "COMMAND" else words[len(_name(words).split()) :]


def _name(words: list[str]) -> str:
    two = " ".join(words[:2])
    return two if two in COMMANDS else words[0]


@pytest.fixture(scope="module")
def data(photos, tmp_path_factory):
    """The folders that the pages speak of, and a store and a run by the README's first two commands."""
    root = tmp_path_factory.mktemp("guide")
    shutil.copytree(photos / "train", root / "photos")
    for name in ("photos-labelled", "imagenet"):
        (root / name).symlink_to(photos)
    coco, ade = root / "coco", root / "ADEChallengeData2016"
    for number, path in enumerate(sorted((root / "photos").rglob("*.jpg"))[:6]):
        split, own = ("train2017", "training") if number < 4 else ("val2017", "validation")
        photo = Image.open(path).convert("RGB").resize((80, 72))
        for folder in (coco / split, ade / "images" / own):
            folder.mkdir(parents=True, exist_ok=True)
            photo.save(folder / f"{number:012d}.jpg")
        bright = np.asarray(photo.convert("L")) > 120
        (ade / "annotations" / own).mkdir(parents=True, exist_ok=True)
        Image.fromarray((1 + bright).astype(np.uint8)).save(ade / "annotations" / own / f"{number:012d}.png")
    for split, numbers in (("train2017", range(4)), ("val2017", range(4, 6))):
        box = [10, 8, 40, 50]
        outline = [[10, 8, 50, 8, 50, 58, 10, 58]]
        objects = [
            {
                "id": n + 1,
                "image_id": n,
                "category_id": 7,
                "bbox": box,
                "area": 2000,
                "iscrowd": 0,
                "segmentation": outline,
            }
            for n in numbers
        ]
        images = [{"id": n, "file_name": f"{n:012d}.jpg", "width": 80, "height": 72} for n in numbers]
        (coco / "annotations").mkdir(exist_ok=True)
        said = {"images": images, "annotations": objects, "categories": [{"id": 7, "name": "thing"}]}
        (coco / "annotations" / f"instances_{split}.json").write_text(json.dumps(said))
    return root


@pytest.fixture
def scheduler(tmp_path, monkeypatch):
    """`srun` in the PATH: two tasks here, with the variables that SLURM gives them; `fastmae` beside it."""
    tools = tmp_path / "bin"
    tools.mkdir()
    srun = """#!/usr/bin/env bash
    while [ "$1" != fastmae ]; do shift; done
    shift
    export SLURM_JOB_ID=$$ SLURM_JOB_NAME=train SLURM_NNODES=1 SLURM_NTASKS=2 SLURM_NTASKS_PER_NODE=2
    export SLURM_NODELIST=localhost SLURM_NODEID=0
    export SLURM_STEP_NUM_TASKS=2 SLURM_STEP_TASKS_PER_NODE=2
    SLURM_PROCID=0 SLURM_LOCALID=0 PYTHON -m fastmae "$@" & first=$!
    SLURM_PROCID=1 SLURM_LOCALID=1 PYTHON -m fastmae "$@" && wait $first
    """.replace("    ", "").replace("PYTHON", shlex.quote(sys.executable))
    (tools / "srun").write_text(srun)
    (tools / "srun").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "1")


@pytest.mark.timeout(900)  # dozens of commands, one after the other
@pytest.mark.parametrize("page", [page for page in PAGES if shown(page)], ids=lambda page: page.name)
def test_a_page_runs_as_it_stands(page, data, vit_weights, scheduler, tmp_path, monkeypatch, capfd):
    work = tmp_path / "work"
    shutil.copytree(data, work, symlinks=True)
    monkeypatch.chdir(work)
    for line in shown(page):
        launcher, name, args = _split(shlex.split(line))
        args = [_meant(word if word != "DATA" else DATA.get(name, word)) for word in args]
        _provide(work, name, args, vit_weights)
        args += _small(name, args, vit_weights)
        capfd.readouterr()
        if launcher:
            ended = subprocess.run([*launcher, *args], check=False, capture_output=True, text=True, timeout=200)
            assert ended.returncode == 0, (line, ended.stdout, ended.stderr)
        else:
            assert run([*name.split(), *args]) == 0, (line, capfd.readouterr())
    for block in re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
        exec(compile(block, str(page), "exec"), {})


def _meant(word: str) -> str:
    """What a name of the guide stands for here."""
    for name, meaning in NAMES.items():
        if name.endswith("/"):
            word = meaning + word.removeprefix(name) if word.startswith(name) else word
        else:
            word = re.sub(rf"(?<![\w-]){re.escape(name)}(?![\w-])", meaning, word)
    return f"file://{Path.cwd()}/{word.removeprefix('file://')}" if word.startswith("file://") else word


def _split(words: list[str]) -> tuple[list[str], str, list[str]]:
    """What starts the processes, the command's name, its words."""
    if words[0] == "sbatch":
        return ["bash", str(ROOT / words[1])], "pretrain", words[2:]
    at = words.index("fastmae")
    name = _name(words[at + 1 :])
    args = words[at + 1 + len(name.split()) :]
    if words[0] == "torchrun":
        here = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "fastmae"]
        return [*here, *name.split()], name, args
    if (
        "--devices" in args and args[args.index("--devices") + 1] == "2"
    ):  # it starts a second process by its own command line
        return [sys.executable, "-m", "fastmae", *name.split()], name, args
    return ([] if words[0] == "fastmae" else [*words[: at + 1], *name.split()]), name, args


def _small(name: str, args: list[str], weights: Path) -> list[str]:
    """Options that make a command small; a network of timm's gets its weights from a file."""
    small = list(SMALL.get(name, []))
    if "efficientnet-lite0" in args:  # it needs no network
        small = [word for word in small if word not in TEACHER]
    elif TEACHER[0] in small:
        small += ["--teacher-weights", str(weights)]
    if name in ("knn", "linear") and args[0].startswith("timm/"):
        small += ["--weights", str(weights)]
    if "--micro-batch" in args:
        small += ["--micro-batch", "4"]
    if "--devices" in args:
        small += ["--devices", "2" if args[args.index("--devices") + 1] == "2" else "1"]
    return small


def _provide(work: Path, name: str, args: list[str], weights: Path) -> None:
    """Clear the way for what a command makes, and make what it reads and no earlier command of the page has made."""
    stores = [word for word in args if word.endswith(".tokens")]
    outputs = {"tokenize": [] if "--add" in args else stores, "pretrain": args[len(stores) : len(stores) + 1]}.get(
        name, []
    )
    outputs += args[args.index("--out") + 1 :][:1] if "--out" in args and name in SUPERVISED else []
    for folder in outputs:
        shutil.rmtree(work / folder, ignore_errors=True)
    needs_store = name in ("inspect", "verify", "pretrain") or "--add" in args
    for store in [word.removeprefix(f"file://{work}/") for word in stores] if needs_store else []:
        if not (work / store / "manifest.json").exists():
            _make("tokenize", ["photos", store], weights)
    for run_folder in [word for word in args if word.startswith("runs/") and "," not in word and word not in outputs]:
        if not (work / run_folder).exists():
            if not (work / "photos.tokens").exists():
                _make("tokenize", ["photos", "photos.tokens"], weights)
            _make("pretrain", ["photos.tokens", run_folder], weights)


def _make(name: str, args: list[str], weights: Path) -> None:
    assert run([name, *args, *_small(name, args, weights)]) == 0
