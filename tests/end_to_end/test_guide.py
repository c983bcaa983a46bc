"""Every command and every Python block of the README and the guide runs, in the order of its page, on tiny photos.

A command keeps the words that the page shows. Options are appended that make it small (a student of two blocks, one
epoch) and that name a file of weights for the teacher, which would come from the hub. The pages' data sets and
placeholders stand for tiny data. A script with two tasks stands in for SLURM's srun and sbatch.
"""

import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torchvision
from PIL import Image

import fastmae
from fastmae.cli import parse, run
from fastmae.config.commands import COMMANDS

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PROGRAMS = ("fastmae", "python", "torchrun", "srun", "sbatch")

CPU = {"device": "cpu"}
ONE_PROCESS = {**CPU, "workers": 0}
ENCODER = {"encoder_depth": 2, "encoder_width": 64, "encoder_heads": 2}
DECODER = {"decoder_width": 32, "decoder_heads": 2}
STUDENT = {**ENCODER, "decoder_depth": 1, **DECODER}
TEACHER = {"teacher": "timm/vit_tiny_patch16_224"}
SHORT = {**ONE_PROCESS, "epochs": 1, "batch_size": 4}
SMALL: dict[str, dict[str, Any]] = {
    "tokenize": {**ONE_PROCESS, **TEACHER, "shard_size": 8, "codec_images": 4},
    "pretrain": {**ONE_PROCESS, **STUDENT, "epochs": 1, "batch_size": 8, "warmup_epochs": 0},
    "knn": ONE_PROCESS,
    "linear": SHORT,
    "finetune": SHORT,
    "segment": {**SHORT, "crop_size": 96, "short_side": 96, "head_channels": 16},
    "detect": {**SHORT, "image_size": 64, "head_channels": 16},
    "features": ONE_PROCESS,
    "report": CPU,
    "demo": {"steps": 4},
    "ablate": {
        **ONE_PROCESS,
        "epochs": 1,
        "seeds": 1,
        "jobs": 1,
        "base": ",".join(f"{k}={v}" for k, v in {**ENCODER, **DECODER, "batch_size": 8}.items()),
    },
    "bench store": {
        **ONE_PROCESS,
        **TEACHER,
        "middle_size": 128,
        "codecs": "fp16,pq16",
        "codec_images": 16,
        "rounds": 1,
    },
    "bench step": {
        **CPU,
        **ENCODER,
        "encoder": "vit_tiny_patch16_224",
        "teachers": "vit_tiny_patch16_224",
        "image_size": 64,
        "middle_size": 96,
        "batch_size": 2,
        "rounds": 1,
        "warmup": 1,
    },
    "bench loader": {
        **ONE_PROCESS,
        **TEACHER,
        "codecs": "fp16,pq16",
        "image_size": 64,
        "middle_size": 96,
        "batch_size": 8,
        "sample": 16,
        "rounds": 1,
    },
    "bench accuracy": {
        **ONE_PROCESS,
        "recipe": "vit_tiny_cpu",
        "points": 1,
        "minutes": 0.02,
        "fractions": "1/5",
        "distillation": False,
    },
}
"""Command -> options that make it small."""

STAND_INS = {
    "STORE": "photos.tokens",
    "RUN": "runs/photos",
    "DATA": "photos-labelled",
    "FOLDER": "photos",
    "SPEC": "runs/earlier",
    "DIR": "more",
    "FILE": "teacher.safetensors",
    "caltech101": "photos-labelled",
    "~/": "",
    "/data/": "",
    "timm/NAME": "timm/vit_tiny_patch16_224",
    "timm/vit_base_patch16_224.dino": "timm/vit_tiny_patch16_224",
    "timm/vit_small_patch14_dinov2": "timm/vit_tiny_patch16_224",
    "A,B": "efficientnet-lite0,efficientnet-lite2",
    "s3://bucket/": "file://",
    "gs://bucket/": "file://",
    "hf://datasets/OWNER/NAME/": "file://hub/",
    "hf://OWNER/": "file://hub/",
    "URL": "file://shared/photos.tokens",
}
"""Name on a page -> what it stands for here."""
DATA = {"segment": "ADEChallengeData2016", "detect": "coco"}
"""What DATA stands for where it is not a folder of classes."""
TRAIN_ON_LABELS = ("linear", "finetune", "segment", "detect")


