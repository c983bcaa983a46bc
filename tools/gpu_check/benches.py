"""The step's benchmark: FastMAE beside MAE, and what a step does by count."""

from gpu_check.every_command import tell
from gpu_check.report import Goal, Report
from gpu_check.setting import Setting

TOY_STEP = "--encoder vit_tiny_patch16_224 --encoder-depth 2 --image-size 32 --middle-size 64 --batch-size 4".split()
ROWS = "published,mae,offline,visible"
KERNELS, MEGABYTES = Goal(900, at_most=True), Goal(150, at_most=True)
"""Of the default ViT-B, by count."""


def bench_step(setting: Setting, report: Report) -> None:
    """`bench step`: the rows that need no online teacher."""
    size = [] if setting.on_gpu else [*TOY_STEP, "--threads", "1", "--rounds", "1"]
    table = str(report.folder / "step.md")
    call = ["bench", "step", "--rows", ROWS, "--teachers", setting.sizes.teacher, "--device", setting.device]
    outcome = setting.commands.run([*call, *size, "--out", table])
    tell(report, "bench step", outcome)
    for row in outcome.result.get("rows", []):
        name = f"bench step, {row['method']}"
        report.figure(name, row["images_per_second"], "views/s")
        report.figure(f"{name}: memory", row["memory_mb"], "MB")
        report.figure(f"{name}: times MAE", row["times_mae"])


def bench_count(setting: Setting, report: Report) -> None:
    """`bench step --count`: kernels, bytes and operations of a step."""
    size = [] if setting.on_gpu else TOY_STEP
    outcome = setting.commands.run(["bench", "step", "--count", "--device", setting.device, *size])
    tell(report, "bench step --count", outcome)
    if outcome.code == 0:
        report.figure("kernels of a step, by count", outcome.result["kernels"], "", KERNELS)
        report.figure("memory traffic by count", outcome.result["bytes_per_image"] / 1e6, "MB/view", MEGABYTES)
        report.figure("operations by count", outcome.result["flops_per_image"] / 1e9, "GFLOP/view")
