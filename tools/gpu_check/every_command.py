"""Each of fastmae's commands once, at toy size, several at the same time.

`tokenize` is called by the stage inputs, and `bench step` by the stages bench and count.
"""

from gpu_check.commands import Outcome
from gpu_check.report import Report, numbers_of
from gpu_check.setting import Setting

COMMANDS = {
    "detect": "detect {run} {work}/boxes --out {out}/detect TRAIN --batch-size 4 --head-channels 32 --image-size 64",
    "segment": "segment {run} {work}/masks --out {out}/segment TRAIN --batch-size 4 --head-channels 32 --crop-size 64",
    "finetune": "finetune {run} {data} --out {out}/finetune TRAIN --batch-size 8 --ema 0.99 --drop-path 0.1",
    "linear": "linear {run} {data} TRAIN --batch-size 16",
    "knn": "knn {run} {data} ON",
    "knn of the teacher": "knn {run} {data} --features teacher ON",
    "doctor": "doctor",
    "features": "features {run} {data} {out}/features.safetensors --dense ON",
    "report": "report {run} --images 2 --out {out}/report.html DEVICE",
    "export to timm": "export {run} {out}/timm",
    "export to transformers": "export {run} {out}/transformers --format transformers",
    "bench loader": "bench loader {data} ON TEACHER --middle-size 64 --image-size 32 --codecs fp16,pq16 --rounds 1 "
    "--sample 16 --batch-size 8",
    "bench store": "bench store {data} ON TEACHER --middle-size 64 --codecs fp16,pq16 --codec-images 16 --rounds 1",
    "inspect": "inspect {work}/pq38.tokens",
    "verify": "verify {work}/pq38.tokens",
    "upload": "upload {work}/pq38.tokens file://{out}/uploaded",
    "recipes": "recipes",
}
"""What a command is called in the report -> the command. Words in capitals stand for the options in `_words`."""
PRETRAIN = {
    "an online teacher": "--target teacher",
    "HOG, a moving average": "--target hog --ema 0.99",
    "pixels, k-NN on the way": "--target pixels --knn-every 0.1",
    "a DINOv3 encoder": "--encoder vit_small_patch16_dinov3",
    "Muon": "--optimizer muon",
    "--profile": "--profile",
}
"""Kinds of steps that the stage correctness leaves out -> options of `pretrain`."""
STUDIES = {
    "demo": "demo --images {data} --out {out}/demo --steps 8 DEVICE",
    "bench accuracy": "bench accuracy {data} --out {out}/accuracy TINY --minutes 0.03 --points 1 --fractions 1/2 "
    "--no-distillation",
    "ablate": "ablate tricks {data} --out {out}/ablate TINY --epochs 1 --jobs 2",
}
"""Commands that tokenise, train and measure by themselves."""


def every_command(setting: Setting, report: Report) -> None:
    """Each command ends well."""
    tell(report, "pretrain", setting.commands.run(setting.small_run(setting.run)))
    calls = {name: _words(line, setting) for name, line in COMMANDS.items()}
    for name, options in PRETRAIN.items():
        run = setting.work / "out" / name.replace(", ", "-").replace(" ", "-")
        calls[f"pretrain, {name}"] = setting.pretrain(run, *options.split(), steps=4, precision="auto")
    _tell_all(setting, report, calls)


def studies(setting: Setting, report: Report) -> None:
    """The same for the commands that take longest."""
    _tell_all(setting, report, {name: _words(line, setting) for name, line in STUDIES.items()})


def tell(report: Report, name: str, outcome: Outcome) -> None:
    """A check, or a left-out part if a package is missing that only some commands need."""
    if outcome.lacks_package:
        report.leave_out(name, outcome.ending)
        return
    seen = f"{numbers_of(outcome.result) or 'done'} ({outcome.seconds:.0f} s)" if outcome.code == 0 else outcome.ending
    report.check(name, outcome.code == 0, "exit code 0", seen, outcome.details)


def _tell_all(setting: Setting, report: Report, calls: dict[str, list[str]]) -> None:
    for name, outcome in setting.commands.run_all(calls).items():
        tell(report, name, outcome)


def _words(line: str, setting: Setting) -> list[str]:
    """A command's arguments."""
    device = ["--device", setting.device]
    on = [*device, "--workers", str(setting.sizes.workers)]
    options = {
        "DEVICE": device,
        "ON": on,
        "TRAIN": [*on, *"--epochs 1 --log-every 1".split()],
        "TEACHER": setting.small_teacher,
        "TINY": [*setting.small_teacher, *"--middle-size 64 --patch-size 16 --workers 0".split(), *device],
    }
    names = {"run": setting.run, "data": setting.labelled, "work": setting.work, "out": setting.work / "out"}
    return [word for part in line.split() for word in options.get(part, [part.format(**names)])]