@dataclass(frozen=True)
class Step:
    """A command line of a page, or one of its Python blocks. A block may show a file, which other steps use."""

    text: str
    is_python: bool = False

    @property
    def file(self) -> str | None:
        """Name of the file that a block shows, from its first line: `# tissue.py`."""
        named = re.match(r"# (\w+\.py)\n", self.text) if self.is_python else None
        return named[1] if named else None


def steps(page: Path) -> list[Step]:
    """The steps of a page in their order: its code blocks, and the commands with arguments in its text."""
    found: list[Step] = []
    block: list[str] | None = None
    language = ""
    for line in page.read_text(encoding="utf-8").splitlines():
        if line.startswith("```"):
            if block is None:
                block, language = [], line.removeprefix("```")
                continue
            if language == "python":
                found.append(Step("\n".join(block), is_python=True))
            else:
                found += [Step(command) for command in _commands("\n".join(block))]
            block = None
        elif block is not None:
            block.append(line)
        else:
            found += [Step(text) for text in re.findall(r"`(fastmae [^`]+)`", line) if _has_arguments(text)]
    return found


def _commands(block: str) -> list[str]:
    """The command lines of a code block, without their comments. A backslash at a line's end continues the line."""
    lines = [line.split("  #")[0].rstrip() for line in block.replace("\\\n", " ").splitlines()]
    return [line for line in lines if line.partition(" ")[0] in PROGRAMS and " COMMAND " not in line]


def _has_arguments(text: str) -> bool:
    """Whether the text calls a command, and does not merely name it."""
    words = shlex.split(text)[1:]
    return "COMMAND" not in words and len(words) > len(_command(words).split())


def _command(words: list[str]) -> str:
    two_words = " ".join(words[:2])
    return two_words if two_words in COMMANDS else words[0]


@pytest.fixture(scope="module")
def data(photos: Path, vit_weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the images, the data sets and the weights that the pages name."""
    root = tmp_path_factory.mktemp("guide")
    for split, count in (("train", 6), ("val", 3)):
        for name in ("china", "flower"):
            folder = root / "photos-labelled" / split / name
            folder.mkdir(parents=True)
            for photo in sorted((photos / split / name).iterdir())[:count]:
                shutil.copy(photo, folder)
    shutil.copytree(root / "photos-labelled" / "train", root / "photos")
    (root / "imagenet").symlink_to("photos-labelled")
    (root / "teacher.safetensors").symlink_to(vit_weights)
    paths = sorted((photos / "train").rglob("*.jpg"))[:6]
    pictures = [Image.open(path).convert("RGB").resize((80, 72)) for path in paths]
    for name, scale, kind in (("microscopy", 16, np.uint16), ("ct", 5, np.int32), ("depth", 0.01, np.float32)):
        (root / name).mkdir()
        for number, picture in enumerate(pictures[:2]):
            values = (np.asarray(picture.convert("L")) * scale).astype(kind)
            Image.fromarray(values).save(root / name / f"{number}.tif")
    torch.save(timm.create_model("vit_small_patch16_224", num_classes=0).state_dict(), root / "tissue.pth")
    torch.save(torchvision.models.resnet18().state_dict(), root / "satellite.pth")
    _write_coco(root / "coco", pictures)
    _write_ade20k(root / "ADEChallengeData2016", pictures)
    return root


def _write_coco(root: Path, pictures: list[Image.Image]) -> None:
    """The layout of COCO: four pictures to train on and two to validate, each with one object."""
    (root / "annotations").mkdir(parents=True)
    for split, numbers in (("train2017", range(4)), ("val2017", range(4, 6))):
        images, annotations = [], []
        (root / split).mkdir()
        for number in numbers:
            pictures[number].save(root / split / f"{number:012d}.jpg")
            images.append({"id": number, "file_name": f"{number:012d}.jpg", "width": 80, "height": 72})
            annotations.append(
                {
                    "id": number + 1,
                    "image_id": number,
                    "category_id": 7,
                    "bbox": [10, 8, 40, 50],
                    "area": 2000,
                    "iscrowd": 0,
                    "segmentation": [[10, 8, 50, 8, 50, 58, 10, 58]],
                }
            )
        content = {"images": images, "annotations": annotations, "categories": [{"id": 7, "name": "thing"}]}
        (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))


def _write_ade20k(root: Path, pictures: list[Image.Image]) -> None:
    """The layout of ADE20K: four pictures to train on and two to validate; a mask holds the classes dark and bright."""
    for number, picture in enumerate(pictures):
        split = "training" if number < 4 else "validation"
        for folder in (root / "images" / split, root / "annotations" / split):
            folder.mkdir(parents=True, exist_ok=True)
        picture.save(root / "images" / split / f"{number:012d}.jpg")
        is_bright = np.asarray(picture.convert("L")) > 120
        mask = Image.fromarray((1 + is_bright).astype(np.uint8))
        mask.save(root / "annotations" / split / f"{number:012d}.png")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which the outputs of commands are kept, for the pages that show the same command."""
    return tmp_path_factory.mktemp("made")


@pytest.fixture
def scheduler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`srun` in the PATH: it starts two tasks on this machine, with the variables that SLURM gives them."""
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
@pytest.mark.parametrize("page", [page for page in PAGES if steps(page)], ids=lambda page: str(page.relative_to(ROOT)))
def test_the_commands_and_python_blocks_of_a_page_run(
    page, data, vit_weights, made, scheduler, tmp_path, monkeypatch, capfd
):
    work = tmp_path / "work"
    shutil.copytree(data, work, symlinks=True)
    monkeypatch.chdir(work)
    # torch.compile then does nothing: the C++ compiler takes a minute for each student.
    monkeypatch.setattr(torch, "compile", lambda model, *_, **__: model)
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    monkeypatch.setenv("WANDB_MODE", "offline")
    for command in COMMANDS:
        name = command.replace(" ", "_")
        monkeypatch.setattr(fastmae, name, _small_function(command, getattr(fastmae, name), vit_weights))
    namespace: dict[str, Any] = {}
    for step in steps(page):
        if step.file:
            (work / step.file).write_text(step.text)
    for step in steps(page):
        if step.file:
            continue
        if not step.is_python:
            _run_command(step.text, vit_weights, made, capfd)
        elif "__main__" in step.text:
            _run_script(step.text, work / "script.py")
        else:
            exec(compile(step.text, str(page), "exec"), namespace)


def _run_command(line: str, weights: Path, made: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Run a command line, or copy what it has made on an earlier page.

    Args:
        line: as it stands on the page.
        weights: of the teacher.
        made: the folder in which the outputs of all pages' commands are kept.
        capfd: what is printed, for messages.
    """
    launcher, command, words = _parsed(shlex.split(line))
    if "--help" not in words and command != "--help":
        words = [_stand_in(DATA.get(command, word) if word == "DATA" else word) for word in words]
        _delete(_outputs(command, words))
        _make_inputs(command, words, weights)
        words += _flags(_small_options(command, words, weights))
    kept = made / hashlib.sha256(repr((launcher, command, _effective(words))).encode()).hexdigest()
    if kept.exists():
        parse(command, words)
        shutil.copytree(kept, Path.cwd(), symlinks=True, dirs_exist_ok=True)
        return
    capfd.readouterr()
    if launcher:
        process = subprocess.run([*launcher, *words], check=False, capture_output=True, text=True, timeout=200)
        assert process.returncode == 0, (line, process.stdout, process.stderr)
    else:
        assert _exit_code([*command.split(), *words]) == 0, (line, capfd.readouterr())
    kept.mkdir()
    for folder in filter(os.path.isdir, _outputs(command, words)):  # none after --print-config or --help
        shutil.copytree(folder, kept / folder, symlinks=True)


def _effective(words: list[str]) -> list[str]:
    """The words without options that are given again behind them."""
    return [
        word
        for position, word in enumerate(words)
        if not any(flag.startswith("--") and flag in words[position + 1 :] for flag in (word, words[position - 1]))
    ]


def _exit_code(args: list[str]) -> int | str | None:
    try:
        return run(args)
    except SystemExit as ended:  # --help
        return ended.code


def _run_script(code: str, script: Path) -> None:
    """Run a block that starts further processes, as a script. Of its processes, only the first prints a result."""
    small = f"functools.partial(fastmae.pretrain, **{SMALL['pretrain']})"
    script.write_text(f"import functools, fastmae\nfastmae.pretrain = {small}\n{code}")
    process = subprocess.run([sys.executable, script], check=False, capture_output=True, text=True, timeout=200)
    assert process.returncode == 0, (code, process.stdout, process.stderr)
    assert len(process.stdout.splitlines()) == 1, process.stdout


def _small_function(command: str, function: Callable[..., Any], weights: Path) -> Callable[..., Any]:
    """A function of the Python interface that adds the options that make its command small."""

    def call(*args: Any, **options: Any) -> Any:
        options = {name: _stand_in(value) if isinstance(value, str) else value for name, value in options.items()}
        words = [*map(str, args), *_flags(options)]
        _make_inputs(command, words, weights)
        small = _small_options(command, words, weights)
        if isinstance(options.get("teacher"), torch.nn.Module):
            small = {name: value for name, value in small.items() if not name.startswith("teacher")}
        return function(*args, **{**options, **small})

    return call


def _stand_in(word: str) -> str:
    """A word of a page, with its names replaced by what they stand for here."""
    for name, meaning in STAND_INS.items():
        if name.endswith("/"):
            word = meaning + word.removeprefix(name) if word.startswith(name) else word
        else:
            word = re.sub(rf"(?<![\w-]){re.escape(name)}(?![\w-])", meaning, word)
    return f"file://{Path.cwd()}/{word.removeprefix('file://')}" if word.startswith("file://") else word


def _parsed(words: list[str]) -> tuple[list[str], str, list[str]]:
    """A command line as the launcher that starts its processes ([] for this process), the command, and its words."""
    if words[0] == "sbatch":
        return ["bash", str(ROOT / words[1])], "pretrain", words[2:]
    if words[0] == "python":
        return [sys.executable, str(ROOT / words[1])], "inspect", words[2:]  # it reads a store, as inspect does
    position = words.index("fastmae")
    command = _command(words[position + 1 :])
    args = words[position + 1 + len(command.split()) :]
    if words[0] == "torchrun":
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        return [*torchrun, "-m", "fastmae", *command.split()], command, args
    if _devices(args) == "2":  # it starts a second process with its own command line
        return [sys.executable, "-m", "fastmae", *command.split()], command, args
    return ([] if words[0] == "fastmae" else [*words[: position + 1], *command.split()]), command, args


def _devices(words: list[str]) -> str | None:
    return words[words.index("--devices") + 1] if "--devices" in words else None


def _small_options(command: str, words: list[str], weights: Path) -> dict[str, Any]:
    """Options that make a command small, and that give a timm network its weights from a file."""
    small = dict(SMALL.get(command, {}))
    if any(word == "efficientnet-lite0" or word.startswith("python/") for word in words):  # they need no network
        small.pop("teacher", None)
    elif "teacher" in small:
        small["teacher_weights"] = weights
    if command in ("knn", "linear") and words[0].startswith("timm/"):
        small["weights"] = weights
    if "--micro-batch" in words:
        small["micro_batch"] = 4
    if _devices(words) not in (None, "2"):
        small["devices"] = 1
    return small


def _flags(options: dict[str, Any]) -> list[str]:
    """Keyword arguments as flags."""
    words: list[str] = []
    for name, value in options.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            words += [f"--{flag}", str(value)]
    return words


def _stores(words: list[str]) -> list[str]:
    return [word for word in words if word.endswith(".tokens")]


def _outputs(command: str, words: list[str]) -> list[str]:
    """The folders that a command writes and would continue."""
    if command == "tokenize":
        return [] if "--add" in words else _stores(words)
    if command == "pretrain":
        return words[len(_stores(words)) :][:1]
    if command == "ablate":
        return [f"fastmae-ablate/{words[0]}"]
    return words[words.index("--out") + 1 :][:1] if command in TRAIN_ON_LABELS and "--out" in words else []


def _delete(folders: list[str]) -> None:
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


def _make_inputs(command: str, words: list[str], weights: Path) -> None:
    """Make the stores and runs that a command reads, where no earlier step of the page has made them."""
    if command in ("inspect", "verify", "pretrain", "upload") or "--add" in words:
        for store in _stores(words)[: 1 if command == "upload" else None]:
            _make_store(store.removeprefix(f"file://{Path.cwd()}/"), weights)
    outputs = _outputs(command, words)
    for folder in words:
        if folder.startswith("runs/") and folder not in outputs and not Path(folder).exists():
            _make_store("photos.tokens", weights)
            _make("pretrain", ["photos.tokens", folder], weights)


def _make_store(store: str, weights: Path) -> None:
    if not (Path(store) / "manifest.json").exists():
        _make("tokenize", ["photos", store], weights)


def _make(command: str, words: list[str], weights: Path) -> None:
    assert run([command, *words, *_flags(_small_options(command, words, weights))]) == 0
